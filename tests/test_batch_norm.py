"""Batch normalisations folded into the layers before them: `fcnn_utils.batch_norm`."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import batch_norm, keras_graph


def randomize(model, seed=0):
    """Give a model positive weights of a size that keeps its outputs finite."""
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.1, 0.5, weight.shape) for weight in model.get_weights()])
    return model


def outputs(model):
    images = np.random.default_rng(0).standard_normal((2, *model.inputs[0].shape[1:])).astype("float32")
    return keras.ops.convert_to_numpy(model(images, training=False))


def assert_close(model, other, tolerance=1e-4):
    expected, found = outputs(model), outputs(other)
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def normalised():
    """A normalisation after every kind of layer that takes one, and some that cannot be folded."""
    x = inputs = keras.Input((9, 9, 4))
    x = layers.Conv2D(6, 3, use_bias=False, name="conv")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="bn1")(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depth")(x)
    x = layers.BatchNormalization(scale=False, name="bn2")(x)
    x = layers.BatchNormalization(center=False, name="bn3")(layers.SeparableConv2D(8, 3, name="separable")(x))
    x = layers.Conv2D(8, 1, activation="relu", name="active")(x)
    x = layers.BatchNormalization(name="kept1")(x)  # after an activation
    y = layers.Conv2D(8, 1, name="branching")(x)
    x = layers.Add()([layers.BatchNormalization(name="kept2")(y), y])  # two layers read the convolution
    x = layers.BatchNormalization(name="bn4")(layers.Dense(5, name="dense")(layers.Flatten()(x)))
    return randomize(keras.Model(inputs, x))


def norms(model):
    nodes = keras_graph.layer_nodes(model)
    return [node.path for node in nodes if isinstance(node.layer, layers.BatchNormalization)]


def test_batch_norms_are_folded_where_that_is_exact():
    model = normalised()
    folded = batch_norm.fold_batch_norm(model)
    assert norms(folded) == ["kept1", "kept2"]
    assert_close(model, folded)
    assert folded.get_layer("conv").use_bias and not model.get_layer("conv").use_bias


def test_batch_norms_of_nesteds_and_of_one_dimension_are_folded():
    inner = [layers.Conv1D(4, 3, name="conv"), layers.BatchNormalization(), layers.ReLU()]
    inner = keras.Sequential([keras.Input((9, 3)), *inner], name="inner")
    x = inputs = keras.Input((9, 3))
    x = layers.BatchNormalization()(layers.Dense(4)(inner(x)))
    model = randomize(keras.Model(inputs, x))
    folded = batch_norm.fold_batch_norm(model)
    assert len(norms(model)) == 2 and norms(folded) == []
    assert_close(model, folded)


def test_a_batch_norm_that_normalises_by_the_batch_stays():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    model = randomize(keras.Model(inputs, layers.BatchNormalization(name="norm")(x, training=True)))
    folded = batch_norm.fold_batch_norm(model)
    assert norms(folded) == ["norm"]
    assert_close(model, folded, 1e-5)


def test_folding_can_change_the_precision():
    model = keras_graph.rebuild(normalised(), {}, dtype="mixed_bfloat16")
    folded = batch_norm.fold_batch_norm(model, dtype="float32")
    assert {node.layer.dtype_policy.name for node in keras_graph.layer_nodes(folded)} == {"float32"}
    assert_close(normalised(), folded)


class StandardizedConv(layers.Conv2D):
    """A convolution that standardizes its weights."""

    def convolution_op(self, inputs, kernel):
        mean, variance = keras.ops.moments(kernel, axes=(0, 1, 2), keepdims=True)
        return super().convolution_op(inputs, (kernel - mean) / keras.ops.sqrt(variance + 1e-5))


class ActiveConv(layers.Conv2D):
    """A convolution with a ReLU inside."""

    def call(self, inputs):
        return keras.ops.relu(super().call(inputs))


class ShiftedNorm(layers.BatchNormalization):
    """A normalisation that computes something else."""

    def call(self, inputs, training=None):
        return super().call(inputs, training=training) + keras.ops.sin(inputs)


@pytest.mark.parametrize(
    ("conv", "norm"),
    [
        (StandardizedConv, layers.BatchNormalization),
        (ActiveConv, layers.BatchNormalization),
        (layers.Conv2D, ShiftedNorm),
    ],
)
def test_subclasses_are_left_and_reported(conv, norm):
    inputs = keras.Input((6, 6, 3))
    model = randomize(keras.Model(inputs, norm(name="norm")(conv(4, 3, name="conv")(inputs))))
    folded, report = batch_norm.fold_batch_norm(model, report=True)
    assert norms(folded) == ["norm"]
    np.testing.assert_array_equal(outputs(folded), outputs(model))
    assert report["reason"].tolist()[0] and report["folded_into"].tolist() == [""]


def test_quantized_layers_are_left():
    inputs = keras.Input((20,))
    x = layers.BatchNormalization(name="norm")(layers.Dense(16, name="dense")(inputs))
    model = randomize(keras.Model(inputs, x))
    model.quantize("int8")
    folded, report = batch_norm.fold_batch_norm(model, report=True)
    np.testing.assert_array_equal(outputs(folded), outputs(model))
    assert report["reason"].tolist() == ["dense is quantized"]
    with pytest.raises(ValueError, match="layer 'dense' is quantized"):
        batch_norm.fold_batch_norm(model, dtype="float32")


def test_batch_norms_of_a_nested_model_called_with_training_stay():
    inner = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(name="norm")])
    inner.name = "inner"
    inputs = keras.Input((6, 6, 3))
    model = randomize(keras.Model(inputs, inner(inputs, training=True)))
    folded, report = batch_norm.fold_batch_norm(model, report=True)
    assert norms(folded) == ["inner/norm"]
    np.testing.assert_allclose(outputs(folded), outputs(model), rtol=1e-5, atol=1e-6)
    assert report["reason"].tolist() == ["it is called with training=True"]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_batch_norms_fold_into_transposed_convolutions(dimensions):
    inputs = keras.Input((*[5] * dimensions, 3))
    conv = getattr(layers, f"Conv{dimensions}DTranspose")(4, 3, strides=2, use_bias=False)
    model = randomize(keras.Model(inputs, layers.BatchNormalization()(conv(inputs))))
    folded = batch_norm.fold_batch_norm(model)
    assert norms(folded) == []
    assert_close(model, folded, 1e-5)


def test_batch_norms_in_a_row_fold_one_after_another():
    inputs = keras.Input((8, 3))
    x = layers.DepthwiseConv1D(3, depth_multiplier=2, name="conv")(inputs)
    x = layers.BatchNormalization(name="second")(layers.BatchNormalization(name="first")(x))
    model = randomize(keras.Model(inputs, x))
    folded, report = batch_norm.fold_batch_norm(model, report=True)
    assert norms(folded) == [] and report["folded_into"].tolist() == ["conv", "conv"]
    assert_close(model, folded, 1e-5)
