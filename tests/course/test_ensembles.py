"""Ensembles: `fcnn_utils.course.ensembles`."""

import numpy as np
import pytest
from scipy import special

from fcnn_utils.course import ensembles, metrics


def random_members(signals=(1.5, 1.5, 1.5), count=4000, classes=5, seed=0):
    """Return (members, labels): each network's scores are noise of its own, plus a signal for the right class."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % classes
    scores = [rng.normal(size=(count, classes)) + signal * np.eye(classes)[labels] for signal in signals]
    return special.softmax(scores, axis=2), labels


@pytest.mark.parametrize("members", [[], np.zeros((3, 4)), np.zeros((0, 2, 2))])
@pytest.mark.parametrize("combine", [ensembles.mean_probability, ensembles.mean_logit])
def test_functions_reject_members_of_wrong_shape(combine, members):
    with pytest.raises(ValueError, match=r"members must be \(networks, images, classes\)"):
        combine(members)


def test_means_by_hand():
    members = [[[0.8, 0.2]], [[0.5, 0.5]]]
    np.testing.assert_allclose(ensembles.mean_probability(members), [[0.65, 0.35]])
    np.testing.assert_allclose(ensembles.mean_logit(members), [[2 / 3, 1 / 3]])  # √(0.8 · 0.5) : √(0.2 · 0.5)
    np.testing.assert_allclose(ensembles.mean_probability(members, [3, 1]), [[0.725, 0.275]])
    np.testing.assert_allclose(ensembles.mean_logit(members, [1, 0]), [[0.8, 0.2]])


@pytest.mark.parametrize("combine", [ensembles.mean_probability, ensembles.mean_logit])
def test_independent_networks_are_better_together(combine):
    members, labels = random_members()
    together = combine(members)
    np.testing.assert_allclose(together.sum(axis=1), 1)
    assert metrics.accuracy(together, labels) > max(metrics.accuracy(one, labels) for one in members) + 0.05
    np.testing.assert_allclose(combine(members[:1]), members[0], rtol=1e-9)


def test_stacking_ignores_networks_without_information():
    members, labels = random_members((1.5, 0, 0))
    combine, weights = ensembles.stacked(members, labels)
    assert weights[0] > 1 and max(weights[1:]) < 0.1 and min(weights) >= 0
    others, truth = random_members((1.5, 0, 0), seed=1)
    assert metrics.accuracy(combine(others), truth) > metrics.accuracy(ensembles.mean_logit(others), truth) + 0.05
    np.testing.assert_allclose(combine(others).sum(axis=1), 1)


def test_stacking_fits_better_than_the_mean():
    members, labels = random_members((1, 2, 0.5))
    combine, _ = ensembles.stacked(members, labels)
    fitted, plain = (metrics.cross_entropy(one, labels) for one in (combine(members), ensembles.mean_logit(members)))
    assert fitted < plain - 0.01
