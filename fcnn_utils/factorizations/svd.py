"""Factorizations by truncated SVDs: of the unfolded kernel, the spatial SVD, and the depthwise separable layer.

All minimise the Frobenius error among factorizations of their form and rank (Eckart & Young 1936). Each factor takes
the square roots of the singular values.
"""

import math

import numpy as np

from fcnn_utils.factorizations.base import Factorization
from fcnn_utils.factorizations.gram import truncated_svd


class SVD(Factorization):
    """k×k S→R, 1×1 R→T (Zhang, Zou, He & Sun 2016, arXiv 1505.06798).

        K[i, j, s, t] = Σ_r  U[i, j, s, r] · V[r, t]

    The truncated SVD of the kernel as a (prod(spatial) · S, T) matrix. For a 1×1 or a dense layer this is the SVD of
    its matrix. Factors: U (*spatial, S, R), V (R, T).

    With the option `outputs`, the (T, T) covariance of what the layer computes, the error of these outputs is
    smallest instead of that of the kernel: the rows of V are the leading eigenvectors of the covariance.
    """

    name = "svd"
    is_nested = True

    @classmethod
    def structure(cls, spatial):
        return [("in", 0, f"{spatial}sr", "s->r"), ("out", 1, "rt", "r->t")]

    @classmethod
    def _max_ranks(cls, kernel_shape):
        return (min(math.prod(kernel_shape[:-1]), kernel_shape[-1]),)

    @classmethod
    def _factors(cls, kernel, ranks, *, outputs=None):
        matrix = kernel.reshape(-1, kernel.shape[-1])
        if outputs is None:
            left, right = _truncated(matrix, ranks[0])
        else:
            right = _leading_vectors(matrix, _check_covariance(outputs, len(matrix.T)), ranks[0]).T
            left = matrix @ right.T
            root = np.sqrt(np.linalg.norm(left, axis=0))
            left, right = left / np.where(root > 0, root, 1.0), right * root[:, None]
        return [left.reshape(*kernel.shape[:-1], -1), right]


class SpatialSVD(Factorization):
    """Column and row: k×1 S→R, 1×k R→T (Jaderberg, Vedaldi & Zisserman 2014, arXiv 1405.3866, scheme 2).

        K[i, j, s, t] = Σ_r  V[i, s, r] · H[r, j, t]

    The truncated SVD of the kernel as a (kh · S, kw · T) matrix: the first spatial axis goes with the input
    channels, the others with the filters. Factors: V (kh, S, R), H (R, kw, T).
    """

    name = "spatial"
    is_nested = True

    @classmethod
    def structure(cls, spatial):
        first, second = {0: ("in", "out"), 1: ("column", "out"), 2: ("column", "row"), 3: ("depth", "plane")}[
            len(spatial)
        ]
        return [(first, 0, f"{spatial[:1]}sr", "s->r"), (second, 1, f"r{spatial[1:]}t", "r->t")]

    @classmethod
    def _max_ranks(cls, kernel_shape):
        *spatial, channels, filters = kernel_shape
        return (min(math.prod(spatial[:1]) * channels, math.prod(spatial[1:]) * filters),)

    @classmethod
    def _factors(cls, kernel, ranks):
        *spatial, channels, filters = kernel.shape
        enter, leave = (*spatial[:1], channels), (*spatial[1:], filters)
        matrix = np.moveaxis(kernel, -2, 1 if spatial else 0).reshape(math.prod(enter), math.prod(leave))
        left, right = _truncated(matrix, ranks[0])
        return [left.reshape(*enter, -1), right.reshape(-1, *leave)]


class DepthwiseSeparable(Factorization):
    """k×k depthwise with R outputs per channel, then 1×1 to T (Guo et al. 2018, arXiv 1808.05517).

        K[i, j, s, t] = Σ_r  D[i, j, s, r] · P[s, r, t]

    A truncated SVD of the (prod(spatial), T) matrix of each input channel. Factors: D (*spatial, S, R),
    P (S, R, T). The rank R is the depth multiplier.
    """

    name = "separable"
    is_nested = True

    @classmethod
    def structure(cls, spatial):
        return [("depthwise", 0, f"{spatial}sr", "s->sr"), ("out", 1, "srt", "sr->t")]

    @classmethod
    def _max_ranks(cls, kernel_shape):
        *spatial, _, filters = kernel_shape
        return (min(math.prod(spatial), filters),)

    @classmethod
    def _factors(cls, kernel, ranks):
        *spatial, channels, filters = kernel.shape
        matrices = kernel.reshape(-1, channels, filters).transpose(1, 0, 2)  # (S, prod(spatial), T)
        left, right = _truncated(matrices, ranks[0])  # (S, prod(spatial), R), (S, R, T)
        return [left.transpose(1, 0, 2).reshape(*spatial, channels, -1), right]


def _truncated(matrix, rank):
    """Return the best factors (…, n, rank) and (…, rank, m) of matrices (…, n, m)."""
    u, sigma, vt = truncated_svd(matrix, rank)
    root = np.sqrt(sigma)
    return u * root[..., None, :], root[..., :, None] * vt


def _leading_vectors(matrix, outputs, rank):
    """Return the leading eigenvectors (T, rank) of the covariance (T, T) of the outputs of a matrix (n, T).

    All outputs are combinations of the n rows. If n < T, an orthonormal basis of these makes the problem smaller.
    """
    if len(matrix) >= len(outputs):
        return np.linalg.eigh(outputs)[1][:, ::-1][:, :rank]
    basis = np.linalg.qr(matrix.T)[0]
    return basis @ np.linalg.eigh(basis.T @ outputs @ basis)[1][:, ::-1][:, :rank]


def _check_covariance(outputs, size):
    outputs = np.asarray(outputs, np.float64)
    if outputs.shape != (size, size) or not np.isfinite(outputs).all():
        raise ValueError(f"outputs must be a finite covariance of the shape {(size, size)}; got {outputs.shape}")
    return outputs
