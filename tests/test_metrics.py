"""AUC, calibration and intervals: `fcnn_utils.course.metrics`."""

import numpy as np
import pytest

from fcnn_utils.course import metrics


def two(scores):
    """Probabilities of two classes from those of the second."""
    scores = np.asarray(scores, float)
    return np.stack([1 - scores, scores], axis=1)


def drawn(count=300, classes=4, seed=0):
    """Probabilities, and labels that they tell something about."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    scores = random.normal(size=(count, classes)) + 1.5 * np.eye(classes)[labels]
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True), labels


# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2], [0, -1, 1], [0.0, 1.0, 1.0], [[0], [1], [1]], []])
@pytest.mark.parametrize("measure", [metrics.auc, metrics.accuracy, metrics.cross_entropy, metrics.calibration_error])
def test_labels_that_do_not_fit_are_refused(measure, labels):
    with pytest.raises(ValueError, match="labels must be whole numbers|labels \\(images,\\)"):
        measure(two([0.1, 0.2, 0.3]), labels)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_one_class_alone_has_no_auc(labels):
    with pytest.raises(ValueError, match=r"the AUC needs images of each of the 2 classes; got \["):
        metrics.auc(two([0.1, 0.2, 0.3]), labels)


@pytest.mark.parametrize("setting", [{"level": 1.0}, {"level": 0}, {"rounds": 5}, {"rounds": 10.5}])
def test_an_interval_wants_a_level_and_rounds(setting):
    with pytest.raises(ValueError, match="must be a"):
        metrics.bootstrap_interval(np.mean, np.arange(5), **setting)


# --- correct -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, labels, area",
    [([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75), ([0.5] * 4, [0, 1, 0, 1], 0.5), ([0.9, 0.1], [0, 1], 0.0)],
)
def test_auc_by_hand(scores, labels, area):
    assert metrics.auc(two(scores), labels) == pytest.approx(area)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    random = np.random.default_rng(0)
    scores, labels = random.integers(0, 10, 60) / 10, random.integers(0, 2, 60)
    ill, well = scores[labels == 1], scores[labels == 0]
    pairs = (ill[:, None] > well).mean() + 0.5 * (ill[:, None] == well).mean()
    assert metrics.auc(two(scores), labels) == pytest.approx(pairs)


def test_auc_of_more_classes_is_the_mean_of_each_against_the_rest():
    probabilities, labels = drawn()
    each = [metrics.auc(two(probabilities[:, label]), (labels == label).astype(int)) for label in range(4)]
    assert metrics.auc(probabilities, labels) == pytest.approx(np.mean(each)) and 0.6 < np.mean(each) < 0.99


def test_an_interval_is_as_wide_as_the_error_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrap_interval(np.mean, values)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert (
        metrics.bootstrap_interval(np.mean, values)
        == (low, high)
        != metrics.bootstrap_interval(np.mean, values, seed=1)
    )
    narrow = metrics.bootstrap_interval(np.mean, values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_arrays_are_drawn_together():
    probabilities, labels = drawn()
    low, high = metrics.bootstrap_interval(metrics.accuracy, probabilities, labels, rounds=200)
    assert low < metrics.accuracy(probabilities, labels) < high and low > 0.4


def test_draws_without_a_class_are_drawn_again_but_not_for_ever():
    rare = np.array([0] * 20 + [1])
    assert metrics.bootstrap_interval(metrics.auc, two(np.linspace(0, 1, 21)), rare, rounds=100) == (1.0, 1.0)
    with pytest.raises(ValueError, match="the AUC needs"):
        metrics.bootstrap_interval(metrics.auc, two(np.linspace(0, 1, 21)), np.zeros(21, int), rounds=100)


def test_reliability_by_hand():
    """Sure by 0.95, 0.9 and 0.6, 0.55 of two bins' images, of which both and one are right."""
    probabilities = two([0.95, 0.1, 0.6, 0.55])
    table = metrics.reliability(probabilities, [1, 0, 1, 0], bins=2)
    assert table.to_dict("list") == {"images": [4], "confidence": [0.75], "accuracy": [0.75]}
    table = metrics.reliability(probabilities, [1, 0, 1, 0], bins=4)
    assert table["images"].tolist() == [2, 2] and table["accuracy"].tolist() == [0.5, 1.0]
    np.testing.assert_allclose(table["confidence"], [0.575, 0.925])
    assert metrics.calibration_error(probabilities, [1, 0, 1, 0], bins=4) == pytest.approx(0.075)


def test_certainty_has_a_bin():
    table = metrics.reliability(np.eye(2), [0, 1])
    assert table.to_dict("list") == {"images": [2], "confidence": [1.0], "accuracy": [1.0]}


def test_temperature_undoes_what_made_a_network_too_sure():
    probabilities, labels = drawn(4000)
    own = metrics.fit_temperature(probabilities, labels)
    assert metrics.fit_temperature(metrics.apply_temperature(probabilities, 1 / 3), labels) == pytest.approx(
        3 * own, rel=1e-3
    )
    cool = metrics.apply_temperature(probabilities, 1 / 3)
    assert metrics.calibration_error(metrics.apply_temperature(cool, 3 * own), labels) < metrics.calibration_error(
        cool, labels
    )
    np.testing.assert_allclose(metrics.apply_temperature(probabilities, 1.0), probabilities, rtol=1e-9)


def test_cross_entropy_of_a_guess_is_its_logarithm():
    assert metrics.cross_entropy(np.full((3, 100), 0.01), [0, 50, 99]) == pytest.approx(np.log(100))
    assert np.isfinite(metrics.cross_entropy(np.eye(2), [1, 0]))
