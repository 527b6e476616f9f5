"""Measure what a network costs in time: fair latencies, the roofline and the machine's peaks.

`cost` counts; this module measures. The machine should do nothing else meanwhile: each latency table
has a column `background_load`, the share of the processor that other programs took. Do not quote times
where it is above a few percent.
"""

import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import psutil
import scipy.stats

from fcnn_utils import _engines, cost, deploy, keras_graph
from fcnn_utils._checks import check_number

COLUMNS = ["model", "engine", "batch", "median_ms", "low_ms", "high_ms", "speedup", "speedup_low", "speedup_high"]


# long: half of it is the docstring
def latency(models, batch=1, engine=None, *, rounds=50, precision="float32", threads=None, environment=None):
    """Time one call on `batch` images, for one model or for several that take turns.

    Each round calls every model once on the same random inputs, after four rounds that do not count. A change
    of the processor's speed therefore affects all models alike, and speed-ups are ratios within a round.
    The columns:

        model, engine, batch       what was measured
        median_ms                  time of a call
        low_ms, high_ms            its quartiles
        speedup                    median of the first model's time over this model's time
        speedup_low, speedup_high  its 95% interval (bootstrap over rounds)
        background_load            see the module

    Args:
        models: built keras.Model or path of a file for the engine, such as one in int8 (`quantization.quantize`);
            or dict name -> model or path. The first is the baseline. Fold the batch norms
            (`batch_norm.fold_batch_norm`), as in a deployed network, and use one precision for all Keras models.
            A model may have several inputs and outputs.
        batch: images per call, or a list of such numbers, measured one after another.
        engine: "keras", "onnxruntime", "openvino" or "litert"; default: the engine of the files, or Keras.
        rounds: calls of each model that count.
        precision: precision of the engine, as in `deploy.load`.
        threads: threads of the engine, as in `deploy.load`.
        environment: dict of environment variables. The measurement then runs in a process of its own, for
            variables that a backend reads at its start: {"TF_NUM_INTRAOP_THREADS": "1"}. The models must
            load without custom objects.

    Returns:
        DataFrame with these columns and a row for each batch size and model.

    Raises:
        ValueError: an argument is not as above, or the engine is not installed.
        RuntimeError: the separate process failed.
    """
    if not isinstance(models, dict):
        models = {Path(models).stem if _is_file(models) else getattr(models, "name", "model"): models}
    batches = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if not models or not batches:
        raise ValueError(f"give at least one {'batch size' if models else 'model to time'}")
    for number in batches:
        check_number("batch", number, int, 1, 65536)
    check_number("rounds", rounds, int, 2, 1_000_000)
    engine = _one_engine(models, engine)
    models = _check_inputs(models, engine)
    if environment is not None:
        arguments = {"batch": batches, "engine": engine, "rounds": rounds, "precision": precision, "threads": threads}
        return _latency_in_process(models, arguments, environment)
    runs = {name: deploy.load(model, engine, precision=precision, threads=threads) for name, model in models.items()}
    tables = []
    for number in batches:
        inputs = {name: _random_inputs(model, runs[name], number) for name, model in models.items()}
        tables.append(compare(runs, inputs, number, engine, rounds))
    return pd.concat(tables, ignore_index=True)


def gemm_peak(size=2048, repeats=5, dtype="float32"):
    """Measure the machine's peak in MACs per second, by the product of two size × size matrices."""
    a = keras.ops.ones((size, size), dtype)
    return size**3 / min(_times(lambda: keras.ops.matmul(a, a), repeats))


def memory_bandwidth(megabytes=256, repeats=5):
    """Measure bytes per second to and from memory, by a sum of two arrays far larger than a cache."""
    a, b = (keras.ops.full((megabytes * 2**20 // 4,), value, "float32") for value in (1, 2))
    return 3 * a.shape[0] * 4 / min(_times(lambda: keras.ops.add(a, b), repeats))


def roofline(model, batch=64, *, peak=None, bytes_per_second=None, repeats=5):
    """Compare each layer's time with the least possible one on this machine.

    This is the roofline model (Williams, Waterman & Patterson 2009, doi 10.1145/1498765.1498785). A layer
    takes at least the time of its MACs at the machine's peak, and at least the time in which its input,
    weights and output pass through the memory. Each layer is measured by itself in Keras, without
    the fusion of layers that an engine does: the whole model takes less than the sum. A small layer mostly
    shows the overhead of a call. The columns:

        layer, kind   name and class
        macs          of the whole batch
        bytes         input, weights and output of the whole batch
        intensity     MACs per byte
        predicted_ms  least possible time
        measured_ms   median time
        bound         what sets the least possible time: "arithmetic" or "memory"

    Args:
        model: built, on images of a fixed size.
        batch: images per call.
        peak: MACs per second; default: `gemm_peak`, measured now in the dtype of the first layer with MACs.
        bytes_per_second: to and from memory; default: `memory_bandwidth`, measured now.
        repeats: timed calls of each layer.

    Returns:
        DataFrame with these columns and a row for each call of a layer that has MACs.

    Raises:
        ValueError: no layer has MACs, `cost.layer_costs` rejects the model, or a number is out of range.
    """
    check_number("batch", batch, int, 1, 65536)
    check_number("repeats", repeats, int, 1, 1_000_000)
    calls = [
        (call.operation, tuple(call.inputs[0].shape), tuple(call.outputs[0].shape), macs)
        for call, macs, _ in cost.call_costs(model)
        if isinstance(call.operation, keras.Layer) and macs > 0
    ]
    if not calls:
        raise ValueError(f"model {model.name!r} has no layer with MACs")
    peak = check_number(
        "peak", gemm_peak(dtype=calls[0][0].compute_dtype) if peak is None else peak, float, 1, math.inf
    )
    pace = memory_bandwidth() if bytes_per_second is None else bytes_per_second
    pace = check_number("bytes_per_second", pace, float, 1, math.inf)
    return pd.DataFrame([_roofline_row(*call, batch, peak, pace, repeats) for call in calls])


def alternate(runs, repeats):
    """Measure throughputs in turn, so that a change of the processor's speed affects all alike.

    Args:
        runs: dict name -> function without arguments that does the work and returns its number of images.
        repeats: number of rounds that count; one more round before them warms up.

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
    """Wait until the backend has computed `result`; JAX, and any backend on a GPU, returns before that."""
    if hasattr(result, "block_until_ready"):
        result.block_until_ready()
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf  # Keras has no function that waits

        if tf.config.list_physical_devices("GPU"):
            tf.test.experimental.sync_devices()
    elif keras.config.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


class BackgroundLoad:
    """Measure how much of the processor other programs take, from here to `share()`."""

    def __init__(self):
        self._start = self._now()

    def share(self):
        """Return the share of all cores' time, 0 to 1."""
        wall, busy, own = (after - before for after, before in zip(self._now(), self._start, strict=True))
        return min(1.0, max(0.0, busy - own) / (wall * psutil.cpu_count()))

    @staticmethod
    def _now():
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        return time.monotonic(), sum(machine[:8]) - idle, own.user + own.system


# --- latencies ---------------------------------------------------------------------------------------------------


def _is_file(model):
    return isinstance(model, (str, Path))


def _one_engine(models, engine):
    """Return the engine that runs all models: the given one, that of the files, or Keras."""
    found = {deploy.engine_of_file(model) for model in models.values() if _is_file(model)} - {"keras"}
    found |= {engine} - {None} if found else set()
    if len(found) > 1:
        raise ValueError(f"all models must run in one engine; got {' and '.join(sorted(found))}")
    return engine or next(iter(found), "keras")


def _check_inputs(models, engine):
    """Return the models, traced if they are subclassed, if all read inputs of the same fixed sizes.

    Files of Keras models are loaded, others stay paths.
    """
    checked, sizes = {}, set()
    for name, model in models.items():
        if _is_file(model) and deploy.engine_of_file(model) == "keras":
            model = _engines.load_keras(model)
        if _is_file(model):
            checked[name] = Path(model).absolute()
            shapes = deploy.load(model, engine, threads=1).input_shapes
        elif isinstance(model, keras.Model):
            checked[name] = keras_graph.check_graph(model)
            shapes = [tuple(x.shape[1:]) for x in checked[name].inputs]
        else:
            raise ValueError(f"models must be built keras.Models or paths; {name!r} is a {type(model).__name__}")
        sizes.add(tuple(shapes))
    if len(sizes) > 1 or any(None in shape for shape in next(iter(sizes))):
        found = ", ".join(sorted(" and ".join(map(str, shapes)) for shapes in sizes))
        raise ValueError(f"models must read images of one fixed size; got {found}")
    return checked


def _random_inputs(model, run, number):
    return run.random_inputs(number) if _is_file(model) else deploy.random_inputs(model, number)


def _latency_in_process(models, arguments, environment):
    """Call `latency` in a process of its own, with the variables of `environment` besides the present ones."""
    if not all(isinstance(text, str) for pair in environment.items() for text in pair):
        raise ValueError(f"environment must be a dict of strings; got {environment}")
    variables = os.environ | {"KERAS_BACKEND": keras.config.backend()} | environment
    with deploy.temporary_folder() as folder:
        files = {}
        for number, (name, model) in enumerate(models.items()):
            files[name] = str(model if _is_file(model) else Path(folder, f"{number}.keras"))
            if not _is_file(model):
                model.save(files[name])
        Path(folder, "request.json").write_text(json.dumps({"models": files, "arguments": arguments}))
        command = [sys.executable, "-m", "fcnn_utils.benchmark", folder]
        run = subprocess.run(command, env=variables, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"measuring under {environment} failed: {run.stderr.strip().splitlines()[-1]}")
        return pd.read_json(f"{folder}/table.json", orient="split", precise_float=True, dtype={"model": str})


def _answer(folder):
    """Measure what `_latency_in_process` asks for in `folder`, and leave the table there."""
    request = json.loads(Path(folder, "request.json").read_text())
    table = latency(request["models"], **request["arguments"])
    table.to_json(f"{folder}/table.json", orient="split", double_precision=15)


def compare(runs, inputs, batch, engine, rounds):
    """Make the table of `latency` for one batch size; `runs` is a dict name -> function of `inputs[name]`."""
    for name, run in runs.items():
        for _ in range(3):
            run(inputs[name])  # compiles, allocates memory, warms up

    def work(name):
        runs[name](inputs[name])
        return batch

    load, works = BackgroundLoad(), {name: functools.partial(work, name) for name in runs}
    times = 1e3 * batch / alternate(works, rounds)  # images per second -> ms per call
    share, rows = round(load.share(), 3), []
    for name in times:
        low, median, high = np.percentile(times[name], [25, 50, 75])
        ratios = (times.iloc[:, 0] / times[name]).to_numpy()
        bootstrap = scipy.stats.bootstrap([ratios], np.median, n_resamples=2000, method="percentile", rng=0)
        rows.append((name, engine, batch, median, low, high, np.median(ratios), *bootstrap.confidence_interval))
    return pd.DataFrame(rows, columns=COLUMNS).assign(background_load=share)


# --- the roofline ------------------------------------------------------------------------------------------------


def _roofline_row(layer, inputs, output, macs, batch, peak, bytes_per_second, repeats):
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


def _times(compute, repeats):
    """Return the seconds of each call, result included; two calls before them may compile and do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        wait_for(compute())
        times.append(time.perf_counter() - start)
    return times[2:]


if __name__ == "__main__":
    _answer(sys.argv[1])
