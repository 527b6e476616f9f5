"""Store predicted probabilities beside a run's record, so that ensembles do not need the networks.

A probability p is stored as the integer nearest to 12 ln(1 − ln p / 0.3). These 49 values cover e⁻¹⁶ to
1, are finest near 1, and compress well. The relative error of p is at most

    p = 0.9      2%
    p = 0.2      8%
    p = 0.001   30%

and changes the accuracy of an ensemble by a few hundredths of a percentage point. For at most 20 classes
the steps are 256 times smaller, because ties change the area under the ROC curve. The most probable
class of an image never changes.
"""

import io

import numpy as np

from fcnn_utils import _files
from fcnn_utils.course import checkpoints, paths, records

_FLOOR = 16.0  # −ln of the smallest probability that is stored
_SCALE = 0.3
_STEPS = {np.dtype("uint8"): 12, np.dtype("uint16"): 12 * 256}
_FEW = 20  # classes: finer steps for at most so many


def keep(record, number, probabilities):
    """Add the predictions after one cycle of a run to those of the earlier cycles.

    Until the run is complete, the file is called `seedN.partial.predictions.npz`.

    Args:
        record: record of the run.
        number: number of the cycle, from 0; later cycles in the file are dropped.
        probabilities: dict "validation", "test" (or one of them) -> (N, classes).

    Raises:
        ValueError: if the file cannot be written, or the file of the earlier cycles is damaged or does not have
            as many images and classes.
    """
    path = checkpoints.file_of(record, "partial.predictions.npz")
    cycles = {split: encode(values)[None] for split, values in probabilities.items()}
    if number:
        before = _read(path)
        if any(split not in before or before[split].shape[1:] != values.shape[1:] for split, values in cycles.items()):
            raise ValueError(f"{paths.shown(path)} is of other images or classes; delete it and train again")
        cycles = {split: np.concatenate([before[split][:number], values]) for split, values in cycles.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **cycles)
    _files.write_atomic(path, content.getvalue())


def check_kept(record, number):
    """Check that the predictions of the first `number` cycles are kept, before a run goes on after them.

    Raises:
        ValueError: if they are not; the message says what to do.
    """
    path, checkpoint = (checkpoints.file_of(record, name) for name in ("partial.predictions.npz", "checkpoint.npz"))
    if number and (not path.exists() or min(map(len, _read(path).values())) < number):
        raise ValueError(
            f"{paths.shown(path)} lacks predictions of earlier cycles; delete {paths.shown(checkpoint)} to train anew, "
            "or go on without save_predictions"
        )


def finish(record):
    """Copy the predictions of a run to their final name, before its record is complete; they replace earlier ones.

    The run deletes `seedN.partial.predictions.npz` after its record is written: until then it may be stopped.
    """
    content = checkpoints.file_of(record, "partial.predictions.npz").read_bytes()
    _files.write_atomic(checkpoints.file_of(record, "predictions.npz"), content)


def load(dataset, model, recipe, seed=0):
    """Load the predictions of a complete run.

    Args:
        dataset: name of the data set, as in the run's record, which lies beside the predictions.
        model: name of the network in it, such as "simple-width0.6".
        recipe: name of the recipe in it, such as "fast-epochs2".
        seed: seed of the run.

    Returns:
        dict "validation", "test" -> (cycles, N, classes) float64, images in the order of the split; None
        if no predictions were kept. "validation" is missing if the run trained on these images.

    Raises:
        ValueError: if the file is damaged or does not agree with the record; the message names it.
    """
    for folder in records.folders():
        path = records.path_of(dataset, model, recipe, seed, folder).with_suffix(".predictions.npz")
        record = path.with_name(f"seed{seed}.json")
        if path.exists() and record.exists():
            codes = _read(path)
            _check_agrees(path, codes, records.read(record))
            return {split: decode(values) for split, values in codes.items()}
    return None


def encode(probabilities):
    """Encode probabilities (N, classes) as integers of the same shape: uint8, or uint16 for at most 20 classes."""
    probabilities = np.asarray(probabilities)
    kind = _kind(probabilities.shape[1])
    logs = -np.log(np.clip(probabilities, np.exp(-_FLOOR), 1))
    codes = np.rint(_STEPS[kind] * np.log1p(logs / _SCALE)).astype(kind)
    best = probabilities.argmax(axis=1)
    tied = np.flatnonzero(codes.argmin(axis=1) != best)
    codes[tied, best[tied]] -= 1  # the most probable class gets the smallest code of its row
    return codes


def decode(codes):
    """Decode integers (…, classes) from `encode` into probabilities of the same shape that sum to 1."""
    codes = np.asarray(codes)
    values = np.exp(-_SCALE * np.expm1(codes / _STEPS[codes.dtype]))
    return values / values.sum(axis=-1, keepdims=True)


def _kind(classes):
    return np.dtype("uint8" if classes > _FEW else "uint16")


def _read(path):
    """Return dict split -> codes (cycles, N, classes) of a file; raise ValueError if they are not such codes."""
    try:
        codes = _files.read_arrays(path)
        for split, values in codes.items():
            if split not in ("validation", "test") or values.ndim != 3 or values.dtype != _kind(values.shape[2]):
                raise ValueError(f"it has {split!r}, {values.shape} of {values.dtype}")
            if not values.size or values.max() > _STEPS[values.dtype] * np.log1p(_FLOOR / _SCALE) + 1:
                raise ValueError(f"{split!r} has values that are no probabilities")
        if "test" not in codes:
            raise ValueError("it has no 'test'")
    except ValueError as error:
        raise ValueError(f"{paths.shown(path)} is damaged ({error}); delete it and train again") from None
    return codes


def _check_agrees(path, codes, record):
    """Raise ValueError unless codes have as many cycles, images and classes as the results in the run's record."""
    results = {"validation": record["epochs"][-1].get("validation"), "test": record["test"]}
    cycles = record["recipe"].get("cycles", 1)
    for split, values in codes.items():
        result = results[split] or {"images": None, "correct_by_class": ()}
        expected = (cycles, result["images"], len(result["correct_by_class"]))
        if values.shape != expected:
            raise ValueError(
                f"{paths.shown(path)} has {values.shape} {split} predictions, but the run's record has {expected}; "
                "delete both and train again"
            )
