"""Save and load what lies beside a record: the checkpoint of an interrupted run, and the trained network."""

import io
import json

import keras
import numpy as np

from fcnn_utils import _files
from fcnn_utils.course import paths, records

_SAME = ("fingerprint", "model", "recipe", "seed", "precision")  # must equal the checkpoint's entries


def file_of(record, suffix):
    """Return the path `seedN.SUFFIX` beside the record of a run."""
    path = records.path_of(record["dataset"], record["model"], record["recipe"]["name"], record["seed"])
    return path.with_suffix(f".{suffix}")


def save(model, record):
    """Write weights, optimizer state and record to one file, `seedN.checkpoint.npz`, so that they always agree.

    Raises:
        ValueError: if the file cannot be written.
    """
    arrays = {f"v{number}": keras.ops.convert_to_numpy(variable.value) for number, variable in enumerate(_state(model))}
    content = io.BytesIO()
    np.savez(content, record=json.dumps(record), **arrays)
    _files.write_atomic(file_of(record, "checkpoint.npz"), content.getvalue())


def resume(model, record, restart=False):
    """Load the checkpoint of the same run into a compiled model.

    A file that is damaged or belongs to other settings is not loaded; a printed line says so. With `restart`, neither
    is one with all epochs: it was left by a run that was killed at its very end.

    Returns:
        list of the epochs done so far, as in the record; [] if nothing was loaded.
    """
    path = file_of(record, "checkpoint.npz")
    if not path.exists():
        return []
    model.optimizer.build(model.trainable_variables)
    try:
        earlier, arrays = _read(path)
    except ValueError as error:
        paths.say(f"{paths.shown(path)} is damaged ({error}): starting anew")
        return []
    if restart and len(earlier["epochs"]) == record["recipe"]["epochs"]:
        return []
    kinds = [(array.shape, array.dtype.name) for array in arrays]
    wanted = [(tuple(variable.shape), keras.backend.standardize_dtype(variable.dtype)) for variable in _state(model)]
    if kinds != wanted or not _is_same(earlier, record):
        paths.say(f"{paths.shown(path)} belongs to other settings: starting anew")
        return []
    for variable, array in zip(_state(model), arrays, strict=True):
        variable.assign(array)
    paths.say(f"{record['model']} · {record['recipe']['name']} · going on after epoch {len(earlier['epochs'])}")
    return earlier["epochs"]


def record_of(record, restart=False):
    """Return the record in the checkpoint that `resume` would load; {} if it would load none."""
    try:
        earlier, _ = _read(file_of(record, "checkpoint.npz"))
    except ValueError:
        return {}
    is_whole = len(earlier["epochs"]) == record["recipe"]["epochs"]
    return earlier if _is_same(earlier, record) and not (restart and is_whole) else {}


def epochs_done(record):
    """Return the number of epochs in the checkpoint of a run; 0 if there is none that `resume` would load."""
    return len(record_of(record).get("epochs", []))


def keep(model, record):
    """Write the trained network, without its optimizer, as `seedN.keras` beside the record.

    Raises:
        ValueError: if the file cannot be written.
    """
    path = file_of(record, "keras")
    bare = type(model).from_config(model.get_config())  # `model` has the optimizer, up to twice as large as the weights
    bare.set_weights(model.get_weights())
    temporary = path.with_name(f".{path.name}.tmp.keras")
    try:
        bare.save(temporary)
        _files.write_atomic(path, temporary.read_bytes())
    except OSError as error:
        raise ValueError(_files.cannot_write(path, error)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _is_same(earlier, record):
    """Return whether both are of one run; the network may be factorized in one of them (see `switching`)."""
    params = [each.get("dense", each)["params"] for each in (earlier, record)]
    return params[0] == params[1] and all(earlier[key] == record[key] for key in _SAME)


def _read(path):
    """Return the record and the list of arrays of a checkpoint; raise ValueError if it is not a whole one."""
    arrays = _files.read_arrays(path)
    record = records.check(records.parse(str(arrays.pop("record", ""))))
    if not record["epochs"]:
        raise ValueError("it has no epochs")
    if list(arrays) != [f"v{number}" for number in range(len(arrays))]:
        raise ValueError("an array is missing")
    if not all(np.isfinite(array).all() for array in arrays.values() if array.dtype.kind == "f"):
        raise ValueError("its weights are not finite")
    return record, list(arrays.values())


def _state(model):
    """Return all variables that training changes, including the seeds of random layers such as dropout."""
    return [*model.variables, *model.optimizer.variables]
