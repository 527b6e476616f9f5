"""The numbers and exercises of chapter 04."""

import numpy as np

CHAPTER = "04"
PARAMETERS = {"SWEEPS": 3000}  # as published: the text quotes the norms after so many

WRONG = {
    "04.1": [[2, 2, 2, 2], [2, 3, 2, 2], [2, 3, 3, 1], [3, 3, 3, 3], [2, 3, 3]],
    "04.2": [[1000, 1000], [577, 1000], [1732, 1000], 1000],
    "04.3": [lambda tensor: 2, lambda tensor: np.linalg.matrix_rank(tensor).max()],
    "04.4": [
        lambda x, z, allowed: x @ np.linalg.pinv(z).T,
        lambda x, z, allowed: np.zeros((len(x), z.shape[1])),
        lambda x, z, allowed: x @ z,
    ],
    "04.5": [
        lambda factors: factors,
        lambda factors: [factor / np.linalg.norm(factor, axis=0) for factor in factors],
    ],
}


def test_typical_ranks(chapter):
    assert abs(chapter["has_rank_2"].mean() - np.pi / 4) < 4 * np.sqrt(np.pi / 4 * (1 - np.pi / 4) / chapter["TENSORS"])
    turn = np.stack([np.eye(2), [[0, -1], [1, 0]]], axis=-1)
    assert chapter["hyperdeterminant"](turn) == -4 and chapter["hyperdeterminant"](chapter["W"]) == 0


def test_components_grow_as_fast_as_the_error_falls(chapter):
    approach = chapter["approach"]
    assert np.allclose(approach["relative error"][1:] * approach["norm of component 1"][1:], 1, rtol=0.02)
    first, second = chapter["two_components"](10.0)
    assert chapter["hyperdeterminant"](first + second) > 0  # rank 2


def test_degeneracy_of_the_trained_kernel(chapter):
    stops, errors, norms, _ = chapter["runs"]["conv1, rank 12"]
    tenth = np.argmin(abs(stops - stops[-1] / 10))
    assert 1 < errors[tenth] / errors[-1] < 1.01
    assert np.isclose(norms[tenth].max(), 1.2, atol=0.1) and np.isclose(norms[-1].max(), 4.5, atol=0.3)
    assert chapter["together"] < 0.3 * norms[-1][chapter["largest"]].sum()
    stops, errors, norms, _ = chapter["runs"]["W, rank 2"]
    assert errors[-1] < 0.01 and norms[-1].max() > 2


def test_sensitivity_is_what_noise_measures(chapter):
    ours = chapter["sensitivity"](chapter["plain"].factors, chapter["tensor"])
    assert np.isclose(ours, chapter["plain"].noise_sensitivity)
    assert np.isclose(chapter["measured"], ours, rtol=0.05)


def test_correction_and_bound(chapter):
    table = chapter["before_after"]
    ratio = table.loc["ALS"] / table.loc["corrected"]
    assert ratio["error"] >= 1 / 1.0101
    assert 8 < ratio["largest component"] < 12 and 8 < ratio["sensitivity"] < 12
    assert table.loc["corrected", "largest component"] < 1
    bounded, corrected = chapter["bounded"], chapter["corrected"]
    assert bounded.total_norm <= 1.0001 * corrected.total_norm and bounded.relative_error < corrected.relative_error
    path = [fit.total_norm for fit in chapter["path"]]
    assert np.all(np.diff(path) < 0)
    assert chapter["plain"].total_norm - path[3] > 0.9 * (chapter["plain"].total_norm - path[-1])


def test_example_by_hand_of_the_ridge():
    z = np.array([[1, 1], [0, 0.01]])
    assert np.allclose(z @ [-9, 11], [2, 0.11])
    assert np.isclose(np.linalg.norm(z @ [1, 1] - [2, 0.11]) / np.linalg.norm([2, 0.11]), 0.05, atol=1e-3)


def test_exercises(check_exercises):
    check_exercises(WRONG)
