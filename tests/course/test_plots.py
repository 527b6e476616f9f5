"""Figures: `fcnn_utils.course.plots`. The tests read back from the axes what was drawn."""

import base64
import io
import itertools
import re

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib import colors
from matplotlib.animation import FuncAnimation
from PIL import Image

from fcnn_utils.course import plots

WIDER = ["wider_factorized", "wider_separable"]
NAMES = ["simple", *WIDER, "deeper_dense", "deeper_tucker", "deeper_separable", "wider_dense"]


@pytest.fixture(autouse=True)
def figures():
    """Draw without a screen, and close all figures afterwards."""
    plt.switch_backend("Agg")
    with plt.rc_context():
        yield
    plt.close("all")


def texts(axes):
    return {text.get_text() for text in axes.texts}


# --- style -------------------------------------------------------------------------------------------------------


def test_every_network_has_its_own_color_and_marker():
    assert list(plots.COLORS) == list(plots.MARKERS) == NAMES
    assert len({colors.to_hex(color) for color in plots.COLORS.values()}) == len(set(plots.MARKERS.values())) == 7


# Linear RGB as seen by people who lack one kind of cone (Machado, Oliveira & Fernandes 2009).
SEEN = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(rgb):
    """CIELAB (L, a, b) of linear RGB; a distance of 2 is just visible."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ rgb / to_xyz.sum(axis=1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("lacking", SEEN)
def test_color_blind_people_can_tell_the_networks_apart(lacking):
    linear = ((np.array(list(plots.COLORS.values())) + 0.055) / 1.055) ** 2.4
    seen = [lab(np.clip(np.array(SEEN[lacking]) @ color, 0, 1)) for color in linear]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 10


def test_simulated_deuteranopia_confuses_red_and_green():
    red, green = [0.3, 0, 0], [0, 0.11, 0]
    seen = [lab(np.array(SEEN["deuteranopia"]) @ color) for color in (red, green)]
    assert np.linalg.norm(seen[0] - seen[1]) < 15 < np.linalg.norm(lab(red) - lab(green))


def test_setup_sets_style_and_seed(capsys):
    drawn = []
    for _ in range(2):
        plots.setup(5)
        drawn.append(np.random.rand())
    assert drawn[0] == drawn[1]
    assert plt.rcParams["savefig.dpi"] == 150 and not plt.rcParams["axes.spines.top"]
    assert keras.__version__ in capsys.readouterr().out


# --- files -------------------------------------------------------------------------------------------------------


def test_saved_figure_has_its_size_and_a_mark_on_stand_in_data(output):
    pictures = []
    for slug, stand_in in (("07_real", False), ("07_stand_in", True)):
        figure, ax = plt.subplots(figsize=(3, 2))
        ax.plot([1, 2])
        plots.save(figure, slug, stand_in)
        assert ("STAND-IN" in figure.get_supxlabel()) == stand_in
        pictures.append(Image.open(output / "figures" / f"{slug}.png"))
        assert pictures[-1].size == (3 * figure.dpi, 2 * figure.dpi)
    assert sorted(path.name for path in output.rglob("*.*")) == ["07_real.png", "07_stand_in.png"]
    assert len(set(pictures[1].convert("RGB").getdata()) - set(pictures[0].convert("RGB").getdata())) > 10


def png_of(pixels, mode):
    content = io.BytesIO()
    Image.fromarray(pixels, mode).save(content, "PNG")
    return content.getvalue()


def test_palette_keeps_few_colors_exactly_and_makes_the_file_smaller():
    rng = np.random.default_rng(0)
    palette = np.c_[rng.integers(0, 256, (200, 3)), np.full(200, 255)].astype("uint8")
    pixels = palette[np.arange(60_000).reshape(200, 300) // 7 % 200]
    png = png_of(pixels, "RGBA")
    smaller = plots.with_palette(png)
    picture = Image.open(io.BytesIO(smaller))
    assert len(smaller) < 0.7 * len(png) and picture.mode == "P"
    np.testing.assert_array_equal(picture.convert("RGB"), pixels[..., :3])


def test_palette_approximates_many_colors_without_dithering():
    x = np.linspace(0, 255, 256)
    pixels = np.stack(np.broadcast_arrays(x[:, None], x[None], x[:, None] / 2), axis=-1).astype("uint8")
    picture = Image.open(io.BytesIO(plots.with_palette(png_of(pixels, "RGB"))))
    near = np.asarray(picture.convert("RGB"), int)
    assert picture.mode == "P" and len(picture.convert("RGB").getcolors()) <= 256
    assert np.abs(near - pixels).max() <= 24
    changes = (near[:, 1:] != near[:, :-1]).any(axis=-1).mean()
    assert changes < 0.15  # large areas of one colour; dithering would change nearly every pixel


def test_transparent_pixels_become_white():
    pixels = np.zeros((50, 50, 4), "uint8")
    pixels[:, 25:, 3] = 255
    picture = Image.open(io.BytesIO(plots.with_palette(png_of(pixels, "RGBA")))).convert("RGB")
    assert (picture.getpixel((0, 0)), picture.getpixel((49, 0))) == ((255, 255, 255), (0, 0, 0))


def test_player_shows_every_frame_and_loads_nothing_from_the_network():
    figure, ax = plt.subplots(figsize=(2, 2))
    (line,) = ax.plot([0, 1], [0, 0], color="red", linewidth=20)
    ax.set_ylim(-1, 3)
    animation = FuncAnimation(figure, lambda number: line.set_ydata([number, number]), frames=3)
    html = plots.player(animation, "a red line that rises").data
    assert not re.findall(r"""(?:src|href)=["']?http""", html) and "font-awesome" not in html
    assert html.count('alt="a red line that rises"') == 1
    frames = [Image.open(io.BytesIO(base64.b64decode(text))) for text in re.findall(r'base64,([^"]+)"', html)]
    assert [frame.size for frame in frames] == [(160, 160)] * 3
    assert all(len(frame.convert("RGB").getcolors()) <= 64 for frame in frames)
    pixels = [np.asarray(frame.convert("RGB"), int) for frame in frames]
    rows = [np.flatnonzero(((each - (255, 0, 0)) ** 2).sum(axis=-1).min(axis=1) < 500).mean() for each in pixels]
    assert rows[0] > rows[1] + 10 > rows[2] + 20  # the line rises


# --- what is drawn -----------------------------------------------------------------------------------------------

LOG = pd.DataFrame({"epoch": [1, 2], "top1": [0.1, 0.2]})
COSTS = pd.DataFrame(
    {
        "layer": ["image", "conv1", "relu1", "conv2", "total"],
        "macs": [0, 3_000_000, 0, 1_000_000, 4_000_000],
        "params": [0, 100, 50, 350, 500],
    }
)


@pytest.mark.parametrize(
    "draw",
    [
        lambda **axes: plots.cost_by_layer(COSTS, axes=axes.get("ax")),
        lambda **axes: plots.learning_curves({"simple": (LOG, LOG)}, "top1", **axes),
        lambda **axes: plots.trade_off(
            pd.DataFrame({"top1": [0.3], "c": [1.0]}, index=["simple"]), "c", "MACs", **axes
        ),
        lambda **axes: plots.dots(pd.DataFrame({"simple": [1.0]}, index=["trees"]), **axes),
    ],
    ids=["cost_by_layer", "learning_curves", "trade_off", "dots"],
)
def test_plots_use_given_axes_or_make_new_ones(draw):
    _, ax = plt.subplots()
    assert draw(ax=ax) is ax and ax.has_data()
    new = draw()
    assert new is not ax and new.has_data()


@pytest.mark.parametrize("count, columns, rows", [(1, 4, 1), (4, 4, 1), (5, 4, 2), (12, 5, 3)])
def test_images_are_drawn_in_a_grid(count, columns, rows):
    pictures = np.random.default_rng(0).integers(0, 256, (count, 5, 4, 3), dtype="uint8")
    axes = plots.images(pictures, [f"title {number}" for number in range(count)], columns)
    assert axes.shape == (rows, columns) and not any(ax.axison for ax in axes.flat)
    for number, ax in enumerate(axes.flat):
        drawn = [image.get_array().tolist() for image in ax.images]
        assert drawn == [picture.tolist() for picture in pictures[number : number + 1]]
        assert ax.get_title() == (f"title {number}" if number < count else "")


def test_images_are_drawn_on_given_axes():
    _, given = plt.subplots(1, 2)
    maps = np.random.default_rng(0).random((2, 5, 4))
    assert plots.images(maps, axes=given) is given
    for ax, picture in zip(given, maps, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), picture)


def test_cost_by_layer_draws_shares_of_layers_with_macs():
    ax = plots.cost_by_layer(COSTS, "a title")
    assert ax.get_title() + ax.get_title("left") == "a title"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["conv1", "conv2"]
    np.testing.assert_allclose([[bar.get_width() for bar in bars] for bars in ax.containers], [[75, 25], [20, 70]])
    assert texts(ax) == {"75%", "25%", "20%", "70%"}
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["MACs (4.00 M in all)", "parameters (0.00 M in all)"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first layer is on top


def test_learning_curves_draws_ours_solid_and_the_thesis_dashed():
    ours = pd.DataFrame({"epoch": [1, 2, 3], "top1": [0.1, 0.2, 0.3]})
    runs = {name: (ours + {"epoch": 0, "top1": shift}, LOG) for shift, name in enumerate(NAMES[:2])}
    ax = plots.learning_curves(runs, "top1", scale=100, label="top-1 (%)")
    lines = [line for line in ax.lines if len(line.get_xdata())]
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--"]
    for number, name in enumerate(NAMES[:2]):
        solid, dashed = lines[2 * number : 2 * number + 2]
        np.testing.assert_allclose(solid.get_xydata(), np.c_[[1, 2, 3], 100 * (ours["top1"] + number)])
        np.testing.assert_allclose(dashed.get_xydata(), np.c_[[1, 2], [10, 20]])
        assert solid.get_marker() == dashed.get_marker() == plots.MARKERS[name]
        assert colors.to_hex(solid.get_color()) == colors.to_hex(plots.COLORS[name])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xticks().tolist()) == ("epoch", "top-1 (%)", [1, 2, 3])
    assert ax.get_legend_handles_labels()[1] == ["simple", "wider, factorized", "thesis"]


def test_trade_off_labels_points_and_draws_known_deviations():
    columns = {"top1": [0.3, 0.25, 0.2], "macs": [5.0, 8.0, 2.0], "s": [0.01, np.nan, np.nan]}
    ax = plots.trade_off(pd.DataFrame(columns, index=NAMES[:3]), "macs", "MACs (millions)")
    points = [collection.get_offsets()[0] for collection in ax.collections if len(collection.get_offsets()) == 1]
    points = [tuple(point) for point in points if point[0] > 0]
    assert points == [(5, 30), (8, 25), (2, 20)]
    assert [(text.get_text(), text.xy) for text in ax.texts] == list(
        zip(["simple", "wider, factorized", "wider, separable"], points, strict=True)
    )
    (bar,) = ax.containers
    np.testing.assert_allclose(bar.lines[2][0].get_segments(), [[[5, 29], [5, 31]]])
    assert ax.get_xlabel() == "MACs (millions)" and ax.get_xlim()[0] == 0


def test_dots_are_on_the_row_of_their_category():
    table = pd.DataFrame({"simple": [10.0, 30.0], "wider_separable": [20.0, 5.0]}, index=["trees", "people"])
    ax = plots.dots(table, "top-1 (%)")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["trees", "people"]
    by_label = {points.get_label(): points.get_offsets() for points in ax.collections}
    np.testing.assert_allclose(by_label["simple"], [[10, 0], [30, 1]])
    np.testing.assert_allclose(by_label["wider, separable"], [[20, 0], [5, 1]])
    assert ax.get_xlabel() == "top-1 (%)" and ax.get_ylim()[0] > ax.get_ylim()[1]


def test_roofline_has_a_point_per_layer_below_its_roof():
    table = pd.DataFrame(
        {
            "kind": ["Conv2D", "Conv2D", "DepthwiseConv2D"],
            "intensity": [50.0, 10.0, 1.0],
            "macs": [4e9, 1e9, 1e7],
            "measured_ms": [50.0, 20.0, 2.0],
        }
    )
    ax = plots.roofline({"dense": table}, 1e11, 1e10)
    points = np.concatenate([np.asarray(group.get_offsets()) for group in ax.collections])
    assert sorted(points.tolist()) == [[1.0, 5.0], [10.0, 50.0], [50.0, 80.0]]
    x, roof = ax.lines[0].get_data()
    assert roof.max() == pytest.approx(100) and np.interp(1.0, x, roof) == pytest.approx(10, rel=0.1)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
