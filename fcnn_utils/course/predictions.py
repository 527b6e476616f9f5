"""Probabilities that a trained network gave, kept beside its record: what ensembles are made of, without the networks.

A probability p is kept as 12 ln(1 − ln p / 0.3), rounded: from e⁻¹⁶ to 1 in 49 steps, finest near 1, which compress
well. Its error is at most 2 parts in a hundred of p where p is 0.9, 8 where it is a fifth, 30 where it is a thousandth;
it shifts the accuracy of a vote by some hundredths of a point. Of at most 20 classes the steps are 256 times smaller,
since few classes are few numbers and an AUC counts ties. The likeliest class stays the likeliest.
"""

import io

import numpy as np

from fcnn_utils import _files
from fcnn_utils.course import checkpoints, records

_FLOOR = 16.0  # −ln of the least probability that is told from 0
_SCALE = 0.3
_STEPS = {np.dtype("uint8"): 12, np.dtype("uint16"): 12 * 256}


def keep(record, number, probabilities):
    """Keep what the network of a run says after its cycle `number` (from 0), beside those of the cycles before.

    As long as the run goes on, under a name of its own, as its record is: `finish` gives it the final one.

    Args:
        record: of the run.
        number: of the cycle.
        probabilities: dict "validation", "test" (or one of them) -> (N, classes).

    Raises:
        ValueError: the file cannot be written, or that of the cycles before is damaged.
    """
    path = checkpoints.file_of(record, "partial.predictions.npz")
    before = _read(path) if number else {}
    content = io.BytesIO()
    np.savez_compressed(
        content, **{split: [*before.get(split, [])[:number], coded(values)] for split, values in probabilities.items()}
    )
    _files.write_atomic(path, content.getvalue())


def finish(record):
    """The run is complete: what was kept of it is what `load` finds, in place of what an earlier run left."""
    path = checkpoints.file_of(record, "partial.predictions.npz")
    if path.exists():
        path.replace(checkpoints.file_of(record, "predictions.npz"))


def load(dataset, model, recipe, seed=0):
    """What the network of a complete run said.

    Args:
        dataset: name of the data set, as in the run's record.
        model: name of the network there, "simple-width0.6".
        recipe: name of the recipe there, "fast-epochs2".
        seed: of the run.

    Returns:
        dict "validation", "test" -> (cycles, N, classes) float64, the N images in the order of the data set's split;
        None where it was not kept. "validation" is there where the run did not train on it.

    Raises:
        ValueError: the file is damaged; names it.
    """
    for folder in records.folders():
        path = records.path_of(dataset, model, recipe, seed, folder).with_suffix(".predictions.npz")
        if path.exists():
            return {split: decoded(codes) for split, codes in _read(path).items()}
    return None


def coded(probabilities):
    """Probabilities (N, classes) as unsigned integers, of one byte or two."""
    probabilities = np.asarray(probabilities)
    kind = np.dtype("uint8" if probabilities.shape[1] > 20 else "uint16")
    logs = -np.log(np.clip(probabilities, np.exp(-_FLOOR), 1))
    codes = np.rint(_STEPS[kind] * np.log1p(logs / _SCALE)).astype(kind)
    best = probabilities.argmax(axis=1)
    tied = np.flatnonzero(codes.argmin(axis=1) != best)
    codes[tied, best[tied]] -= 1  # ahead of a class that was as good as likely
    return codes


def decoded(codes):
    """Integers of `coded`, (…, classes), as probabilities that sum to one."""
    codes = np.asarray(codes)
    values = np.exp(-_SCALE * np.expm1(codes / _STEPS[codes.dtype]))
    return values / values.sum(axis=-1, keepdims=True)


def _read(path):
    try:
        with np.load(path) as file:
            return {split: file[split] for split in file.files}
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{records.shown(path)} is damaged ({error}); delete it and train again") from None
