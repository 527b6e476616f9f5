"""The page of results: its numbers are those of the committed records."""

import re

import numpy as np
import pandas as pd
import pytest

from fcnn_utils import cost
from fcnn_utils.course import data, ensembles, metrics, networks, paths, predictions, records, thesis
from fcnn_utils.course.data import cifar100, medmnist

PAGE = (paths.root() / "book" / "results.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if "|" in line)
}


def numbers_about(heading):
    """The numbers in the section with this heading."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return set(re.findall(r"\d+(?:\.\d+)?", section))


def percent(shares):
    """Mean of shares as the page prints it."""
    return f"{100 * np.mean(shares):.1f}"


def top1(name, recipe):
    """Test accuracies of the committed runs of a network on CIFAR-100."""
    return list(records.find(dataset="cifar100", model=name, recipe=recipe)["top1"])


# --- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*networks.THESIS_PLANS, *networks.OUR_PLANS])
def test_results_table_equals_records(name):
    runs = list(records.find(dataset="cifar100", model=name, recipe="faster")["record"])
    assert all(run["test"]["images"] == 10_000 and len(run["epochs"]) == 5 and not run["stand_in"] for run in runs)
    ms = {network: parts["ms"] for network, parts in records.load("step-parts")[0]["parts"].items()}
    expected = [f"{runs[0]['params']:,}", f"{runs[0]['macs'] / 1e6:.1f}"]
    expected += [f"{ms[name] / ms['simple']:.2f}", str(len(runs))]
    for share in ("top1", "top5"):
        expected += [percent(thesis.test(name)[share]) if name in networks.THESIS_PLANS else ""]
        expected += [percent([run["test"][share] for run in runs])]
    assert ROWS[networks.TITLES[name]] == expected


@pytest.mark.parametrize(
    ("title", "name", "timed"),
    [
        ("dense", "dense", "dense"),
        ("CP, 4.5 times fewer MACs", "cp-4.5x", "CP, tuned"),
        ("pruned, 4 times fewer MACs", "pruned-4x", "pruned, tuned"),
    ],
)
def test_compression_table_equals_records(title, name, timed):
    files = pd.DataFrame(records.load("cifar100/simple-int8")[0]["rows"])
    files = files[(files["engine"] == "onnxruntime") & (files["batch"] == 1)].set_index("model")
    tuned = list(records.find("cifar100", f"simple-{name}", "tune")["record"])
    assert len(tuned) == 3
    expected = [f"{tuned[0]['macs'] / 1e6:.1f}", percent([run["test"]["top1"] for run in tuned])]
    for each in (timed, f"{timed}, int8"):
        row = files.loc[each]
        expected.append(f"{row['median_ms']:.3g} ms" + f", {row['speedup']:.1f}×" * (each != "dense"))
    lost = files.loc[timed, "top1"] - files.loc[f"{timed}, int8", "top1"]
    assert ROWS[title] == [*expected, f"{round(lost, 1) + 0:.1f}".replace("-", "−")]


CONTEST = {"trained for long": ("dense", 1)}
CONTEST |= {f"auto, {times} times fewer MACs": ("auto", times) for times in (2, 4, 8)}
TITLES = {"CP": "cp", "Tucker-2": "tucker", "spatial chains": "spatial", "pruned filters": "pruned"}
CONTEST |= {f"{title}, 4 times fewer MACs": (method, 4) for title, method in TITLES.items()}


@pytest.mark.parametrize("title", CONTEST)
def test_table_of_the_network_trained_for_long_equals_records(title):
    rows = {(row["method"], row["times"]): row for row in records.load("cifar100/simple-contest")[0]["rows"]}
    row = rows[CONTEST[title]]
    record, _ = records.lookup("cifar100", "contest-{}-{}x".format(*CONTEST[title]), "tune", 0)
    assert record["test"]["top1"] == pytest.approx(row["top1"] / 100) and record["macs"] == row["macs"]
    assert ROWS[title] == [f"{row['macs'] / 1e6:.1f}", f"{row['untrained']:.1f}", f"{row['top1']:.1f}"]


@pytest.mark.skipif(medmnist.find("pneumoniamnist") is None, reason="PneumoniaMNIST is not on this machine")
@pytest.mark.parametrize("kind", ["separable", "dense"])
def test_medical_table_equals_records(kind):
    name, labels = f"deeper_{kind}-width0.5", data.load("pneumoniamnist").test.fine
    runs = list(records.find(dataset="pneumoniamnist", model=name, recipe="medical")["record"])
    areas = [
        metrics.auc(predictions.load("pneumoniamnist", name, "medical", run["seed"])["test"][-1], labels)
        for run in runs
    ]
    ours = [f"{runs[0]['macs'] / 1e6:.1f}", f"{np.mean(areas):.3f}", percent([run["test"]["top1"] for run in runs])]
    assert len(runs) == 3 and ROWS[f"deeper, {kind}, half as wide"] == ours
    resnet = cost.total_costs(networks.build("resnet18", (28, 28, 1), 2))["macs"]
    assert ROWS["ResNet-18, published"] == [f"{resnet / 1e6:.1f}", "0.944", "85.4"]


# --- text --------------------------------------------------------------------------------------------------------


def test_summary_agrees_with_tables():
    """The deeper dense network: two points better with about half of the MACs."""
    simple, dense = ROWS["simple"], ROWS["deeper, dense"]
    assert round(float(dense[5]) - float(simple[5])) == 2 and 0.5 < float(dense[1]) / float(simple[1]) < 0.55


def test_controls_of_compression_equal_records():
    runs = [("thin-4.5x", "fast"), ("cp-4.5x-scratch", "fast")]
    expected = {percent(top1(f"simple-{name}", recipe)) for name, recipe in runs}
    assert expected <= numbers_about("Trained, then compressed")


def test_thin_network_from_scratch_equals_record():
    (thin,) = top1("simple-width0.25", "long-epochs30")
    assert percent([thin]) in numbers_about("Trained, then compressed")


def test_longer_trainings_equal_records():
    dense, separable = (top1(f"deeper_{kind}-width0.3333", "long") for kind in ("dense", "separable"))
    cited = [top1(name, "faster") for name in ("inception", "xception")]
    assert {percent(each) for each in (dense, separable, *cited)} <= numbers_about("Longer")
    (thin, _), (whole, _) = (
        records.lookup("cifar100", name, recipe, 0)
        for name, recipe in (("deeper_separable-width0.3333", "long"), ("deeper_separable", "faster"))
    )
    assert 0.4 < thin["macs"] * 20 / (whole["macs"] * 5) < 0.5  # "less than half of the MACs in training"
    assert 7.5 < whole["macs"] / thin["macs"] < 8.5  # "an eighth"


@pytest.mark.skipif(cifar100.find() is None, reason="CIFAR-100 is not on this machine")
def test_ensembles_equal_predictions():
    labels, recipe = data.load("cifar100").test.fine, "faster-trainontrain"

    def members(name, seeds, recipe=recipe):
        return [predictions.load("cifar100", name, recipe, seed)["test"][-1] for seed in range(seeds)]

    separable = "deeper_separable-width"
    singles = [members("deeper_dense-width0.8333", 2), members(f"{separable}0.6667", 2)]
    singles += [members(f"{separable}0.3333", 1, "faster-cycles3-epochs15-trainontrain")]
    votes = [members(f"{separable}0.4167", 2), members(f"{separable}0.3333", 3)]
    expected = {percent([metrics.accuracy(each, labels) for each in them]) for them in singles}
    expected |= {percent(metrics.accuracy(ensembles.mean_logit(them), labels)) for them in votes}
    assert expected <= numbers_about("Ensembles")
