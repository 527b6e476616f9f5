"""The report of a conversion: a table that prints as a short text with totals."""

import pandas as pd

COLUMNS = ["layer", "method", "ranks", "relative_error", "degeneracy"]
COLUMNS += ["params_before", "params_after", "macs_before", "macs_after", "reason"]


class Report(pd.DataFrame):
    """A DataFrame with a row for each layer with weights (see `compress.factorize`); a selection is an ordinary one."""

    @classmethod
    def of(cls, rows):
        return cls(pd.DataFrame(rows, columns=COLUMNS))

    @property
    def _constructor(self):
        return pd.DataFrame

    def __str__(self):
        """Return the converted layers, the totals of all layers with weights, and the layers left with the reason."""
        if list(self.columns) != COLUMNS:
            return super().__str__()
        converted, left = self[self["reason"] == ""], self[self["reason"] != ""]
        left = left[~left["reason"].str.contains("no kernel")]
        lines = [_line("layer", "ranks", "error", "parameters", "MACs")]
        for row in converted.itertuples():
            ranks = "×".join(map(str, row.ranks))
            costs = _change(row.params_before, row.params_after), _change(row.macs_before, row.macs_after)
            lines.append(_line(row.layer, f"{row.method} {ranks}", f"{row.relative_error:.3f}", *costs))
        total = self[["params_before", "params_after", "macs_before", "macs_after"]].sum(skipna=False)
        costs = _change(*total.iloc[:2]), _change(*total.iloc[2:])
        lines.append(_line(f"{len(converted)} converted", "", "all layers:", *costs))
        by_reason = left.groupby("reason", sort=False)["layer"].agg(list)
        lines += [f"left: {_few(names)} ({reason})" for reason, names in by_reason.items()]
        return "\n".join(lines)

    __repr__ = __str__


def _line(layer, ranks, error, params, macs):
    return f"{layer:<24} {ranks:<18} {error:>12} {params:>26} {macs:>26}".rstrip()


def _change(before, after):
    if pd.isna(before) or pd.isna(after):
        return "?"
    share = f" ({after / before:.0%})" if before else ""
    return f"{_short(before)} -> {_short(after)}{share}"


def _short(number):
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _few(names):
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
