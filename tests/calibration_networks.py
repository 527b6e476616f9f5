"""Small networks and images for the tests of calibration and sensitivity."""

import itertools

import keras
import numpy as np
from keras import layers

from fcnn_utils import calibration, keras_graph


def network(activation="relu", use_bias=True, nested=False):
    """Two convolutions with batch norms and random weights; the second can be in a nested model, `inner`."""

    def block(x, number):
        x = layers.Conv2D(8, 3, padding="same", use_bias=use_bias, name=f"conv{number}")(x)
        return layers.Activation(activation)(layers.BatchNormalization(name=f"bn{number}")(x))

    inputs = keras.Input((10, 9, 6))
    x = block(inputs, 1)
    if nested:
        inner_in = keras.Input(x.shape[1:])
        x = keras.Model(inner_in, block(inner_in, 2), name="inner")(x)
    else:
        x = block(x, 2)
    x = layers.Dense(5, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    model = with_random_weights(keras.Model(inputs, x))
    calibration.reestimate(model, pictures())  # statistics that training on such images would have left
    return model


def with_random_weights(model):
    rng = np.random.default_rng(0)
    for weight in model.trainable_variables:
        scale = 0.1 if "kernel" in weight.path else 0.3
        weight.assign(rng.normal(1.0 if "gamma" in weight.path else 0.0, scale, weight.shape))
    return model


def pictures(count=64, seed=1):
    """Make smooth images: neighbouring pixels and channels resemble each other."""
    noise = np.random.default_rng(seed).standard_normal((count, 12, 11, 6))
    smooth = sum(noise[:, i : i + 10, j : j + 9] for i, j in itertools.product(range(3), range(3)))
    return (smooth + 2 * smooth.mean(axis=-1, keepdims=True)).astype("float32")


def convolutions(model):
    return [node for node in keras_graph.layer_nodes(model) if isinstance(node.layer, layers.Conv2D)]


def numpy_outputs(model, images):
    return keras.ops.convert_to_numpy(model(images, training=False))


def reads(model, name, images):
    return numpy_outputs(keras.Model(model.input, model.get_layer(name).input), images)


def makes(model, name, images):
    return numpy_outputs(keras.Model(model.input, model.get_layer(name).output), images)


def patches(x):
    """Return what a 3×3 kernel with `same` padding reads, (N h w, 9 S)."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))  # (N, h, w, S, 3, 3)
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[-1]).astype(float)


def least_squares_fit(features, target):
    return features @ np.linalg.lstsq(features, target, rcond=None)[0]
