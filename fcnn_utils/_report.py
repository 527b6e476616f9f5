"""The report of a conversion: a table of layers with totals, as text, in a notebook, and as a page of its own."""

import math
from pathlib import Path

import pandas as pd

from fcnn_utils import _files, _report_page
from fcnn_utils._checks import check_choice
from fcnn_utils._report_page import change

COSTS = ["params_before", "params_after", "macs_before", "macs_after"]
COLUMNS = ["layer", "method", "ranks", "relative_error", "degeneracy", *COSTS, "reason"]
MEASURED = ["size_mb_before", "size_mb_after", "latency_before_ms", "latency_after_ms", "speedup", "engine", "batch"]
MEASURED += ["output_change", "loss", "metric", "metric_calls"]
_BYTES = 4  # of a parameter in float32


class Report(pd.DataFrame):
    """A DataFrame with a row for each layer with weights (see `compress.factorize`); a selection is an ordinary one.

    `repr` is one line, `print` a short table. `totals` is a dict of the numbers of the whole network, and `save` writes
    all as a page for a browser.
    """

    @classmethod
    def of(cls, rows, **measured):
        """Make a report from a dict for each layer; `measured` as in `note`."""
        return cls(pd.DataFrame(rows, columns=COLUMNS)).note(**measured)

    @property
    def _constructor(self):
        return pd.DataFrame

    def copy(self, deep=True):
        """Return a copy, with what was measured."""
        return type(self)(super().copy(deep=deep)).note(**self._measured)

    def note(self, **measured):
        """Add numbers of the whole network that the rows do not tell; they appear among the totals.

        Args:
            measured: some of these, or None for what is not known:
                size_mb_before, size_mb_after: of the weights, in 10⁶ bytes; default: 4 bytes for each parameter.
                latency_before_ms, latency_after_ms: median time of a call.
                speedup: of the new network; default: the ratio of the two times.
                engine, batch: what was timed.
                output_change: relative change of the outputs, as a fraction.
                loss: what `max_loss` bounds.
                metric, metric_calls: the user's metric of the network, and how often it was computed.

        Returns:
            The report itself.

        Raises:
            ValueError: if a name is none of these.
        """
        known = {check_choice("measured value", key, MEASURED): value for key, value in measured.items()}
        self.attrs["measured"] = self._measured | {key: value for key, value in known.items() if value is not None}
        return self

    @property
    def _measured(self):
        return self.attrs.get("measured", {})

    @property
    def _is_whole(self):
        return set(COLUMNS) <= set(self.columns)

    @property
    def totals(self):
        """The numbers of the whole network, as a dict.

        Keys: layers (with kernels), layers_factorized, params_before and _after, macs_before and _after (NaN if they
        are not known), size_mb_before and _after, and what was measured (see `note`).
        """
        has_kernel = ~self["reason"].str.contains("no kernel")
        totals = {"layers": int(has_kernel.sum()), "layers_factorized": int((self["reason"] == "").sum())}
        sums = {key: float(self[key].sum(skipna=False)) for key in COSTS}
        totals |= {key: number if math.isnan(number) else int(number) for key, number in sums.items()}
        totals |= {f"size_mb_{when}": _BYTES * totals[f"params_{when}"] / 1e6 for when in ("before", "after")}
        totals |= self._measured
        if "latency_before_ms" in totals and "latency_after_ms" in totals:
            totals.setdefault("speedup", totals["latency_before_ms"] / totals["latency_after_ms"])
        return totals

    def save(self, path, title="Factorization report", notes=()):
        """Write the report as a page that needs no other file: totals, cost by layer as a figure, table, what was left.

        Args:
            path: of the file, with the suffix .html.
            title: of the page.
            notes: lines of text under the title, such as how the network was made.

        Returns:
            The path.

        Raises:
            ValueError: the suffix is another, columns are missing, or the file cannot be written.
        """
        check_choice("suffix of the report", Path(path).suffix, (".html", ".htm"))
        if not self._is_whole:
            raise ValueError(f"the report needs its columns {', '.join(COLUMNS)}; it has {', '.join(self.columns)}")
        _files.write_atomic(path, _report_page.page(self, str(title), [str(note) for note in notes]))
        return Path(path)

    def __repr__(self):
        """Return the totals in one line."""
        if not self._is_whole:
            return super().__repr__()
        totals = self.totals
        parts = [f"{totals['layers_factorized']} of {totals['layers']} layers factorized"]
        parts += [f"parameters {change(totals['params_before'], totals['params_after'])}"]
        parts += [f"MACs {change(totals['macs_before'], totals['macs_after'])}"]
        return ", ".join([*parts, *_measurements(totals)])

    def __str__(self):
        """Return the converted layers, the totals of all layers with weights, and the layers left with the reason."""
        if not self._is_whole:
            return super().__repr__()
        totals, converted = self.totals, self[self["reason"] == ""]
        width = max(24, *converted["layer"].str.len()) if len(converted) else 24
        lines = [_line(width, "layer", "ranks", "error", "parameters", "MACs")]
        for row in converted.itertuples():
            costs = change(row.params_before, row.params_after), change(row.macs_before, row.macs_after)
            method = f"{row.method} {_report_page.ranks(row.ranks)}"
            lines.append(_line(width, row.layer, method, f"{row.relative_error:.3f}", *costs))
        costs = [change(totals[f"{what}_before"], totals[f"{what}_after"]) for what in ("params", "macs")]
        lines.append(_line(width, f"{len(converted)} converted", "", "all layers:", *costs))
        lines += [", ".join(_measurements(totals))] if _measurements(totals) else []
        left = _report_page.left_by_reason(self).items()
        lines += [f"left: {_few(names)} ({reason})" for reason, names in left if "no kernel" not in reason]
        return "\n".join(lines)

    def _repr_html_(self):
        return _report_page.summary(self) if self._is_whole else super()._repr_html_()


def _measurements(totals):
    """Return phrases on what was measured."""
    parts = []
    if "latency_after_ms" in totals and "latency_before_ms" in totals:
        parts.append(_report_page.time_change(totals))
    if "output_change" in totals:
        parts.append(f"output change {totals['output_change']:.2%}")
    if "loss" in totals:
        parts.append(f"loss {totals['loss']:.3g}")
    if "metric" in totals:
        parts.append(f"metric {totals['metric']:.4g} (computed {totals['metric_calls']} times)")
    return parts


def _line(width, layer, ranks, error, params, macs):
    return f"{layer:<{width}} {ranks:<18} {error:>12} {params:>26} {macs:>26}".rstrip()


def _few(names):
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
