"""What a network costs on the clock: latencies compared fairly, and what the machine could do at best.

`cost` counts; this measures, on a machine that should be doing nothing else: every result has `background_load`, the share
of the processor that other programs took meanwhile. Above a few percent its times are not worth quoting.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np
import pandas as pd
import psutil

from fcnn_utils import cost, deploy, keras_graph
from fcnn_utils._checks import check_number

COLUMNS = ["model", "engine", "batch", "median_ms", "low_ms", "high_ms", "speedup", "speedup_low", "speedup_high"]
_CHILD = """
import sys, json, keras
from fcnn_utils import benchmark
folder, names, arguments = sys.argv[1], *json.loads(sys.argv[2])
models = {name: keras.saving.load_model(f"{folder}/{n}.keras", compile=False) for n, name in enumerate(names)}
benchmark.latency(models, **arguments).to_json(f"{folder}/table.json", orient="split", double_precision=15)
"""


def latency(models, batch=1, engine="keras", *, rounds=50, precision="float32", threads=None, environment=None):
    """Time of one call on `batch` images, for one model or for several that take turns.

    The models are called alternately, each once a round, after some rounds that do not count; so a change of the
    machine's pace meets all alike, and speed-ups are ratios within a round. The columns:

        model, engine, batch       what was measured
        median_ms                  time of a call
        low_ms, high_ms            its quartiles
        speedup                    median of the first model's time over this one's
        speedup_low, speedup_high  its 95% interval (bootstrap over rounds)
        background_load                 see the module

    Args:
        models: built keras.Model, or dict name -> model; the first is what the others are compared with. They should
            have their batch norms folded (`convert.fold_batch_norm`), as a deployed network has, and all be of one
            precision.
        batch: images a call; or several such numbers, measured one after another.
        engine: "keras", "onnxruntime", "openvino" or "litert".
        precision: in which the engine computes, as of `deploy.load`.
        threads: how many the engine has, as of `deploy.load`.
        rounds: calls of each model that count.
        environment: dict of environment variables under which to measure, in a process of its own, for what a backend
            reads when it starts: {"TF_NUM_INTRAOP_THREADS": "1"}. The models must load without custom objects.

    Returns:
        DataFrame with these columns, a row for each model and batch.

    Raises:
        ValueError: an argument is not as above, or the engine is not installed.
        RuntimeError: the process of its own failed.
    """
    models = models if isinstance(models, dict) else {getattr(models, "name", "model"): models}
    if not models:
        raise ValueError("give at least one model to time")
    batches = batch if isinstance(batch, (tuple, list)) else [batch]
    if not batches:
        raise ValueError("give at least one size of batch")
    for number in batches:
        check_number("batch", number, int, 1, 65536)
    check_number("rounds", rounds, int, 2, 1_000_000)
    shape = _image_shape(models)
    if environment is not None:
        arguments = {"batch": list(batches), "engine": engine, "rounds": rounds, "precision": precision}
        return _elsewhere(models, arguments | {"threads": threads}, environment)
    runs = {name: deploy.load(model, engine, precision=precision, threads=threads) for name, model in models.items()}
    return pd.concat([_compared(runs, shape, number, engine, rounds) for number in batches], ignore_index=True)


def gemm_peak(size=2048, repeats=5, dtype="float32"):
    """MACs a second of the backend's best matrix product, size × size × size: the machine's peak in this dtype."""
    a = keras.ops.ones((size, size), dtype)
    return size**3 / _fastest(lambda: keras.ops.matmul(a, a), repeats)


def memory_bandwidth(megabytes=256, repeats=5):
    """Bytes a second to and from memory: the backend adds two float32 arrays of this size, far larger than a cache."""
    a = keras.ops.ones((megabytes * 2**20 // 4,), "float32")
    return 3 * a.shape[0] * 4 / _fastest(lambda: keras.ops.add(a, a), repeats)


def roofline(model, batch=64, *, peak=None, bytes_per_second=None, repeats=5):
    """Each layer's least possible time, and its time, on this machine (Williams, Waterman & Patterson 2009).

    A layer can't be faster than its MACs at the machine's peak, nor than its input, weights and output at the memory's
    pace. It is measured by itself, in Keras, on `batch` images, so nothing is fused with its neighbours, as an engine
    would: a model's own time is less than the sum. The columns:

        layer, kind   its name and class
        macs          of the whole batch
        bytes         of the whole batch's input, weights and output
        intensity     MACs a byte
        predicted_ms  the least possible time
        measured_ms   the median
        bound         "arithmetic" or "memory", whichever sets the least possible time

    Args:
        model: built, with images of a fixed size.
        batch: images a call.
        peak: MACs a second; default: `gemm_peak`, measured now in the dtype of the first layer that has MACs.
        bytes_per_second: to and from memory; default: `bandwidth`, measured now.
        repeats: of each layer; the median counts.

    Returns:
        DataFrame with these columns, a row for each call of a layer that has MACs.

    Raises:
        ValueError: no layer has MACs, `cost.layer_costs` refuses the model, or a number is out of its range.
    """
    check_number("batch", batch, int, 1, 65536)
    check_number("repeats", repeats, int, 1, 1_000_000)
    rows, counted = [], iter(cost.layer_costs(model).itertuples())
    for place in keras_graph.layer_nodes(model):
        for inputs, output in place.calls:
            macs = next(counted).macs
            if macs:
                rows.append((place.layer, macs, inputs[0], output))
    if not rows:
        raise ValueError(f"model {model.name!r} has no layer with MACs")
    if peak is None:
        peak = gemm_peak(dtype=rows[0][0].compute_dtype)
    check_number("peak", peak, float, 1, math.inf)
    if bytes_per_second is None:
        bytes_per_second = memory_bandwidth()
    check_number("bytes_per_second", bytes_per_second, float, 1, math.inf)
    return pd.DataFrame([_layer_row(*row, batch, peak, bytes_per_second, repeats) for row in rows])


def alternate(runs, repeats):
    """Throughputs measured in turn, so that a change of the machine's pace meets all alike.

    Args:
        runs: dict name -> function without arguments that does the work and returns how many images it was.
        repeats: how often each is measured; a round before these warms up and does not count.

    Returns:
        DataFrame (repeats, names) of images per second.
    """
    rounds = []
    for _ in range(repeats + 1):
        rounds.append({})
        for name, work in runs.items():
            start = time.perf_counter()
            rounds[-1][name] = work() / (time.perf_counter() - start)
    return pd.DataFrame(rounds[1:])


def wait_for(result):
    """Wait until the backend has computed `result`: JAX, and any backend on a GPU, returns earlier."""
    if hasattr(result, "block_until_ready"):
        result.block_until_ready()
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            tf.test.experimental.sync_devices()
    elif keras.config.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


class BackgroundLoad:
    """How much of the processor other programs took, from its making to `share()`."""

    def __init__(self):
        self.start = self._now()

    def share(self):
        """Share of all cores' time, 0 to 1. A timing with more than a few percent here was not taken in quiet."""
        wall, busy, own = (after - before for after, before in zip(self._now(), self.start, strict=True))
        return min(1.0, max(0.0, busy - own) / (wall * psutil.cpu_count()))

    @staticmethod
    def _now():
        machine_times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = machine_times.idle + getattr(machine_times, "iowait", 0.0)
        return time.monotonic(), sum(machine_times[:8]) - idle, own.user + own.system


# --- parts -------------------------------------------------------------------------------------------------------


def _image_shape(models):
    shapes = set()
    for name, model in models.items():
        if not isinstance(model, keras.Model):
            raise ValueError(f"models must be built keras.Models; {name!r} is a {type(model).__name__}")
        shapes.add(tuple(keras_graph.check_graph(model).inputs[0].shape[1:]))
    if len(shapes) > 1 or None in next(iter(shapes)):
        raise ValueError(
            f"models must read images of one fixed size; got {', '.join(map(str, sorted(shapes, key=str)))}"
        )
    return shapes.pop()


def _elsewhere(models, arguments, environment):
    """`latency` in a process of its own, whose environment is this one's and has these variables, too."""
    if not all(isinstance(text, str) for pair in environment.items() for text in pair):
        raise ValueError(f"environment must be a dict of strings; got {environment}")
    variables = os.environ | {"KERAS_BACKEND": keras.config.backend()} | environment
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(models.values()):
            model.save(f"{folder}/{number}.keras")
        command = [sys.executable, "-c", _CHILD, folder, json.dumps([list(models), arguments])]
        run = subprocess.run(command, env=variables, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"measuring under {environment} failed: {run.stderr.strip().splitlines()[-1]}")
        return pd.read_json(f"{folder}/table.json", orient="split", precise_float=True, dtype={"model": str})


def _compared(runs, shape, batch, engine, rounds):
    """The table of `latency` for one size of batch."""
    images = np.random.default_rng(0).standard_normal((batch, *shape)).astype("float32")
    for run in runs.values():
        for _ in range(3):
            run(images)  # compiles, allocates, warms up
    load = BackgroundLoad()
    times = 1e3 * batch / alternate({name: _work(run, images) for name, run in runs.items()}, rounds)  # ms
    table = pd.DataFrame([_row(name, engine, batch, times) for name in times], columns=COLUMNS)
    return table.assign(background_load=round(load.share(), 3))


def _work(run, images):
    def work():
        run(images)
        return len(images)

    return work


def _row(name, engine, batch, times):
    low, median, high = np.percentile(times[name], [25, 50, 75])
    ratios = (times.iloc[:, 0] / times[name]).to_numpy()
    resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    interval = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return name, engine, batch, median, low, high, np.median(ratios), *interval


def _layer_row(layer, macs, inputs, output, batch, peak, bytes_per_second, repeats):
    values = keras.ops.ones((batch, *inputs[1:]), layer.compute_dtype)
    seconds = np.median(_times(lambda: layer(values, training=False), repeats))
    moved = cost.value_bytes(layer.compute_dtype) * batch * (np.prod(inputs[1:]) + np.prod(output[1:]))
    moved += cost.value_bytes(layer.variable_dtype) * layer.count_params()
    arithmetic, memory = batch * macs / peak, moved / bytes_per_second
    return {
        "layer": layer.name,
        "kind": type(layer).__name__,
        "macs": batch * macs,
        "bytes": int(moved),
        "intensity": batch * macs / moved,
        "predicted_ms": 1e3 * max(arithmetic, memory),
        "measured_ms": 1e3 * seconds,
        "bound": "arithmetic" if arithmetic > memory else "memory",
    }


def _fastest(compute, repeats):
    return min(_times(compute, repeats))


def _times(compute, repeats):
    """Seconds of each call but the first two, with the result there."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        wait_for(compute())
        times.append(time.perf_counter() - start)
    return times[2:]
