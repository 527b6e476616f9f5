"""Chapter 19, longer and wider: the numbers in its text, from the records, and its exercises."""

import keras
import numpy as np
import pandas as pd
import pytest

from fcnn_utils import cost
from fcnn_utils.course import networks
from fcnn_utils.course.data import cifar100

CHAPTER = "19"
WRONG = {
    "19.1": [130, (256 * 9) / 521, 67840 / 512],
    "19.2": [
        lambda macs, images, budget: budget / (3 * macs * images),
        lambda macs, images, budget: int(budget // (macs * images)),
        lambda macs, images, budget: round(budget / (3 * macs * images)),
    ],
    "19.3": [
        lambda table, costs: set(table.index) - {table["top1"].idxmax()},
        lambda table, costs: _worse(table, costs, "gt"),
        lambda table, costs: _worse(table, costs, "ge"),
    ],
}
pytestmark = pytest.mark.skipif(cifar100.find() is None, reason="CIFAR-100 is not on this machine")


def _worse(table, costs, compare):
    """Networks with another that is at most as expensive and more accurate, or as accurate: itself, too."""
    found = set()
    for name, own in table.iterrows():
        cheaper = (table[costs] <= own[costs]).all(axis=1)
        if (cheaper & getattr(table["top1"], compare)(own["top1"])).any():
            found.add(name)
    return found


def test_macs_by_hand_are_those_of_the_layers(chapter):
    for by_hand, y in chapter["ways"].values():
        assert cost.total_costs(keras.Model(chapter["x"], y))["macs"] == 64 * by_hand


@pytest.mark.parametrize(("name", "stated"), [("wrn-40-4", 8.9e6), ("wrn-16-8", 11.0e6), ("wrn-28-10", 36.5e6)])
def test_wide_residual_networks_have_the_published_size(name, stated):
    """Zagoruyko & Komodakis 2016, table 4, for ten classes."""
    assert round(cost.total_costs(networks.build(name, classes=10))["trainable"], -5) == stated


def test_front_by_hand(chapter):
    table = pd.DataFrame({"cost": [1, 2, 3, 4], "top1": [50, 60, 55, 61]}, index=list("abcd"))
    assert chapter["front"](table, "cost") == ["a", "b", "d"]


def test_fronts_are_as_the_text_says(chapter):
    table, front = chapter["table"], chapter["front"]
    assert set(chapter["compared"]) == set(table.index)
    assert "xception" in front(table, "macs") and "xception" not in front(table, "ms")
    assert table["top1"].idxmin() == "simple_cp"
    assert table.loc[["inception", "xception"], "top1"].min() > 61
    for cost_name in ("params", "macs", "ms"):
        assert not {"simple", "wider_factorized"} & set(front(table, cost_name))
    assert (table["seeds"] <= 2).sum() > len(table) / 2


def test_noise_of_one_run(chapter):
    one = chapter["noise"][chapter["table"]["seeds"] == 1]
    assert one.mean() == pytest.approx(0.8, abs=0.1)
    often = chapter["often"]
    thinner = {"deeper_dense-width0.3333", "deeper_separable-width0.3333", "deeper_tucker-width0.79"}
    assert often.get("simple", 0) < 5 and often.get("wider_factorized", 0) < 5
    sure = {name for name in often.index if often[name] > 80}
    assert sure == {*thinner, "deeper_dense", "deeper_separable"}


def test_longer_trainings(chapter):
    longer = chapter["longer"].set_index(["kind", "epochs"])
    top1, training = longer["top1"], longer["training"]
    for kind in ("deeper_dense", "deeper_separable"):
        assert top1[kind, 20] - top1[kind, 5] == pytest.approx(8, abs=0.5)
    assert 0 < top1["deeper_separable", 60] - top1["deeper_separable", 20] < 2
    choice = chapter["choice"].set_index(["network", "epochs"])
    whole = choice.loc[("deeper_separable", 5)]
    assert abs(top1["deeper_separable", 20] - whole["top1"]) < 1
    assert training["deeper_separable", 20] < 0.5 * whole["training"]
    assert longer["ms"]["deeper_separable", 20] < whole["ms"] / 5
    dense = choice.loc[("deeper_dense", 5)]
    assert dense["top1"] - top1["deeper_dense", 20] == pytest.approx(2, abs=0.5)
    assert training["deeper_dense", 20] < 0.5 * dense["training"]
    assert np.round(training["deeper_separable", 20]) == 61 and np.round(whole["training"]) == 128


def test_exercises(check_exercises):
    check_exercises(WRONG)
