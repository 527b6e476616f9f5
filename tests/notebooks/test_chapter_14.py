"""Chapter 14, what did factorizing buy?: the statements in its text, from the records, and its exercises."""

import numpy as np
import pytest

from fcnn_utils.course import networks, records, thesis

CHAPTER = "14"
WRONG = {
    "14.1": [25, 2_500, 500],
    "14.2": [
        lambda costs, accuracies: {min(costs, key=costs.get)},
        lambda costs, accuracies: {
            name
            for name in costs
            if not any(
                costs[one] <= costs[name] and accuracies[one] >= accuracies[name] for one in costs if one != name
            )
        },
        lambda costs, accuracies: set(costs),
        lambda costs, accuracies: {max(costs, key=lambda name: accuracies[name] / costs[name])},
        lambda costs, accuracies: {
            name
            for name in costs
            if not any(costs[one] <= costs[name] and accuracies[one] > accuracies[name] for one in costs)
        },
    ],
    "14.3": [9.8, 19, 14],
}


def top1(name, recipe="faster"):
    """dict seed -> test accuracy in percent, read without the library's comparison."""
    found = records.find("cifar100", name, recipe)
    return {record["seed"]: 100 * record["test"]["top1"] for record in found["record"]}


def paired(first, second, recipe="faster"):
    one, other = top1(first, recipe), top1(second, recipe)
    return np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def test_inferred_recipe_is_within_three_points_and_has_another_order(chapter):
    table = chapter["top1"]
    assert (table["inferred recipe"] - table["thesis"]).abs().max() < 3
    order = table.loc[["simple", "wider, factorized"]]
    assert order["thesis"].is_monotonic_decreasing and not order["inferred recipe"].is_monotonic_decreasing
    assert (table["faster"] - table["thesis"]).min() > 25
    assert table["seeds"].tolist() == [len(top1(name)) for name in networks.THESIS_PLANS]


def test_curves_of_the_better_recipe_are_ahead_after_every_epoch_and_most_after_the_last(chapter):
    for ours, theirs in chapter["right"].values():
        ahead = ours["top1"] - theirs["top1"]
        assert ahead.min() > 0 and ahead.idxmax() == 4
    for ours, theirs in chapter["left"].values():
        assert (ours["top1"] - theirs["top1"]).abs().max() < 0.025


def test_accuracies_of_the_thesis_are_whole_numbers_of_images():
    for name in networks.THESIS_PLANS:
        counts = [thesis.test(name)["top1"] * images for images in (9_984, 9_968)]
        assert any(abs(count - round(count)) < 1e-6 for count in counts)


def test_records_carry_two_statements_against_the_simple_network(chapter):
    table = chapter["against_simple"]
    decided = table[table["verdict"].isin(["better", "worse"])]["verdict"].to_dict()
    assert decided == {"deeper_dense": "better", "wider_separable": "worse"}
    for name, row in table.iterrows():
        differences = paired(name, "simple")
        assert row["pairs"] == len(differences) and row["difference"] == pytest.approx(differences.mean())
        if len(differences) > 1:
            t = {2: 12.7062, 3: 4.30265}[len(differences)]
            half = t * differences.std(ddof=1) / len(differences) ** 0.5
            assert row["low"] == pytest.approx(differences.mean() - half, abs=1e-3)
    assert round(table.loc["deeper_separable", "difference"], 1) == 3.2
    machines = {record["device"][:3] for record in chapter["full_width"]["record"]}
    assert machines == {"GPU", "CPU"}


def test_pairs_of_our_dense_network_compare_two_machines(chapter):
    alike = chapter["against_simple"]["alike"]
    assert alike["deeper_dense"] == alike["deeper_separable"] == 0 and alike["deeper_tucker"] == 2
    on_cpu = [record for record in chapter["runs"]["simple"] if record["device"].startswith("CPU")]
    assert len(on_cpu) == 1 and 100 * on_cpu[0]["test"]["top1"] == pytest.approx(60.3, abs=0.05)
    assert pytest.approx(0.4, abs=0.01) == 1 - 0.95**10
    half = 1.96 * 0.5 * (1 / 2 + 1 / 3) ** 0.5  # two seeds against three, the deviation of chapter 12
    assert 0.85 < half < 1.05


def test_fixed_topology_compares_with_the_dense_network(chapter):
    fixed = chapter["fixed"]
    assert list(fixed.index) == [f"wider_{kind}-width0.5" for kind in ("dense", "factorized", "separable")]
    macs = fixed["million MACs"] / fixed["million MACs"].iloc[0]
    assert 1.8 < macs.iloc[1] < 2 and 0.5 < macs.iloc[2] < 0.6
    assert fixed["n"].iloc[0] >= 1
    for name, row in fixed.iloc[1:].iterrows():
        differences = paired(name, "wider_dense-width0.5", "muon")
        expected = ["not trained yet", "one seed: no interval"][len(differences)] if len(differences) < 2 else ""
        assert row["verdict"] == expected or (not expected and row["verdict"] in ("better", "worse", "not decided"))
        if len(differences):
            assert row["difference"] == pytest.approx(differences.mean()) and row["pairs"] == len(differences)


def test_equal_cost_is_within_12_percent(chapter):
    equal = chapter["equal"]
    for what, column in {"parameters": "million parameters", "MACs": "million MACs", "time": "ms per image"}.items():
        rows = equal.loc[f"equal {what}"]
        assert (rows[column] / rows.loc["simple", column] - 1).abs().max() < 0.12
    assert equal["n"].between(2, 3).all()


def test_statements_at_equal_cost(chapter):
    thin = "simple-width0.6"
    factorized, separable = paired("wider_factorized-width0.54", thin), paired("wider_separable-width0.735", thin)
    tucker, at_macs = paired("deeper_tucker-width0.79", thin), paired("wider_separable", thin)
    assert (factorized < 0).all() and (separable < 0).all() and (tucker > 0).all() and abs(at_macs.mean()) < 0.5
    assert len(factorized) == len(separable) == len(tucker) == len(at_macs) == 2
    equal = chapter["equal"]
    carried = (equal["low"] * equal["high"] > 0) & equal["difference"].ne(0)
    assert {name for _, name in equal.index[carried]} == {"wider, factorized"}
    at_equal_macs = equal.loc["equal MACs"]
    more = at_equal_macs.loc["wider, separable"] / at_equal_macs.loc["simple"]
    assert 1.8 < more["million parameters"] < 2 and more["ms per image"] > 1.3


def test_deeper_plan_and_its_control(chapter):
    table = chapter["against_dense"]
    assert (table["verdict"] == "not decided").all()
    assert table.loc["deeper_separable", "difference"] == pytest.approx(0.96, abs=0.005)
    assert (paired("deeper_tucker", "deeper_dense") < -1.5).all()
    assert table.loc["deeper_tucker", "difference"] == pytest.approx(-2.35, abs=0.005)
    stages = {name: each / each.sum() for name, each in chapter["stages"].items()}
    assert all(each[8] > 1.7 * stages["simple"][8] for name, each in stages.items() if name != "simple")
    costs = chapter["costs"]
    assert 0.5 < costs.loc["deeper_dense", "macs"] / costs.loc["simple", "macs"] < 0.55
    for column in ("params", "macs", "ms"):
        assert costs.loc["deeper_dense", column] < costs.loc["simple", column]


def test_three_statements_contradict_the_thesis_own_table(chapter):
    conclusions = chapter["conclusions"]
    assert conclusions["by its own table"].tolist() == [True, False, False, False, True]
    assert conclusions["by ours"].tolist() == [True, False, False, False, True]
    theirs = {name: thesis.test(name)["top1"] for name in networks.THESIS_PLANS}
    assert round(theirs["simple"] - theirs["wider_separable"], 2) == 0.04
    assert round(theirs["simple"] / theirs["wider_separable"], 2) == 1.14
    ms = chapter["parts"]["ms"]
    assert [round(ms[name]) for name in ("wider_factorized", "wider_dense", "simple")] == [25, 16, 19]


def test_numbers_of_the_summary(chapter):
    ms, row = chapter["parts"]["ms"], chapter["against_simple"].loc["wider_separable"]
    assert ms["wider_separable"] / ms["simple"] == pytest.approx(2 / 3, abs=0.05)
    assert [round(row[column], 1) for column in ("difference", "low", "high")] == [-4.5, -7.3, -1.6]
    assert row["pairs"] == 3
    ratio = ms["deeper_separable"] / ms["deeper_dense"]
    assert round(ratio, 1) == 1.4
    tuned, scratch = top1("simple-cp-4.5x", "tune"), top1("simple-cp-4.5x-scratch", "fast")
    assert round(np.mean(list(tuned.values())), 1) == 56.6 and round(np.mean(list(scratch.values())), 1) == 49.2


def test_exercises(check_exercises):
    check_exercises(WRONG)
