"""Train a grid of networks × recipes × seeds: one run after another, or as tasks of a Ray cluster.

    results = sweeps.train(grids.read("grid.toml"))

Each run has its own process, on this machine or on another one of the cluster. The process writes checkpoints and the
record as `experiments.train` does. It uses the same output path on every machine. The record is then copied to the
machine that started the sweep. A run that already has a record is skipped. If a process is lost, its run starts again.
It continues after its last whole epoch if the machine that takes it over can read the checkpoint.
"""

import contextlib
import importlib.util
import io
import os
import platform
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from fcnn_utils import _files
from fcnn_utils._processors import available_cores
from fcnn_utils._terminal import stderr_to
from fcnn_utils.course import environment, paths, records

ATTEMPTS = 4  # how often a run is started if its process is lost
_PATIENCE = 30  # seconds to wait for another process with the same run; a killed one may need a moment to end
_PAUSE = 1  # seconds between two tries


def train(runs, address=None, file=None):
    """Train all runs that have no record yet.

    Args:
        runs: list of `grids.Run` of one grid, not empty, as from `grids.read`.
        address: of a Ray cluster, as in `ray.init`: "auto" for the one on this machine. Default: Ray on this machine if
            it is installed; without Ray the runs are trained one after another.
        file: open text file for the progress; default: standard output.

    Returns:
        dict from each run to its record; or, if it failed, to a str that says why.

    Raises:
        ValueError: if the data cannot be loaded, a record has other settings, Ray is missing or not reached, or no
            machine of the cluster has what a run needs.
        KeyboardInterrupt: if it was stopped; finished records are kept.
    """
    dataset = _load(runs[0].grid)
    places, results = _records_of(runs, dataset)
    paths.say(f"{len(runs)} runs, {len(results)} of them have a record", file)
    waiting = [run for run in runs if run not in results]
    if not waiting:
        return results
    how = {"output": str(paths.output().absolute()), "fingerprint": dataset.fingerprint, "commit": environment.commit()}
    execute = _one_by_one if address is None and not _has_ray() else _on_ray
    table, started = _Table({run: places[run] for run in waiting}, file), time.monotonic()
    with contextlib.closing(execute(waiting, how, address)) as outcomes:
        for run, outcome in outcomes:
            if run is not None:
                results[run] = _kept(outcome, places[run])
                table.end(run, results[run])
            table.draw()
    for run in waiting:
        if isinstance(results[run], str):
            paths.say(f"{run} failed: {results[run]}", file)
    paths.say(f"{len(waiting)} runs in {time.monotonic() - started:.0f} s", file)
    return {run: results[run] for run in runs}


# --- records -------------------------------------------------------------------------------------------------------


def _records_of(runs, dataset):
    """Return two dicts: run -> path of its record on this machine; and run -> record, for the runs that have one.

    The second also finds published records of other machines.
    """
    from fcnn_utils.course import experiments, networks

    places, found = {}, {}
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


def _kept(outcome, path):
    """Write the files of a run that are not here yet; return the record, or the reason why there is none."""
    if isinstance(outcome, str):
        return outcome
    record, network = outcome
    if not path.exists():
        if network:
            _files.write_atomic(path.with_suffix(".keras"), network)
        records.write(record)
    return record


# --- one run, in a process of its own ------------------------------------------------------------------------------


def _train(run, how):
    """Train one run; return (record, content of the kept network or None), or a str that says why it failed."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ |= {"FCNN_OUTPUT": how["output"], "FCNN_COMMIT": how["commit"]}
    names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
    os.environ |= dict.fromkeys(names, str(run.grid["cpus"]))  # before a backend is imported
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its output would break up the progress table
            return _trained(run, how)
    except Exception as error:  # one run must not end the others
        return _first_line(error)


def _trained(run, how):
    with stderr_to(os.devnull):  # TensorFlow writes many lines when it starts
        from fcnn_utils.course import experiments

        if run.grid["deterministic"]:
            environment.deterministic()
        environment.describe()
    dataset, give_up = _load(run.grid), time.monotonic() + _PATIENCE
    if dataset.fingerprint != how["fingerprint"]:
        here = platform.node()
        return f"{here} has other images than the sweep: {dataset}; put the same data set on that machine"
    options = {"width": run.width, "save_model": run.grid["save_models"]}
    while True:
        try:
            record = experiments.train(run.network, dataset, run.recipe, **options)
            break
        except _files.Busy:
            if time.monotonic() > give_up:
                raise
            time.sleep(_PAUSE)
    kept = records.kept_network(dataset.name, record["model"], run.recipe.name, run.recipe.seed)
    return record, kept.read_bytes() if kept and run.grid["save_models"] else None


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


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
                except (GeneratorExit, KeyboardInterrupt):  # the sweep was stopped
                    for process in list(pool._processes.values()):
                        process.terminate()
                    raise


def _poll(run, future):
    while not wait([future], timeout=1).done:
        yield None, None
    yield run, future.result()


def _has_ray():
    return importlib.util.find_spec("ray") is not None


def _on_ray(runs, how, address):
    try:
        import ray
    except ImportError:
        raise ValueError('a cluster needs Ray: pip install ".[ray]" in a clone') from None
    import fcnn_utils

    grid = runs[0].grid
    here = {} if address else {"num_cpus": available_cores()}
    modules = {"py_modules": [fcnn_utils]}  # the other machines run this code, whatever they have installed
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", log_to_driver=False, runtime_env=modules, logging_level="ERROR", **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot reach Ray at {address or 'this machine'}: {_first_line(error)}") from None
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
        gpus = _fitting_gpus(grid, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        task = ray.remote(num_cpus=grid["cpus"], num_gpus=gpus, max_calls=1, max_retries=ATTEMPTS - 1)(_train)
        pending = {task.remote(run, how): run for run in runs}
        while pending:
            ended, _ = ray.wait(list(pending), timeout=1)
            for each in ended:
                run = pending.pop(each)
                try:
                    yield run, ray.get(each)
                except ray.exceptions.RayError as error:
                    yield run, f"Ray gave it up after at most {ATTEMPTS} starts ({_first_line(error)})"
            yield None, None
    finally:
        ray.shutdown()


def _fitting_gpus(grid, machines):
    """Return the GPUs of one run; raise ValueError if no machine, a dict of Ray's resources, has what a run needs."""
    available = max(machine.get("GPU", 0) for machine in machines)
    gpus = min(1, available) if grid["gpus"] is None else grid["gpus"]
    if not any(machine.get("CPU", 0) >= grid["cpus"] and machine.get("GPU", 0) >= gpus for machine in machines):
        found = "; ".join(f"{machine.get('CPU', 0):g} cpus, {machine.get('GPU', 0):g} gpus" for machine in machines)
        wanted = f"{grid['cpus']} cpus and {gpus:g} gpus for one run"
        raise ValueError(f"no machine has {wanted}: lower cpus or gpus in the grid; they have {found}")
    return gpus


# --- progress ------------------------------------------------------------------------------------------------------


class _Table:
    """Progress table with one line per run. A terminal redraws all lines; a file gets a line only when it changes.

    Args:
        places: dict from each run to the path of its record, which shows the epochs on this machine.
        file: where to print.
    """

    def __init__(self, places, file=None):
        self.places, self.file = places, sys.stdout if file is None else file
        self.states, self.shown, self.ended = dict.fromkeys(places, "waits"), [], set()
        self.is_live = self.file.isatty()

    def end(self, run, outcome):
        self.ended.add(run)
        self.states[run] = "FAILED"
        if not isinstance(outcome, str):
            images, result = records.result(outcome)
            self.states[run] = f"done, {images} top-1 {result['top1']:.1%}"

    def draw(self):
        for run, path in self.places.items():
            if run not in self.ended:
                self.states[run] = self._progress_of(path.with_suffix(".partial.json")) or self.states[run]
        lines = [f"{state:<38} {run}" for run, state in self.states.items()]
        if self.is_live:
            width, height = shutil.get_terminal_size()
            # With more runs than lines, the first ones scroll away: the cursor cannot move above the visible screen.
            up = f"\x1b[{min(len(lines), height - 1)}A" if self.shown else ""
            seen = lines[-(height - 1) :] if self.shown else lines
            paths.say(up + "\n".join(f"\x1b[2K{line[: width - 1]}" for line in seen), self.file)
        else:
            for line in lines:
                if line not in self.shown and not line.startswith("waits"):
                    paths.say(line, self.file)
        self.shown = lines

    def _progress_of(self, path):
        """Format the progress of a run from its partial record; None if there is none here or it cannot be read yet."""
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
