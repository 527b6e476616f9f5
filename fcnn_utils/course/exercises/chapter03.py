"""Exercises of chapter 03: computing a CP decomposition."""

import numpy as np

from fcnn_utils.course.exercises import compare_arrays, exercise


@exercise("03.1")
def ratios_after_a_sweep(answer):
    """3/4, 9/8 and 81/32: each ratio is 3 times the product of the other two."""
    found = np.asarray(answer, dtype=float).ravel()
    if found.size != 3:
        return "give three numbers: the ratios for a, b and c"
    a, b, c = 1.0, 1 / 2, 1 / 2
    a = 3 * b * c
    if not np.isclose(found[0], a, rtol=1e-2):
        return "look at a first: it is 3 b[0] c[0] over b[1] c[1]"
    b = 3 * a * c
    if not np.isclose(found[1], b, rtol=1e-2):
        return "the update of b uses the new a and the old c"
    return "" if np.isclose(found[2], 3 * a * b, rtol=1e-2) else "the update of c uses the new a and the new b"


@exercise("03.2")
def cost_of_a_sweep(answer):
    """3 · 9 · 96 · 96 · 100 multiply-adds for the MTTKRPs and (9 + 96 + 96) · 100² for the Gram matrices."""
    found = np.asarray(answer, dtype=float).ravel()
    if found.size != 2:
        return "give two numbers: [MTTKRPs, Gram matrices]"
    size, rank = (9, 96, 96), 100
    if np.isclose(found[0], np.prod(size) * rank, rtol=1e-6):
        return "that is one MTTKRP; a sweep has three"
    if not np.isclose(found[0], 3 * np.prod(size) * rank, rtol=1e-6):
        return "check the MTTKRPs: in each mode every entry of the tensor meets every component"
    return "" if np.isclose(found[1], sum(size) * rank**2, rtol=1e-6) else "check the three Gram matrices"


@exercise("03.3")
def mttkrp_of_any_order(function):
    """Compared with an einsum, for two to four modes of different sizes."""
    rng = np.random.default_rng(3)
    for shape in ((4, 3, 5), (2, 5, 3, 4), (6, 3)):
        tensor, factors = rng.normal(size=shape), [rng.normal(size=(size, 3)) for size in shape]
        letters = "ijkl"[: len(shape)]
        for mode in range(len(shape)):
            found = function(tensor.copy(), [factor.copy() for factor in factors], mode)
            others = [other for other in range(len(shape)) if other != mode]
            terms = ",".join([letters, *(f"{letters[other]}r" for other in others)])
            truth = np.einsum(f"{terms}->{letters[mode]}r", tensor, *(factors[other] for other in others))
            fault = compare_arrays(found, truth, f"mode {mode} of a {shape} tensor", "the values are wrong")
            if fault:
                return fault
    return ""


@exercise("03.4")
def error_of_a_matrix(function):
    """The error of the truncated SVD, for matrices with a gap after the wanted singular values."""
    rng = np.random.default_rng(4)
    for shape, rank in (((6, 8), 2), ((7, 5), 3), ((5, 9), 1)):
        u, v = (np.linalg.qr(rng.normal(size=(size, min(shape))))[0] for size in shape)
        sigma = np.where(np.arange(min(shape)) < rank, 3.0, 1.0) * rng.uniform(0.9, 1.1, size=min(shape))
        found = function(u * sigma @ v.T, rank)
        truth = np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)
        if np.ndim(found) != 0:
            return "return one number, the error after the last sweep"
        if found < truth - 1e-6:
            return "your error is below that of the truncated SVD, which is impossible; is it relative to the norm?"
        if not found <= truth + 1e-4:
            return f"for a {shape[0]} × {shape[1]} matrix at rank {rank} the error can be smaller; try more sweeps"
    return ""


@exercise("03.5")
def best_of_several_starts(function):
    """On a tensor with orthogonal components, of which single starts miss some, many starts find them all."""
    rng = np.random.default_rng(5)
    factors = [np.linalg.qr(rng.normal(size=(size, 3)))[0] for size in (4, 6, 5)]
    tensor = np.einsum("ir,jr,kr->ijk", *factors)
    errors = []
    for _ in range(10):  # one start finds them all about every second time
        found = function(tensor.copy(), 3, 12, 40)
        if len(found) != 3 or [np.shape(factor) for factor in found] != [(4, 3), (6, 3), (5, 3)]:
            return "return a list of three factors, each with R columns"
        errors.append(np.linalg.norm(tensor - np.einsum("ir,jr,kr->ijk", *found)) / np.linalg.norm(tensor))
    return "" if max(errors) < 0.1 else "some results are worse than the best of 12 starts would be; which do you keep?"
