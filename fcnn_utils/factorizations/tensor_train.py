"""Tensor train of a kernel: K[i, j, s, t] = Σ_abc  G1[s, a] · G2[a, i, b] · G3[b, j, c] · G4[c, t]."""

import math

from tensorly.decomposition import tensor_train

from fcnn_utils.factorizations.base import Factorization
from fcnn_utils.factorizations.chain import AXIS_NAMES
from fcnn_utils.factorizations.gram import truncated_svd

_RANKS = "abcd"


class TensorTrain(Factorization):
    """Tensor train over the modes S, spatial axes, T: 1×1 S→R1, k×1 R1→R2, 1×k R2→R3, 1×1 R3→T.

    Factors: G1 (S, R1), one (R_{n}, size, R_{n+1}) for each spatial axis, and the last (R, T). Computed by
    successive truncated SVDs (Oseledets 2011; for layers Novikov et al. 2015, arXiv 1509.06569). For four modes
    the error is at most √3 times the best.
    """

    name = "tt"

    @classmethod
    def structure(cls, spatial):
        entries = [("in", 0, "sa", "s->a")]
        for axis, letter in enumerate(spatial):
            a, b = _RANKS[axis : axis + 2]
            entries.append((AXIS_NAMES[len(spatial)][axis], axis + 1, f"{a}{letter}{b}", f"{a}->{b}"))
        last = _RANKS[len(spatial)]
        return [*entries, ("out", len(spatial) + 1, f"{last}t", f"{last}->t")]

    @classmethod
    def _max_ranks(cls, kernel_shape):
        *spatial, channels, filters = kernel_shape
        modes = [channels, *spatial, filters]
        return tuple(min(math.prod(modes[:cut]), math.prod(modes[cut:])) for cut in range(1, len(modes)))

    @classmethod
    def _factors(cls, kernel, ranks):
        spatial = kernel.ndim - 2
        modes = kernel.transpose(spatial, *range(spatial), spatial + 1)  # (*spatial, S, T) -> (S, *spatial, T)
        first, *middle, last = tensor_train(modes, [1, *ranks, 1], svd=_svd).factors
        return [first[0], *middle, last[..., 0]]


def _svd(matrix, n_eigenvecs, **options):
    """Return `truncated_svd` as TensorLy calls it."""
    return truncated_svd(matrix, n_eigenvecs)
