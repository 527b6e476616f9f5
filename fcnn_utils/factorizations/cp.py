"""CP decomposition of a kernel: a sum of R rank-one tensors.

    CP    K[i, j, s, t] = Σ_r  A[(i, j), r] · C[s, r] · D[t, r]               the spatial axes are one mode
    CP4   K[i, j, s, t] = Σ_r  A[i, r] · B[j, r] · C[s, r] · D[t, r]          each axis is a mode

It is computed by alternating least squares (`als`), from one or several starts. The components
of a plain result may grow without bound and cancel (degeneracy: de Silva & Lim 2008). Fine-tuning may then diverge
(Phan et al. 2020, arXiv 2008.05441). `max_norm` bounds them.
"""

import math

import numpy as np

from fcnn_utils._checks import check_number
from fcnn_utils._processors import one_blas_thread
from fcnn_utils.factorizations import als
from fcnn_utils.factorizations.base import Factorization, check_kernel
from fcnn_utils.factorizations.chain import AXIS_NAMES

_FLOAT32 = 3e7  # use float32 for a bounded CP if kernel size × rank exceeds this; it takes half the time
_SMALL_ERROR = 0.03  # a relative error that float32 may not resolve well enough


class CP(Factorization):
    """CP with merged spatial axes: 1×1 S→R, k×k depthwise, 1×1 R→T.

    Factors: A (prod(spatial), R), C (S, R), D (T, R); without spatial axes C and D only. Components are
    sorted by descending norm, and a component's norm is spread evenly over its vectors.

    Options of `decompose`:

        n_starts: number of starts (1). The first uses singular vectors of the unfoldings, the others are random.
        seed: seed of the random numbers (0).
        n_iter: maximum number of sweeps for a start (100).
        tol: a start ends when ten sweeps lower the relative error by no more than this (1e-5).
        max_norm: largest allowed `total_norm`, at least 1; None for no bound (None).
        momentum: 0 for plain ALS, below 1 for extrapolation (0.5 with `max_norm`, else 0). With 0.5, 100 sweeps fit
            trained kernels as well as 300 to 700 without. But components without a bound also grow faster.

    Large bounded decompositions are computed in float32. If the relative error is then below 0.03, up to `n_iter`
    sweeps in float64 follow. At the largest rank the exact decomposition is written down without iteration.
    """

    name = "cp"

    @classmethod
    def structure(cls, spatial):
        if not spatial:
            return [("in", 0, "sr", "s->r"), ("out", 1, "tr", "r->t")]
        return [
            ("in", 1, "sr", "s->r"),
            ("depthwise", 0, f"{spatial}r", "r->r"),
            ("out", 2, "tr", "r->t"),
        ]

    @classmethod
    def _max_ranks(cls, kernel_shape):
        modes = cls._mode_sizes(kernel_shape)
        return (math.prod(modes) // max(modes),)

    # parameters: the options of ALS, each with a default
    @classmethod
    @one_blas_thread()
    def decompose(cls, kernel, ranks, *, n_starts=1, seed=0, n_iter=100, tol=1e-5, max_norm=None, momentum=None):
        check_number("n_starts", n_starts, int, 1, 1000)
        check_number("seed", seed, int, 0, 2**31 - 1)
        check_number("n_iter", n_iter, int, 1, 1_000_000)
        check_number("tol", tol, float, 0, 1)
        momentum = (0.0 if max_norm is None else 0.5) if momentum is None else momentum
        check_number("momentum", momentum, float, 0, 0.99)
        if max_norm is not None:
            check_number("max_norm", max_norm, float, 1, math.inf)
        kernel = check_kernel(kernel)
        (rank,) = cls.check_ranks(kernel.shape, ranks)
        tensor = cls._modes(kernel)
        if rank == cls.max_ranks(kernel.shape)[0]:
            return cls.from_factors(kernel, als.exact_factors(tensor))
        limits = {"squared_norm": math.inf if max_norm is None else (max_norm * np.linalg.norm(kernel)) ** 2}
        starts = [als.initial_factors(tensor, rank, seed, number) for number in range(n_starts)]
        if max_norm is not None and tensor.size * rank > _FLOAT32:
            found, error = als.sweeps_in_float32(tensor, starts, n_iter, tol, momentum, **limits)
            if error > _SMALL_ERROR:
                return cls.from_factors(kernel, found)
            starts = [found]
        fits = [als.sweeps(tensor, factors, n_iter, tol, momentum=momentum, **limits) for factors in starts]
        return cls.from_factors(kernel, min(fits, key=lambda fit: fit[1])[0])

    @classmethod
    def from_factors(cls, kernel, factors):
        """Sort and balance given factors, and measure their error."""
        norms = [als.column_norms(factor) for factor in factors]
        size = math.prod(np.linalg.norm(factor, axis=0) for factor in factors)
        order = np.argsort(-size, kind="stable")
        even = size ** (1 / len(factors))
        factors = [(factor / norm * even)[:, order] for factor, norm in zip(factors, norms, strict=True)]
        return super().from_factors(kernel, factors)

    @property
    def component_norms(self):
        """(R,) Frobenius norms of the rank-one components, in descending order."""
        return math.prod(np.linalg.norm(factor, axis=0) for factor in self.factors)

    @property
    def total_norm(self):
        """Root of the sum of squared component norms, over ‖K‖: what `max_norm` bounds."""
        return math.sqrt(np.sum(self.component_norms**2)) / self.kernel_norm if self.kernel_norm else 0.0

    @property
    def degeneracy(self):
        """Largest component norm over ‖K‖: at most 1 for orthogonal components, tens and more if they cancel."""
        return float(self.component_norms.max()) / self.kernel_norm if self.kernel_norm else 0.0

    @property
    def noise_sensitivity(self):
        """Expected ‖ΔK‖² / ‖K‖² per unit of noise variance on every value of the factors, to first order.

            Σ_r Σ_n  I_n Π_{m≠n} ‖a_r^(m)‖² / ‖K‖²    for modes n of size I_n

        (Tichavský, Phan & Cichocki 2019, IEEE Signal Process. Lett. 26(11), without ‖K‖²; for kernels Phan et al. 2020,
        arXiv 2008.05441).
        """
        if not self.kernel_norm:
            return 0.0
        squares = [np.sum(factor**2, axis=0) for factor in self.factors]
        terms = [len(factor) * math.prod(squares[:n] + squares[n + 1 :]) for n, factor in enumerate(self.factors)]
        return float(np.sum(terms) / self.kernel_norm**2)

    @classmethod
    def _mode_sizes(cls, kernel_shape):
        *spatial, channels, filters = kernel_shape
        return [math.prod(spatial), channels, filters] if spatial else [channels, filters]

    @classmethod
    def _modes(cls, kernel):
        """Reshape a kernel to the tensor whose modes the factors stand for."""
        return kernel.reshape(cls._mode_sizes(kernel.shape))


class CP4(CP):
    """CP with a mode for each axis: 1×1 S→R, one depthwise layer per spatial axis, 1×1 R→T.

    For images these are four modes (Lebedev et al. 2014, arXiv 1412.6553). Factors: one (size, R) for each
    spatial axis, then C (S, R) and D (T, R). Options as for `CP`.
    """

    name = "cp4"

    @classmethod
    def structure(cls, spatial):
        count = len(spatial)
        along = [(AXIS_NAMES[count][axis], axis, f"{letter}r", "r->r") for axis, letter in enumerate(spatial)]
        return [("in", count, "sr", "s->r"), *along, ("out", count + 1, "tr", "r->t")]

    @classmethod
    def _mode_sizes(cls, kernel_shape):
        return list(kernel_shape)


@one_blas_thread()
def error_preserving_correction(kernel, decomposition, *, error=None, n_iter=1000, tol=1e-4, until=0.0):
    """Make the components of a CP smaller, so that they cancel less, at (nearly) the same error.

    Each step solves, for one mode,  min ‖A‖²  subject to  ‖X₍ₙ₎ − A Zᵀ‖ ≤ error ‖K‖,  where Z is the Khatri-Rao
    product of the other modes with columns of unit norm, so that ‖A‖² is the sum of squared component norms.
    This is a ridge regression whose ridge is chosen by the error (Phan, Tichavský & Cichocki 2019, arXiv
    1709.08349; Phan et al. 2020, arXiv 2008.05441, correct kernels by their sensitivity instead). The sum of
    squared norms never rises.

    Args:
        kernel: (*spatial, S, T), the kernel that was decomposed.
        decomposition: a `CP` or `CP4` of it.
        error: relative error allowed, at least that of the decomposition; default: 1.01 times it.
        n_iter: maximum number of sweeps.
        tol: stop when a sweep lowers `total_norm` by a smaller share than this. If the allowed error is tiny,
            progress is slow: use a smaller `tol` and a larger `n_iter`.
        until: stop when `total_norm` is this low.

    Returns:
        Decomposition of the same class and rank.

    Raises:
        ValueError: the decomposition is not a CP of this kernel, its error is larger than allowed, or a number is
            out of its range.
    """
    if not isinstance(decomposition, CP):
        raise ValueError(f"decomposition must be a CP or a CP4; got a {type(decomposition).__name__}")
    kernel = check_kernel(kernel)
    check_number("n_iter", n_iter, int, 1, 1_000_000)
    check_number("tol", tol, float, 0, 1)
    check_number("until", until, float, 0, math.inf)
    if decomposition.kernel_shape != kernel.shape:
        raise ValueError(f"the decomposition is of a {decomposition.kernel_shape} kernel; this one is {kernel.shape}")
    error = 1.01 * decomposition.relative_error if error is None else error
    check_number("error", error, float, decomposition.relative_error * (1 - 1e-9), math.inf)
    if error < 1e-12:  # exact up to rounding: no error to trade for smaller norms
        return decomposition
    norm, before = decomposition.kernel_norm, decomposition.total_norm
    tensor, factors = decomposition._modes(kernel), decomposition.factors
    for _ in range(n_iter):
        if before <= until:
            break
        factors, _ = als.sweep(tensor, factors, squared_error=(error * norm) ** 2)
        after = float(np.linalg.norm(factors[-1])) / norm  # the other modes have columns of unit norm
        if before - after < tol * before:
            break
        before = after
    return type(decomposition).from_factors(kernel, factors)
