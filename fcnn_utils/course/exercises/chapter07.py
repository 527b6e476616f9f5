"""Checks of the exercises of chapter 07, choosing a factorization."""

import numpy as np

from fcnn_utils.course.exercises import exercise
from fcnn_utils.rank_selection import error_curve


@exercise("07.1")
def ranks_from_budget(answer):
    """(211, 844): the weights allowed over the 192 + 9 + 192 numbers of a component, rounded down."""
    allowed = 9 * 192 * 192 / (192 + 9 + 192)
    given = np.asarray(answer, float).ravel()
    if given.shape != (2,):
        return "give two numbers, the rank at a quarter and the break-even rank"
    if np.any(given % 1):
        return "a rank is a whole number; round down"
    wrong = [
        name
        for name, rank, right in zip(("a quarter", "break-even"), given, (allowed // 4, allowed // 1), strict=True)
        if rank != right
    ]
    return f"wrong for {' and '.join(wrong)}; each component costs c + k² + f numbers" if wrong else ""


@exercise("07.2")
def largest_rank_at_stride_2(answer):
    """169: for one pixel of the output 4 · 96 R + 9 R + 96 R MACs, against 9 · 96 · 96."""
    rank = float(np.asarray(answer, float).reshape(()))
    if rank == 9 * 96 * 96 // (96 + 9 + 96):
        return "this is the rank for stride 1; here the first layer runs on four times as many pixels"
    right = 9 * 96 * 96 // (4 * 96 + 9 + 96)
    return "" if rank == right else "count the MACs of the three layers for one pixel of the output"


@exercise("07.3")
def pruning_error_of_file(function):
    """The error when share · size · 32 / (32 + index_bits) weights are kept, rounded down."""
    rng = np.random.default_rng(3)
    for shape, share, bits in (((3, 3, 7, 5), 0.25, 16), ((1, 5, 4, 9), 0.5, 8), ((3, 3, 3, 11), 0.4, 0)):
        kernel = rng.normal(size=shape)
        found = function(kernel, share, bits)
        kept = int(share * kernel.size * 32 / (32 + bits))
        magnitudes = np.sort(np.abs(kernel).ravel())[: kernel.size - kept]
        right = np.linalg.norm(magnitudes) / np.linalg.norm(kernel)
        if not np.isclose(float(found), right, rtol=1e-6):
            return f"for a {shape} kernel, share {share} and {bits} index bits it returns {float(found):.4f}: wrong"
    return ""


@exercise("07.4")
def time_saved(function):
    """1 − (t − empty) / (dense − empty) for all models but these two."""
    for times in ({"dense": 5.0, "empty": 1.0, "a": 2.0, "b": 6.0}, {"x": 0.7, "empty": 0.6, "dense": 1.3}):
        found = function(dict(times))
        found = dict(found)
        if {"dense", "empty"} & set(found):
            return "leave out the dense layer and the empty model"
        right = {name: 1 - (t - times["empty"]) / (times["dense"] - times["empty"]) for name, t in times.items()}
        for name in set(times) - {"dense", "empty"}:
            if name not in found or not np.isclose(float(found[name]), right[name]):
                return f"for the times {times} it is wrong for {name!r}; is the empty model taken off both times?"
    return ""


@exercise("07.5")
def best_method(function):
    """The method with the smallest error at ranks that have the given share of the weights."""
    rng = np.random.default_rng(5)
    shape, methods = (3, 3, 12, 11), ["spatial", "tt", "tucker"]
    spatial = rng.normal(size=(3, 12, 3)), rng.normal(size=(3, 3, 11))
    tucker = rng.normal(size=(12, 3)), rng.normal(size=(3, 3, 3, 3)), rng.normal(size=(11, 3))
    kernels = [
        np.einsum("isr,rjt->ijst", *spatial),
        np.einsum("sa,ijab,tb->ijst", *tucker),
        rng.normal(size=shape),
    ]
    for kernel in kernels:
        for share, order in ((0.25, methods), (0.25, methods[::-1]), (0.1, methods)):
            found = function(kernel, share, order)
            errors = {method: error_curve(kernel, method, [share])["relative_error"][0] for method in methods}
            if found not in errors:
                return f"return one of the methods; it returns {found!r}"
            if errors[found] > min(errors.values()) + 1e-9:
                return f"for one kernel it returns {found!r}, but another method has a smaller error"
    return ""
