"""Runs the notebooks in order through papermill: which, in what order, with which parameters; not what is in them.

Executed notebooks land in `build/PROFILE/`, with the records and figures they make. Only the full profile writes to
`notebooks/`, `figures/` and `results/`, and it runs the notebooks with the parameters that stand in them. A notebook
is skipped where nothing has changed that it was made from: its source, its parameters, this package, its records.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import tomllib

import nbformat

from fcnn_utils import _files
from fcnn_utils._checks import check_choice
from fcnn_utils.course import data, parameters, records
from fcnn_utils.course.records import ROOT, shown

NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"
_CELL_TIMEOUT = 6 * 3600  # seconds; a training on a slow machine is a long cell


class NotebookFailed(Exception):
    """A notebook stopped at an error; the message is the report. `bad_value`: it refused a parameter."""

    def __init__(self, report, bad_value):
        super().__init__(report)
        self.bad_value = bad_value


def notebooks():
    """The notebooks of the course, in order: dict number ("07") -> path."""
    return {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}


def run(profile="quick", only=(), start=None, dataset=None, settings=None, fresh=False):
    """Run the notebooks of the course.

    Args:
        profile: a table of `notebooks/profiles.toml`: "smoke", "quick" or "full".
        only: numbers of the notebooks to run, e.g. ("07", "08"); default: all.
        start: number of the notebook to start from.
        dataset: "auto", "cifar100" or "standin"; default: the profile's.
        settings: dict of parameters that override the profile's.
        fresh: forget what earlier runs of this profile left behind.

    Returns:
        The folder with the executed notebooks.

    Raises:
        ValueError: an argument is not as above.
        NotebookFailed: a notebook stopped at an error.
    """
    profiles = tomllib.loads((NOTEBOOKS / "profiles.toml").read_text())
    check_choice("profile", profile, [name for name in profiles if name != "reads"])
    chosen = _choose(only, start)
    accepted = {number: _parameters_of(path) for number, path in chosen.items()}
    known = set().union(*accepted.values())
    for name, value in (settings or {}).items():
        check_choice("parameter", name, sorted(known))
        parameters.check(**{name: value})
    if profile == "full" and (settings or dataset not in (None, "cifar100")):
        raise ValueError(
            "the full profile runs the notebooks as they stand, on cifar100; to change one, edit its parameters"
        )

    settings = dict(settings or {})
    dataset = settings.pop("DATASET", None) or dataset or _usual_dataset(profile, profiles[profile])
    check_choice("dataset", dataset, parameters.PARAMETERS["DATASET"])
    on_standin = data.locate(dataset) is None
    values = {}
    if profile != "full":
        values = _values(profiles[profile], on_standin) | _medical(known - settings.keys(), dataset) | settings
    folder = BUILD / profile
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    _announce(profile, chosen, folder, on_standin)
    environment = {
        "FCNN_OUTPUT": str(ROOT if profile == "full" else folder),
        "IPYTHONDIR": str(_ipython_folder()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    started = time.monotonic()
    with _environment(environment), _terminable():
        for number, path in chosen.items():
            given = {name: value for name, value in values.items() if name in accepted[number]}
            _run_one(path, given, folder, profiles["reads"].get(path.stem, []), published=profile == "full")
    print(f"done in {_minutes(time.monotonic() - started)}: {shown(folder)}", flush=True)
    if on_standin:
        print(_STAND_IN_NOTICE, flush=True)
    return folder


_STAND_IN_NOTICE = (
    "NOTICE: this ran on STAND-IN data, generated images; none of its accuracies is a result on CIFAR-100."
)


def source_hash(notebook):
    """SHA-256 of a notebook's code: outputs, prose, metadata and the cell for Colab do not count."""
    cells = [cell for cell in notebook.cells if "colab" not in cell.metadata.get("tags", [])]
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    return hashlib.sha256("\x00".join(code).encode()).hexdigest()


# --- what to run -------------------------------------------------------------------------------------------------


def _choose(only, start):
    known = notebooks()
    for number in [*only, *([start] if start else [])]:
        check_choice("notebook", number, known)
    return {
        number: path
        for number, path in known.items()
        if (not only or number in only) and (start is None or number >= start)
    }


def _parameters_of(path):
    """Names assigned in the notebook's parameters cell."""
    cells = nbformat.read(path, as_version=4).cells
    source = next((cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])), "")
    return set(re.findall(r"^([A-Z_]+)\s*=", source, re.MULTILINE))


def _usual_dataset(name, profile):
    return "cifar100" if name == "full" else profile.get("DATASET", "auto")


def _values(profile, on_standin):
    """A profile's parameters, flat, with its additions for stand-in data where that is used."""
    flat = {name: value for name, value in profile.items() if not isinstance(value, dict)}
    extra = profile.get("standin", {}) if on_standin else {}
    return flat | extra | {"DATASET": "standin" if on_standin else "cifar100"}


def _medical(names, dataset):
    """The images of the notebook on medical ones, if it has its turn: PneumoniaMNIST, or the stand-in where that is
    asked for or nothing else can be had."""
    if "MEDICAL_DATASET" not in names:
        return {}
    real = dataset != "standin" and data.locate("pneumoniamnist", or_stand_in=True)
    return {"MEDICAL_DATASET": "pneumoniamnist" if real else "greystandin"}


def _announce(profile, chosen, folder, on_standin):
    what = "STAND-IN data (generated images, not CIFAR-100)" if on_standin else "CIFAR-100"
    print(f"profile {profile}: notebooks {', '.join(chosen)} on {what}, into {shown(folder)}", flush=True)


# --- one notebook ------------------------------------------------------------------------------------------------


def _run_one(path, given, folder, reads, published):
    stamp_path = folder / ".stamps" / f"{path.stem}.json"
    target = (NOTEBOOKS if published else folder) / path.name
    key = _key(path, given)
    stamp = _stamp(stamp_path)
    if target.exists() and stamp == {"key": key, "records": _records_hash(reads)}:
        print(f"  {path.stem:<28} unchanged, skipped", flush=True)
        return
    started = time.monotonic()
    print(f"  {path.stem:<28} running", flush=True)
    executed = _execute(path, given, folder)
    if published:
        executed = _published(executed)
    _files.write_atomic(target, nbformat.writes(executed) + "\n")
    _files.write_atomic(stamp_path, json.dumps({"key": key, "records": _records_hash(reads)}))
    print(f"  {path.stem:<28} done in {_minutes(time.monotonic() - started)}", flush=True)


def _execute(path, given, folder):
    """The executed notebook; on an error the partly executed one is kept in `folder`."""
    import papermill  # slow to import: not before the arguments are known to be good
    from papermill.exceptions import PapermillExecutionError

    running = folder / ".running" / path.name
    try:
        running.parent.mkdir(parents=True, exist_ok=True)
        with stderr_to(folder / "kernel.log"):
            return papermill.execute_notebook(
                str(path),
                str(running),
                given,
                kernel_name="python3",
                progress_bar=False,
                stdout_file=_EpochLines(),
                execution_timeout=_CELL_TIMEOUT,
                cwd=str(NOTEBOOKS),
            )
    except PapermillExecutionError as error:
        kept = folder / path.name
        os.replace(running, kept)
        raise NotebookFailed(_report(path, error, kept), error.ename == "ValueError") from None
    except OSError as error:
        raise ValueError(_files.cannot_write(running, error)) from None
    except RuntimeError as error:  # the kernel died, or a cell ran into its time limit
        kept = folder / path.name
        os.replace(running, kept)
        raise NotebookFailed(
            f"{path.stem} stopped: {error}\nkept: {shown(kept)}; the next run starts there", False
        ) from None
    finally:
        running.unlink(missing_ok=True)


def _report(path, error, kept):
    """Notebook, cell and error, on one screen."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).splitlines()
    code = "\n".join(f"    {line}" for line in error.source.splitlines()[:12])
    trace = [] if error.ename == "ValueError" else ["", *(f"    {line}" for line in plain[-15:-1])]
    return "\n".join(
        [
            f"{path.stem} stopped at code cell {error.exec_count}:",
            code,
            *trace,
            f"{error.ename}: {error.evalue}",
            f"kept: {shown(kept)}; the next run starts there",
        ]
    )


def _published(notebook):
    """The executed notebook without marks of this run, but with the hash of the code that its outputs belong to."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        for output in cell.get("outputs", []):
            output.pop("metadata", None) if output.output_type == "stream" else None
    notebook.metadata["executed_source_sha256"] = source_hash(notebook)
    return notebook


class _EpochLines(io.TextIOBase):
    """Takes what a running notebook prints, and shows the lines of a training's progress."""

    def write(self, text):
        for line in text.splitlines():
            if " · epoch " in line:
                print(f"    {line}", flush=True)
        return len(text)


# --- what a notebook was made from -------------------------------------------------------------------------------


def _stamp(path):
    """What the last run of a notebook was made from, {} where that is not known."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _key(path, given):
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
    cells = nbformat.read(path, as_version=4).cells
    digest.update(json.dumps([[cell.cell_type, cell.source] for cell in cells]).encode())
    for module in sorted((ROOT / "fcnn_utils").glob("*.py")):
        digest.update(module.read_bytes())
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
    """An IPython folder of our own, so that the C++ log lines of a backend stay out of the notebooks."""
    folder = BUILD / "ipython"
    config = folder / "profile_default" / "ipython_kernel_config.py"
    if not config.exists():
        _files.write_atomic(config, "c.IPKernelApp.capture_fd_output = False\n")
    return folder


@contextlib.contextmanager
def stderr_to(path):
    """Send what this process and its children write to standard error to the file `path`: backends are chatty."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _environment(values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _terminable():
    """SIGTERM ends a run as Ctrl-C does, also where a shell started it with Ctrl-C ignored (in the background)."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    handlers = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _minutes(seconds):
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
