"""Chapter 13, where does the time go?: the numbers in its text, from the records, and its exercises."""

import numpy as np
import pytest

from fcnn_utils.course import exercises, networks, profiling

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
        lambda works, rounds, warmup, clock: _in_turn(works, rounds, warmup, clock, np.median),
        lambda works, rounds, warmup, clock: _in_turn(works, rounds, warmup, clock, lambda each: each[-1]),
        lambda works, rounds, warmup, clock: _in_turn(works, rounds + warmup, 0, clock, min),
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
    assert measured["device"].startswith("CPU") and measured["batch_size"] == 64 and measured["rounds"] >= 5
    assert parts["background_load"].max() < 0.05
    assert np.allclose(parts[profiling.PARTS].sum(axis=1), parts["ms"])
    assert set(parts.index) == {"wider_dense", *networks.THESIS_PLANS, *networks.OUR_PLANS}


def test_parts_of_a_step(chapter):
    share, parts = chapter["share"], chapter["parts"]
    assert share["input"].min() > 0.005 and share["input"].max() < 0.025
    assert (share["forward"] + share["backward"]).min() > 0.5
    assert share["normalisation"].idxmax() == "wider_separable" and share["normalisation"].max() == pytest.approx(
        1 / 3, abs=0.02
    )
    ms = parts["normalisation"]
    assert 0.8 < ms["wider_separable"] / ms["wider_dense"] < 1
    convolutions = parts["forward"] + parts["backward"]
    assert convolutions["wider_separable"] / convolutions["wider_dense"] == pytest.approx(2 / 3, abs=0.03)
    ratio = convolutions / parts["forward"]
    assert round(ratio.min(), 1) == 3.4 and round(ratio.max(), 1) == 4.2


def test_macs_and_time_on_the_cpu(chapter):
    cpu = chapter["cpu"]
    assert (cpu.index[0], cpu.index[-1]) == ("wider_separable", "wider_factorized")
    macs, ms = cpu.iloc[-1] / cpu.iloc[0]
    assert round(macs, 1) == 3.4 and 1.9 < ms < 2.2
    macs, ms = cpu.loc["deeper_dense"] / cpu.loc["wider_separable"]
    assert 1.45 < macs < 1.52 and abs(ms - 1) < 0.02


def test_times_on_the_gpu_are_those_of_a_busy_machine(chapter):
    gpu, runs = chapter["gpu"], chapter["on_gpu"]
    assert gpu["background_load"].min() > 0.2 and len(runs) == 8
    times = gpu.groupby("model")["ms_per_step"]
    assert 2.9 < (times.max() / times.min()).max() < 3.1
    started = [record["date"][:15] for record in runs]  # to ten minutes
    assert len(set(started)) == 1
    (separable,) = [r for r in runs if r["model"] == "wider_separable" and r["seed"] == 2]
    steps = [(epoch["background_load"], epoch["ms_per_step"]) for epoch in separable["epochs"]]
    assert steps == sorted(steps, reverse=True) and steps[0][1] > 2.9 * steps[-1][1]


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


def test_comparison_may_reverse_the_order_of_every_other_round():
    def compare_times(works, rounds, warmup, clock):
        found = {name: [] for name in works}
        for number in range(warmup + rounds):
            for name in sorted(works, reverse=number % 2):
                start = clock()
                works[name]()
                found[name].append(clock() - start)
        return {name: min(each[warmup:]) for name, each in found.items()}

    assert exercises.verdict("13.4", compare_times) == "right"


def test_exercises(check_exercises):
    check_exercises(WRONG)
