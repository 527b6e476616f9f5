"""Chapter 13, where does the time go?: the numbers in its text, from the records, and its exercises."""

import numpy as np

from fcnn_utils.course import networks, profiling

CHAPTER = "13"
PARAMETERS = {"ROUNDS": 1, "TIMED_STEPS": 1}
WRONG = {
    "13.1": [[0.13, 0], [3, 0.1], [0.1, 4]],
    "13.2": [
        lambda values, times: np.log(times[-1] / times[0]) / np.log(values[-1] / values[0]),
        lambda values, times: np.polyfit(values, times, 1)[0],
    ],
    "13.3": [[4, 2], [1.6, 4], 1.6],
    "13.4": [
        lambda works, rounds, warmup, clock: dict.fromkeys(works, 1.0),
        lambda works, rounds, warmup, clock: _one_after_another(works, rounds, warmup, clock),
        lambda works, rounds, warmup, clock: _in_turn(works, rounds, warmup, clock, np.mean),
    ],
}


def _one_after_another(works, rounds, warmup, clock):
    return {name: _in_turn({name: work}, rounds, warmup, clock, min)[name] for name, work in works.items()}


def _in_turn(works, rounds, warmup, clock, choose):
    found = {name: [] for name in works}
    for _ in range(warmup + rounds):
        for name, work in works.items():
            start = clock()
            work()
            found[name].append(clock() - start)
    return {name: choose(each[warmup:]) for name, each in found.items()}


def test_record_is_of_a_quiet_cpu_in_float32(chapter):
    measured, parts = chapter["measured"], chapter["parts"]
    assert measured["device"].startswith("CPU") and measured["batch_size"] == 64 and measured["settings"] == {}
    assert parts["background_load"].max() < 0.05
    assert np.allclose(parts[profiling.PARTS].sum(axis=1), parts["ms"])
    assert set(parts.index) == {"wider_dense", *networks.THESIS_PLANS, *networks.OUR_PLANS}


def test_parts_of_a_step(chapter):
    share, parts = chapter["share"], chapter["parts"]
    assert share["input"].max() < 0.02
    assert (share["forward"] + share["backward"]).min() > 0.5
    assert share["normalisation"].idxmax() == "wider_separable"
    ms = parts["normalisation"]
    assert abs(ms["wider_separable"] / ms["wider_dense"] - 1) < 0.05
    convolutions = parts["forward"] + parts["backward"]
    assert convolutions["wider_separable"] < 0.7 * convolutions["wider_dense"]


def test_macs_and_time(chapter):
    cpu, gpu, runs = chapter["cpu"], chapter["gpu"], chapter["runs"]
    for table, low, high in ((cpu, 1.75, 1.84), (gpu, 1.0, 1.1)):
        cheap, dear = table["macs"].idxmin(), table["macs"].idxmax()
        assert (cheap, dear) == ("wider_separable", "wider_factorized")
        assert round(table["macs"][dear] / table["macs"][cheap], 1) == 3.4
        assert low < table["ms"][dear] / table["ms"][cheap] < high
    assert cpu["ms"]["deeper_separable"] / cpu["ms"]["deeper_dense"] > 1.33
    assert cpu["macs"]["deeper_separable"] / cpu["macs"]["deeper_dense"] < 1.15
    same = runs.loc[runs["model"] == "wider_separable", "ms"]
    assert len(same) == 3 and same.max() - same.min() > gpu["ms"].max() - gpu["ms"].min()
    assert 1 <= runs.groupby("model").size().min() and runs.groupby("model").size().max() == 3


def test_growth_is_slower_than_the_macs(chapter):
    exponents = chapter["exponents"]
    assert (exponents["time"] < exponents["macs"]).all(axis=None)
    assert (exponents["time"]["width"] < exponents["time"]["size"]).all()
    growth = chapter["growth"]
    ms = growth[growth["varied"] == "batch"].pivot(index="model", columns="value", values="ms")
    assert (ms[1] > 2.5 * ms[16]).all() and (ms[[16, 64, 128]].max(axis=1) < 1.2 * ms[[16, 64, 128]].min(axis=1)).all()


def test_roofline_has_all_layers_of_both_networks(chapter):
    tables, ridge = chapter["tables"], chapter["peak"] / chapter["bandwidth"]
    assert [len(table) for table in tables.values()] == [9, 6]
    separable = tables[networks.TITLES["wider_separable"]]
    first = separable[separable["kind"] == "SeparableConv2D"]["intensity"].min()
    assert first < 1 and ridge > 1


def test_exercises(check_exercises):
    check_exercises(WRONG)
