"""The state of a training on disk, beside its record: what an interrupted run goes on from, and the trained network."""

import io
import json

import keras
import numpy as np

from fcnn_utils import _files
from fcnn_utils.course import records


def file_of(record, suffix):
    """Path of a run's file `seedN.SUFFIX`, beside its record."""
    path = records.path_of(record["dataset"], record["model"], record["recipe"]["name"], record["seed"])
    return path.with_suffix(f".{suffix}")


def save(model, record):
    """Weights, optimizer and record in one file, so that they belong together whatever happens.

    Raises:
        ValueError: the file cannot be written.
    """
    arrays = {f"v{number}": keras.ops.convert_to_numpy(variable.value) for number, variable in enumerate(_state(model))}
    content = io.BytesIO()
    np.savez(content, record=json.dumps(record), **arrays)
    _files.write_atomic(file_of(record, "checkpoint.npz"), content.getvalue())


def resume(model, record):
    """Load the checkpoint of the same run into `model`, which is compiled.

    A file that is damaged or of other settings is named on standard output and left.

    Returns:
        list of the epochs behind it, as they stand in the record; [] without a checkpoint.
    """
    path = file_of(record, "checkpoint.npz")
    if not path.exists():
        return []
    model.optimizer.build(model.trainable_variables)
    try:
        with np.load(path) as saved:
            earlier = json.loads(str(saved["record"]))
            arrays = [saved[f"v{number}"] for number in range(len(saved.files) - 1)]
        same = all(
            earlier[key] == record[key] for key in ("fingerprint", "model", "recipe", "seed", "precision", "params")
        )
        if not same or [array.shape for array in arrays] != [tuple(variable.shape) for variable in _state(model)]:
            print(f"{records.shown(path)} belongs to other settings: starting anew", flush=True)
            return []
    except Exception as error:  # a damaged file raises nearly anything
        print(f"{records.shown(path)} is damaged ({error}): starting anew", flush=True)
        return []
    for variable, array in zip(_state(model), arrays, strict=True):
        variable.assign(array)
    print(f"{record['model']} · {record['recipe']['name']} · going on after epoch {len(earlier['epochs'])}", flush=True)
    return earlier["epochs"]


def keep(model, record):
    """Keep the trained network, without its optimizer, as `seedN.keras` beside the record; written whole.

    Raises:
        ValueError: the file cannot be written; says why and what to do.
    """
    path = file_of(record, "keras")
    bare = type(model).from_config(model.get_config())  # a compiled model would bring its optimizer, as large again
    bare.set_weights(model.get_weights())
    temporary = path.with_name(f".{path.stem}.tmp.keras")
    try:
        bare.save(temporary)
        _files.write_atomic(path, temporary.read_bytes())
    except OSError as error:
        raise ValueError(_files.cannot_write(path, error)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _state(model):
    return [*model.variables, *model.optimizer.variables]  # with the seeds of layers that draw, such as dropout
