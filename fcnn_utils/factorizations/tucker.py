"""Tucker-2 decomposition of a kernel: K[i, j, s, t] = Σ_ab  U[s, a] · G[i, j, a, b] · V[t, b]."""

import math

import numpy as np

from fcnn_utils._checks import check_number
from fcnn_utils.factorizations.base import Factorization
from fcnn_utils.factorizations.gram import left_vectors


class Tucker2(Factorization):
    """Tucker-2: 1×1 S→R1, k×k R1→R2, 1×1 R2→T (Kim et al. 2015, arXiv 1511.06530).

    Factors: U (S, R1), G (*spatial, R1, R2), V (T, R2), with orthonormal columns of U and V. Computed by
    higher-order orthogonal iteration from leading singular vectors (De Lathauwer, De Moor & Vandewalle 2000, SIAM J.
    Matrix Anal. Appl. 21(4)): V, then U and V in turn, each as the best for the other. The error is at most √2 times
    the best. The singular vectors come from Gram matrices (`gram`).

    Options of `decompose`:

        n_iter: maximum number of sweeps (100).
        tol: stop when a sweep, at least the third, lowers the relative error by less than this (1e-6).
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
        tensor = kernel.reshape(-1, channels, filters)
        norm, before = np.linalg.norm(tensor), math.inf
        leave = left_vectors(tensor.reshape(-1, filters).T, ranks[1])  # (T, R2)
        for sweep in range(n_iter):
            enter = left_vectors(np.hstack(tensor @ leave), ranks[0])  # (S, R1) from (S, prod(spatial) · R2)
            projected = enter.T @ tensor  # (prod(spatial), R1, T)
            leave = left_vectors(projected.reshape(-1, filters).T, ranks[1])
            core = projected @ leave
            error = math.sqrt(max(norm**2 - np.sum(core**2), 0)) / norm if norm else 0.0
            if sweep > 1 and before - error < tol:
                break
            before = error
        return [enter, core.reshape(*spatial, *ranks), leave]
