"""Figures of the course, drawn with matplotlib from records and tables.

A network has the same colour and marker in every figure. The functions that draw return their axes; without the
argument `ax` (or `axes`) they make a new figure. Saved figures have 256 colours, which halves the size of the files and
changes nothing visible in plots.
"""

import base64
import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from PIL import Image

from fcnn_utils import _files
from fcnn_utils.course import environment, paths
from fcnn_utils.course.titles import TITLES

PALETTE = sns.color_palette("colorblind")
COLORS = dict(zip(TITLES, [*PALETTE[:5], PALETTE[9], (0.0, 0.0, 0.0)], strict=True))
MARKERS = dict(zip(TITLES, "os^pDPX", strict=True))
# matplotlib's player loads its icons from the network; these characters replace them.
_ICONS = {"minus": "−", "fast-backward": "«", "step-backward": "‹", "play": "▶", "pause": "❚❚"}
_ICONS |= {"step-forward": "›", "fast-forward": "»", "plus": "+"}


def setup(seed):
    """Start a notebook: set the style of all figures and the seed; print one line about this machine."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update({"figure.figsize": (7, 4), "figure.dpi": 80, "savefig.dpi": 150, "axes.titlelocation": "left"})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True})
    environment.setup(seed)


def save(figure, slug, stand_in):
    """Save a matplotlib figure as `figures/SLUG.png` in the output folder.

    With `stand_in`, a line below the figure says that it shows stand-in data.

    Raises:
        ValueError: if the file cannot be written.
    """
    if stand_in:
        figure.supxlabel("computed on STAND-IN data: generated images", color="firebrick", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    _files.write_atomic(paths.output() / "figures" / f"{slug}.png", with_palette(content.getvalue()))


def with_palette(png, colors=256):
    """Reduce a PNG file (bytes) to at most `colors` colours, from 2 to 256; return the new file.

    Every pixel gets the nearest colour, without dithering. Transparency becomes white.
    """
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    smaller = io.BytesIO()
    photograph = picture.getcolors(10_000) is None  # for the few colours of a plot a quick choice is as good
    picture.quantize(colors, kmeans=int(photograph), dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def player(animation, description):
    """Turn a matplotlib animation into `IPython.display.HTML` that plays without a network.

    The file contains every frame as an image, so the frames are small: 80 dots per inch and 64 colours.

    Args:
        animation: of matplotlib.
        description: text for readers who do not see the images.
    """
    with plt.rc_context({"savefig.dpi": 80}):
        html = animation.to_jshtml(default_mode="loop").replace("<img ", f'<img alt="{description}" ', 1)
    icons = "".join(f'.fa-{name}::before {{ content: "{icon}" }} ' for name, icon in _ICONS.items())
    icons += ".fa { font-style: normal } .fa-flip-horizontal { display: inline-block; transform: scaleX(-1) }"
    html = re.sub(r"<link[^>]*font-awesome[^>]*>", f"<style>{icons}</style>", html)

    def smaller(frame):  # base64 over several lines of JavaScript -> on one line
        png = base64.b64decode(frame[0].replace("\\\n", ""))
        return base64.b64encode(with_palette(png, 64)).decode()

    return HTML(re.sub(r"(?<=data:image/png;base64,)[^\"]*", smaller, html))


def images(pictures, titles=None, columns=10, axes=None, cmap="viridis"):
    """Draw images in a grid.

    Args:
        pictures: (N, H, W, 3) uint8; or (N, H, W) or (N, H, W, 1), drawn with `cmap`.
        titles: N texts above the images.
        columns: number of columns.
        cmap: name of a colour map.
    """
    if axes is None:
        rows = -(-len(pictures) // columns)
        size = (0.95 * columns, (1.25 if titles else 0.95) * rows)
        _, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for number, (ax, picture) in enumerate(zip(axes.flat, pictures, strict=False)):
        ax.imshow(picture, cmap=cmap)
        if titles:
            ax.set_title(titles[number], fontsize=7, loc="center")
    return axes


def cost_by_layer(costs, title="", axes=None):
    """Draw each layer's share of the MACs and of the parameters, as two bars per layer.

    Args:
        costs: table of `cost.layer_costs`.
        title: above the axes.
    """
    rows = costs[(costs["macs"] > 0) & (costs["layer"] != "total")]
    total = costs[costs["layer"] == "total"].iloc[0]
    if axes is None:
        _, axes = plt.subplots(figsize=(7, 0.6 + 0.38 * len(rows)))
    position = np.arange(len(rows))
    bars = ((-0.2, "macs", "MACs", PALETTE[0]), (0.2, "params", "parameters", PALETTE[1]))
    for offset, column, name, color in bars:
        share = 100 * rows[column].astype(float) / total[column]
        label = f"{name} ({total[column] / 1e6:.2f} M in all)"
        drawn = axes.barh(position + offset, share, 0.38, label=label, color=color)
        axes.bar_label(drawn, [f"{value:.0f}%" if value >= 0.5 else "<1%" for value in share], padding=2, fontsize=8)
    axes.set_yticks(position, rows["layer"])
    axes.invert_yaxis()
    axes.set(xlabel="share of the network (%)", title=title)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)  # clear of the bars
    return axes


def network(rows, side=32, channels=3, ax=None):
    """Draw a network as a row of boxes, one for the output of each layer.

    The height of a box is the side of its feature maps, its width grows with the root of their number, its colour
    stands for the kind of the layer.

    Args:
        rows: list of (kind, filters, kernel size, stride) of the kinds "conv", "factorized" and "separable", as from
            `networks.plan`.
        side, channels: of the images.
    """
    boxes = [("", side, channels, "0.85")]  # what is written above, side, channels, colour
    for kind, filters, size, strides in rows:
        before, side = side, -(-side // strides)
        step = f", /{strides}" if strides > 1 else ""
        if kind == "factorized":
            boxes += [(f"{size}×1", before, filters, PALETTE[1]), (f"1×{size}{step}", side, filters, PALETTE[1])]
        elif kind == "separable":
            boxes += [(f"{size}×{size}\ndepthw.{step}", side, boxes[-1][2], PALETTE[2])]
            boxes += [("1×1", side, filters, PALETTE[2])]
        else:
            boxes.append((f"{size}×{size}{step}", side, filters, PALETTE[0] if size > 1 else PALETTE[9]))
    ax = ax or plt.subplots(figsize=(8, 2.6))[1]
    left, top = 0.0, max(box[1] for box in boxes)
    for number, (label, height, count, color) in enumerate(boxes):
        width = 0.6 * np.sqrt(count)
        ax.add_patch(plt.Rectangle((left, -height / 2), width, height, facecolor=color, edgecolor="0.3", alpha=0.75))
        if number:
            ax.annotate("", (left, 0), (left - 4, 0), arrowprops={"arrowstyle": "->", "color": "0.2"})
        ax.text(left + width / 2, top / 2 + 1, label, ha="center", va="bottom", fontsize=9)
        ax.text(
            left + width / 2,
            -top / 2 - 1.5,
            f"{height}²\n×{count}" if number else f"image\n{height}²×{count}",
            ha="center",
            va="top",
            fontsize=8,
        )
        left += width + 4
    ax.text(left - 2, 0, "mean,\nsoftmax", va="center", fontsize=9)
    ax.set(xlim=(-1, left + 7), ylim=(-top / 2 - 9, top / 2 + 7))
    ax.axis("off")
    return ax


def learning_curves(runs, column, scale=1.0, label="", ax=None):
    """Draw a quantity against epochs: our runs as solid lines, those of the thesis dashed.

    Args:
        runs: dict name -> (our epochs, the thesis's epochs), two data frames with `epoch` and `column`.
        column: the quantity.
        scale: factor on it; 100 turns a share into percent.
        label: of the vertical axis.
    """
    ax = ax or plt.subplots()[1]
    for name, (ours, theirs) in runs.items():
        style = {"color": COLORS[name], "marker": MARKERS[name]}
        ax.plot(ours["epoch"], scale * ours[column], **style, label=TITLES[name])
        ax.plot(theirs["epoch"], scale * theirs[column], **style, linestyle="--", alpha=0.8, markerfacecolor="white")
    ax.plot([], [], color="0.45", linestyle="--", marker="o", markerfacecolor="white", label="thesis")
    ax.set(xlabel="epoch", ylabel=label)
    ax.set_xticks(range(1, 1 + max(len(ours) for ours, _ in runs.values())))
    return ax


def trade_off(table, column, label, ax=None):
    """Draw test accuracy against a cost, one labelled point per network.

    Args:
        table: data frame indexed by network, with `top1` (a share), `column`, and optionally `s`, the standard
            deviation of `top1` (NaN if unknown), drawn as a bar.
        column: name of the cost.
        label: of the cost's axis.
    """
    ax = ax or plt.subplots()[1]
    for name, row in table.iterrows():
        position, color = (row[column], 100 * row["top1"]), COLORS[name]
        if not np.isnan(row.get("s", np.nan)):
            ax.errorbar(*position, yerr=100 * row["s"], color=color, capsize=3)
        ax.scatter(*position, color=color, marker=MARKERS[name], s=90, zorder=3)
        right = name in ("simple", "wider_separable")  # there is room on this side
        place = {"xytext": (8 if right else -8, 0), "ha": "left" if right else "right", "va": "center"}
        ax.annotate(TITLES[name], position, textcoords="offset points", fontsize=9, **place)
    ax.set(xlabel=label, ylabel="top-1 on test images (%)")
    ax.margins(0.4, 0.25)
    ax.set_xlim(left=0)
    return ax


def dots(table, xlabel="", ax=None):
    """Draw one row per category with one dot per network, all on one axis.

    Args:
        table: data frame, one row per category and one column per network.
        xlabel: of the axis.
    """
    ax = ax or plt.subplots(figsize=(7, 0.6 + 0.27 * len(table)))[1]
    position = np.arange(len(table))
    ax.hlines(position, table.min(axis=1), table.max(axis=1), color="0.8", linewidth=3, zorder=1)
    for name in table.columns:
        style = {"color": COLORS[name], "marker": MARKERS[name], "label": TITLES[name]}
        ax.scatter(table[name], position, s=45, zorder=2, **style)
    ax.set_yticks(position, table.index)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel)
    ax.legend(loc="lower right", fontsize=10)
    return ax


def roofline(tables, peak, bytes_per_second, ax=None):
    """Draw achieved against possible speed: one point per layer, below the roof of this machine, on log–log axes.

    The size of a point grows with the layer's time, on the same scale for all tables.

    Args:
        tables: dict label -> table of `benchmark.roofline`.
        peak: MACs per second of this machine, from `benchmark.gemm_peak`.
        bytes_per_second: of its memory, from `benchmark.memory_bandwidth`.
    """
    ax = ax or plt.subplots()[1]
    every = pd.concat(tables.values())
    intensity = np.geomspace(every["intensity"].min() / 2, every["intensity"].max() * 2, 200)  # MACs per byte
    ax.plot(intensity, np.minimum(peak, intensity * bytes_per_second) / 1e9, color="0.3", label="roof")
    words = {"DepthwiseConv2D": "depthwise", "SeparableConv2D": "separable"}  # drawn as hollow points
    for number, (label, table) in enumerate(tables.items()):
        for kind, rows in table.groupby("kind"):
            color = PALETTE[number]
            ax.scatter(
                rows["intensity"],
                rows["macs"] / rows["measured_ms"] / 1e6,
                s=12 + 150 * rows["measured_ms"] / every["measured_ms"].max(),
                marker="os^"[number % 3],
                facecolor="none" if kind in words else color,
                edgecolor=color,
                label=f"{label}: {words.get(kind, 'convolutions')}",
                alpha=0.8,
            )
    ax.set(xscale="log", yscale="log", xlabel="intensity (MACs per byte)", ylabel="billion MACs per second")
    ax.legend(fontsize=8, loc="lower right")
    return ax
