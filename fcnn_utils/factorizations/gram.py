"""Truncated singular value decompositions from eigenvectors of Gram matrices.

The left singular vectors of a matrix M are the eigenvectors of its Gram matrix M Mᵀ, its singular values the roots of
the eigenvalues (Golub & Van Loan 2013, Matrix Computations, 4th ed., section 8.6). For the unfoldings of kernels, which
are flat, this takes a tenth of the time of an SVD. The Gram matrix squares the singular values, so that those below
1e-8 of the largest are lost. Where that would be visible, the SVD is computed instead.
"""

import numpy as np

_SMALL_TAIL = 1e-8  # share of ‖M‖². Rounding adds about 1e-15 to it, so above this the error is accurate to 1e-7


def truncated_svd(matrix, rank):
    """Return the truncated SVD, whose product is the best approximation of this rank (Eckart & Young 1936).

    Args:
        matrix: (…, n, m) array.
        rank: at most min(n, m).

    Returns:
        (u, sigma, vt), arrays of the shapes (…, n, rank), (…, rank), (…, rank, m). The vectors of the
        shorter side (u if n ≤ m) are orthonormal. Those of the other side lose orthogonality for small singular values,
        and are zero for a singular value of zero.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        v, sigma, ut = truncated_svd(np.swapaxes(matrix, -1, -2), rank)
        return np.swapaxes(ut, -1, -2), sigma, np.swapaxes(v, -1, -2)
    u = _flat_left_vectors(matrix, rank)
    rows = np.swapaxes(u, -1, -2) @ matrix
    sigma = np.linalg.norm(rows, axis=-1)
    return u, sigma, rows / np.where(sigma > 0, sigma, 1.0)[..., None]


def left_vectors(matrix, rank):
    """Return the leading left singular vectors of an (n, m) matrix, as an (n, rank) array with orthonormal columns."""
    if matrix.shape[0] <= matrix.shape[1]:
        return _flat_left_vectors(matrix, rank)
    return np.linalg.qr(matrix @ _flat_left_vectors(matrix.T, rank))[0]


def _flat_left_vectors(matrix, rank):
    """Return `left_vectors` of matrices (…, n, m) with n ≤ m."""
    values, vectors = np.linalg.eigh(matrix @ np.swapaxes(matrix, -1, -2))  # in ascending order
    tail = values[..., : max(matrix.shape[-2] - rank, 1)].sum(axis=-1)  # what is dropped, or the last value kept
    if np.any(tail < _SMALL_TAIL * values.sum(axis=-1)):
        return np.linalg.svd(matrix, full_matrices=False)[0][..., :rank]
    return vectors[..., ::-1][..., :rank]
