"""Format a report as HTML: a summary for a notebook, and a page that needs no other file.

Functions take a `_report.Report`. All its texts are escaped. The summary sets no colours, so that it is readable on a
dark background as well.
"""

import datetime
import html
import math

import pandas as pd

import fcnn_utils

_ENGINES = {"keras": "Keras", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "litert": "LiteRT"}
_LEFT = 'style="text-align: left"'  # in a notebook, where numbers are on the right
_NOT_LISTED = "images", "verbose"  # the page gives the path of the images, and `verbose` changes no result
_MANY = 20  # layers from which on a summary folds its table
_STYLE = """
:root { color-scheme: light dark; --text: #1c2126; --back: #fff; --quiet: #5f6a75; --line: #d9dee3; --track: #eef1f4;
  --before: #a3adb8; --after: #1668c1; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --back: #15191d; --quiet: #9aa5b0; --line: #363e46;
  --track: #22282e; --before: #77828d; --after: #5aa9f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1.5rem 1rem 3rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .25rem 0 1rem; max-width: 45rem; }
.quiet, caption, footer, dt { color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: normal; }
.totals { margin-top: 1rem; }
.totals tbody th, .totals td:last-child { white-space: normal; }
tr.left { color: var(--quiet); }
.figure { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.5rem 2.5rem; }
.bar { display: grid; grid-template-columns: 10.5rem 1fr 10.5rem; gap: 0 .6rem; align-items: center; padding: .15rem 0;
  font-size: .85rem; line-height: 1.25; }
.bar .name { overflow-wrap: anywhere; }
.bar .value { color: var(--quiet); font-variant-numeric: tabular-nums; }
.track { background: var(--track); border-radius: 2px; overflow: hidden; }
.track i, .key { display: block; height: .45rem; min-width: 1px; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.before { background: var(--before); }
.after { background: var(--after); }
.key { display: inline-block; width: 1.4rem; margin: 0 .35rem .1rem 0; }
.key.after { margin-left: 1rem; }
dt { margin-top: .6rem; }
dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; font-size: .85rem; max-width: 45rem; }
@media (max-width: 40rem) {
  th, td { padding-right: .7rem; }
  .totals { font-size: .9rem; width: 100%; }
  .totals td:last-child, .totals th:last-child { padding-right: 0; }
  .scroll tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 7.5rem; }
  .scroll table { font-size: .9rem; }
  .bar { grid-template-columns: 1fr auto; padding: .3rem 0; }
  .bar .track { grid-row: 2; grid-column: 1 / 3; }
}
"""


def page(report, title, notes=()):
    """Return a report as a whole HTML page, with lines of text under the title."""
    totals = report.totals
    done = f"{totals['layers_factorized']} of {totals['layers']} layers with kernels were factorized."
    title, left = html.escape(title), _left(report)
    left = f"<h2>Left as they were</h2>{left}" if left else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="quiet">{done}</p>
{"".join(f"<p>{html.escape(note)}</p>" for note in notes)}
{_totals_table(totals)}
<h2>Cost by layer</h2>
<p class="quiet"><span class="key before"></span>before <span class="key after"></span>after</p>
<div class="figure">
{_bars(report, "macs", "MACs of one image")}
{_bars(report, "params", "Parameters")}
</div>
<h2>Layers</h2>
{_layer_table(report)}
{left}
<footer>
<p>A MAC is one multiply-add. The error is the relative error of a layer's kernel, as the weights alone give it. It is
the norm of the difference over the norm of the kernel. Factors that were fitted to images may have a larger error and
still change the outputs less. If images were given, the change of the outputs is the root mean square of the change,
divided by the root mean square of the outputs, on at most the first 128 of these images. On other
images the outputs change more, above all if the images were few. Times are medians over calls. The networks were called
in turn, and a measured speed-up is the median of the ratios of paired calls.</p>
<p>fcnn_utils {html.escape(fcnn_utils.__version__)}</p>
</footer>
</body>
</html>
"""


def origin(model, images, arguments):
    """Return a sentence on how a network was made.

    Args:
        model: path of the dense network.
        images: path of the calibration images, or None.
        arguments: dict of the options of the command line, by name; True for one without a value.
    """
    said = [f"Made from {model} on {datetime.date.today()} with"]
    said += [_option(key, value) for key, value in arguments.items() if key not in _NOT_LISTED]
    return " ".join([*said, f"--images {images}." if images else "and without images."])


def _option(name, value):
    """Write an option as on the command line: a list with commas, a tuple with spaces, True without a value."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    text = (" " if isinstance(value, tuple) else ",").join(
        f"{each:.12g}" if isinstance(each, float) else str(each) for each in numbers
    )
    return f"--{name.replace('_', '-')}" + (f" {text}" if value is not True else "")


def summary(report):
    """Return a report as HTML for a notebook: the totals, the converted layers, and what was left."""
    converted = report[report["reason"] == ""]
    layers = _layer_table(converted)
    what = f"{len(converted)} of {report.totals['layers']} layers with kernels factorized"
    is_open = "" if len(converted) > _MANY else " open"
    table = f"<details{is_open}><summary>{what}</summary>{layers}</details>"
    left = f"<details><summary>left as they were</summary>{_left(report)}</details>" if _left(report) else ""
    return f"<div>{_totals_table(report.totals)}{table}{left}</div>"


# --- text --------------------------------------------------------------------------------------------------------


def change(before, after):
    """Format a number before and after: "1.39 M -> 344 k (25%)"."""
    if pd.isna(before) or pd.isna(after):
        return "?"
    share = f" ({after / before:.0%})" if before else ""
    return f"{short(before)} -> {short(after)}{share}"


def time_change(totals):
    """Format the times before and after: "time 12.3 -> 5.12 ms (2.41 times as fast, ONNX Runtime, batch of 1)"."""
    before, after = totals["latency_before_ms"], totals["latency_after_ms"]
    ratio = f"{totals['speedup']:.2f} times as fast"
    return f"time {before:.3g} -> {after:.3g} ms ({', '.join([ratio, *_timed(totals)])})"


def _timed(totals):
    """Say what was timed."""
    engine = totals.get("engine")
    engine = [str(_ENGINES.get(engine, engine))] if engine else []
    return engine + ([f"batch of {totals['batch']}"] if "batch" in totals else [])


def short(number):
    """Format a count with three digits: "1.39 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f}"


def ranks(values):
    """Format the ranks of a layer: "16×24"."""
    return "×".join(map(str, values)) if isinstance(values, (tuple, list)) else str(values)


def left_by_reason(report):
    """Return dict reason -> names of the layers that were left for it, in the order of the model."""
    left = report[report["reason"] != ""]
    return left.groupby("reason", sort=False)["layer"].agg(list).to_dict()


# --- parts of both ------------------------------------------------------------------------------------------------


def _totals_table(totals):
    rows = []
    for key, name in (("params", "Parameters"), ("macs", "MACs of one image")):
        before, after = totals[f"{key}_before"], totals[f"{key}_after"]
        is_known = not (math.isnan(before) or math.isnan(after))
        cells = (short(before), short(after), _share(before, after)) if is_known else ("not known", "not known", "")
        rows.append((name, *cells))
    before, after = totals["size_mb_before"], totals["size_mb_after"]
    rows.append(("Size of the weights", f"{_megabytes(before)}", f"{_megabytes(after)}", _share(before, after)))
    if "latency_before_ms" in totals and "latency_after_ms" in totals:
        before, after = totals["latency_before_ms"], totals["latency_after_ms"]
        faster = f"{totals['speedup']:.2f} times as fast"
        what = f"Time of a call ({', '.join(_timed(totals))})" if _timed(totals) else "Time of a call"
        rows.append((what, f"{before:.3g} ms", f"{after:.3g} ms", faster))
    if "output_change" in totals:
        rows.append(("Change of the outputs", "", f"{totals['output_change']:.2%}", ""))
    if "loss" in totals:
        rows.append(("Loss", "", f"{totals['loss']:.3g}", ""))
    if "metric" in totals:
        rows.append((f"Metric, computed {totals['metric_calls']} times", "", f"{totals['metric']:.4g}", ""))
    body = "".join(
        f'<tr><th scope="row" {_LEFT}>{html.escape(name)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    head = f'<tr><th {_LEFT}></th><th scope="col">before</th><th scope="col">after</th><th scope="col">ratio</th></tr>'
    return f'<table class="totals"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _layer_table(report):
    """Return the table of layers with kernels."""
    rows = []
    for row in report[~report["reason"].str.contains("no kernel")].itertuples():
        if row.reason:
            method, error = "left", ""
            params, macs = short(row.params_before), "?" if pd.isna(row.macs_before) else short(row.macs_before)
        else:
            method, error = f"{row.method} {ranks(row.ranks)}", f"{row.relative_error:.3f}"
            params, macs = change(row.params_before, row.params_after), change(row.macs_before, row.macs_after)
        cells = "".join(f"<td>{html.escape(_arrow(cell))}</td>" for cell in (error, params, macs))
        kind = "left" if row.reason else "converted"
        rows.append(
            f'<tr class="{kind}"><th scope="row" {_LEFT}>{html.escape(str(row.layer))}</th>'
            f"<td {_LEFT}>{html.escape(method)}</td>{cells}</tr>"
        )
    names = ("layer", "method and ranks", "error", "parameters", "MACs")
    sides = (_LEFT, _LEFT, "", "", "")
    head = "".join(f'<th scope="col" {side}>{name}</th>' for name, side in zip(names, sides, strict=True))
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _left(report):
    """Return the layers that were left, by reason; "" if there are none."""
    items = [
        f"<dt>{html.escape(reason)}</dt><dd>{html.escape(', '.join(map(str, names)))}</dd>"
        for reason, names in left_by_reason(report).items()
    ]
    return f"<dl>{''.join(items)}</dl>" if items else ""


def _bars(report, key, title):
    """Return a figure of one cost before and after, with a pair of bars for each layer that has a kernel."""
    before, after = report[f"{key}_before"], report[f"{key}_after"]
    has_kernel = ~report["reason"].str.contains("no kernel")
    pairs = list(zip(report["layer"][has_kernel], before[has_kernel], after[has_kernel], strict=True))
    others = before[~has_kernel].sum(), after[~has_kernel].sum()
    if max(others) > 0:
        pairs.append((f"{(~has_kernel).sum()} layers without kernels", *others))
    pairs = [pair for pair in pairs if not (pd.isna(pair[1]) or pd.isna(pair[2]))]
    if not pairs:
        return f"<div><h3>{title}</h3><p>They are not known, because the size of the images is not fixed.</p></div>"
    largest = max(1, *(number for _, *numbers in pairs for number in numbers))
    rows = []
    for layer, *numbers in pairs:
        widths = [f"{100 * number / largest:.2f}" for number in numbers]
        bars = "".join(
            f'<i class="{when}" style="width:{width}%"></i>'
            for when, width in zip(("before", "after"), widths, strict=True)
        )
        value = short(numbers[0]) if numbers[0] == numbers[1] else change(*numbers)
        rows.append(
            f'<div class="bar"><span class="name">{html.escape(str(layer))}</span><span class="track">{bars}</span>'
            f'<span class="value">{html.escape(_arrow(value))}</span></div>'
        )
    return f"<div><h3>{title}</h3>{''.join(rows)}</div>"


def _share(before, after):
    return f"{after / before:.0%}" if before else ""


def _megabytes(number):
    return f"{number:.3g} MB" if number < 999.5 else f"{number:,.0f} MB"


def _arrow(text):
    return text.replace("->", "→")
