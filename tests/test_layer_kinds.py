"""The kinds of layers that are factorized: `fcnn_utils.layer_kinds`, through `compress.factorize`."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import compress, cost, factorizations, keras_graph
from fcnn_utils.layer_kinds import KINDS, KernelLayer

METHODS = list(factorizations.FACTORIZATIONS)
DENSE_CHAINS = ("tucker", "tt", "svd", "spatial")  # without depthwise layers
SIZES = (7, 6, 5)


def model_of(*stack, shape, seed=0):
    model = keras.Sequential([keras.Input(shape), *stack])
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(0, 0.3, weight.shape) for weight in model.weights])
    return model, rng.standard_normal((4, *shape)).astype("float32")


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


def check_equal_at_full_rank(layer, shape, method):
    """The converted layer computes the same and costs what the report says; its neighbours keep their weights."""
    model, x = model_of(layer, shape=shape)
    ranks = {layer.name: factorizations.get(method).max_ranks(KernelLayer(layer).kernel_shape)}
    new, report = compress.factorize(model, method, ranks=ranks)
    expected = outputs(model, x)
    assert np.abs(outputs(new, x) - expected).max() < 1e-5 * np.abs(expected).max()
    assert cost.total_costs(new)["macs"] == report["macs_after"].sum()
    assert new.count_params() == report["params_after"].sum()
    return new


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strides, dilation", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_one_dimensional_convolutions_are_equal_at_full_rank(method, strides, dilation, padding):
    layer = layers.Conv1D(7, 3, strides=strides, dilation_rate=dilation, padding=padding, activation="tanh")
    check_equal_at_full_rank(layer, (11, 6), method)


@pytest.mark.parametrize("method", DENSE_CHAINS)
@pytest.mark.parametrize("strides, dilation", [(1, 1), (2, 1), (1, 2)])
def test_causal_convolutions_are_equal_at_full_rank(method, strides, dilation):
    layer = layers.Conv1D(7, 3, strides=strides, dilation_rate=dilation, padding="causal")
    check_equal_at_full_rank(layer, (11, 6), method)


@pytest.mark.parametrize("method", DENSE_CHAINS)
@pytest.mark.parametrize("strides", [1, 2, (1, 2, 3)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_three_dimensional_convolutions_are_equal_at_full_rank(method, strides, padding):
    layer = layers.Conv3D(7, (3, 2, 3), strides=strides, padding=padding, use_bias=False)
    check_equal_at_full_rank(layer, (*SIZES, 4), method)


@pytest.mark.parametrize("method", DENSE_CHAINS)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    "axes, kernel_size, options",
    [
        (1, 3, {"strides": 2}),
        (2, 3, {}),
        (2, (3, 4), {"strides": (2, 1)}),
        (2, 2, {"strides": 3}),
        (2, 3, {"dilation_rate": 2}),
        (2, 3, {"strides": 2, "output_padding": 1}),
        (3, 3, {"strides": 2}),
    ],
    ids=str,
)
def test_transposed_convolutions_are_equal_at_full_rank(method, axes, padding, kernel_size, options):
    if "dilation_rate" in options and keras.config.backend() == "tensorflow":
        pytest.skip("TensorFlow has no dilated transposed convolutions on a CPU")
    kind = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)[axes - 1]
    layer = kind(7, kernel_size, padding=padding, activation="relu", **options)
    new = check_equal_at_full_rank(layer, (5, 4, 3)[:axes] + (4,), method)
    assert not [part for part in new.layers if type(part) is kind and set(part.kernel_size) == {1}]  # those are plain


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("strides, padding", [(1, "same"), (2, "same"), (2, "valid")])
def test_grouped_convolutions_are_factorized_group_by_group(method, groups, strides, padding):
    layer = layers.Conv2D(12, 3, groups=groups, strides=strides, padding=padding)
    check_equal_at_full_rank(layer, (8, 7, 12), method)
    model, x = model_of(layers.Conv2D(12, 3, groups=groups, name="conv"), shape=(8, 7, 12))
    new, report = compress.factorize(model, method, ratio=0.6)
    (row,), kind = report.to_dict("records"), KernelLayer(model.get_layer("conv"))
    options = {"max_norm": 1.0} if method in ("cp", "cp4") else {}
    parts = [factorizations.decompose(kernel, method, row["ranks"], **options) for kernel in kind.kernels()]
    kernel, bias = model.get_layer("conv").get_weights()
    rebuilt = kind.keras_kernel([part.to_kernel() for part in parts])
    model.get_layer("conv").set_weights([rebuilt, bias])
    assert np.allclose(outputs(model, x), outputs(new, x), atol=1e-4)
    assert np.isclose(row["relative_error"], np.linalg.norm(kernel - rebuilt) / np.linalg.norm(kernel), atol=1e-5)


@pytest.mark.parametrize("shape", [(10,), (5, 10), (3, 5, 10)])
def test_dense_layers_are_factorized_by_svd(shape):
    new = check_equal_at_full_rank(layers.Dense(8, activation="tanh"), shape, "svd")
    assert [type(layer) for layer in new.layers] == [layers.Dense] * 2
    assert keras_graph.has_linear_activation(new.layers[0]) and not new.layers[0].use_bias


@pytest.mark.parametrize("strides", [1, 2, (1, 2)])
def test_1x1_convolutions_are_factorized_by_svd(strides):
    check_equal_at_full_rank(layers.Conv2D(9, 1, strides=strides), (8, 7, 6), "svd")


@pytest.mark.parametrize(
    "layer, shape, method, reason",
    [
        (layers.Dense(8), (10,), "cp", "dense: only svd factorizes it"),
        (layers.Conv2D(8, 1), (5, 5, 10), "tucker", "1×1: only svd factorizes it"),
        (layers.Conv3D(8, 3), (5, 5, 5, 10), "cp", "3-D depthwise layer, which Keras does not have"),
        (
            layers.Conv2DTranspose(8, 3),
            (5, 5, 10),
            "separable",
            "transposed depthwise layer, which Keras does not have",
        ),
        (layers.Conv1D(8, 3, padding="causal"), (9, 10), "cp", "causal depthwise layer, which Keras does not have"),
        (layers.Conv2D(10, 3, groups=10), (5, 5, 10), "svd", "depthwise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_method_cannot_factorize_is_left_with_the_reason(layer, shape, method, reason):
    model, _ = model_of(layer, shape=shape)
    with pytest.raises(ValueError, match=reason):
        compress.factorize(model, method, ratio=0.5)


def network():
    """A 1-D network with every kind of layer that has a 1-D form, and a head."""
    stack = [
        layers.Conv1D(12, 5, padding="same", activation="relu", name="conv"),
        layers.Conv1D(12, 3, groups=2, padding="same", activation="relu", name="grouped"),
        layers.Conv1D(16, 1, activation="relu", name="point"),
        layers.Conv1DTranspose(12, 3, strides=2, padding="same", activation="relu", name="up"),
        layers.GlobalAveragePooling1D(),
        layers.Dense(24, activation="relu", name="hidden"),
        layers.Dense(9, activation="softmax", name="head"),
    ]
    return model_of(*stack, shape=(20, 8))


def test_images_bring_the_outputs_nearer_for_every_kind():
    model, _ = network()
    x = np.random.default_rng(1).normal(0.5, 1, (300, 20, 8)).astype("float32")
    errors = []
    for images in (None, x):
        new, report = compress.factorize(model, "svd", ratio=0.5, images=images, verbose=0)
        assert (report["reason"] == "").sum() == 6
        errors.append(np.mean((outputs(new, x) - outputs(model, x)) ** 2))
    assert errors[1] < 0.5 * errors[0]


def test_a_budget_is_dealt_out_over_every_kind():
    model, x = network()
    dense = cost.total_costs(model)["macs"]
    small, report = compress.factorize(model, "svd", macs=0.5 * dense, images=np.tile(x, (40, 1, 1)), verbose=0)
    assert 0.4 * dense < cost.total_costs(small)["macs"] <= 0.5 * dense
    assert cost.total_costs(small)["macs"] == report["macs_after"].sum()


def test_a_factorized_network_is_not_factorized_again():
    model, _ = network()
    new, first = compress.factorize(model, "svd", ratio=0.3, verbose=0)
    with pytest.raises(ValueError, match="factorized already, together with"):
        compress.factorize(new, "svd", ratio=0.3)
    x = inputs = keras.Input((8, 8, 16))  # wide enough for a chain that narrows
    x = layers.Conv2D(32, 3, activation="relu", name="conv")(x)
    model = keras.Model(inputs, layers.Conv2D(32, 1, name="point")(x))
    for method in ("cp", "tucker", "svd"):
        new, _ = compress.factorize(model, method, layers="conv", ratio=0.2, verbose=0)
        _, report = compress.factorize(new, "svd", ratio=0.2, verbose=0)
        assert report.set_index("layer")["reason"].to_dict().pop("point") == ""
        assert (report["reason"] == "").sum() == 1 or method == "cp"


def test_settings_of_a_layer_are_kept_and_a_saved_network_is_the_same(tmp_path):
    options = {"kernel_regularizer": keras.regularizers.L2(1e-3), "bias_initializer": "ones", "name": "mine"}
    for layer, shape in (
        (layers.Dense(8, activation="gelu", **options), (10,)),
        (layers.Conv3D(8, 3, **options), (5, 5, 5, 10)),
    ):
        layer.trainable = False
        model, x = model_of(layer, shape=shape)
        new, _ = compress.factorize(model, "svd", ratio=0.5)
        assert new.layers[-1].name == "mine" and not any(part.trainable for part in new.layers)
        assert all(part.kernel_regularizer.l2 == pytest.approx(1e-3) for part in new.layers)
        new.save(tmp_path / "new.keras")
        assert np.allclose(outputs(keras.saving.load_model(tmp_path / "new.keras"), x), outputs(new, x))


def test_every_kind_is_read_as_a_kernel():
    assert len(KINDS) == 7
    for axes, kind in ((1, layers.Conv1DTranspose), (2, layers.Conv2DTranspose)):
        layer = kind(5, 3)
        layer.build((None, *(8,) * axes, 4))
        kernel = KernelLayer(layer)
        assert kernel.kernel_shape == (*(3,) * axes, 4, 5)
        assert np.array_equal(kernel.keras_kernel(kernel.kernels()), layer.get_weights()[0])
