"""Chapter 17, ranks and budgets: the numbers in its text, from the records, and its exercises."""

import itertools

import numpy as np
import pytest

from fcnn_utils import cost
from fcnn_utils.course.data import cifar100

CHAPTER = "17"
WRONG = {
    "17.1": [[10, 50, 0.7], [30, 50, 0.3], [30, 20]],
    "17.2": [
        lambda p, q: (q * (np.log(q + 1e-300) - np.log(np.maximum(p, 1e-12)))).sum(axis=1).mean(),
        lambda p, q: (np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0)).sum(),
        lambda p, q: (np.where(p > 0, p * np.log2(np.where(p > 0, p, 1) / q), 0)).sum(axis=1).mean(),
    ],
    "17.3": [
        lambda options, budget: {layer: 0 for layer in options},
        lambda options, budget: {layer: int(np.argmin([row[1] for row in rows])) for layer, rows in options.items()},
        lambda options, budget: _best(options, budget, lambda spent: spent < budget),
        lambda options, budget: _greedy(options, budget),
    ],
}
pytestmark = pytest.mark.skipif(cifar100.find() is None, reason="CIFAR-100 is not on this machine")


def _best(options, budget, fits):
    plans = itertools.product(*(range(len(rows)) for rows in options.values()))
    plans = [dict(zip(options, plan, strict=True)) for plan in plans]
    sums = [np.sum([options[layer][n] for layer, n in plan.items()], axis=0) for plan in plans]
    loss = [loss if fits(spent) else np.inf for spent, loss in sums]
    return plans[int(np.argmin(loss))]


def _greedy(options, budget):
    """Give each layer in turn the largest size that still leaves room for the cheapest sizes of the others."""
    plan, left = {}, budget - sum(min(row[0] for row in rows) for rows in options.values())
    for layer, rows in options.items():
        least = min(row[0] for row in rows)
        fitting = [n for n, row in enumerate(rows) if row[0] - least <= left]
        plan[layer] = max(fitting, key=lambda n, rows=rows: rows[n][0])
        left -= rows[plan[layer]][0] - least
    return plan


def test_layers_differ_in_the_outputs_more_than_in_their_kernels(chapter):
    curves = chapter["curves"].pivot(index="fraction", columns="layer", values=["error", "loss"])
    ratio = {column: curves[column].max(axis=1) / curves[column].min(axis=1) for column in ("error", "loss")}
    assert ratio["error"].max() < 1.2 and ratio["loss"].min() > 3


def test_exact_plan_is_at_least_as_good_as_that_by_price(chapter):
    budget, sums = chapter["budget"], {}
    for name in ("by_hand", "exact"):
        plan = chapter[name]
        assert set(plan) == set(chapter["layers"])
        sums[name] = sum(choice["loss"] for choice in plan.values())
        assert sum(choice["macs"] for choice in plan.values()) <= budget
    assert sums["exact"] <= sums["by_hand"] <= 1.05 * sums["exact"]
    macs = cost.total_costs(chapter["dense"])["macs"]
    assert budget + chapter["others"] == pytest.approx(macs / 4.5)


def test_sensitivity_gains_less_after_the_correction(chapter):
    gain = chapter["gain"]
    assert len(gain) == 3 and (gain > 0).all(axis=None)
    assert [round(gain[step].mean(), 1) for step in ("swapped in", "corrected")] == [1.1, 0.2]
    error = gain.sem() * 4.30  # Student's t for 2 degrees of freedom
    assert (gain.mean() - error)["corrected"] < 0 < (gain.mean() - error)["statistics"]


def test_auto_is_as_good_as_the_best_single_method(chapter):
    methods = chapter["methods"]
    assert methods.groupby(["times", "method"]).size().eq(3).all()
    loss = methods.groupby(["times", "method"])["divergence"].mean().unstack()
    single = loss.drop(columns="auto")
    assert (single.idxmin(axis=1) == "cp").all() and (loss["auto"] / loss["cp"]).between(0.9, 1.05).all()
    top1 = methods.groupby(["times", "method"])["top1"].mean().unstack()
    assert (top1["auto"] - top1["cp"])[[4, 8]].between(-0.45, -0.25).all()
    assert top1.loc[8, "spatial"] < top1.loc[8, "cp"] - 3 and 0.4 < top1.loc[8, "svd"] / 56.5 < 0.6


def test_ranks_that_are_multiples_of_16_are_almost_twice_as_fast(chapter):
    table = chapter["by_time"]
    ms, macs = table["median_ms"], table["MMACs"].drop("dense")
    assert table["background_load"].max() < 0.1 and macs.max() / macs.min() < 1.005
    assert table.loc[["by time", "by MACs, ranks × 16"], "speedup"].between(2.9, 3.15).all()
    assert 1.75 < ms["by MACs, any ranks"] / ms["by MACs, ranks × 16"] < 2.05


def test_only_onnx_runtime_minds_ranks_that_are_not_multiples_of_4(chapter):
    table = chapter["alignment"]
    assert table["background_load"].max() < 0.1 and table["engine"].nunique() == 4
    for engine, rows in table.groupby("engine"):
        rank, ms = rows["channels"], rows["median_ms"] / rows["median_ms"].iloc[0]
        others, multiples = ms[rank % 4 != 0], ms[rank % 4 == 0]
        ratio = others.mean() / multiples.mean()
        assert 1.3 < ratio < 1.5 if engine == "onnxruntime" else ratio < 1.05


def test_exercises(check_exercises):
    check_exercises(WRONG)
