"""Load images: CIFAR-100 (Krizhevsky 2009), MedMNIST (Yang et al. 2023), generated stand-ins.

`load("cifar100")` and `load("pneumoniamnist")` read files on this machine, or download them.
`load("standin")` and `load("greystandin")` generate images and need no files. `load("auto")` takes
CIFAR-100 if it is available, otherwise the stand-in, and prints which.

Images are sorted by a hash of their pixels, so splits, subsets and fingerprints do not depend on
the order of the files. The validation split of CIFAR-100 and its stand-in is a fixed tenth of the
training images of each class. MedMNIST has its own validation images.
"""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from fcnn_utils._checks import check_choice, check_number
from fcnn_utils.course import paths
from fcnn_utils.course.data import cifar100, medmnist, standin
from fcnn_utils.course.data.download import Unavailable

STAND_INS = {"standin": "CIFAR-100", "greystandin": "PneumoniaMNIST"}  # stand-in: the data set that it replaces
NAMES = ("cifar100", *medmnist.SETS, *STAND_INS, "auto")


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images (N, H, W, C) uint8 with (N,) int64 labels: `fine` (class), `coarse` (superclass).

    The arrays are read-only. In a data set without superclasses, both labels are equal.
    """

    images: np.ndarray
    fine: np.ndarray
    coarse: np.ndarray

    def __post_init__(self):
        for array in self._arrays:
            array.setflags(write=False)

    def __len__(self):
        return len(self.images)

    def __repr__(self):
        size = "×".join(map(str, self.images.shape[1:]))
        return f"Split: {len(self):,} images of {size} pixels, {len(np.unique(self.fine))} classes"

    def first(self, count):
        """Return a `Split` with the first images of each class, `count` in all, as equally as possible.

        Raises:
            ValueError: if the split has fewer images.
        """
        check_number("number of images", count, int, 1, len(self))
        return self._take(np.sort(np.lexsort((self.fine, _rank_in_class(self.fine)))[:count]))

    def sample(self, count, seed):
        """Return a `Split` with `count` random images of any class, drawn without replacement.

        Raises:
            ValueError: if the split has fewer images, or the seed is not a whole number from 0 to
                2³¹ − 1.
        """
        check_number("number of images", count, int, 1, len(self))
        check_number("seed", seed, int, 0, 2**31 - 1)
        return self._take(np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False)))

    @property
    def _arrays(self):
        return self.images, self.fine, self.coarse

    def _take(self, keep):
        return Split(*(array[keep] for array in self._arrays))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training, validation and test splits, with the names of the classes and superclasses.

    `name` is "cifar100-2000" for a subset of CIFAR-100 with 2,000 training and validation images.
    `source` says in words where the images come from.
    """

    name: str
    source: str
    train: Split
    validation: Split
    test: Split
    fine_names: tuple
    coarse_names: tuple

    def __repr__(self):
        count = f"{len(self.train):,} training, {len(self.validation):,} validation and {len(self.test):,} test images"
        warning = f"STAND-IN DATA, generated, not {STAND_INS[self._base_name]}: " if self.stand_in else ""
        return f"{warning}{self.name}, {count}, from {self.source} (sha256 {self.fingerprint[:12]})"

    @property
    def _base_name(self):
        return self.name.split("-")[0]

    @property
    def stand_in(self):
        """True for generated images. Accuracies on them are not results on real images."""
        return self._base_name in STAND_INS

    @functools.cached_property
    def fingerprint(self):
        """SHA-256 (hexadecimal) of all images and labels. Run records carry it."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for array in split._arrays:
                digest.update(f"{array.shape}{array.dtype.str}".encode())
                digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    @property
    def everything(self):
        """Training and validation images as one `Split`, for a final training."""
        pairs = zip(self.train._arrays, self.validation._arrays, strict=True)
        return Split(*(np.concatenate(pair) for pair in pairs))

    @property
    def superclass_of(self):
        """(classes,) array with the superclass of each class."""
        labels = np.zeros(len(self.fine_names), int)
        labels[self.train.fine] = self.train.coarse
        return labels

    def subset(self, train, test):
        """Return a smaller `Dataset` with balanced classes.

        Args:
            train: number of training and validation images together, at least 10. The validation
                share stays the same.
            test: number of test images.

        Raises:
            ValueError: if the data set has fewer images, or no image would be left for validation.
        """
        total = len(self.train) + len(self.validation)
        check_number("number of training images", train, int, 10, total)
        validation = train * len(self.validation) // total
        return dataclasses.replace(
            self,
            name=f"{self._base_name}-{train}",
            train=self.train.first(train - validation),
            validation=self.validation.first(validation),
            test=self.test.first(test),
        )


def load(name, train_images=0, test_images=0, *, or_stand_in=False):
    """Load a data set by name. Download it if it is not on this machine.

    Args:
        name: one of `NAMES`: "cifar100", a key of `medmnist.SETS`, "standin" (replaces CIFAR-100),
            "greystandin" (replaces PneumoniaMNIST), or "auto" (CIFAR-100 if it is available,
            otherwise "standin").
        train_images: number of training and validation images together (see `Dataset.subset`); 0
            means all.
        test_images: number of test images; 0 means all.
        or_stand_in: if the data set is not available or its files are damaged, print a notice and use
            its stand-in, as for "auto".

    Returns:
        Dataset.

    Raises:
        ValueError: if the name is unknown, the data set is not available, its files are damaged, or
            it has fewer images than requested.
    """
    if train_images:
        check_number("number of training images", train_images, int, 10, 10**7)
    if test_images:
        check_number("number of test images", test_images, int, 1, 10**7)
    path = locate(name, or_stand_in)
    try:
        dataset = _read(name, path)
    except Unavailable as error:  # the files are damaged
        _continue_without(name, error, or_stand_in)
        dataset = _read(name, None)
    if train_images or test_images:
        available = len(dataset.train) + len(dataset.validation)
        dataset = dataset.subset(train_images or available, test_images or len(dataset.test))
    return dataset


def _read(name, path):
    """Read a data set from the `path` of `locate`; if it is None, generate the stand-in."""
    if path is None and name in ("greystandin", *medmnist.SETS):
        return _assemble("greystandin", "a generator", standin.grey(), standin.GREY_NAMES)
    if path is None:
        splits = _drawn(standin.generate, per_class=100, test_per_class=20)
        return _assemble("standin", "a generator", splits, standin.FINE_NAMES, standin.COARSE_NAMES)
    if name in medmnist.SETS:
        splits, official = medmnist.read(name, path)
        source = "the official file" if official else "a file that is not the official one"
        return _assemble(name, source, splits, medmnist.SETS[name].classes)
    return _assemble("cifar100", "the official batches", *cifar100.read(path))


def locate(name, or_stand_in=False):
    """Return the path from which `load` reads a data set. Download it if needed.

    Returns:
        CIFAR-100's folder, MedMNIST's file, or None for a stand-in.

    Raises:
        ValueError: if the name is unknown, or the data set is neither on this machine nor
            downloadable.
    """
    check_choice("dataset", name, NAMES)
    if name in STAND_INS:
        return None
    is_medical = name in medmnist.SETS
    path = medmnist.find(name) if is_medical else cifar100.find()
    try:
        if path is None:
            check_chosen_folder(f"{name}.npz" if is_medical else "CIFAR-100")
            path = medmnist.download(name) if is_medical else cifar100.download()
    except Unavailable as error:
        _continue_without(name, error, or_stand_in)
    return path


def check_chosen_folder(what):
    """Raise Unavailable if `$FCNN_DATA_DIR` is set to a folder without any data set: then nothing is downloaded."""
    chosen = os.environ.get("FCNN_DATA_DIR")
    sets = [Path(chosen or "", f"{name}.npz") for name in medmnist.SETS]
    if chosen and not cifar100.inside(Path(chosen)) and not any(map(os.path.isfile, sets)):
        raise Unavailable(
            f"FCNN_DATA_DIR is {chosen!r}, where no data set is, neither {what} nor another; correct or unset it, "
            "or choose a stand-in (--dataset standin or greystandin)"
        )


def _continue_without(name, error, or_stand_in):
    """Print that the stand-in replaces the data set `name`; raise `error`, the reason, if that is not allowed."""
    if name != "auto" and not or_stand_in:
        raise error
    real = name if name in medmnist.SETS else "CIFAR-100"
    paths.say(f"NOTICE: {error}. Continuing with the stand-in: generated images, no result on {real}.")


@functools.cache  # it takes a second; `_assemble` copies the arrays
def _drawn(generate, **counts):
    return generate(**counts)


def _assemble(name, source, splits, fine_names, coarse_names=None):
    """Build a `Dataset` from the arrays of training, validation (optional) and testing."""
    first, *others = (_sorted_split(*arrays) for arrays in splits)
    if len(others) == 1:  # no validation images: hold out the first tenth of each class
        tenth = np.bincount(first.fine)[first.fine] // 10
        held_out = _rank_in_class(first.fine) < tenth
        first, *others = first._take(~held_out), first._take(held_out), *others
    return Dataset(name, source, first, *others, tuple(fine_names), tuple(coarse_names or fine_names))


def _sorted_split(images, fine, coarse=None):
    """Return a `Split` sorted by the hash of each image. The arrays are contiguous in memory."""
    images, fine = np.ascontiguousarray(images), np.asarray(fine, np.int64)
    coarse = fine if coarse is None else np.asarray(coarse, np.int64)
    keys = [hashlib.blake2b(image, digest_size=8).digest() for image in images.reshape(len(images), -1)]
    order = np.lexsort((fine, np.frombuffer(b"".join(keys), ">u8")))
    return Split(images[order], fine[order], coarse[order])


def _rank_in_class(labels):
    """Return the number of earlier images with the same label, (N,)."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), int)
    rank[order] = np.arange(len(labels)) - first
    return rank
