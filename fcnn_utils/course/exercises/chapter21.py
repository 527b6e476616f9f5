"""Checks of the exercises of chapter 21, medical images."""

import numpy as np

from fcnn_utils.course.exercises import compare_arrays, compare_numbers, exercise


@exercise("21.1")
def false_alarms(answer):
    """Per 1,000 children: 105 of 724 alarms are false, and 274 of 294."""
    truth = [100 * 0.105 / (0.105 + 0.61875), 100 * 0.2744 / (0.2744 + 0.0198)]
    return compare_numbers(answer, truth, "of 100 alarms, not of 100 children", rtol=2e-2)


@exercise("21.2")
def moved_probabilities(function):
    """By the odds of the classes, image by image."""
    rng = np.random.default_rng(1)
    for classes in (2, 3):
        p = rng.dirichlet(np.ones(classes), 20)
        before, after = rng.dirichlet(np.full(classes, 3.0), 2)
        truth = np.array([[x * b / a for x, a, b in zip(row, before, after, strict=True)] for row in p])
        truth /= truth.sum(axis=1)[:, None]
        case = f"{classes} classes"
        found = np.asarray(function(p.copy(), before.copy(), after.copy()), float)
        wrong = compare_arrays(found, truth, case, "the odds of two classes must change by the ratio of their shares")
        if wrong:
            return wrong
    return ""


@exercise("21.3")
def interval_of_a_difference(function):
    """The bootstrap agrees with the normal interval of the mean of the paired differences to a tenth of its width."""
    rng = np.random.default_rng(2)
    for better in (0.1, 0.0, -0.05):
        y = rng.integers(0, 2, 2000)
        common = rng.random(2000) < 0.7
        right = [common & (rng.random(2000) < share) for share in (0.9, min(0.9 + better, 1.0))]
        first, second = (np.eye(2)[np.where(each, y, 1 - y)] for each in right)
        difference = 100 * (right[1].astype(float) - right[0])
        half = 1.96 * difference.std() / np.sqrt(len(y))
        truth = difference.mean() + np.array([-half, half])
        found = np.asarray(function(first, second, y), float)
        if found.shape != (2,):
            return "return two numbers, low and high"
        if not np.allclose(found, truth, atol=0.2 * half):
            return f"for {difference.mean():+.2f} points it is about {truth.round(2)}; yours is {found.round(2)}"
    return ""
