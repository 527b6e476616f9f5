"""MedMNIST's files: `fcnn_utils.course.data.medmnist`, and what `fcnn_utils.course.data` makes of them."""

import hashlib

import numpy as np
import pytest

from fcnn_utils.course import data
from fcnn_utils.course.data import medmnist
from fcnn_utils.course.data.download import Unavailable

TINY = medmnist.MedMNIST("0" * 32, 1, (20, 10, 10), ("well", "ill"))


def arrays(channels=1, counts=TINY.images, classes=2, seed=0):
    """What is in the file of a set: images and labels of the three splits."""
    random, shape = np.random.default_rng(seed), (28, 28) if channels == 1 else (28, 28, channels)
    file = {}
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        file[f"{part}_images"] = random.integers(0, 256, (count, *shape), dtype="uint8")
        file[f"{part}_labels"] = (np.arange(count)[:, None] % classes).astype("uint8")
    return file


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine without any data; PneumoniaMNIST is a tiny set. Returns the folder that is searched last."""
    (tmp_path / "home" / ".medmnist").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FCNN_DATA_DIR", raising=False)
    monkeypatch.setitem(medmnist.SETS, "pneumoniamnist", TINY)
    return tmp_path / "home" / ".medmnist"


# --- basic -------------------------------------------------------------------------------------------------------


def test_a_file_becomes_a_data_set(home):
    file = arrays()
    np.savez(home / "pneumoniamnist.npz", **file)
    dataset = data.load("pneumoniamnist")
    assert (dataset.name, dataset.stand_in, dataset.fine_names) == ("pneumoniamnist", False, ("well", "ill"))
    assert dataset.describe().startswith("pneumoniamnist, 20 training, 10 validation and 10 test images, from a file")
    for split, part in ((dataset.train, "train"), (dataset.validation, "val"), (dataset.test, "test")):
        theirs = {(image.tobytes(), int(label)) for image, (label,) in zip(*_pair(file, part), strict=True)}
        assert split.images.shape == (len(theirs), 28, 28, 1) and split.images.dtype == np.uint8
        assert {(image.tobytes(), int(label)) for image, label in zip(split.images, split.fine, strict=True)} == theirs
        np.testing.assert_array_equal(split.fine, split.coarse)


def _pair(file, part):
    return file[f"{part}_images"], file[f"{part}_labels"]


def test_the_order_of_the_file_does_not_matter(home):
    file, order = arrays(), np.random.default_rng(1).permutation(20)
    np.savez(home / "pneumoniamnist.npz", **file)
    first = data.load("pneumoniamnist")
    shuffled = {key: value[order] if key.startswith("train") else value for key, value in file.items()}
    np.savez(home / "pneumoniamnist.npz", **shuffled)
    assert data.load("pneumoniamnist").fingerprint == first.fingerprint


def test_colour_images_keep_their_channels(home, monkeypatch):
    monkeypatch.setitem(medmnist.SETS, "bloodmnist", medmnist.MedMNIST("0" * 32, 3, (20, 10, 10), tuple("abcde")))
    file = arrays(3, classes=5)
    np.savez(home / "bloodmnist.npz", **file)
    dataset = data.load("bloodmnist")
    assert dataset.train.images.shape == (20, 28, 28, 3) and dataset.fine_names == tuple("abcde")
    assert any(np.array_equal(dataset.train.images[0], image) for image in file["train_images"])


def test_the_official_file_is_told_by_its_md5(home, monkeypatch):
    path = home / "pneumoniamnist.npz"
    np.savez(path, **arrays())
    assert "from a file that is not the official one" in data.load("pneumoniamnist").describe()
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(medmnist.SETS, "pneumoniamnist", medmnist.MedMNIST(md5, 1, TINY.images, TINY.classes))
    assert "from the official file" in data.load("pneumoniamnist").describe()


def test_a_subset_keeps_the_share_of_validation_images(home):
    np.savez(home / "pneumoniamnist.npz", **arrays())
    small = data.load("pneumoniamnist", train_images=15, test_images=4)
    assert (len(small.train), len(small.validation), len(small.test)) == (10, 5, 4)
    assert small.name == "pneumoniamnist-15" and set(small.test.fine) == {0, 1}


# --- basic: where it is looked for -------------------------------------------------------------------------------


def test_the_chosen_folder_comes_first(home, tmp_path, monkeypatch):
    assert medmnist.find("pneumoniamnist") is None
    (home / "pneumoniamnist.npz").touch()
    assert medmnist.find("pneumoniamnist") == home / "pneumoniamnist.npz"
    monkeypatch.setenv("FCNN_DATA_DIR", str(tmp_path))
    assert medmnist.find("pneumoniamnist") == home / "pneumoniamnist.npz"
    (tmp_path / "pneumoniamnist.npz").touch()
    assert medmnist.find("pneumoniamnist") == tmp_path / "pneumoniamnist.npz"


def test_a_chosen_folder_without_the_file_is_named(home, tmp_path, monkeypatch):
    monkeypatch.setenv("FCNN_DATA_DIR", str(tmp_path))
    with pytest.raises(
        Unavailable, match="FCNN_DATA_DIR is .*pneumoniamnist.npz is not there; lay pneumoniamnist.npz into"
    ):
        data.load("pneumoniamnist")


@pytest.mark.parametrize("name", ["chestmnist", "pneumonia", "PneumoniaMNIST"])
def test_an_unknown_set_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match="dataset must be one of cifar100, pathmnist, .*pneumoniamnist.*, auto; got"):
        data.load(name)


def test_where_there_is_none_its_stand_in_is_taken_if_that_is_wanted(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FCNN_DATA_DIR", str(tmp_path))
    dataset = data.load("pneumoniamnist", or_stand_in=True)
    assert (dataset.name, dataset.stand_in) == ("greystandin", True)
    printed = capsys.readouterr().out
    assert printed.startswith("NOTICE: FCNN_DATA_DIR is") and "no result on pneumoniamnist" in printed


# --- correct: damaged files --------------------------------------------------------------------------------------


def spoilt(**changes):
    return lambda file: {key: value for key, value in (file | changes).items() if value is not None}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoilt(val_labels=None), "is not pneumoniamnist: it has no val_labels"),
        (
            spoilt(train_images=np.zeros((20, 28, 28, 3), "uint8")),
            r"are \(20, 28, 28, 3\) uint8, not \(N, 28, 28\) uint8",
        ),
        (spoilt(test_images=np.zeros((10, 28, 28))), r"its test images are \(10, 28, 28\) float64"),
        (spoilt(val_images=np.zeros((9, 28, 28), "uint8")), "must hold 10 validation images and labels; it has 9 and"),
        (spoilt(test_labels=np.zeros((9, 1), "uint8")), "must hold 10 test images and labels; it has 10 and 9"),
        (spoilt(test_labels=np.zeros((10, 1), "uint8")), "must have test images of each of the classes 0 to 1"),
        (spoilt(train_labels=np.arange(20)), "must have training images of each of the classes 0 to 1"),
        (spoilt(train_labels=np.full(20, {})), "is damaged or no npz file"),
    ],
    ids=["no key", "colour", "float", "images", "labels", "one class", "classes", "objects"],
)
def test_a_file_that_is_not_the_set_is_refused(home, spoil, message):
    np.savez(home / "pneumoniamnist.npz", **spoil(arrays()))
    with pytest.raises(ValueError, match=message) as error:
        data.load("pneumoniamnist")
    md5 = hashlib.md5((home / "pneumoniamnist.npz").read_bytes()).hexdigest()
    assert f"(its MD5 is {md5}, the official file's {TINY.md5}): delete it" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"nothing", None], ids=["empty", "text", "cut off"])
def test_a_damaged_file_is_refused_with_its_md5(home, content):
    path = home / "pneumoniamnist.npz"
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ValueError, match=f"its MD5 is {hashlib.md5(path.read_bytes()).hexdigest()}.*delete it"):
        data.load("pneumoniamnist")


# --- correct: downloading ----------------------------------------------------------------------------------------


def test_it_is_downloaded_with_its_md5(home, tmp_path, monkeypatch, capsys):
    """Keras is given the published address and MD5; here the address is a file, and the MD5 that file's."""
    source = tmp_path / "elsewhere.npz"
    np.savez(source, **arrays())
    md5 = hashlib.md5(source.read_bytes()).hexdigest()
    monkeypatch.setitem(medmnist.SETS, "pneumoniamnist", medmnist.MedMNIST(md5, 1, TINY.images, TINY.classes))
    monkeypatch.setattr(medmnist, "_ADDRESS", source.as_uri())
    assert data.load("pneumoniamnist").describe().count("from the official file") == 1
    assert medmnist.find("pneumoniamnist").read_bytes() == source.read_bytes()
    assert "pneumoniamnist is not on this machine: downloading" in capsys.readouterr().out


def test_a_download_with_another_md5_is_refused(home, tmp_path, monkeypatch):
    source = tmp_path / "elsewhere.npz"
    np.savez(source, **arrays())
    monkeypatch.setattr(medmnist, "_ADDRESS", source.as_uri())
    with pytest.raises(Unavailable, match="pneumoniamnist cannot be downloaded .*corrupted"):
        data.load("pneumoniamnist")


def test_a_download_that_brings_nothing_is_an_error(home, tmp_path, monkeypatch):
    np.savez(tmp_path / "elsewhere.npz", **arrays())
    md5 = hashlib.md5((tmp_path / "elsewhere.npz").read_bytes()).hexdigest()
    monkeypatch.setitem(medmnist.SETS, "pneumoniamnist", medmnist.MedMNIST(md5, 1, TINY.images, TINY.classes))
    monkeypatch.setattr(medmnist, "_ADDRESS", (tmp_path / "elsewhere.npz").as_uri())
    monkeypatch.setattr(medmnist, "find", lambda name: None)
    with pytest.raises(Unavailable, match=r"pneumoniamnist cannot be downloaded \(no reason given\)"):
        data.load("pneumoniamnist")


def test_the_address_is_the_published_one():
    assert medmnist._ADDRESS.format("pneumoniamnist").endswith("/records/10519652/files/pneumoniamnist.npz?download=1")


# --- real data ---------------------------------------------------------------------------------------------------


def real():
    """PneumoniaMNIST's file where this machine has it."""
    try:
        return medmnist.find("pneumoniamnist")
    except Unavailable:
        return None


@pytest.mark.skipif(real() is None, reason="PneumoniaMNIST is not on this machine")
def test_pneumoniamnist_is_as_published():
    dataset = data.load("pneumoniamnist")
    counts = [np.bincount(split.fine).tolist() for split in (dataset.train, dataset.validation, dataset.test)]
    assert counts == [[1214, 3494], [135, 389], [234, 390]]
    assert dataset.train.images.shape[1:] == (28, 28, 1) and dataset.fine_names == ("normal", "pneumonia")
