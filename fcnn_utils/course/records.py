"""Run records: one JSON file a run, and where every file of a run goes.

A record is a plain dict. Its path says what it is: `results/DATASET/MODEL/RECIPE/seedN.json`.
Records are looked for in two folders: `output()/results`, where new ones are written, and the `results/`
of the project, whose records stand behind the published numbers. Nothing here knows Keras.

Every file is written whole: to a temporary name in the same folder first, then renamed.
"""

import json
import os
from pathlib import Path

import pandas as pd

from fcnn_utils._files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1
_NEEDED = ("schema", "dataset", "model", "recipe", "seed", "status", "epochs")


def output():
    """The folder this process writes to: `$FCNN_OUTPUT`, else `build/explore` of the project."""
    return Path(os.environ.get("FCNN_OUTPUT") or ROOT / "build" / "explore")


def shown(path):
    """`path` as a person reads it: relative to the project where it lies inside."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def path_of(dataset, model, recipe, seed, folder=None):
    """Path of a run's record: `FOLDER/DATASET/MODEL/RECIPE/seedN.json` (FOLDER: `output()/results`).

    A run that is not complete has its record beside it, as `seedN.partial.json`.
    """
    return Path(folder or output() / "results") / dataset / model / recipe / f"seed{seed}.json"


def write(record, folder=None):
    """Write `record` to the path its own entries name (`path_of`); returns the path.

    Raises:
        ValueError: the file cannot be written.
    """
    path = path_of(record["dataset"], record["model"], record["recipe"]["name"], record["seed"], folder)
    if record["status"] != "complete":  # never over a complete one
        path = path.with_suffix(".partial.json")
    write_atomic(path, json.dumps({"schema": SCHEMA, **record}, indent=1, allow_nan=False) + "\n")
    return path


def read(path):
    """The record in the file `path`.

    Raises:
        ValueError: not a record: damaged, or of an unknown schema. Names the file.
    """
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{shown(path)} is not a readable record ({error}); delete it and train again") from None
    missing = [key for key in _NEEDED if key not in record] if isinstance(record, dict) else _NEEDED
    if missing or record["schema"] != SCHEMA:
        raise ValueError(f"{shown(path)} is not a record of schema {SCHEMA}; delete it and train again")
    return record


def folders():
    """Where records are looked for, the nearest first."""
    return list(dict.fromkeys([output() / "results", ROOT / "results"]))


def save(name, content):
    """Keep something measured that is not a run, as `output()/results/NAME.json`; returns the path.

    Args:
        name: of the file, without its ending.
        content: dict of JSON types.

    Raises:
        ValueError: the file cannot be written.
    """
    path = output() / "results" / f"{name}.json"
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def load(name):
    """(content, path) of the nearest `NAME.json` that `save` wrote, or (None, None).

    A damaged file is named on standard output and skipped.
    """
    for folder in folders():
        path = folder / f"{name}.json"
        if path.exists():
            try:
                return json.loads(path.read_text()), path
            except ValueError as error:
                print(f"skipped: {shown(path)} is not readable ({error}); delete it and measure again")
    return None, None


def cached(name, compute, settings=None, recompute=False):
    """What `compute()` gave, read from a file; computed and kept where there is none.

    Args:
        name: of the file, without its ending, as for `save`; the nearest is read.
        compute: function without arguments that returns a dict of JSON types.
        settings: dict of what the result depends on, kept with it as its entry "settings".
        recompute: compute though there is a file.

    Returns:
        The dict as it is when it is read, with lists for tuples, and its entry "settings".

    Raises:
        ValueError: what is there was computed with other settings, or the file cannot be written.
    """
    settings = settings or {}
    content, path = (None, None) if recompute else load(name)
    if content is None:
        save(name, compute() | {"settings": settings})
        content, path = load(name)  # as it is when it is read: lists for tuples, words for the keys
    kept = content.get("settings", {})
    differs = [key for key in kept | settings if kept.get(key) != settings.get(key)]
    if differs:
        raise ValueError(f"{shown(path)} was computed with another {', '.join(differs)}; compute it anew to replace it")
    return content


def lookup(dataset, model, recipe, seed):
    """(record, path) of the nearest complete run with these names, or (None, None)."""
    for folder in folders():
        path = path_of(dataset, model, recipe, seed, folder)
        record = _read_or_report(path) if path.exists() else None
        if record and record["status"] == "complete":
            return record, path
    return None, None


def find(dataset=None, model=None, recipe=None, seed=None, status="complete", where=None):
    """Data frame of the runs that match, one row each, sorted; the column `record` holds the whole record.

    A damaged file is named on standard output and skipped.

    Args:
        dataset: runs on the data set of this name only.
        model: runs of the network of this name only.
        recipe: runs by the recipe of this name only.
        seed: runs of this seed only.
        status: "complete", "running", "diverged", or None for all.
        where: folders to look in (default: `folders()`); of two runs with one name the nearer folder's counts.
    """
    rows = {}
    for folder in where or folders():
        for path in sorted(Path(folder).glob("*/*/*/seed*.json")):
            name = path.relative_to(folder)
            record = _read_or_report(path) if name not in rows else None
            if record:
                rows[name] = _row(record, path)
    frame = pd.DataFrame(rows.values(), columns=_COLUMNS)
    for column, value in [
        ("dataset", dataset),
        ("model", model),
        ("recipe", recipe),
        ("seed", seed),
        ("status", status),
    ]:
        frame = frame if value is None else frame[frame[column] == value]
    return frame.sort_values(["dataset", "model", "recipe", "seed"], ignore_index=True)


_COLUMNS = [
    "dataset",
    "model",
    "recipe",
    "seed",
    "status",
    "epochs",
    "top1",
    "top5",
    "loss",
    "params",
    "macs",
    "path",
    "record",
]


def _row(record, path):
    test = record.get("test") or {}
    values = {key: record.get(key) for key in _COLUMNS} | {key: test.get(key) for key in ("top1", "top5", "loss")}
    return values | {
        "recipe": record["recipe"]["name"],
        "epochs": len(record["epochs"]),
        "path": str(path),
        "record": record,
    }


def _read_or_report(path):
    try:
        return read(path)
    except ValueError as error:
        print(f"skipped: {error}")
        return None
