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
    x = layers.BatchNormalization(name="bn5")(x)  # after an activation, in front of a 1×1 layer
    y = layers.Conv2D(8, 1, name="branching")(x)
    x = layers.Add()([layers.BatchNormalization(name="kept")(y), y])  # two layers read the convolution
    x = layers.BatchNormalization(name="bn4")(layers.Dense(5, name="dense")(layers.Flatten()(x)))
    return randomize(keras.Model(inputs, x))


def norms(model):
    nodes = keras_graph.layer_nodes(model)
    return [node.path for node in nodes if isinstance(node.layer, layers.BatchNormalization)]


def test_batch_norms_are_folded_where_that_is_exact():
    model = normalised()
    folded = batch_norm.fold_batch_norm(model)
    assert norms(folded) == ["kept"]
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


# --- into the layer behind -------------------------------------------------------------------------------------------


def in_front_of(layer, shape, shift=True, seed=0):
    """A model of a batch norm and a layer behind it, with weights of both signs."""
    norm = layers.BatchNormalization(center=shift, name="norm")
    model = keras.Sequential([keras.Input(shape), norm, layer])
    rng = np.random.default_rng(seed)
    for part in model.layers:
        part.set_weights([rng.normal(0, 0.5, weight.shape) for weight in part.weights])
    norm.moving_variance.assign(rng.uniform(0.5, 2, shape[-1]))
    norm.gamma.assign(rng.uniform(0.5, 2, shape[-1]))
    if not shift:
        norm.moving_mean.assign(np.zeros(shape[-1]))
    return model


def check_forward(model, is_folded):
    folded, report = batch_norm.fold_batch_norm(model, report=True)
    assert norms(folded) == ([] if is_folded else ["norm"])
    assert report["folded_into"].tolist() == [model.layers[1].name if is_folded else ""]
    assert ("would have to shift each place by itself" in report["reason"][0]) == (not is_folded)
    assert_close(model, folded, 1e-5)
    return folded


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("kernel_size, strides", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (2, 3)])
def test_batch_norms_fold_into_convolutions_behind_that_add_no_zeros(kernel_size, strides, padding, size):
    conv = layers.Conv1D(5, kernel_size, strides=strides, padding=padding, activation="tanh", name="conv")
    steps = -(-size // strides)
    adds_zeros = padding == "same" and (steps - 1) * strides + kernel_size > size
    check_forward(in_front_of(conv, (size, 4)), not adds_zeros)
    conv = layers.Conv1D(5, kernel_size, strides=strides, padding=padding, use_bias=False, name="conv")
    check_forward(in_front_of(conv, (size, 4), shift=False), True)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("kernel_size, strides", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (2, 3)])
def test_batch_norms_fold_into_transposed_convolutions_behind_where_the_shift_is_even(kernel_size, strides, padding):
    for output_padding in (None, 0, 1) if kernel_size > strides > 1 else (None,):
        options = {"strides": strides, "padding": padding, "output_padding": output_padding, "name": "conv"}
        model = in_front_of(layers.Conv1DTranspose(5, kernel_size, **options), (6, 4))
        check_forward(model, kernel_size == strides == 1)
        check_forward(in_front_of(layers.Conv1DTranspose(5, kernel_size, **options), (6, 4), shift=False), True)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (layers.Dense(5, activation="relu"), (4,)),
        (layers.Dense(5), (6, 4)),
        (layers.Conv2D(6, 3, groups=2), (7, 6, 4)),
        (layers.Conv2D(6, 3, dilation_rate=2, use_bias=False), (7, 6, 4)),
        (layers.Conv3D(5, 2), (4, 3, 4, 4)),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (7, 6, 4)),
        (layers.SeparableConv2D(5, 3, depth_multiplier=2), (7, 6, 4)),
        (layers.Conv2DTranspose(5, 1), (4, 3, 4)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_batch_norms_fold_into_every_kind_of_layer_behind(layer, shape):
    check_forward(in_front_of(layer, shape), True)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (layers.Conv1D(5, 3, padding="causal"), (7, 4)),
        (layers.Conv2D(5, (1, 3), padding="same"), (7, 6, 4)),
        (layers.Conv2D(5, 3, padding="same", dilation_rate=2), (7, 6, 4)),
        (layers.Conv2DTranspose(5, (1, 2)), (4, 3, 4)),
        (layers.Conv3DTranspose(5, 2, strides=2), (3, 2, 2, 4)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_batch_norms_fold_into_layers_behind_with_borders_only_without_a_shift(layer, shape):
    check_forward(in_front_of(layer, shape), False)
    check_forward(in_front_of(layer.from_config(layer.get_config()), shape, shift=False), True)


def test_batch_norms_on_both_sides_and_in_a_row_fold():
    x = inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(name="second")(layers.BatchNormalization(name="first")(x))
    x = layers.BatchNormalization(name="third")(layers.Conv2D(4, 3, name="conv")(x))
    x = layers.BatchNormalization(name="fourth")(layers.GlobalAveragePooling2D()(layers.ReLU()(x)))
    model = randomize(keras.Model(inputs, layers.Dense(5, activation="softmax", name="head")(x)))
    folded, report = batch_norm.fold_batch_norm(model, report=True)
    assert norms(folded) == [] and report["folded_into"].tolist() == ["conv", "conv", "conv", "head"]
    assert report["layer"].tolist() == ["first", "second", "third", "fourth"] and not report["reason"].any()
    assert_close(model, folded, 1e-5)


def test_a_batch_norm_in_front_of_what_several_read_or_call_stays():
    x = layers.BatchNormalization(name="norm")(inputs := keras.Input((8, 4)))
    model = randomize(keras.Model(inputs, [layers.Conv1D(5, 3)(x), layers.Conv1D(5, 3)(x)]))
    folded, report = batch_norm.fold_batch_norm(model, report=True)
    assert norms(folded) == ["norm"] and report["reason"][0].endswith("several layers read it")
    conv = layers.Conv1D(4, 3, name="conv")
    y = conv(conv(layers.BatchNormalization(name="norm")(inputs := keras.Input((8, 4)))))
    folded, report = batch_norm.fold_batch_norm(randomize(keras.Model(inputs, y)), report=True)
    assert norms(folded) == ["norm"] and report["reason"][0].endswith("conv is called several times")
    dense = layers.Dense(5, name="dense")
    model = randomize(keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="norm"), dense]))
    dense.enable_lora(2)
    folded, report = batch_norm.fold_batch_norm(model, report=True)
    assert norms(folded) == ["norm"] and report["reason"][0].endswith("dense has a LoRA")
