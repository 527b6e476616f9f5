"""Checks of the exercises of chapter 12, how is a recipe found?"""

import math

import numpy as np
from scipy import stats

from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("12.1")
def standard_error_of_an_accuracy(answer):
    """100 · sqrt(0.6 · 0.4 / 10,000), about 0.49 points."""
    if np.size(answer) == 1 and math.isclose(float(np.ravel(answer)[0]), 0.0048990, rel_tol=0.05):
        return "give it in points, that is in percent of the images"
    return compare_numbers(answer, 0.48990, "take p = 0.6 and n = 10,000", rtol=0.015)


@exercise("12.2")
def interval_of_a_paired_difference(function):
    """That of SciPy's paired t-test."""
    rng = np.random.default_rng(6)
    for count in (3, 5, 12):
        level = rng.normal(60, 3, count)  # common to both: it cancels in the differences
        first, second = level + rng.normal(1, 0.3, count), level + rng.normal(0, 0.3, count)
        truth = [np.mean(first - second), *stats.ttest_rel(first, second).confidence_interval(0.95)]
        got = np.ravel(np.asarray(function(first.copy(), second.copy()), float))
        if got.shape != (3,):
            return "return three numbers: the mean, and both ends of the interval"
        if not np.isclose(got[0], truth[0]):
            return "the mean must be that of first - second"
        if not np.allclose(got, truth, rtol=1e-3):
            unpaired = stats.ttest_ind(first, second).confidence_interval(0.95)
            if np.allclose(got[1:], unpaired, rtol=1e-2):
                return "this interval ignores that the seeds are the same: form the differences first"
            ratio = (got[0] - got[1]) / (truth[0] - truth[1])
            hint = _hint(ratio, count)
            return (
                f"for {count} seeds the half width is {truth[0] - truth[1]:.4f}; yours is {got[0] - got[1]:.4f}{hint}"
            )
    return ""


def _hint(ratio, count):
    """What a wrong half width of the interval says, for a number of seeds."""
    t = stats.t.ppf([0.95, 0.975], count - 1)
    hints = {
        "divide by n - 1 in the standard deviation: ddof=1": np.sqrt((count - 1) / count),
        "t must be that of n - 1 degrees of freedom, not the 1.96 of a normal distribution": 1.96 / t[1],
        "each side has 2.5%: take t at 0.975": t[0] / t[1],
        "divide by the square root of n": np.sqrt(count),
    }
    return "".join(f"; {hint}" for hint, wrong in hints.items() if np.isclose(ratio, wrong, rtol=1e-3))


@exercise("12.3")
def largest_of_many(function):
    """The known means of the largest of k standard normal numbers."""
    for k, truth in ((1, 0.0), (2, 0.5642), (5, 1.1630), (25, 1.9653)):
        got = function(k, np.random.default_rng(k))
        if not abs(got - truth) < 0.03:
            return f"for k = {k} it is about {truth:.2f}; yours is {got:.2f}; average over at least 10,000 searches"
    return ""


@exercise("12.4")
def seeds_for_a_standard_error(answer):
    """0.4 · sqrt(2 / n) <= 0.1 from n = 32 on."""
    if answer == 16:
        return "this is the number for one setting; the difference has the noise of both"
    return compare_numbers(answer, 32, "solve 0.4 √(2 / n) = 0.1 for n")
