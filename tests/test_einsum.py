"""EinsumDense layers whose equation is a product with one matrix: read, factorized, counted, refitted."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import _einsum, calibration, compress, cost, factorizations, keras_graph
from fcnn_utils.layer_kinds import KernelLayer

# equation, shape of the input, output_shape, bias_axes, (S, T), positions
EQUATIONS = [
    ("ab,bc->ac", (8,), (7,), "c", (8, 7), 1),
    ("abc,cd->abd", (5, 8), (None, 7), "d", (8, 7), 5),
    ("abc,cd->abd", (5, 8), (5, 7), "bd", (8, 7), 5),
    ("abc,cde->abde", (5, 8), (None, 3, 4), "de", (8, 12), 5),
    ("abc,dce->abed", (5, 8), (None, 4, 3), "ed", (8, 12), 5),
    ("abc,cde->abde", (5, 8), (5, 3, 4), "e", (8, 12), 5),
    ("abde,dec->abc", (5, 3, 4), (5, 9), "c", (12, 9), 5),
    ("abde,ecd->abc", (5, 3, 4), (None, 9), "c", (12, 9), 5),
    ("abc,bd->adc", (6, 5), (7, 5), "d", (6, 7), 5),
    ("abcd,bde->ace", (5, 3, 4), (3, 9), "e", (20, 9), 3),
    ("abcd,cre->aebrd", (2, 6, 3), (5, 2, 4, 3), "er", (6, 20), 6),
    ("...x,xy->...y", (5, 6, 8), 7, "y", (8, 7), 30),
    ("ab...,bc->ac...", (6, 5), (7,), "c", (6, 7), 5),
]
IDS = [f"{equation}, bias {bias}" for equation, _, _, bias, _, _ in EQUATIONS]
IN_PART = [  # the usual tests have four of them
    pytest.param(*row, id=name, marks=[] if number in (2, 3, 6, 9) else pytest.mark.full)
    for number, (row, name) in enumerate(zip(EQUATIONS, IDS, strict=True))
]


def randomized(model, seed=0):
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        layer.set_weights([rng.uniform(0.1, 0.5, weight.shape) for weight in layer.weights])
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, 0.3, weight.shape))
    return model


def model_of(*stack, shape):
    return randomized(keras.Sequential([keras.Input(shape), *stack]))


def inputs_of(shape, count=3):
    return np.random.default_rng(1).normal(0.5, 1, (count, *shape)).astype("float32")


def outputs(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("equation, shape, output_shape, bias_axes, matrix, positions", EQUATIONS, ids=IDS)
# parameters: of a row of the table
def test_einsum_layers_are_equal_at_full_rank(
    equation, shape, output_shape, bias_axes, matrix, positions, has_bias, tmp_path
):
    layer = layers.EinsumDense(equation, output_shape, bias_axes=bias_axes if has_bias else None, activation="tanh")
    layer.name = "mine"
    model, x = model_of(layer, shape=shape), inputs_of(shape)
    assert KernelLayer(layer).kernel_shape == matrix
    (rank,) = factorizations.SVD.max_ranks(matrix)
    new, report = compress.factorize(model, "svd", ranks={"mine": rank})
    expected = outputs(model, x)
    assert np.abs(outputs(new, x) - expected).max() < 1e-5 * np.abs(expected).max()
    assert [type(part) for part in new.layers] == [layers.EinsumDense] * 2 and new.layers[1].name == "mine"
    (row,) = report.to_dict("records")
    assert row["macs_before"] == cost.total_costs(model)["macs"] == positions * matrix[0] * matrix[1]
    assert row["macs_after"] == cost.total_costs(new)["macs"] == positions * rank * sum(matrix)
    assert row["params_before"] == model.count_params() and row["params_after"] == new.count_params()
    new.save(tmp_path / "new.keras")
    assert np.array_equal(outputs(keras.saving.load_model(tmp_path / "new.keras"), x), outputs(new, x))


@pytest.mark.parametrize("equation, shape, output_shape, bias_axes, matrix, positions", EQUATIONS, ids=IDS)
def test_an_equation_is_a_product_of_rows_with_a_matrix(equation, shape, output_shape, bias_axes, matrix, positions):
    layer = layers.EinsumDense(equation, output_shape)
    layer.build((None, *shape))
    rng, read = np.random.default_rng(0), _einsum.EinsumMatrix.of(equation)
    kernel, x = rng.standard_normal(layer.kernel.shape), rng.standard_normal((2, *shape))
    y = np.einsum(equation, x, kernel)
    rows = read._channels_last(y, read.writes, read.output_axes(y.ndim))
    assert np.allclose(read.input_rows(x) @ read.to_matrix(kernel), rows)
    assert np.array_equal(read.to_kernel(read.to_matrix(kernel), kernel.shape), kernel)
    assert read.output_shape((None, *shape), kernel.shape) == (None, *y.shape[1:])


@pytest.mark.parametrize(
    "equation, shape, output_shape, reason",
    [
        ("abc,bcd->abd", (5, 8), (5, 7), "has another kernel for each position along b"),
        ("abc,cd->ad", (5, 8), (7,), "sums over an axis that the kernel does not have"),
        ("abcd,cd->ab", (9, 4, 5), (9,), "contracts no axis, or makes none"),
        ("abc,d->abcd", (3, 4), (3, 4, 5), "contracts no axis, or makes none"),
    ],
)
def test_other_equations_are_left_with_the_reason(equation, shape, output_shape, reason):
    stack = [layers.EinsumDense(equation, output_shape, name="mine"), layers.Flatten(), layers.Dense(6, name="head")]
    model = model_of(*stack, shape=shape)
    _, report = compress.factorize(model, "svd", ratio=0.9)
    assert report.set_index("layer")["reason"].to_dict() == {"mine": f"its equation {equation!r} {reason}", "head": ""}
    with pytest.raises(ValueError, match=f"layer 'mine' can't be factorized: its equation .* {reason}"):
        compress.factorize(model, "svd", layers="mine", ratio=0.9)


@pytest.mark.parametrize("equation", ["aab,bc->aac", "abc,cd->dba", "ab...,bc->...ac", "ab,cd,bc->ad"])
def test_equations_that_keras_does_not_compute_are_refused(equation):
    with pytest.raises(ValueError, match="its equation "):
        _einsum.EinsumMatrix.of(equation)


def test_quantized_layers_and_those_with_a_lora_are_left():
    for change in (lambda model: model.layers[0].enable_lora(2), lambda model: model.quantize("int8")):
        model = model_of(layers.EinsumDense("abc,cd->abd", (5, 16)), shape=(5, 16))
        change(model)
        with pytest.raises(ValueError, match="its weights are quantized or have a LoRA"):
            compress.factorize(model, "svd", ratio=0.5)
    with pytest.raises(ValueError, match="dense: only svd factorizes it"):
        compress.factorize(model_of(layers.EinsumDense("ab,bc->ac", 8), shape=(8,)), "tucker", ratio=0.5)


def transformer():
    """Three blocks of EinsumDense layers, which map channels, positions and channels again, and a head."""
    x = inputs = keras.Input((6, 16))
    for number, positions in ((1, 6), (2, None)):  # with None Keras takes the size from the input
        y = layers.EinsumDense("abc,cde->abde", (positions, 4, 8), bias_axes="de", name=f"up{number}")(x)
        y = layers.EinsumDense("abde,dec->abc", (positions, 16), name=f"down{number}")(layers.ReLU()(y))
        x = layers.LayerNormalization()(layers.Add()([x, y]))
        if number == 1:
            x = layers.EinsumDense("abc,bd->adc", (8, 16), bias_axes="d", activation="relu", name="tokens")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return randomized(keras.Model(inputs, layers.Dense(10, activation="softmax", name="head")(x)))


def test_a_budget_is_met_with_and_without_images():
    model, x = transformer(), inputs_of((6, 16), 200)
    dense = 2 * (6 + 8) * 16 * 32 + 16 * 6 * 8 + 16 * 10
    assert cost.total_costs(model)["macs"] == dense
    errors = []
    for options in ({"images": x}, {"images": x, "uniform": True}, {}):
        small, report = compress.factorize(model, "svd", macs=0.5 * dense, verbose=0, **options)
        assert 0.45 * dense < cost.total_costs(small)["macs"] == report["macs_after"].sum() <= 0.5 * dense
        assert len({"up1", "down1", "up2", "down2"} & set(report.loc[report["reason"] == "", "layer"])) >= 3
        errors.append(np.mean((outputs(small, x) - outputs(model, x)) ** 2))
    assert max(errors[:2]) < errors[2], errors


@pytest.mark.parametrize("equation, shape, output_shape, bias_axes, matrix, positions", IN_PART)
def test_images_bring_the_output_of_a_layer_nearer(equation, shape, output_shape, bias_axes, matrix, positions):
    x, axes = inputs_of(shape, 300), _einsum.EinsumMatrix.of(equation).input_axes(len(shape) + 1)
    sizes = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    x *= np.linspace(0, 2, np.prod(sizes)).reshape(sizes)  # unlike in size, so that a fit to them is another one
    for bias in (bias_axes, None):
        layer = layers.EinsumDense(equation, output_shape, bias_axes=bias, name="mine")
        model = model_of(layer, shape=shape)
        small = [compress.factorize(model, "svd", ratio=0.6, images=images, verbose=0)[0] for images in (None, x)]
        errors = [np.mean((outputs(one, x) - outputs(model, x)) ** 2) for one in small]
        if KernelLayer(layer).has_patches:
            assert errors[1] < 0.9 * errors[0]
        else:  # the bias can't correct the mean of each column of the matrix
            assert bias in ("bd", "e") and errors[1] == errors[0]


def test_a_batch_norm_behind_takes_the_shift_of_the_mean_only_along_its_axis():
    for equation, output_shape in (("abc,cd->abd", (5, 12)), ("abc,cde->abde", (5, 3, 4)), ("abc,bd->adc", (12, 8))):
        stack = [layers.EinsumDense(equation, output_shape, name="mine"), layers.BatchNormalization()]
        model, x = model_of(*stack, shape=(5, 8)), inputs_of((5, 8), 300)
        x *= np.linspace(0, 2, 8) if "cd" in equation else np.linspace(0, 2, 5)[:, None]
        plain, fitted = (
            compress.factorize(model, "svd", ratio=0.5, images=images, verbose=0)[0] for images in (None, x)
        )
        errors = [np.mean((outputs(one, x) - outputs(model, x)) ** 2) for one in (plain, fitted)]
        assert errors[1] < 0.9 * errors[0]
        means = [one.layers[-1].get_weights()[-2] for one in (plain, fitted)]
        assert np.array_equal(*means) == (equation != "abc,cd->abd")


def test_moments_are_those_of_what_the_layer_computes():
    model, x = model_of(layers.EinsumDense("abcd,bde->ace", (3, 9)), shape=(5, 3, 4)), inputs_of((5, 3, 4), 40)
    (node,) = keras_graph.layer_nodes(model)
    mean, covariance = calibration.patch_moments(model, node, x)
    matrix, rows = KernelLayer(node.layer).kernels()[0], outputs(model, x).reshape(-1, 9)
    assert np.allclose(mean @ matrix, rows.mean(axis=0), atol=1e-5)
    assert np.allclose(matrix.T @ covariance @ matrix, np.cov(rows.T, bias=True), atol=1e-4)


def test_a_layer_that_is_called_with_several_sizes_is_converted():
    one, two = keras.Input((3, 8)), keras.Input((7, 8))
    shared = layers.EinsumDense("abc,cde->abde", (None, 3, 4), bias_axes="de", name="shared")
    model = randomized(keras.Model([one, two], [shared(one), shared(two)]))
    new, report = compress.factorize(model, "svd", ranks={"shared": 8})
    x = [inputs_of((3, 8)), inputs_of((7, 8))]
    for y, z in zip(model(x), new(x), strict=True):
        assert np.allclose(keras.ops.convert_to_numpy(y), keras.ops.convert_to_numpy(z), atol=1e-5)
    assert report["macs_after"].tolist() == [10 * 8 * (8 + 12)]


def test_a_chain_is_not_factorized_again_but_layers_along_other_axes_are():
    small, _ = compress.factorize(transformer(), "svd", ratio=0.35, verbose=0)
    with pytest.raises(ValueError, match="factorized already, together with"):
        compress.factorize(small, "svd", ratio=0.35)
    mixer = [
        layers.EinsumDense("abc,bd->adc", (4, 9), name="tokens"),
        layers.EinsumDense("abc,cd->abd", (4, 18), name="channels"),
    ]
    _, report = compress.factorize(model_of(*mixer, shape=(8, 9)), "svd", ratio=0.8)
    assert report["reason"].tolist() == ["", ""]


def test_settings_are_kept_and_an_initializer_for_the_dense_kernel_is_not():
    starts = keras.initializers.GlorotUniform(input_axes=[0], output_axes=[1, 2])
    layer = layers.EinsumDense(
        "abc,cde->abde",
        (5, 3, 4),
        bias_axes="de",
        activation="gelu",
        kernel_initializer=starts,
        kernel_regularizer=keras.regularizers.L2(1e-3),
        bias_constraint="non_neg",
        name="mine",
        dtype="mixed_bfloat16",
    )
    new, _ = compress.factorize(model_of(layer, shape=(5, 8)), "svd", ratio=0.9)
    first, last = new.layers
    assert first.bias is None and keras_graph.has_linear_activation(first)
    assert last.activation is keras.activations.gelu and last.bias_axes == "de" and last.bias_constraint is not None
    for part in (first, last):
        assert part.kernel_regularizer.l2 == pytest.approx(1e-3) and part.dtype_policy.name == "mixed_bfloat16"
        assert part.kernel_initializer.input_axes is None


def test_attention_layers_are_left_with_the_reason():
    x = inputs = keras.Input((6, 16))
    x = layers.MultiHeadAttention(2, 8, name="many")(x, x)
    x = layers.GroupQueryAttention(4, 2, 1, name="grouped")(x, x)
    model = keras.Model(inputs, layers.Dense(16, name="head")(x))
    _, report = compress.factorize(model, "svd", ratio=0.5)
    reasons = report.set_index("layer")["reason"]
    assert reasons["head"] == ""
    assert (reasons[["many", "grouped"]].str.contains("makes its projections itself: no chain can take")).all()
