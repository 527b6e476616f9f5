"""Read and write records of training runs, one JSON file each, and files of other measurements.

A record is a dict of JSON types; `experiments` documents its entries. Its path names the run:
`results/DATASET/MODEL/RECIPE/seedN.json`. New records go to `results/` in the output folder. Records are
searched there first, then in `results/` of the course, which holds the published ones. This module does
not import Keras.
"""

import json
from pathlib import Path

import pandas as pd

from fcnn_utils._files import write_atomic
from fcnn_utils.course import paths

SCHEMA = 1
_REQUIRED = ("schema", "dataset", "model", "recipe", "seed", "status", "epochs")
_RENAMED = {"others_cpu": "background_load"}  # key in files of the first edition -> current key
_RUN = ["dataset", "model", "recipe", "seed"]  # these identify a run
_FIGURES = ["top1", "top5", "loss"]
_COLUMNS = [*_RUN, "status", "epochs", *_FIGURES, "params", "macs", "path", "record"]


def path_of(dataset, model, recipe, seed, folder=None):
    """Return the path of a complete run's record, `FOLDER/DATASET/MODEL/RECIPE/seedN.json`.

    The record of an incomplete run is `seedN.partial.json` in the same folder. The default of `folder`
    is `results` in the output folder.
    """
    return Path(folder or paths.output() / "results") / dataset / model / recipe / f"seed{seed}.json"


def folders():
    """Return the list of folders that are searched for records, in this order."""
    places = [place / "results" for place in (paths.output(), paths.root()) if place]
    return list(dict.fromkeys(places))


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


def read(path):
    """Read the record in the file `path`.

    Raises:
        ValueError: if the file is missing, damaged or of another schema; the message names it.
    """
    try:
        record = parse(Path(path).read_text())
    except (OSError, ValueError) as error:  # text that is not UTF-8, or not JSON, is a ValueError
        raise ValueError(f"{paths.shown(path)} is not a readable record ({error}); delete it and train again") from None
    if not isinstance(record, dict) or any(key not in record for key in _REQUIRED) or record["schema"] != SCHEMA:
        raise ValueError(f"{paths.shown(path)} is not a record of schema {SCHEMA}; delete it and train again")
    return record


def parse(text):
    """Parse the JSON of a record or a measurement, and rename keys of the first edition.

    Keys are renamed in every nested dict, and in the column list of a data frame that pandas wrote with
    orient="split".

    Raises:
        ValueError: if `text` is not JSON.
    """
    return json.loads(text, object_hook=_with_current_keys)


def lookup(dataset, model, recipe, seed):
    """Return (record, path) of the first such complete run in `folders()`; (None, None) if there is none."""
    for folder in folders():
        path = path_of(dataset, model, recipe, seed, folder)
        record = _read_or_report(path) if path.exists() else None
        if record and record["status"] == "complete":
            return record, path
    return None, None


def find(dataset=None, model=None, recipe=None, seed=None, status="complete", where=None):
    """Find all runs that match.

    Damaged files are skipped; a printed line names each.

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
            record = _read_or_report(path) if run not in rows else None
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
        name: name of the file, without its ending.
        content: dict of JSON types.

    Raises:
        ValueError: if a number is not finite, or the file cannot be written.
    """
    path = paths.output() / "results" / f"{name}.json"
    _write_json(path, content)
    return path


def load(name):
    """Return (content, path) of the first `NAME.json` in `folders()`; (None, None) if there is none.

    Damaged files are skipped; a printed line names each.
    """
    for folder in folders():
        path = folder / f"{name}.json"
        if path.exists():
            try:
                return parse(path.read_text()), path
            except ValueError as error:
                print(f"skipped: {paths.shown(path)} is not readable ({error}); delete it and measure again")
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


def _read_or_report(path):
    try:
        return read(path)
    except ValueError as error:
        print(f"skipped: {error}")
        return None
