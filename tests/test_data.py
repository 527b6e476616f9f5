"""Images: `fcnn_utils.course.data`."""

import numpy as np
import pytest

from fcnn_utils.course import data
from fcnn_utils.course.data import cifar100, standin
from fcnn_utils.course.data.download import Unavailable


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
    with pytest.raises(ValueError, match=f"must be one of {', '.join(data.NAMES)}; got {name!r}"):
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
def test_load_refuses_numbers_of_images_that_are_not_there(images):
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


# --- correct: the real data --------------------------------------------------------------------------------------


def real_is_here():
    try:
        return cifar100.find() is not None
    except Unavailable:
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


def test_samples_are_drawn_by_seed():
    split = data.load("standin").train
    one, other, again = split.sample(50, 1), split.sample(50, 2), split.sample(50, 1)
    assert np.array_equal(one.images, again.images) and not np.array_equal(one.images, other.images)
    assert len(np.unique(one.images.reshape(50, -1), axis=0)) == 50  # none twice
    rows = {image.tobytes(): label for image, label in zip(split.images, split.fine, strict=True)}
    assert all(rows[image.tobytes()] == label for image, label in zip(one.images, one.fine, strict=True))
    for count, seed in ((0, 0), (len(split) + 1, 0), (5, -1)):
        with pytest.raises(ValueError, match="(number of images|seed) must be a whole number"):
            split.sample(count, seed)
