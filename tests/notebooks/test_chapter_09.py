"""Chapter 09, the wider factorized network: the numbers in its text, and its exercises."""

import numpy as np
import pytest

from fcnn_utils.course import thesis

CHAPTER = "09"
RNG = np.random.default_rng(0)


def relative_tail(kernel, rank):
    """The error of a truncated SVD, with the axes in the order given."""
    matrix = kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    return np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)


WRONG = {
    "09.1": [[2 / 3, 2], [0.4, 5], [0.2, 4], 0.4],
    "09.2": [
        lambda kernel, rank: relative_tail(kernel.transpose(1, 2, 0, 3), rank),
        lambda kernel, rank: relative_tail(kernel, rank),
        lambda kernel, rank: 0.5,
        lambda kernel, rank: 1 - rank / (kernel.shape[0] * min(kernel.shape[2:])),
    ],
    "09.3": [
        RNG.normal(size=(3, 3, 2, 2)),
        np.ones((3, 3, 2, 2)),
        np.einsum("js,it->ijst", *RNG.normal(size=(2, 3, 2))),
        np.ones((2, 2, 3, 3)),
    ],
}


def test_exact_pair_of_the_first_layer(chapter):
    assert chapter["difference"] < 1e-4 and chapter["a"].shape == (3, 1, 3, 9) and chapter["b"].shape == (1, 3, 9, 192)
    assert 3 * 3 * 192 + 3 * 192 * 192 == 112_320 and 9 * 3 * 192 == 5_184  # in the text
    assert "112,320" in chapter.text and "5,184" in chapter.text


def test_ratios(chapter):
    assert chapter["ratios"] == pytest.approx({"conv1": 21.67, "conv3": 1.67}, abs=0.01)
    assert (1 + 1) / 3 == 2 / 3 and 2 * 7 / 7**2 == 2 / 7  # Inception


def test_network_is_that_of_the_library_and_of_the_thesis(chapter):
    assert chapter["equal"] and len(chapter["compared"]) == 22 and chapter["compared"]["equal"].all()
    assert chapter["model"].count_params() == thesis.PARAMS["wider_factorized"][0]


def test_macs_against_the_other_networks(chapter):
    macs = chapter["totals"]["macs"]
    assert round(macs["wider, factorized"] / macs["simple"], 2) == 1.23
    assert 1.85 < macs["wider, factorized"] / macs["wider, dense"] < 2  # "nearly twice"
    assert chapter["rivals"]["wider, dense"].count_params() == 1_271_508  # that of networks.build("wider_dense")
    ms = thesis.summary()["ms_per_step"]
    assert (ms["wider_factorized"], ms["simple"]) == (31, 21) and round(31 / 21, 2) == 1.48


def test_forms_of_a_pair(chapter):
    forms = chapter["forms"].set_index(["layer", "form of the pair"])["MACs, dense layer = 1"]
    for layer in ("conv1", "conv3"):
        assert forms[layer, "exact: R = 3 min(c, f)"] > 1 > forms[layer, "largest R that saves"] > 0.85
        assert forms[layer, "half the input channels"] < 0.4
        assert forms[layer, "thesis: R = f"] == pytest.approx(chapter["ratios"][layer])


def test_random_kernel_is_far_from_a_pair(chapter):
    matrix = RNG.normal(size=(3 * 96, 3 * 384))
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    assert round(float(np.sqrt(squares[48:].sum() / squares.sum())), 2) == 0.83  # in the solution of 09.2


def test_exercises(check_exercises):
    check_exercises(WRONG)
