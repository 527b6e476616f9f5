"""Checks of the exercises of chapter 09, the wider factorized network."""

import numpy as np

from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("09.1")
def pair_of_a_larger_kernel(answer):
    """(1 + f/c) / 5: 0.4 for equal widths, and 1 at f/c = 4."""
    if np.shape(answer) == (2,) and np.allclose(answer, [2 / 3, 2]):
        return "these are the numbers of a 3×3 kernel"
    return compare_numbers(answer, [2 / 5, 4], "divide 5cR + 5Rf by 25cf, with R = f")


@exercise("09.2")
def error_of_the_best_pair(function):
    """Of a sum of pairs with orthogonal matrices, whose singular values are known."""
    rng = np.random.default_rng(3)
    for k, c, f, rank in ((3, 4, 5, 2), (2, 6, 3, 4), (3, 2, 2, 6)):
        count = k * min(c, f)
        u, v = (np.linalg.qr(rng.normal(size=(k * n, count)))[0] for n in (c, f))
        sigma = np.arange(count, 0, -1.0)
        kernel = ((u * sigma) @ v.T).reshape(k, c, k, f).transpose(0, 2, 1, 3)
        truth, got = np.sqrt(np.sum(sigma[rank:] ** 2) / np.sum(sigma**2)), function(kernel.copy(), rank)
        if np.isclose(got, truth, atol=1e-9):
            continue
        if np.isclose(got, truth**2):
            return "this is the squared error: take the root"
        if np.isclose(got, truth * np.linalg.norm(sigma)):
            return "divide by the norm of the kernel"
        others = [np.linalg.svd(each.reshape(k * c, -1), compute_uv=False) for each in _wrong_orders(kernel)]
        if any(np.isclose(got, np.linalg.norm(each[rank:]) / np.linalg.norm(each)) for each in others):
            return "the order of the axes is wrong: rows (i, s), columns (j, t), as in `split`"
        return f"for k = {k}, c = {c}, f = {f} and rank {rank} it is {truth:.4f}, not {float(got):.4f}"
    return ""


def _wrong_orders(kernel):
    return kernel, kernel.transpose(1, 2, 0, 3)  # no transpose at all; and the 1×k layer first


@exercise("09.3")
def kernel_whose_order_matters(answer):
    """Any a[i, s] b[j, t] with a and b of rank 2."""
    kernel = np.asarray(answer, float)
    if kernel.shape != (3, 3, 2, 2):
        return f"the shape must be (3, 3, 2, 2); it is {kernel.shape}"
    first, second = (kernel.transpose(order).reshape(6, 6) for order in ((0, 2, 1, 3), (1, 2, 0, 3)))
    ranks = np.linalg.matrix_rank(first), np.linalg.matrix_rank(second)
    if ranks[0] != 1:
        return f"the column-first matrix has rank {ranks[0]}; it must be 1"
    return "" if ranks[1] > 1 else "the row-first matrix has rank 1, too"
