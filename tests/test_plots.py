"""Figures: `fcnn_utils.course.plots`. What is drawn is read back from the axes."""

import base64
import io
import itertools
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib import colors
from matplotlib.animation import FuncAnimation
from PIL import Image

from fcnn_utils.course import plots

NAMES = ["simple", "wider_factorized", "wider_separable", "deeper_dense", "deeper_tucker", "deeper_separable"]


@pytest.fixture(autouse=True)
def figures():
    """Figures without a screen; every one is closed again."""
    plt.switch_backend("Agg")
    with plt.rc_context():
        yield
    plt.close("all")


def texts(axes):
    return {text.get_text() for text in axes.texts}


# --- basic -------------------------------------------------------------------------------------------------------


def test_every_network_has_a_color_and_a_marker_of_its_own():
    assert list(plots.COLORS) == list(plots.MARKERS) == NAMES
    assert len({colors.to_hex(color) for color in plots.COLORS.values()}) == len(set(plots.MARKERS.values())) == 6


# What a linear RGB colour looks like to those who lack one kind of cone (Machado, Oliveira & Fernandes 2009).
SEEN = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(rgb):
    """CIELAB (L, a, b) of linear RGB, in which a distance of 2 is just seen."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ rgb / to_xyz.sum(axis=1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("lacking", SEEN)
def test_the_networks_colors_are_told_apart_by_the_color_blind(lacking):
    linear = ((np.array(list(plots.COLORS.values())) + 0.055) / 1.055) ** 2.4
    seen = [lab(np.clip(np.array(SEEN[lacking]) @ color, 0, 1)) for color in linear]
    distances = [np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)]
    assert min(distances) > 10
    red, green = [lab(np.array(SEEN["deuteranopia"]) @ color) for color in ([0.3, 0, 0], [0, 0.11, 0])]
    assert np.linalg.norm(red - green) < 15 < np.linalg.norm(lab([0.3, 0, 0]) - lab([0, 0.11, 0]))  # it can fail


def test_setup_sets_the_style_and_the_seed(capsys):
    drawn = []
    for _ in range(2):
        plots.setup(5)
        drawn.append(np.random.rand())
    assert drawn[0] == drawn[1]
    assert plt.rcParams["savefig.dpi"] == 150 and not plt.rcParams["axes.spines.top"]
    assert "Keras" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cost_by_layer", "learning_curves", "trade_off", "dots"])
def test_axes_that_are_given_are_drawn_on_and_returned(name):
    _, ax = plt.subplots()
    table = pd.DataFrame({"top1": [0.3], "cost": [1.0]}, index=["simple"])
    log = pd.DataFrame({"epoch": [1, 2], "top1": [0.1, 0.2]})
    costs = pd.DataFrame({"layer": ["a", "total"], "macs": [4, 4], "params": [2, 2]})
    draw = {
        "cost_by_layer": lambda ax: plots.cost_by_layer(costs, axes=ax),
        "learning_curves": lambda ax: plots.learning_curves({"simple": (log, log)}, "top1", ax=ax),
        "trade_off": lambda ax: plots.trade_off(table, "cost", "MACs", ax=ax),
        "dots": lambda ax: plots.dots(pd.DataFrame({"simple": [1.0]}, index=["trees"]), ax=ax),
    }[name]
    assert draw(ax) is ax and ax.has_data()
    made = draw(None)
    assert made is not ax and made.has_data()


# --- correct: files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stand_in", [False, True])
def test_a_figure_is_saved_whole_and_marked_on_stand_in_data(output, stand_in):
    figure, ax = plt.subplots(figsize=(3, 2))
    ax.plot([1, 2])
    plots.save(figure, "07_curve", stand_in)
    path = output / "figures" / "07_curve.png"
    assert [file for file in output.rglob("*") if file.is_file()] == [path]
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    picture = plt.imread(path)
    dpi = plt.rcParams["savefig.dpi"]
    dpi = figure.dpi if dpi == "figure" else dpi
    assert picture.shape[:2] == (2 * dpi, 3 * dpi) and picture.std() > 0
    marks = [text.get_text() for text in figure.texts]
    marks += [figure.get_supxlabel()]
    assert any("STAND-IN" in mark for mark in marks) == stand_in


def test_a_figure_on_stand_in_data_looks_another(output):
    for stand_in in (False, True):
        figure, ax = plt.subplots(figsize=(3, 2))
        ax.plot([1, 2])
        plots.save(figure, f"mark{stand_in}", stand_in)
    pictures = [plt.imread(output / "figures" / f"mark{stand_in}.png") for stand_in in (False, True)]
    assert not np.array_equal(*pictures)


# --- correct: what is drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, columns, rows", [(1, 4, 1), (4, 4, 1), (5, 4, 2), (12, 5, 3)])
def test_pictures_stand_in_a_grid(count, columns, rows):
    pictures = np.random.default_rng(0).integers(0, 256, (count, 5, 4, 3), dtype="uint8")
    axes = plots.images(pictures, [f"title {number}" for number in range(count)], columns)
    assert axes.shape == (rows, columns)
    for number, ax in enumerate(axes.flat):
        assert not ax.axison
        assert [image.get_array().tolist() for image in ax.images] == [
            picture.tolist() for picture in pictures[number : number + 1]
        ]
        assert ax.get_title() == (f"title {number}" if number < count else "")


def test_pictures_go_on_axes_that_are_given():
    _, given = plt.subplots(1, 2)
    maps = np.random.default_rng(0).random((2, 5, 4))
    assert plots.images(maps, axes=given) is given
    for ax, picture in zip(given, maps, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), picture)


def test_bars_are_the_shares_of_the_layers():
    costs = pd.DataFrame(
        {
            "layer": ["image", "conv1", "relu1", "conv2", "total"],
            "macs": [0, 3_000_000, 0, 1_000_000, 4_000_000],
            "params": [0, 100, 50, 350, 500],
        }
    )
    ax = plots.cost_by_layer(costs, "a title")
    assert ax.get_title() + ax.get_title("left") == "a title"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["conv1", "conv2"]
    widths = [[bar.get_width() for bar in bars] for bars in ax.containers]
    np.testing.assert_allclose(widths, [[75, 25], [20, 70]])
    assert texts(ax) == {"75%", "25%", "20%", "70%"}
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["MACs (4.00 M in all)", "parameters (0.00 M in all)"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first layer on top


def test_curves_are_ours_solid_and_the_thesiss_dashed():
    ours = pd.DataFrame({"epoch": [1, 2, 3], "top1": [0.1, 0.2, 0.3]})
    theirs = pd.DataFrame({"epoch": [1, 2], "top1": [0.05, 0.15]})
    runs = {name: (ours + {"epoch": 0, "top1": shift}, theirs) for shift, name in enumerate(NAMES[:2])}
    ax = plots.learning_curves(runs, "top1", scale=100, label="top-1 (%)")
    lines = [line for line in ax.lines if len(line.get_xdata())]
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--"]
    for number, name in enumerate(NAMES[:2]):
        solid, dashed = lines[2 * number : 2 * number + 2]
        np.testing.assert_allclose(solid.get_xydata(), np.c_[[1, 2, 3], 100 * (ours["top1"] + number)])
        np.testing.assert_allclose(dashed.get_xydata(), np.c_[[1, 2], [5, 15]])
        assert solid.get_marker() == dashed.get_marker() == plots.MARKERS[name]
        assert colors.to_hex(solid.get_color()) == colors.to_hex(plots.COLORS[name])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "top-1 (%)")
    assert ax.get_xticks().tolist() == [1, 2, 3]
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["simple", "wider, factorized", "thesis"]


def test_points_of_a_trade_off_are_named():
    table = pd.DataFrame({"top1": [0.3, 0.25, 0.2], "macs": [5.0, 8.0, 2.0]}, index=NAMES[:3])
    ax = plots.trade_off(table, "macs", "MACs (millions)")
    points = np.concatenate([points.get_offsets() for points in ax.collections])
    np.testing.assert_allclose(points, [[5, 30], [8, 25], [2, 20]])
    assert texts(ax) == {"simple", "wider, factorized", "wider, separable"}
    for text, point in zip(ax.texts, points, strict=True):
        np.testing.assert_allclose(text.xy, point)
    assert ax.get_xlabel() == "MACs (millions)" and ax.get_xlim()[0] == 0


def test_dots_stand_on_the_row_of_their_category():
    table = pd.DataFrame({"simple": [10.0, 30.0], "wider_separable": [20.0, 5.0]}, index=["trees", "people"])
    ax = plots.dots(table, "top-1 (%)")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["trees", "people"]
    by_label = {points.get_label(): points.get_offsets() for points in ax.collections if points.get_label()[:1] != "_"}
    np.testing.assert_allclose(by_label["simple"], [[10, 0], [30, 1]])
    np.testing.assert_allclose(by_label["wider, separable"], [[20, 0], [5, 1]])
    assert ax.get_xlabel() == "top-1 (%)" and ax.get_ylim()[0] > ax.get_ylim()[1]


def test_roofline_has_a_mark_for_each_layer_under_its_roof():
    table = pd.DataFrame(
        {
            "kind": ["Conv2D", "Conv2D", "DepthwiseConv2D"],
            "intensity": [50.0, 10.0, 1.0],
            "macs": [4e9, 1e9, 1e7],
            "measured_ms": [50.0, 20.0, 2.0],
        }
    )
    ax = plots.roofline({"dense": table}, 1e11, 1e10)
    marks = np.concatenate([np.asarray(group.get_offsets()) for group in ax.collections])
    assert sorted(marks.tolist()) == [[1.0, 5.0], [10.0, 50.0], [50.0, 80.0]]
    x, roof = ax.lines[0].get_data()
    assert roof.max() == pytest.approx(100) and np.interp(1.0, x, roof) == pytest.approx(10, rel=0.1)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_a_player_wants_nothing_from_the_network_and_shows_every_frame():
    figure, ax = plt.subplots(figsize=(2, 2))
    (line,) = ax.plot([0, 1], [0, 0], color="red", linewidth=20)
    ax.set_ylim(-1, 3)
    film = FuncAnimation(figure, lambda number: line.set_ydata([number, number]), frames=3)
    html = plots.player(film, "a red line that rises").data
    assert not re.findall(r"""(?:src|href)=["']?http""", html) and "font-awesome" not in html
    assert html.count('alt="a red line that rises"') == 1
    frames = [Image.open(io.BytesIO(base64.b64decode(text))) for text in re.findall(r'base64,([^"]+)"', html)]
    assert [frame.size for frame in frames] == [(160, 160)] * 3
    pixels = [np.asarray(frame.convert("RGB"), int) for frame in frames]
    rows = [np.flatnonzero(((each - (255, 0, 0)) ** 2).sum(axis=-1).min(axis=1) < 500).mean() for each in pixels]
    assert rows[0] > rows[1] + 10 > rows[2] + 20  # the line, higher from frame to frame
