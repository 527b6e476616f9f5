"""Images on their way into a training: `fcnn_utils.course.augmentation`, against slices and double precision."""

import numpy as np
import pytest

from fcnn_utils.course import augmentation, data
from fcnn_utils.course.recipes import RECIPES

PLAIN = RECIPES["fast"].replace(batch_size=8, flip=False, shift=0)
NO_SCALE = np.zeros(3, "float32"), np.ones(3, "float32")


def pictures(count=40, height=12, width=9, seed=0):
    """Random images, small: what is done to them depends on no size. No value is 0: that is the border's."""
    return np.random.default_rng(seed).integers(1, 256, (count, height, width, 3), dtype="uint8")


def split(count=40, classes=10, seed=0):
    fine = np.random.default_rng(seed + 1).integers(0, classes, count)
    return data.Split(pictures(count, seed=seed), fine, fine // 5)


def dataset(images):
    part = data.Split(images, np.zeros(len(images), int), np.zeros(len(images), int))
    return data._dataset("x", "x", True, (part, part, part), ["a"], ["b"])


def epoch(recipe=PLAIN, number=0, of=None, scale=NO_SCALE):
    """(images, labels) of all batches of an epoch."""
    images, labels = zip(*augmentation.batches(of or split(), recipe, number, scale, 10), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def place(image, of):
    """Where `image` is among the images of the split `of`."""
    return next(number for number, other in enumerate(of.images) if np.array_equal(image, other))


# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, batch, number", [(40, 8, 5), (39, 8, 4), (8, 8, 1), (7, 8, 0)])
def test_what_does_not_fill_a_batch_is_left_out(count, batch, number):
    found = list(augmentation.batches(split(count), PLAIN.replace(batch_size=batch), 0, NO_SCALE, 10))
    assert len(found) == number
    for images, labels in found:
        assert images.shape == (batch, 12, 9, 3) and labels.shape == (batch, 10)
        assert images.dtype == labels.dtype == np.float32


@pytest.mark.parametrize("flip, shift", [(True, 0), (False, 3), (True, 8)])
def test_augmentation_keeps_the_shape_and_the_originals(flip, shift):
    part = split()
    before = part.images.copy()
    images, _ = epoch(PLAIN.replace(flip=flip, shift=shift), of=part)
    assert images.shape == (40, 12, 9, 3) and images.dtype == np.float32
    np.testing.assert_array_equal(part.images, before)


# --- correct: order ----------------------------------------------------------------------------------------------


def test_each_image_comes_once_an_epoch_with_its_label():
    part = split()
    images, labels = epoch(of=part)
    places = [place(image, part) for image in images]
    assert sorted(places) == list(range(40)) and places != list(range(40))
    assert set(np.unique(labels)) == {0, 1}
    np.testing.assert_array_equal(labels.sum(axis=1), 1)
    np.testing.assert_array_equal(labels.argmax(axis=1), part.fine[places])


@pytest.mark.parametrize("recipe", [PLAIN, PLAIN.replace(flip=True, shift=2)], ids=["plain", "augmented"])
def test_batches_depend_on_seed_and_epoch_alone(recipe):
    np.random.seed(1)
    images, labels = epoch(recipe, 3)
    np.random.seed(2)
    again = epoch(recipe, 3)
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(labels, again[1])
    assert not np.array_equal(images, epoch(recipe, 4)[0])
    assert not np.array_equal(images, epoch(recipe.replace(seed=1), 3)[0])


def test_a_balanced_epoch_shows_every_class_equally_often():
    """Of 40 images, 4 of class 3 and 36 of class 7: 20 of each; each of the 4 five times, of the 36 twenty once."""
    labels = np.array([3] * 4 + [7] * 36)
    part = data.Split(pictures(40), labels, labels)
    images, shown = epoch(PLAIN.replace(balanced=True), of=part)
    counts = np.bincount([place(image, part) for image in images], minlength=40)
    assert counts[:4].tolist() == [5] * 4 and sorted(counts[4:]) == [0] * 16 + [1] * 20
    assert shown.argmax(axis=1).tolist() != sorted(shown.argmax(axis=1))
    np.testing.assert_array_equal(shown.sum(axis=0)[[3, 7]], 20)
    again, _ = epoch(PLAIN.replace(balanced=True), of=part)
    np.testing.assert_array_equal(images, again)


@pytest.mark.parametrize("count", [39, 41])
def test_a_balanced_epoch_is_as_long_as_any(count):
    part = split(count)
    order = augmentation._balanced(part.fine, np.random.default_rng(0))
    assert len(order) == count
    assert np.ptp(np.bincount(part.fine[order])[np.unique(part.fine)]) <= 1


def test_another_epoch_is_another_order():
    part = split()
    orders = {tuple(place(image, part) for image in epoch(number=number, of=part)[0]) for number in range(4)}
    assert len(orders) == 4


def test_the_part_left_out_changes():
    part = split(12)
    seen = {place(image, part) for number in range(20) for image in epoch(number=number, of=part)[0]}
    assert seen == set(range(12))


# --- correct: augmentation ---------------------------------------------------------------------------------------


def test_flipped_images_are_mirrored_and_they_are_half():
    originals = pictures(400).astype("float32")
    images = augmentation.augment(originals.copy(), PLAIN.replace(flip=True), np.random.default_rng(0))
    same = (images == originals).all(axis=(1, 2, 3))
    mirrored = (images == originals[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250  # 200 ± 10


def test_alternating_flips_show_each_image_both_ways_in_two_epochs():
    of = split(40)
    recipe = PLAIN.replace(flip="alternating")
    seen = np.zeros((3, 40), int)  # by epoch: -1 mirrored, 1 as it is
    for number in range(3):
        for image in epoch(recipe, number, of)[0]:
            ways = {1: image, -1: image[:, ::-1]}
            for way, original in ways.items():
                for place in np.flatnonzero((of.images == original).all(axis=(1, 2, 3))):
                    seen[number, place] = way
    assert (np.abs(seen) == 1).all() and (seen.sum(axis=1) == 0).all()
    assert (seen[0] == -seen[1]).all() and (seen[0] == seen[2]).all()
    other = np.array([epoch(recipe.replace(seed=1), 0, of)[0] for _ in range(2)])
    assert np.array_equal(*other) and not np.array_equal(other[0], epoch(recipe, 0, of)[0])


@pytest.mark.parametrize("shift", [1, 3, 8])
def test_a_shift_moves_as_slicing_does_and_fills_with_the_mean(shift):
    originals = pictures(600).astype("float32")
    images = augmentation.augment(originals.copy(), PLAIN.replace(shift=shift), np.random.default_rng(0))
    height, width = originals.shape[1:3]
    moves = []
    for image, original in zip(images, originals, strict=True):
        for dy, dx in np.ndindex(2 * shift + 1, 2 * shift + 1):
            dy, dx = dy - shift, dx - shift
            expected = np.zeros_like(original)
            expected[max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)] = original[
                max(0, -dy) : height + min(0, -dy), max(0, -dx) : width + min(0, -dx)
            ]
            if np.array_equal(image, expected):
                moves.append((dy, dx))
                break
    assert len(moves) == len(originals)
    for axis in zip(*moves, strict=True):
        assert set(axis) == set(range(-shift, shift + 1))  # every distance, both ways
    assert len(set(moves)) > 2 * shift + 1  # and the two axes on their own


def test_no_augmentation_is_none():
    originals = pictures().astype("float32")
    np.testing.assert_array_equal(augmentation.augment(originals.copy(), PLAIN, np.random.default_rng(0)), originals)


def test_the_border_is_the_mean_colour():
    part = split()
    scale = augmentation.channel_statistics(dataset(part.images))
    images, _ = epoch(PLAIN.replace(shift=8), of=part, scale=scale)
    restored = images * scale[1] + scale[0]
    border = (images == 0).all(axis=-1)
    assert border.mean() > 0.2
    np.testing.assert_allclose(restored[border], np.broadcast_to(scale[0], restored[border].shape))


# --- correct: scale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_channel_scale_is_mean_and_deviation(seed):
    rng = np.random.default_rng(seed)
    images = np.clip(rng.normal([40, 128, 220], [5, 30, 60], (500, 32, 32, 3)), 0, 255).astype("uint8")
    mean, deviation = augmentation.channel_statistics(dataset(images))
    assert mean.shape == deviation.shape == (3,) and mean.dtype == deviation.dtype == np.float32
    pixels = images.reshape(-1, 3).astype("float64")
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(deviation, pixels.std(axis=0), rtol=1e-6)


def test_the_scale_is_that_of_the_training_images():
    train, other = (data.Split(pictures(seed=seed), np.zeros(40, int), np.zeros(40, int)) for seed in (0, 1))
    scales = [
        augmentation.channel_statistics(data._dataset("x", "x", True, parts, ["a"], ["b"]))
        for parts in ((train, other, other), (train, train, train), (other, train, train))
    ]
    np.testing.assert_array_equal(scales[0], scales[1])
    assert not np.array_equal(scales[0], scales[2])


@pytest.mark.parametrize("value", [0, 255])
def test_images_of_one_colour_are_scaled_to_zero(value):
    images = np.full((64, 32, 32, 3), value, "uint8")
    scale = augmentation.channel_statistics(dataset(images))
    normalised = augmentation.normalize(images, scale)
    assert np.isfinite(normalised).all() and np.abs(normalised).max() < 1e-3


def test_normalised_images_have_mean_0_and_deviation_1():
    images = pictures(500, 32, 32)
    normalised = augmentation.normalize(images, augmentation.channel_statistics(dataset(images)))
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised.mean(axis=(0, 1, 2), dtype="float64"), 0, atol=1e-4)
    np.testing.assert_allclose(normalised.std(axis=(0, 1, 2), dtype="float64"), 1, atol=1e-4)


def test_normalising_subtracts_and_divides_by_channel():
    images = np.array([[[[0, 100, 255]]]], "uint8")
    scale = np.array([10, 100, 5], "float32"), np.array([2, 4, 50], "float32")
    np.testing.assert_allclose(augmentation.normalize(images, scale), [[[[-5, 0, 5]]]])
