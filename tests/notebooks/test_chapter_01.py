"""Chapter 01: the numbers in its text, and its exercises."""

import numpy as np
import pytest
from scipy import ndimage

CHAPTER = "01"


def _energy(matrix):
    """Return the share of the squared norm in the first 1, 2, ... terms."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return np.cumsum(squares) / np.sum(squares)


WRONG = {
    "01.1": [[2, 2, 1], [2, 3, 2], [2, 3]],
    "01.2": [[64, 274], [63, 275], [16384, 307200], 63],
    "01.3": [
        lambda matrix, error: 1,
        lambda matrix, error: np.linalg.matrix_rank(matrix),
        lambda matrix, error: 1 + int(np.argmax(_energy(matrix) >= 1 - error)),  # without the square root
        lambda matrix, error: 2 + int(np.argmax(_energy(matrix) >= 1 - error**2)),
    ],
    "01.4": [
        lambda kernel: (kernel[:, 0], kernel[0]),
        lambda kernel: (kernel[:, 0] / (kernel[0, 0] or 1), kernel[0]),
        lambda kernel: (np.linalg.svd(kernel)[0][:, 0], np.linalg.svd(kernel)[2][0]),
        lambda kernel: kernel,
    ],
    "01.5": [[0.108, 0.035, 0.012], [0.288, 0.158, 0.118], [32.9, 18.6, 11.1]],
}


def test_ranks_of_the_tables(chapter):
    assert list(chapter["ranks"].values()) == [1, 2, 3, 2, 10]
    assert list(chapter["filter_ranks"].values()) == [1, 1, 2, 4]
    assert all(np.linalg.matrix_rank(matrix) == 128 for matrix in chapter["matrices"].values())


def test_example_by_hand(chapter):
    assert np.allclose(chapter["truncated"](chapter["small"], 1), 1.5)
    assert np.allclose(np.linalg.svd(chapter["small"])[1], [3, 1])
    total = np.outer([1, -2, 1], [0, 1, 0]) + np.outer([0, 1, 0], [1, -2, 1])
    assert np.array_equal(total, chapter["kernels"]["Laplacian"])  # equation 1.4


def test_errors_in_the_text(chapter):
    errors = chapter["errors"]
    assert errors["|x − y|"][4] > 0.03 > errors["|x − y|"][5] == pytest.approx(0.03, abs=0.001)
    assert errors["random"][5] > 0.9  # "almost everything"
    assert (errors["|x − y|"][2:100] < errors["image"][2:100]).all()
    assert (errors["image"] <= errors["random"] + 1e-9).all()  # both are 1 without a component, up to rounding
    if not chapter["dataset"].stand_in:
        assert errors["image"][[4, 16, 32]].round(3).tolist() == [0.255, 0.115, 0.058]


def test_the_rows_of_the_disk(chapter):
    lengths = chapter["disk"].sum(axis=1)
    assert len(set(lengths)) == chapter["filter_ranks"]["disk"]  # "the number of different row lengths"


def test_filters_agree_with_scipy(chapter):
    for name, kernel in chapter["kernels"].items():
        expected = ndimage.correlate(chapter["mosaic"], kernel, mode="constant")
        assert np.allclose(chapter["outputs"][name], expected), name


def test_macs_of_the_filters(chapter):
    macs = chapter["macs"]
    assert macs["direct: k²"].tolist() == [81, 9, 9, 121] and macs["in turn: 2kR"].tolist() == [18, 6, 12, 88]
    assert macs["times fewer MACs"].idxmax() == "Gaussian"
    assert macs["times fewer MACs"]["disk"] > 1 > macs["times fewer MACs"]["Laplacian"]
    assert chapter["share"][16] == 0.25


def test_numbers_in_the_solutions(chapter):
    """Exercise 01.5: the picture's error is far below the kernel's, at 44 MACs; 01.6: terms grow with the angle."""
    assert 2 * 11 * 2 == 44
    if not chapter["dataset"].stand_in:
        outputs = chapter["outputs"]["disk"]
        approximate = chapter["filtered_in_turn"](chapter["mosaic"], chapter["kernels"]["disk"], 2)
        assert np.linalg.norm(approximate - outputs) < 0.004 * np.linalg.norm(outputs)
    offset = np.arange(-15.5, 16)
    counts = []
    for width in (0.1, 10):
        for angle in np.radians((0, 25, 45)):
            across = np.add.outer(np.sin(angle) * offset, -np.cos(angle) * offset)
            errors = chapter["relative_errors"]((1 + np.tanh(across / width)) / 2)
            counts.append(int(np.argmax(errors <= 0.1)))
    assert counts[0] < counts[1] < counts[2] and max(counts[3:]) <= 2


def test_exercises(check_exercises):
    check_exercises(WRONG)
