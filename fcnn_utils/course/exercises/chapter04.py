"""Exercises of chapter 04: when the best CP does not exist."""

import numpy as np
from scipy.optimize import brentq

from fcnn_utils.course.exercises import exercise


@exercise("04.1")
def ranks_of_four_tensors(answer):
    """2, 3, 3, 2: rank 2 exactly if T_1 is diagonalizable over the reals."""
    found = np.asarray(answer, dtype=float).ravel()
    if found.size != 4:
        return "give four numbers"
    if found[0] != 2:
        return "look at (a) again: a diagonal matrix is diagonalizable"
    if found[1] != 3:
        return "look at (b) again: are its eigenvalues real?"
    if found[2] != 3:
        return "look at (c) again: how many independent eigenvectors has it?"
    return "" if found[3] == 2 else "look at (d) again: is it diagonalizable, and what is the rank of a slice?"


@exercise("04.2")
def cost_of_an_approximation(answer):
    """About 1000, and about 1000 / √3."""
    found = np.asarray(answer, dtype=float).ravel()
    if found.size != 2:
        return "give two numbers: [n, norm of component 1 / norm of W]"
    n = brentq(lambda n: np.sqrt(1 / n**2 + 1 / (3 * n**4)) - 0.001, 1, 1e6)
    if not np.isclose(found[0], n, rtol=0.02):
        return "check n: which power of n does the relative error of T_n go with, and with which factor?"
    size = n * (1 + 1 / n**2) ** 1.5 / np.sqrt(3)
    return "" if np.isclose(found[1], size, rtol=0.02) else "check the norm: it is relative to the norm of W"


@exercise("04.3")
def rank_by_the_hyperdeterminant(function):
    """2 if both eigenvalues of T_1 T_0⁻¹ are real, else 3."""
    rng = np.random.default_rng(3)
    for _ in range(40):
        tensor = rng.normal(size=(2, 2, 2))
        found = function(tensor.copy())
        eigenvalues = np.linalg.eigvals(tensor[:, :, 1] @ np.linalg.inv(tensor[:, :, 0]))
        if np.ndim(found) != 0 or found != (2 if np.isreal(eigenvalues).all() else 3):
            return f"it gives {found} for a tensor for which T_1 T_0⁻¹ has the eigenvalues {eigenvalues.round(2)}"
    return ""


@exercise("04.4")
def smallest_factor_for_an_error(function):
    """The error is used up, and the gradient of the error is parallel to A (the Lagrange condition)."""
    rng = np.random.default_rng(4)
    for rows, columns, rank in ((5, 7, 3), (4, 9, 2), (6, 5, 4)):
        x, z = rng.normal(size=(rows, columns)), rng.normal(size=(columns, rank))
        least = np.linalg.norm(x - x @ z @ np.linalg.pinv(z))
        allowed = 0.6 * least + 0.4 * np.linalg.norm(x)
        found = function(x.copy(), z.copy(), allowed)
        if np.shape(found) != (rows, rank):
            return f"for X of {rows} × {columns} and Z of {columns} × {rank}, A must be {rows} × {rank}"
        error = np.linalg.norm(x - found @ z.T)
        if error > allowed * (1 + 1e-6):
            return "the error is larger than allowed"
        if error < allowed * (1 - 1e-4):
            return "the error is smaller than allowed, so A could be smaller"
        gradient = (x - found @ z.T) @ z
        if np.vdot(gradient, found) < (1 - 1e-5) * np.linalg.norm(gradient) * np.linalg.norm(found):
            return "the error is as allowed, but another A with this error is smaller"
    nothing = function(x.copy(), z.copy(), 1.5 * np.linalg.norm(x))
    return (
        ""
        if np.shape(nothing) == (rows, rank) and np.allclose(nothing, 0)
        else "if A = 0 is good enough, return a matrix of zeros"
    )


@exercise("04.5")
def balanced_factors(function):
    """The same components, each with three vectors of the same norm."""
    rng = np.random.default_rng(5)
    for shape, rank in (((3, 4, 5), 2), ((6, 2, 3), 4)):
        factors = [10 ** rng.uniform(-2, 2) * rng.normal(size=(size, rank)) for size in shape]
        found = function([factor.copy() for factor in factors])
        if [np.shape(factor) for factor in found] != [factor.shape for factor in factors]:
            return "return three factors of the same shapes"
        if not np.allclose(np.einsum("ir,jr,kr->ijkr", *found), np.einsum("ir,jr,kr->ijkr", *factors)):
            return "a component has changed"
        norms = np.array([np.linalg.norm(factor, axis=0) for factor in found])
        if not np.allclose(norms, norms[0]):
            return "the three vectors of a component have different norms"
    return ""
