"""Train a grid of networks × recipes × seeds: one run after another, or as tasks of a Ray cluster.

    networks = ["simple", "wider_dense"]
    widths = [0.5]                # factors on the numbers of filters; default [1.0]
    recipes = ["faster"]          # default
    seeds = [0, 1, 2]             # default [0]
    dataset = "cifar100"          # default "auto"
    train_images = 0              # take so many images; 0, the default: all; likewise test_images
    deterministic = false         # results reproducible to the last digit
    save_models = false           # keep the networks beside their records
    cpus = 2                      # processors of one run; default: all of this machine
    gpus = 0                      # GPUs of one run, for Ray; default 0

    [settings]                    # changes of the recipes; each value of a list gives runs of its own
    optimizer = "muon"
    learning_rate = [0.12, 0.24]

Each run has a process of its own, which writes its checkpoints and its record as `experiments.train` does, to the
output folder of the same path. A run with a record is skipped. A run whose process was lost starts again, after its
last whole epoch. If a run ends on another machine, its record is sent back.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import platform
import shutil
import sys
import threading
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

from fcnn_utils import _files
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils._processors import available_cores
from fcnn_utils._terminal import stderr_to
from fcnn_utils.course import paths, records
from fcnn_utils.course.recipes import Recipe, get_recipe

ATTEMPTS = 4  # starts of one run whose process is lost
_PATIENCE = 30  # seconds that a run waits for a process that trains the same: one that was killed may just be ending
_LISTS = {"networks": str, "widths": float, "recipes": str, "seeds": int}
_DEFAULTS = {"widths": [1.0], "recipes": ["faster"], "seeds": [0], "dataset": "auto", "train_images": 0}
_DEFAULTS |= {"test_images": 0, "deterministic": False, "save_models": False, "cpus": None, "gpus": 0, "settings": {}}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a grid: a network's name and width, a `Recipe` with its seed, and options of the grid."""

    network: str
    width: float
    recipe: Recipe
    grid: dict = dataclasses.field(compare=False)

    def __str__(self):
        width = "" if self.width == 1 else f"-width{self.width:.10g}"
        return f"{self.network}{width} · {self.recipe.name} · seed {self.recipe.seed}"


def read(path):
    """Read a grid from a TOML file (see the module).

    Returns:
        list of `Run`, by seed: if a sweep is stopped, what has been trained can be compared.

    Raises:
        ValueError: if the file cannot be read, or a value is not allowed; the message names the file.
    """
    try:
        grid = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None
    try:
        return _runs(grid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def train(runs, address=None, file=None):
    """Train all runs that have no record yet.

    Args:
        runs: list of `Run`, as from `read`.
        address: of a Ray cluster, as in `ray.init`: "auto" for the one on this machine. Default: Ray on this machine if
            it is installed; without Ray the runs are trained one after another.
        file: where the progress is printed; default: standard output.

    Returns:
        dict from each run to its record; or, if it failed, to a str that says why.

    Raises:
        ValueError: if the data cannot be loaded, a record has other settings, or Ray is missing or not reached.
        KeyboardInterrupt: if it was stopped; finished records are kept.
    """
    places, results = _records_of(runs)
    paths.say(f"{len(runs)} runs, {len(results)} of them have a record", file)
    waiting = [run for run in runs if run not in results]
    if not waiting:
        return results
    how = {"output": str(paths.output().absolute()), "node": platform.node()}
    execute = _one_by_one if address is None and not _has_ray() else _on_ray
    table, started = _Table({run: places[run] for run in waiting}, file), time.monotonic()
    with contextlib.closing(execute(waiting, how, address)) as outcomes:
        for run, outcome in outcomes:
            if run is not None:
                results[run] = _kept(outcome)
                table.end(run, results[run])
            table.draw()
    for run in waiting:
        if isinstance(results[run], str):
            paths.say(f"{run} failed: {results[run]}", file)
    paths.say(f"{len(waiting)} runs in {time.monotonic() - started:.0f} s", file)
    return {run: results[run] for run in runs}


# --- the grid ----------------------------------------------------------------------------------------------------


def _runs(grid):
    from fcnn_utils.course import networks

    for key in grid:
        check_choice("a setting of a grid", key, ["networks", *_DEFAULTS])
    if "networks" not in grid:
        raise ValueError('networks is missing; give a list of names, such as networks = ["simple"]')
    grid = _DEFAULTS | {"cpus": available_cores()} | grid
    for key, kind in _LISTS.items():
        if not isinstance(grid[key], list) or not grid[key]:
            raise ValueError(f"{key} must be a list with at least one value; got {grid[key]!r}")
        for value in grid[key] if kind is not str else ():
            check_number(f"each of {key}", value, kind, *((0, 2**31 - 1) if kind is int else (1e-3, 1e3)))
    for key in ("deterministic", "save_models"):
        check_choice(key, grid[key], [True, False])
    for key, low in (("train_images", 0), ("test_images", 0), ("cpus", 1)):
        check_number(key, grid[key], int, low, 10**9)
    check_number("gpus", grid["gpus"], float, 0, 1000)
    if not isinstance(grid["settings"], dict):
        raise ValueError(f"settings must be a table of a recipe's settings; got {grid['settings']!r}")
    spread = {key: value if isinstance(value, list) else [value] for key, value in grid["settings"].items()}
    options = {key: grid[key] for key in _DEFAULTS if key not in _LISTS and key != "settings"}
    found = []
    for network, width, name in itertools.product(grid["networks"], grid["widths"], grid["recipes"]):
        networks.run_name(network, width)  # checks both
        for values in itertools.product(*spread.values()):
            recipe = get_recipe(name).replace(**dict(zip(spread, values, strict=True)))
            found += [Run(network, width, recipe.replace(seed=seed), options) for seed in grid["seeds"]]
    keys = [str(run) for run in found]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"a run occurs twice: {repeated[0]}; give each value once")
    return sorted(found, key=lambda run: run.recipe.seed)


def _records_of(runs):
    """Return the dict from each run to the path of its record here, and that to the records there are, anywhere."""
    from fcnn_utils.course import experiments, networks

    dataset, places, found = _load(runs[0].grid), {}, {}
    for run in runs:
        name = networks.run_name(run.network, run.width)
        places[run] = records.path_of(dataset.name, name, run.recipe.name, run.recipe.seed)
        record = experiments.stored(name, dataset, run.recipe)
        if record:
            found[run] = record
    return places, found


def _load(grid):
    from fcnn_utils.course import data

    return data.load(grid["dataset"], grid["train_images"], grid["test_images"])


def _kept(outcome):
    """Write the files that came from another machine; return the record, or the reason why there is none."""
    if isinstance(outcome, str):
        return outcome
    record, network = outcome
    if network is not None:
        path = records.write(record)
        if network:
            _files.write_atomic(path.with_suffix(".keras"), network)
    return record


# --- one run, in a process of its own ------------------------------------------------------------------------------


def _train(run, how):
    """Train one run; return (record, network) or a str that says why it failed.

    `network` is the content of the kept network if this is another machine than that of the sweep, else None.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ["FCNN_OUTPUT"] = how["output"]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
    os.environ |= dict.fromkeys(names, str(run.grid["cpus"]))  # before a backend is imported
    with contextlib.redirect_stdout(io.StringIO()):  # its lines would run through the progress
        with stderr_to(os.devnull):  # TensorFlow writes many lines when it starts
            from fcnn_utils.course import environment, experiments

            if run.grid["deterministic"]:
                environment.deterministic()
            environment.describe()
        try:
            dataset, give_up = _load(run.grid), time.monotonic() + _PATIENCE
            while True:
                try:
                    options = {"width": run.width, "save_model": run.grid["save_models"]}
                    record = experiments.train(run.network, dataset, run.recipe, **options)
                    break
                except _files.Busy:
                    if time.monotonic() > give_up:
                        raise
                    time.sleep(1)
        except (ValueError, ArithmeticError) as error:
            return str(error)
    if platform.node() == how["node"]:
        return record, None
    kept = records.path_of(record["dataset"], record["model"], record["recipe"]["name"], record["seed"])
    kept = kept.with_suffix(".keras")
    return record, kept.read_bytes() if kept.exists() else b""


def _end_with(parent):
    """End this process when its parent has ended; else it would train on after the sweep was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# --- all runs: generators of (run, outcome), and of (None, None) while nothing ends ----------------------------------


def _one_by_one(runs, how, _):
    for run in runs:
        for attempt in range(1, ATTEMPTS + 1):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                try:
                    yield from _poll(run, pool.submit(_train, run, how))
                    break
                except BrokenProcessPool:
                    if attempt == ATTEMPTS:
                        yield run, f"its process was lost {ATTEMPTS} times"
                except GeneratorExit:  # the sweep was stopped
                    for process in list(pool._processes.values()):
                        process.terminate()
                    raise


def _poll(run, future):
    while True:
        try:
            yield run, future.result(timeout=1)
            return
        except TimeoutError:
            yield None, None


def _has_ray():
    try:
        import ray  # noqa: F401
    except ImportError:
        return False
    return True


def _on_ray(runs, how, address):
    try:
        import ray
    except ImportError:
        raise ValueError('a cluster needs Ray: pip install ".[ray]" in a clone') from None
    import fcnn_utils

    grid = runs[0].grid
    here = {} if address else {"num_cpus": available_cores()}
    environment = {"py_modules": [fcnn_utils]}  # the other machines run this code, whatever they have installed
    try:
        ray.init(address or "local", log_to_driver=False, runtime_env=environment, logging_level="ERROR", **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"Ray at {address} is not reached: {str(error).splitlines()[0]}") from None
    try:
        task = ray.remote(num_cpus=grid["cpus"], num_gpus=grid["gpus"], max_calls=1, max_retries=ATTEMPTS - 1)(_train)
        pending = {task.remote(run, how): run for run in runs}
        while pending:
            ended, _ = ray.wait(list(pending), timeout=1)
            for each in ended:
                run = pending.pop(each)
                try:
                    yield run, ray.get(each)
                except ray.exceptions.RayError as error:
                    yield run, f"its process was lost {ATTEMPTS} times ({str(error).splitlines()[0]})"
            yield None, None
    finally:
        ray.shutdown()


# --- progress ------------------------------------------------------------------------------------------------------


class _Table:
    """A line for each run. A terminal shows all of them, always up to date; elsewhere a line is printed if it changes.

    Args:
        places: dict from each run to the path of its record, which shows the epochs on this machine.
        file: where to print.
    """

    def __init__(self, places, file=None):
        self.places, self.file = places, sys.stdout if file is None else file
        self.states, self.shown, self.height = dict.fromkeys(places, "waits"), [], 0
        self.is_live = self.file.isatty()

    def end(self, run, outcome):
        self.states[run] = "FAILED" if isinstance(outcome, str) else "done, {} top-1 {:.1%}".format(*_result(outcome))

    def draw(self):
        for run, path in self.places.items():
            if not self.states[run].startswith(("done", "FAILED")):
                self.states[run] = self._progress_of(path.with_suffix(".partial.json")) or self.states[run]
        lines = [f"{state:<34} {run}" for run, state in self.states.items()]
        if self.is_live:
            width, height = shutil.get_terminal_size()
            # If there are more runs than lines, the oldest scroll away. The cursor can only go back over what is seen.
            up = f"\x1b[{min(self.height, height - 1)}A" if self.height else ""
            seen = lines[-(height - 1) :] if self.height else lines
            self.file.write(up + "".join(f"\x1b[2K{line[: width - 1]}\n" for line in seen))
            self.file.flush()
        else:
            for line in lines:
                if line not in self.shown and not line.startswith("waits"):
                    paths.say(line, self.file)
        self.shown, self.height = lines, len(lines)

    def _progress_of(self, path):
        """Read how far a run is from its partial record; None if it is not seen here, or just being written."""
        try:
            record = records.read(path)
        except ValueError:
            return None
        if not record["epochs"] or record["status"] != "running":
            return None
        row = record["epochs"][-1]
        top1 = row.get("validation", row)["top1"]
        kind = "validation" if "validation" in row else "training"
        return f"epoch {row['epoch']}/{record['recipe']['epochs']}, {kind} top-1 {top1:.1%}"


def _result(record):
    """Return which images a complete run was measured on, "test" or "validation", and its top-1 accuracy on them."""
    images, result = ("test", record["test"]) if record["test"] else ("validation", record["epochs"][-1]["validation"])
    return images, result["top1"]


def summary(results):
    """Summarize the accuracies of a sweep.

    Args:
        results: dict of `train`; runs that failed do not count.

    Returns:
        DataFrame indexed by network and recipe: n (seeds), top1 (mean, in %), deviation (standard deviation over
        the seeds, n - 1 in the denominator) and images ("test" or "validation").
    """
    rows = [
        {
            "network": record["model"],
            "recipe": record["recipe"]["name"],
            "images": _result(record)[0],
            "top1": 100 * _result(record)[1],
        }
        for record in results.values()
        if not isinstance(record, str)
    ]
    table = pd.DataFrame(rows, columns=["network", "recipe", "images", "top1"])
    groups = table.groupby(["network", "recipe", "images"], sort=False)["top1"]
    return groups.agg(n="count", top1="mean", deviation="std").reset_index("images")
