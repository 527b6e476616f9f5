"""Alternating least squares for CP (Carroll & Chang 1970; Harshman 1970; Kolda & Bader 2009), with a ridge.

One sweep updates every mode in turn. The update of mode n of a tensor X solves  min ‖X₍ₙ₎ − A Zᵀ‖² + λ ‖A‖²,
where Z is the Khatri-Rao product of the other factors, with columns of unit norm. In the eigenbasis of
ZᵀZ = V diag(d) Vᵀ the solution is  A V = X₍ₙ₎ Z V / (d + λ).  Given d and the squared norms of the columns of
X₍ₙ₎ Z V (`squares`), its error and its norm are functions of λ alone. Therefore λ can be chosen for a given error or a
given norm without another solve. For a given norm, Cholesky factorizations are faster, unless they fail (`_solve`).

It is implemented here because libraries have a fixed ridge at most: TensorLy's `parafac` has `l2_reg`.
"""

import math

import numpy as np
from scipy.linalg import get_lapack_funcs
from scipy.optimize import brentq

from fcnn_utils.factorizations.gram import left_vectors

_TOLERANCE = 1e-3  # of a bounded norm. A tenth of it takes longer, and changes relative errors by less than 0.0003.


def sweeps(tensor, factors, n_iter, tol, *, momentum=0.0, squared_norm=math.inf):
    """Sweep until ten sweeps lower the relative error by no more than `tol`.

    With a momentum, a sweep does not start at the last result, but further along the last step. If
    the error rises, the result is dropped, the next sweep starts from the best factors, and the momentum falls by 30%.
    Otherwise it grows by 5% (Ang, Cohen, Gillis & Hien 2021, arXiv 2001.04321; other rules: Mitchell, Ye & De Sterck
    2020, arXiv 1810.05846).

    Args:
        tensor: array with two or more modes, in float32 or float64.
        factors: list of (I_n, R), one for each mode, in the same precision.
        n_iter: maximum number of sweeps.
        tol: it stops when ten sweeps lower the relative error by no more than this.
        momentum: initial size of the extrapolation, as a multiple of the step of the last sweep.
        squared_norm: largest sum of the components' squared norms; see `sweep`.

    Returns:
        (factors, relative error).
    """
    norm, errors, ridges = np.linalg.norm(tensor), [], [0.0] * tensor.ndim
    start, best = factors, None
    while len(errors) < n_iter and not (len(errors) > 10 and errors[-11] - errors[-1] <= tol):
        found, squared_error = sweep(tensor, start, squared_norm, ridges=ridges)
        error = math.sqrt(max(squared_error, 0)) / norm if norm else 0.0
        if best is None:
            start = best = found
        elif error <= errors[-1]:
            start = [new + momentum * (new - old) for new, old in zip(found, best, strict=True)]
            best, momentum = found, 1.05 * momentum
        else:
            error, start, momentum = errors[-1], best, 0.7 * momentum
        errors.append(error)
    return best, errors[-1]


def sweeps_in_float32(tensor, starts, n_iter, tol, momentum, squared_norm):
    """Run `sweeps` in float32 from each start; return the factors of the smallest error, in float64, and that error."""
    tensor_norm = np.linalg.norm(tensor) or 1.0  # squares could underflow or overflow in float32
    single, limit = (tensor / tensor_norm).astype(np.float32), squared_norm / tensor_norm**2
    starts = [[factor.astype(np.float32) for factor in factors] for factors in starts]
    fits = [sweeps(single, factors, n_iter, tol, momentum=momentum, squared_norm=limit) for factors in starts]
    factors, error = min(fits, key=lambda fit: fit[1])
    *others, last = (factor.astype(np.float64) for factor in factors)
    squared = np.sum(math.prod(np.sum(np.square(factor), axis=0) for factor in (*others, last)))
    return [*others, last * tensor_norm * math.sqrt(min(1.0, limit / max(squared, 1e-300)))], error  # within the bound


def sweep(tensor, factors, squared_norm=math.inf, squared_error=None, ridges=None):
    """Update every mode once; afterwards all modes but the last have columns of unit norm (or zero).

    The ridge λ is 0, unless one of `squared_norm` and `squared_error` is given.

    Args:
        tensor: array with two or more modes.
        factors: list of (I_n, R), one for each mode.
        squared_norm: λ is as small as ‖A‖² ≤ squared_norm allows; ‖A‖ may stay 0.1% below its bound.
        squared_error: λ is as large as ‖X₍ₙ₎ − A Zᵀ‖² ≤ squared_error allows; 0 if the error is larger even then.
        ridges: list with the λ of each mode in the last sweep, where the search for a bounded norm starts (0: from
            nothing). It is updated.

    Returns:
        (factors, squared error).
    """
    factors, total = [factor / column_norms(factor) for factor in factors], np.sum(np.square(tensor), dtype=np.float64)
    grams = [factor.T @ factor for factor in factors]
    before = np.ones(
        (1, len(grams[0])), tensor.dtype
    )  # (I_0 ⋯ I_{n-1}, R), the Khatri-Rao product of the modes updated already
    ridges = [0.0] * tensor.ndim if ridges is None else ridges
    for mode, after in enumerate(partial_products(tensor, factors)):
        if mode:
            last = factors[mode - 1] = factors[mode - 1] / column_norms(factors[mode - 1])
            grams[mode - 1] = last.T @ last
            before = (before[:, None] * last).reshape(-1, len(last.T))
        gram = math.prod(grams[:mode] + grams[mode + 1 :])
        if mode < tensor.ndim - 1:
            product = np.einsum("lir,lr->ir", after.reshape(len(before), -1, len(gram)), before)
        else:
            product = after.reshape(len(before), -1).T @ before
        solution = None if squared_error is not None else _solve(gram, product, total, squared_norm, ridges[mode])
        solution = solution or _solve_by_eigenvectors(gram, product, total, squared_norm, squared_error)
        factors[mode], found, ridges[mode] = solution
    return factors, found


def partial_products(tensor, factors):
    """Return, for each mode n, the tensor times the factors of all later modes, (I_0 ⋯ I_n, R).

    For the last mode this is the tensor itself.

    A sweep updates the modes in order, so these products hold throughout it. The matricized tensor times Khatri-Rao
    product of mode n is this product summed with the factors before n. Thus a sweep multiplies the tensor twice, not
    once for each mode (Phan, Tichavský & Cichocki 2013, IEEE Trans. Signal Process. 61(19); a dimension tree).
    """
    products = [tensor, tensor.reshape(-1, tensor.shape[-1]) @ factors[-1]]
    for factor in factors[-2:0:-1]:
        products.append(np.einsum("lir,ir->lr", products[-1].reshape(-1, *factor.shape), factor))
    return products[::-1]


def _solve(gram, product, total, squared_norm, ridge):
    """Return the factor (I_n, R) for a bound on the norm, from ZᵀZ and X₍ₙ₎ Z; its squared error; the next ridge.

    `ridge` is the first λ. The third result is where the next sweep may start. λ is 0 or at least 100 times the machine
    epsilon, which helps where ZᵀZ is nearly singular and changes little elsewhere. Each step of Newton's iteration for
    1 / ‖A‖ (Moré & Sorensen 1983, SIAM J. Sci. Stat. Comput. 4(3)) needs a Cholesky factorization, not eigenvectors.
    The iteration stops near the bound; A is scaled down if it exceeds the bound. The result is None if that fails, or
    if ZᵀZ is nearly singular and there is no bound.
    """
    limit, diagonal, eps = math.sqrt(squared_norm), np.diag_indices_from(gram), np.finfo(gram.dtype).eps
    potrf, potrs, pocon, trtrs = get_lapack_funcs(("potrf", "potrs", "pocon", "trtrs"), (gram,))
    least = 100 * eps  # small beside the diagonal of ZᵀZ, which is 1
    for _ in range(12):
        shifted = gram.copy()
        shifted[diagonal] += ridge
        cholesky, failed = potrf(shifted.T, overwrite_a=True)
        if not ridge and (failed or pocon(cholesky, np.linalg.norm(gram, 1))[0] < 5e5 * eps):
            if limit == math.inf:
                return None
            ridge = least
            continue
        if failed:
            return None
        factor = potrs(cholesky, product.T)[0].T
        size, overlap = np.linalg.norm(factor), np.vdot(product, factor)
        if not size or (ridge <= least and size <= limit):
            return factor, total - overlap - ridge * size**2, ridge
        half = np.linalg.norm(trtrs(cholesky, factor.T, trans=1)[0])  # its square is −½ d‖A‖²/dλ
        next_ridge = max(ridge + (size / half) ** 2 * (size / limit - 1), least)
        if abs(size / limit - 1) < _TOLERANCE:
            scale = min(1.0, limit / size)
            return scale * factor, total - 2 * scale * overlap + scale**2 * (overlap - ridge * size**2), next_ridge
        ridge = next_ridge
    return None


def _solve_by_eigenvectors(gram, product, total, squared_norm, squared_error):
    """Return what `_solve` returns, for a bound on the norm or on the error; ZᵀZ may be singular."""
    d, basis = np.linalg.eigh(gram)  # (R,), (R, R)
    product = product @ basis
    keep = d > d[-1] * len(d) * np.finfo(d.dtype).eps  # pseudo-inverse if columns are collinear
    d, product, basis = d[keep], product[:, keep], basis[:, keep]
    squares = np.sum(product**2, axis=0)
    if squared_error is not None:
        ridge = _root(lambda ridge: _squared_error(ridge, total, d, squares) - squared_error, d)
    else:
        ridge = _root(lambda ridge: squared_norm - np.sum(squares / (d + ridge) ** 2), d)
    return product / (d + ridge) @ basis.T, _squared_error(ridge, total, d, squares), ridge


def initial_factors(tensor, rank, seed, number):
    """Return initial factors: leading singular vectors of the unfoldings for start number 0, else random ones.

    If an unfolding has too few singular vectors, random columns are added.
    """
    rng = np.random.default_rng([seed, number])
    factors = [rng.standard_normal((size, rank)) for size in tensor.shape]
    if number == 0:
        for mode, factor in enumerate(factors):
            unfolding = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
            count = min(rank, *unfolding.shape)
            factor[:, :count] = left_vectors(unfolding, count)
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
    """Return where a function that rises with the ridge crosses zero; 0 if it does not, or if ZᵀZ is zero."""
    if not len(d):
        return 0.0
    low, high = d[-1] * 1e-18, d[-1] * 1e18
    if rising(low) >= 0 or rising(high) <= 0:
        return 0.0
    return math.exp(brentq(lambda log: rising(math.exp(log)), math.log(low), math.log(high), xtol=1e-12))
