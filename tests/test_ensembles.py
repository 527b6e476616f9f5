"""Networks that answer together: `fcnn_utils.course.ensembles`."""

import numpy as np
import pytest
from scipy import special

from fcnn_utils.course import ensembles, metrics


def drawn(signals=(1.5, 1.5, 1.5), count=4000, classes=5, seed=0):
    """(members, labels): networks whose scores tell the class by a signal in noise of their own."""
    random, labels = np.random.default_rng(seed), np.arange(count) % classes
    scores = [random.normal(size=(count, classes)) + signal * np.eye(classes)[labels] for signal in signals]
    return special.softmax(scores, axis=2), labels


@pytest.mark.parametrize("members", [[], np.zeros((3, 4)), np.zeros((0, 2, 2))])
@pytest.mark.parametrize(
    "combine", [ensembles.mean_probability, ensembles.mean_logit, lambda members: ensembles.diversity(members, [])]
)
def test_what_is_no_ensemble_is_refused(combine, members):
    with pytest.raises(ValueError, match=r"members must be \(networks, images, classes\)"):
        combine(members)


def test_means_by_hand():
    members = [[[0.8, 0.2]], [[0.5, 0.5]]]
    np.testing.assert_allclose(ensembles.mean_probability(members), [[0.65, 0.35]])
    np.testing.assert_allclose(ensembles.mean_logit(members), [[2 / 3, 1 / 3]])  # √(0.8 · 0.5) : √(0.2 · 0.5)
    np.testing.assert_allclose(ensembles.mean_probability(members, [3, 1]), [[0.725, 0.275]])
    np.testing.assert_allclose(ensembles.mean_logit(members, [1, 0]), [[0.8, 0.2]])


@pytest.mark.parametrize("combine", [ensembles.mean_probability, ensembles.mean_logit])
def test_together_they_are_better_than_the_best_alone(combine):
    members, labels = drawn()
    together = combine(members)
    np.testing.assert_allclose(together.sum(axis=1), 1)
    assert metrics.accuracy(together, labels) > max(metrics.accuracy(one, labels) for one in members) + 0.05
    np.testing.assert_allclose(combine(members[:1]), members[0], rtol=1e-9)


def test_a_stack_leaves_out_who_knows_nothing():
    members, labels = drawn((1.5, 0, 0))
    combine, weights = ensembles.stacked(members, labels)
    assert weights[0] > 1 and max(weights[1:]) < 0.1 and min(weights) >= 0
    others, truth = drawn((1.5, 0, 0), seed=1)
    assert metrics.accuracy(combine(others), truth) > metrics.accuracy(ensembles.mean_logit(others), truth) + 0.05
    np.testing.assert_allclose(combine(others).sum(axis=1), 1)


def test_a_stack_fits_at_least_as_well_as_the_mean():
    members, labels = drawn((1, 2, 0.5))
    combine, _ = ensembles.stacked(members, labels)
    fitted, plain = (metrics.cross_entropy(one, labels) for one in (combine(members), ensembles.mean_logit(members)))
    assert fitted < plain - 0.01


def test_diversity_by_hand():
    """Two networks, four images of class 0: they are wrong on images 3, 4 and on 2, 4."""
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    members = [[right, right, wrong, wrong], [right, wrong, right, wrong]]
    (row,) = ensembles.diversity(members, [0, 0, 0, 0], ["one", "two"]).to_dict("records")
    assert row == {"first": "one", "second": "two", "disagreement": 0.5, "error_correlation": 0.0, "both_wrong": 0.25}
    table = ensembles.diversity([members[0], members[0], [right] * 4], [0] * 4)
    assert (
        table["error_correlation"].round(6).tolist()[0] == 1
        and table["error_correlation"].isna().tolist()[1:] == [True] * 2
    )
    assert table["disagreement"].tolist() == [0, 0.5, 0.5]
