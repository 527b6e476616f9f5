"""Tests of `fcnn_utils.course.data.standin`: bytes, statistics, and what networks learn."""

import numpy as np
import pytest

from fcnn_utils.course import data
from fcnn_utils.course.data import standin


@pytest.mark.parametrize("per_class, test_per_class", [(1, 1), (3, 2)])
def test_generate_returns_requested_counts(per_class, test_per_class):
    splits = standin.generate(per_class, test_per_class)
    for (images, fine, coarse), count in zip(splits, (per_class, test_per_class), strict=True):
        assert images.shape == (100 * count, 32, 32, 3) and images.dtype == np.uint8
        assert np.bincount(fine).tolist() == [count] * 100
        for label, parent in zip(fine, coarse, strict=True):  # "texture 7b" is in "texture 7"
            assert standin.FINE_NAMES[label] == standin.COARSE_NAMES[parent] + "abcde"[label % 5]
    assert (standin.COARSE_NAMES[0], standin.COARSE_NAMES[19]) == ("texture 1", "texture 20")


@pytest.mark.parametrize("counts", [((3, 5), (1, 0), (2, 2)), ((0, 4),)])
def test_grey_returns_requested_counts(counts):
    for (images, labels), each in zip(standin.grey(counts), counts, strict=True):
        assert images.shape == (sum(each), 28, 28, 1) and images.dtype == np.uint8
        assert tuple(np.bincount(labels, minlength=2)) == each


def test_images_do_not_depend_on_global_seed():
    np.random.seed(1)
    first = standin.generate(1, 1)
    np.random.seed(2)
    second = standin.generate(1, 1)
    np.testing.assert_array_equal(first[0][0], second[0][0])
    np.testing.assert_array_equal(first[1][0], second[1][0])
    assert not np.array_equal(first[0][0], first[1][0])  # training and test images differ


def test_pixel_means_of_a_class_are_nearly_constant():
    """The mean image of a class is noise around the tint: positions and signs are random."""
    (images, fine, coarse), _ = standin.generate(50, 1)
    tints = np.stack([images[coarse == label].mean(axis=(0, 1, 2)) for label in range(20)])
    assert 4 < np.ptp(tints, axis=0).min() <= np.ptp(tints, axis=0).max() < 30  # present, and faint
    means = np.stack([images[fine == label].mean(axis=0) for label in range(100)])
    residual = (means - tints[np.arange(100) // 5, None, None]).std()
    assert residual < 2 * images.astype("float32").std() / np.sqrt(50)  # fixed positions would give 5 times as much


def test_grey_pixel_means_do_not_depend_on_the_class():
    """Spots have random positions and signs, so both classes have the same mean image, up to noise."""
    ((images, labels),) = standin.grey(((2000, 2000),))
    few, many = (images[labels == label, ..., 0].astype(float) for label in (0, 1))
    error = np.sqrt(few.var(axis=0) / len(few) + many.var(axis=0) / len(many))
    assert (np.abs(few.mean(axis=0) - many.mean(axis=0)) / error).max() < 5


# The bytes of the stand-ins are fixed (tests/course/test_data.py), so what networks learn from them changes rarely.


def accuracy(dataset, filters, rate, epochs):
    """Test accuracy in percent of a network with one strided convolution per entry of `filters`."""
    import keras  # here, because the other tests of this file need no Keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    body = [layers.Flatten()] if not filters else []
    for count in filters:
        body += [layers.Conv2D(count, 3, strides=2, padding="same"), layers.BatchNormalization(), layers.ReLU()]
    body += [layers.GlobalAveragePooling2D()] if filters else []
    outputs = layers.Dense(len(dataset.fine_names), activation="softmax")
    scale = layers.Rescaling(1 / 64, offset=-2)
    model = keras.Sequential([keras.Input(dataset.train.images.shape[1:]), scale, *body, outputs])
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * (len(dataset.train) // 50))
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(dataset.train.images, dataset.train.fine, batch_size=50, epochs=epochs, verbose=0)
    # Few steps leave the running statistics behind the weights, so evaluate with those of the training images.
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    model(dataset.train.images, training=True)
    return 100 * model.evaluate(dataset.test.images, dataset.test.fine, verbose=0)[1]


@pytest.mark.full
def test_better_networks_learn_the_standin_better():
    dataset = data.load("standin", 2000, 500)
    linear, small, larger = (
        accuracy(dataset, filters, rate, epochs=5) for filters, rate in (((), 0.01), ((12, 24), 0.2), ((32, 64), 0.2))
    )
    assert linear > 3  # chance: 1%. Seed 0: 8%, 65% and 83%; 500 test images leave about 2 points of uncertainty
    assert small > linear + 10
    assert larger > small + 8


@pytest.mark.full
def test_better_networks_learn_the_grey_standin_better():
    dataset = data.load("greystandin")
    small, larger = (accuracy(dataset, filters, 0.05, epochs=6) for filters in ((4, 8), (16, 32, 64)))
    assert larger > max(82, small + 5)  # the more frequent class: 75%. Seed 0: 75% and 91%
