"""Chapter 16, compression step by step: the numbers in its text, from the records, and its exercises."""

import numpy as np
import pytest

from fcnn_utils.course.data import cifar100

CHAPTER = "16"
WRONG = {
    "16.1": [[1, 2], [0.5, 1], 1],
    "16.2": [
        lambda P_dense, P_new, K, B: (np.linalg.lstsq(P_dense @ B, P_dense @ K, rcond=None)[0], np.zeros(K.shape[1])),
        lambda P_dense, P_new, K, B: (np.linalg.lstsq(P_new @ B, P_dense @ K, rcond=None)[0], np.zeros(K.shape[1])),
        lambda P_dense, P_new, K, B: (np.linalg.lstsq(B, K, rcond=None)[0], (P_dense @ K).mean(axis=0)),
        lambda P_dense, P_new, K, B: np.linalg.lstsq(P_new @ B, P_dense @ K, rcond=None)[0],
    ],
    "16.3": [
        lambda P, share: int(share * P.shape[1]),
        lambda P, share: int(np.sum(np.linalg.eigvalsh(np.cov(P.T)) >= share)),
        lambda P, share: int(np.argmax(np.cumsum(np.linalg.eigvalsh(np.cov(P.T))) >= share)) + 1,
        lambda P, share: int(np.argmax(np.cumsum(np.linalg.svd(P)[1] ** 2) / (P**2).sum() >= share)) + 1,
    ],
}
pytestmark = pytest.mark.skipif(cifar100.find() is None, reason="CIFAR-100 is not on this machine")


def test_output_error_is_smaller_and_the_fit_raises_the_kernel_error(chapter):
    K, relative, test = chapter["K"], chapter["relative"], chapter["P_test"]
    kernel = [relative(K - new, K) for new in (chapter["K_hat"], chapter["fitted"])]
    output = [relative(test @ (K - new), test @ K) for new in (chapter["K_hat"], chapter["fitted"])]
    assert kernel[0] == pytest.approx(0.51, abs=0.02) and output[0] < 0.45 * kernel[0]
    assert kernel[1] > kernel[0] and output[1] == pytest.approx(0.75 * output[0], rel=0.06)


def test_kernel_is_most_accurate_where_the_patches_vary_most(chapter):
    errors, varying = chapter["by_direction"], chapter["varying"]
    assert varying[0] > 0.5
    for each in errors.values():
        assert each[0] < 0.3 and np.all(np.diff(each) > 0)
    difference = np.subtract(errors["fitted to the output"], errors["CP"])
    assert difference[0] < 0 < difference[1:].min()


def test_damage_grows_layer_by_layer_and_the_correction_removes_most(chapter):
    mean = chapter["steps"]["mean"]
    swapped = mean["swapped in"]
    assert swapped.iloc[0] - swapped.iloc[-1] > 3 and np.all(np.diff(swapped) < 0)
    lost = {stage: swapped[0] - mean[stage][6] for stage in ("swapped in", "new statistics", "corrected")}
    assert lost["corrected"] < 0.3 * lost["swapped in"] and lost["corrected"] < lost["new statistics"]
    assert mean["new statistics"][1] > swapped[1] and mean["new statistics"][2] >= mean["corrected"][2]


def test_fine_tuned_networks_are_behind_the_dense_one_as_stated(chapter):
    table = chapter["table"]
    behind = table.loc["dense", ["before", "after"]] - table.drop("dense")[["before", "after"]]
    assert behind["after"].between(0.6, 0.85).all() and (table["seeds"] == 3).all()
    assert (behind["after"] > behind["before"]).all()
    gain = (table["after"] - table["before"]).round(1)
    assert gain["dense"] == 0.3 and (gain.drop("dense") == 0.1).all()


def test_each_change_of_the_fine_tuning_does_what_the_text_says(chapter):
    loss = chapter["ends"]["loss"]
    dense = loss["dense network"]
    assert loss["600 sweeps"] > dense + 1 and loss["600 sweeps + warm-up"] > dense + 1
    assert loss["600 sweeps + bound"] < dense + 0.35 and loss["600 sweeps + clipping"] < dense + 0.35
    assert loss["600 sweeps + bound"] < loss["50 sweeps"] < loss["600 sweeps + warm-up"]
    error = chapter["ends"]["kernel error"].drop("dense network")
    assert error.max() - error.min() < 0.02
    before = chapter["ends"]["top-1 before (%)"].drop("dense network")
    assert before.max() - before.min() < 0.6


def test_exercises(check_exercises):
    check_exercises(WRONG)
