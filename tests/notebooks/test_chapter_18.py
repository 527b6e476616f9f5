"""Chapter 18, factorize, prune or quantize?: the numbers in its text, from the records, and its exercises."""

import numpy as np
import pytest

from fcnn_utils.course import pruning
from fcnn_utils.course.data import cifar100

CHAPTER = "18"
WRONG = {
    "18.1": [[1 / 4.5, 1 - 1 / 4.5], [0.53, 0.47], 0.47],
    "18.2": [
        lambda kernel, norm, after, count: _pair(kernel, norm, after, np.arange(count)),
        lambda kernel, norm, after, count: _pair(kernel, norm, after, _largest(kernel)[:count]),
        lambda kernel, norm, after, count: _pair(kernel, norm, after, np.sort(_largest(kernel)[-count:])),
        lambda kernel, norm, after, count: (kernel, norm, after),
    ],
    "18.3": [
        lambda points: {max(points, key=lambda name: points[name][1])},
        lambda points: set(points),
        lambda points: {a for a, p in points.items() if not any(q[1] > p[1] for q in points.values())},
    ],
}
pytestmark = pytest.mark.skipif(cifar100.find() is None, reason="CIFAR-100 is not on this machine")


def _largest(kernel):
    return np.argsort(-np.abs(kernel).sum(axis=(0, 1, 2)))


def _pair(kernel, norm, after, kept):
    return kernel[..., kept], [values[kept] for values in norm], after[:, :, kept]


def test_pruning_by_hand_is_that_of_the_library(chapter):
    dense, kept = chapter["dense"], chapter["kept"]
    importance = pruning._importance(dense, pruning._convolutions(dense), "l1", None)["conv4"]
    assert np.allclose(importance, chapter["importance"], rtol=1e-5) and len(kept) == 96


def test_factorized_networks_lose_less_than_pruned_ones_without_training(chapter):
    top1 = chapter["untrained"].groupby(["times", "method"])["top1"].mean().unstack()
    pruned = top1[list(chapter["CRITERIA"])].max(axis=1)
    assert list(top1.index) == [2, 4, 8] and chapter["untrained"].groupby(["times", "method"]).size().eq(3).all()
    assert (top1[["auto", "cp"]].min(axis=1) > pruned + 2).all()


def test_exercises(check_exercises):
    check_exercises(WRONG)
