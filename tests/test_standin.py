"""The generated images: `fcnn_utils.course.data.standin`. That they can be learnt, and the better the better the network."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils.course import data, training
from fcnn_utils.course.data import standin
from fcnn_utils.course.recipes import RECIPES

# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class, test_per_class", [(1, 1), (3, 2)])
def test_as_many_images_as_asked_for(per_class, test_per_class):
    splits = standin.generate(per_class, test_per_class)
    for (images, fine, coarse), count in zip(splits, (per_class, test_per_class), strict=True):
        assert images.shape == (100 * count, 32, 32, 3) and images.dtype == np.uint8
        assert np.bincount(fine).tolist() == [count] * 100
        assert np.bincount(coarse).tolist() == [5 * count] * 20


def test_a_class_is_named_after_its_superclass():
    assert (standin.COARSE_NAMES[0], standin.COARSE_NAMES[19]) == ("texture 1", "texture 20")
    _, fine, coarse = standin.generate(1, 1)[0]
    for label, parent in zip(fine, coarse, strict=True):
        assert standin.FINE_NAMES[label] == standin.COARSE_NAMES[parent] + "abcde"[label % 5]


@pytest.mark.parametrize("counts", [((3, 5), (1, 0), (2, 2)), ((0, 4),)])
def test_as_many_grey_images_as_asked_for(counts):
    for (images, labels), each in zip(standin.grey(counts), counts, strict=True):
        assert images.shape == (sum(each), 28, 28, 1) and images.dtype == np.uint8
        assert tuple(np.bincount(labels, minlength=2)) == each


# --- correct -----------------------------------------------------------------------------------------------------


def test_images_do_not_depend_on_the_global_generator():
    np.random.seed(1)
    first = standin.generate(1, 1)
    np.random.seed(2)
    second = standin.generate(1, 1)
    np.testing.assert_array_equal(first[0][0], second[0][0])
    np.testing.assert_array_equal(first[1][0], second[1][0])
    assert not np.array_equal(first[0][0], first[1][0])  # the test images are others


def test_blocks_are_the_bits_of_a_code():
    expected = np.zeros((6, 6), int)
    expected[0:2, 4:6] = expected[4:6, 0:2] = expected[4:6, 4:6] = 1  # 001 000 101, each cell 2 × 2
    np.testing.assert_array_equal(standin._blocks([0b001000101], 2)[0], expected)


def test_a_pixel_alone_tells_little():
    """A mean over 50 images leaves of a class little more than noise: its patterns lie anywhere, dark or bright."""
    (images, fine, coarse), _ = standin.generate(50, 1)
    tints = np.stack([images[coarse == label].mean(axis=(0, 1, 2)) for label in range(20)])
    assert 4 < np.ptp(tints, axis=0).min() <= np.ptp(tints, axis=0).max() < 30  # there, and faint
    means = np.stack([images[fine == label].mean(axis=0) for label in range(100)])
    left = (means - tints[np.arange(100) // 5, None, None]).std()
    assert left < 2 * images.astype("float32").std() / np.sqrt(50)  # patterns in one place would leave 5 times that


def network(name):
    """A network by name; small, as the order of the three shows at small sizes too."""
    body = {
        "linear": [layers.Flatten()],
        "small": [*convolution(12), *convolution(24), layers.GlobalAveragePooling2D()],
        "bigger": [*convolution(32), *convolution(64), layers.GlobalAveragePooling2D()],
    }[name]
    return keras.Sequential([keras.Input((32, 32, 3)), *body, layers.Dense(100, activation="softmax")], name=name)


def convolution(filters):
    return [layers.Conv2D(filters, 3, strides=2, padding="same"), layers.BatchNormalization(), layers.ReLU()]


def test_networks_rank_as_they_should():
    """Test accuracy of a linear classifier < of a small network < of a bigger one, and all above chance (1 %).

    With 2,000 images and 5 epochs, for the sake of time, they were 8–12 %, 34–39 % and 72–80 % over seeds and
    backends; 500 test images leave an uncertainty of about 2 points.
    """
    dataset = data.load("standin", 2000, 500)
    recipe = RECIPES["fast"].replace(epochs=5, batch_size=50, precision="float32")
    top1 = {}
    for name, rate in (("linear", 0.01), ("small", 0.2), ("bigger", 0.2)):
        keras.utils.set_random_seed(0)
        record = training.train(network(name), dataset, recipe.replace(learning_rate=rate), seed=0)
        top1[name] = 100 * record["test"]["top1"]
    assert top1["linear"] > 3
    assert top1["small"] > top1["linear"] + 10
    assert top1["bigger"] > top1["small"] + 15


def test_the_grey_ones_are_three_to_one():
    dataset = data.load("greystandin")
    assert dataset.describe().startswith("STAND-IN DATA, generated, not PneumoniaMNIST: greystandin, 1,200 training")
    assert [np.mean(split.fine) for split in (dataset.train, dataset.validation, dataset.test)] == [0.75] * 3
    assert dataset.fine_names == dataset.coarse_names == standin.GREY_NAMES


def test_a_grey_pixel_alone_tells_nothing():
    """Spots lie anywhere, bright or dark: the two classes have the same mean image, within its noise."""
    ((images, labels),) = standin.grey(((2000, 2000),))
    few, many = (images[labels == label, ..., 0].astype(float) for label in (0, 1))
    error = np.sqrt(few.var(axis=0) / len(few) + many.var(axis=0) / len(many))
    assert (np.abs(few.mean(axis=0) - many.mean(axis=0)) / error).max() < 5


def test_grey_networks_rank_as_they_should():
    """Always the commoner class: 75%. Six epochs: two small layers 75.0%, three larger ones 90.5% (seed 0)."""
    recipe, top1 = RECIPES["fast"].replace(epochs=6, batch_size=32, precision="float32", learning_rate=0.05), {}
    for filters in ((4, 8), (16, 32, 64)):
        keras.utils.set_random_seed(0)
        body = [layer for count in filters for layer in convolution(count)]
        model = keras.Sequential([keras.Input((28, 28, 1)), *body, layers.GlobalAveragePooling2D()], name="grey")
        model.add(layers.Dense(2, activation="softmax"))
        top1[filters] = training.train(model, data.load("greystandin"), recipe, 0, retrain=True)["test"]["top1"]
    assert top1[16, 32, 64] > max(0.82, top1[4, 8] + 0.05)
