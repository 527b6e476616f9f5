"""Chapter 02: the numbers in its text, and its exercises."""

import itertools
import math

import numpy as np
import pytest
import tensorly as tl

CHAPTER = "02"
WRONG = {
    "02.1": [[[3, 12], [4, 11]], [[7, 6], [8, 9]], [3, 4, 12, 11]],
    "02.2": [[821, 743], [820, 6400], [820]],
    "02.3": [
        lambda matrix, mode, shape: matrix.reshape(shape),
        lambda matrix, mode, shape: np.moveaxis(matrix.reshape(shape), 0, mode),
        lambda matrix, mode, shape: np.moveaxis(
            matrix.reshape(shape[mode], *shape[:mode], *shape[mode + 1 :]), mode, 0
        ),
    ],
    "02.4": [
        lambda factors: np.vstack(factors),
        lambda factors: np.array([np.prod(rows[::-1], axis=0) for rows in itertools.product(*factors[::-1])]),
        lambda factors: factors[0],
    ],
    "02.5": [[100, 104], [99, 760], [103, 99]],
}


def test_example_by_hand(chapter):
    tensor = chapter["T"]
    assert tensor[0, 0, 0] == 3 and tensor[1, 1, 1] == 4
    assert tensor[:, :, 0].tolist() == [[3, 2], [0, 1]] and tensor[:, :, 1].tolist() == [[7, 5], [2, 4]]
    assert chapter["decomposition"].parameters == 12 > tensor.size == 8


def test_storage_in_the_text(chapter):
    shape, merged, dense = chapter["shape"], chapter["merged"], chapter["dense"]
    assert sum(shape) == 294 and sum(merged) / sum(shape) == pytest.approx(1.01, abs=0.001)
    assert chapter["break_even"] * sum(shape) < dense <= (chapter["break_even"] + 1) * sum(shape)
    assert 64 * sum(shape) / dense == pytest.approx(1 / 9, abs=0.003)  # "about a ninth"


@pytest.mark.parametrize("shape", [(3, 3, 2), (2, 3, 4), (5, 1, 3), (2, 3, 4, 5), (4, 3)])
def test_unfolding_of_tensors_that_are_not_cubes(chapter, shape):
    """The first edition reshaped every unfolding to the size of the first mode."""
    tensor = np.random.default_rng(0).normal(size=shape)
    for mode in range(len(shape)):
        assert np.array_equal(chapter["unfold"](tensor, mode), tl.unfold(tensor, mode))
    one = np.ones(()).reshape([1] * len(shape)) * np.ones(shape)
    assert chapter["multilinear_rank"](one) == (1,) * len(shape)


def test_multilinear_ranks(chapter):
    ranks = [chapter["multilinear_rank"](tensor) for tensor in chapter["examples"].values()]
    assert ranks == [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 3, 6)]
    assert chapter["multilinear_rank"](chapter["Z"]) == (2, 2, 2)


def test_khatri_rao_agrees_with_tensorly(chapter):
    factors = [chapter["P2"], chapter["P3"]]
    assert np.allclose(chapter["khatri_rao"](*factors), tl.tenalg.khatri_rao(factors))


def test_higher_order_svd(chapter):
    smooth, table = chapter["smooth"], chapter["smooth_errors"]
    assert smooth.size == 13_440 and table["numbers stored"].max() < 400  # "a few hundred numbers"
    assert table["error"].is_monotonic_decreasing and table["error"].iloc[-1] < 1e-3
    core, bases = chapter["hosvd"](smooth, (4, 4, 4))
    assert all(np.allclose(basis.T @ basis, np.eye(4)) for basis in bases)
    gram = np.einsum("pql,sql->ps", core, core)  # the slices of the core are orthogonal (De Lathauwer et al.)
    assert np.allclose(gram, np.diag(np.diag(gram)), atol=1e-8 * np.trace(gram))


def test_complex_product_has_no_two_components(chapter):
    slices = chapter["Z"][..., 1], chapter["Z"][..., 0]
    assert np.iscomplex(np.linalg.eigvals(slices[0] @ np.linalg.inv(slices[1]))).all()
    x, y = np.random.default_rng(0).normal(size=(2, 2))
    product = complex(*x) * complex(*y)
    assert np.allclose(np.einsum("ijk,i,j->k", chapter["Z"], x, y), [product.real, product.imag])


def test_uniqueness_in_the_text(chapter):
    assert list(chapter["unchanged"].values()) == [True, False, True]
    assert chapter["uniqueness"]["Kruskal"].tolist() == ["unique", "no promise", "no promise", "unique", "unique"]
    assert chapter["uniqueness"]["sum of k-ranks"].tolist()[:2] == [6, 5]
    assert (9 - 1) * (96 - 1) >= 192  # Domanov & De Lathauwer 2017 covers every rank up to n3
    assert [chapter["k_rank"](np.array(m)) for m in ([[1, 0, 1], [0, 1, 1]], [[1, 2], [2, 4]], [[0, 1], [0, 2]])] == [
        2,
        1,
        0,
    ]


def test_strassen(chapter):
    """Exercise 02.6: seven components give the product of 2 × 2 matrices, and the multilinear rank is (4, 4, 4)."""
    left = np.array(
        [[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [-1, 0, 1, 0], [0, 1, 0, -1]]
    )
    right = np.array(
        [[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, -1], [-1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    )
    out = np.array([[1, 0, 0, 1], [0, 0, 1, -1], [0, 1, 0, 1], [1, 0, 1, 0], [-1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    product = np.zeros((4, 4, 4))
    for a, b, c in np.ndindex(2, 2, 2):
        product[2 * a + b, 2 * b + c, 2 * a + c] = 1
    assert np.array_equal(chapter["cp"](left.T, right.T, out.T), product) and product.sum() == 8
    assert chapter["multilinear_rank"](product) == (4, 4, 4) and math.prod((2, 3, 2)) == 12


def test_where_to_start_runs(chapter, capsys):
    """The code of the open exercise runs, and its tensor multiplies matrices."""
    (cell,) = (cell.source for cell in chapter.cells if "Where to start" in cell.source)
    exec(cell.split("Where to start")[1].split("```python")[1].split("```")[0], dict(chapter.variables))
    assert capsys.readouterr().out.splitlines()[-1] == "True"


def test_exercises(check_exercises):
    check_exercises(WRONG)
