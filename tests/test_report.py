"""The report of a conversion: totals, text, notebook and page."""

import html.parser
import math
import pickle
import re

import pandas as pd
import pytest

from fcnn_utils._report import COLUMNS, Report

LEFT = {"params_after": 100, "params_before": 100, "macs_before": 0, "macs_after": 0}
ROWS = [
    {"layer": "stem", "reason": "reads 3 channels", **LEFT, "macs_before": 5000, "macs_after": 5000},
    {"layer": "norm", "reason": "a BatchNormalization: it has no kernel", **LEFT},
    {
        "layer": "block/conv<1>",
        "method": "tucker",
        "ranks": (16, 24),
        "relative_error": 0.125,
        "params_before": 800,
        "params_after": 200,
        "macs_before": 1_380_000,
        "macs_after": 340_000,
        "reason": "",
    },
]
MEASURED = {"latency_before_ms": 12.5, "latency_after_ms": 5.0, "engine": "onnxruntime", "batch": 2}
MEASURED |= {"output_change": 0.0312}
VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture
def report():
    return Report.of(ROWS, **MEASURED)


class Page(html.parser.HTMLParser):
    """A parsed page: its texts in order; it fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.attributes, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())


# --- totals ------------------------------------------------------------------------------------------------------


def test_totals_are_sums_over_all_layers_with_weights(report):
    totals = {"layers": 2, "layers_factorized": 1, "params_before": 1000, "params_after": 400}
    totals |= {"macs_before": 1_385_000, "macs_after": 345_000, "size_mb_before": 0.004, "size_mb_after": 0.0016}
    assert report.totals == totals | MEASURED | {"speedup": 2.5}


def test_measured_values_are_added_replace_defaults_and_stay_in_a_copy(report):
    noted = report.note(speedup=2.4, size_mb_after=0.5, output_change=None)
    assert noted is report and report.totals["output_change"] == 0.0312  # None is not known, and changes nothing
    for other in (report.copy(), pickle.loads(pickle.dumps(report))):
        assert type(other) is Report and other.totals == report.totals
        assert (other.totals["speedup"], other.totals["size_mb_after"]) == (2.4, 0.5)
    report.copy().note(speedup=9)
    assert report.totals["speedup"] == 2.4
    with pytest.raises(ValueError, match="measured value must be one of size_mb_before, .*; got 'latency'"):
        report.note(latency=3)


def test_unknown_macs_are_nan_and_shown_as_unknown(tmp_path):
    rows = [row | {"macs_before": math.nan, "macs_after": math.nan} for row in ROWS]
    report = Report.of(rows)
    assert math.isnan(report.totals["macs_after"]) and report.totals["params_after"] == 400
    assert "MACs ?" in repr(report) and "latency_after_ms" not in report.totals and "speedup" not in report.totals
    texts = Page(report.save(tmp_path / "a.html").read_text()).texts
    assert "not known" in texts and any("size of the images is not fixed" in text for text in texts)


def test_report_without_layers_has_totals():
    empty = Report.of([])
    assert empty.totals["layers"] == 0 and repr(empty).startswith("0 of 0 layers") and Page(empty._repr_html_()).texts


# --- text --------------------------------------------------------------------------------------------------------


def test_repr_is_one_line_with_the_totals(report):
    assert repr(report) == (
        "1 of 2 layers factorized, parameters 1 k -> 400 (40%), MACs 1.39 M -> 345 k (25%), "
        "time 12.5 -> 5 ms (2.50 times as fast, ONNX Runtime, batch of 2), output change 3.12%"
    )
    assert "time" not in repr(Report.of(ROWS))


def test_print_shows_converted_layers_totals_measurements_and_what_was_left(report):
    header, conv, totals, measured, left = str(report).splitlines()
    assert "tucker 16×24" in conv and "0.125" in conv and "800 -> 200 (25%)" in conv
    assert "1 converted" in totals and "1 k -> 400 (40%)" in totals and left == "left: stem (reads 3 channels)"
    assert measured.startswith("time 12.5 -> 5 ms") and measured.endswith("output change 3.12%")


def test_columns_of_numbers_stay_aligned_under_a_long_name():
    long = "a_long_name_of_a_layer_inside/of_a_nested_model"
    lines = str(Report.of([ROWS[2], ROWS[2] | {"layer": long}])).splitlines()[1:3]
    assert lines[0].index("800 ->") == lines[1].index("800 ->") > len(long)


def test_selection_prints_as_pandas_prints_it(report):
    part = report[["layer", "reason"]]
    assert type(part) is pd.DataFrame and repr(part) == repr(pd.DataFrame(part.to_dict("list")))
    whole = report.copy()
    del whole["reason"]
    assert type(whole) is Report and str(whole) == repr(whole) == repr(pd.DataFrame(whole))
    assert "<table" in whole._repr_html_()
    with pytest.raises(ValueError, match="the report needs its columns layer, method"):
        whole.save("never.html")


# --- HTML --------------------------------------------------------------------------------------------------------


def test_page_starts_with_totals_then_figure_then_layers_then_what_was_left(report, tmp_path):
    path = report.save(tmp_path / "report.html", title="a <b>, factorized")
    page = Page(path.read_text())
    order = ["a <b>, factorized", "Parameters", "Cost by layer", "Layers", "Left as they were"]
    places = [page.texts.index(text, 1) for text in order]
    assert places == sorted(places)
    totals = page.texts[places[1] : places[2]]
    assert totals[:4] == ["Parameters", "1 k", "400", "40%"]
    assert totals[4:8] == ["MACs of one image", "1.39 M", "345 k", "25%"]
    time = ["Time of a call (ONNX Runtime, batch of 2)", "12.5 ms", "5 ms", "2.50 times as fast"]
    assert totals[12:] == [*time, "Change of the outputs", "3.12%"]
    assert page.texts.count("block/conv<1>") == 3  # two figures and the table
    assert page.texts[places[4] :][1:5] == [
        "reads 3 channels",
        "stem",
        "a BatchNormalization: it has no kernel",
        "norm",
    ]


def test_bars_are_in_proportion(report, tmp_path):
    page = Page(report.save(tmp_path / "report.html").read_text())
    widths = [float(value[len("width:") : -1]) for name, value in page.attributes if value.startswith("width:")]
    macs = [5000, 5000, 1_380_000, 340_000]
    params = [100, 100, 800, 200, 100, 100]  # the last pair: layers without kernels
    expected = [100 * n / max(macs) for n in macs] + [100 * n / max(params) for n in params]
    assert widths == pytest.approx(expected, abs=0.006)


def test_page_needs_no_other_file_and_escapes_names(report, tmp_path):
    rows = [row | {"layer": f"<script>{row['layer']}", "reason": row["reason"] and "<i>&"} for row in ROWS]
    text = Report.of(rows).save(tmp_path / "a.html", title="<script>").read_text()
    assert not {"script", "link", "img"} & set(Page(text).tags) and "<i>&" not in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_notebook_shows_totals_first_without_colours(report):
    text = report._repr_html_()
    page = Page(text)
    assert page.texts[:4] == ["before", "after", "ratio", "Parameters"] and "color" not in text
    assert page.texts.index("1 of 2 layers with kernels factorized") < page.texts.index("block/conv<1>")
    assert page.tags.count("details") == 2 and text.count("<details open>") == 1
    many = Report.of([ROWS[2] | {"layer": f"conv{number}"} for number in range(50)])
    assert "<details open>" not in many._repr_html_()


def test_page_is_refused_under_another_suffix(report, tmp_path):
    with pytest.raises(ValueError, match="suffix of the report must be one of .html, .htm; got '.pdf'"):
        report.save(tmp_path / "report.pdf")
    assert not list(tmp_path.iterdir()) and list(report.columns) == COLUMNS
