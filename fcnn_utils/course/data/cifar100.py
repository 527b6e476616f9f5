"""CIFAR-100's files (Krizhevsky 2009): where they are, what is in them, and how to get them.

The official batches are pickles. A pickle can name any function, and loading it would call that; so these are loaded
by an unpickler that builds NumPy arrays and nothing else.
"""

import os
import pickle
from pathlib import Path

import numpy as np

from fcnn_utils.course.data.download import Unavailable, fetch

_WAY_OUT = "to go on without it, choose the stand-in (--dataset standin)"


def find():
    """Folder with CIFAR-100's extracted batches (`train`, `test`, `meta`), None if there is none.

    Looked for in `$FCNN_DATA_DIR`, Keras's data folder and `./data`, and in their usual subfolders.

    Raises:
        Unavailable: `$FCNN_DATA_DIR` is set, and the batches are in none of these.
    """
    keras_home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    roots = [Path(chosen)] if (chosen := os.environ.get("FCNN_DATA_DIR")) else []
    for root in [*roots, keras_home / "datasets", Path("data")]:
        for folder in (root, root / "cifar-100-python", root / "cifar-100-python-target" / "cifar-100-python"):
            if all(os.path.isfile(folder / part) for part in ("train", "test", "meta")):  # False if it may not be read
                return folder
    if roots:
        raise Unavailable(
            f"FCNN_DATA_DIR is {chosen!r}, but CIFAR-100's files train, test and meta are not there; {_WAY_OUT}"
        )
    return None


def read(folder):
    """The official batches in `folder`.

    Returns:
        ((training, testing), fine names, coarse names), each of the first two as from `read_batch`.

    Raises:
        ValueError: a file is damaged, or holds anything but a batch of CIFAR-100; says which and what to do.
    """
    meta = _unpickle(folder / "meta")
    fine_names = _names(meta, "fine_label_names", 100, folder)
    coarse_names = _names(meta, "coarse_label_names", 20, folder)
    splits = read_batch(folder / "train", per_class=500), read_batch(folder / "test", per_class=100)
    return splits, fine_names, coarse_names


def read_batch(path, per_class):
    """Images and labels of one batch, a pickle whose `data` are (N, 3072) uint8, an image's channels in turn.

    Args:
        path: of the file.
        per_class: how many images of each of the 100 classes it must hold.

    Returns:
        images (N, 32, 32, 3) uint8, fine labels (N,), coarse labels (N,).

    Raises:
        ValueError: the file cannot be read, is damaged, or is no such batch; says what is wrong and what to do.
    """
    batch = _unpickle(path)
    try:
        rows, fine, coarse = batch["data"], _labels(batch["fine_labels"]), _labels(batch["coarse_labels"])
    except KeyError as error:
        raise ValueError(f"{path} is not a batch of CIFAR-100: it has no {error}; {_replace(path)}") from None
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
        raise ValueError(
            f"{path} is not a batch of CIFAR-100: its data are not uint8 rows of 3072 values; {_replace(path)}"
        )
    for labels, count, what in ((fine, 100, "fine"), (coarse, 20, "coarse")):
        if labels.shape != (len(rows),) or labels.dtype.kind not in "iu":
            raise ValueError(f"{path}: {what} labels must be {len(rows)} whole numbers, one an image; {_replace(path)}")
        if len(labels) and not (labels.min() >= 0 and labels.max() < count):
            raise ValueError(
                f"{path}: {what} labels must be between 0 and {count - 1}; "
                f"found {labels.min()} to {labels.max()}; {_replace(path)}"
            )
    if (np.bincount(fine, minlength=100) != per_class).any():
        raise ValueError(
            f"{path} must hold {per_class} images of each of the 100 classes, and does not; {_replace(path)}"
        )
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 3072) -> (N, 32, 32, 3)
    return images, fine, coarse


def _labels(values):
    try:
        return np.asarray(values)
    except ValueError:  # lists among the labels
        return np.empty(0)


def _unpickle(path):
    try:
        with open(path, "rb") as file:
            batch = _NumpyUnpickler(file, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; {_WAY_OUT}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path} is damaged or not a batch of CIFAR-100 ({error}); {_replace(path)}") from None


class _NumpyUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and nothing else: a pickle can name any function, and loading it would call that."""

    allowed = {"numpy": {"ndarray", "dtype"}, "numpy._core.multiarray": {"_reconstruct"}}

    def find_class(self, module, name):
        module = module.replace("numpy.core.", "numpy._core.")  # NumPy 1's name of the same module
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no batch of CIFAR-100 does; nothing of it was run"
            )
        return super().find_class(module, name)


def _replace(path):
    return f"delete {Path(path).parent} and it is downloaded again, or choose the stand-in (--dataset standin)"


def _names(meta, key, count, folder):
    names = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in meta.get(key, ()))
    if len(names) != count:
        raise ValueError(f"{folder / 'meta'} must hold {count} {key}; found {len(names)}; {_replace(folder / 'meta')}")
    return names


def download():
    """Download CIFAR-100 (169 MB) through Keras, and find it: the folder, as from `find`.

    Raises:
        Unavailable: it cannot be downloaded; says why.
    """
    folder = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    code = "from keras.datasets import cifar100; cifar100.load_data()"
    return fetch("CIFAR-100", "169 MB", code, folder, "datasets/cifar-100*", _WAY_OUT, find)
