"""Kernel array -> factors: CP, Tucker-2, tensor train, spatial SVD, depthwise separable. NumPy in float64, no Keras.

Kernels are (kh, kw, S, T), as Keras has them: S channels in, T out. Each function returns a `Decomposition`, whose
factors are what the layers of a chain carry (see `blocks`). Ranks and what they cost are in `ranks`.

CP is computed by alternating least squares (Carroll & Chang 1970; Harshman 1970; Kolda & Bader 2009, section 3.4).
Its iterates may be degenerate: components that grow without bound and cancel (de Silva & Lim 2008). The cure is the
error-preserving correction of Phan, Tichavský & Cichocki 2019 (arXiv 1709.08349), brought to kernels by Phan et al.
2020 (arXiv 2008.05441): the same sweeps, each with the ridge that keeps the error where it is and takes the norms down.
Tucker and tensor train come from TensorLy (Kossaifi et al. 2019).
"""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from tensorly.decomposition import partial_tucker
from tensorly.decomposition import tensor_train as tensorly_tensor_train

from fcnn_utils import ranks as ranks_of
from fcnn_utils._checks import check_choice, check_number


@dataclasses.dataclass(frozen=True, eq=False)
class Decomposition:
    """A kernel in factors.

    The shapes of the factors, by method:

        "cp"         (kh kw, R), (S, R), (T, R)
        "cp4"        (kh, R), (kw, R), (S, R), (T, R)
        "tucker"     (S, R1), (kh, kw, R1, R2), (T, R2)
        "tt"         (S, R1), (R1, kh, R2), (R2, kw, R3), (R3, T)
        "spatial"    (kh, S, R), (R, kw, T)
        "separable"  (kh, kw, S, R), (S, R, T)

    Attributes:
        method: one of the six above.
        shape: (kh, kw, S, T) of the kernel.
        factors: tuple of arrays, of the shapes above.
        relative_error: ‖K − K̂‖ / ‖K‖ in the Frobenius norm; 0 for an all-zero kernel.
        kernel_norm: ‖K‖.
    """

    method: str
    shape: tuple
    factors: tuple
    relative_error: float
    kernel_norm: float

    @property
    def ranks(self):
        """Ranks, as `ranks.check` takes them."""
        first, *middle, last = (factor.shape for factor in self.factors)
        return {
            "cp": (last[-1],),
            "cp4": (last[-1],),
            "tucker": (first[-1], last[-1]),
            "tt": (first[-1], *(shape[-1] for shape in middle)),
            "spatial": (first[-1],),
            "separable": (first[-1],),
        }[self.method]

    @property
    def parameters(self):
        """Number of values in the factors."""
        return sum(factor.size for factor in self.factors)

    @property
    def component_norms(self):
        """(R,) Frobenius norms of the rank-one terms, in falling order; of a CP, ValueError for another method."""
        return math.prod(np.linalg.norm(factor, axis=0) for factor in self._vectors())

    @property
    def degeneracy(self):
        """Largest component norm over ‖K‖; of a CP, ValueError for another method.

        At most 1 where nothing cancels, tens and more when degenerate.
        """
        largest = float(self.component_norms.max())
        return largest / self.kernel_norm if self.kernel_norm else 0.0

    @property
    def sensitivity(self):
        """Expected ‖ΔK‖² under independent noise of unit variance on every value of the factors, over ‖K‖².

        Of a CP, ValueError for another method. Mode n has the size I_n (Phan et al. 2020, arXiv 2008.05441):

            Σ_r Σ_n  I_n Π_{m≠n} ‖a_r^(m)‖² / ‖K‖²
        """
        squares = [np.sum(factor**2, axis=0) for factor in self._vectors()]
        if not self.kernel_norm:
            return 0.0
        terms = [
            len(factor) * math.prod(squares[:n] + squares[n + 1 :]) for n, factor in enumerate(self.factors)
        ]  # N × (R,)
        return float(np.sum(terms) / self.kernel_norm**2)

    def to_kernel(self):
        """The dense kernel (kh, kw, S, T) of the factors."""
        equation = {
            "cp": "pr,sr,tr->pst",
            "cp4": "ir,jr,sr,tr->ijst",
            "tucker": "sa,ijab,tb->ijst",
            "tt": "sa,aib,bjc,ct->ijst",
            "spatial": "isr,rjt->ijst",
            "separable": "ijsr,srt->ijst",
        }[self.method]
        return np.einsum(equation, *self.factors, optimize=True).reshape(self.shape)

    def basis(self):
        """(kh kw S, F): what all layers but the last make of the pixels of a patch.

        The last layer combines them: K as a (kh kw S, T) matrix is `basis() @ last_factor()`.
        """
        *factors, last = self.factors
        eye = np.eye(last.shape[1] if self.method == "spatial" else len(last))
        equation, factors = {
            "cp": ("pr,sr->psr", factors),
            "cp4": ("ir,jr,sr->ijsr", factors),
            "tucker": ("sa,ijab->ijsb", factors),
            "tt": ("sa,aib,bjc->ijsc", factors),
            "spatial": ("isr,jk->ijsrk", [*factors, eye]),  # the row sees every r at every column
            "separable": ("ijsr,sz->ijszr", [*factors, eye]),
        }[self.method]
        return np.einsum(equation, *factors, optimize=True).reshape(math.prod(self.shape[:3]), -1)

    def last_factor(self):
        """(F, T) matrix of the last layer, whose rows are the columns of `basis`."""
        last = self.factors[-1]
        return last.T if self.method in ("cp", "cp4", "tucker") else last.reshape(-1, self.shape[3])

    def _vectors(self):
        if self.method not in ("cp", "cp4"):
            raise ValueError(f"component norms are those of a CP; this is a {self.method} decomposition")
        return self.factors


def decompose(kernel, method, ranks, **options):
    """A kernel's factors by the name of the method.

    Args:
        kernel: (kh, kw, S, T).
        method: "cp" or "cp4" (both by `cp`), "tucker" (`tucker2`), "tt" (`tensor_train`), "spatial" (`spatial_svd`) or
            "separable" (`depthwise_separable`).
        ranks: a whole number for one rank, a sequence for several.
        options: of that function.

    Returns:
        Decomposition.

    Raises:
        ValueError: another method, or as its function.
    """
    check_choice("method", method, ranks_of.METHODS)
    functions = {
        "cp": cp,
        "cp4": functools.partial(cp, merge_spatial=False),
        "tucker": tucker2,
        "tt": tensor_train,
        "spatial": spatial_svd,
        "separable": depthwise_separable,
    }
    return functions[method](kernel, ranks, **options)


def cp(kernel, rank, *, merge_spatial=True, n_starts=1, seed=0, n_iter=100, tol=1e-5, max_norm=None):
    """CP decomposition by alternating least squares, the best of several starts, its components balanced.

        K[i, j, s, t] = Σ_r  A[(i, j), r] · C[s, r] · D[t, r]                 merged: 3 modes
        K[i, j, s, t] = Σ_r  A[i, r] · B[j, r] · C[s, r] · D[t, r]            4 modes (Lebedev et al. 2014)

    At the largest rank the exact decomposition is written down instead, without iteration.

    Args:
        kernel: (kh, kw, S, T).
        rank: R, from 1 to `ranks.maximum`.
        merge_spatial: whether the two spatial modes are one.
        n_starts: how many starts; the first from the singular vectors of the unfoldings, the others random.
        seed: of the random numbers in the starts.
        n_iter: most sweeps over the modes for a start.
        tol: a start ends when a sweep lowers the relative error by less.
        max_norm: largest allowed root of the sum of squared component norms over ‖K‖, at least 1, or None. Where the
            best start exceeds it, `correct` takes the norms down at 1% more error; if that is not enough the bound
            is enforced, and the error is what it then is.

    Returns:
        Decomposition "cp" or "cp4", components in falling order of norm, a component's norm spread evenly over its
        vectors.

    Raises:
        ValueError: the kernel is not 4-way and finite, or a number is out of its range.
    """
    kernel, method = ranks_of.check_kernel(kernel), "cp" if merge_spatial else "cp4"
    (rank,) = ranks_of.check(method, kernel.shape, rank)
    check_number("n_starts", n_starts, int, 1, 1000)
    check_number("seed", seed, int, 0, 2**31 - 1)
    check_number("n_iter", n_iter, int, 1, 1_000_000)
    check_number("tol", tol, float, 0, 1)
    tensor = _modes(kernel, merge_spatial)
    if max_norm is not None:
        check_number("max_norm", max_norm, float, 1, math.inf)
    if rank == ranks_of.maximum(method, kernel.shape)[0]:
        return _cp_of(kernel, method, _exact(tensor))
    starts = [_start(tensor, rank, seed, number) for number in range(n_starts)]
    fits = [_sweeps(tensor, factors, _least_squares, n_iter, tol) for factors in starts]
    best = _cp_of(kernel, method, min(fits, key=lambda fit: fit[1])[0])
    if max_norm is not None and best.kernel_norm and _root_sum_square(best) > max_norm * best.kernel_norm:
        best = correct(kernel, best, n_iter=n_iter, until=max_norm)
        if _root_sum_square(best) > max_norm * best.kernel_norm:
            bound = functools.partial(_bounded, squared_norm=(max_norm * best.kernel_norm) ** 2)
            best = _cp_of(kernel, method, _sweeps(tensor, best.factors, bound, n_iter, tol)[0])
    return best


def correct(kernel, decomposition, *, error=None, n_iter=1000, tol=1e-4, until=0.0):
    """Error-preserving correction of a CP: components that are smaller and cancel less, at (nearly) the same error.

    Every step solves, for one mode,

        min ‖A‖²  subject to  ‖X₍ₙ₎ − A Zᵀ‖ ≤ error ‖K‖

    where Z is the Khatri-Rao product of the other modes with columns of unit norm, so that ‖A‖² is the sum of squared
    component norms: a ridge regression whose ridge makes the error just that large (Phan, Tichavský & Cichocki 2019,
    arXiv 1709.08349). The sum never rises.

    Args:
        kernel: (kh, kw, S, T), what was decomposed.
        decomposition: a CP of it.
        error: relative error allowed, at least that of the decomposition; by default 1% more of it, 1.01 times.
        n_iter: most sweeps.
        tol: the sweeps end when one lowers the norms by a smaller share. They crawl where the error allowed is tiny:
            lower `tol` and raise `n_iter` there.
        until: they also end when the root of the sum of squared component norms over ‖K‖ is that low.

    Returns:
        Decomposition of the same method and rank.

    Raises:
        ValueError: the decomposition is no CP, or not of this kernel's shape, or its error is larger than allowed; or
            a number is out of its range.
    """
    kernel = ranks_of.check_kernel(kernel)
    check_number("n_iter", n_iter, int, 1, 1_000_000)
    check_number("tol", tol, float, 0, 1)
    check_number("until", until, float, 0, math.inf)
    before = _root_sum_square(decomposition)
    if decomposition.shape != kernel.shape:
        raise ValueError(f"the decomposition is of a {decomposition.shape} kernel; this one is {kernel.shape}")
    error = 1.01 * decomposition.relative_error if error is None else error
    check_number("error", error, float, decomposition.relative_error * (1 - 1e-9), math.inf)
    norm = decomposition.kernel_norm
    if error < 1e-12:  # exact but for rounding, and rounding is all that is left to choose
        return decomposition
    ridge = functools.partial(_preserving, squared_error=(error * norm) ** 2)
    tensor, factors = _modes(kernel, decomposition.method == "cp"), decomposition.factors
    for _ in range(n_iter):
        if before <= until * norm:
            break
        factors, _ = _sweep(tensor, factors, ridge)
        after = float(np.linalg.norm(factors[-1]))  # the other modes have columns of unit norm
        if before - after < tol * before:
            break
        before = after
    return _cp_of(kernel, decomposition.method, factors)


def tucker2(kernel, ranks, *, n_iter=100, tol=1e-6):
    """Tucker-2, with the factors U, G, V, of which U and V have orthonormal columns.

        K[i, j, s, t] = Σ_ab  U[s, a] · G[i, j, a, b] · V[t, b]

    The truncated higher-order SVD, at most √2 times the best error (De Lathauwer, De Moor & Vandewalle 2000), refined
    by alternating least squares. Raises ValueError as `cp`.

    Args:
        kernel: (kh, kw, S, T).
        ranks: (R1, R2).
        n_iter: most sweeps.
        tol: the sweeps end when one changes the relative error by less.
    """
    kernel = ranks_of.check_kernel(kernel)
    ranks = ranks_of.check("tucker", kernel.shape, ranks)
    check_number("n_iter", n_iter, int, 1, 1_000_000)
    check_number("tol", tol, float, 0, 1)
    if not kernel.any():  # TensorLy would divide by the norm
        shapes = (kernel.shape[2], ranks[0]), (*kernel.shape[:2], *ranks), (kernel.shape[3], ranks[1])
        return _decomposition(kernel, "tucker", [np.zeros(shape) for shape in shapes])
    (core, (enter, leave)), _ = partial_tucker(kernel, ranks, modes=[2, 3], n_iter_max=n_iter, tol=tol)
    return _decomposition(kernel, "tucker", (enter, core, leave))


def tensor_train(kernel, ranks):
    """Tensor train over the modes in the order S, kh, kw, T (Oseledets 2011; Novikov et al. 2015, arXiv 1509.06569).

        K[i, j, s, t] = Σ_abc  G1[s, a] · G2[a, i, b] · G3[b, j, c] · G4[c, t]

    By successive truncated SVDs, at most √3 times the best error. `ranks`: (R1, R2, R3). Raises ValueError as `cp`.
    """
    kernel = ranks_of.check_kernel(kernel)
    ranks = ranks_of.check("tt", kernel.shape, ranks)
    first, *middle, last = tensorly_tensor_train(kernel.transpose(2, 0, 1, 3), [1, *ranks, 1]).factors
    return _decomposition(kernel, "tt", (first[0], *middle, last[..., 0]))


def spatial_svd(kernel, rank):
    """Column and row, with the factors V, H (Jaderberg, Vedaldi & Zisserman 2014, arXiv 1405.3866, scheme 2).

        K[i, j, s, t] = Σ_r  V[i, s, r] · H[r, j, t]

    The truncated SVD of the kernel as a (kh S, kw T) matrix, hence the best for its rank (Eckart & Young 1936); each
    singular value is spread evenly over both. Raises ValueError as `cp`.
    """
    kernel = ranks_of.check_kernel(kernel)
    (rank,) = ranks_of.check("spatial", kernel.shape, rank)
    kh, kw, channels, filters = kernel.shape
    matrix = kernel.transpose(0, 2, 1, 3).reshape(kh * channels, kw * filters)  # (i s, j t)
    left, right = _truncated(matrix, rank)
    return _decomposition(kernel, "spatial", (left.reshape(kh, channels, rank), right.reshape(rank, kw, filters)))


def depthwise_separable(kernel, multiplier):
    """Depthwise, then pointwise, with the factors D, P (Guo et al. 2018, arXiv 1808.05517).

        K[i, j, s, t] = Σ_m  D[i, j, s, m] · P[s, m, t]

    A truncated SVD of each input channel's (kh kw, T) matrix, hence the best. Raises ValueError as `cp`.
    """
    kernel = ranks_of.check_kernel(kernel)
    (multiplier,) = ranks_of.check("separable", kernel.shape, multiplier)
    kh, kw, channels, filters = kernel.shape
    matrices = kernel.reshape(kh * kw, channels, filters).transpose(1, 0, 2)  # (s, i j, t)
    left, right = _truncated(matrices, multiplier)  # (s, i j, m), (s, m, t)
    depthwise = left.transpose(1, 0, 2).reshape(kh, kw, channels, multiplier)
    return _decomposition(kernel, "separable", (depthwise, right))


def error_curve(kernel, method, fractions, **options):
    """Relative error against size: DataFrame (ranks, parameters, share, relative_error), a row a fraction kept.

    Raises:
        ValueError: as `ranks.for_fraction` and `decompose`.
    """
    rows = []
    for fraction in fractions:
        result = decompose(kernel, method, ranks_of.for_fraction(method, np.shape(kernel), fraction), **options)
        rows.append((result.ranks, result.parameters, result.parameters / np.size(kernel), result.relative_error))
    return pd.DataFrame(rows, columns=["ranks", "parameters", "share", "relative_error"])


# --- alternating least squares -----------------------------------------------------------------------------------


def _sweeps(tensor, factors, ridge, n_iter, tol):
    """Sweeps until one lowers the relative error by less than `tol`: (factors, relative error)."""
    norm, before = np.linalg.norm(tensor), math.inf
    for _ in range(n_iter):
        factors, squared_error = _sweep(tensor, factors, ridge)
        error = math.sqrt(max(squared_error, 0)) / norm if norm else 0.0
        if before - error < tol:
            break
        before = error
    return factors, error


def _sweep(tensor, factors, ridge):
    """One update of every mode; afterwards all modes but the last have columns of unit norm (or zero).

    Mode n solves  min ‖X₍ₙ₎ − A Zᵀ‖² + λ ‖A‖²,  Z the Khatri-Rao product of the other modes. In the eigenbasis of
    ZᵀZ = V diag(d) Vᵀ the solution is  A V = X₍ₙ₎ Z V / (d + λ), and its error and its norm are sums over j of the
    squared norms m_j of the columns of X₍ₙ₎ Z V. `ridge(total, d, m)` chooses λ from these, ‖X‖² being `total`.
    """
    factors, total = list(factors), np.sum(tensor**2)
    for mode in range(tensor.ndim):
        for other in range(tensor.ndim):
            if other != mode:
                factors[other] = factors[other] / _norms(factors[other])
        gram = math.prod(factor.T @ factor for other, factor in enumerate(factors) if other != mode)
        d, basis = np.linalg.eigh(gram)  # (R,), (R, R)
        product = _mttkrp(tensor, factors, mode) @ basis  # (I_n, R)
        keep = d > d[-1] * len(d) * np.finfo(float).eps  # the pseudo-inverse where the others are collinear
        d, product, basis = d[keep], product[:, keep], basis[:, keep]
        squares = np.sum(product**2, axis=0)
        penalty = ridge(total, d, squares)
        factors[mode] = product / (d + penalty) @ basis.T
    return factors, _squared_error(penalty, total, d, squares)


def _mttkrp(tensor, factors, mode):
    """X₍ₙ₎ (⊙_{m≠n} A_m): the largest of the other modes by a matrix product, the rest by sums. (I_n, R)"""
    others = sorted((m for m in range(tensor.ndim) if m != mode), key=lambda m: -tensor.shape[m])
    letters = "ijkl"[: tensor.ndim]
    axes = letters.replace(letters[others[0]], "") + "r"
    product = np.moveaxis(tensor, others[0], -1) @ factors[others[0]]
    rest = [(letters[m] + "r", factors[m]) for m in others[1:]]
    equation = ",".join([axes, *(name for name, _ in rest)]) + "->" + letters[mode] + "r"
    return np.einsum(equation, product, *(factor for _, factor in rest))


def _least_squares(total, d, squares):
    return 0.0


def _preserving(total, d, squares, squared_error):
    """Ridge at which the error is as given, 0 where it is larger already."""
    return _root(lambda ridge: _squared_error(ridge, total, d, squares) - squared_error, d)


def _bounded(total, d, squares, squared_norm):
    """Ridge at which the sum of squared component norms is as given, 0 where it is smaller already."""
    return _root(lambda ridge: squared_norm - np.sum(squares / (d + ridge) ** 2), d)


def _squared_error(ridge, total, d, squares):
    return total - np.sum(squares * (d + 2 * ridge) / (d + ridge) ** 2)


def _root(rising, d):
    """Where a function that rises with the ridge crosses zero; 0 where it is above already."""
    low, high = d[-1] * 1e-18, d[-1] * 1e18
    if rising(low) >= 0 or rising(high) <= 0:
        return 0.0
    return math.exp(brentq(lambda log: rising(math.exp(log)), math.log(low), math.log(high), xtol=1e-12))


def _start(tensor, rank, seed, number):
    """Start 0: leading singular vectors of the unfoldings, and random columns where these are too few; else random."""
    rng = np.random.default_rng([seed, number])
    factors = [rng.standard_normal((size, rank)) for size in tensor.shape]
    if number == 0:
        for mode, factor in enumerate(factors):
            vectors = np.linalg.svd(_unfold(tensor, mode), full_matrices=False)[0][:, :rank]
            factor[:, : vectors.shape[1]] = vectors
    return factors


def _exact(tensor):
    """A CP of the largest rank, read off: every fibre along the longest mode times unit vectors of the others."""
    longest = int(np.argmax(tensor.shape))
    others = [size for mode, size in enumerate(tensor.shape) if mode != longest]
    index = np.indices(others).reshape(len(others), -1)  # (N - 1, R)
    factors = [np.eye(size)[:, where] for size, where in zip(others, index, strict=True)]
    factors.insert(longest, np.moveaxis(tensor, longest, 0).reshape(tensor.shape[longest], -1))
    return factors


# --- small helpers -----------------------------------------------------------------------------------------------


def _decomposition(kernel, method, factors):
    result = Decomposition(method, kernel.shape, tuple(factors), 0.0, float(np.linalg.norm(kernel)))
    error = float(np.linalg.norm(kernel - result.to_kernel()))
    return dataclasses.replace(result, relative_error=error / result.kernel_norm if error else 0.0)


def _cp_of(kernel, method, factors):
    """Decomposition of CP factors, sorted and balanced."""
    norms = [_norms(factor) for factor in factors]
    size = math.prod(np.linalg.norm(factor, axis=0) for factor in factors)
    order = np.argsort(-size, kind="stable")
    even = size ** (1 / len(factors))
    balanced = [(factor / norm * even)[:, order] for factor, norm in zip(factors, norms, strict=True)]
    return _decomposition(kernel, method, balanced)


def _modes(kernel, merge_spatial):
    kh, kw, channels, filters = kernel.shape
    return kernel.reshape(kh * kw, channels, filters) if merge_spatial else kernel


def _root_sum_square(decomposition):
    return math.sqrt(np.sum(decomposition.component_norms**2))


def _norms(factor):
    """(R,) norms of the columns, 1 for a column of zeros."""
    norms = np.linalg.norm(factor, axis=0)
    return np.where(norms > 0, norms, 1.0)


def _unfold(tensor, mode):
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def _truncated(matrix, rank):
    """Best rank-`rank` factors (…, n, rank), (…, rank, m) of a matrix (…, n, m), singular values spread evenly."""
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(sigma[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]
