"""Chapter 10, the wider separable network: the numbers in its text, and its exercises."""

import numpy as np
import pytest

from fcnn_utils.course import networks, thesis

CHAPTER = "10"
PLAN = networks.plan("wider_separable")
WRONG = {
    "10.1": [[64, 100], [72, 500], [71, 99], 72],
    "10.2": [
        PLAN,
        [("separable", *row[1:]) for row in PLAN],
        [
            ("separable" if row[2] == 3 else row[0], 64 if number == 1 else row[1], *row[2:])
            for number, row in enumerate(PLAN)
        ],
    ],
    "10.3": [
        lambda kernel: (kernel[..., 0], np.ones(kernel.shape[2:])),
        lambda kernel: (kernel.mean(axis=-1), kernel.mean(axis=(0, 1))),
        lambda kernel: (np.ones((3, 3)), kernel[0, 0]),
    ],
    "10.4": [[47, 1.1, 15], [676, 4.5, 74], [172.8, 1.125, 19.2], 1],
}


def test_separable_layer_is_dense_with_a_product_as_kernel(chapter):
    assert chapter["difference"] < 1e-5
    assert 1 / 9 < chapter["kept"][0] < 0.2 and round(6 * chapter["kept"][0]) == 1  # "a sixth"


def test_ratios(chapter):
    forms = chapter["forms"]
    assert forms["sep1"]["dense / separable"] == pytest.approx(8.60, abs=0.01)
    assert forms["sep3"]["dense / separable"] == pytest.approx(8.79, abs=0.01)
    assert all(form["pair of 09"] > 1 for form in forms.values())


def test_network_is_that_of_the_library_and_of_the_thesis(chapter):
    assert chapter["equal"] and len(chapter["compared"]) == 20 and chapter["compared"]["equal"].all()
    assert chapter["model"].count_params() == thesis.PARAMS["wider_separable"][0] == 972_879
    assert chapter["total"] == 101_567_488


def test_amdahl(chapter):
    p, dense = chapter["p"], chapter["macs"]["total"]
    assert 0.49 < p < 0.51 and round(dense / chapter["total"], 2) == 1.79
    gain = p * dense / (chapter["total"] - (1 - p) * dense)
    assert gain == pytest.approx(8.8, abs=0.05) and 1 / (1 - p + p / gain) == pytest.approx(dense / chapter["total"])
    macs = chapter["costs"].set_index("layer")["macs"]
    assert round(macs[["conv2", "conv4", "conv5", "conv6"]].sum() / chapter["total"], 2) == 0.90
    assert round(macs["conv2"] / chapter["total"], 1) == 0.4  # "two fifths"


def test_time_shrinks_less_than_the_macs(chapter):
    assert chapter["speedups"].keys() == {"convolution", "with norm and ReLU"}
    assert max(chapter["speedups"].values()) < chapter["macs_ratio"]


def test_counts_relative_to_the_simple_network(chapter):
    relative = chapter["counts"] / chapter["counts"].loc["simple"]
    row = relative.loc["wider_separable"]
    assert 0.3 < row["macs"] < 0.4 and 0.9 < row["other_ops"] < 1.05 and 0.9 < row["activation_bytes"] < 1.05
    assert round(row["step time in the thesis"], 2) == 0.86


def test_exercises(check_exercises):
    check_exercises(WRONG)
