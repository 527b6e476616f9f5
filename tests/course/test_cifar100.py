"""Tests of `fcnn_utils.course.data.cifar100`: finding and reading the official files.

Most batches here have 2 images per class instead of CIFAR-100's 500, because they are quick to write.
"""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from fcnn_utils.course import data
from fcnn_utils.course.data import cifar100, medmnist, standin
from fcnn_utils.course.data.download import Unavailable

META = {
    b"fine_label_names": [f"fine{number}".encode() for number in range(100)],
    b"coarse_label_names": [f"coarse{number}".encode() for number in range(20)],
}


def batch(per_class=2):
    """A batch in the official layout: bytes as keys, rows of 3,072 values, labels in lists."""
    rng = np.random.default_rng(0)
    fine = np.repeat(np.arange(100), per_class)[rng.permutation(100 * per_class)]
    return {
        b"filenames": [b"name.png"] * len(fine),
        b"batch_label": b"training batch 1 of 1",
        b"fine_labels": fine.tolist(),
        b"coarse_labels": (fine // 5).tolist(),
        b"data": rng.integers(0, 256, (len(fine), 3072), dtype="uint8"),
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine without CIFAR-100: empty home (returned) and empty current folder."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.delenv("FCNN_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [bytes, str])
@pytest.mark.parametrize("labels", [list, np.asarray])
def test_pixels_and_labels_are_read_from_their_places(tmp_path, keys, labels):
    content = batch()
    for name in (b"fine_labels", b"coarse_labels"):
        content[name] = labels(content[name])
    if keys is str:
        content = {name.decode(): value for name, value in content.items()}
    images, fine, coarse = cifar100.read_batch(write(tmp_path / "train", content), per_class=2)
    rows = batch()[b"data"]
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    for y, x, channel in ((0, 0, 0), (0, 31, 1), (5, 7, 2), (31, 2, 0), (31, 31, 2)):
        # The published layout: 1,024 red values row by row, then the green ones, then the blue ones.
        np.testing.assert_array_equal(images[:, y, x, channel], rows[:, 1024 * channel + 32 * y + x])
    assert fine.tolist() == batch()[b"fine_labels"] and coarse.tolist() == batch()[b"coarse_labels"]


def test_pickle_of_old_numpy_is_read(tmp_path):
    """The official files name NumPy's modules as NumPy 1 did."""
    content = pickle.dumps(batch(), protocol=4)
    old = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    assert old != content
    old = old[:2] + old[11:] if old[2:3] == b"\x95" else old  # without the frame, whose length has changed
    (tmp_path / "train").write_bytes(old)
    images = cifar100.read_batch(tmp_path / "train", per_class=2)[0]
    np.testing.assert_array_equal(images, batch()[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def test_load_reads_all_files(home, tmp_path, monkeypatch):
    """The official counts, 500 and 100 images of each class, are reduced to 10 and 2."""
    required, read_batch = [], cifar100.read_batch

    def read_small_batch(path, per_class):
        required.append(per_class)
        return read_batch(path, per_class // 50)

    monkeypatch.setattr(cifar100, "read_batch", read_small_batch)
    for part, per_class in (("train", 10), ("test", 2)):
        content = batch(per_class)
        content[b"data"][:, 4] = part == "test"
        write(tmp_path / "cifar" / part, content)
    write(tmp_path / "cifar" / "meta", META)
    monkeypatch.setenv("FCNN_DATA_DIR", str(tmp_path / "cifar"))
    dataset = data.load("auto", 500, 150)
    assert required == [500, 100]
    assert (dataset.name, dataset.stand_in) == ("cifar100-500", False)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (450, 50, 150)
    assert dataset.fine_names[7] == "fine7" and dataset.coarse_names[19] == "coarse19"
    assert dataset.superclass_of.tolist() == [number // 5 for number in range(100)]
    assert (dataset.train.images[:, 0, 4, 0] == 0).all() and (dataset.test.images[:, 0, 4, 0] == 1).all()


# --- damaged and foreign files -----------------------------------------------------------------------------------


def touch(path):
    open(path, "w").close()


class Foreign:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("how", ["open", "function", "system", "getattr", "array"])
def test_foreign_pickle_is_rejected_before_it_runs(tmp_path, how, protocol):
    mark = tmp_path / "touched"
    foreign = {
        "open": Foreign(open, str(mark), "w"),
        "function": Foreign(touch, str(mark)),
        "system": Foreign(os.system, f"touch {mark}"),
        "getattr": Foreign(getattr, np.ndarray, "tofile"),
        "array": np.array([Foreign(open, str(mark), "w")], object),
    }[how]
    path = tmp_path / "train"
    path.write_bytes(pickle.dumps(batch() | {b"data": foreign}, protocol=protocol))
    with pytest.raises(ValueError, match="which was not run") as error:
        cifar100.read_batch(path, per_class=2)
    assert str(path) in str(error.value) and "--dataset standin" in str(error.value)
    assert not mark.exists()
    if how in ("open", "function", "system"):  # an ordinary unpickler does run it
        with open(path, "rb") as file:
            pickle.load(file, encoding="bytes")
        assert mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated_batch_is_rejected(tmp_path, share):
    path = write(tmp_path / "train", batch())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="damaged") as error:
        cifar100.read_batch(path, per_class=2)
    assert str(path) in str(error.value) and f"delete {tmp_path}" in str(error.value)


def changed(key, at, value):
    content = batch()
    content[key][at] = value
    return content


def cut(keep):
    """A batch with the rows and labels that the slice `keep` selects."""
    return {name: value[keep] if len(value) == 200 else value for name, value in batch().items()}


FINE, COARSE = (
    "fine labels must be 200 whole numbers from 0 to 99",
    "coarse labels must be 200 whole numbers from 0 to 19",
)
ROWS, BALANCE = "not uint8 rows of 3072", "must have 2 images of each of the 100 classes"
PIXELS = batch()[b"data"]
BAD = {
    "no data": ({key: value for key, value in batch().items() if key != b"data"}, "no 'data'"),
    "no fine labels": ({b"data": PIXELS, b"coarse_labels": []}, "no 'fine_labels'"),
    "no coarse labels": ({b"data": PIXELS, b"fine_labels": []}, "no 'coarse_labels'"),
    "float data": (batch() | {b"data": PIXELS.astype("float32")}, ROWS),
    "int8 data": (batch() | {b"data": PIXELS.astype("int8")}, ROWS),
    "images instead of rows": (batch() | {b"data": PIXELS.reshape(-1, 3, 32, 32)}, ROWS),
    "short rows": (batch() | {b"data": PIXELS[:, :-1]}, ROWS),
    "list instead of rows": (batch() | {b"data": [1, 2]}, ROWS),
    "fine label 100": (changed(b"fine_labels", 3, 100), FINE),
    "fine label -1": (changed(b"fine_labels", 3, -1), FINE),
    "coarse label 20": (changed(b"coarse_labels", 3, 20), COARSE),
    "coarse label -1": (changed(b"coarse_labels", 3, -1), COARSE),
    "text label": (changed(b"fine_labels", 3, "apple"), FINE),
    "fractional label": (changed(b"coarse_labels", 3, 0.5), COARSE),
    "list as label": (changed(b"fine_labels", 3, [1, 2]), FINE),
    "missing label": (batch() | {b"fine_labels": batch()[b"fine_labels"][:-1]}, FINE),
    "missing image": (cut(slice(-1)), BALANCE),
    "no images": (cut(slice(0)), "must be 0 whole numbers|" + BALANCE),
    "unequal classes": (changed(b"fine_labels", 3, (batch()[b"fine_labels"][3] + 1) % 100), BALANCE),
    "no dictionary": ([1, 2, 3], "damaged or not a file of CIFAR-100"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_invalid_batch_is_rejected(tmp_path, content, message):
    path = write(tmp_path / "train", content)
    with pytest.raises(ValueError, match=message) as error:
        cifar100.read_batch(path, per_class=2)
    assert str(path) in str(error.value) and "--dataset standin" in str(error.value)


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path / 'train'} cannot be read: No such file.*--dataset standin"):
        cifar100.read_batch(tmp_path / "train", per_class=2)


@pytest.mark.parametrize("fine, coarse, message", [(0, 0, "100 fine"), (99, 20, "100 fine"), (100, 7, "20 coarse")])
def test_missing_class_names_are_reported(tmp_path, fine, coarse, message):
    counts = {b"fine_label_names": fine, b"coarse_label_names": coarse}
    path = write(tmp_path / "meta", {key: META[key][:count] for key, count in counts.items()})
    with pytest.raises(ValueError, match=f"{path} .*{message}_label_names; it has {coarse if fine == 100 else fine}"):
        cifar100.read(tmp_path)


# --- finding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "cifar-100-python", "cifar-100-python-target/cifar-100-python"])
@pytest.mark.parametrize("root", ["FCNN_DATA_DIR", "KERAS_HOME", "home", "data"])
def test_files_are_found_in_usual_folders(home, tmp_path, monkeypatch, root, below):
    environment = {"FCNN_DATA_DIR": tmp_path / "chosen", "KERAS_HOME": tmp_path / "keras"}
    if root in environment:
        monkeypatch.setenv(root, str(environment[root]))
    folders = {"KERAS_HOME": tmp_path / "keras" / "datasets", "home": home / ".keras" / "datasets", "data": "data"}
    folder = Path((environment | folders)[root])
    for part in ("train", "meta"):
        write(folder / below / part, {})
    if root != "FCNN_DATA_DIR":
        assert cifar100.find() is None  # incomplete
    write(folder / below / "test", {})
    assert cifar100.find().resolve() == (folder / below).resolve()
    assert data.locate("auto") == data.locate("cifar100") == cifar100.find()


def test_without_files_auto_uses_the_standin(home, monkeypatch, capsys):
    def fail():
        raise Unavailable("CIFAR-100 cannot be downloaded (no network here)")

    monkeypatch.setattr(cifar100, "download", fail)
    assert data.locate("auto") is None
    printed = capsys.readouterr().out
    assert printed.startswith("NOTICE: CIFAR-100 cannot be downloaded (no network here)") and "stand-in" in printed
    with pytest.raises(ValueError, match="no network here"):
        data.load("cifar100")


def test_standin_needs_no_files(home, monkeypatch):
    monkeypatch.setattr(cifar100, "find", lambda: pytest.fail("the stand-in does not need CIFAR-100"))
    assert data.locate("standin") is None


@pytest.mark.parametrize("kind", ["missing", "empty", "a file", "unreadable"])
def test_chosen_folder_without_files_is_reported(home, tmp_path, monkeypatch, capsys, kind):
    chosen, stat = tmp_path / "chosen", os.stat

    def forbid(path, **options):  # a file mode would not do: root may read everything
        if str(path).startswith(str(chosen)):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    if kind == "a file":
        chosen.touch()
    elif kind != "missing":
        chosen.mkdir()
    if kind == "unreadable":
        for part in ("train", "test", "meta"):
            write(chosen / part, {})
        monkeypatch.setattr(os, "stat", forbid)
    monkeypatch.setenv("FCNN_DATA_DIR", str(chosen))
    with pytest.raises(Unavailable, match="no data set is, neither CIFAR-100 nor another;.*--dataset standin") as error:
        data.load("cifar100")
    assert f"FCNN_DATA_DIR is {str(chosen)!r}" in str(error.value)
    assert data.locate("auto") is None
    assert str(chosen) in capsys.readouterr().out


def test_chosen_folder_with_one_data_set_does_not_forbid_the_download_of_another(home, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar100, "download", lambda: "CIFAR-100, downloaded")
    monkeypatch.setattr(medmnist, "download", lambda name: f"{name}, downloaded")
    for part in ("train", "test", "meta"):
        write(tmp_path / "one" / "cifar-100-python" / part, {})
    write(tmp_path / "two" / "bloodmnist.npz", {})
    monkeypatch.setenv("FCNN_DATA_DIR", str(tmp_path / "one"))
    assert data.locate("cifar100") == tmp_path / "one" / "cifar-100-python"
    assert data.locate("pneumoniamnist") == "pneumoniamnist, downloaded"
    monkeypatch.setenv("FCNN_DATA_DIR", str(tmp_path / "two"))
    assert data.locate("auto") == "CIFAR-100, downloaded"
    assert data.locate("pneumoniamnist") == "pneumoniamnist, downloaded"


def test_damaged_files_are_replaced_by_the_standin_if_that_is_allowed(home, monkeypatch, capsys):
    for part in ("train", "test", "meta"):
        write(home / ".keras" / "datasets" / "cifar-100-python" / part, b"<html>Please log in</html>")
    with pytest.raises(Unavailable, match="meta is damaged or not a file of CIFAR-100") as error:
        data.load("cifar100")
    few = standin.generate(per_class=10, test_per_class=2)
    monkeypatch.setattr(standin, "generate", lambda **counts: few)
    assert data.load("auto", 10, 10).name == "standin-10"
    assert capsys.readouterr().out.startswith(f"NOTICE: {error.value}. Continuing with the stand-in")
