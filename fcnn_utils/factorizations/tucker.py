"""Tucker-2 decomposition of a kernel: K[i, j, s, t] = Σ_ab  U[s, a] · G[i, j, a, b] · V[t, b]."""

import math

import numpy as np
from tensorly.decomposition import partial_tucker

from fcnn_utils._checks import check_number
from fcnn_utils.factorizations.base import Factorization


class Tucker2(Factorization):
    """Tucker-2: 1×1 S→R1, k×k R1→R2, 1×1 R2→T (Kim et al. 2015, arXiv 1511.06530).

    Factors: U (S, R1), G (*spatial, R1, R2), V (T, R2), with orthonormal columns of U and V. Computed by
    TensorLy: the truncated higher-order SVD, whose error is at most √2 times the best (De Lathauwer, De Moor &
    Vandewalle 2000), refined by higher-order orthogonal iteration.

    Options of `decompose`:

        n_iter: maximum number of sweeps (100).
        tol: stop when a sweep changes the relative error by less than this (1e-6).
    """

    name = "tucker"

    @classmethod
    def structure(cls, spatial):
        return [("in", 0, "sa", "s->a"), ("core", 1, f"{spatial}ab", "a->b"), ("out", 2, "tb", "b->t")]

    @classmethod
    def _max_ranks(cls, kernel_shape):
        *spatial, channels, filters = kernel_shape
        area = math.prod(spatial)
        return min(channels, area * filters), min(filters, area * channels)

    @classmethod
    def _factors(cls, kernel, ranks, *, n_iter=100, tol=1e-6):
        check_number("n_iter", n_iter, int, 1, 1_000_000)
        check_number("tol", tol, float, 0, 1)
        *spatial, channels, filters = kernel.shape
        if not kernel.any():  # TensorLy would divide by the norm
            return [np.zeros((channels, ranks[0])), np.zeros((*spatial, *ranks)), np.zeros((filters, ranks[1]))]
        modes = [kernel.ndim - 2, kernel.ndim - 1]
        (core, (enter, leave)), _ = partial_tucker(kernel, ranks, modes=modes, n_iter_max=n_iter, tol=tol)
        return [enter, core, leave]
