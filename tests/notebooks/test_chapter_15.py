"""Chapter 15, your own model in ten minutes: it runs with the library alone, and its exercises."""

import sys

import keras
import nbformat
import numpy as np
import pytest

import fcnn_utils as fcnn
from fcnn_utils.course import records, runner

CHAPTER = "15"
PARAMETERS = {"LIVE_IMAGES": 200}
WRONG = {
    "15.1": [[2.5, 5], [4, 2.5], 4],
    "15.2": [
        lambda table, drop: table["median_ms"].idxmin(),
        lambda table, drop: table["accuracy (%)"].idxmax(),
        lambda table, drop: table.loc[
            table["accuracy (%)"] > table["accuracy (%)"].iloc[0] - drop, "median_ms"
        ].idxmin(),
        lambda table, drop: table.loc[
            table["accuracy (%)"] >= table["accuracy (%)"].iloc[0] * (1 - drop / 100), "median_ms"
        ].idxmin(),
        lambda table, drop: (
            table.loc[table["accuracy (%)"] >= 90 - drop, "median_ms"].idxmin() if len(table) > 3 else "f"
        ),
        lambda table, drop: table.index[:1],
    ],
}


@pytest.fixture(scope="module", autouse=True)
def generated_images():
    """The chapter takes its small example, as without CIFAR-100: the trained network would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "kept_network", lambda *run: None)
        yield


def test_every_section_gives_a_working_network(chapter):
    model, small, test = chapter["model"], chapter["small"], chapter["x_valid"]
    assert fcnn.total_costs(small)["macs"] < fcnn.total_costs(model)["macs"]
    assert chapter["accuracy"](model) > 50 and chapter["accuracy"](small) > 30
    table = chapter["table"]
    assert list(table.index) == ["dense", "dense-int8", "small", "small-int8"]
    for name, network in {"dense": model, "small": small}.items():
        outputs = network.predict(test, batch_size=100, verbose=0)
        right = 100 * np.mean(outputs.argmax(axis=1) == chapter["y_valid"])
        assert table.loc[name, "accuracy (%)"] == pytest.approx(right, abs=0.2)  # rounding may exchange two classes
    assert table.loc["dense-int8", "MB"] < 0.5 * table.loc["dense", "MB"]


def test_network_for_signals_has_a_third_of_the_macs(chapter):
    signals, small = chapter["signals"], chapter["small_signals"]
    assert isinstance(signals.layers[0], keras.layers.Conv1D)
    assert 0.25 < fcnn.total_costs(small)["macs"] / fcnn.total_costs(signals)["macs"] <= 1 / 3


@pytest.mark.full
def test_notebook_runs_without_the_course(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcnn_utils.course", None)
    variables = {"__name__": "__main__"}
    for cell in nbformat.read(runner.notebooks()["15"], 4).cells:
        if cell.cell_type == "code" and "colab" not in cell.metadata.get("tags", []):
            exec(cell.source, variables)
    printed = capsys.readouterr().out
    assert "STAND-IN DATA" in printed and "answers are checked only if the course is installed" in printed
    assert len(variables["table"]) == 4


def test_exercises(check_exercises):
    check_exercises(WRONG)
