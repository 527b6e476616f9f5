"""Latencies and the roofline: `fcnn_utils.benchmark`. Sizes are small: what a machine does in CI is not its speed."""

import time

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import benchmark, cost, deploy
from fcnn_utils.course import networks


def small(width=0.05):
    return networks.build("simple", (8, 8, 3), 5, width=width)


class Clock:
    """A processor on which each image of a model takes a fixed time, and everything gets slower as it goes."""

    def __init__(self, monkeypatch, milliseconds, growth=0.0):
        self.now, self.calls, self.growth = 0.0, [], growth
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(deploy, "load", lambda model, *_, **__: self.runner(model, milliseconds[model.name]))

    def runner(self, model, milliseconds):
        def run(images):
            self.calls.append(model.name)
            self.now += 1e-3 * milliseconds * len(images) * (1 + self.growth * len(self.calls))

        return run


# --- basic -------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused():
    for arguments, said in (
        ({"batch": 0}, "batch must be a whole number between 1 and"),
        ({"rounds": 1}, "rounds must be a whole number between 2 and"),
        ({"engine": "tensorrt"}, "engine must be one of keras"),
    ):
        with pytest.raises(ValueError, match=said):
            benchmark.latency(small(), **arguments)
    with pytest.raises(ValueError, match="give at least one model to time"):
        benchmark.latency({})
    with pytest.raises(ValueError, match="models must be built keras.Models; 'a' is a str"):
        benchmark.latency({"a": "simple"})
    with pytest.raises(ValueError, match=r"one fixed size; got \(16, 16, 3\), \(8, 8, 3\)"):
        benchmark.latency({"a": small(), "b": networks.build("simple", (16, 16, 3), 5, width=0.05)})
    inputs = keras.Input((None, None, 3))
    with pytest.raises(ValueError, match="one fixed size"):
        benchmark.latency(keras.Model(inputs, layers.Conv2D(2, 3)(inputs)))
    with pytest.raises(ValueError, match="give at least one size of batch"):
        benchmark.latency(small(), [])
    with pytest.raises(ValueError, match="batch must be a whole number"):
        benchmark.roofline(small(), 0)
    with pytest.raises(ValueError, match="repeats must be a whole number between 1 and"):
        benchmark.roofline(small(), repeats=0)
    with pytest.raises(ValueError, match="model 'idle' has no layer with MACs"):
        benchmark.roofline(keras.Model(inputs := keras.Input((8, 8, 3)), layers.ReLU()(inputs), name="idle"))
    with pytest.raises(ValueError, match="peak must be a number between 1 and"):
        benchmark.roofline(small(), peak=0)


def test_a_model_alone():
    table = benchmark.latency(small(), 2, rounds=3)
    assert table["model"].tolist() == ["simple"] and (table["speedup"] == 1).all()
    assert table["low_ms"][0] <= table["median_ms"][0] <= table["high_ms"][0] and table["low_ms"][0] > 0


# --- correct -----------------------------------------------------------------------------------------------------


def test_times_and_speedups_of_a_known_clock(monkeypatch):
    clock = Clock(monkeypatch, {"dense": 8.0, "half": 4.0})
    pair = {name: keras.Model.from_config(small().get_config() | {"name": name}) for name in ("dense", "half")}
    table = benchmark.latency(pair, 16, rounds=5).set_index("model")
    assert table.loc["dense", ["median_ms", "low_ms", "high_ms"]].tolist() == pytest.approx([128.0] * 3)
    assert table.loc["half", ["speedup", "speedup_low", "speedup_high"]].tolist() == pytest.approx([2.0] * 3)
    assert clock.calls == ["dense"] * 3 + ["half"] * 3 + ["dense", "half"] * 6  # in turn, a round not counted


def test_a_machine_that_slows_down_meets_all_alike(monkeypatch):
    """Tenfold slower at the end: the median times say little, the ratio is kept."""
    Clock(monkeypatch, {"dense": 8.0, "half": 4.0}, growth=0.1)
    pair = {name: keras.Model.from_config(small().get_config() | {"name": name}) for name in ("dense", "half")}
    table = benchmark.latency(pair, rounds=40).set_index("model")
    moments = 8 * (1 + 0.1 * np.arange(9, 89, 2))  # of the counted calls of the first, after 3 + 3 and a round
    quartiles = table.loc["dense", ["low_ms", "median_ms", "high_ms"]].astype(float)
    assert quartiles.tolist() == pytest.approx(np.percentile(moments, [25, 50, 75]))
    assert table.loc["half", "speedup"] == pytest.approx(2.0, rel=0.05)
    ratios = np.sort(2 * moments / (moments + 0.8))
    low, high = table.loc["half", ["speedup_low", "speedup_high"]]
    assert ratios[11] < low < table.loc["half", "speedup"] < high < ratios[28]  # the medians' extremes lie outside


@pytest.mark.timed
@pytest.mark.parametrize("engine", deploy.ENGINES)
def test_every_engine_that_is_there_is_timed(engine):
    if engine not in deploy.available() or (engine != "keras" and keras.config.backend() != "tensorflow"):
        pytest.skip(f"{engine} is not installed, or not exported to from this backend")
    table = benchmark.latency({"wide": small(1.0), "narrow": small(0.1)}, 8, engine, rounds=3)
    assert table["engine"].unique().tolist() == [engine] and (table["median_ms"] > 0).all()
    assert table["speedup"][1] > 1 and 0 <= table["background_load"][0] <= 1


def test_a_process_of_its_own_has_the_environment():
    """Its clock is real, its environment the one asked for: a backend that it can't start on is told."""
    pair = {"wide": small(0.1), "01": small()}
    table = benchmark.latency(pair, [1, 2], rounds=2, environment={"TF_NUM_INTRAOP_THREADS": "1"})
    assert table["model"].tolist() == ["wide", "01"] * 2 and table["batch"].tolist() == [1, 1, 2, 2]
    assert table.columns.tolist() == [*benchmark.COLUMNS, "background_load"] and (table["median_ms"] > 0).all()
    with pytest.raises(RuntimeError, match="measuring under .*KERAS_BACKEND.* failed: .*nonesuch"):
        benchmark.latency(pair, rounds=2, environment={"KERAS_BACKEND": "nonesuch"})
    with pytest.raises(ValueError, match="environment must be a dict of strings"):
        benchmark.latency(pair, rounds=2, environment={"TF_NUM_INTRAOP_THREADS": 0})


def test_the_machines_peaks_by_a_known_clock(monkeypatch):
    """Two milliseconds for whatever is computed: once the first two calls, which may compile, have passed."""
    moments = iter(np.cumsum(([0.0, 9.0] + [0.0, 9.0] + [1.0, 2e-3, 1.0, 5e-3]) * 2))
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    assert benchmark.gemm_peak(256, 2) == pytest.approx(256**3 / 2e-3)
    assert benchmark.memory_bandwidth(8, 2) == pytest.approx(3 * 8 * 2**20 / 2e-3)


def test_the_roofline_by_hand():
    inputs = keras.Input((4, 6, 8))
    x = layers.Conv2D(16, 3, padding="same", name="conv")(inputs)
    x = layers.ReLU()(layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x))
    model = keras.Model(inputs, x)
    table = benchmark.roofline(model, 10, peak=1e6, bytes_per_second=4e5, repeats=2).set_index("layer")
    assert table["macs"].to_dict() == {"conv": 10 * 24 * 9 * 8 * 16, "depthwise": 10 * 24 * 9 * 16}
    assert table["bytes"].to_dict() == {
        "conv": 4 * (10 * 24 * (8 + 16) + 9 * 8 * 16 + 16),
        "depthwise": 4 * (10 * 24 * 32 + 10 * 16),
    }
    assert table.loc["conv", "predicted_ms"] == pytest.approx(1e3 * table.loc["conv", "macs"] / 1e6)
    assert table.loc["depthwise", "predicted_ms"] == pytest.approx(1e3 * table.loc["depthwise", "bytes"] / 4e5)
    assert table["bound"].tolist() == ["arithmetic", "memory"] and (table["measured_ms"] > 0).all()
    assert np.allclose(table["intensity"], table["macs"] / table["bytes"])


def test_the_roof_is_that_of_the_models_precision(monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "gemm_peak", lambda **options: asked.append(options["dtype"]) or 1e9)
    for dtype in ("float32", "mixed_bfloat16"):
        inputs = keras.Input((8, 8, 3))
        x = layers.Rescaling(2.0, dtype="float32")(inputs)  # no MACs: it does not count
        model = keras.Model(inputs, layers.Conv2D(2, 3, dtype=dtype)(x))
        benchmark.roofline(model, 1, bytes_per_second=1e9, repeats=1)
    assert asked == ["float32", "bfloat16"]


def test_the_roofline_has_a_row_for_each_call():
    layer = layers.Conv2D(3, 3, padding="same", name="shared")
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layer(layer(inputs)))
    table = benchmark.roofline(model, 2, peak=1e9, bytes_per_second=1e9, repeats=1)
    assert table["layer"].tolist() == ["shared"] * 2 and table["macs"].sum() == 2 * cost.total_costs(model)["macs"]


def test_the_load_is_told(monkeypatch):
    monkeypatch.setattr(benchmark.BackgroundLoad, "others", lambda self: 0.25)
    assert benchmark.latency(small(), rounds=2)["background_load"].tolist() == [0.25]
