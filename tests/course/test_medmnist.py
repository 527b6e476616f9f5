"""Tests of `fcnn_utils.course.data.medmnist`: finding and reading the files of MedMNIST."""

import hashlib

import numpy as np
import pytest

from fcnn_utils.course import data
from fcnn_utils.course.data import medmnist
from fcnn_utils.course.data.download import Unavailable

TINY = medmnist.MedMNIST("0" * 32, 1, (20, 10, 10), ("well", "ill"))


def arrays(channels=1, classes=2):
    """The content of a set's file: images and labels of the three splits."""
    random, shape = np.random.default_rng(0), (28, 28) if channels == 1 else (28, 28, channels)
    file = {}
    for part, count in zip(("train", "val", "test"), TINY.images, strict=True):
        file[f"{part}_images"] = random.integers(0, 256, (count, *shape), dtype="uint8")
        file[f"{part}_labels"] = (np.arange(count)[:, None] % classes).astype("uint8")
    return file


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A machine without data, on which PneumoniaMNIST is a tiny set. Returns the path of its file."""
    path = tmp_path / "home" / ".medmnist" / "pneumoniamnist.npz"
    path.parent.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FCNN_DATA_DIR", raising=False)
    monkeypatch.setitem(medmnist.SETS, "pneumoniamnist", TINY)
    return path


def test_class_table_is_complete():
    """Number of classes as published (Yang et al. 2023, table 3). Two names contain a comma."""
    counts = {name: len(known.classes) for name, known in medmnist.SETS.items()}
    assert [*counts.values()] == [9, 7, 4, 2, 5, 2, 8, 8, 11, 11, 11]
    assert medmnist.SETS["breastmnist"].classes == ("malignant", "normal, benign")
    assert medmnist.SETS["tissuemnist"].classes[:2] == (
        "collecting duct, connecting tubule",
        "distal convoluted tubule",
    )
    assert medmnist.SETS["organcmnist"].classes[::10] == ("bladder", "spleen")


# --- reading -----------------------------------------------------------------------------------------------------


def test_file_is_read_into_a_data_set(file):
    content = arrays()
    np.savez(file, **content)
    dataset = data.load("pneumoniamnist")
    assert (dataset.name, dataset.stand_in, dataset.fine_names) == ("pneumoniamnist", False, ("well", "ill"))
    for split, part in ((dataset.train, "train"), (dataset.validation, "val"), (dataset.test, "test")):
        pairs = zip(content[f"{part}_images"], content[f"{part}_labels"][:, 0], strict=True)
        expected = {(image.tobytes(), int(label)) for image, label in pairs}
        assert split.images.shape == (len(expected), 28, 28, 1) and split.images.dtype == np.uint8
        found = {(image.tobytes(), int(label)) for image, label in zip(split.images, split.fine, strict=True)}
        assert found == expected
        np.testing.assert_array_equal(split.fine, split.coarse)
    small = data.load("pneumoniamnist", train_images=15, test_images=4)
    assert (len(small.train), len(small.validation), len(small.test)) == (10, 5, 4)
    assert small.name == "pneumoniamnist-15" and set(small.test.fine) == {0, 1}


def test_colour_images_keep_their_channels(file, monkeypatch):
    monkeypatch.setitem(medmnist.SETS, "bloodmnist", medmnist.MedMNIST("0" * 32, 3, TINY.images, tuple("abcde")))
    content = arrays(3, classes=5)
    np.savez(file.with_name("bloodmnist.npz"), **content)
    dataset = data.load("bloodmnist")
    assert dataset.train.images.shape == (20, 28, 28, 3) and dataset.fine_names == tuple("abcde")
    assert any(np.array_equal(dataset.train.images[0], image) for image in content["train_images"])


def test_official_file_is_recognized_by_its_md5(file, monkeypatch):
    np.savez(file, **arrays())
    assert "from a file that is not the official one" in str(data.load("pneumoniamnist"))
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(medmnist.SETS, "pneumoniamnist", medmnist.MedMNIST(md5, 1, TINY.images, TINY.classes))
    assert "from the official file" in str(data.load("pneumoniamnist"))


INVALID = {
    "missing array": ({"val_labels": None}, "not pneumoniamnist: .*val_labels"),
    "colour": ({"train_images": np.zeros((20, 28, 28, 3), "uint8")}, r"\(N, 28, 28\) uint8; .*\(20, 28, 28, 3\) uint8"),
    "float": ({"test_images": np.zeros((10, 28, 28))}, r"test images must be .*\(10, 28, 28\) float64"),
    "missing image": ({"val_images": np.zeros((9, 28, 28), "uint8")}, "10 validation images and labels; it has 9 "),
    "missing label": ({"test_labels": np.zeros((9, 1), "uint8")}, "10 test images and labels; .* 9 labels"),
    "one class": ({"test_labels": np.zeros((10, 1), "uint8")}, "test labels must cover the classes 0 to 1"),
    "20 classes": ({"train_labels": np.arange(20)}, "training labels must cover the classes 0 to 1, and no others"),
    "labels in a row": ({"test_labels": np.arange(10)[None] % 2}, "10 test images and labels"),
    "fractions": ({"val_labels": np.arange(10) / 2 % 1}, "validation labels must be whole numbers; they are float64"),
    "texts": ({"val_labels": np.array(["0", "1"] * 5)}, "validation labels must be whole numbers; they are <U1"),
    "objects": ({"train_labels": np.full(20, {})}, "it is not a whole npz file of numbers"),
    "login page": (b"<html>Please log in</html>", "it is not a whole npz file of numbers"),
    "empty file": (b"", "damaged"),
    "text file": (b"nothing", "damaged"),
    "truncated file": (None, "damaged"),
}


@pytest.mark.parametrize("change, message", INVALID.values(), ids=INVALID)
def test_invalid_file_is_rejected_with_both_md5s_or_replaced_by_the_standin(file, capsys, change, message):
    content = arrays() | (change if isinstance(change, dict) else {})
    np.savez(file, **{key: value for key, value in content.items() if value is not None})
    if not isinstance(change, dict):
        file.write_bytes(file.read_bytes()[:5000] if change is None else change)
    with pytest.raises(Unavailable, match=message) as error:
        data.load("pneumoniamnist")
    assert str(file) in str(error.value) and "delete it" in str(error.value)
    assert "pickle" not in str(error.value) and len(str(error.value).splitlines()) == 1
    assert data.load("pneumoniamnist", 20, 10, or_stand_in=True).name == "greystandin-20"
    assert capsys.readouterr().out.startswith(f"NOTICE: {error.value}")
    assert hashlib.md5(file.read_bytes()).hexdigest() in str(error.value) and TINY.md5 in str(error.value)


# --- finding -----------------------------------------------------------------------------------------------------


def test_chosen_folder_comes_first(file, tmp_path, monkeypatch):
    assert medmnist.find("pneumoniamnist") is None
    file.touch()
    assert medmnist.find("pneumoniamnist") == file
    monkeypatch.setenv("FCNN_DATA_DIR", str(tmp_path))
    assert medmnist.find("pneumoniamnist") == file
    (tmp_path / "pneumoniamnist.npz").touch()
    assert medmnist.find("pneumoniamnist") == tmp_path / "pneumoniamnist.npz"


def test_missing_file_is_reported_or_replaced_by_the_standin(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FCNN_DATA_DIR", str(tmp_path))
    with pytest.raises(
        Unavailable, match="FCNN_DATA_DIR is .*neither pneumoniamnist.npz nor another;.* or greystandin"
    ):
        data.load("pneumoniamnist")
    dataset = data.load("pneumoniamnist", or_stand_in=True)
    assert (dataset.name, dataset.stand_in) == ("greystandin", True)
    printed = capsys.readouterr().out
    assert printed.startswith("NOTICE: FCNN_DATA_DIR is") and "no result on pneumoniamnist" in printed


def test_pneumoniamnist_is_as_published():
    if medmnist.find("pneumoniamnist") is None:
        pytest.skip("PneumoniaMNIST is not on this machine")
    dataset = data.load("pneumoniamnist")
    counts = [np.bincount(split.fine).tolist() for split in (dataset.train, dataset.validation, dataset.test)]
    assert counts == [[1214, 3494], [135, 389], [234, 390]]
    assert dataset.train.images.shape[1:] == (28, 28, 1) and dataset.fine_names == ("normal", "pneumonia")
