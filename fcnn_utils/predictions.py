"""Probabilities that a trained network gave, kept beside its record: what ensembles are made of, without the networks.

Of more than 20 classes a probability p takes a byte, 255 √(−ln p / 16), rounded: from e⁻¹⁶ to 1, with an error of at
most 7 parts in a hundred of p, of 2 where p is a fifth. Of fewer it takes two bytes, for errors 257 times smaller,
since few classes are few numbers and an AUC counts ties. The likeliest class stays the likeliest.
"""

import io

import numpy as np

from fcnn_utils import checkpoint, records

_FLOOR = 16.0  # −ln of the least probability that is told from 0


def keep(record, number, probabilities):
    """Keep what the network of a run says after its cycle `number` (from 0), beside those of the cycles before.

    Args:
        probabilities: dict "validation", "test" (or one of them) -> (N, classes).
    """
    path = checkpoint.file_of(record, "predictions.npz")
    before = _read(path) if number else {}
    content = io.BytesIO()
    np.savez_compressed(
        content, **{split: [*before.get(split, [])[:number], coded(values)] for split, values in probabilities.items()}
    )
    records.write_atomic(path, content.getvalue())


def load(dataset, model, recipe, seed=0):
    """What the network of a run said: dict "validation", "test" -> (cycles, N, classes) float64, each N in the order of
    the data set's split; None where it was not kept. "validation" is there where the run did not train on it.

    Args:
        dataset, model, recipe: the names in the run's record.

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
    kind = np.uint8 if probabilities.shape[1] > 20 else np.uint16
    roots = np.sqrt(-np.log(np.clip(probabilities, np.exp(-_FLOOR), 1)) / _FLOOR)
    codes = np.rint(np.iinfo(kind).max * roots).astype(kind)
    best = probabilities.argmax(axis=1)
    tied = np.flatnonzero(codes.argmin(axis=1) != best)
    codes[tied, best[tied]] -= 1  # ahead of a class that was as good as likely
    return codes


def decoded(codes):
    """Integers of `coded`, (…, classes), as probabilities that sum to one."""
    codes = np.asarray(codes)
    values = np.exp(-_FLOOR * (codes / np.iinfo(codes.dtype).max) ** 2)
    return values / values.sum(axis=-1, keepdims=True)


def _read(path):
    try:
        with np.load(path) as file:
            return {split: file[split] for split in file.files}
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"{records.shown(path)} is damaged ({error}); delete it and train again") from None
