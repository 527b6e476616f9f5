"""The README's numbers are those of the records."""

import re

import keras
import numpy as np
import pandas as pd
import pytest

import fcnn_utils
from fcnn_utils import cost, deploy
from fcnn_utils.course import data, ensembles, metrics, networks, predictions, records, thesis
from fcnn_utils.course.data import cifar100, medmnist
from fcnn_utils.course.paths import root

README = (root() / "README.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", networks.TITLES)
def test_results_table(name, monkeypatch, tmp_path):
    """Counts, time, and accuracies of the thesis and of the committed records, to the digits shown."""
    monkeypatch.setenv("FCNN_OUTPUT", str(tmp_path))
    (row,) = [row for row in ROWS if row[0] == networks.TITLES[name]]
    runs = list(records.find(dataset="cifar100", model=name, recipe="faster")["record"])
    assert all(run["test"]["images"] == 10_000 and len(run["epochs"]) == 5 and not run["stand_in"] for run in runs)
    milliseconds = {network: parts["ms"] for network, parts in records.load("speed")[0]["parts"].items()}
    expected = [f"{runs[0]['params']:,}", f"{runs[0]['macs'] / 1e6:.1f}"]
    expected += [f"{milliseconds[name] / milliseconds['simple']:.2f}", str(len(runs))]
    for share in ("top1", "top5"):
        expected += [f"{100 * thesis.test(name)[share]:.1f}" if name in networks.THESIS_PLANS else ""]
        expected += [f"{100 * np.mean([run['test'][share] for run in runs]):.1f}"]
    assert row[1:] == expected


def runs_of(name, recipe):
    """Test accuracies of the committed runs, in percent."""
    paths = sorted((root() / "results" / "cifar100" / f"simple-{name}" / recipe).glob("seed?.json"))
    return [100 * records.read(path)["test"]["top1"] for path in paths]


@pytest.mark.parametrize(
    ("title", "name", "recipe"),
    [
        ("dense", "dense", "tune"),
        ("CP, 4.5 times fewer MACs", "cp-4.5x", "tune"),
        ("CP, 6 times fewer MACs", "cp-6x", "tune-distillation0.5-epochs2"),
        ("CP, 8.5 times fewer MACs", "cp-8.5x", "tune-distillation0.5-epochs2"),
    ],
)
def test_compression_table(title, name, recipe, monkeypatch, tmp_path):
    """Accuracies are means over the committed runs; times are ratios of the committed latencies."""
    monkeypatch.setenv("FCNN_OUTPUT", str(tmp_path))
    (row,) = [row for row in ROWS if row[0] == title]
    clock = pd.DataFrame(records.load("cifar100/simple-latency")[0]["rows"])
    clock = clock[clock["model"] == name].set_index(["variant", "batch"])
    tuned = runs_of(name, recipe)
    stages = [records.load(f"cifar100/simple-{name}/stages{seed}")[0] for seed in range(len(tuned))]
    if name == "dense":
        record, _ = records.lookup("cifar100", "simple", "fast", 0)
        assert row[1:3] == [f"{record['macs'] / 1e6:.1f}", f"{100 * record['test']['top1']:.1f}"]
    else:
        assert row[1] == f"{stages[0]['macs'] / 1e6:.1f}"
        assert row[2] == f"{np.mean([100 * stage['corrected'] for stage in stages]):.1f}"
    assert row[3] == f"{np.mean(tuned):.1f}"
    shown = [("ONNX Runtime", 1), ("ONNX Runtime", 64), ("Keras", 64)]
    expected = [f"{clock.loc[key, 'median_ms']:.3g} ms, {clock.loc[key, 'speedup']:.1f}×" for key in shown]
    assert row[4:] == (expected if name != "dense" else [text.split(",")[0] for text in expected])


def test_the_longer_trainings_in_the_text(monkeypatch, tmp_path):
    monkeypatch.setenv("FCNN_OUTPUT", str(tmp_path))

    def run(name, recipe):
        return records.lookup("cifar100", name, recipe, 0)[0]

    def top1(record):
        return f"{100 * record['test']['top1']:.1f}"

    dense, separable = (run(f"deeper_{kind}-width0.3333", "long") for kind in ("dense", "separable"))
    whole, text = run("deeper_separable", "faster"), " ".join(README.split())
    assert len(dense["epochs"]) == len(separable["epochs"]) == 20 and len(whole["epochs"]) == 5
    assert f"`deeper_dense` is at {top1(dense)}, as the simple network is after five" in text
    assert f"and `deeper_separable` at {top1(separable)}, level with its whole self" in text
    assert abs(separable["test"]["top1"] - whole["test"]["top1"]) < 0.01
    assert 0.4 < separable["macs"] * 20 / (whole["macs"] * 5) < 0.5  # "less than half"
    assert 7.5 < whole["macs"] / separable["macs"] < 8.5  # "an eighth"
    inception, xception = (top1(run(name, "faster")) for name in ("inception", "xception"))
    assert f"an Inception-style one is at {inception} after five epochs, an Xception-style one at {xception}." in text


@pytest.mark.skipif(cifar100.find() is None, reason="CIFAR-100 is not on this machine")
def test_the_ensembles_in_the_text(monkeypatch, tmp_path):
    """Single networks are means over the committed runs; votes are of what the networks said of each test image."""
    monkeypatch.setenv("FCNN_OUTPUT", str(tmp_path))
    labels = data.load("cifar100").test.fine

    def said(name, seeds=1, recipe="faster-trainontrain"):
        return [predictions.load("cifar100", name, recipe, seed)["test"][-1] for seed in range(seeds)]

    def mean(members):
        return f"{100 * np.mean([metrics.accuracy(each, labels) for each in members]):.1f}"

    def vote(members):
        return f"{100 * metrics.accuracy(ensembles.mean_logit(members), labels):.1f}"

    separable = "deeper_separable-width"
    dense, one = (mean(said(name, 2)) for name in ("deeper_dense-width0.8333", f"{separable}0.6667"))
    two, three = vote(said(f"{separable}0.4167", 2)), vote(said(f"{separable}0.3333", 3))
    longer = mean(said(f"{separable}0.3333", 1, "faster-cycles3-epochs15-trainontrain"))
    text = " ".join(README.split())
    assert f"a dense network is at {dense} (mean of two seeds)" in text
    assert f"one separable network is at {one}, two that vote at {two}, three at {three}:" in text
    assert f"fifteen epochs instead brings {longer}." in text


@pytest.mark.skipif(medmnist.find("pneumoniamnist") is None, reason="PneumoniaMNIST is not on this machine")
def test_medical_table(monkeypatch, tmp_path):
    """Means over the committed runs; the areas under the curve from what the networks said of each test image."""
    monkeypatch.setenv("FCNN_OUTPUT", str(tmp_path))
    name, labels = "deeper_separable-width0.5", data.load("pneumoniamnist").test.fine
    runs = list(records.find(dataset="pneumoniamnist", model=name, recipe="medical")["record"])
    said = [predictions.load("pneumoniamnist", name, "medical", run["seed"])["test"][-1] for run in runs]
    ours = [f"{runs[0]['macs'] / 1e6:.1f}", f"{np.mean([metrics.auc(each, labels) for each in said]):.3f}"]
    ours += [f"{100 * np.mean([run['test']['top1'] for run in runs]):.1f}"]
    resnet = f"{cost.total_costs(networks.build('resnet18', (28, 28, 1), 2))['macs'] / 1e6:.1f}"
    rows = {row[0]: row[1:] for row in ROWS}
    assert len(runs) == 3 and rows["deeper, separable, half as wide"] == ours
    assert rows["ResNet-18, published"] == [resnet, "0.944", "85.4"]


def test_the_controls_in_the_text():
    text = " ".join(README.split())
    runs = [("dense", "tune-epochs2"), ("thin-4.5x", "fast"), ("cp-4.5x-scratch", "fast")]
    longer, thin, scratch = (np.mean(runs_of(*run)) for run in runs)
    assert f"after two epochs the dense network is at {longer:.1f}" in text
    assert f"4.5 times fewer MACs reaches {thin:.1f}, the factorized one {scratch:.1f}" in text


def test_what_came_out_is_what_the_tables_say():
    row = {row[0]: row[1:] for row in ROWS}
    best, simple, dense = (row[name] for name in ("deeper, separable", "simple", "deeper, dense"))
    lead = float(best[5]) - float(simple[5])
    assert round(lead) == 3 and round(float(dense[5]) - float(simple[5])) == 2  # "three points"; two are the plan's
    assert 0.85 < float(best[2]) < 0.9  # "in less than nine tenths of its time"
    compressed, text = row["CP, 4.5 times fewer MACs"], " ".join(README.split())
    faster = re.search(r"ms, (.*)×", compressed[3])[1]
    lost = float(row["dense"][2]) - float(compressed[2])
    assert f"4.5 times fewer MACs answers one image {faster} times as fast in ONNX Runtime" in text
    assert f"and loses {lost:.1f} points" in text


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#:\s]+)\)", README)
    assert targets and all((root() / target).exists() for target in targets)


def test_every_notebook_is_in_the_contents():
    notebooks = [path.name for path in (root() / "notebooks").glob("*.ipynb")]
    assert notebooks and all(f"(notebooks/{name})" in README for name in notebooks)


def test_ten_lines_for_a_model_run_as_they_stand(tmp_path, monkeypatch):
    """The first Python block of the README, in another folder, on a small model and random images."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    model = networks.build("simple", (8, 8, 3), 10, width=0.25)
    model.save("model.keras")
    names = {"images": np.random.default_rng(0).standard_normal((40, 8, 8, 3)).astype("float32")}
    if "onnxruntime" not in deploy.available():
        pytest.skip("ONNX Runtime is not installed")
    exec(code, names)
    assert fcnn_utils.total_costs(names["small"])["macs"] <= fcnn_utils.total_costs(model)["macs"] / 4
    images, expected = names["images"], names["small"](names["images"], training=False)
    assert np.allclose(fcnn_utils.load("small.onnx")(images), keras.ops.convert_to_numpy(expected), atol=1e-5)
