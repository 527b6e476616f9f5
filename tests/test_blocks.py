"""Factorized convolutions as Keras layers, compared with Keras's dense layer; costs, options and saved models."""

import math

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import blocks, cost, factorizations

METHODS = list(factorizations.FACTORIZATIONS)
RANKS = {"cp": 5, "cp4": 5, "tucker": (3, 4), "tt": (3, 4, 2), "svd": 3, "spatial": 5, "separable": 2}
DESIGNS = {
    "bottleneck": {"width": 3},
    "single_intra_channel": {},
    "topological": {"grid": (2, 3), "neighbourhood": (2, 2)},
    "spatial_bottleneck": {},
}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def exact(method, kernel):
    return factorizations.decompose(kernel, method, factorizations.get(method).max_ranks(kernel.shape))


def dense_layer(kernel, bias, x, **options):
    """Return the output of Keras's dense layer for a Keras tensor, and the layer."""
    layer = layers.Conv2D(kernel.shape[3], kernel.shape[:2], use_bias=bias is not None, **options)
    y = layer(x)
    layer.set_weights([kernel] if bias is None else [kernel, bias])
    return y, layer


def largest_differences(expected, outputs):
    """Return the largest difference of each output from the first, of the same shape and not empty."""
    expected, *outputs = map(keras.ops.convert_to_numpy, (expected, *outputs))
    assert all(y.shape == expected.shape for y in outputs) and expected.size > 0
    return [np.abs(y - expected).max() for y in outputs]


# --- equal to the dense layer ------------------------------------------------------------------------------------

CASES = [  # wherever Conv2D itself can: no stride together with a dilation; odd and even sizes are padded differently
    (kernel_size, size, {"strides": strides, "dilation_rate": dilation, "padding": padding})
    for strides, dilation in (((1, 1), (1, 1)), ((2, 2), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 2)))
    for padding in ("same", "valid")
    for kernel_size in ((1, 1), (2, 2), (3, 3), (5, 5), (3, 1))
    for size in ((10, 12), (11, 9))
]
CASES += [
    ((3, 5), (17, 20), {"strides": strides, "dilation_rate": dilation, "padding": padding})
    for strides, dilation in (((3, 2), (1, 1)), ((4, 2), (1, 1)), ((1, 1), (2, 3)))
    for padding in ("same", "valid")
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, (*case[:2], *case[2].values()))))
def case(request):
    """A dense layer and its chains of all methods at full rank, side by side on one input."""
    kernel_size, size, geometry = request.param
    kernel, bias = random(*kernel_size, 3, 4), random(4)
    inputs, options = keras.Input((*size, 3)), {"kernel_initializer": "zeros", **geometry}  # no time for random numbers
    expected, _ = dense_layer(kernel, bias, inputs, **options)
    chains = {
        method: blocks.from_decomposition(inputs, exact(method, kernel), bias, name=method, **options)
        for method in METHODS
    }
    return kernel.shape, geometry, inputs, expected, chains


def test_full_rank_chains_equal_the_dense_layer(case):
    *_, inputs, expected, chains = case
    expected, *outputs = keras.Model(inputs, [expected, *chains.values()])(random(2, *inputs.shape[1:], seed=1))
    assert max(largest_differences(expected, outputs)) < 1e-4


def test_chain_costs_agree_with_the_costs_of_the_built_layers(case):
    kernel_shape, geometry, inputs, _, chains = case
    for method, y in chains.items():
        cls, model = factorizations.get(method), keras.Model(inputs, y)
        ranks, total = cls.max_ranks(kernel_shape), cost.total_costs(model)
        assert total["params"] == cls.count_parameters(kernel_shape, ranks) + kernel_shape[-1]
        assert total["macs"] == blocks.chain_macs(cls.chain(kernel_shape, ranks), inputs.shape[1:3], **geometry)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_macs_for_one_output_position_hold_for_the_built_layers(strides):
    """Also where a layer of its own pads the image, but for what the layers behind it see of the border."""
    for method in METHODS:
        block = blocks.factorized_conv((80, 120, 8), method, 6, (3, 5), RANKS[method], strides=strides, use_bias=False)
        padded = any(layer.name.endswith("_pad") for layer in block.layers)
        unequal = len(set(strides)) > 1
        assert padded == (unequal if method in ("cp", "separable") else method == "cp4" and strides != (1, 1))
        per_position = factorizations.get(method).count_macs((3, 5, 8, 6), RANKS[method], strides)
        expected = math.prod(block.output_shape[1:3]) * per_position
        macs = cost.total_costs(block)["macs"]
        assert macs == pytest.approx(expected, rel=0.03) if padded else macs == expected


@pytest.mark.parametrize("rank", [1, 3, 17])
def test_truncated_chains_equal_the_dense_layer_of_the_rebuilt_kernel(rank):
    """With and without a bias and an activation."""
    kernel, bias = random(3, 3, 24, 20), random(20)
    inputs = keras.Input((9, 8, 24))
    geometries = [{"strides": 1, "bias": bias, "activation": "relu"}, {"strides": 2, "bias": bias}]
    geometries += [{"strides": (2, 1), "bias": None, "activation": "tanh"}, {"strides": 1, "bias": None}]
    pairs = []
    for method in METHODS:
        ranks = tuple(min(rank, high) for high in factorizations.get(method).max_ranks(kernel.shape))
        result = factorizations.decompose(kernel, method, ranks)
        assert result.relative_error > 0.1 or (method == "separable" and rank == 17)
        rebuilt = result.to_kernel().astype("float32")
        for number, options in enumerate(geometries):
            name = f"{method}{number}"
            pairs.append(dense_layer(rebuilt, x=inputs, padding="same", **options)[0])
            pairs.append(blocks.from_decomposition(inputs, result, name=name, **options))
    outputs = keras.Model(inputs, pairs)(random(2, 9, 8, 24, seed=1))
    for expected, y in zip(outputs[::2], outputs[1::2], strict=True):
        assert largest_differences(expected, [y])[0] < 1e-4


def test_every_weight_of_a_chain_matters():
    """One wrong factor shows in the outputs: the comparison with the dense layer would notice it."""
    kernel, x = random(3, 3, 3, 4), random(2, 10, 12, 3, seed=1)
    inputs = keras.Input(x.shape[1:])
    expected, dense = dense_layer(kernel, None, inputs, padding="same")
    expected = dense(x)
    for method in METHODS:
        model = keras.Model(inputs, blocks.from_decomposition(inputs, exact(method, kernel), name=method))
        assert largest_differences(expected, [model(x)])[0] < 1e-4
        for weight in model.weights:
            right = keras.ops.convert_to_numpy(weight)
            weight.assign(right + 0.1 * random(*right.shape, seed=2))
            assert largest_differences(expected, [model(x)])[0] > 1e-2
            weight.assign(right)


def test_images_of_any_size_are_accepted_where_no_padding_layer_is_needed():
    kernel, x = random(3, 3, 3, 4), random(2, 7, 6, 3)
    inputs = keras.Input((None, None, 3))
    expected, _ = dense_layer(kernel, None, inputs, padding="same")
    chains = [blocks.from_decomposition(inputs, exact(method, kernel), name=method) for method in METHODS]
    expected, *outputs = keras.Model(inputs, [expected, *chains])(x)
    assert max(largest_differences(expected, outputs)) < 1e-4


def test_a_block_in_the_middle_of_a_model_sets_its_own_weights_only():
    kernel, images = random(3, 3, 6, 4), random(2, 8, 8, 3)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="before")(inputs)
    expected, _ = dense_layer(kernel, None, x, padding="same")
    ours = blocks.from_decomposition(x, exact("tt", kernel))
    expected, ours = keras.Model(inputs, [layers.ReLU()(expected), layers.ReLU()(ours)])(images)
    assert largest_differences(expected, [ours])[0] < 1e-4 and keras.ops.std(expected) > 0.1


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_shape_gives_a_model_and_a_tensor_gives_a_tensor(method):
    model = blocks.factorized_conv((8, 8, 6), method, 4, 3, RANKS[method], name="mine")
    tensor = blocks.factorized_conv(keras.Input((8, 8, 6)), factorizations.get(method), 4, 3, RANKS[method])
    assert isinstance(model, keras.Model) and model.name == "mine"
    assert tuple(tensor.shape) == model.output_shape == (None, 8, 8, 4)
    assert all(type(layer).__module__.startswith("keras.") for layer in model.layers)
    assert all(layer.name.startswith("mine_") for layer in model.layers[1:])
    for wrong in (0, -1, 2.5, None, True):
        given = (wrong, *RANKS[method][1:]) if isinstance(RANKS[method], tuple) else wrong
        with pytest.raises(ValueError, match=f"rank.* whole number between 1 and .*; got {wrong}"):
            blocks.factorized_conv((8, 8, 6), method, 4, 3, given)


def test_options_reach_the_layers():
    options = {"activation": "relu", "dtype": "mixed_float16", "trainable": False}
    options |= {"kernel_regularizer": "l2", "bias_regularizer": "l1", "bias_initializer": "ones"}
    model = blocks.factorized_conv((8, 8, 6), "cp", 4, 3, 2, kernel_initializer="zeros", **options)
    enter, depthwise, leave = model.layers[1:]
    assert leave.activation is keras.activations.relu and enter.activation is keras.activations.linear
    assert (enter.use_bias, depthwise.use_bias, leave.use_bias) == (False, False, True)
    assert all(layer.dtype_policy.name == "mixed_float16" for layer in model.layers[1:])
    assert not model.trainable_weights
    assert [float(keras.ops.max(weight)) for weight in model.weights] == [0, 0, 0, 1]
    assert enter.kernel_regularizer.l2 == depthwise.depthwise_regularizer.l2 == leave.kernel_regularizer.l2 > 0
    assert leave.bias_regularizer.l1 > 0


def test_invalid_options_are_rejected():
    for options, message in (
        ({"kernel_size": 0}, "kernel_size must be a whole number of at least 1, or two of them; got 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be"),
        ({"strides": 1.5}, "strides must be"),
        ({"dilation_rate": (0, 1)}, "dilation_rate must be"),
        ({"padding": "full"}, "padding must be one of same, valid; got 'full'"),
        ({"strides": 2, "dilation_rate": 2}, "can't both be above 1"),
        ({"filters": 0}, "filters must be a whole number"),
        ({"method": "qr"}, "method must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            blocks.factorized_conv((8, 8, 6), **{"method": "cp", "filters": 4, "kernel_size": 3, "ranks": 2} | options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stride'"):
        blocks.factorized_conv((8, 8, 6), "cp", 4, 3, 2, stride=2)


def test_what_a_block_cannot_do_is_rejected_with_the_reason():
    result = factorizations.decompose(random(3, 3, 6, 4), "cp", 2)
    for function, arguments, options, message in (
        (blocks.factorized_conv, ((None, None, 6), "cp4", 4, 3, 2), {"strides": 2}, "image of a fixed size"),
        (blocks.factorized_conv, ((None, 8, 6), "cp", 4, 3, 2), {"strides": (2, 1)}, "image of a fixed size"),
        (blocks.from_decomposition, ((8, 8, 5), result), {}, "reads 6 channels; got an input of 5"),
        (blocks.from_decomposition, ((8, 8, 6), result, np.zeros(3)), {}, r"bias must have the shape \(4,\)"),
        (blocks.single_intra_channel, ((8, 8, 6), 4, 3), {"padding": "valid"}, "padding must be 'same'"),
        (blocks.topological, ((8, 8, 6), 4, 3, (2, 3), (1, 1)), {}, "grid must hold the 4 filters"),
        (blocks.topological, ((8, 8, 6), 6, 3, (2, 3), (3, 1)), {}, "the neighbourhood fit into it"),
        (blocks.topological, ((8, 8, 5), 6, 3, (2, 3), (1, 1)), {}, "keeps the .*channels; got 5 in, 6 out"),
        (blocks.topological, ((None, 8, 6), 6, 3, (2, 3), (1, 1)), {}, r"image of a fixed size; got \(None, 8\)"),
        (blocks.spatial_bottleneck, ((8, 9, 6), 4, 3), {}, "images that 3×3 cells divide"),
        (blocks.spatial_bottleneck, ((9, 9, 6), 4, 3), {"strides": 2}, "strides and dilation 1"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments, **options)


# --- designs that are not the factorization of a kernel ----------------------------------------------------------


def test_a_linear_bottleneck_is_a_tucker_chain():
    result = factorizations.decompose(random(3, 3, 6, 8), "tucker", (4, 4))
    model = blocks.bottleneck((9, 8, 6), 8, 3, 4, inner_activation=None, use_bias=False, strides=2)
    model.set_weights(result.layer_weights())
    expected = blocks.from_decomposition((9, 8, 6), result, strides=2)(random(2, 9, 8, 6))
    assert largest_differences(expected, [model(random(2, 9, 8, 6))])[0] < 1e-4 and keras.ops.std(expected) > 0.1
    bent = blocks.bottleneck((9, 8, 6), 8, 3, 4)
    assert [layer.activation.__name__ for layer in bent.layers[1:]] == ["relu", "relu", "linear"]


def with_random_weights(model, seed):
    model.set_weights([random(*weight.shape, seed=seed) for weight in model.weights])
    return model


def test_single_intra_channel_convolution_is_a_dense_layer():
    """K[i, j, s, t] = (D[i, j, s] + [i, j is the centre]) P[s, t]."""
    model, x = with_random_weights(blocks.single_intra_channel((9, 8, 6), 4, 3), 2), random(2, 9, 8, 6)
    depthwise, pointwise, bias = model.get_weights()
    kernel = depthwise[..., 0].copy()
    kernel[1, 1] += 1
    _, dense = dense_layer(kernel[..., None] * pointwise[0, 0], bias, keras.Input((9, 8, 6)), padding="same")
    assert largest_differences(dense(x), [model(x)])[0] < 1e-4


def test_topological_subdivisioning_connects_neighbours_only():
    """The 1×1 kernel by hand: output (a, b) of the 2×3 grid reads inputs (a..a+1, b..b+1), wrapping around."""
    model = with_random_weights(blocks.topological((5, 4, 6), 6, 1, (2, 3), (2, 2), activation="relu"), 3)
    depthwise, reading, bias = model.get_weights()  # (1, 1, 6, 1), (1, 4, 6, 1), (6,)
    kernel = np.zeros((6, 6), "float32")
    for a in range(2):
        for b in range(3):
            for number, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
                kernel[3 * ((a + i) % 2) + (b + j) % 3, 3 * a + b] += reading[0, number, 3 * a + b, 0]
    x = random(2, 5, 4, 6)
    expected = np.maximum((x * (1 + depthwise[0, 0, :, 0])) @ kernel + bias, 0)
    assert largest_differences(expected, [model(x)])[0] < 1e-5
    assert cost.total_costs(model)["macs"] == 5 * 4 * (6 + 4 * 6)


@pytest.mark.parametrize("strides", [(2, 2), (1, 2)])
def test_strides_of_topological_subdivisioning_leave_out_positions(strides):
    whole, strided = (blocks.topological((5, 4, 6), 6, 3, (2, 3), (2, 2), strides=step) for step in (1, strides))
    strided.set_weights(with_random_weights(whole, 3).get_weights())
    x = random(2, 5, 4, 6)
    assert largest_differences(whole(x)[:, :: strides[0], :: strides[1]], [strided(x)])[0] < 1e-5


@pytest.mark.parametrize("kernel_size", [(2, 2), (2, 3)])
def test_spatial_bottleneck_computes_cell_by_cell(kernel_size):
    kh, kw = kernel_size
    model = with_random_weights(blocks.spatial_bottleneck((6, 6, 3), 5, kernel_size), 4)
    down, project, up, bias = model.get_weights()
    x = random(2, 6, 6, 3)
    cells = x.reshape(2, 6 // kh, kh, 6 // kw, kw, 3)
    small = np.einsum("nhiwjs,ijs->nhws", cells, down.reshape(kh, kw, 3)) @ project[0, 0]
    scale, shift = up.reshape(5, kh, kw), bias.reshape(5, kh, kw)
    large = np.einsum("nhwt,tij->nhiwjt", small, scale) + shift.transpose(1, 2, 0)[None, None, :, None]
    assert largest_differences(large.reshape(2, 6, 6, 5), [model(x)])[0] < 1e-4


# --- saved and trained -------------------------------------------------------------------------------------------


def every_block():
    """A model with every block, one after another."""
    x = inputs = keras.Input((6, 6, 6))
    for method in METHODS:
        x = blocks.factorized_conv(x, method, 6, 3, RANKS[method], name=method, activation="tanh")
    for name, arguments in DESIGNS.items():
        x = getattr(blocks, name)(x, 6, 3, **arguments, name=name, activation="tanh")
    return keras.Model(inputs, blocks.factorized_conv(x, "cp4", 6, 3, 4, strides=(2, 1), name="strided"))


def test_saved_blocks_load_without_custom_objects(tmp_path):
    model, x = every_block(), random(2, 6, 6, 6)
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    model.set_weights([0.4 * random(*weight.shape, seed=n) for n, weight in enumerate(model.weights)])
    model.save(tmp_path / "model.keras")
    loaded, expected = keras.saving.load_model(tmp_path / "model.keras")(x), model(x)
    assert keras.ops.std(expected) > 1e-3 and largest_differences(expected, [loaded])[0] < 1e-5


def test_every_block_is_counted_and_takes_a_training_step():
    keras.utils.set_random_seed(0)
    model, x = every_block(), random(4, 6, 6, 6)
    assert cost.total_costs(model)["params"] == model.count_params()
    model.compile("sgd", "mse")
    before = model.get_weights()
    model.train_on_batch(x, random(*model(x).shape, seed=1))
    assert all(not np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))
