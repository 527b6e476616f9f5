"""Input pipeline: `fcnn_utils.course.augmentation`, compared with slices and double precision."""

import hashlib
import types

import numpy as np
import pytest

from fcnn_utils.course import augmentation, data
from fcnn_utils.course.recipes import RECIPES

PLAIN = RECIPES["fast"].replace(batch_size=8, flip=False, shift=0)
NO_SCALE = np.zeros(3, "float32"), np.ones(3, "float32")


def pictures(count=40, height=12, width=9, seed=0):
    """Random images. No value is 0, the value of the border."""
    return np.random.default_rng(seed).integers(1, 256, (count, height, width, 3), dtype="uint8")


def split(count=40, seed=0, fine=None):
    fine = np.random.default_rng(seed + 1).integers(0, 10, count) if fine is None else fine
    return data.Split(pictures(count, seed=seed), fine, fine // 5)


def epoch(recipe=PLAIN, number=0, of=None, scale=NO_SCALE):
    """(images, labels) of all batches of an epoch."""
    images, labels = zip(*augmentation.batches(of or split(), recipe, number, scale, 10), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def places(images, of):
    """(N,) number of each image in the split `of`."""
    return [next(number for number, other in enumerate(of.images) if np.array_equal(image, other)) for image in images]


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, number", [(40, 5), (39, 4), (8, 1), (7, 0)])
def test_last_incomplete_batch_is_dropped(count, number):
    found = list(augmentation.batches(split(count), PLAIN, 0, NO_SCALE, 10))
    assert len(found) == number
    for images, labels in found:
        assert images.shape == (8, 12, 9, 3) and labels.shape == (8, 10)
        assert images.dtype == labels.dtype == np.float32


def test_each_image_comes_once_per_epoch_with_its_label():
    part = split()
    images, labels = epoch(of=part)
    order = places(images, part)
    assert sorted(order) == list(range(40)) and order != list(range(40))
    np.testing.assert_array_equal(labels, np.eye(10)[part.fine[order]])


def test_order_and_dropped_images_change_with_the_epoch():
    part = split(12)
    orders = [tuple(places(epoch(number=number, of=part)[0], part)) for number in range(20)]
    assert len(set(orders)) == 20 and set().union(*orders) == set(range(12))


@pytest.mark.parametrize("recipe", [PLAIN, PLAIN.replace(flip=True, shift=2)], ids=["plain", "augmented"])
def test_batches_depend_on_seed_and_epoch_alone(recipe):
    part = split()
    before = part.images.copy()
    np.random.seed(1)
    images, labels = epoch(recipe, 3, part)
    np.random.seed(2)
    again = epoch(recipe, 3, part)
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(labels, again[1])
    assert not np.array_equal(images, epoch(recipe, 4)[0])
    assert not np.array_equal(images, epoch(recipe.replace(seed=1), 3)[0])
    np.testing.assert_array_equal(part.images, before)  # the originals are not augmented in place


@pytest.mark.parametrize(
    "recipe, expected",
    [
        (PLAIN.replace(flip=True, shift=2), "3d37babf3fda54c9"),
        (PLAIN.replace(flip="alternating", shift=2), "2c36c65ec8983e5e"),
        (PLAIN.replace(flip=True, balanced=True), "2980d988c98b3fb5"),
    ],
)
def test_batches_have_the_bytes_of_the_published_runs(recipe, expected):
    """Published records were trained on these batches; other ones would not reproduce them."""
    images, labels = epoch(recipe, 1, scale=(np.full(3, 128, "float32"), np.full(3, 64, "float32")))
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16] == expected


@pytest.mark.parametrize("rare", [4, 1])
def test_balanced_epoch_shows_every_class_equally_often(rare):
    """20 of 40 images for each class; every image of a class as often as the others, up to one."""
    part = split(fine=np.array([3] * rare + [7] * (40 - rare)))
    images, shown = epoch(PLAIN.replace(balanced=True), of=part)
    counts = np.bincount(places(images, part), minlength=40)
    assert counts[:rare].tolist() == [20 // rare] * rare
    assert sorted(counts[rare:]) == [0] * (20 - rare) + [1] * 20
    assert shown.argmax(axis=1).tolist() != sorted(shown.argmax(axis=1))  # the classes are mixed
    np.testing.assert_array_equal(shown.sum(axis=0)[[3, 7]], 20)
    np.testing.assert_array_equal(images, epoch(PLAIN.replace(balanced=True), of=part)[0])


@pytest.mark.parametrize("count", [39, 41])
def test_balanced_epoch_has_the_usual_length(count):
    part = split(count)
    _, labels = epoch(PLAIN.replace(balanced=True, batch_size=count), of=part)
    assert len(labels) == count and np.ptp(labels.sum(axis=0)[np.unique(part.fine)]) <= 1


# --- augmentation ------------------------------------------------------------------------------------------------


def test_flip_mirrors_half_of_the_images_or_none():
    originals = pictures(400).astype("float32")
    np.testing.assert_array_equal(augmentation.augment(originals.copy(), PLAIN, np.random.default_rng(0)), originals)
    images = augmentation.augment(originals.copy(), PLAIN.replace(flip=True), np.random.default_rng(0))
    same = (images == originals).all(axis=(1, 2, 3))
    mirrored = (images == originals[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250  # 200 ± 10


def test_alternating_flip_shows_each_image_both_ways_in_two_epochs():
    part, recipe = split(40), PLAIN.replace(flip="alternating")
    both = np.concatenate([part.images, part.images[:, :, ::-1]]).astype("float32")
    mirrored = np.zeros((3, 40), bool)
    for number in range(3):
        found = places(epoch(recipe, number, part)[0], types.SimpleNamespace(images=both))
        assert sorted(place % 40 for place in found) == list(range(40))
        mirrored[number, [place - 40 for place in found if place >= 40]] = True
    assert mirrored.sum(axis=1).tolist() == [20] * 3
    assert (mirrored[0] != mirrored[1]).all() and (mirrored[0] == mirrored[2]).all()
    assert not np.array_equal(epoch(recipe, 0, part)[0], epoch(recipe.replace(seed=1), 0, part)[0])


@pytest.mark.parametrize("shift", [1, 3, 8])
def test_shift_moves_as_slicing_does_and_fills_with_zero(shift):
    originals = pictures(600).astype("float32")
    images = augmentation.augment(originals.copy(), PLAIN.replace(shift=shift), np.random.default_rng(0))
    assert images.shape == originals.shape and images.dtype == np.float32
    height, width = originals.shape[1:3]
    moves, found = set(), np.zeros(600, bool)
    for dy, dx in np.ndindex(2 * shift + 1, 2 * shift + 1):
        dy, dx = dy - shift, dx - shift
        expected = np.zeros_like(originals)
        expected[:, max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)] = originals[
            :, max(0, -dy) : height + min(0, -dy), max(0, -dx) : width + min(0, -dx)
        ]
        matches = (images == expected).all(axis=(1, 2, 3))
        found |= matches
        moves |= {(dy, dx)} if matches.any() else set()
    assert found.all()
    for axis in zip(*moves, strict=True):
        assert set(axis) == set(range(-shift, shift + 1))  # every distance, in both directions
    assert len(moves) > 2 * shift + 1  # and the two axes are drawn independently


# --- normalisation -----------------------------------------------------------------------------------------------


def test_border_of_a_shift_is_the_mean_colour():
    part = split()
    scale = augmentation.channel_statistics(part)
    images, _ = epoch(PLAIN.replace(shift=8), of=part, scale=scale)
    restored = images * scale[1] + scale[0]
    border = (images == 0).all(axis=-1)
    assert border.mean() > 0.2
    np.testing.assert_allclose(restored[border], np.broadcast_to(scale[0], restored[border].shape))


def test_channel_statistics_are_mean_and_deviation_of_the_training_images():
    rng = np.random.default_rng(0)
    images = np.clip(rng.normal([40, 128, 220], [5, 30, 60], (1500, 8, 8, 3)), 0, 255).astype("uint8")
    train, other = data.Split(images, *[np.zeros(1500, int)] * 2), split()
    mean, deviation = augmentation.channel_statistics(data.Dataset("x", "x", train, other, other, ("a",), ("b",)))
    assert mean.shape == deviation.shape == (3,) and mean.dtype == deviation.dtype == np.float32
    pixels = images.reshape(-1, 3).astype("float64")
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(deviation, pixels.std(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(augmentation.channel_statistics(train), (mean, deviation))
    normalised = augmentation.normalize(images, (mean, deviation))
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised.mean(axis=(0, 1, 2), dtype="float64"), 0, atol=1e-4)
    np.testing.assert_allclose(normalised.std(axis=(0, 1, 2), dtype="float64"), 1, atol=1e-4)


@pytest.mark.parametrize("value", [0, 255])
def test_images_of_one_colour_are_normalised_to_zero(value):
    part = data.Split(np.full((64, 32, 32, 3), value, "uint8"), *[np.zeros(64, int)] * 2)
    normalised = augmentation.normalize(part.images, augmentation.channel_statistics(part))
    assert np.isfinite(normalised).all() and np.abs(normalised).max() < 1e-3
