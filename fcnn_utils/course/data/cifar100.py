"""Find, download and read the files of CIFAR-100 (Krizhevsky 2009).

The official batches are pickles. A pickle can name any function, and loading it calls that
function. Therefore the batches are read by an unpickler that builds NumPy arrays and nothing else.
"""

import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np

from fcnn_utils.course.data.download import Unavailable, fetch

_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
_CHECKSUM = "sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"  # as in keras.datasets
_ADVICE = "to continue without it, choose the stand-in (--dataset standin)"


def find():
    """Return the folder with the extracted files `train`, `test` and `meta`; None if there is none.

    The folders searched are `$FCNN_DATA_DIR`, Keras's data folder and `./data`, and their usual
    subfolders.
    """
    chosen = os.environ.get("FCNN_DATA_DIR")
    roots = [*([Path(chosen)] if chosen else []), _keras_datasets(), Path("data")]
    return next(filter(None, map(inside, roots)), None)


def inside(root):
    """Return the folder with the extracted files that is `root` or a usual subfolder of it; None if there is none."""
    for folder in (root, root / "cifar-100-python", root / "cifar-100-python-target" / "cifar-100-python"):
        if all(os.path.isfile(folder / part) for part in ("train", "test", "meta")):  # False if unreadable
            return folder
    return None


def download():
    """Download and unpack CIFAR-100 (169 MB) to the place where Keras keeps it, and return its folder.

    Raises:
        Unavailable: if the download fails; the message gives the reason.
    """
    archive = _keras_datasets() / "cifar-100-python-target_archive"  # Keras's name, so that both share one download
    fetch("CIFAR-100 (169 MB)", _URL, _CHECKSUM, archive, _ADVICE, _unpack)
    return find()


def _keras_datasets():
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "datasets"


def _unpack(archive, action, pup):
    """Unpack to a temporary folder, then rename it: an interrupted run leaves no incomplete file."""
    import pooch  # slow to import; see `download.fetch`

    target = _keras_datasets() / "cifar-100-python-target" / "cifar-100-python"
    with tempfile.TemporaryDirectory(dir=_keras_datasets()) as folder:
        pooch.Untar(extract_dir=folder)(archive, action, pup)
        shutil.rmtree(target, ignore_errors=True)  # incomplete: otherwise `find` would have returned it
        target.parent.mkdir(exist_ok=True)
        os.replace(Path(folder, target.name), target)


def read(folder):
    """Read the official batches in `folder`.

    Returns:
        ((training, test), fine names, coarse names); training and test as from `read_batch`.

    Raises:
        Unavailable: if a file is damaged or is not a file of CIFAR-100; the message says which, and
            what to do.
    """
    meta = _unpickle(folder / "meta")
    fine_names = _names(meta, "fine_label_names", 100, folder / "meta")
    coarse_names = _names(meta, "coarse_label_names", 20, folder / "meta")
    splits = read_batch(folder / "train", per_class=500), read_batch(folder / "test", per_class=100)
    return splits, fine_names, coarse_names


def read_batch(path, per_class):
    """Read the images and labels of one batch.

    Args:
        path: `Path` of a pickle whose `data` is (N, 3072) uint8: the red, green and blue planes of
            each image.
        per_class: number of images that the batch must have of each of the 100 classes.

    Returns:
        images (N, 32, 32, 3) uint8, fine labels (N,), coarse labels (N,).

    Raises:
        Unavailable: if the file cannot be read or is not such a batch; the message says why, and
            what to do.
    """
    batch = _unpickle(path)
    try:
        rows, fine, coarse = batch["data"], batch["fine_labels"], batch["coarse_labels"]
    except KeyError as error:
        raise _invalid(path, f"it has no {error}") from None
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
        raise _invalid(path, "its data are not uint8 rows of 3072 values")
    fine = _labels(path, "fine", fine, len(rows), 100)
    coarse = _labels(path, "coarse", coarse, len(rows), 20)
    if (np.bincount(fine, minlength=100) != per_class).any():
        raise _invalid(path, f"it must have {per_class} images of each of the 100 classes")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), fine, coarse  # (N, 3072) -> (N, 32, 32, 3)


def _labels(path, kind, values, count, classes):
    """Return labels as a (count,) array if they are whole numbers from 0 to classes − 1."""
    try:
        labels = np.asarray(values)
    except ValueError:  # nested lists of unequal lengths
        labels = np.empty(0)
    in_range = labels.dtype.kind in "iu" and ((labels >= 0) & (labels < classes)).all()
    if labels.shape != (count,) or not in_range:
        raise _invalid(path, f"its {kind} labels must be {count} whole numbers from 0 to {classes - 1}, one per image")
    return labels


def _names(meta, key, count, path):
    names = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in meta.get(key, ()))
    if len(names) != count:
        raise _invalid(path, f"it must have {count} {key}; it has {len(names)}")
    return names


def _invalid(path, reason):
    return Unavailable(
        f"{path} is damaged or not a file of CIFAR-100: {reason}; delete {Path(path).parent} to download it again, "
        "or choose the stand-in (--dataset standin)"
    )


def _unpickle(path):
    try:
        with open(path, "rb") as file:
            batch = _NumpyUnpickler(file, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}; {_ADVICE}") from None
    except Exception as error:  # a damaged pickle can raise almost anything
        raise _invalid(path, error) from None


class _NumpyUnpickler(pickle.Unpickler):
    """Unpickler that builds NumPy arrays and refuses everything else before it runs."""

    allowed = {"numpy": {"ndarray", "dtype"}, "numpy._core.multiarray": {"_reconstruct"}}

    def find_class(self, module, name):
        module = module.replace("numpy.core.", "numpy._core.")  # the name of this module in NumPy 1
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which was not run; no batch of CIFAR-100 needs it")
        return super().find_class(module, name)
