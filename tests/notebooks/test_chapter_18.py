"""Chapter 18, factorize, prune or quantise?: the numbers in its text, from the records, and its exercises."""

import numpy as np
import pytest

from fcnn_utils.course import pruning
from fcnn_utils.course.data import cifar100

CHAPTER = "18"
WRONG = {
    "18.1": [[1 / 4.5, 1 - 1 / 4.5], [0.53, 0.47], 0.47],
    "18.2": [
        lambda kernel, norm, after, count: _pair(kernel, norm, after, np.arange(count)),
        lambda kernel, norm, after, count: _pair(kernel, norm, after, _largest(kernel)[:count]),
        lambda kernel, norm, after, count: _pair(kernel, norm, after, np.sort(_largest(kernel)[-count:])),
        lambda kernel, norm, after, count: (kernel, norm, after),
    ],
    "18.3": [
        lambda points: {max(points, key=lambda name: points[name][1])},
        lambda points: set(points),
        lambda points: {a for a, p in points.items() if not any(q[1] > p[1] for q in points.values())},
    ],
}
pytestmark = pytest.mark.skipif(cifar100.find() is None, reason="CIFAR-100 is not on this machine")


def _largest(kernel):
    return np.argsort(-np.abs(kernel).sum(axis=(0, 1, 2)))


def _pair(kernel, norm, after, kept):
    return kernel[..., kept], [values[kept] for values in norm], after[:, :, kept]


def test_pruning_by_hand_is_that_of_the_library(chapter):
    dense, kept = chapter["dense"], chapter["kept"]
    importance = pruning._importance(dense, pruning._convolutions(dense), "l1", None)["conv4"]
    assert np.allclose(importance, chapter["importance"], rtol=1e-5) and len(kept) == 96


def test_factorized_networks_lose_less_than_pruned_ones_without_training(chapter):
    top1 = chapter["untrained"].groupby(["times", "method"])["top1"].mean().unstack()
    pruned = top1[list(chapter["CRITERIA"])].max(axis=1)
    assert list(top1.index) == [2, 4, 8] and chapter["untrained"].groupby(["times", "method"]).size().eq(3).all()
    assert (top1[["auto", "cp"]].min(axis=1) > pruned + 2).all()


def test_pruned_network_stays_behind_after_an_epoch(chapter):
    trained = chapter["trained"]
    top1, macs = trained["top-1 (%)"], trained["million MACs"]
    assert (trained["seeds"].iloc[:3] == 3).all() and (trained["seeds"].iloc[3:] == 1).all()
    assert top1["CP, tuned"] - top1["pruned, tuned"] == pytest.approx(6, abs=0.3)
    assert round(macs["pruned, tuned"]) == 72 and round(macs["CP, tuned"]) == round(macs["thinner, from scratch"]) == 63


def test_int8_keeps_the_accuracy_and_its_time_depends_on_the_engine(chapter):
    files = chapter["files"].set_index(["engine", "model"])
    assert files["background_load"].max() < 0.1
    for name in ("dense", "CP, tuned", "pruned, tuned"):
        for engine in ("onnxruntime", "litert"):
            exact, small = files.loc[(engine, name)], files.loc[(engine, f"{name}, int8")]
            assert abs(exact["top1"] - small["top1"]) < 0.6
            assert (small["median_ms"] > exact["median_ms"]) == (engine == "onnxruntime")
    litert = files.loc["litert", "median_ms"]
    assert litert["CP, tuned, int8"] < litert["dense, int8"] < litert["CP, tuned"] < litert["dense"]


def test_network_trained_for_long_loses_what_the_text_says(chapter):
    rows = chapter["long_trained"]
    lost = rows.loc[(1, "dense"), "top1"] - rows["top1"].unstack("method").drop(1)  # (times, methods)
    assert list(lost.index) == [2, 4, 8] and lost.loc[2, "cp"] == pytest.approx(0.2, abs=0.05)
    assert lost.loc[4, ["auto", "cp"]].between(2.5, 3.5).all()
    assert lost.loc[4, ["tucker", "spatial"]].between(7, 8.5).all()
    assert 17.3 < lost.loc[8].min() < 18
    assert (lost["pruned"] - lost.drop(columns="pruned").max(axis=1)).min() > 10
    used = rows["macs"] * rows.index.get_level_values("times") / rows.loc[(1, "dense"), "macs"]
    assert used.between(0.93, 1).all()


def test_thin_network_from_scratch_has_the_accuracy_of_the_text(chapter):
    thin = chapter["thin"]
    assert f"{thin['test']['top1']:.1%}" in chapter.text and len(thin["epochs"]) == 30
    assert chapter["long_trained"].loc[(4, "auto"), "macs"] == pytest.approx(thin["macs"], rel=0.05)


def test_exercises(check_exercises):
    check_exercises(WRONG)
