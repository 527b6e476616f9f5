"""Figures: records and tables in, matplotlib axes out. Colours and markers of a network are the same everywhere."""

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
from fcnn_utils.course import environment, networks, records

PALETTE = sns.color_palette("colorblind")
COLORS = dict(zip(networks.TITLES, [*PALETTE[:5], PALETTE[9]], strict=True))
MARKERS = dict(zip(networks.TITLES, "os^pDP", strict=True))
_GREY = "0.45"
_ICONS = {"minus": "−", "fast-backward": "«", "step-backward": "‹", "play": "▶", "pause": "❚❚"}
_ICONS |= {"step-forward": "›", "fast-forward": "»", "plus": "+"}
_RIGHT, _LEFT = {"xytext": (8, 0), "ha": "left", "va": "center"}, {"xytext": (-8, 0), "ha": "right", "va": "center"}


def setup(seed):
    """First line of every notebook: one style for all figures, one seed, and a line that tells what runs here."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update({"figure.figsize": (7, 4), "figure.dpi": 80, "savefig.dpi": 150, "axes.titlelocation": "left"})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True})
    environment.setup(seed)


def save(figure, slug, stand_in):
    """Save `figure` as `figures/SLUG.png` of the output folder (`records.output`), whole; returns nothing.

    Args:
        figure: matplotlib's.
        slug: name of the file without its ending.
        stand_in: whether it shows stand-in data; a line below the figure then says so.

    Raises:
        ValueError: the file cannot be written.
    """
    if stand_in:
        figure.supxlabel("computed on STAND-IN data: generated images", color="firebrick", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    _files.write_atomic(records.output() / "figures" / f"{slug}.png", content.getvalue())


def player(animation, description):
    """A matplotlib animation as HTML that plays without a network, from which matplotlib's player takes its icons.

    Every frame is a picture of its own in the file, so it is kept small: at 80 dots an inch and in 64 colours.

    Args:
        animation: matplotlib's.
        description: what is read out, or shown, instead of the pictures.

    Returns:
        IPython's `HTML`, which a notebook shows.
    """
    with plt.rc_context({"savefig.dpi": 80}):
        html = animation.to_jshtml(default_mode="loop").replace("<img ", f'<img alt="{description}" ', 1)
    icons = "".join(f'.fa-{name}::before {{ content: "{icon}" }} ' for name, icon in _ICONS.items())
    icons += ".fa { font-style: normal } .fa-flip-horizontal { display: inline-block; transform: scaleX(-1) }"
    html = re.sub(r"<link[^>]*font-awesome[^>]*>", f"<style>{icons}</style>", html)
    return HTML(re.sub(r"(?<=data:image/png;base64,)[^\"]*", _in_few_colors, html))


def _in_few_colors(match):
    """The picture in `match`, base64 over several lines of JavaScript, with 64 colours, on one line."""
    content = io.BytesIO(base64.b64decode(match[0].replace("\\\n", "")))
    Image.open(content).convert("RGB").quantize(64).save(smaller := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def images(pictures, titles=None, columns=10, axes=None, cmap="viridis"):
    """Grid of images; returns its axes.

    Args:
        pictures: (N, H, W, 3) uint8, or (N, H, W) or (N, H, W, 1), which are drawn in `cmap`.
        titles: N words above them.
        columns: of the grid.
        axes: array of axes to draw into; default: those of a new figure.
        cmap: name of a colour map.
    """
    rows = -(-len(pictures) // columns)
    if axes is None:
        _, axes = plt.subplots(
            rows, columns, figsize=(0.95 * columns, (1.25 if titles else 0.95) * rows), squeeze=False
        )
    for ax in axes.flat:
        ax.axis("off")
    for number, (ax, picture) in enumerate(zip(axes.flat, pictures, strict=False)):
        ax.imshow(picture, cmap=cmap)
        if titles:
            ax.set_title(titles[number], fontsize=7, loc="center")
    return axes


def cost_by_layer(costs, title="", axes=None):
    """Share of MACs and of parameters by layer, as two bars a layer; returns the axes.

    Args:
        costs: table of `cost.layer_costs`.
        title: above the axes.
        axes: to draw into; default: those of a new figure.
    """
    rows = costs[(costs["macs"] > 0) & (costs["layer"] != "total")]
    total = costs[costs["layer"] == "total"].iloc[0]
    if axes is None:
        _, axes = plt.subplots(figsize=(7, 0.6 + 0.38 * len(rows)))
    position = np.arange(len(rows))
    for offset, column, label, color in (
        (-0.2, "macs", "MACs", PALETTE[0]),
        (0.2, "params", "parameters", PALETTE[1]),
    ):
        share = 100 * rows[column].astype(float) / total[column]
        bars = axes.barh(
            position + offset, share, 0.38, label=f"{label} ({total[column] / 1e6:.2f} M in all)", color=color
        )
        axes.bar_label(bars, [f"{value:.0f}%" for value in share], padding=2, fontsize=8)
    axes.set_yticks(position, rows["layer"])
    axes.invert_yaxis()
    axes.set(xlabel="share of the network (%)", title=title)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)  # clear of the bars
    return axes


def learning_curves(runs, column, scale=1.0, label="", ax=None):
    """One training figure against epochs; solid our runs, dashed the points of the thesis.

    Args:
        runs: dict name -> (our epochs, the thesis's epochs), two data frames with `epoch` and `column`.
        column: what to draw.
        scale: factor of it, 100 for a share in percent.
        label: of the vertical axis.
        ax: to draw into; default: that of a new figure.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots()[1]
    for name, (ours, theirs) in runs.items():
        style = {"color": COLORS[name], "marker": MARKERS[name]}
        ax.plot(ours["epoch"], scale * ours[column], **style, label=networks.TITLES[name])
        ax.plot(theirs["epoch"], scale * theirs[column], **style, linestyle="--", alpha=0.8, markerfacecolor="white")
    ax.plot([], [], color=_GREY, linestyle="--", label="thesis")
    ax.set(xlabel="epoch", ylabel=label)
    ax.set_xticks(range(1, 1 + max(len(ours) for ours, _ in runs.values())))
    return ax


def trade_off(table, column, label, ax=None):
    """Test accuracy against a cost, one point a network, named beside it.

    Args:
        table: data frame indexed by network, with `top1` (a share), `column`, and where it is there `s`, the standard
            deviation of `top1` (NaN: unknown), drawn as a bar.
        column: name of the cost's column.
        label: of the cost's axis.
        ax: to draw into; default: that of a new figure.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots()[1]
    for name, row in table.iterrows():
        if not np.isnan(row.get("s", np.nan)):
            ax.errorbar(row[column], 100 * row["top1"], yerr=100 * row["s"], color=COLORS[name], capsize=3)
        ax.scatter(row[column], 100 * row["top1"], color=COLORS[name], marker=MARKERS[name], s=90, zorder=3)
        place = _RIGHT if name in ("simple", "wider_separable") else _LEFT  # where there is room
        position = (row[column], 100 * row["top1"])
        ax.annotate(networks.TITLES[name], position, textcoords="offset points", fontsize=9, **place)
    ax.set(xlabel=label, ylabel="top-1 on test images (%)")
    ax.margins(0.4, 0.25)
    ax.set_xlim(left=0)
    return ax


def dots(table, xlabel="", ax=None):
    """One row a category, one dot a network, all on a common scale; returns the axes.

    Args:
        table: data frame, a row a category and a column a network.
        xlabel: of the common axis.
        ax: to draw into; default: that of a new figure.
    """
    ax = ax or plt.subplots(figsize=(7, 0.6 + 0.27 * len(table)))[1]
    position = np.arange(len(table))
    ax.hlines(position, table.min(axis=1), table.max(axis=1), color="0.8", linewidth=3, zorder=1)
    for name in table.columns:
        ax.scatter(
            table[name], position, color=COLORS[name], marker=MARKERS[name], s=45, label=networks.TITLES[name], zorder=2
        )
    ax.set_yticks(position, table.index)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel)
    ax.legend(loc="lower right", fontsize=10)
    return ax


def roofline(tables, peak, bytes_per_second, ax=None):
    """Achieved against possible: one point a layer, below the roof of this machine; both axes logarithmic.

    The size of a point grows with the layer's time, on one scale for all tables.

    Args:
        tables: dict label -> table of `benchmark.roofline`.
        peak: MACs a second of this machine, from `benchmark.gemm_peak`.
        bytes_per_second: of its memory, from `benchmark.memory_bandwidth`.
        ax: to draw into; default: that of a new figure.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots()[1]
    every = pd.concat(tables.values())
    intensity = np.geomspace(every["intensity"].min() / 2, every["intensity"].max() * 2, 200)  # MACs a byte
    ax.plot(intensity, np.minimum(peak, intensity * bytes_per_second) / 1e9, color="0.3", label="this machine at best")
    for number, (label, table) in enumerate(tables.items()):
        for kind, rows in table.groupby("kind"):
            filled = PALETTE[number] if kind != "DepthwiseConv2D" else "none"
            ax.scatter(
                rows["intensity"],
                rows["macs"] / rows["measured_ms"] / 1e6,
                s=12 + 150 * rows["measured_ms"] / every["measured_ms"].max(),
                marker="os^"[number % 3],
                facecolor=filled,
                edgecolor=PALETTE[number],
                label=f"{label}: {'depthwise' if filled == 'none' else 'convolutions'}",
                alpha=0.8,
            )
    ax.set(xscale="log", yscale="log", xlabel="intensity (MACs a byte)", ylabel="billion MACs a second")
    ax.legend(fontsize=8, loc="lower right")
    return ax
