"""Run the notebooks of the course with papermill: which ones, in which order, with which parameters.

Executed notebooks, and the records and figures that they make, go to `build/PROFILE/`. Only the profile "full" writes
to `notebooks/`, `figures/` and `results/`; it runs the notebooks with the parameters that are written in them. `run`
skips a notebook if its source, parameters, code and input records are unchanged.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
import psutil

import fcnn_utils
from fcnn_utils import _files
from fcnn_utils._checks import check_choice
from fcnn_utils._processors import available_cores
from fcnn_utils._terminal import stderr_to
from fcnn_utils.course import contents, data, parameters, paths, records
from fcnn_utils.course.run_progress import CellCounter, EpochLines, RunProgress

_CELL_TIMEOUT = 6 * 3600  # seconds; a training on a slow machine is a long cell
_STAND_IN_NOTICE = "NOTICE: this ran on STAND-IN data, generated images; its accuracies are not results on CIFAR-100."


class NotebookFailed(Exception):
    """A notebook stopped at an error. The message is a report; `bad_value` is true if a parameter was refused."""

    def __init__(self, report, bad_value):
        super().__init__(report)
        self.bad_value = bad_value


def notebooks():
    """Return the notebooks of the course, in order: dict number ("07") -> path."""
    return {path.name[:2]: path for path in contents.files(_course())}


def run(profile="quick", only=(), start=None, dataset=None, settings=None, fresh=False, jobs=1):
    """Run notebooks of the course.

    Args:
        profile: a table of `notebooks/profiles.toml`: "smoke", "quick" or "full".
        only: numbers of the notebooks to run, for example ("07", "08"); by default all.
        start: number of the notebook to start from.
        dataset: "auto", "cifar100" or "standin"; by default the profile's.
        settings: dict of parameters that override the profile's.
        fresh: delete what earlier runs of this profile left.
        jobs: number of notebooks to run side by side. Those listed under `alone` in `notebooks/profiles.toml` run
            after the others, one at a time.

    Returns:
        Path of the folder with the executed notebooks.

    Raises:
        ValueError: if an argument is not as above, the arguments choose no notebook, or there is no course here.
        NotebookFailed: if a notebook stopped at an error.
    """
    profiles, chosen, settings = _profiles(), _choose(only, start), dict(settings or {})
    check_choice("profile", profile, [name for name in profiles if name not in ("reads", "order")])
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1; got {jobs}")
    accepted = {number: _parameters_of(path) for number, path in chosen.items()}
    known = set().union(*accepted.values())
    for name, value in settings.items():
        check_choice("parameter", name, sorted(known))
        parameters.check(**{name: value})
    if profile == "full" and (settings or dataset not in (None, "cifar100")):
        raise ValueError(
            "the profile full runs the notebooks as they are, on cifar100; to change a parameter, edit the notebook"
        )
    default = "cifar100" if profile == "full" else profiles[profile].get("DATASET", "auto")
    dataset = settings.pop("DATASET", None) or dataset or default
    check_choice("dataset", dataset, parameters.PARAMETERS["DATASET"])
    on_standin, values = data.locate(dataset) is None, {}
    if profile != "full":
        values = _values(profiles[profile], on_standin) | _medical(known - settings.keys(), dataset) | settings
    folder = _course() / "build" / profile
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    what = "STAND-IN data (generated images, not CIFAR-100)" if on_standin else "CIFAR-100"
    paths.say(f"profile {profile}: notebooks {', '.join(chosen)} on {what}, into {paths.shown(folder)}")
    started = time.monotonic()
    output, eager = _course() if profile == "full" else folder, profiles[profile].get("EAGER", False)

    def run_one(number):
        path, given = chosen[number], {name: value for name, value in values.items() if name in accepted[number]}
        reads = profiles["reads"].get(path.stem, [])
        _run_one(path, given, folder, reads, profile == "full", progress)

    with _environment(output, eager), _kernel_log(folder), RunProgress() as progress:
        _run_all(chosen, run_one, jobs, profiles["order"]["alone"])
    paths.say(f"done in {_minutes(time.monotonic() - started)}: {paths.shown(folder)}")
    if on_standin:
        paths.say(_STAND_IN_NOTICE)
    return folder


def execute(path, given, folder, progress):
    """Execute one notebook.

    Args:
        path: of the notebook.
        given: dict of its parameters.
        folder: keeps the partly executed notebook after an error.
        progress: `RunProgress` that shows the notebook.

    Returns:
        The executed notebook.

    Raises:
        ValueError: if the notebook cannot be written.
        NotebookFailed: if it stopped at an error.
    """
    import papermill  # slow to import: not before the arguments are known to be good
    from papermill.exceptions import PapermillExecutionError

    running, kept = folder / ".running" / path.name, folder / path.name
    options = {"kernel_name": "python3", "progress_bar": False, "execution_timeout": _CELL_TIMEOUT}
    options |= {"stdout_file": EpochLines(progress.say), "cwd": str(path.parent)}
    cells = nbformat.read(path, as_version=4).cells
    options["on_cell_start"] = CellCounter(cells, functools.partial(progress.at, path.stem))
    try:
        running.parent.mkdir(parents=True, exist_ok=True)
        return papermill.execute_notebook(str(path), str(running), given, **options)
    except (PapermillExecutionError, RuntimeError, TimeoutError) as error:  # the last two: dead kernel, slow cell
        os.replace(running, kept)
        bad_value = getattr(error, "ename", None) == "ValueError"
        report = f"{_report(path, error)}\nkept: {paths.shown(kept)}; the next run starts there"
        raise NotebookFailed(report, bad_value) from None
    except OSError as error:
        raise ValueError(_files.cannot_write(running, error)) from None
    finally:
        running.unlink(missing_ok=True)


def source_hash(notebook):
    """Return the SHA-256 of a notebook's code; outputs, prose, metadata and the cell for Colab do not count."""
    cells = [cell for cell in notebook.cells if "colab" not in cell.metadata.get("tags", [])]
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    return hashlib.sha256("\x00".join(code).encode()).hexdigest()


# --- what to run -------------------------------------------------------------------------------------------------


def _course():
    folder = paths.root()
    if folder is None:
        raise ValueError(
            "there is no course here; run this in a checkout of the course, the folder with notebooks/profiles.toml"
        )
    return folder


def _profiles():
    return tomllib.loads((_course() / "notebooks" / "profiles.toml").read_text())


def _choose(only, start):
    known, only, start = notebooks(), [number.zfill(2) for number in only], start and start.zfill(2)
    for number in [*only, *([start] if start else [])]:
        check_choice("notebook", number, known)
    chosen = {
        number: path
        for number, path in known.items()
        if (not only or number in only) and (start is None or number >= start)
    }
    if not chosen:
        raise ValueError(f"--only {' '.join(only)} and --from {start} leave no notebook to run; give one of them")
    return chosen


def _parameters_of(path):
    """Return the names that the notebook's parameters cell assigns."""
    cells = nbformat.read(path, as_version=4).cells
    source = next((cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), "")
    return set(re.findall(r"^([A-Z_]+)\s*=", source, re.MULTILINE))


def _values(profile, on_standin):
    """Return a profile's parameters, with those of its sub-table for stand-in data if that is used."""
    flat = {name: value for name, value in profile.items() if not isinstance(value, dict)}
    extra = profile.get("standin", {}) if on_standin else {}
    return flat | extra | {"DATASET": "standin" if on_standin else "cifar100"}


def _medical(names, dataset):
    """Choose the medical images, if a notebook needs them: real ones unless stand-in data is asked for or needed."""
    if "MEDICAL_DATASET" not in names:
        return {}
    real = dataset != "standin" and not data.load("pneumoniamnist", or_stand_in=True).stand_in  # it may be damaged
    return {"MEDICAL_DATASET": "pneumoniamnist" if real else "greystandin"}


def _run_all(numbers, run_one, jobs, alone):
    """Call `run_one` for each notebook: first those that may run side by side, then the others in turn."""
    together = [number for number in numbers if number not in alone] if jobs > 1 else []
    if len(together) < 2:
        together = []
    else:
        _run_together(together, run_one, jobs)
    for number in numbers:
        if number not in together:
            run_one(number)


def _run_together(numbers, run_one, jobs):
    jobs = min(jobs, len(numbers))
    with _shared_machine(jobs), ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run_one, number) for number in numbers]
        try:
            for done in as_completed(running):
                done.result()
        except Exception:  # of one notebook: those that are running may end
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BaseException:  # stopped by the user
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in running):  # again and again: a kernel may be just starting
                for kernel in psutil.Process().children():
                    kernel.terminate()
                time.sleep(0.2)
            raise


# --- one notebook ------------------------------------------------------------------------------------------------


def _run_one(path, given, folder, reads, published, progress):
    stamp_path, key = folder / ".stamps" / f"{path.stem}.json", _key(path, given)
    target = path if published else folder / path.name
    with _files.locked(folder / ".running" / f"{path.stem}.lock", f"the notebook {path.stem}"):
        if target.exists() and _stamp(stamp_path) == {"key": key, "records": _records_hash(reads)}:
            progress.say(f"  {path.stem:<30} unchanged, skipped")
            return
        started = time.monotonic()
        _files.check_writable(target.parent)
        stamp_path.unlink(missing_ok=True)  # it belongs to what is written over now, perhaps only in part
        with progress.showing(path.stem):
            executed = execute(path, given, folder, progress)
        if published:
            executed = _published(executed)
        _files.write_atomic(target, nbformat.writes(executed) + "\n")
        _files.write_atomic(stamp_path, json.dumps({"key": key, "records": _records_hash(reads)}))
        progress.say(f"  {path.stem:<30} done in {_minutes(time.monotonic() - started)}")


def _report(path, error):
    """Describe where and why a notebook stopped, on one screen."""
    if not hasattr(error, "ename"):
        return f"{path.stem} stopped: {error}"
    code = [f"    {line}" for line in error.source.splitlines()[:12]]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).splitlines()
    trace = [] if error.ename == "ValueError" else ["", *(f"    {line}" for line in plain[-15:-1])]
    lines = [f"{path.stem} stopped at code cell {error.exec_count}:", *code, *trace, f"{error.ename}: {error.evalue}"]
    return "\n".join(lines)


def _published(notebook):
    """Remove the marks of this run, and add the hash of the code that the outputs belong to."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.pop("metadata", None)
    notebook.metadata["executed_source_sha256"] = source_hash(notebook)
    return notebook


# --- what a notebook was made from -------------------------------------------------------------------------------


def _stamp(path):
    """Read what the last run of a notebook was made from; {} if that is unknown."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _key(path, given):
    """Hash all that a notebook is made from, except the records that it reads."""
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
    cells = nbformat.read(path, as_version=4).cells
    digest.update(json.dumps([[cell.cell_type, cell.source] for cell in cells]).encode())
    package = Path(fcnn_utils.__file__).parent
    for module in sorted(package.rglob("*.py")):
        digest.update(f"{module.relative_to(package)}".encode() + module.read_bytes())
    digest.update(sys.version.encode() + os.environ.get("KERAS_BACKEND", "").encode())
    return digest.hexdigest()


def _records_hash(patterns):
    digest = hashlib.sha256()
    for folder in records.folders():
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                digest.update(f"{path.relative_to(folder)}".encode() + path.read_bytes())
    return digest.hexdigest()


# --- surroundings ------------------------------------------------------------------------------------------------


def _ipython_folder():
    """Return an IPython folder with a setting of ours: C++ log lines of a backend stay out of the notebooks."""
    folder = _course() / "build" / "ipython"
    config = folder / "profile_default" / "ipython_kernel_config.py"
    if not config.exists():
        _files.write_atomic(config, "c.IPKernelApp.capture_fd_output = False\n")
    return folder


def _kernel_log(folder):
    """Send what this process and its kernels write to standard error to `kernel.log` in `folder`; make the folder."""
    _files.check_writable(folder)
    return stderr_to(folder / "kernel.log")


def _environment(output, eager):
    """Set the environment of the kernels, which write to the folder `output` and may train without compiling."""
    search_path = [str(Path(fcnn_utils.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    values = {"FCNN_OUTPUT": str(output), "IPYTHONDIR": str(_ipython_folder())}
    return _variables(values | {"PYTHONPATH": os.pathsep.join(search_path), "FCNN_EAGER": "1" if eager else ""})


def _shared_machine(jobs):
    """Let kernels that run side by side share the processors, and take GPU memory only as they need it."""
    threads = str(max(1, available_cores() // jobs))
    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"]
    values = dict.fromkeys(names, threads)
    return _variables(values | {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})


@contextlib.contextmanager
def _variables(values):
    """Set environment variables, and restore all of them at the end."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _minutes(seconds):
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
