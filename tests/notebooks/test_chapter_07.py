"""Chapter 07: the numbers and orders that its text states, and the checks of its exercises."""

import numpy as np
import pytest

from fcnn_utils import blocks, cost
from fcnn_utils.rank_selection import error_curve

CHAPTER = "07"
LARGE = [f"conv{number}" for number in range(2, 8)]
WRONG = {
    "07.1": [[211, 845], [211.05, 844.2], [844, 211], 211],
    "07.2": [412, 170, 103],
    "07.3": [
        lambda kernel, share, bits: np.sqrt(1 - share),
        lambda kernel, share, bits: np.sqrt(
            np.sort(kernel.ravel() ** 2)[: kernel.size - round(share * kernel.size)].sum() / np.sum(kernel**2)
        ),
    ],
    "07.4": [
        lambda ms: {name: 1 - time / ms["dense"] for name, time in ms.items() if name not in ("dense", "empty")},
        lambda ms: {name: 1 - (time - ms["empty"]) / (ms["dense"] - ms["empty"]) for name, time in ms.items()},
    ],
    "07.5": [
        lambda kernel, share, methods: methods[0],
        lambda kernel, share, methods: "spatial",
        lambda kernel, share, methods: 0.3,
    ],
}


def errors(chapter, table, method, budget):
    """Errors of a method at a budget, one for each kernel."""
    rows = chapter[table]
    return rows[(rows["method"] == method) & (rows["budget"] == budget)].set_index("kernel")["relative_error"]


def test_section_1(chapter):
    budget = chapter["budget_table"].set_index("factorization")
    assert chapter["kernels"]["conv3"].size == 82_944 and 96 + 9 + 96 == 201
    assert budget.loc["CP", "ranks at a quarter"] == (103,)
    assert [kernel.shape[2] for kernel in chapter["kernels"].values()] == [3, 96, 96, 96, 192, 192, 192]


def test_the_smallest_spatial_svd_of_conv1(chapter):
    assert 3 * (3 + 96) / chapter["kernels"]["conv1"].size == pytest.approx(0.11, abs=0.005)


def test_pruning_is_alike_on_trained_and_random_kernels(chapter):
    for budget, tolerance in ((0.05, 0.05), (0.1, 0.05), (0.25, 0.03), (0.4, 0.02)):
        random = errors(chapter, "random_errors", "pruning", budget).mean()
        assert errors(chapter, "trained_errors", "pruning", budget).sub(random).abs().max() < tolerance
        for method in ("CP", "Tucker-2", "spatial SVD", "tensor train"):
            gap = errors(chapter, "random_errors", method, budget).min() - errors(
                chapter, "trained_errors", method, budget
            )
            assert gap.min() > 0.1


def test_at_a_quarter(chapter):
    quarter = chapter["quarter"]
    assert quarter.loc["CP", "random"] == pytest.approx(0.76, abs=0.006)
    trained = quarter.loc["CP"].drop("random")
    assert list(trained.index) == list(chapter["kernels"]) and trained.between(0.515, 0.585).all()
    factorizations = quarter.drop("pruning")
    assert factorizations.lt(factorizations["random"], axis=0).drop(columns="random").all().all()
    assert (factorizations.drop(columns="random").idxmin() == "CP").all()
    assert (factorizations.drop("CP")[LARGE].idxmin() == "spatial SVD").all()
    assert (
        factorizations.loc["tensor train", LARGE] > factorizations.loc[["Tucker-2", "spatial SVD"], LARGE].max()
    ).all()
    assert (quarter.loc["CP", LARGE] - quarter.loc["pruning", LARGE]).abs().max() < 0.035


def test_orders_at_other_sizes(chapter):
    for budget in (0.05, 0.1):
        others = [
            errors(chapter, "trained_errors", method, budget) for method in ("spatial SVD", "tensor train", "pruning")
        ]
        cp, tucker = (errors(chapter, "trained_errors", method, budget) for method in ("CP", "Tucker-2"))
        assert (cp < tucker).all() and all((tucker < other).all() for other in others)
    at_40 = {name: errors(chapter, "trained_errors", name, 0.4) for name in chapter["METHODS"].values()}
    assert all((errors(chapter, "trained_errors", "pruning", 0.4) < error).all() for error in at_40.values())
    assert (at_40["CP"] < at_40["spatial SVD"]).all() and (at_40["spatial SVD"] < at_40["Tucker-2"]).all()
    assert (at_40["Tucker-2"] < at_40["tensor train"]).all()


def test_more_sweeps_lower_the_errors_by_at_most_two_hundredths(chapter):
    kernel = chapter["kernels"]["conv2"]
    for method, name in chapter["METHODS"].items():
        converged = error_curve(kernel, method, [0.25])["relative_error"][0]
        assert 0 <= chapter["quarter"].loc[name, "conv2"] - converged < 0.02


def test_separable_has_a_larger_error_than_cp(chapter):
    for budget, below in ((0.125, 0.1), (0.25, 0.25)):  # CP has no more weights there
        separable = errors(chapter, "trained_errors", "separable", budget)
        assert (separable > errors(chapter, "trained_errors", "CP", below)).all()


def test_section_3_counts(chapter):
    chains = chapter["chains"]
    assert chapter["macs_saved"][chains].between(0.74, 0.77).all()
    one, many = (chapter["table"][f"MACs per byte, batch {batch}"] for batch in (1, 32))
    assert (1 - chapter["macs_saved"]["CP"]) * many["dense"] / many["CP"] > 2  # bytes moved, CP over dense
    assert one["dense"] / one[chains].mean() < many["dense"] / many[chains].mean() / 2  # closer for one image
    assert (chapter["fixed_share"] > 0).all()


def test_designed_layers(chapter):
    shares, dense = chapter["design_shares"], 9 * 96 * 96
    expected = {
        "bottleneck, R = 38": 2 * 96 * 38 + 9 * 38**2,
        "single intra-channel": 9 * 96 + 96 * 96,
        "topological, q = 16": 9 * 96 + 16 * 96,
        "spatial bottleneck, k = 2": 4 * 96 + 96 * 96 + 4 * 96,
    }
    for name, weights in expected.items():
        pixels = 4 if name.startswith("spatial") else 1
        assert shares.loc[name].tolist() == pytest.approx([100 * weights / dense, 100 * weights / dense / pixels])


def test_running_project(chapter):
    table = chapter["project_table"]
    assert table.loc["CP", "MACs (%)"] == pytest.approx(61, abs=0.5)
    assert table.loc["spatial SVD", "MACs (%)"] == pytest.approx(38, abs=0.6)
    assert table["MACs (%)"].drop("dense").idxmin() == "spatial SVD"
    assert (table["params"].drop("dense") <= 82_944 / 4).all()
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 96)).astype("float32")
    for name, result in chapter["results"].items():
        block = blocks.from_decomposition(x.shape[1:], result, strides=2)
        np.testing.assert_allclose(block(x), chapter["project"][name](x), atol=1e-4)
        assert cost.total_costs(block)["macs"] == table.loc[name, "macs"]


def test_the_file_with_positions_is_worse_than_cp(chapter):
    exec(chapter.solutions()["07.3"], chapter.variables)
    for name in LARGE:
        error = chapter["pruning_error_of_file"](chapter["kernels"][name], 0.25, 16)
        assert error > chapter["quarter"].loc["CP", name]


def test_exercises(check_exercises):
    check_exercises(WRONG)
