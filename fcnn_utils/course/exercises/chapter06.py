"""Checks of the exercises of chapter 06, factorized convolutions."""

import numpy as np

from fcnn_utils.course.exercises import compare_arrays, exercise
from fcnn_utils.factorizations import CP
from fcnn_utils.rank_selection import break_even_ranks, ranks_for_fraction


@exercise("06.1")
def weights_of_a_cp_chain(answer):
    """9,900 weights at rank 50, and 372: the largest rank R with R (3 + 3 + 64 + 128) < 9 · 64 · 128."""
    given = np.asarray(answer, float).ravel()
    if given.shape != (2,):
        return "give two numbers: the weights at rank 50, and the largest rank"
    wrong = [name for name, value, true in zip(("weights", "rank"), given, _cp4_truth(), strict=True) if value != true]
    if wrong == ["weights"]:
        return "the rank is right; count the weights of each of the four layers for one component"
    if wrong == ["rank"]:
        return "the weights are right; the rank is the largest whole number with fewer weights than the dense layer"
    return "a component has one vector for each of the four indices: count its numbers first" if wrong else ""


@exercise("06.2")
def merge_of_two_factors(function):
    """The Khatri-Rao product of A and B: column r is the outer product of a_r and b_r, row after row."""
    rng = np.random.default_rng(1)
    for k, rank in ((3, 5), (4, 2), (1, 3)):
        a, b = rng.normal(size=(2, k, rank))
        got = function(a.copy(), b.copy())
        true = np.stack([np.outer(a[:, r], b[:, r]).ravel() for r in range(rank)], axis=1)
        fault = compare_arrays(
            got, true, f"two ({k}, {rank}) factors", "the values are wrong; is row k i + j in its place?"
        )
        if fault:
            return fault
    return ""


@exercise("06.3")
def sweep_of_hooi(function):
    """U spans the leading left singular vectors of the kernel projected on V, then V those of it projected on U."""
    rng = np.random.default_rng(2)
    for shape, ranks in (((3, 3, 7, 6), (3, 2)), ((1, 5, 4, 9), (2, 4))):
        kernel = rng.normal(size=shape)
        u, v = (np.linalg.qr(rng.normal(size=pair))[0] for pair in zip(shape[2:], ranks, strict=True))
        got = function(kernel.copy(), u.copy(), v.copy())
        new_u, new_v = (np.asarray(factor, float) for factor in got)
        if new_u.shape != u.shape or new_v.shape != v.shape:
            return f"the shapes must be {u.shape} and {v.shape}; they are {new_u.shape} and {new_v.shape}"
        if not all(np.allclose(factor.T @ factor, np.eye(factor.shape[1])) for factor in (new_u, new_v)):
            return "the columns of U and V must be orthonormal"
        true_u = _leading(np.tensordot(kernel, v, (3, 0)).transpose(2, 0, 1, 3), ranks[0])
        if not np.allclose(new_u @ new_u.T, true_u @ true_u.T):
            return "U is not the best one for the given V: project the filters on V before the SVD"
        true_v = _leading(np.tensordot(kernel, true_u, (2, 0)).transpose(2, 0, 1, 3), ranks[1])
        if not np.allclose(new_v @ new_v.T, true_v @ true_v.T):
            return "V is not the best one for the new U: project the channels on the new U before the SVD"
    return ""


@exercise("06.4")
def zeros_of_same_padding(function):
    """The zeros (before, after) that make the output ⌈size / stride⌉ pixels long; the extra one comes after."""
    for size in range(1, 14):
        for kernel_size in range(1, 6):
            for stride in range(1, 5):
                got = function(size, kernel_size, stride)
                total = max((int(np.ceil(size / stride)) - 1) * stride + kernel_size - size, 0)
                if tuple(got) != (total // 2, (total + 1) // 2):
                    return (
                        f"for size {size}, kernel size {kernel_size} and stride {stride} the zeros are not {tuple(got)}"
                    )
    return ""


@exercise("06.5")
def rank_for_a_quarter_of_the_macs(answer):
    """42: the largest R with R (32² · 96 + 16² · 9 + 16² · 96) ≤ 16² · 9 · 96² / 4."""
    shape = (3, 3, 96, 96)
    (true,) = ranks_for_fraction(CP, shape, 0.25, cost="macs", strides=2)
    given = float(np.asarray(answer, float).item())
    if given == ranks_for_fraction(CP, shape, 0.25)[0]:
        return "this rank gives a quarter of the weights; the first layer works on four times as many pixels"
    return "" if given == true else "count the pixels that each of the three layers writes"


def _cp4_truth():
    return 50 * (3 + 3 + 64 + 128), break_even_ranks("cp4", (3, 3, 64, 128))[0]


def _leading(tensor, rank):
    """Return the leading left singular vectors of the first unfolding."""
    matrix = tensor.reshape(len(tensor), -1)
    return np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1][:, :rank]
