"""The kinds of layers that are factorized: `fcnn_utils.layer_kinds`, through `compress.factorize`."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import calibration, compress, cost, factorizations, keras_graph
from fcnn_utils._conv_options import CONVOLUTIONS, TRANSPOSED
from fcnn_utils.layer_kinds import KINDS, KernelLayer

METHODS = list(factorizations.FACTORIZATIONS)
DENSE_CHAINS = ("tucker", "tt", "svd", "spatial")  # without depthwise layers
SIZES = (7, 6, 5)
SETTINGS = [(layers.Dense, (8,), (10,))] + [  # kind, its arguments, the shape that it reads
    (kind, (8, 3), (6,) * axes + (10,)) for kinds in (CONVOLUTIONS, TRANSPOSED) for axes, kind in kinds.items()
]


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


@pytest.mark.parametrize(
    "layer, shape",
    [
        (layers.Conv1D(12, 3, groups=3), (9, 12)),
        (layers.Conv2D(12, 1, groups=3), (4, 5, 12)),
        (layers.Conv3D(7, 2, dilation_rate=(1, 2, 1)), (*SIZES, 4)),
    ],
    ids=["grouped Conv1D", "grouped 1x1", "dilated Conv3D"],
)
def test_other_geometries_are_equal_at_full_rank(layer, shape):
    check_equal_at_full_rank(layer, shape, "svd")


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


@pytest.mark.parametrize("layer", ["conv", "grouped", "point", "up", "hidden"])
def test_images_bring_the_output_of_a_layer_nearer_for_every_kind(layer):
    model, _ = network()
    x = np.random.default_rng(1).normal(0.5, 1, (300, 20, 8)).astype("float32")
    plain, fitted = (
        compress.factorize(model, "svd", layers=layer, ratio=0.4, images=images, verbose=0)[0] for images in (None, x)
    )
    parts = [keras.Model(one.inputs, one.get_layer(layer).output) for one in (model, plain, fitted)]
    expected, *found = (outputs(part, x) for part in parts)
    errors = [np.mean((y - expected) ** 2) for y in found]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", ["svd", "tucker"])
def test_images_bring_the_outputs_nearer_for_causal_convolutions(method):
    stack = [layers.Conv1D(12, 3, padding="causal", activation="relu"), layers.Conv1D(12, 3, padding="causal")]
    model, _ = model_of(*stack, shape=(20, 8))
    x = np.random.default_rng(1).normal(0.5, 1, (300, 20, 8)).astype("float32")
    errors = []
    for images in (None, x):
        new, _ = compress.factorize(model, method, ratio=0.5, images=images, verbose=0)
        errors.append(np.mean((outputs(new, x) - outputs(model, x)) ** 2))
    assert errors[1] < 0.9 * errors[0]


def test_moments_of_patches_are_those_of_what_each_kind_computes():
    x = np.random.default_rng(0).standard_normal((40, 9, 6)).astype("float32")
    for layer in (
        layers.Conv1D(5, 3, strides=2, padding="causal"),
        layers.Conv1D(5, 4, dilation_rate=2),
        layers.Dense(5),
    ):
        model = keras.Sequential([keras.Input((9, 6)), layer])
        (node,) = keras_graph.layer_nodes(model)
        mean, covariance = calibration.patch_moments(model, node, x)
        kernel = layer.get_weights()[0].reshape(len(mean), -1)
        rows = outputs(model, x).reshape(-1, 5)
        assert np.allclose(mean @ kernel, rows.mean(axis=0), atol=1e-5)
        assert np.allclose(kernel.T @ covariance @ kernel, np.cov(rows.T, bias=True), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "method"),
    [(layers.Conv2D, {"groups": 2}, "svd"), (layers.Conv2DTranspose, {"strides": 2}, "spatial")],
)
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_mean_output_of_a_chain_that_is_not_refitted_is_that_of_the_dense_layer(kind, options, method, use_bias):
    """By the bias of its last layer, or by the mean of the batch norm behind it."""
    stack = [kind(8, 3, padding="same", use_bias=use_bias, **options), layers.BatchNormalization(name="norm")]
    model, _ = model_of(*stack, shape=(7, 8, 8))
    norm = model.get_layer("norm")
    norm.set_weights([np.abs(weight) + 0.5 for weight in norm.get_weights()])
    x = np.random.default_rng(1).normal(0.5, 1, (300, 7, 8, 8)).astype("float32")
    plain, fitted = (compress.factorize(model, method, ratio=0.3, images=each, verbose=0)[0] for each in (None, x))
    means = [outputs(each, x).mean(axis=(0, 1, 2)) for each in (model, plain, fitted)]
    assert np.abs(means[1] - means[0]).max() > 1e-2 and np.allclose(means[2], means[0], atol=1e-4)
    if use_bias:  # nothing else has changed
        assert np.array_equal(fitted.get_layer("norm").moving_mean, norm.moving_mean)


def test_a_budget_is_dealt_out_over_every_kind():
    model, _ = network()
    x = np.random.default_rng(1).normal(0.5, 1, (200, 20, 8)).astype("float32")
    dense, errors = cost.total_costs(model)["macs"], {}
    for uniform in (False, True):
        small, report = compress.factorize(model, "svd", macs=0.4 * dense, images=x, uniform=uniform, verbose=0)
        errors[uniform] = np.mean((outputs(small, x) - outputs(model, x)) ** 2)
        assert 0.35 * dense < cost.total_costs(small)["macs"] == report["macs_after"].sum() <= 0.4 * dense
    assert set(report.loc[report["reason"] == "", "layer"]) >= {"conv", "grouped", "point", "up"}
    assert errors[False] < errors[True]


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_goes_to_the_layers_whose_singular_values_fall_slowly(seed):
    """One ratio for all would waste ranks on the others."""
    (model, _), rng = network(), np.random.default_rng(seed)
    for name, fall in {"conv": 0.2, "grouped": 0.2, "point": 0.8, "up": 0.4, "hidden": 0.2, "head": 0.8}.items():
        kernel, bias = model.get_layer(name).get_weights()
        kernel = rng.normal(0, kernel.std(), kernel.shape)
        kernel = np.swapaxes(kernel, -1, -2) if name == "up" else kernel
        u, sigma, vt = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), full_matrices=False)
        kernel = (u * sigma[0] * fall ** np.arange(len(sigma)) @ vt).reshape(kernel.shape)
        model.get_layer(name).set_weights([np.swapaxes(kernel, -1, -2) if name == "up" else kernel, bias])
    x = np.random.default_rng(1).normal(0.5, 1, (200, 20, 8)).astype("float32")
    budget, errors = 0.4 * cost.total_costs(model)["macs"], {}
    for uniform in (False, True):
        small, _ = compress.factorize(model, "svd", macs=budget, images=x, uniform=uniform, verbose=0)
        errors[uniform] = np.mean((outputs(small, x) - outputs(model, x)) ** 2)
    assert errors[False] < 0.5 * errors[True]


def test_a_dense_layer_that_is_shared_by_vectors_and_sequences_is_converted():
    one, two, shared = keras.Input((10,)), keras.Input((5, 10)), layers.Dense(8, name="shared")
    model = keras.Model([one, two], [shared(one), shared(two)])
    new, report = compress.factorize(model, "svd", ranks={"shared": (8,)})
    x = [np.random.default_rng(0).standard_normal((3, *shape)).astype("float32") for shape in ((10,), (5, 10))]
    for y, z in zip(outputs_of_all(model, x), outputs_of_all(new, x), strict=True):
        assert np.allclose(y, z, atol=1e-5)
    assert cost.total_costs(new)["macs"] == report["macs_after"].sum() == 6 * (10 * 8 + 8 * 8)


def outputs_of_all(model, x):
    return [keras.ops.convert_to_numpy(y) for y in model(x, training=False)]


@pytest.mark.parametrize("point_filters, taken", [(4, True), (8, True), (12, False)])
def test_a_linear_1x1_layer_after_a_linear_convolution_is_a_factorization_if_it_widens(point_filters, taken):
    model, _ = model_of(layers.Conv2D(8, 3), layers.Conv2D(point_filters, 1), shape=(8, 8, 6))
    if taken:
        _, report = compress.factorize(model, "svd", ratio=0.6, verbose=0)
        assert report["reason"].tolist() == ["", ""]
    else:
        with pytest.raises(ValueError, match="factorized already, together with"):
            compress.factorize(model, "svd", ratio=0.6)


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
        reasons = report.set_index("layer")["reason"]
        assert reasons[reasons == ""].index.tolist() == ["point"]


@pytest.mark.parametrize("kind, arguments, shape", SETTINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_settings_of_a_layer_are_kept_and_a_saved_network_is_the_same(tmp_path, kind, arguments, shape):
    options = {"kernel_regularizer": keras.regularizers.L2(1e-3), "bias_initializer": "ones", "activation": "gelu"}
    layer = kind(*arguments, **options, name="mine")
    layer.trainable = False
    new = check_equal_at_full_rank(layer, shape, "svd")
    last = new.layers[-1]
    assert last.name == "mine" and not any(part.trainable for part in new.layers)
    assert all(part.kernel_regularizer.l2 == pytest.approx(1e-3) for part in new.layers)
    assert isinstance(last.bias_initializer, keras.initializers.Ones) and last.activation is keras.activations.gelu
    new.save(tmp_path / "new.keras")
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype("float32")
    assert np.allclose(outputs(keras.saving.load_model(tmp_path / "new.keras"), x), outputs(new, x))


@pytest.mark.parametrize("kind, arguments, shape", SETTINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_mixed_precision_is_kept(kind, arguments, shape):
    model, _ = model_of(kind(*arguments, dtype="mixed_bfloat16", name="mine"), shape=shape)
    x = np.random.default_rng(1).normal(0.5, 1, (100, *shape)).astype("float32")
    new, _ = compress.factorize(model, "svd", ratio=0.6, images=x, verbose=0)
    assert {part.dtype_policy.name for part in new.layers} == {"mixed_bfloat16"}
    assert {weight.dtype for weight in new.weights} == {"float32"}


@pytest.mark.parametrize("kind, arguments, shape", SETTINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_kind_is_read_as_a_kernel(kind, arguments, shape):
    layer = kind(*arguments)
    layer.build((None, *shape))
    read, weight = KernelLayer(layer), layer.get_weights()[0]
    (kernel,) = read.kernels()
    assert kernel.shape == read.kernel_shape == (*(3,) * (len(shape) - 1), shape[-1], arguments[0])
    place = (0,) * (len(shape) - 1)
    assert kernel[(*place, 1, 2)] == weight[(*place, 2, 1) if "Transpose" in kind.__name__ else (*place, 1, 2)]
    assert np.array_equal(read.keras_kernel([kernel]), weight)


def test_all_kinds_are_tested():
    assert {kind for kind, _, _ in SETTINGS} | {layers.EinsumDense} == set(KINDS)  # see test_einsum.py
