"""Chapter 20, ensembles: the numbers in its text, from the records, and its exercises."""

import numpy as np
import pytest

from fcnn_utils.course import comparison, ensembles, metrics, records
from fcnn_utils.course.data import cifar100

CHAPTER = "20"
WRONG = {
    "20.1": [[0.55**2 + 0.65 * 0.2475, 0.55**2], [0.65, 0.2025], 0.36],
    "20.2": [
        lambda p, labels: (p.mean(axis=0).argmax(axis=1) == labels).mean(),
        lambda p, labels: (p.argmax(axis=2) == labels).mean(),
        lambda p, labels: 100 * (p.argmax(axis=2) == labels).any(axis=0).mean(),
    ],
    "20.3": [
        lambda p, q, threshold: (p.argmax(axis=1), (p.max(axis=1) < threshold).mean()),
        lambda p, q, threshold: (
            np.where(p.max(axis=1) < threshold, q.argmax(axis=1), p.argmax(axis=1)),
            (p.max(axis=1) < threshold).mean(),
        ),
        lambda p, q, threshold: _cascade(p, q, threshold, ensembles.mean_logit, np.sum),
    ],
}
pytestmark = pytest.mark.skipif(cifar100.find() is None, reason="CIFAR-100 is not on this machine")


def _cascade(p, q, threshold, combine, count):
    asked = p.max(axis=1) < threshold
    return np.where(asked, combine(np.stack([p, q])).argmax(axis=1), p.argmax(axis=1)), count(asked)


def test_kept_predictions_are_those_of_the_records(chapter):
    """The probabilities are rounded in the files; the accuracies must not change."""
    for runs in chapter["members"].values():
        for record, kept in runs:
            assert metrics.accuracy(kept["test"][-1], chapter["labels"]) == pytest.approx(record["test"]["top1"])
            assert record["train_images"] == 45000 and record["recipe"]["epochs"] == 5


def test_number_of_networks_matters_more_than_the_way_of_combining(chapter):
    ways = chapter["ways"]
    three = ways[["mean probability", "mean logit", "stacked"]]
    between = (three.max(axis=1) - three.min(axis=1)).max()
    assert between < 0.75 and (three.loc[8] - three.loc[2]).min() > 3 * between
    assert np.allclose(chapter["mean_probability"](chapter["two"]), ensembles.mean_probability(chapter["two"]))


def test_error_correlation_by_hand(chapter, monkeypatch):
    """Four images of class 0: the networks are wrong on images 3 and 4, on 2 and 4, and on 3."""
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    first, second, third = ([wrong if n in bad else right for n in range(4)] for bad in ((2, 3), (1, 3), (2,)))
    monkeypatch.setitem(chapter.variables, "labels", np.zeros(4, int))
    correlation = chapter["error_correlation"]
    assert correlation(np.array(first), np.array(second)) == pytest.approx(0)
    assert correlation(np.array(first), np.array(first)) == pytest.approx(1)
    assert correlation(np.array(first), np.array(third)) == pytest.approx(1 / np.sqrt(3))


def test_errors_are_correlated_and_less_correlated_pairs_gain_more(chapter):
    alike = chapter["alike"]
    assert alike["correlation"].between(0.6, 0.75).all()
    means = alike.groupby(["place", "pairs"])[["correlation", "gain"]].mean().unstack()
    assert (means["correlation"]["two kinds"] < means["correlation"]["one kind"]).all() and len(means) == 3
    more = means["gain"]["two kinds"] - means["gain"]["one kind"]
    assert more.mean() == pytest.approx(0.5, abs=0.2) and more.min() > 0


def test_votes_at_equal_time(chapter):
    table = chapter["equal_time"].set_index(["kind", "networks"])
    assert table["time"].between(0.88, 1.12).all()
    for kind in ("deeper_dense", "deeper_separable"):
        assert table.loc[kind, "top-1 (%)"].is_monotonic_decreasing
    votes = table[table.index.get_level_values("networks") > 1]
    assert votes.loc[("deeper_dense", 2), "minus one of its kind"] == pytest.approx(-0.6, abs=0.05)
    assert (votes.drop(index=("deeper_dense", 2))["high"] < -0.5).all() and len(votes) == 4
    mixed = [100 * vote.mean() for vote in chapter["mixed"]]
    assert len(mixed) == 4 and max(mixed) - min(mixed) == pytest.approx(0.5, abs=0.1)
    one = table["top-1 (%)"].xs(1, level="networks")
    assert abs(np.mean(mixed) - one["deeper_dense"]) < 0.3 and np.mean(mixed) < one["deeper_separable"] - 0.5
    assert np.mean(mixed) > table["top-1 (%)"].xs(2, level="networks").max()


def test_interval_is_that_of_the_library(chapter):
    rng = np.random.default_rng(5)
    values = rng.choice([-1.0, 0.0, 1.0], 4000, p=[0.1, 0.7, 0.2])
    low, high = metrics.bootstrap_interval(np.mean, values)
    assert np.allclose(chapter["interval"](values), [low, high], atol=2e-3)


def test_last_snapshot_is_better_than_both_votes(chapter):
    top1 = {name: metrics.accuracy(p, chapter["labels"]) for name, p in chapter["cases"].items()}
    assert top1["last snapshot alone"] > top1["vote of three snapshots"] + 0.01
    assert top1["vote of three snapshots"] > top1["vote of three networks"] + 0.02


def test_noise_of_one_run_is_as_large_as_the_text_says():
    runs = records.find("cifar100", recipe="faster-trainontrain")
    table = comparison.over_seeds(runs[runs["model"].str.startswith("deeper")]["record"])
    assert 0.3 < np.sqrt(np.nanmean(table["deviation"] ** 2)) < 0.7


def test_exercises(check_exercises):
    check_exercises(WRONG)
