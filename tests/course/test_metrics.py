"""Accuracy, AUC, calibration and bootstrap intervals: `fcnn_utils.course.metrics`."""

import numpy as np
import pytest

from fcnn_utils.course import metrics


def two_classes(scores):
    """Probabilities of two classes from those of the second."""
    scores = np.asarray(scores, float)
    return np.stack([1 - scores, scores], axis=1)


def informative(count=300, classes=4):
    """Probabilities, and labels that they say something about."""
    rng, labels = np.random.default_rng(0), np.arange(count) % classes
    scores = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[labels]
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2], [0, -1, 1], [0.0, 1.0, 1.0], [[0], [1], [1]], []])
@pytest.mark.parametrize("measure", [metrics.auc, metrics.accuracy, metrics.cross_entropy, metrics.calibration_error])
def test_measures_reject_labels_that_do_not_fit(measure, labels):
    with pytest.raises(ValueError, match="labels must be integers|labels \\(images,\\)"):
        measure(two_classes([0.1, 0.2, 0.3]), labels)


# --- AUC ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, labels, area",
    [([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75), ([0.5] * 4, [0, 1, 0, 1], 0.5), ([0.9, 0.1], [0, 1], 0.0)],
)
def test_auc_by_hand(scores, labels, area):
    assert metrics.auc(two_classes(scores), labels) == pytest.approx(area)


def test_auc_is_share_of_pairs_in_right_order_and_ties_count_half():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 10, 60) / 10, rng.integers(0, 2, 60)
    positive, negative = scores[labels == 1], scores[labels == 0]
    pairs = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    assert metrics.auc(two_classes(scores), labels) == pytest.approx(pairs)


def test_auc_of_more_classes_is_mean_of_each_against_the_rest():
    probabilities, labels = informative()
    each = [metrics.auc(two_classes(probabilities[:, label]), (labels == label).astype(int)) for label in range(4)]
    assert metrics.auc(probabilities, labels) == pytest.approx(np.mean(each)) and 0.6 < np.mean(each) < 0.99


@pytest.mark.parametrize("probabilities", [two_classes([0.1, 0.2, 0.3]), np.full((3, 3), 1 / 3), np.ones((3, 1))])
def test_auc_rejects_missing_class(probabilities):
    with pytest.raises(ValueError, match=r"the AUC needs images of each of the \d classes; got \["):
        metrics.auc(probabilities, [0, 0, 0])


# --- intervals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"level": 1.0}, {"level": 0}, {"rounds": 5}, {"rounds": 10.5}])
def test_bootstrap_rejects_invalid_level_and_rounds(setting):
    with pytest.raises(ValueError, match="must be a"):
        metrics.bootstrap_interval(np.mean, np.arange(5), **setting)


def test_bootstrap_interval_of_mean_has_the_width_of_its_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrap_interval(np.mean, values)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert metrics.bootstrap_interval(np.mean, values) == (low, high)
    assert metrics.bootstrap_interval(np.mean, values, seed=1) != (low, high)
    narrow = metrics.bootstrap_interval(np.mean, values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_equals_quantiles_of_draws_by_hand():
    values, draws = np.arange(7.0) ** 2, np.random.default_rng(3).integers(0, 7, (50, 7))
    expected = np.quantile(values[draws].mean(axis=1), [0.05, 0.95])
    np.testing.assert_allclose(metrics.bootstrap_interval(np.mean, values, level=0.9, rounds=50, seed=3), expected)


def test_bootstrap_draws_the_same_images_from_all_arrays():
    probabilities, labels = informative()
    low, high = metrics.bootstrap_interval(metrics.accuracy, probabilities, labels, rounds=200)
    assert 0.4 < low < metrics.accuracy(probabilities, labels) < high


def test_bootstrap_leaves_out_draws_without_a_class_but_not_most_of_them():
    probabilities, rare = two_classes(np.linspace(0, 1, 21)), np.array([0] * 20 + [1])
    assert metrics.bootstrap_interval(metrics.auc, probabilities, rare, rounds=100) == (1.0, 1.0)
    with pytest.raises(ValueError, match="failed for 100 of 100 draws: the AUC needs"):
        metrics.bootstrap_interval(metrics.auc, probabilities, np.zeros(21, int), rounds=100)


# --- calibration -------------------------------------------------------------------------------------------------


def test_reliability_by_hand():
    """Confidence 0.95, 0.9, 0.6 and 0.55; all are right but the last."""
    probabilities = two_classes([0.95, 0.1, 0.6, 0.55])
    table = metrics.reliability(probabilities, [1, 0, 1, 0], bins=2)
    assert table.to_dict("list") == {"images": [4], "confidence": [0.75], "accuracy": [0.75]}
    table = metrics.reliability(probabilities, [1, 0, 1, 0], bins=4)
    assert table["images"].tolist() == [2, 2] and table["accuracy"].tolist() == [0.5, 1.0]
    np.testing.assert_allclose(table["confidence"], [0.575, 0.925])
    assert metrics.calibration_error(probabilities, [1, 0, 1, 0], bins=4) == pytest.approx(0.075)


def test_confidence_1_is_in_the_last_bin():
    table = metrics.reliability(np.eye(2), [0, 1])
    assert table.to_dict("list") == {"images": [2], "confidence": [1.0], "accuracy": [1.0]}


def test_fitted_temperature_undoes_overconfidence():
    probabilities, labels = informative(4000)
    own, overconfident = metrics.fit_temperature(probabilities, labels), metrics.apply_temperature(probabilities, 1 / 3)
    fitted = metrics.fit_temperature(overconfident, labels)
    assert fitted == pytest.approx(3 * own, rel=1e-3)
    errors = [metrics.calibration_error(metrics.apply_temperature(overconfident, t), labels) for t in (fitted, 1.0)]
    assert errors[0] < errors[1]
    np.testing.assert_allclose(metrics.apply_temperature(probabilities, 1.0), probabilities, rtol=1e-9)
    with pytest.raises(ValueError, match="temperature must be a number between"):
        metrics.apply_temperature(probabilities, 0)


def test_cross_entropy_of_uniform_guess_is_log_of_classes():
    assert metrics.cross_entropy(np.full((3, 100), 0.01), [0, 50, 99]) == pytest.approx(np.log(100))
    assert np.isfinite(metrics.cross_entropy(np.eye(2), [1, 0]))
