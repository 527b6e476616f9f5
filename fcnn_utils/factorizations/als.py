"""Alternating least squares for CP, with a ridge (Carroll & Chang 1970; Harshman 1970; Kolda & Bader 2009).

One sweep updates every mode in turn. The update of mode n of a tensor X solves  min ‖X₍ₙ₎ − A Zᵀ‖² + λ ‖A‖²,
where Z is the Khatri-Rao product of the other factors, with columns of unit norm. In the eigenbasis of
ZᵀZ = V diag(d) Vᵀ the solution is  A V = X₍ₙ₎ Z V / (d + λ).  Its error and its norm depend on λ only through d and
the squared norms of the columns of X₍ₙ₎ Z V (`squares`). Therefore λ can be chosen for a given error or a given norm
without another solve.

It is implemented here because libraries have a fixed ridge at most: TensorLy's `parafac` has `l2_reg`.
"""

import math

import numpy as np
from scipy.optimize import brentq

LETTERS = "ijklm"


def sweeps(tensor, factors, ridge, n_iter, tol):
    """Sweep until the relative error falls by less than `tol`.

    Args:
        tensor: array with two or more modes.
        factors: list of (I_n, R), one for each mode.
        ridge: function (‖X‖², d (R,), squares (R,)) -> λ, such as `no_ridge`.
        n_iter: maximum number of sweeps.
        tol: stop when a sweep lowers the relative error by less than this.

    Returns:
        (factors, relative error).
    """
    norm, before = np.linalg.norm(tensor), math.inf
    for _ in range(n_iter):
        factors, squared_error = sweep(tensor, factors, ridge)
        error = math.sqrt(max(squared_error, 0)) / norm if norm else 0.0
        if before - error < tol:
            break
        before = error
    return factors, error


def sweep(tensor, factors, ridge):
    """Update every mode once; afterwards all modes but the last have columns of unit norm (or zero).

    Returns:
        (factors, squared error).
    """
    factors, total = list(factors), np.sum(tensor**2)
    for mode in range(tensor.ndim):
        for other in range(tensor.ndim):
            if other != mode:
                factors[other] = factors[other] / column_norms(factors[other])
        gram = math.prod(factor.T @ factor for other, factor in enumerate(factors) if other != mode)
        d, basis = np.linalg.eigh(gram)  # (R,), (R, R)
        product = mttkrp(tensor, factors, mode) @ basis  # (I_n, R)
        keep = d > d[-1] * len(d) * np.finfo(float).eps  # pseudo-inverse if columns are collinear
        d, product, basis = d[keep], product[:, keep], basis[:, keep]
        squares = np.sum(product**2, axis=0)
        penalty = ridge(total, d, squares)
        factors[mode] = product / (d + penalty) @ basis.T
    return factors, _squared_error(penalty, total, d, squares)


def mttkrp(tensor, factors, mode):
    """Return X₍ₙ₎ (⊙_{m≠n} A_m), the matricized tensor times Khatri-Rao product, as (I_n, R).

    The largest of the other modes is summed by a matrix product, the rest by einsum.
    """
    others = sorted((m for m in range(tensor.ndim) if m != mode), key=lambda m: -tensor.shape[m])
    letters = LETTERS[: tensor.ndim]
    axes = letters.replace(letters[others[0]], "") + "r"
    product = np.moveaxis(tensor, others[0], -1) @ factors[others[0]]
    rest = [(letters[m] + "r", factors[m]) for m in others[1:]]
    equation = ",".join([axes, *(name for name, _ in rest)]) + "->" + letters[mode] + "r"
    return np.einsum(equation, product, *(factor for _, factor in rest))


def no_ridge(total, d, squares):
    """Plain least squares: λ = 0."""
    return 0.0


def preserving_ridge(total, d, squares, squared_error):
    """Return the λ at which the squared error is as given, 0 if it is larger already."""
    return _root(lambda ridge: _squared_error(ridge, total, d, squares) - squared_error, d)


def bounding_ridge(total, d, squares, squared_norm):
    """Return the λ at which ‖A‖² is as given, 0 if it is smaller already."""
    return _root(lambda ridge: squared_norm - np.sum(squares / (d + ridge) ** 2), d)


def initial_factors(tensor, rank, seed, number):
    """Return initial factors: leading singular vectors of the unfoldings for start number 0, else random ones.

    If an unfolding has too few singular vectors, random columns are added.
    """
    rng = np.random.default_rng([seed, number])
    factors = [rng.standard_normal((size, rank)) for size in tensor.shape]
    if number == 0:
        for mode, factor in enumerate(factors):
            unfolding = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
            vectors = np.linalg.svd(unfolding, full_matrices=False)[0][:, :rank]
            factor[:, : vectors.shape[1]] = vectors
    return factors


def exact_factors(tensor):
    """Return the exact CP of the largest rank: each fibre along the longest mode times unit vectors of the others."""
    longest = int(np.argmax(tensor.shape))
    others = [size for mode, size in enumerate(tensor.shape) if mode != longest]
    index = np.indices(others).reshape(len(others), -1)  # (number of other modes, R)
    factors = [np.eye(size)[:, where] for size, where in zip(others, index, strict=True)]
    factors.insert(longest, np.moveaxis(tensor, longest, 0).reshape(tensor.shape[longest], -1))
    return factors


def column_norms(factor):
    """Return the (R,) norms of the columns, 1 for a column of zeros."""
    norms = np.linalg.norm(factor, axis=0)
    return np.where(norms > 0, norms, 1.0)


def _squared_error(ridge, total, d, squares):
    return total - np.sum(squares * (d + 2 * ridge) / (d + ridge) ** 2)


def _root(rising, d):
    """Return where a function that rises with the ridge crosses zero; 0 if it does not."""
    low, high = d[-1] * 1e-18, d[-1] * 1e18
    if rising(low) >= 0 or rising(high) <= 0:
        return 0.0
    return math.exp(brentq(lambda log: rising(math.exp(log)), math.log(low), math.log(high), xtol=1e-12))
