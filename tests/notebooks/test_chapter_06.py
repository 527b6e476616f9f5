"""Chapter 06, factorized convolutions: the numbers in its text, and its exercises."""

import numpy as np
import pytest

from fcnn_utils.course import exercises
from fcnn_utils.factorizations import CP, CP4, SpatialSVD, Tucker2

CHAPTER = "06"
WRONG = {
    "06.1": [[9900, 373], [9900, 412], [50 * (9 + 64 + 128), 372], 9900, [372, 9900]],
    "06.2": [
        lambda a, b: np.einsum("jr,ir->ijr", a, b).reshape(-1, a.shape[1]),
        lambda a, b: a * b,
        lambda a, b: np.kron(a, b),
    ],
    "06.3": [
        lambda kernel, u, v: (u, v),
        lambda kernel, u, v: (2 * u, v),
        lambda kernel, u, v: _hosvd(kernel, u.shape[1], v.shape[1]),
        lambda kernel, u, v: (v, u),
    ],
    "06.4": [
        lambda size, k, stride: (k // 2, k // 2),
        lambda size, k, stride: ((k - 1) // 2, k // 2),
        lambda size, k, stride: (0, max((-(-size // stride) - 1) * stride + k - size, 0)),
    ],
    "06.5": [103, 43, 169, 41],
}


def _hosvd(kernel, rank_in, rank_out):
    vectors = [np.linalg.svd(np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1))[0] for axis in (2, 3)]
    return vectors[0][:, :rank_in], vectors[1][:, :rank_out]


def test_chains_equal_the_dense_layer(chapter):
    np.testing.assert_allclose(chapter["in_turn"], chapter["at_once"], atol=1e-10)
    for model in ("chain", "block", "merged"):
        assert np.linalg.norm(chapter[model](chapter["x"]) - chapter["dense"](chapter["x"], chapter["kernel"])) < 1e-2
    assert np.all(chapter["forms"]["layer"].astype(float) < 1e-4)


def test_expected_rank_of_a_generic_kernel_is_its_complex_generic_rank():
    """Terracini's lemma: the tangent spaces at 15 random components, but not at 14, span all 180 dimensions."""
    rng = np.random.default_rng(0)
    sizes = (3, 3, 4, 5)
    assert -(-np.prod(sizes) // (sum(sizes) - 3)) == 15 and 15 * sum(sizes) == 225 > 180
    tangents = []
    for _ in range(15):
        vectors = [rng.normal(size=n) for n in sizes]
        for mode, n in enumerate(sizes):
            moved = [np.eye(n) if m == mode else v[None] for m, v in enumerate(vectors)]
            tangents.append(np.einsum("ai,bj,cs,dt->abcdijst", *moved).reshape(n, -1))
    assert np.linalg.matrix_rank(np.vstack(tangents)) == 180
    assert np.linalg.matrix_rank(np.vstack(tangents[:-4])) < 180


def test_numbers_about_ranks(chapter):
    sizes = chapter["sizes"].set_index(["kernel (180 weights)", "rank"])
    error = sizes["error"]["random"]
    assert 0.1 < error[12] < 0.25 and 1e-3 < error[15] < 0.05 and error[18] < 1e-3
    assert sizes["weights"]["random"][18] > 180
    assert sizes["error"]["sum of 3 components"][3] < 1e-4 and sizes["weights"]["sum of 3 components"][3] == 180 / 4
    assert sum(9 * [1]) == 9 and CP4.count_parameters((3, 3, 4, 5), 15) == 225


def test_our_factorizations_agree_with_the_library(chapter):
    full, half = chapter["forms"][:4], chapter["forms"][4:]
    assert (full["error"] < 1e-10).all() and (full["weights"] > 180).all()
    tucker = half[half["form"] == "tucker"].iloc[0]
    assert tucker["library's error"] < tucker["error"] - 1e-3
    others = half[half["form"] != "tucker"]
    np.testing.assert_allclose(others["error"], others["library's error"], rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_hosvd_is_no_better_than_the_library_and_spatial_is_equal(chapter, seed):
    kernel = np.random.default_rng(seed).normal(size=(3, 3, 6, 7))
    ours = Tucker2.from_factors(kernel, chapter["hosvd"](kernel, 3, 2)).relative_error
    assert Tucker2.decompose(kernel, (3, 2)).relative_error <= ours + 1e-9
    ours = SpatialSVD.from_factors(kernel, chapter["spatial"](kernel, 4)).relative_error
    assert np.isclose(SpatialSVD.decompose(kernel, 4).relative_error, ours)


def test_strides(chapter):
    inside, at_end = (chapter["strides"].iloc[:, column] for column in (1, 2))
    assert (inside < 1e-5).all() and at_end[0] < 1e-5 and at_end[1] > 0.5


def test_running_project(chapter):
    assert chapter["conv3"].kernel.shape == (3, 3, 96, 96) and chapter["conv3"].strides == (2, 2)
    assert chapter["rank"] == 103 and 0.45 < chapter["cp"].relative_error < 0.6
    assert chapter["cp"].parameters <= 0.25 * chapter["K"].size
    outputs = chapter["outputs"].set_index("inputs").iloc[:, 1]
    assert outputs["real"] < outputs["real, shuffled"] < outputs["channels shuffled apart"] < outputs["random"]
    assert abs(outputs["random"] - chapter["cp"].relative_error) < 0.01
    if not chapter["dataset"].stand_in:
        assert outputs["real"] < outputs["random"] / 3  # "several times smaller"
    assert 0.55 < chapter["table"]["macs"].iloc[-1] / chapter["dense_macs"] < 0.65  # "more than half"
    assert CP.count_parameters((3, 3, 96, 96), 103) == 20_703


def test_answers_in_other_types_are_accepted():
    assert exercises.verdict("06.1", np.array([9900.0, 372.0])) == "right"
    assert exercises.verdict("06.5", np.int64(42)) == "right"
    assert exercises.verdict("06.5", [42]) == "right"


def test_exercises(check_exercises):
    check_exercises(WRONG)
