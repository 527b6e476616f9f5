"""Costs of networks: `fcnn_utils.cost`, against loops that count, layers that add up ones, TensorFlow's profiler."""

import itertools
import math

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import cost
from fcnn_utils.course import networks

SUMMED = ["params", "trainable", "macs", "other_ops", "activation_bytes"]
PADDINGS = ["same", "valid"]


def network(*stack, shape=(6, 7, 4)):
    """A model of `stack`, on images so small that the loops below can visit all its multiplications."""
    return keras.Sequential([keras.Input(shape), *stack])


def first_row(layer, shape=(6, 7, 4)):
    return cost.layer_costs(network(layer, shape=shape)).iloc[0]


def positions(size, kernel, stride, dilation, padding):
    """Count the positions of a kernel along one axis by visiting them."""
    count = 0
    for start in range(0, size, stride):
        if padding == "same" or start + (kernel - 1) * dilation < size:
            count += 1
    return count


def multiplications(shape, filters, kernel, strides, dilation, padding, groups):
    """Count a convolution's MACs one by one: position by position, filter by filter, weight by weight."""
    rows, columns = (positions(*axis, dilation, padding) for axis in zip(shape[:2], kernel, strides, strict=True))
    count = 0
    for _position in itertools.product(range(rows), range(columns)):
        for filter_ in range(filters):
            group = filter_ * groups // filters
            for _cell in itertools.product(range(kernel[0]), range(kernel[1])):
                count += sum(channel * groups // shape[2] == group for channel in range(shape[2]))
    return count, (rows, columns)


# --- the table ---------------------------------------------------------------------------------------------------


def test_the_columns_and_the_total_row():
    model = network(layers.Conv2D(5, 3), layers.BatchNormalization(), layers.Flatten(), layers.Dense(3))
    table = cost.layer_costs(model)
    assert table.columns.tolist() == cost.COLUMNS
    assert table["layer"].tolist() == [*(layer.name for layer in model.layers), "total"]
    assert table["kind"].tolist() == ["Conv2D", "BatchNormalization", "Flatten", "Dense", ""]
    assert table["output_shape"].tolist() == [(4, 5, 5), (4, 5, 5), (100,), (3,), (3,)]
    for column in SUMMED:
        assert table[column].iloc[-1] == table[column].iloc[:-1].sum() > 0
    assert cost.total_costs(model) == {column: table[column].iloc[-1] for column in SUMMED}
    assert all(type(value) is int for value in cost.total_costs(model).values())


def test_parameters_are_counted_as_keras_counts_them():
    frozen = layers.Conv2D(5, 3)
    frozen.trainable = False
    model = network(frozen, layers.BatchNormalization(), layers.DepthwiseConv2D(2), layers.Flatten(), layers.Dense(3))
    table = cost.layer_costs(model)
    assert table["params"].iloc[:-1].tolist() == [layer.count_params() for layer in model.layers]
    assert table["trainable"].tolist() == [0, 10, 25, 0, 183, 218]
    assert table["params"].iloc[-1] == model.count_params()


class Doubled(layers.Layer):
    """A user's layer with a weight."""

    def build(self, shape):
        self.factor = self.add_weight(shape=())

    def call(self, inputs):
        return self.factor * inputs


# --- layers and functions of other kinds --------------------------------------------------------------------------


def dense_of_heads(x):
    return layers.MultiHeadAttention(2, 5)(x, x)


@pytest.mark.parametrize(
    ("apply", "shape", "macs"),
    [
        (layers.Conv1D(3, 2), (6, 4), 5 * 2 * 4 * 3),
        (layers.DepthwiseConv1D(2), (6, 4), 5 * 2 * 4),
        (layers.SeparableConv1D(3, 2), (6, 4), 5 * (2 * 4 + 4 * 3)),
        (layers.Conv3D(3, 2), (4, 4, 4, 2), 27 * 8 * 2 * 3),
        (layers.Conv1DTranspose(3, 2, strides=2), (6, 4), 6 * 2 * 4 * 3),  # each value read meets each weight
        (layers.Conv2DTranspose(3, 2, strides=2), (6, 7, 4), 42 * 4 * 4 * 3),
        (layers.Conv3DTranspose(3, 2), (4, 4, 4, 2), 64 * 8 * 2 * 3),
        (layers.EinsumDense("abc,ce->abe", (6, 5)), (6, 4), 6 * 4 * 5),
        (layers.SimpleRNN(3), (6, 4), 6 * (4 * 3 + 3 * 3)),
        (layers.LSTM(3), (6, 4), 6 * 4 * (4 * 3 + 3 * 3)),
        (layers.GRU(3, return_sequences=True), (6, 4), 6 * 3 * (4 * 3 + 3 * 3)),
        (layers.Bidirectional(layers.LSTM(3)), (6, 4), 2 * 6 * 4 * (4 * 3 + 3 * 3)),
        (layers.ConvLSTM2D(3, 2), (5, 6, 7, 4), 5 * (5 * 6) * 4 * (4 * 4 * 3 + 4 * 3 * 3)),
        (layers.ConvLSTM1D(3, 2, return_sequences=True), (5, 6, 4), 5 * 5 * 4 * (2 * 4 * 3 + 2 * 3 * 3)),
        (layers.TimeDistributed(layers.Conv2D(3, 2)), (5, 6, 7, 4), 5 * (5 * 6) * 4 * 4 * 3),
        (layers.SpectralNormalization(layers.Conv2D(3, 2)), (6, 7, 4), (5 * 6) * 4 * 4 * 3),
        (dense_of_heads, (6, 4), 3 * 6 * 4 * 10 + 2 * 2 * 6 * 6 * 5 + 6 * 10 * 4),
        (lambda x: layers.GroupQueryAttention(5, 4, 2)(x, x), (6, 4), 6 * 4 * (20 + 10 + 10 + 20) + 2 * 4 * 6 * 6 * 5),
        (lambda x: layers.Attention()([x, x]), (6, 4), 2 * 6 * 6 * 4),
        (lambda x: layers.Dot(axes=2)([x, x]), (6, 4), 6 * 6 * 4),
        (lambda x: keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1))), (6, 4), 6 * 6 * 4),
        (lambda x: keras.ops.einsum("bij,bkj->bik", x, x), (6, 4), 6 * 6 * 4),
        (lambda x: keras.ops.einsum("...j,jk->...k", x, np.ones((4, 3), "float32")), (6, 4), 6 * 4 * 3),
        (lambda x: keras.ops.tensordot(x, np.ones((4, 3), "float32"), axes=1), (6, 4), 6 * 4 * 3),
        (lambda x: keras.ops.dot(x, np.ones((4, 3), "float32")), (6, 4), 6 * 4 * 3),
        (lambda x: keras.ops.conv(x, np.ones((2, 2, 4, 3), "float32")), (6, 7, 4), 5 * 6 * 4 * 4 * 3),
        (lambda x: keras.ops.conv_transpose(x, np.ones((2, 2, 3, 4), "float32"), 2), (6, 7, 4), 42 * 4 * 4 * 3),
    ],
)
def test_macs_counted_by_hand(apply, shape, macs):
    x = keras.Input(shape)
    model = keras.Model(x, apply(x))
    assert cost.total_costs(model)["macs"] == macs
    assert cost.total_costs(model)["params"] == model.count_params()


class Projected(layers.Layer):
    """A layer of one's own with a convolution, a matrix and functions inside."""

    def build(self, shape):
        self.conv, self.matrix = layers.Conv2D(3, 3), self.add_weight(shape=(3, 2), name="matrix")
        self.conv.build(shape)

    def call(self, x):
        return keras.ops.relu(keras.ops.matmul(self.conv(x), self.matrix))


class Opaque(layers.Layer):
    """A layer that computes outside of Keras."""

    def build(self, shape):
        self.matrix = self.add_weight(shape=(shape[-1], 2), name="matrix")

    def call(self, x):
        return keras.ops.convert_to_tensor(np.asarray(x) @ np.asarray(self.matrix))

    def compute_output_shape(self, shape):
        return (*shape[:-1], 2)


def test_a_layer_of_ones_own_costs_what_its_call_is_made_of():
    model = network(Projected(name="own"))
    assert first_row(model.layers[0])["macs"] == 4 * 5 * (9 * 4 * 3 + 3 * 2)
    assert cost.layer_costs(model)["macs"].iloc[0] == 4 * 5 * (9 * 4 * 3 + 3 * 2)  # again: counting leaves no trace


def test_what_cannot_be_counted_is_named():
    model = network(layers.Conv2D(5, 3), Opaque(name="opaque"))
    with pytest.warns(UserWarning, match="the MACs of opaque are not known"):
        table = cost.layer_costs(model)
    assert np.isnan(table["macs"].iloc[1]) and table["macs"].iloc[2] == 4 * 5 * 9 * 4 * 5
    assert table["params"].iloc[1] == 5 * 2


def test_a_model_of_functions_only_has_costs():
    x = keras.Input((6, 4))
    model = keras.Model(x, keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1))) + 1.0)
    table = cost.layer_costs(model)
    assert table["macs"].iloc[-1] == 6 * 6 * 4 and table["other_ops"].iloc[-1] == 6 * 6
    assert table["output_shape"].iloc[-1] == (6, 6)


def test_a_layer_called_twice_has_two_rows_and_its_parameters_once():
    inputs, shared = keras.Input((6, 7, 4)), layers.Conv2D(4, 3, padding="same", name="shared")
    model = keras.Model(inputs, shared(layers.MaxPooling2D(2, strides=1)(shared(inputs))))
    rows = cost.layer_costs(model).query("layer == 'shared'")
    assert rows["macs"].tolist() == [6 * 7 * 9 * 16, 5 * 6 * 9 * 16]  # in the order of the model
    assert rows["params"].tolist() == [9 * 16 + 4, 0] and cost.total_costs(model)["params"] == 9 * 16 + 4


def test_a_pooling_layer_called_twice_reads_two_sizes():
    inputs, pool = keras.Input((6, 7, 4)), layers.GlobalAveragePooling2D()
    table = cost.layer_costs(keras.Model(inputs, [pool(inputs), pool(layers.MaxPooling2D(2)(inputs))]))
    assert sorted(table[table["kind"] == "GlobalAveragePooling2D"]["other_ops"]) == [3 * 3 * 4, 6 * 7 * 4]


def test_a_nested_model_costs_as_its_layers_for_each_call():
    stack = [layers.Conv2D(4, 3, padding="same", name="first"), layers.BatchNormalization(name="second")]
    inner = network(*stack)
    inputs = keras.Input((6, 7, 4))
    model = keras.Model(inputs, layers.Conv2D(3, 1, name="third")(inner(inner(inputs))))
    assert cost.layer_costs(model)["layer"].tolist() == ["first", "second"] * 2 + ["third", "total"]
    once, twice = cost.total_costs(network(*stack, layers.Conv2D(3, 1))), cost.total_costs(model)
    for key in ("macs", "other_ops", "activation_bytes"):
        assert twice[key] - once[key] == cost.total_costs(inner)[key] > 0
    assert twice["params"] == once["params"]


@pytest.mark.parametrize("bad", [None, layers.Dense(3), keras.Sequential([layers.Dense(3)])], ids=str)
def test_what_is_not_a_built_model_is_rejected(bad):
    with pytest.raises(ValueError, match=f"built keras.Model; got {type(bad).__name__}|'sequential.*' is not built"):
        cost.layer_costs(bad)


def test_a_model_on_images_of_any_size_is_rejected():
    with pytest.raises(ValueError, match="build the model with a fixed input size"):
        cost.layer_costs(network(layers.Conv2D(3, 3), shape=(None, None, 3)))


# --- MACs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "shape, kernel_size, strides, dilation, groups",
    [
        ((6, 7, 4), (3, 3), (1, 1), 1, 1),
        ((6, 7, 4), (3, 3), (2, 2), 1, 2),
        ((9, 5, 2), (1, 3), (1, 2), 1, 1),
        ((9, 5, 2), (2, 1), (2, 2), 1, 2),
        ((9, 5, 2), (3, 3), (1, 1), 2, 1),
        ((6, 7, 4), (2, 1), (1, 1), 2, 2),
    ],
)
def test_a_convolution_counts_as_a_loop_counts(shape, kernel_size, strides, dilation, groups, padding):
    options = {"strides": strides, "dilation_rate": dilation, "groups": groups, "padding": padding}
    found = first_row(layers.Conv2D(6, kernel_size, **options), shape)
    macs, size = multiplications(shape, 6, kernel_size, strides, dilation, padding, groups)
    assert found["output_shape"] == (*size, 6)
    assert found["macs"] == macs
    assert found["params"] == math.prod(kernel_size) * shape[2] // groups * 6 + 6
    assert cost.convolution_macs(size, (*kernel_size, shape[2] // groups, 6)) == macs


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("strides, dilation, multiplier", [(1, 1, 1), (2, 1, 2), (1, 2, 2)])
def test_depthwise_and_separable_convolutions_count_as_loops_count(strides, dilation, multiplier, padding):
    """Each channel is a group with `multiplier` filters; the separable layer mixes the channels after that."""
    shape, between = (9, 7, 3), 3 * multiplier
    options = {"strides": strides, "dilation_rate": dilation, "padding": padding, "depth_multiplier": multiplier}
    depthwise, size = multiplications(shape, between, (3, 2), [strides] * 2, dilation, padding, groups=3)
    pointwise, _ = multiplications((*size, between), 5, (1, 1), (1, 1), 1, "valid", 1)
    found = first_row(layers.DepthwiseConv2D((3, 2), **options), shape)
    assert (found["macs"], found["output_shape"]) == (depthwise, (*size, between))
    found = first_row(layers.SeparableConv2D(5, (3, 2), **options), shape)
    assert (found["macs"], found["output_shape"]) == (depthwise + pointwise, (*size, 5))
    assert found["params"] == 6 * between + between * 5 + 5


@pytest.mark.parametrize("shape, expected", [((12,), 12 * 5), ((3, 12), 3 * 12 * 5), ((2, 3, 12), 6 * 12 * 5)])
def test_a_dense_layer_counts_at_every_position(shape, expected):
    assert first_row(layers.Dense(5), shape)["macs"] == expected


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv2D(5, (2, 3), strides=2, use_bias=False),
        layers.Conv2D(5, 3, dilation_rate=2, use_bias=False),
        layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False),
        layers.Dense(5, use_bias=False),
    ],
    ids=lambda layer: layer.name,
)
def test_ones_times_ones_add_up_to_the_macs(layer):
    """With all inputs and weights 1 and no border, each MAC adds 1 to the sum of the outputs."""
    model = network(layer, shape=(9, 8, 4))
    layer.set_weights([np.ones_like(weight) for weight in layer.get_weights()])
    outputs = keras.ops.convert_to_numpy(model(np.ones((1, 9, 8, 4), "float32")))
    assert cost.total_costs(model)["macs"] == outputs.astype("float64").sum()


# --- other operations and bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, expected",
    [
        (layers.Conv2D(5, 3, use_bias=False), 0),
        (layers.Conv2D(5, 3), 4 * 6 * 5),
        (layers.Conv2D(5, 3, activation="relu"), 2 * 4 * 6 * 5),
        (layers.Conv2D(5, 3, activation="linear", use_bias=False), 0),
        (layers.DepthwiseConv2D(3), 4 * 6 * 4),
        (layers.SeparableConv2D(5, 3, activation="relu"), 2 * 4 * 6 * 5),
        (layers.Dense(5, activation="softmax"), 2 * 6 * 8 * 5),
        (layers.BatchNormalization(), 2 * 6 * 8 * 4),
        (layers.Rescaling(1 / 255), 2 * 6 * 8 * 4),
        (layers.ReLU(), 6 * 8 * 4),
        (layers.Activation("relu"), 6 * 8 * 4),
        (layers.Softmax(), 6 * 8 * 4),
        (layers.MaxPooling2D(2), 6 * 8 * 4),  # each value is read once
        (layers.AveragePooling2D((2, 3), strides=1), 5 * 6 * 4 * 6),
        (layers.GlobalMaxPooling2D(), 6 * 8 * 4),
        (layers.Flatten(), 0),
        (layers.Dropout(0.5), 0),
        (layers.ZeroPadding2D(1), 0),
    ],
    ids=lambda value: value.name if isinstance(value, layers.Layer) else "",
)
def test_operations_that_are_not_macs(layer, expected):
    found = first_row(layer, (6, 8, 4))
    assert found["other_ops"] == expected
    if not isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D, layers.Dense)):
        assert found["macs"] == 0


@pytest.mark.parametrize("merge, count", [(layers.Add, 2), (layers.Add, 3), (layers.Multiply, 2), (layers.Average, 3)])
def test_a_merge_takes_one_operation_less_than_it_has_inputs(merge, count):
    inputs = [keras.Input((6, 7, 4)) for _ in range(count)]
    table = cost.layer_costs(keras.Model(inputs, merge()(inputs)))
    assert table["other_ops"].iloc[-1] == (count - 1) * 6 * 7 * 4
    assert table["activation_bytes"].iloc[-1] == 4 * 6 * 7 * 4  # the inputs are no outputs of a layer


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("mixed_bfloat16", 2), ("mixed_float16", 2)])
def test_the_precision_changes_the_bytes_and_nothing_else(dtype, size):
    def model(dtype):
        stack = [layers.Conv2D(5, 3, name="a", dtype=dtype), layers.BatchNormalization(name="b", dtype=dtype)]
        return network(*stack, layers.GlobalAveragePooling2D(name="c", dtype="float32"))

    table, single = cost.layer_costs(model(dtype)), cost.layer_costs(model("float32"))
    assert table["activation_bytes"].tolist() == [4 * 5 * 5 * size, 4 * 5 * 5 * size, 5 * 4, 2 * 4 * 5 * 5 * size + 20]
    assert table.drop(columns="activation_bytes").equals(single.drop(columns="activation_bytes"))


# --- whole networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["by add", "loaded"])
def test_a_network_costs_the_same_however_it_was_made(tmp_path, way):
    stack = [layers.Conv2D(5, 3), layers.BatchNormalization(), layers.Flatten(), layers.Dense(2)]
    expected = network(*stack)
    if way == "by add":
        model = keras.Sequential()
        for layer in (keras.Input((6, 7, 4)), *stack):
            model.add(layer)
    else:
        expected.save(tmp_path / "network.keras")
        model = keras.saving.load_model(tmp_path / "network.keras")
    assert cost.total_costs(model) == cost.total_costs(expected)
    assert cost.total_costs(model)["macs"] == 4 * 5 * 5 * 9 * 4 + 100 * 2


def profiled_macs(model):
    """MACs by TensorFlow's own profiler: half of the operations of its convolutions and matrix products."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("TensorFlow's profiler needs the TensorFlow backend")
    import tensorflow as tf

    profiler = tf.compat.v1.profiler
    images = tf.TensorSpec((1, *model.input_shape[1:]), "float32")
    graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(images).graph
    options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
    node = profiler.profile(graph, cmd="op", options=options.with_empty_output().build())
    operations = {}
    while node.children:  # a chain with one node for each kind of operation
        node = node.children[0]
        operations[node.name] = node.float_ops
    assert "Conv2D" in operations
    return sum(operations.get(kind, 0) for kind in ("Conv2D", "DepthwiseConv2dNative", "MatMul")) / 2


@pytest.mark.parametrize("name", networks.THESIS_PLANS)
def test_the_courses_networks_cost_what_tensorflow_counts(name):
    model = networks.build(name, width=0.25)
    assert cost.total_costs(model)["macs"] == profiled_macs(model)


def test_a_network_of_keras_costs_what_tensorflow_counts():
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), alpha=0.35)
    assert cost.total_costs(model)["macs"] == profiled_macs(model)
    assert cost.total_costs(model)["params"] == model.count_params()
