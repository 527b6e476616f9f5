"""Checks of the exercises of chapter 02, the CP decomposition."""

import itertools
import math

import numpy as np

from fcnn_utils.course.exercises import compare_arrays, compare_numbers, exercise


@exercise("02.1")
def slice_by_hand(answer):
    """The slice A diag(5, -1) B^T of the example."""
    a, b, weights = np.array([[1, 1], [2, -1]]), np.array([[1, 2], [1, 1]]), (5, -1)
    truth = [[sum(w * a[i, r] * b[j, r] for r, w in enumerate(weights)) for j in range(2)] for i in range(2)]
    return compare_numbers(answer, truth, "the slice is 5 times the first product minus the second; rows belong to A")


@exercise("02.2")
def break_even(answer):
    """The largest ranks at which a CP stores fewer numbers than 480×640×3 and 5×5×64×64."""
    truth = []
    for shape in ((480, 640, 3), (5, 5, 64, 64)):
        rank = 0
        while (rank + 1) * sum(shape) < math.prod(shape):
            rank += 1
        truth.append(rank)
    return compare_numbers(answer, truth, "compare R times the sum of the sizes with their product; all modes count")


@exercise("02.3")
def fold(function):
    """A function (matrix, mode, shape) -> tensor, the inverse of the unfolding."""
    rng = np.random.default_rng(23)
    for shape in ((2, 2, 2), (3, 4, 5), (5, 2, 3, 4), (7, 3)):
        for mode in range(len(shape)):
            tensor = rng.normal(size=shape)
            others = [range(n) for m, n in enumerate(shape) if m != mode]
            columns = list(itertools.product(*others))  # the last index runs fastest
            matrix = np.empty((shape[mode], len(columns)))
            for row, (number, column) in itertools.product(range(shape[mode]), enumerate(columns)):
                matrix[row, number] = tensor[(*column[:mode], row, *column[mode:])]
            fault = compare_arrays(function(matrix, mode, shape), tensor, f"mode {mode} of a {shape} tensor")
            if fault:
                return fault
    return ""


@exercise("02.4")
def khatri_rao_all(function):
    """A function that takes a list of factors and returns their Khatri-Rao product, the last index fastest."""
    rng = np.random.default_rng(24)
    for sizes, rank in (((3, 4), 2), ((2, 3, 5), 3), ((4, 1, 2, 3), 2), ((3,), 4)):
        factors = [rng.normal(size=(n, rank)) for n in sizes]
        rows = itertools.product(*factors)  # one row of each factor
        truth = np.array([np.prod(row, axis=0) for row in rows])
        found = function([factor.copy() for factor in factors])
        fault = compare_arrays(found, truth, f"factors with {sizes} rows")
        if fault:
            return fault
    return ""


@exercise("02.5")
def kruskal_bounds(answer):
    """The largest ranks of Kruskal's condition for random factors of 3×3×96×192 and 9×96×192."""
    truth = []
    for shape in ((3, 3, 96, 192), (9, 96, 192)):
        allowed = [R for R in range(1, 1000) if sum(min(n, R) for n in shape) >= 2 * R + len(shape) - 1]
        truth.append(max(allowed))
    return compare_numbers(answer, truth, "add up min(n, R) over the modes and compare with 2R + N − 1 for N modes")
