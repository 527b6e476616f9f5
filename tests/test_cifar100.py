"""CIFAR-100's files: `fcnn_utils.course.data.cifar100`, and `fcnn_utils.course.data` where it needs them.

Batches are made here with 2 or 20 images a class, not CIFAR-100's 500: enough for every rule, and quick to write.
"""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from fcnn_utils.course import data
from fcnn_utils.course.data import cifar100
from fcnn_utils.course.data import download as downloads
from fcnn_utils.course.data.download import Unavailable

# --- files like the official ones --------------------------------------------------------------------------------


def batch(per_class=2, seed=0):
    """A batch in the official layout: bytes as keys, rows of 3,072 values, labels in lists."""
    rng = np.random.default_rng(seed)
    fine = np.repeat(np.arange(100), per_class)[rng.permutation(100 * per_class)]
    rows = rng.integers(0, 256, (len(fine), 3072), dtype="uint8")
    return {
        b"filenames": [b"name.png"] * len(fine),
        b"batch_label": b"training batch 1 of 1",
        b"fine_labels": fine.tolist(),
        b"coarse_labels": (fine // 5).tolist(),
        b"data": rows,
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


META = {
    b"fine_label_names": [f"fine{number}".encode() for number in range(100)],
    b"coarse_label_names": [f"coarse{number}".encode() for number in range(20)],
}


def write_folder(folder, **changed):
    """`folder` with the three files of CIFAR-100; the content of each may be given."""
    parts = {"train": batch(500 // 100), "test": batch(1), "meta": META} | changed
    for name, content in parts.items():
        write(folder / name, content)
    return folder


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without CIFAR-100: empty home, empty working folder. Returns the home."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.delenv("FCNN_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture
def offline(bare, monkeypatch):
    """As `bare`, and the download fails."""

    def fail():
        raise Unavailable("CIFAR-100 cannot be downloaded (no network here)")

    monkeypatch.setattr(cifar100, "download", fail)


# --- correct: reading a batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [bytes, str])
@pytest.mark.parametrize("labels", [list, np.asarray])
def test_a_pixel_lands_at_its_row_column_and_channel(tmp_path, keys, labels):
    content = batch()
    content[b"fine_labels"], content[b"coarse_labels"] = (
        labels(content[b"fine_labels"]),
        labels(content[b"coarse_labels"]),
    )
    if keys is str:
        content = {name.decode(): value for name, value in content.items()}
    split = data._in_order(*cifar100.read_batch(write(tmp_path / "train", content), per_class=2))
    rows = batch()[b"data"]
    # Find each official row again by its first red value at several places, computed as the format's page says:
    # 1,024 red values row by row, then the green ones, then the blue ones.
    for image, fine, coarse in zip(split.images, split.fine, split.coarse, strict=True):
        official = [
            [[row[1024 * channel + 32 * y + x] for channel in range(3)] for y, x in ((0, 0), (0, 31), (5, 7), (31, 2))]
            for row in rows
        ]
        at = official.index([image[y, x].tolist() for y, x in ((0, 0), (0, 31), (5, 7), (31, 2))])
        assert (fine, coarse) == (batch()[b"fine_labels"][at], batch()[b"coarse_labels"][at])
    assert len(split) == 200


def test_a_batch_as_python_2_wrote_it_is_read(tmp_path):
    """The official files: protocol 2, strings of bytes, NumPy's old module name."""
    content = pickle.dumps(batch(), protocol=4)
    assert b"numpy._core.multiarray" in content
    old = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    assert old != content
    old = old[:2] + old[11:] if old[2:3] == b"\x95" else old  # the frame's length no longer fits
    (tmp_path / "train").write_bytes(old)
    split = data._in_order(*cifar100.read_batch(tmp_path / "train", per_class=2))
    images = {image.tobytes() for image in split.images}
    assert images == {row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for row in batch()[b"data"]}


def test_the_order_of_the_files_rows_does_not_matter(tmp_path):
    datasets = []
    for order in (np.arange(1000), np.random.default_rng(5).permutation(1000)):
        content = batch(10)
        shuffled = content | {
            b"data": content[b"data"][order],
            b"fine_labels": np.array(content[b"fine_labels"])[order].tolist(),
            b"coarse_labels": np.array(content[b"coarse_labels"])[order].tolist(),
        }
        split = data._in_order(*cifar100.read_batch(write(tmp_path / "train", shuffled), per_class=10))
        datasets.append(data._dataset("x", "x", False, (*data._split(split), split), (), ()))
    assert datasets[0].fingerprint == datasets[1].fingerprint
    np.testing.assert_array_equal(datasets[0].validation.images, datasets[1].validation.images)
    np.testing.assert_array_equal(datasets[0].train.fine, datasets[1].train.fine)


# --- correct: files that are not CIFAR-100's ---------------------------------------------------------------------


def touch(path):
    """What a foreign pickle would do."""
    open(path, "w").close()


class Foreign:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("how", ["open", "function", "system", "getattr", "array"])
def test_a_foreign_pickle_is_refused_and_nothing_of_it_runs(tmp_path, how, protocol):
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
    with pytest.raises(ValueError, match="nothing of it was run") as error:
        cifar100.read_batch(path, per_class=2)
    assert str(path) in str(error.value) and "--dataset standin" in str(error.value)
    assert not mark.exists()
    if how in ("open", "function", "system"):  # the pickle is one that does it
        with open(path, "rb") as file:
            pickle.load(file, encoding="bytes")
        assert mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_batch_is_named(tmp_path, share):
    path = write(tmp_path / "train", batch())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="damaged or not a batch of CIFAR-100") as error:
        cifar100.read_batch(path, per_class=2)
    assert str(path) in str(error.value) and f"delete {tmp_path}" in str(error.value)


def without(key):
    return {name: value for name, value in batch().items() if name != key}


def labelled(key, at, value):
    content = batch()
    content[key][at] = value
    return content


BAD = {
    "no data": (without(b"data"), "no 'data'"),
    "no fine labels": (without(b"fine_labels"), "no 'fine_labels'"),
    "no coarse labels": (without(b"coarse_labels"), "no 'coarse_labels'"),
    "float data": (batch() | {b"data": batch()[b"data"].astype("float32")}, "not uint8 rows of 3072"),
    "int8 data": (batch() | {b"data": batch()[b"data"].astype("int8")}, "not uint8 rows of 3072"),
    "CIFAR-100 as images": (batch() | {b"data": batch()[b"data"].reshape(-1, 3, 32, 32)}, "not uint8 rows of 3072"),
    "narrow data": (batch() | {b"data": batch()[b"data"][:, :-1]}, "not uint8 rows of 3072"),
    "data in a list": (batch() | {b"data": [1, 2]}, "not uint8 rows of 3072"),
    "fine label 100": (labelled(b"fine_labels", 3, 100), "fine labels must be between 0 and 99; found 0 to 100"),
    "fine label -1": (labelled(b"fine_labels", 3, -1), "fine labels must be between 0 and 99; found -1 to 99"),
    "coarse label 20": (labelled(b"coarse_labels", 3, 20), "coarse labels must be between 0 and 19; found 0 to 20"),
    "coarse label -1": (labelled(b"coarse_labels", 3, -1), "coarse labels must be between 0 and 19; found -1 to 19"),
    "a label in words": (labelled(b"fine_labels", 3, "apple"), "fine labels must be 200 whole numbers"),
    "a label as a fraction": (labelled(b"coarse_labels", 3, 0.5), "coarse labels must be 200 whole numbers"),
    "a list as label": (labelled(b"fine_labels", 3, [1, 2]), "fine"),
    "a label too few": (batch() | {b"fine_labels": batch()[b"fine_labels"][:-1]}, "fine labels must be 200 whole"),
    "an image too few": (
        {name: value[:-1] if len(value) == 200 else value for name, value in batch().items()},
        "must hold 2 images of each of the 100 classes",
    ),
    "classes of unequal size": (
        labelled(b"fine_labels", 3, (batch()[b"fine_labels"][3] + 1) % 100),
        "must hold 2 images of each of the 100 classes",
    ),
    "no images": (
        {name: value[:0] if len(value) == 200 else value for name, value in batch().items()},
        "must be 0 whole numbers|must hold 2 images of each of the 100 classes",
    ),
    "no dictionary": ([1, 2, 3], "damaged or not a batch of CIFAR-100"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_a_file_that_is_no_batch_is_refused(tmp_path, content, message):
    path = write(tmp_path / "train", content)
    with pytest.raises(ValueError, match=message) as error:
        cifar100.read_batch(path, per_class=2)
    assert str(path) in str(error.value) and "--dataset standin" in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file.*--dataset standin") as error:
        cifar100.read_batch(tmp_path / "train", per_class=2)
    assert str(tmp_path / "train") in str(error.value)


@pytest.mark.parametrize(
    "meta, message",
    [
        ({}, "must hold 100 fine_label_names; found 0"),
        (META | {b"fine_label_names": META[b"fine_label_names"][:99]}, "must hold 100 fine_label_names; found 99"),
        ({b"fine_label_names": META[b"fine_label_names"]}, "must hold 20 coarse_label_names; found 0"),
    ],
    ids=["no names", "99 fine names", "no coarse names"],
)
def test_missing_names_are_named(bare, tmp_path, monkeypatch, meta, message):
    monkeypatch.setenv("FCNN_DATA_DIR", str(write_folder(tmp_path / "cifar", meta=meta)))
    with pytest.raises(ValueError, match=message) as error:
        data.load("cifar100")
    assert str(tmp_path / "cifar" / "meta") in str(error.value)


# --- correct: where CIFAR-100 is, and where it is not ------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "cifar-100-python", "cifar-100-python-target/cifar-100-python"])
@pytest.mark.parametrize("root", ["FCNN_DATA_DIR", "KERAS_HOME", "home", "data"])
def test_cifar_is_found_in_its_usual_places(bare, tmp_path, monkeypatch, root, below):
    folder = {
        "FCNN_DATA_DIR": tmp_path / "chosen",
        "KERAS_HOME": tmp_path / "keras" / "datasets",
        "home": bare / ".keras" / "datasets",
        "data": tmp_path / "work" / "data",
    }[root]
    if root in ("FCNN_DATA_DIR", "KERAS_HOME"):
        monkeypatch.setenv(root, str(folder if root == "FCNN_DATA_DIR" else folder.parent))
    for part in ("train", "test", "meta"):
        write(folder / below / part, {})
    assert cifar100.find().resolve() == (folder / below).resolve()
    assert data.locate("auto") == data.locate("cifar100") == cifar100.find()


def test_a_folder_that_lacks_a_file_is_not_cifar(bare):
    for part in ("train", "meta"):
        write(bare / ".keras" / "datasets" / part, {})
    assert cifar100.find() is None


def test_the_whole_of_cifar_is_read(bare, tmp_path, monkeypatch):
    """All 60,000 rows of the official layout, here of one grey value each: files are checked before they are used."""
    folder = tmp_path / "cifar"
    for part, per_class in (("train", 500), ("test", 100)):
        fine = np.tile(np.arange(100), per_class)
        rows = np.zeros((len(fine), 3072), "uint8")
        rows[:, :4] = np.arange(len(fine), dtype=">u4").view("uint8").reshape(-1, 4)  # every image another
        rows[:, 4] = part == "test"
        write(folder / part, batch(1) | {b"data": rows, b"fine_labels": fine, b"coarse_labels": fine // 5})
    write(folder / "meta", META)
    monkeypatch.setenv("FCNN_DATA_DIR", str(folder))
    dataset = data.load("auto", 1000, 200)
    assert (dataset.name, dataset.stand_in) == ("cifar100-1000", False)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (900, 100, 200)
    assert dataset.fine_names[7] == "fine7" and dataset.coarse_names[19] == "coarse19"
    assert dataset.superclass_of.tolist() == [number // 5 for number in range(100)]


def test_without_cifar_auto_goes_on_with_the_stand_in_and_says_so(offline, capsys):
    assert data.load("auto", 100, 100).stand_in
    printed = capsys.readouterr().out
    assert printed.startswith("NOTICE: CIFAR-100 cannot be downloaded (no network here)") and "stand-in" in printed


def test_without_cifar_cifar_is_an_error(offline):
    with pytest.raises(ValueError, match="no network here"):
        data.load("cifar100")


def test_the_stand_in_is_not_looked_for(bare, monkeypatch):
    monkeypatch.setattr(cifar100, "find", lambda: pytest.fail("the stand-in needs no CIFAR-100"))
    assert data.locate("standin") is None


@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_a_chosen_folder_without_cifar_is_named(bare, tmp_path, monkeypatch, capsys, kind):
    chosen = tmp_path / "chosen"
    if kind != "missing":
        chosen.mkdir() if kind == "empty" else chosen.touch()
    monkeypatch.setenv("FCNN_DATA_DIR", str(chosen))
    with pytest.raises(ValueError, match="train, test and meta are not there.*--dataset standin") as error:
        data.load("cifar100")
    assert f"FCNN_DATA_DIR is {str(chosen)!r}" in str(error.value)
    assert data.locate("auto") is None
    assert str(chosen) in capsys.readouterr().out


def test_a_chosen_folder_that_may_not_be_read_is_named(bare, tmp_path, monkeypatch):
    chosen, stat = write_folder(tmp_path / "chosen"), cifar100.Path.stat

    def forbidden(self, **options):  # not by its mode: root may read everything
        if chosen in (self, *self.parents):
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **options)

    monkeypatch.setenv("FCNN_DATA_DIR", str(chosen))
    monkeypatch.setattr(cifar100.Path, "stat", forbidden)
    with pytest.raises(ValueError, match="--dataset standin") as error:
        data.load("cifar100")
    assert str(chosen) in str(error.value)


# --- correct: downloading ----------------------------------------------------------------------------------------


@pytest.fixture
def download(bare, monkeypatch):
    """Gives the download another program to run, and returns the processes it started."""
    started, popen = [], subprocess.Popen

    def use(code):
        def start(command, **options):
            assert command[0] == sys.executable and "cifar100.load_data()" in command[-1]
            started.append(popen([sys.executable, "-S", "-c", code], **options))
            return started[-1]

        monkeypatch.setattr(downloads.subprocess, "Popen", start)
        return started

    yield use
    for child in started:
        child.kill()
        child.wait()
        child.stderr.close()


def test_a_download_that_never_ends_is_stopped(download, monkeypatch, capsys):
    monkeypatch.setenv("FCNN_DOWNLOAD_SECONDS", "0.7")
    (children, start) = download("import time; time.sleep(60)"), downloads.time.monotonic()
    with pytest.raises(Unavailable, match="not downloaded within 1 s.*--dataset standin"):
        data.load("cifar100")
    assert downloads.time.monotonic() - start < 20
    assert [child.returncode for child in children] == [-9]  # ended, and waited for: no zombie is left
    assert "downloading 169 MB" in capsys.readouterr().out


def test_a_limit_that_is_no_number_is_named(download, monkeypatch):
    monkeypatch.setenv("FCNN_DOWNLOAD_SECONDS", "soon")
    children = download("pass")
    with pytest.raises(ValueError, match="FCNN_DOWNLOAD_SECONDS.*'soon'"):
        data.load("cifar100")
    assert not children


def test_an_interrupted_download_leaves_no_process(download, monkeypatch):
    children = download("import time; time.sleep(60)")

    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(downloads.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.load("cifar100")
    assert [child.returncode for child in children] == [-9]  # ended, and waited for: no zombie is left


def test_a_failed_download_tells_its_reason(download):
    download("raise OSError('host not reached')")
    with pytest.raises(Unavailable, match=r"cannot be downloaded \(OSError: host not reached\)"):
        data.load("cifar100")


def test_a_download_that_brings_nothing_is_an_error(download):
    download("pass")
    with pytest.raises(Unavailable, match=r"cannot be downloaded \(no reason given\)"):
        data.load("cifar100")


def test_a_download_is_found_where_keras_puts_it(download, bare):
    folder = bare / ".keras" / "datasets" / "cifar-100-python-target" / "cifar-100-python"
    download(
        f"from pathlib import Path; p = Path({str(folder)!r}); p.mkdir(parents=True); "
        "[(p / name).touch() for name in ('train', 'test', 'meta')]"
    )
    assert data.locate("cifar100") == folder
