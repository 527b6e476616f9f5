"""Blocks, against the dense convolution with the kernel that their factors make; saved and loaded elsewhere."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import blocks, cost, decompose, ranks

RANKS = {"cp": 5, "cp4": 5, "tucker": (3, 4), "tt": (3, 4, 2), "spatial": 5, "separable": 2}
DESIGNS = {
    "bottleneck": {"width": 3},
    "single_intra_channel": {},
    "topological": {"grid": (2, 3), "neighbourhood": (2, 2)},
    "spatial_bottleneck": {},
}
GEOMETRIES = [  # wherever Conv2D itself can: no stride together with a dilation
    {"strides": strides, "dilation_rate": dilation, "padding": padding}
    for strides, dilation in ((1, 1), (2, 1), ((2, 1), 1), (1, 2))
    for padding in ("same", "valid")
]
KERNELS = [(1, 1), (2, 2), (3, 3), (5, 5), (3, 1)]
SIZES = [(10, 12), (11, 9)]  # even and odd: with stride 2, `same` pads them differently


def ids(value):
    return "-".join(str(part).replace(" ", "") for part in (value.values() if isinstance(value, dict) else value))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def largest_difference(kernel, decomposition, size, *, bias=None, images=2, **options):
    """Between the outputs of the dense layer with `kernel` and of the block of `decomposition`."""
    inputs = keras.Input((*size, kernel.shape[2]))
    dense = layers.Conv2D(kernel.shape[3], kernel.shape[:2], use_bias=bias is not None, **options)
    outputs = [dense(inputs), blocks.factorized(inputs, decomposition, bias, **options)]
    dense.set_weights([kernel] if bias is None else [kernel, bias])
    expected, ours = keras.Model(inputs, outputs)(random(images, *size, kernel.shape[2], seed=1))
    assert expected.shape == ours.shape and np.prod(ours.shape) > 0
    return float(keras.ops.max(keras.ops.abs(expected - ours)))


# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", blocks.BLOCKS)
def test_a_shape_gives_a_model_and_a_tensor_a_tensor(method):
    model = blocks.BLOCKS[method]((8, 8, 6), 4, 3, RANKS[method], name="mine")
    tensor = blocks.BLOCKS[method](keras.Input((8, 8, 6)), 4, 3, RANKS[method])
    assert isinstance(model, keras.Model) and model.name == "mine"
    assert tuple(tensor.shape) == model.output_shape == (None, 8, 8, 4)
    assert all(type(layer).__module__.startswith("keras.") for layer in model.layers)
    assert all(layer.name.startswith("mine_") for layer in model.layers[1:])


@pytest.mark.parametrize("method", blocks.BLOCKS)
@pytest.mark.parametrize("wrong", [0, -1, 2.5, None, True])
def test_ranks_that_are_none_are_refused(method, wrong):
    given = (wrong, *RANKS[method][1:]) if isinstance(RANKS[method], tuple) else wrong
    with pytest.raises(ValueError, match=f"(rank|multiplier).* whole number between 1 and .*; got {wrong}"):
        blocks.BLOCKS[method]((8, 8, 6), 4, 3, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be a whole number of at least 1, or two of them; got 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be"),
        ({"strides": 1.5}, "strides must be"),
        ({"dilation_rate": (0, 1)}, "dilation_rate must be"),
        ({"padding": "full"}, "padding must be one of same, valid; got 'full'"),
        ({"strides": 2, "dilation_rate": 2}, "can't both be above 1"),
        ({"filters": 0}, "filters must be a whole number"),
    ],
)
def test_options_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        blocks.cp((8, 8, 6), **{"filters": 4, "kernel_size": 3, "rank": 2} | options)


def test_what_a_block_can_not_do_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="need an image of a fixed size"):
        blocks.cp4((None, None, 6), 4, 3, 2, strides=2)
    with pytest.raises(ValueError, match="need an image of a fixed size"):
        blocks.cp((None, 8, 6), 4, 3, 2, strides=(2, 1))
    with pytest.raises(ValueError, match="padding must be 'same'"):
        blocks.single_intra_channel((8, 8, 6), 4, 3, padding="valid")
    with pytest.raises(ValueError, match="grid must hold the 4 filters"):
        blocks.topological((8, 8, 6), 4, 3, (2, 3), (1, 1))
    with pytest.raises(ValueError, match="the neighbourhood fit into it"):
        blocks.topological((8, 8, 6), 6, 3, (2, 3), (3, 1))
    with pytest.raises(ValueError, match="keeps the number of channels; got 5 in, 6 out"):
        blocks.topological((8, 8, 5), 6, 3, (2, 3), (1, 1))
    with pytest.raises(ValueError, match=r"wants an image of a fixed size; got \(None, 8\)"):
        blocks.topological((None, 8, 6), 6, 3, (2, 3), (1, 1))
    with pytest.raises(ValueError, match="wants images that 3×3 cells divide"):
        blocks.spatial_bottleneck((8, 9, 6), 4, 3)
    with pytest.raises(ValueError, match="has strides and dilation 1"):
        blocks.spatial_bottleneck((9, 9, 6), 4, 3, strides=2)
    with pytest.raises(ValueError, match="reads 6 channels; got an input of 5"):
        blocks.factorized((8, 8, 5), decompose.cp(random(3, 3, 6, 4), 2))
    with pytest.raises(ValueError, match=r"bias must have the shape \(4,\)"):
        blocks.weights(decompose.cp(random(3, 3, 6, 4), 2), np.zeros(3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'stride'"):
        blocks.cp((8, 8, 6), 4, 3, 2, stride=2)


def test_options_reach_the_layers():
    model = blocks.cp(
        (8, 8, 6), 4, 3, 2, activation="relu", dtype="mixed_float16", trainable=False, kernel_regularizer="l2"
    )
    enter, depthwise, leave = model.layers[1:]
    assert leave.activation is keras.activations.relu and enter.activation is keras.activations.linear
    assert (enter.use_bias, depthwise.use_bias, leave.use_bias) == (False, False, True)
    assert all(layer.dtype_policy.name == "mixed_float16" for layer in model.layers[1:])
    assert not model.trainable_weights and len(model.weights) == 4
    assert enter.kernel_regularizer is not None and depthwise.depthwise_regularizer is not None


# --- correct: what can be exact ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=ids)
@pytest.mark.parametrize("kernel_size", KERNELS, ids=ids)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=ids)
@pytest.mark.parametrize("method", blocks.BLOCKS)
def test_at_the_largest_ranks_a_block_is_the_dense_layer(method, geometry, kernel_size, size):
    kernel, bias = random(*kernel_size, 3, 4), random(4)
    exact = decompose.decompose(kernel, method, ranks.maximum(method, kernel.shape))
    for options in ({}, {"bias": bias}, {"activation": "relu"}, {"bias": bias, "activation": "relu"}):
        assert largest_difference(kernel, exact, size, **geometry, **options) < 1e-4


@pytest.mark.parametrize("rank", [1, 3, 17])
@pytest.mark.parametrize("method", blocks.BLOCKS)
def test_truncated_a_block_is_the_dense_layer_of_the_rebuilt_kernel(method, rank):
    kernel = random(3, 3, 24, 20)
    given = tuple(min(rank, high) for high in ranks.maximum(method, kernel.shape))
    result = decompose.decompose(kernel, method, given)
    assert result.relative_error > 0.1 or method == "separable"
    rebuilt = result.to_kernel().astype("float32")
    for strides, size in ((1, (9, 8)), (2, (9, 8)), ((2, 1), (8, 9))):
        assert largest_difference(rebuilt, result, size, bias=random(20), strides=strides, padding="same") < 1e-4


@pytest.mark.parametrize("position", [0, 1, -1])
@pytest.mark.parametrize("method", blocks.BLOCKS)
def test_a_wrong_factor_is_noticed(method, position):
    kernel = random(3, 3, 3, 4)
    exact = decompose.decompose(kernel, method, ranks.maximum(method, kernel.shape))
    exact.factors[position].flat[0] += 0.5
    exact.factors[position].flat[1:] *= 1.01
    assert largest_difference(kernel, exact, (10, 12), padding="same") > 1e-3


def test_unequal_strides_and_dilations_that_share_no_factor():
    kernel = random(3, 5, 3, 4)
    for method in blocks.BLOCKS:
        exact = decompose.decompose(kernel, method, ranks.maximum(method, kernel.shape))
        for options in ({"strides": (3, 2)}, {"strides": (4, 2)}, {"dilation_rate": (2, 3)}):
            for padding in ("same", "valid"):
                assert largest_difference(kernel, exact, (17, 20), padding=padding, **options) < 1e-4


def test_images_of_any_size_where_no_padding_layer_is_needed():
    kernel = random(3, 3, 3, 4)
    for method in blocks.BLOCKS:
        exact = decompose.decompose(kernel, method, ranks.maximum(method, kernel.shape))
        block = blocks.factorized((None, None, 3), exact, padding="same")
        fixed = blocks.factorized((7, 6, 3), exact, padding="same")
        x = random(2, 7, 6, 3)
        assert np.allclose(block(x), fixed(x), atol=1e-5)


def test_a_block_in_the_middle_of_a_model():
    """On a tensor that other layers made: its weights are set, theirs are left."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="before")(x)
    kernel = random(3, 3, 6, 4)
    exact = decompose.decompose(kernel, "tt", ranks.maximum("tt", kernel.shape))
    dense = layers.Conv2D(4, 3, padding="same", use_bias=False)
    model = keras.Model(inputs, layers.ReLU()(blocks.factorized(x, exact)))
    expected = keras.Model(inputs, layers.ReLU()(dense(x)))
    dense.set_weights([kernel])
    images = random(2, 8, 8, 3)
    assert np.allclose(model(images), expected(images), atol=1e-4) and np.std(expected(images)) > 0.1


# --- correct: the designs ----------------------------------------------------------------------------------------


def test_a_linear_bottleneck_is_a_tucker():
    result = decompose.tucker2(random(3, 3, 6, 8), (4, 4))
    model = blocks.bottleneck((9, 8, 6), 8, 3, 4, inner_activation=None, use_bias=False, strides=2)
    model.set_weights(blocks.weights(result))
    x = random(2, 9, 8, 6)
    assert np.allclose(model(x), blocks.factorized((9, 8, 6), result, strides=2)(x), atol=1e-4)
    assert not np.allclose(model(x), 0, atol=1e-2)


def test_single_intra_channel_convolution_is_a_dense_layer_of_a_kernel_by_hand():
    """K[i, j, s, t] = (D[i, j, s] + [i, j is the centre]) P[s, t]."""
    model = blocks.single_intra_channel((9, 8, 6), 4, 3)
    model.set_weights([random(*weight.shape, seed=2) for weight in model.weights])
    depthwise, pointwise, bias = model.get_weights()
    kernel = depthwise[..., 0].copy()
    kernel[1, 1] += 1
    dense = layers.Conv2D(4, 3, padding="same")
    x = random(2, 9, 8, 6)
    dense(x)
    dense.set_weights([kernel[..., None] * pointwise[0, 0], bias])
    assert np.allclose(model(x), dense(x), atol=1e-4)


def test_topological_subdivisioning_connects_neighbours_only():
    """The 1×1 kernel by hand: output (a, b) of the 2×3 grid reads inputs (a..a+1, b..b+1), wrapping around."""
    model = blocks.topological((5, 4, 6), 6, 1, (2, 3), (2, 2), activation="relu")
    model.set_weights([random(*weight.shape, seed=3) for weight in model.weights])
    depthwise, reading, bias = model.get_weights()  # (1, 1, 6, 1), (1, 4, 6, 1), (6,)
    kernel = np.zeros((6, 6), "float32")
    for a in range(2):
        for b in range(3):
            for number, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
                kernel[3 * ((a + i) % 2) + (b + j) % 3, 3 * a + b] += reading[0, number, 3 * a + b, 0]
    x = random(2, 5, 4, 6)
    expected = np.maximum((x * (1 + depthwise[0, 0, :, 0])) @ kernel + bias, 0)
    assert np.allclose(model(x), expected, atol=1e-5)
    assert cost.total_costs(model)["macs"] == 5 * 4 * (6 + 4 * 6)


@pytest.mark.parametrize("strides", [(2, 2), (1, 2)])
def test_a_stride_of_topological_subdivisioning_leaves_out_positions(strides):
    whole, strided = (blocks.topological((5, 4, 6), 6, 3, (2, 3), (2, 2), strides=step) for step in (1, strides))
    whole.set_weights([random(*weight.shape, seed=3) for weight in whole.weights])
    strided.set_weights(whole.get_weights())
    x = random(2, 5, 4, 6)
    assert np.allclose(strided(x), whole(x)[:, :: strides[0], :: strides[1]], atol=1e-5)


@pytest.mark.parametrize("kernel_size", [(2, 2), (2, 3)])
def test_spatial_bottleneck_by_hand(kernel_size):
    kh, kw = kernel_size
    model = blocks.spatial_bottleneck((6, 6, 3), 5, kernel_size)
    model.set_weights([random(*weight.shape, seed=4) for weight in model.weights])
    down, project, up, bias = model.get_weights()
    x = random(2, 6, 6, 3)
    cells = x.reshape(2, 6 // kh, kh, 6 // kw, kw, 3)
    small = np.einsum("nhiwjs,ijs->nhws", cells, down.reshape(kh, kw, 3)) @ project[0, 0]
    scale, shift = up.reshape(5, kh, kw), bias.reshape(5, kh, kw)
    large = np.einsum("nhwt,tij->nhiwjt", small, scale) + shift.transpose(1, 2, 0)[None, None, :, None]
    assert np.allclose(model(x), large.reshape(2, 6, 6, 5), atol=1e-4)


# --- saved, trained, elsewhere -----------------------------------------------------------------------------------


def every_block(size=(6, 6), channels=6):
    """One model with every block, one after another."""
    x = inputs = keras.Input((*size, channels))
    for name, function in blocks.BLOCKS.items():
        x = function(x, channels, 3, RANKS[name], name=name, activation="tanh")
    for name, arguments in DESIGNS.items():
        x = getattr(blocks, name)(x, channels, 3, **arguments, name=name, activation="tanh")
    x = blocks.cp4(x, channels, 3, 4, strides=(2, 1), name="strided")
    return keras.Model(inputs, x)


LOAD = """
import sys, keras, numpy as np
assert not any(name.startswith("fcnn_utils") for name in sys.modules)
x = np.load(sys.argv[2])
np.save(sys.argv[3], keras.ops.convert_to_numpy(keras.saving.load_model(sys.argv[1])(x)))
"""


def test_saved_blocks_load_in_a_fresh_process_without_custom_objects(tmp_path):
    """Of the same backend, without this package."""
    model, x = every_block(), random(2, 6, 6, 6)
    model.set_weights([0.4 * random(*weight.shape, seed=n) for n, weight in enumerate(model.weights)])
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / name) for name in ("model.keras", "x.npy", "y.npy")]
    environment = os.environ | {"KERAS_BACKEND": keras.config.backend()}
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True, env=environment, cwd=tmp_path)
    there, here = np.load(tmp_path / "y.npy"), keras.ops.convert_to_numpy(model(x))
    assert here.std() > 1e-3 and np.allclose(there, here, atol=1e-5)


def test_every_block_is_counted_and_takes_a_training_step():
    keras.utils.set_random_seed(0)
    model, x = every_block(), random(4, 6, 6, 6)
    assert cost.total_costs(model)["params"] == model.count_params()
    model.compile("sgd", "mse")
    before = model.get_weights()
    model.train_on_batch(x, random(*model(x).shape, seed=1))
    assert all(not np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))
