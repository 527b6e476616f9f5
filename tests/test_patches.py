"""Rows of patches and of outputs, and their moments: `fcnn_utils._patches`."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import _patches, layer_kinds


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def test_moments_of_several_blocks_with_a_drifting_mean(monkeypatch):
    monkeypatch.setattr(_patches, "_BUFFER_VALUES", 100)
    x = normal(300, 4) + np.linspace(0, 9, 300, dtype="float32")[:, None]
    moments = _patches.Moments("layer")
    for start in range(0, 300, 30):
        moments.add(x[start : start + 30], 2 * x[start : start + 30, :2])
    mean, covariance, mean_output, right = moments.normal_equations()
    assert np.allclose(mean, x.mean(0), atol=1e-4) and np.allclose(covariance, np.cov(x.T, bias=True), rtol=1e-4)
    assert np.allclose(mean_output, 2 * mean[:2], atol=1e-4) and np.allclose(right, 2 * covariance[:, :2], rtol=1e-4)


@pytest.mark.parametrize(
    "shape", [(9,), (10, 10), (14, 14), (15, 15), (23, 30), (30, 30), (45, 60), (56, 56), (7, 9, 11)]
)
def test_positions_are_as_many_as_asked_differ_and_are_of_all_columns_and_rows(shape):
    images, *position = _patches._positions((9, *shape), 100)
    count = min(np.prod(shape), 100)
    assert np.bincount(images).tolist() == [count] * 9
    assert len(set(zip(images, *position, strict=True))) == 9 * count
    for axis, size in zip(position, shape, strict=True):
        shares = np.bincount(axis, minlength=size) / len(axis)
        assert len(shares) == size and size * shares.min() > 0.2 and size * shares.max() < 2


def test_of_few_images_more_positions_are_read():
    assert [_patches.rows_per_image(count) for count in (1, 10, 200, 5000)] == [20_000, 2000, 100, 100]


def test_rows_of_a_transposed_layer_have_neither_bias_nor_activation():
    layer = layers.Conv2DTranspose(5, 3, strides=2, activation="relu", bias_initializer="ones")
    x = keras.ops.convert_to_tensor(normal(2, 4, 3, 3))
    layer(x)
    plain = layers.Conv2DTranspose(5, 3, strides=2, use_bias=False)
    plain.build(x.shape)
    plain.set_weights(layer.get_weights()[:1])
    expected = keras.ops.convert_to_numpy(plain(x)).reshape(-1, 5)
    assert np.allclose(_patches.linear_rows(layer_kinds.KernelLayer(layer), 100)(x), expected, atol=1e-5)
