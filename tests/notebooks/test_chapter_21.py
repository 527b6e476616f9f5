"""Chapter 21, medical images: the numbers in its text, from the records, and its exercises."""

import numpy as np
import pytest

from fcnn_utils import cost
from fcnn_utils.course import metrics, paths
from fcnn_utils.course.data import medmnist

CHAPTER = "21"
WRONG = {
    "21.1": [[15, 50], [0.145, 0.933], [28, 28]],
    "21.2": [
        lambda p, trained_at, used_at: p * used_at / (p * used_at).sum(axis=1, keepdims=True),
        lambda p, trained_at, used_at: p / np.asarray(trained_at) * np.asarray(used_at),
        lambda p, trained_at, used_at: p / used_at * trained_at / (p / used_at * trained_at).sum(axis=1, keepdims=True),
    ],
    "21.3": [
        lambda first, second, y: np.array([-2.0, 2.0]),
        lambda first, second, y: _unpaired(first, second, y),
        lambda first, second, y: -_paired(first, second, y)[::-1],
        lambda first, second, y: _paired(first, second, y) / 100,
    ],
}
pytestmark = pytest.mark.skipif(medmnist.find("pneumoniamnist") is None, reason="PneumoniaMNIST is not on this machine")


def _drawn(difference):
    rows = np.random.default_rng(0).integers(0, len(difference), (1000, len(difference)))
    return 100 * difference[rows].mean(axis=1)


def _right(p, y):
    return (p.argmax(axis=1) == y).astype(float)


def _paired(first, second, y):
    return np.quantile(_drawn(_right(second, y) - _right(first, y)), [0.025, 0.975])


def _unpaired(first, second, y):
    order = np.random.default_rng(1).permutation(len(y))
    return np.quantile(_drawn(_right(second, y)[order] - _right(first, y)), [0.025, 0.975])


def test_networks_are_trained_alike_and_cost_what_the_text_says(chapter):
    for each in chapter["runs"].values():
        assert len(each) == 3 and {record["recipe"]["name"] for record, _, _ in each} == {"medical"}
    table = chapter["table"]
    macs = table["million MACs"]
    assert macs["dense"] < macs["separable"] and round(macs["ResNet-18"] / macs["separable"]) == 14
    assert macs["ResNet-18"] == pytest.approx(cost.total_costs(chapter["resnet"])["macs"] / 1e6)


def test_neither_network_is_behind_the_published_resnet(chapter):
    table = chapter["table"]
    for name in ("separable", "dense"):
        assert table.loc[name, "AUC"] > table.loc["ResNet-18", "AUC"] - 0.01
        assert table.loc[name, "accuracy (%)"] > table.loc["ResNet-18", "accuracy (%)"] - 1
    areas = {
        name: [metrics.auc(test, chapter["labels"]) for _, _, test in runs] for name, runs in chapter["runs"].items()
    }
    assert min(areas["dense"]) > max(areas["separable"])
    for measure in (metrics.auc, metrics.accuracy):
        value, (low, high) = chapter["dense_minus_separable"](measure)
        assert 0 < low < value < high
    assert (table.loc["Google AutoML"] > table.loc["separable"])[["AUC", "accuracy (%)"]].all()


def test_accuracy_falls_from_validation_to_test_images(chapter):
    for each in chapter["runs"].values():
        validation = [metrics.accuracy(v, chapter["dataset"].validation.fine) for _, v, _ in each]
        test = [metrics.accuracy(t, chapter["labels"]) for _, _, t in each]
        assert np.mean(validation) > 0.975 and 0.065 < np.mean(validation) - np.mean(test) < 0.092
    thresholds = chapter["thresholds"].mean()
    assert abs(thresholds["chosen on validation"] - thresholds["one half"]) < 2.5
    back = thresholds["best on test (not allowed)"] - thresholds["one half"]
    lost = 98.2 - thresholds["one half"]
    assert 0.4 < back / lost < 0.65


def test_correction_changes_the_threshold_and_not_the_order(chapter):
    balance = chapter["balance"]
    assert balance.loc["corrected afterwards", "AUC"] == pytest.approx(balance.loc["as they come", "AUC"], abs=2e-4)
    for title in ("balanced", "corrected afterwards"):
        assert balance.loc[title, "false alarms"] < balance.loc["as they come", "false alarms"] - 3
        assert balance.loc[title, "missed"] > balance.loc["as they come", "missed"]


def test_compression_costs_a_third_of_the_macs_and_a_few_false_alarms(chapter):
    report, areas = chapter["report"], chapter["areas"]
    assert report["macs_after"].sum() <= report["macs_before"].sum() / 1.5 and -0.015 < min(areas) <= max(areas) < 0
    price = chapter["price"]
    alarms = [
        100 * np.mean([(p[:, 1] >= 0.5)[chapter["labels"] == 0].mean() for p in pair])
        for pair in [[after for _, after in chapter["changes"]], [before for before, _ in chapter["changes"]]]
    ]
    assert price.loc["false alarms", "change"] == pytest.approx(alarms[0] - alarms[1])
    assert 4.5 < alarms[0] - alarms[1] < 6.5
    assert 0 < price.loc["false alarms", "low"] < price.loc["false alarms", "change"] < 6.5


def test_page_of_results_has_the_price_of_the_compression(chapter):
    text = " ".join((paths.root() / "book" / "results.md").read_text().split())
    low, high = -max(chapter["areas"]), -min(chapter["areas"])
    assert f"falls by {low:.3f} to {high:.3f}" in text and "almost six more healthy children of 100" in text


def test_area_is_that_of_the_library(chapter):
    p, labels = chapter["runs"]["separable"][0][2], chapter["labels"]
    assert chapter["auc"](p[:, 1], labels) == pytest.approx(metrics.auc(p, labels), abs=1e-9)


def test_exercises(check_exercises):
    check_exercises(WRONG)
