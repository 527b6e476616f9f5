"""Images: CIFAR-100 (Krizhevsky 2009) and a generated stand-in of the same shape.

`load("cifar100")` reads the official batches where they lie extracted, or downloads them through Keras.
`load("standin")` needs nothing. `load("auto")` takes CIFAR-100 if it can be had, else the stand-in, and says so.

Images are put into an order of their own (by a hash of each image), so that the splits, the subsets and the
fingerprint are the same for everyone, whatever the order of the files. Validation is a fixed tenth of each
class's training images: 5,000 for CIFAR-100.
"""

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fcnn_utils import standin
from fcnn_utils.parameters import check_choice, check_number

NAMES = ("cifar100", "standin", "auto")
_DOWNLOAD_SECONDS = 900
_WAY_OUT = "to go on without it, choose the stand-in (--dataset standin)"


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images (N, 32, 32, 3) uint8 with their fine and coarse labels (N,) int64; the arrays are read-only."""

    images: np.ndarray
    fine: np.ndarray
    coarse: np.ndarray

    def __post_init__(self):
        for array in (self.images, self.fine, self.coarse):
            array.setflags(write=False)

    def __len__(self):
        return len(self.images)

    def first(self, count):
        """The first `count` images, taken in turn from every class, so that each has (nearly) as many."""
        check_number("number of images", count, int, 1, len(self))
        keep = np.lexsort((self.fine, _rank_in_class(self.fine)))[:count]
        return self._take(np.sort(keep))

    def _take(self, keep):
        return Split(self.images[keep], self.fine[keep], self.coarse[keep])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Train, validation and test splits with the names of the classes, and where they came from.

    `name` says what it is ("cifar100", "standin-2000": 2,000 training images of it), `fingerprint` is the SHA-256
    of all arrays, `stand_in` is True for generated images: nothing computed on them is a result on CIFAR-100.
    """

    name: str
    source: str
    stand_in: bool
    train: Split
    validation: Split
    test: Split
    fine_names: tuple
    coarse_names: tuple
    fingerprint: str

    @property
    def everything(self):
        """Training and validation images together, for a recipe whose settings are chosen already."""
        return Split(
            *(np.concatenate(pair) for pair in zip(_arrays(self.train), _arrays(self.validation), strict=True))
        )

    @property
    def superclass_of(self):
        """(classes,) superclass of each class."""
        labels = np.zeros(len(self.fine_names), int)
        labels[self.train.fine] = self.train.coarse
        return labels

    def subset(self, train, test):
        """The same data set with `train` training (a tenth of them for validation) and `test` test images."""
        check_number("number of training images", train, int, 10, len(self.train) + len(self.validation))
        validation = train * len(self.validation) // (len(self.train) + len(self.validation))
        parts = self.train.first(train - validation), self.validation.first(validation), self.test.first(test)
        return _dataset(
            f"{self.name.split('-')[0]}-{train}", self.source, self.stand_in, parts, self.fine_names, self.coarse_names
        )

    def describe(self):
        """One line: what it is, how many images, its fingerprint; a warning first if it is a stand-in."""
        count = f"{len(self.train):,} training, {len(self.validation):,} validation and {len(self.test):,} test images"
        warning = "STAND-IN DATA, generated, not CIFAR-100: " if self.stand_in else ""
        return f"{warning}{self.name}, {count}, from {self.source} (sha256 {self.fingerprint[:12]})"


def load(name, train_images=0, test_images=0):
    """The data set `name`: "cifar100", "standin", or "auto" (the first, if it can be had, else the second).

    Args:
        name: as above.
        train_images, test_images: take a subset of this size, the same number (nearly) of every class; 0: all.

    Raises:
        ValueError: unknown name; CIFAR-100 is not here and cannot be downloaded; its files are damaged; or there
            are not that many images.
    """
    folder = locate(name)
    dataset = _cifar100(folder) if folder else _standin()
    if train_images or test_images:
        trainable = len(dataset.train) + len(dataset.validation)
        dataset = dataset.subset(train_images or trainable, test_images or len(dataset.test))
    return dataset


def locate(name):
    """Folder of CIFAR-100 for "cifar100" (downloaded if need be), None for "standin", either for "auto".

    Raises:
        ValueError: unknown name, or CIFAR-100 is not here and cannot be downloaded.
    """
    check_choice("dataset", name, NAMES)
    if name == "standin":
        return None
    try:
        return find_cifar100() or _download()
    except Unavailable as error:
        if name == "cifar100":
            raise
        print(f"NOTICE: {error}. Going on with the stand-in: generated images, no result on CIFAR-100.", flush=True)
        return None


class Unavailable(ValueError):
    """CIFAR-100 is not on this machine and could not be downloaded."""


# --- CIFAR-100 ---------------------------------------------------------------------------------------------------


def find_cifar100():
    """Folder with CIFAR-100's extracted batches (`train`, `test`, `meta`), None if there is none.

    Looked for in `$FCNN_DATA_DIR`, Keras's data folder and `./data`, and in their usual subfolders.
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


def _cifar100(folder):
    meta = _unpickle(folder / "meta")
    fine_names, coarse_names = (
        _names(meta, "fine_label_names", 100, folder),
        _names(meta, "coarse_label_names", 20, folder),
    )
    train = _read_batch(folder / "train", per_class=500)
    test = _read_batch(folder / "test", per_class=100)
    parts = *_split(train), test
    return _dataset("cifar100", "the official batches", False, parts, fine_names, coarse_names)


def _read_batch(path, per_class):
    """A `Split` of an official batch: `data` uint8 (N, 3072), each row an image's channels one after the other."""
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
    return _in_order(images, fine, coarse)


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


def _download():
    """Download CIFAR-100 (169 MB) through Keras, in a process of its own, so that the wait has an end."""
    limit = float(os.environ.get("FCNN_DOWNLOAD_SECONDS", _DOWNLOAD_SECONDS))
    keras_home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    print(f"CIFAR-100 is not on this machine: downloading 169 MB to {keras_home}, at most {limit:.0f} s", flush=True)
    code = "import socket; socket.setdefaulttimeout(20); from keras.datasets import cifar100; cifar100.load_data()"
    # The NumPy backend: nothing is computed here, and TensorFlow takes longer to start than a failed download.
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"KERAS_BACKEND": "numpy"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    start = shown = time.monotonic()
    try:
        while child.poll() is None and time.monotonic() - start < limit:
            time.sleep(0.5)
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                size = sum(file.stat().st_size for file in keras_home.glob("datasets/cifar-100*") if file.is_file())
                print(f"  {size / 1e6:.0f} MB after {shown - start:.0f} s", flush=True)
        timed_out = child.poll() is None
    finally:
        child.kill()
    if timed_out:
        raise Unavailable(f"CIFAR-100 was not downloaded within {limit:.0f} s; {_WAY_OUT}")
    if child.returncode or (folder := find_cifar100()) is None:
        reason = (child.stderr.read().strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(f"CIFAR-100 cannot be downloaded ({reason[:200]}); {_WAY_OUT}")
    return folder


# --- splits and fingerprints -------------------------------------------------------------------------------------


def _standin():
    train, test = (_in_order(*arrays) for arrays in standin.generate(per_class=100, test_per_class=20))
    parts = *_split(train), test
    return _dataset("standin", "a generator", True, parts, standin.FINE_NAMES, standin.COARSE_NAMES)


def _dataset(name, source, stand_in, parts, fine_names, coarse_names):
    digest = hashlib.sha256()
    for part in parts:
        for array in _arrays(part):
            digest.update(f"{array.shape}{array.dtype.str}".encode())
            digest.update(np.ascontiguousarray(array))
    return Dataset(name, source, stand_in, *parts, tuple(fine_names), tuple(coarse_names), digest.hexdigest())


def _in_order(images, fine, coarse):
    """A `Split` in the order of each image's hash, contiguous in memory."""
    images = np.ascontiguousarray(images)
    keys = [hashlib.blake2b(image, digest_size=8).digest() for image in images.reshape(len(images), -1)]
    order = np.lexsort((fine, np.frombuffer(b"".join(keys), ">u8")))
    return Split(images[order], np.asarray(fine, np.int64)[order], np.asarray(coarse, np.int64)[order])


def _split(split):
    """(train, validation): of each class the first tenth goes to validation."""
    tenth = np.bincount(split.fine)[split.fine] // 10
    held_out = _rank_in_class(split.fine) < tenth
    return split._take(~held_out), split._take(held_out)


def _rank_in_class(labels):
    """(N,) how many earlier images have the same label."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), int)
    rank[order] = np.arange(len(labels)) - first
    return rank


def _arrays(split):
    return split.images, split.fine, split.coarse
