"""Checks of the exercises of chapter 16, compression step by step."""

import numpy as np

from fcnn_utils.course.exercises import compare_arrays, compare_numbers, exercise


@exercise("16.1")
def best_last_factor(answer):
    """W = 1 for the kernel; t = 2 t W for the output."""
    return compare_numbers(answer, [1.0, 0.5], "compute the outputs of both for the patch (2, -1)")


@exercise("16.2")
def asymmetric_fit(function):
    """Random patches of which the factorized network sees a distorted version; the normal equations of (1, P B)."""
    rng = np.random.default_rng(3)
    for count, size, filters, rank in ((60, 6, 4, 3), (80, 5, 2, 4)):
        dense = rng.normal(1.0, 1.0, (count, size)) @ rng.normal(size=(size, size))
        new = dense @ (np.eye(size) + 0.2 * rng.normal(size=(size, size))) + 0.5
        kernel, basis = rng.normal(size=(size, filters)), rng.normal(size=(size, rank))
        columns = np.hstack([new @ basis, np.ones((count, 1))])
        truth = np.linalg.solve(columns.T @ columns, columns.T @ (dense @ kernel))
        found = function(dense.copy(), new.copy(), kernel.copy(), basis.copy())
        if not isinstance(found, tuple | list) or len(found) != 2:
            return "return two arrays, W and the shift"
        for name, part, right in (("W", found[0], truth[:-1]), ("the shift", found[1], truth[-1])):
            hint = "the target comes from P_dense, what is read from P_new, and both have a mean"
            wrong = compare_arrays(np.asarray(part, float), right, f"{name} of a kernel ({size}, {filters})", hint)
            if wrong:
                return wrong
    return ""


@exercise("16.3")
def directions_of_a_share(function):
    """Patches with known variances along rotated axes."""
    rng = np.random.default_rng(4)
    for variances, share, truth in (([5, 3, 1, 1], 0.75, 2), ([8, 1, 0.5, 0.5], 0.75, 1), ([1, 1, 1, 1], 0.9, 4)):
        axes = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        points = np.vstack([np.diag(np.sqrt(variances)), -np.diag(np.sqrt(variances))]) @ axes.T + 2.0
        found = function(points.copy(), share)
        if np.size(found) != 1 or int(np.ravel(found)[0]) != truth:
            return f"with the variances {variances}, {share:.0%} are in {truth} directions; you return {found}"
    return ""
