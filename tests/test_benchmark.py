"""Latencies and the roofline: `fcnn_utils.benchmark`, on small models and mostly on a clock of our own."""

import time

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import benchmark, cost, deploy


def small(filters=8, size=8, name="small"):
    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(filters, 3, padding="same", activation="relu")(inputs)
    x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
    return keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)), name=name)


def pair():
    return {name: small(name=name) for name in ("dense", "half")}


class Clock:
    """A machine that takes a fixed time for each image of a model and slows down with each call."""

    def __init__(self, monkeypatch, milliseconds, growth=0.0):
        self.now, self.calls, self.growth = 0.0, [], growth
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(deploy, "load", lambda model, *_, **__: self.runner(model, milliseconds[model.name]))

    def runner(self, model, milliseconds):
        def run(images):
            self.calls.append(model.name)
            self.now += 1e-3 * milliseconds * len(images) * (1 + self.growth * len(self.calls))

        return run


def test_bad_arguments_are_rejected():
    model, inputs, any_size = small(), keras.Input((8, 8, 3)), keras.Input((None, None, 3))
    for arguments, message in (
        ({"batch": 0}, "batch must be a whole number between 1 and"),
        ({"batch": []}, "give at least one batch size"),
        ({"rounds": 1}, "rounds must be a whole number between 2 and"),
        ({"engine": "tensorrt"}, "engine must be one of keras"),
        ({"environment": {"TF_NUM_INTRAOP_THREADS": 0}}, "environment must be a dict of strings"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.latency(model, **arguments)
    for models, message in (
        ({}, "give at least one model to time"),
        ({"a": "simple"}, "models must be built keras.Models or paths; 'a': there is no file simple"),
        ({"a": 3}, "models must be built keras.Models or paths; 'a' is a int"),
        ({"a": model, "b": small(size=16)}, r"one fixed size; got \(16, 16, 3\), \(8, 8, 3\)"),
        (keras.Model(any_size, layers.Conv2D(2, 3)(any_size)), "one fixed size"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.latency(models)
    for arguments, message in (
        ({"batch": 0}, "batch must be a whole number"),
        ({"repeats": 0}, "repeats must be a whole number between 1 and"),
        ({"peak": 0}, "peak must be a number between 1 and"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.roofline(model, **arguments)
    with pytest.raises(ValueError, match="model 'idle' has no layer with MACs"):
        benchmark.roofline(keras.Model(inputs, layers.ReLU()(inputs), name="idle"))


# --- latencies ---------------------------------------------------------------------------------------------------


def test_latency_of_one_model(monkeypatch):
    monkeypatch.setattr(benchmark.BackgroundLoad, "share", lambda self: 0.25)
    table = benchmark.latency(small(), 2, rounds=3)
    assert table.columns.tolist() == [*benchmark.COLUMNS, "background_load"]
    assert table["model"].tolist() == ["small"] and (table["speedup"] == 1).all()
    assert 0 < table["low_ms"][0] <= table["median_ms"][0] <= table["high_ms"][0]
    assert table["background_load"].tolist() == [0.25]


def test_latencies_and_speedups_on_a_known_clock(monkeypatch):
    clock = Clock(monkeypatch, {"dense": 8.0, "half": 4.0})
    table = benchmark.latency(pair(), 16, rounds=5).set_index("model")
    assert table.loc["dense", ["median_ms", "low_ms", "high_ms"]].tolist() == pytest.approx([128.0] * 3)
    assert table.loc["half", ["speedup", "speedup_low", "speedup_high"]].tolist() == pytest.approx([2.0] * 3)
    assert clock.calls == ["dense"] * 3 + ["half"] * 3 + ["dense", "half"] * 6  # in turn; one round does not count


def test_a_machine_that_slows_down_affects_all_models_alike(monkeypatch):
    """At the end it is ten times slower: the median times say little, but the speed-up stays."""
    Clock(monkeypatch, {"dense": 8.0, "half": 4.0}, growth=0.1)
    table = benchmark.latency(pair(), rounds=40).set_index("model")
    moments = 8 * (1 + 0.1 * np.arange(9, 89, 2))  # the first model's counted calls, after 3 + 3 and one round
    quartiles = table.loc["dense", ["low_ms", "median_ms", "high_ms"]].astype(float)
    assert quartiles.tolist() == pytest.approx(np.percentile(moments, [25, 50, 75]))
    assert table.loc["half", "speedup"] == pytest.approx(2.0, rel=0.05)
    ratios = np.sort(2 * moments / (moments + 0.8))
    low, high = table.loc["half", ["speedup_low", "speedup_high"]]
    assert ratios[11] < low < table.loc["half", "speedup"] < high < ratios[28]  # outside lie improbable medians


@pytest.mark.bench
@pytest.mark.parametrize("engine", deploy.ENGINES)
def test_every_available_engine_is_timed(engine):
    if engine not in deploy.available():
        pytest.skip(f"{engine} is not installed, or Keras cannot export to it from {keras.config.backend()}")
    table = benchmark.latency({"wide": small(128, 16), "narrow": small(8, 16)}, 8, engine, rounds=3)
    assert table["engine"].unique().tolist() == [engine] and (table["median_ms"] > 0).all()
    assert table["speedup"][1] > 1 and 0 <= table["background_load"][0] <= 1


def test_latency_in_a_process_with_its_own_environment(monkeypatch, tmp_path):
    """The process starts from any folder, and it gets the environment: an unknown backend fails."""
    monkeypatch.chdir(tmp_path)
    models = {"wide": small(), "01": small()}
    table = benchmark.latency(models, [1, 2], rounds=2, environment={"TF_NUM_INTRAOP_THREADS": "1"})
    assert table["model"].tolist() == ["wide", "01"] * 2 and table["batch"].tolist() == [1, 1, 2, 2]
    assert table.columns.tolist() == [*benchmark.COLUMNS, "background_load"] and (table["median_ms"] > 0).all()
    with pytest.raises(RuntimeError, match="measuring under .*KERAS_BACKEND.* failed: .*nonesuch"):
        benchmark.latency(models, rounds=2, environment={"KERAS_BACKEND": "nonesuch"})


@pytest.mark.parametrize("engine", ["keras", "onnxruntime"])
def test_networks_of_several_inputs_and_of_integers_are_timed(engine):
    if engine not in deploy.available():
        pytest.skip(f"{engine} is not installed, or Keras cannot export to it from {keras.config.backend()}")
    pixels, codes = keras.Input((8, 8, 3), name="pixels", dtype="uint8"), keras.Input((4,), name="codes", dtype="int32")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(layers.Rescaling(1 / 255)(pixels)))
    y = layers.Flatten()(layers.Embedding(5, 2)(codes))
    models = {
        "dict": keras.Model({"pixels": pixels, "codes": codes}, {"x": layers.Dense(2)(x), "y": y}),
        "list": keras.Model([codes, pixels], [layers.Dense(3)(y), x]),
    }
    table = benchmark.latency(models, 2, engine, rounds=2, threads=1)
    assert table["model"].tolist() == ["dict", "list"] and (table["median_ms"] > 0).all()
    models["other"] = keras.Model(pixels, x)
    with pytest.raises(ValueError, match=r"one fixed size; got \(4,\) and \(8, 8, 3\), \(8, 8, 3\)"):
        benchmark.latency(models, engine=engine)


# --- clocks ------------------------------------------------------------------------------------------------------


def test_throughputs_are_measured_in_turn_after_a_warm_up(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(name, images):
        calls.append(name)
        clock[0] += len(calls)  # the n-th call takes n seconds
        return images

    table = benchmark.alternate({"a": lambda: work("a", 60), "b": lambda: work("b", 120)}, 2)
    assert calls == ["a", "b"] * 3
    assert table.columns.tolist() == ["a", "b"]
    np.testing.assert_allclose(table, [[60 / 3, 120 / 4], [60 / 5, 120 / 6]])  # without the first round


@pytest.mark.parametrize("wall, busy, own, share", [(10, 30, 10, 0.5), (10, 10, 10, 0), (10, 9, 10, 0), (10, 50, 0, 1)])
def test_background_load_is_the_share_of_other_programs(monkeypatch, wall, busy, own, share):
    """On 4 cores: seconds passed, seconds of all programs, seconds of this one."""
    monkeypatch.setattr(benchmark.psutil, "cpu_count", lambda: 4)
    moments = iter([(100.0, 7.0, 3.0), (100.0 + wall, 7.0 + busy, 3.0 + own)])
    monkeypatch.setattr(benchmark.BackgroundLoad, "_now", staticmethod(lambda: next(moments)))
    assert benchmark.BackgroundLoad().share() == share


def test_wait_for_waits_for_jax_and_for_a_gpu(monkeypatch):
    waited = []

    class Later:
        def block_until_ready(self):
            waited.append("jax")

    benchmark.wait_for(Later())
    assert waited == ["jax"]
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        monkeypatch.setattr(tf.test.experimental, "sync_devices", lambda: waited.append("tensorflow"))
        for devices in ([], ["GPU:0"]):
            monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind, devices=devices: devices)
            benchmark.wait_for(keras.ops.ones(3))
        assert waited == ["jax", "tensorflow"]  # on a CPU the result is there when the call returns


# --- peaks and the roofline --------------------------------------------------------------------------------------


def test_the_machines_peaks_on_a_known_clock(monkeypatch):
    """The fastest call takes 2 ms; the first two calls, which may compile, do not count."""
    moments = iter(np.cumsum(([0.0, 9.0] + [0.0, 9.0] + [1.0, 2e-3, 1.0, 5e-3]) * 2))
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    assert benchmark.gemm_peak(256, 2) == pytest.approx(256**3 / 2e-3)
    assert benchmark.memory_bandwidth(8, 2) == pytest.approx(3 * 8 * 2**20 / 2e-3)


def test_the_roofline_computed_by_hand():
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


def test_the_peak_is_measured_in_the_models_precision(monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "gemm_peak", lambda **options: asked.append(options["dtype"]) or 1e9)
    for dtype in ("float32", "mixed_bfloat16"):
        inputs = keras.Input((8, 8, 3))
        x = layers.Rescaling(2.0, dtype="float32")(inputs)  # it has no MACs, so its dtype does not count
        model = keras.Model(inputs, layers.Conv2D(2, 3, dtype=dtype)(x))
        benchmark.roofline(model, 1, bytes_per_second=1e9, repeats=1)
    assert asked == ["float32", "bfloat16"]


def test_the_roofline_has_a_row_for_each_call_of_a_layer():
    layer = layers.Conv2D(3, 3, padding="same", name="shared")
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layer(layer(inputs)))
    table = benchmark.roofline(model, 2, peak=1e9, bytes_per_second=1e9, repeats=1)
    assert table["layer"].tolist() == ["shared"] * 2 and table["macs"].sum() == 2 * cost.total_costs(model)["macs"]
