"""Tests of `fcnn_utils.course.data`: splits, subsets, fingerprints, the real CIFAR-100."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from fcnn_utils.course import data
from fcnn_utils.course.data import cifar100, standin


@pytest.fixture(scope="module")
def splits():
    """The arrays of a small stand-in, with 20 training and 2 test images of each class."""
    return standin.generate(20, 2)


@pytest.fixture(scope="module")
def small(splits):
    """The data set that `load` makes of `splits`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standin, "generate", lambda **counts: splits)
        return data.load("standin")


def pixels(split):
    """The images of a split as a set of bytes."""
    return {image.tobytes() for image in split.images}


def test_import_loads_no_slow_library():
    code = "import sys; from fcnn_utils.course import data; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded and not {"keras", "tensorflow", "pandas", "pooch", "requests"} & set(loaded)


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "", None, 100, "chestmnist", "PneumoniaMNIST"])
def test_load_rejects_unknown_name(name):
    with pytest.raises(ValueError, match=f"must be one of {', '.join(data.NAMES)}.*{name!r}"):
        data.load(name)


INVALID = {
    "first": [(0,), (-1,), (201,), (1.5,), (True,)],
    "sample": [(0, 0), (201, 0), (5, -1), (5, 2**31), (5, 0.5)],
    "subset": [(9, 10), (2001, 10), (10, 201), (10, 0)],
    "load": [(-5, 0), (0, -5), (2001, 0), (0, 201)],
}


@pytest.mark.parametrize("method, arguments", [(name, each) for name, values in INVALID.items() for each in values])
def test_invalid_count_or_seed_is_rejected(small, splits, monkeypatch, method, arguments):
    monkeypatch.setattr(standin, "generate", lambda **counts: splits)
    call = {
        "first": small.test.first,
        "sample": small.test.sample,
        "subset": small.subset,
        "load": lambda *counts: data.load("standin", *counts),
    }[method]
    with pytest.raises(ValueError, match=r"(number of ((training|test) )?images|seed) must be.* between") as error:
        call(*arguments)
    assert str(error.value).split("got ")[1] in map(str, arguments)


# --- splits and data sets ----------------------------------------------------------------------------------------


def test_arrays_are_read_only(small):
    for split in (small.train, small.validation, small.test, small.everything, small.train.first(7)):
        for array in (split.images, split.fine, split.coarse):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


def test_print_shows_one_line(small):
    counts = "1,800 training, 200 validation and 200 test images, from a generator"
    short = small.fingerprint[:12]
    assert str(small) == f"STAND-IN DATA, generated, not CIFAR-100: standin, {counts} (sha256 {short})"
    assert str(small.subset(50, 10)).startswith("STAND-IN DATA, generated, not CIFAR-100: standin-50, 45 training")
    real = dataclasses.replace(small, name="cifar100", source="elsewhere")
    assert str(real).startswith("cifar100, 1,800 training") and "from elsewhere" in str(real)
    assert "1,800 images of 32×32×3" in str(small.train) and "100 classes" in str(small.train)


@pytest.mark.parametrize("what", ["pixel", "fine", "coarse", "split"])
def test_fingerprint_changes_with_data(small, what):
    arrays = {"images": small.test.images.copy(), "fine": small.test.fine.copy(), "coarse": small.test.coarse.copy()}
    if what == "split":
        other = dataclasses.replace(small, train=small.validation, validation=small.train)
    else:
        arrays["images" if what == "pixel" else what][17] ^= 1
        other = dataclasses.replace(small, test=data.Split(**arrays))
    assert other.fingerprint != small.fingerprint
    assert dataclasses.replace(small, name="x", source="x", fine_names=()).fingerprint == small.fingerprint


def test_validation_is_a_tenth_of_each_class(small):
    for part, classes in (("fine", 100), ("coarse", 20)):
        counts = [np.bincount(getattr(split, part)).tolist() for split in (small.train, small.validation)]
        assert counts == [[1800 // classes] * classes, [200 // classes] * classes]


def test_splits_share_no_image(small):
    parts = [pixels(split) for split in (small.train, small.validation, small.test)]
    assert [len(part) for part in parts] == [1800, 200, 200]
    assert len(set.union(*parts)) == 2200
    assert pixels(small.everything) == parts[0] | parts[1]


def test_order_of_images_does_not_change_the_data_set(small, splits, monkeypatch):
    orders = [np.random.default_rng(5).permutation(len(split[1])) for split in splits]
    shuffled = [[array[order] for array in split] for split, order in zip(splits, orders, strict=True)]
    monkeypatch.setattr(standin, "generate", lambda **counts: shuffled)
    assert data.load("standin").fingerprint == small.fingerprint


def test_labels_stay_with_their_images(small, splits):
    (images, fine, coarse), _ = splits
    known = {image.tobytes(): labels for image, *labels in zip(images, fine, coarse, strict=True)}
    subset = small.subset(500, 100)
    parts = small.train, small.validation, small.everything, small.train.first(300), small.train.sample(300, 1)
    for split in (*parts, subset.train, subset.validation):
        for image, *labels in zip(split.images, split.fine, split.coarse, strict=True):
            assert known[image.tobytes()] == labels


@pytest.mark.parametrize("count", [1, 99, 100, 250, 1800])
def test_first_is_balanced(small, count):
    part = small.train.first(count)
    assert len(part) == len(pixels(part)) == count
    assert np.ptp(np.bincount(part.fine, minlength=100)) <= 1
    assert pixels(part) <= pixels(small.train.first(min(count + 50, 1800)))  # a larger part contains it


def test_sample_depends_on_seed_and_repeats_no_image(small):
    one, other, again = (small.train.sample(50, seed) for seed in (1, 2, 1))
    assert np.array_equal(one.images, again.images) and not np.array_equal(one.images, other.images)
    assert len(pixels(one)) == 50 and pixels(one) < pixels(small.train)


@pytest.mark.parametrize("train, test", [(10, 1), (500, 100), (1234, 77), (2000, 200)])
def test_subset_keeps_share_of_validation_images(small, train, test):
    subset = small.subset(train, test)
    assert subset.name == f"standin-{train}" and subset.stand_in
    assert (len(subset.train), len(subset.validation), len(subset.test)) == (train - train // 10, train // 10, test)
    assert pixels(subset.train) <= pixels(small.train) and pixels(subset.validation) <= pixels(small.validation)
    assert (subset.fingerprint == small.fingerprint) == (train == 2000 and test == 200)
    assert small.subset(train, test).fingerprint == subset.fingerprint
    assert train < 20 or subset.subset(20, 1).name == "standin-20"


# --- the stand-ins and CIFAR-100 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(-5, 0), (9, 0), (1.5, 0), ("10", 0), (0, -1), (0, 2.0)], ids=str)
def test_count_that_no_data_set_has_is_refused_before_anything_is_read(monkeypatch, counts):
    monkeypatch.setattr(data, "locate", lambda *arguments: pytest.fail("the data set was looked for"))
    with pytest.raises(ValueError, match="number of (training|test) images must be a whole number between"):
        data.load("cifar100", *counts)


def test_standin_has_the_layout_of_cifar100_and_published_fingerprint():
    whole = data.load("standin")
    assert (whole.name, whole.stand_in) == ("standin", True)
    assert len(set(whole.fine_names)) == 100 and len(set(whole.coarse_names)) == 20
    for split, per_class in ((whole.train, 90), (whole.validation, 10), (whole.test, 20)):
        assert split.images.shape == (100 * per_class, 32, 32, 3) and split.images.dtype == np.uint8
        assert split.fine.dtype == split.coarse.dtype == np.int64
        assert np.bincount(split.fine).tolist() == [per_class] * 100
        assert np.bincount(split.coarse).tolist() == [5 * per_class] * 20
    assert np.bincount(whole.superclass_of).tolist() == [5] * 20
    # Run records carry the fingerprint: with other bytes they would be records of other data.
    assert whole.fingerprint == "6defd26919a60549352142d3a8f8a47b3182cfef9dd71caaadaafd3bced60abd"


def test_grey_standin_has_three_images_to_one_and_published_fingerprint():
    grey = data.load("greystandin")
    assert grey.fingerprint == "3b158396e0c126a74f77d7a3a45a856188c31d0d08ba4f131e37a1d8db3c20ea"
    assert str(grey).startswith("STAND-IN DATA, generated, not PneumoniaMNIST: greystandin, 1,200 training")
    assert [np.mean(split.fine) for split in (grey.train, grey.validation, grey.test)] == [0.75] * 3
    assert grey.fine_names == grey.coarse_names == standin.GREY_NAMES


@pytest.fixture(scope="module")
def real():
    return data.load("cifar100") if cifar100.find() else pytest.skip("CIFAR-100 is not on this machine")


def test_cifar100_has_published_fingerprint_and_layout(real):
    assert real.fingerprint == "5558370ef38c443a3d029bac7e72ab8f0fe49c4f6d30343557f5b7be489bc5cf"
    for split, per_class in ((real.train, 450), (real.validation, 50), (real.test, 100)):
        assert split.images.shape == (100 * per_class, 32, 32, 3)
        assert np.bincount(split.fine).tolist() == [per_class] * 100
        assert np.bincount(split.coarse).tolist() == [5 * per_class] * 20
    assert not pixels(real.train) & pixels(real.validation)
    assert len(pixels(real.everything)) == 49_986  # CIFAR-100 has a few images twice


def test_cifar100_has_published_channel_statistics(real):
    """The means and standard deviations that are quoted everywhere for the 50,000 training images."""
    histograms = np.zeros((3, 256))
    for image in real.everything.images:
        histograms += [np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)]
    shares, values = histograms / histograms.sum(axis=1, keepdims=True), np.arange(256) / 255
    means = shares @ values
    np.testing.assert_allclose(means, [0.5071, 0.4865, 0.4409], atol=1e-3)
    np.testing.assert_allclose(np.sqrt(shares @ values**2 - means**2), [0.2673, 0.2564, 0.2762], atol=1e-3)


def test_cifar100_has_published_superclasses(real):
    splits = real.train, real.validation, real.test
    pairs = {pair for split in splits for pair in zip(split.fine, split.coarse, strict=True)}
    assert len(pairs) == 100  # each class is in one superclass
    members = {name: set() for name in real.coarse_names}
    for fine, coarse in pairs:
        members[real.coarse_names[coarse]].add(real.fine_names[fine])
    assert {len(classes) for classes in members.values()} == {5}
    assert members["trees"] == {"maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"}
    assert members["people"] == {"baby", "boy", "girl", "man", "woman"}
    assert real.fine_names[0] == "apple" and real.coarse_names[real.superclass_of[0]] == "fruit_and_vegetables"
