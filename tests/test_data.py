"""Images: `fcnn_utils.data`.

Batches are made here with 2 or 20 images a class, not CIFAR-100's 500: enough for every rule, and quick to write.
"""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from fcnn_utils import data, standin

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
        raise data.Unavailable("CIFAR-100 cannot be downloaded (no network here)")

    monkeypatch.setattr(data, "_download", fail)


@pytest.fixture(scope="module")
def whole():
    """The whole stand-in, once for this file: making it takes a second."""
    return data.load("standin")


@pytest.fixture(scope="module")
def small():
    """A data set of 20 training and 2 test images a class, made as the stand-in is."""
    train, test = (data._in_order(*arrays) for arrays in standin.generate(20, 2))
    return data._dataset("standin", "a test", True, (*data._split(train), test), range(100), range(20))


def key(split):
    """The images of a split as a set of bytes."""
    return {image.tobytes() for image in split.images}


# --- basic: arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "", None, 100])
def test_an_unknown_data_set_is_refused(name):
    with pytest.raises(ValueError, match=f"must be one of cifar100, standin, auto; got {name!r}"):
        data.load(name)


@pytest.mark.parametrize("count", [0, -1, 201, 1.5, True])
def test_first_takes_as_many_as_there_are(small, count):
    with pytest.raises(ValueError, match=f"between 1 and 200; got {count}"):
        small.test.first(count)


@pytest.mark.parametrize(
    "train, test, allowed", [(9, 10, "10 and 2000; got 9"), (2001, 10, "got 2001"), (10, 201, "got 201")]
)
def test_a_subset_takes_as_many_as_there_are(small, train, test, allowed):
    with pytest.raises(ValueError, match=allowed):
        small.subset(train, test)


@pytest.mark.parametrize("images", [{"train_images": -5}, {"test_images": -5}, {"train_images": 10**6}], ids=str)
def test_load_refuses_numbers_of_images_that_are_not_there(monkeypatch, small, images):
    monkeypatch.setattr(data, "_standin", lambda: small)
    with pytest.raises(ValueError, match=f"number of images|number of training images.*got {[*images.values()][0]}"):
        data.load("standin", **images)


def test_arrays_are_read_only(small):
    for split in (small.train, small.validation, small.test, small.everything, small.train.first(7)):
        for array in (split.images, split.fine, split.coarse):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


def test_a_description_tells_a_stand_in_from_cifar(small):
    line = small.describe()
    assert line.startswith("STAND-IN DATA, generated, not CIFAR-100: standin, 1,800 training, 200 validation and 200")
    assert small.fingerprint[:12] in line
    real = data._dataset("cifar100", "x", False, (small.train, small.validation, small.test), (), ())
    assert real.describe().startswith("cifar100, 1,800 training")


# --- basic: the stand-in -----------------------------------------------------------------------------------------


def test_the_stand_in_has_cifars_shape(whole):
    assert (whole.name, whole.stand_in) == ("standin", True)
    assert (len(whole.fine_names), len(whole.coarse_names)) == (100, 20)
    assert len(set(whole.fine_names)) == 100 and len(set(whole.coarse_names)) == 20
    for split, per_class in ((whole.train, 90), (whole.validation, 10), (whole.test, 20)):
        assert split.images.shape == (100 * per_class, 32, 32, 3) and split.images.dtype == np.uint8
        assert split.fine.dtype == split.coarse.dtype == np.int64
        assert np.bincount(split.fine).tolist() == [per_class] * 100
        assert np.bincount(split.coarse).tolist() == [5 * per_class] * 20
    assert np.bincount(whole.superclass_of).tolist() == [5] * 20


def test_the_stand_in_is_the_same_everywhere(whole):
    again = data.load("standin")
    assert again.fingerprint == whole.fingerprint
    np.testing.assert_array_equal(again.train.images, whole.train.images)
    # Records carry the fingerprint: with other bytes every record on the stand-in were one of other data.
    assert whole.fingerprint == "6defd26919a60549352142d3a8f8a47b3182cfef9dd71caaadaafd3bced60abd"


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
    split = data._read_batch(write(tmp_path / "train", content), per_class=2)
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
    split = data._read_batch(tmp_path / "train", per_class=2)
    assert key(split) == {row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for row in batch()[b"data"]}


def test_the_order_of_the_files_rows_does_not_matter(tmp_path):
    datasets = []
    for order in (np.arange(1000), np.random.default_rng(5).permutation(1000)):
        content = batch(10)
        shuffled = content | {
            b"data": content[b"data"][order],
            b"fine_labels": np.array(content[b"fine_labels"])[order].tolist(),
            b"coarse_labels": np.array(content[b"coarse_labels"])[order].tolist(),
        }
        split = data._read_batch(write(tmp_path / "train", shuffled), per_class=10)
        datasets.append(data._dataset("x", "x", False, (*data._split(split), split), (), ()))
    assert datasets[0].fingerprint == datasets[1].fingerprint
    np.testing.assert_array_equal(datasets[0].validation.images, datasets[1].validation.images)
    np.testing.assert_array_equal(datasets[0].train.fine, datasets[1].train.fine)


@pytest.mark.parametrize("what", ["pixel", "fine", "coarse", "split"])
def test_a_fingerprint_tells_apart_what_differs(small, what):
    parts = [small.train, small.validation, small.test]
    arrays = [small.test.images.copy(), small.test.fine.copy(), small.test.coarse.copy()]
    if what == "pixel":
        arrays[0][17, 3, 4, 1] ^= 1
    elif what == "split":
        parts[0], parts[1] = parts[1], parts[0]
    else:
        arrays[1 if what == "fine" else 2][17] ^= 1
    parts[2] = data.Split(*arrays)
    assert data._dataset("x", "x", True, parts, (), ()).fingerprint != small.fingerprint


# --- correct: splits and subsets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["fine", "coarse"])
def test_validation_is_a_tenth_of_each_class(small, part):
    classes = {"fine": 100, "coarse": 20}[part]
    counts = [np.bincount(getattr(split, part)).tolist() for split in (small.train, small.validation)]
    assert counts == [[1800 // classes] * classes, [200 // classes] * classes]


def test_no_image_is_in_two_splits(small):
    keys = [key(split) for split in (small.train, small.validation, small.test)]
    assert [len(part) for part in keys] == [1800, 200, 200]
    assert len(set.union(*keys)) == 2200
    assert key(small.everything) == keys[0] | keys[1]


def test_labels_stay_with_their_images(small):
    (images, fine, coarse), _ = standin.generate(20, 2)
    known = {image.tobytes(): (a, b) for image, a, b in zip(images, fine, coarse, strict=True)}
    subset = small.subset(500, 100)
    for split in (small.train, small.validation, small.everything, small.train.first(300), subset.train):
        for image, a, b in zip(split.images, split.fine, split.coarse, strict=True):
            assert known[image.tobytes()] == (a, b)


@pytest.mark.parametrize("count", [1, 99, 100, 250, 1800])
def test_the_first_images_are_as_many_of_each_class(small, count):
    part = small.train.first(count)
    counts = np.bincount(part.fine, minlength=100)
    assert len(part) == len(key(part)) == count
    assert counts.max() - counts.min() <= 1
    assert key(part) <= key(small.train)


def test_a_larger_subset_holds_the_smaller_one(small):
    assert key(small.train.first(150)) < key(small.train.first(420))


def test_a_subset_of_a_subset_is_named_once(small):
    again = small.subset(500, 100).subset(50, 10)
    assert (again.name, len(again.train), len(again.validation), len(again.test)) == ("standin-50", 45, 5, 10)


@pytest.mark.parametrize("train, test", [(10, 1), (500, 100), (1234, 77), (2000, 200)])
def test_a_subset_keeps_a_tenth_for_validation(small, train, test):
    subset = small.subset(train, test)
    assert subset.name == f"standin-{train}" and subset.stand_in
    assert (len(subset.train), len(subset.validation), len(subset.test)) == (train - train // 10, train // 10, test)
    assert key(subset.train) <= key(small.train) and key(subset.validation) <= key(small.validation)
    assert (subset.fingerprint == small.fingerprint) == (train == 2000 and test == 200)
    assert small.subset(train, test).fingerprint == subset.fingerprint


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
    import os

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
        data._read_batch(path, per_class=2)
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
        data._read_batch(path, per_class=2)
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
        data._read_batch(path, per_class=2)
    assert str(path) in str(error.value) and "--dataset standin" in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file.*--dataset standin") as error:
        data._read_batch(tmp_path / "train", per_class=2)
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
    assert data.find_cifar100().resolve() == (folder / below).resolve()
    assert data.locate("auto") == data.locate("cifar100") == data.find_cifar100()


def test_a_folder_that_lacks_a_file_is_not_cifar(bare):
    for part in ("train", "meta"):
        write(bare / ".keras" / "datasets" / part, {})
    assert data.find_cifar100() is None


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


def test_without_cifar_auto_goes_on_with_the_stand_in_and_says_so(offline, small, monkeypatch, capsys):
    monkeypatch.setattr(data, "_standin", lambda: small)
    assert data.load("auto") is small
    printed = capsys.readouterr().out
    assert printed.startswith("NOTICE: CIFAR-100 cannot be downloaded (no network here)") and "stand-in" in printed


def test_without_cifar_cifar_is_an_error(offline):
    with pytest.raises(ValueError, match="no network here"):
        data.load("cifar100")


def test_the_stand_in_is_not_looked_for(bare, monkeypatch):
    monkeypatch.setattr(data, "find_cifar100", lambda: pytest.fail("the stand-in needs no CIFAR-100"))
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
    chosen, stat = write_folder(tmp_path / "chosen"), data.Path.stat

    def forbidden(self, **options):  # not by its mode: root may read everything
        if chosen in (self, *self.parents):
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **options)

    monkeypatch.setenv("FCNN_DATA_DIR", str(chosen))
    monkeypatch.setattr(data.Path, "stat", forbidden)
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

        monkeypatch.setattr(data.subprocess, "Popen", start)
        return started

    yield use
    for child in started:
        child.kill()
        child.wait()
        child.stderr.close()


def test_a_download_that_never_ends_is_stopped(download, monkeypatch, capsys):
    monkeypatch.setenv("FCNN_DOWNLOAD_SECONDS", "0.7")
    (children, start) = download("import time; time.sleep(60)"), data.time.monotonic()
    with pytest.raises(data.Unavailable, match="not downloaded within 1 s.*--dataset standin"):
        data.load("cifar100")
    assert data.time.monotonic() - start < 20
    assert [child.wait(timeout=10) for child in children] == [-9]
    assert "downloading 169 MB" in capsys.readouterr().out


def test_an_interrupted_download_leaves_no_process(download, monkeypatch):
    children = download("import time; time.sleep(60)")

    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.load("cifar100")
    assert [child.wait(timeout=10) for child in children] == [-9]


def test_a_failed_download_tells_its_reason(download):
    download("raise OSError('host not reached')")
    with pytest.raises(data.Unavailable, match=r"cannot be downloaded \(OSError: host not reached\)"):
        data.load("cifar100")


def test_a_download_that_brings_nothing_is_an_error(download):
    download("pass")
    with pytest.raises(data.Unavailable, match=r"cannot be downloaded \(no reason given\)"):
        data.load("cifar100")


def test_a_download_is_found_where_keras_puts_it(download, bare):
    folder = bare / ".keras" / "datasets" / "cifar-100-python-target" / "cifar-100-python"
    download(
        f"from pathlib import Path; p = Path({str(folder)!r}); p.mkdir(parents=True); "
        "[(p / name).touch() for name in ('train', 'test', 'meta')]"
    )
    assert data.locate("cifar100") == folder


# --- correct: the real data --------------------------------------------------------------------------------------


def real_is_here():
    try:
        return data.find_cifar100() is not None
    except data.Unavailable:
        return False


@pytest.fixture(scope="module")
def real():
    return data.load("cifar100")


@pytest.mark.skipif(not real_is_here(), reason="CIFAR-100 is not on this machine")
class TestCifar100:
    def test_splits(self, real):
        for split, per_class in ((real.train, 450), (real.validation, 50), (real.test, 100)):
            assert split.images.shape == (100 * per_class, 32, 32, 3)
            assert np.bincount(split.fine).tolist() == [per_class] * 100
            assert np.bincount(split.coarse).tolist() == [5 * per_class] * 20

    def test_channels(self, real):
        """The channels' means and deviations that are quoted everywhere for the 50,000 training images."""
        pixels = real.everything.images.reshape(-1, 3)
        np.testing.assert_allclose(pixels.mean(axis=0) / 255, [0.5071, 0.4865, 0.4409], atol=1e-3)
        deviations = [pixels[:, channel].std() / 255 for channel in range(3)]
        np.testing.assert_allclose(deviations, [0.2673, 0.2564, 0.2762], atol=1e-3)

    def test_superclasses(self, real):
        pairs = {
            (fine, coarse)
            for split in (real.everything, real.test)
            for fine, coarse in zip(split.fine, split.coarse, strict=True)
        }
        assert len(pairs) == 100  # each class in one superclass
        assert np.bincount([coarse for _, coarse in pairs]).tolist() == [5] * 20
        names = {real.coarse_names[c]: {real.fine_names[f] for f, own in pairs if own == c} for _, c in pairs}
        assert names["trees"] == {"maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"}
        assert names["people"] == {"baby", "boy", "girl", "man", "woman"}
        assert real.fine_names[0] == "apple" and real.coarse_names[real.superclass_of[0]] == "fruit_and_vegetables"

    def test_no_image_is_in_training_and_validation(self, real):
        assert not key(real.train) & key(real.validation)
        assert len(key(real.everything)) == 49_986  # CIFAR-100 holds a few images twice

    def test_the_fingerprint_is_that_of_the_published_records(self, real):
        assert real.fingerprint == "5558370ef38c443a3d029bac7e72ab8f0fe49c4f6d30343557f5b7be489bc5cf"
