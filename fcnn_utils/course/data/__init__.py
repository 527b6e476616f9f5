"""Images: CIFAR-100 (Krizhevsky 2009), the 2-D sets of MedMNIST (Yang et al. 2023), and generated stand-ins of theirs.

`load("cifar100")` reads the official batches where they lie extracted, or downloads them through Keras;
`load("pneumoniamnist")` does the same with its file. `load("standin")` and `load("greystandin")` need nothing.
`load("auto")` takes CIFAR-100 if it can be had, else the stand-in, and says so.

Images are put into an order of their own (by a hash of each image), so that the splits, the subsets and the
fingerprint are the same for everyone, whatever the order of the files. Validation is a fixed tenth of each
class's training images, 5,000 for CIFAR-100; MedMNIST has validation images of its own.
"""

import dataclasses
import hashlib

import numpy as np

from fcnn_utils.course.data import cifar100, medmnist, standin
from fcnn_utils.course.data.download import Unavailable
from fcnn_utils._checks import check_choice, check_number

STAND_INS = {"standin": "CIFAR-100", "greystandin": "PneumoniaMNIST"}  # and what they stand in for
NAMES = ("cifar100", *medmnist.SETS, *STAND_INS, "auto")


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images (N, H, W, C) uint8 with their labels `fine` and `coarse`, (N,) int64; the arrays are read-only."""

    images: np.ndarray
    fine: np.ndarray
    coarse: np.ndarray

    def __post_init__(self):
        for array in (self.images, self.fine, self.coarse):
            array.setflags(write=False)

    def __len__(self):
        return len(self.images)

    def first(self, count):
        """The first `count` images, taken in turn from every class, so that each has (nearly) as many: a `Split`.

        Raises:
            ValueError: there are not that many.
        """
        check_number("number of images", count, int, 1, len(self))
        keep = np.lexsort((self.fine, _rank_in_class(self.fine)))[:count]
        return self._take(np.sort(keep))

    def sample(self, count, seed):
        """`count` images drawn at random, without regard to their class: a `Split`; another for another seed.

        Raises:
            ValueError: there are not that many, or the seed is not a whole number from 0 to 2³¹ − 1.
        """
        check_number("number of images", count, int, 1, len(self))
        check_number("seed", seed, int, 0, 2**31 - 1)
        return self._take(np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False)))

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
        """The same data set with fewer images, of every class (nearly) as many.

        Args:
            train: training and validation images together, at least 10; validation has the share that it has of all.
            test: test images.

        Raises:
            ValueError: there are not that many, or so few that none would be for validation.
        """
        check_number("number of training images", train, int, 10, len(self.train) + len(self.validation))
        validation = train * len(self.validation) // (len(self.train) + len(self.validation))
        parts = self.train.first(train - validation), self.validation.first(validation), self.test.first(test)
        return _dataset(
            f"{self.name.split('-')[0]}-{train}", self.source, self.stand_in, parts, self.fine_names, self.coarse_names
        )

    def describe(self):
        """One line: what it is, how many images, its fingerprint; a warning first if it is a stand-in."""
        count = f"{len(self.train):,} training, {len(self.validation):,} validation and {len(self.test):,} test images"
        stands_for = STAND_INS.get(self.name.split("-")[0], "real images")
        warning = f"STAND-IN DATA, generated, not {stands_for}: " if self.stand_in else ""
        return f"{warning}{self.name}, {count}, from {self.source} (sha256 {self.fingerprint[:12]})"


def load(name, train_images=0, test_images=0, *, or_stand_in=False):
    """A data set by its name, downloaded if need be.

    Args:
        name: "cifar100", a set that `medmnist` lists, "standin" (of CIFAR-100), "greystandin" (of PneumoniaMNIST), or
            "auto": "cifar100" if it can be had, else "standin".
        train_images: take this many for training and validation (see `Dataset.subset`); 0: all.
        test_images: take this many for testing; 0: all.
        or_stand_in: where it cannot be had, go on with its stand-in, and say so.

    Returns:
        Dataset.

    Raises:
        ValueError: unknown name; it is not here and cannot be downloaded; its files are damaged; or there are not
            that many images.
    """
    place = locate(name, or_stand_in)
    if place is None and name in ("greystandin", *medmnist.SETS):
        splits = [(images, labels, labels) for images, labels in standin.grey()]
        dataset = _whole("greystandin", "a generator", True, splits, standin.GREY_NAMES, standin.GREY_NAMES)
    elif place is None:
        splits = standin.generate(per_class=100, test_per_class=20)
        dataset = _whole("standin", "a generator", True, splits, standin.FINE_NAMES, standin.COARSE_NAMES)
    elif name in medmnist.SETS:
        splits, official = medmnist.read(name, place)
        source = "the official file" if official else "a file that is not the official one"
        names = medmnist.SETS[name].classes
        dataset = _whole(name, source, False, [(images, labels, labels) for images, labels in splits], names, names)
    else:
        dataset = _whole("cifar100", "the official batches", False, *cifar100.read(place))
    if train_images or test_images:
        trainable = len(dataset.train) + len(dataset.validation)
        dataset = dataset.subset(train_images or trainable, test_images or len(dataset.test))
    return dataset


def locate(name, or_stand_in=False):
    """Where a data set of `load` lies, downloaded if need be: CIFAR-100's folder or MedMNIST's file; None: a stand-in.

    Raises:
        ValueError: unknown name, or it is not here and cannot be downloaded.
    """
    check_choice("dataset", name, NAMES)
    if name in STAND_INS:
        return None
    try:
        if name in medmnist.SETS:
            return medmnist.find(name) or medmnist.download(name)
        return cifar100.find() or cifar100.download()
    except Unavailable as error:
        if name != "auto" and not or_stand_in:
            raise
        real = name if name in medmnist.SETS else "CIFAR-100"
        print(f"NOTICE: {error}. Going on with the stand-in: generated images, no result on {real}.", flush=True)
        return None


# --- splits and fingerprints -------------------------------------------------------------------------------------


def _whole(name, source, stand_in, splits, fine_names, coarse_names):
    """A `Dataset` from the arrays for training and for testing, put in order, with validation taken out of the first;
    or from those for training, validation and testing."""
    first, *others = (_in_order(*arrays) for arrays in splits)
    parts = (first, *others) if len(others) == 2 else (*_split(first), *others)
    return _dataset(name, source, stand_in, parts, fine_names, coarse_names)


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
