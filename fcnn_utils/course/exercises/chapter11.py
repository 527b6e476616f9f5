"""Checks of the exercises of chapter 11, train it yourself."""

import math

import numpy as np

from fcnn_utils.course.exercises import compare_arrays, compare_numbers, exercise


@exercise("11.1")
def steps_of_an_epoch(answer):
    """390 steps; 80 images are left out."""
    return compare_numbers(answer, [50_000 // 128, 50_000 % 128], "divide 50,000 by 128 with remainder")


@exercise("11.2")
def triangle(function):
    """Linear to the peak, then linear to 0, at points computed by hand."""
    cases = [
        ((step, 0.2, 10, 30), rate) for step, rate in [(0, 0), (5, 0.1), (10, 0.2), (15, 0.15), (20, 0.1), (30, 0)]
    ]
    for (step, peak, warmup, total), rate in [*cases, ((7, 0.4, 8, 20), 0.35), ((14, 0.4, 8, 20), 0.2)]:
        got = float(function(step, peak, warmup, total))
        if not math.isclose(got, rate, abs_tol=1e-6):
            return (
                f"at step {step} of {total}, with {warmup} steps of warm-up to {peak}, "
                f"the rate is {rate:.4f}; yours is {got:.4f}"
            )
    return ""


@exercise("11.3")
def square_of_zeros(function):
    """Each pixel decided by itself."""
    rng = np.random.default_rng(5)
    for y, x, size in ((1, 2, 3), (-2, 4, 4), (6, 5, 9), (-5, -5, 3)):
        image = rng.random((8, 7, 3)) + 1
        given = image.copy()
        rows, columns = np.indices((8, 7))
        inside = (rows >= y) & (rows < y + size) & (columns >= x) & (columns < x + size)
        truth, case = np.where(inside[..., None], 0, image), f"y={y}, x={x}, size={size}"
        hint = "the wrong pixels are 0" + "; a part of the square is outside the image" * (min(y, x) < 0)
        fault = compare_arrays(function(given, y, x, size), truth, case, hint)
        if fault:
            return fault
        if not np.array_equal(given, image):
            return "the image that was given has changed: copy it first"
    return ""


@exercise("11.4")
def least_loss_scale(answer):
    """64, since 2**-24 / 1e-9 is 59.6."""
    if answer == 6:
        return "give the power itself, not its exponent"
    return compare_numbers(answer, 64, "divide the smallest float16 by the gradient, and round up to a power of two")
