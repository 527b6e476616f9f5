"""Read and write records of training runs, one JSON file each, and files of other measurements.

A record is a dict of JSON types; `experiments` documents its entries. Its path names the run:
`results/DATASET/MODEL/RECIPE/seedN.json`. New records go to `results/` in the output folder. Records are
searched there first, then in `results/` of the course, which holds the published ones. This module does
not import Keras.
"""

import io
import json
import re
import reprlib
import zipfile
from pathlib import Path

import pandas as pd

from fcnn_utils._checks import check_choice
from fcnn_utils._files import check_writable, write_atomic
from fcnn_utils.course import paths

SCHEMA = 1
# What readers of a record rely on: key -> type of its value; an int is a float, too.
_RECORD = dict.fromkeys(["status", "dataset", "fingerprint", "model", "precision", "device", "backend", "date"], str)
_RECORD |= dict.fromkeys(["seed", "train_images", "params", "trainable", "macs", "cores"], int)
_RECORD |= {"stand_in": bool, "recipe": dict, "versions": dict, "epochs": list}
_EPOCH = dict.fromkeys(["loss", "cross_entropy", "top1", "top5", "seconds", "ms_per_step"], float) | {"epoch": int}
_HUGE = 1e300  # not finite, for a figure
_RESULT = dict.fromkeys(["loss", "top1", "top5"], float) | {"images": int, "correct_by_class": list}
_RENAMED = {"others_cpu": "background_load"}  # key in files of the first edition -> current key
_RUN = ["dataset", "model", "recipe", "seed"]  # these identify a run
_FIGURES = ["top1", "top5", "loss"]
_COLUMNS = [*_RUN, "status", "epochs", *_FIGURES, "params", "macs", "path", "record"]


def path_of(dataset, model, recipe, seed, folder=None):
    """Return the path of a complete run's record, `FOLDER/DATASET/MODEL/RECIPE/seedN.json`.

    The record of an incomplete run is `seedN.partial.json` in the same folder. The default of `folder`
    is `results` in the output folder.

    Raises:
        ValueError: if a name cannot be that of a folder.
    """
    for what, name in (
        ("name of the data set", dataset),
        ("name of the network", model),
        ("name of the recipe", recipe),
    ):
        paths.check_name(what, name)
    return Path(folder or paths.output() / "results") / dataset / model / recipe / f"seed{seed}.json"


def folders():
    """Return the list of folders that are searched for records, in this order."""
    places = [place / "results" for place in (paths.output(), paths.root()) if place]
    return list(dict.fromkeys(places))


def kept_network(dataset, model, recipe, seed=0):
    """Return the path of the network that a run kept, `seedN.keras` beside its record; None if there is none."""
    paths_of_it = [path_of(dataset, model, recipe, seed, folder).with_suffix(".keras") for folder in folders()]
    return next(filter(Path.exists, paths_of_it), None)


def trained_kernels(model, dataset, recipe, seed=0):
    """Read the kernels of the Conv2D layers of a network that a run kept, without importing Keras.

    Layers of nested models and depthwise layers are left out.

    Args:
        model, dataset, recipe, seed: of the run, as in `experiments.load_trained`.

    Returns:
        list of (height, width, in_channels, filters) float32 arrays, in the order of the layers.

    Raises:
        ValueError: if no network was kept, or its file is damaged.
    """
    import h5py  # slow to import

    path = kept_network(dataset, model, recipe, seed)
    if path is None:
        raise ValueError(f"no network is kept for {dataset}/{model}/{recipe}, seed {seed}")
    try:
        with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as weights:
            layers = weights["layers"]
            names = [name for name in layers if re.fullmatch(r"conv2d(_\d+)?", name)]
            names.sort(key=lambda name: int(name.partition("_")[2] or 0))
            return [layers[name]["vars"]["0"][:] for name in names]
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{paths.shown(path)} is not a network that Keras saved: {error}") from None


# --- runs --------------------------------------------------------------------------------------------------------


def write(record, folder=None):
    """Write `record` to the path that its entries name (see `path_of`); return the path.

    Raises:
        ValueError: if a number in the record is not finite, or the file cannot be written.
    """
    path = path_of(record["dataset"], record["model"], record["recipe"]["name"], record["seed"], folder)
    if record["status"] != "complete":  # must not replace a complete record
        path = path.with_suffix(".partial.json")
    _write_json(path, {"schema": SCHEMA, **record})
    return path


def result(record):
    """Return ("test" or "validation", the dict of results on these images) of a complete run."""
    return ("test", record["test"]) if record["test"] else ("validation", record["epochs"][-1]["validation"])


def read(path):
    """Read the record in the file `path`.

    Raises:
        ValueError: if the file is missing, damaged or not a record (see `check`); the message names it.
    """
    try:
        record = check(_read_json(path))
        check_choice("schema", record.get("schema"), [SCHEMA])
    except ValueError as error:
        raise ValueError(f"{paths.shown(path)} is not a readable record ({error}); delete it and train again") from None
    return record


def parse(text):
    """Parse the JSON of a record or a measurement, and rename keys of the first edition.

    Keys are renamed in every nested dict, and in the column list of a data frame that pandas wrote with
    orient="split".

    Returns:
        dict.

    Raises:
        ValueError: if `text` is not a JSON object, or a number in it is not finite.
    """
    try:
        content = json.loads(text, object_hook=_with_current_keys, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_types("the file", content, {})
    return content


def check(record):
    """Return `record` if its entries, those of its epochs and its results have the types that readers rely on.

    Raises:
        ValueError: if one is missing or has another type; or if the epochs do not count from 1 to the
            recipe's number, all of them in a complete run.
    """
    _check_types("the record", record, _RECORD)
    check_choice("status", record["status"], ("complete", "running", "diverged"))
    recipe, epochs, complete = record["recipe"], record["epochs"], record["status"] == "complete"
    _check_types("its recipe", recipe, {"name": str, "epochs": int})
    _check_types("its versions", record["versions"], {"keras": str})
    if "test" not in record:
        raise ValueError("the record has no 'test'")
    results = [] if record["test"] is None else [record["test"]]
    for row in epochs:
        _check_types("an epoch", row, _EPOCH)
        results += [row["validation"]] if "validation" in row else []
    numbers, planned = [row["epoch"] for row in epochs], recipe["epochs"]
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) > planned or complete and len(numbers) < planned:
        raise ValueError(f"it is {record['status']}, and its epochs are {reprlib.repr(numbers)} of {planned}")
    if complete and record["test"] is None and not (epochs and "validation" in epochs[-1]):
        raise ValueError("it is complete, but has no results")
    for result in results:
        _check_types("a result", result, _RESULT)
    return record


def lookup(dataset, model, recipe, seed):
    """Return (record, path) of the first such complete run in `folders()`; (None, None) if there is none.

    Raises:
        ValueError: if its file is damaged: a training must not replace it unasked.
    """
    for folder in folders():
        path = path_of(dataset, model, recipe, seed, folder)
        record = read(path) if path.exists() else None
        if record and record["status"] == "complete":
            return record, path
    return None, None


def find(dataset=None, model=None, recipe=None, seed=None, status="complete", where=None):
    """Find all runs that match.

    Damaged files and those that are not records (see `check`) are skipped; a printed line names each.

    Args:
        dataset, model, recipe, seed: values to match; None matches all.
        status: "complete", "running" or "diverged"; None matches all.
        where: folders to search; default: `folders()`. If two have a record of the same run, the first
            one counts.

    Returns:
        DataFrame with one row per run, sorted by data set, model, recipe and seed. `loss`, `top1` and
        `top5` are those on the test images, `epochs` counts the epochs, and `record` is the whole record.
    """
    rows = {}
    for folder in where or folders():
        for path in sorted(Path(folder).glob("*/*/*/seed*.json")):
            run = path.relative_to(folder)
            record = _or_report(read, path) if run not in rows else None
            if record:
                rows[run] = _row(record, path)
    frame = pd.DataFrame(rows.values(), columns=_COLUMNS)
    wanted = {"dataset": dataset, "model": model, "recipe": recipe, "seed": seed, "status": status}
    for column, value in wanted.items():
        frame = frame if value is None else frame[frame[column] == value]
    return frame.sort_values(_RUN, ignore_index=True)


# --- other measurements ------------------------------------------------------------------------------------------


def save(name, content):
    """Write a measurement that is not a run to `results/NAME.json` in the output folder; return the path.

    Args:
        name: name of the file, without its ending; folders before it are separated by "/".
        content: dict of JSON types.

    Raises:
        ValueError: if a number is not finite, or the file cannot be written.
    """
    path = _measurement(name, paths.output() / "results")
    _write_json(path, content)
    return path


def load(name):
    """Return (content, path) of the first `NAME.json` in `folders()`; (None, None) if there is none.

    Damaged files are skipped; a printed line names each.
    """
    for folder in folders():
        path = _measurement(name, folder)
        content = _or_report(_read_measurement, path) if path.exists() else None
        if content is not None:
            return content, path
    return None, None


def cached(name, compute, settings=None, recompute=False):
    """Read the result of `compute()` from a file. If there is no file, compute it and write the file.

    Args:
        name: name of the file without its ending, as in `load`.
        compute: function without arguments that returns a dict of JSON types.
        settings: dict of everything that the result depends on; stored in the file as "settings".
        recompute: compute even if there is a file, and replace it.

    Returns:
        dict with "settings", always as read from the file: tuples are lists, and keys are strings.

    Raises:
        ValueError: if the file was computed with other settings, or cannot be written.
    """
    settings = settings or {}
    content, path = (None, None) if recompute else load(name)
    if content is None:
        check_writable(_measurement(name, paths.output() / "results").parent)
        save(name, compute() | {"settings": settings})
        content, path = load(name)  # from the file, so that all calls return the same types
    kept = content.get("settings", {})
    differing = [key for key in kept | settings if kept.get(key) != settings.get(key)]
    if differing:
        raise ValueError(
            f"{paths.shown(path)} was computed with another {', '.join(differing)}; pass recompute=True to replace it"
        )
    return content


def _write_json(path, content):
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _with_current_keys(content):
    content = {_RENAMED.get(key, key): value for key, value in content.items()}
    if isinstance(content.get("columns"), list):
        content["columns"] = [_RENAMED.get(str(name), name) for name in content["columns"]]
    return content


def _row(record, path):
    test = record.get("test") or {}
    row = {column: record.get(column) for column in _COLUMNS} | {column: test.get(column) for column in _FIGURES}
    own = {"recipe": record["recipe"]["name"], "epochs": len(record["epochs"]), "path": str(path), "record": record}
    return row | own


def _measurement(name, folder):
    for part in str(name).split("/"):
        paths.check_name("name of the measurement", part)
    return folder / f"{name}.json"


def _read_measurement(path):
    try:
        content = _read_json(path)
        _check_types("the file", {"settings": {}} | content, {"settings": dict})
    except ValueError as error:
        raise ValueError(f"{paths.shown(path)} is not readable ({error}); delete it and measure again") from None
    return content


def _read_json(path):
    try:
        return parse(Path(path).read_text())
    except OSError as error:
        raise ValueError(error.strerror) from None


def _refuse(constant):
    raise ValueError(f"{constant} is not a finite number")


def _check_types(what, content, types):
    """Raise ValueError unless `content` is a dict that has the keys of `types`, with values of these types."""
    if type(content) is not dict:
        raise ValueError(f"{what} is {reprlib.repr(content)}, not a dict")
    for key, kind in types.items():
        if key not in content:
            raise ValueError(f"{what} has no {key!r}")
        value = content[key]
        allowed = (int, float) if kind is float else (kind,)
        if type(value) not in allowed or kind is float and not -_HUGE < value < _HUGE:
            raise ValueError(f"{key!r} of {what} is {reprlib.repr(value)}, not of the type {kind.__name__}")


def _or_report(reader, path):
    """Return `reader(path)`; if that raises ValueError, print a line and return None."""
    try:
        return reader(path)
    except ValueError as error:
        paths.say(f"skipped: {error}")
        return None
