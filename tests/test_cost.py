"""What a network costs: `fcnn_utils.cost`, against loops that count, layers that add up ones, TensorFlow's profiler."""

import itertools
import math

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import cost
from fcnn_utils.course import networks

SUMMED = ["params", "trainable", "macs", "other_ops", "activation_bytes"]


def network(*stack, shape=(6, 7, 4)):
    """A model of `stack` on images of `shape`: small, as every loop below goes over all its multiplications."""
    return keras.Sequential([keras.Input(shape), *stack])


def row(model, at=0):
    return cost.layer_costs(model).iloc[at]


def positions(size, kernel, stride, dilation, padding):
    """Number of places along one axis where a kernel is laid, by going along."""
    count = 0
    for start in range(0, size, stride):
        if padding == "same" or start + (kernel - 1) * dilation < size:
            count += 1
    return count


def multiplications(shape, filters, kernel, strides, dilation, padding, groups):
    """MACs of a convolution: one by one, position by position, filter by filter, weight by weight."""
    rows, columns = (positions(*axis, padding) for axis in zip(shape[:2], kernel, strides, dilation, strict=True))
    count = 0
    for _position in itertools.product(range(rows), range(columns)):
        for filter_ in range(filters):
            group = filter_ * groups // filters
            for _cell in itertools.product(range(kernel[0]), range(kernel[1])):
                count += sum(channel * groups // shape[2] == group for channel in range(shape[2]))
    return count, (rows, columns)


CONVOLUTIONS = [
    pytest.param(options, id="-".join(map(str, options.values())).replace(" ", ""))
    for values in itertools.product(
        [(6, 7, 4), (9, 5, 2)], [(3, 3), (1, 3), (2, 1)], [(1, 1), (2, 2), (1, 2)], [1, 2], ["same", "valid"], [1, 2]
    )
    for options in [
        dict(zip(("shape", "kernel_size", "strides", "dilation_rate", "padding", "groups"), values, strict=True))
    ]
    if options["dilation_rate"] == 1 or options["strides"] == (1, 1)  # Keras refuses both together
]


# --- basic -------------------------------------------------------------------------------------------------------


def test_the_columns_and_the_total():
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


def test_weights_are_counted_as_keras_counts_them():
    frozen = layers.Conv2D(5, 3)
    frozen.trainable = False
    model = network(frozen, layers.BatchNormalization(), layers.DepthwiseConv2D(2), layers.Flatten(), layers.Dense(3))
    table = cost.layer_costs(model)
    assert table["params"].iloc[:-1].tolist() == [layer.count_params() for layer in model.layers]
    assert table["trainable"].tolist() == [0, 10, 25, 0, 183, 218]
    assert table["params"].iloc[-1] == model.count_params()


class Doubled(layers.Layer):
    """A layer of one's own with a weight."""

    def build(self, shape):
        self.factor = self.add_weight(shape=())

    def call(self, inputs):
        return self.factor * inputs


@pytest.mark.parametrize(
    "layer, shape",
    [
        (layers.Conv1D(3, 2), (6, 4)),
        (layers.Conv3D(3, 2), (4, 4, 4, 2)),
        (layers.Conv2DTranspose(3, 2), (6, 7, 4)),
        (layers.SeparableConv1D(3, 2), (6, 4)),
        (layers.LSTM(3), (6, 4)),
        (layers.Embedding(10, 3), (6,)),
        (layers.MultiHeadAttention(2, 3), (6, 4)),
        (layers.LayerNormalization(), (6, 7, 4)),
        (layers.PReLU(), (6, 7, 4)),
        (Doubled(), (6, 7, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, layers.Layer) else "",
)
def test_an_unknown_layer_with_weights_is_named(layer, shape):
    inputs = keras.Input(shape)
    outputs = layer(inputs, inputs) if isinstance(layer, layers.MultiHeadAttention) else layer(inputs)
    with pytest.raises(ValueError, match=f"layer '{layer.name}' is a {type(layer).__name__}; .* known for Conv2D, "):
        cost.layer_costs(keras.Model(inputs, outputs))


def test_a_layer_called_twice_has_two_rows_and_its_weights_once():
    inputs, shared = keras.Input((6, 7, 4)), layers.Conv2D(4, 3, padding="same", name="shared")
    table = cost.layer_costs(keras.Model(inputs, layers.ReLU()(shared(shared(inputs)))))
    rows = table[table["layer"] == "shared"]
    assert rows["macs"].tolist() == [6 * 7 * 9 * 16] * 2 and rows["params"].tolist() == [9 * 16 + 4, 0]
    assert table["macs"].iloc[-1] == 2 * 6 * 7 * 9 * 16 and table["params"].iloc[-1] == 9 * 16 + 4


def test_a_pooling_called_twice_reads_what_it_is_given():
    inputs, pool = keras.Input((6, 7, 4)), layers.GlobalAveragePooling2D()
    table = cost.layer_costs(keras.Model(inputs, [pool(inputs), pool(layers.MaxPooling2D(2)(inputs))]))
    assert sorted(table[table["kind"] == "GlobalAveragePooling2D"]["other_ops"]) == [3 * 3 * 4, 6 * 7 * 4]


def test_a_network_in_a_network_called_twice_counts_twice():
    inputs, inner = keras.Input((6, 7, 4)), network(layers.Conv2D(4, 3, padding="same"))
    totals, once = cost.total_costs(keras.Model(inputs, inner(inner(inputs)))), cost.total_costs(inner)
    assert (totals["macs"], totals["params"]) == (2 * once["macs"], once["params"]) and once["macs"] > 0


class Subclassed(keras.Model):
    """A network that is Python code, not layers with known shapes."""

    def __init__(self):
        super().__init__()
        self.convolution = layers.Conv2D(3, 3)

    def call(self, inputs):
        return self.convolution(inputs)


@pytest.mark.parametrize("bad", [None, "simple", layers.Dense(3), keras.Sequential([layers.Dense(3)])], ids=str)
def test_what_is_no_built_network_is_refused(bad):
    with pytest.raises(ValueError, match=f"built keras.Model; got {type(bad).__name__}|'sequential.*' is not built"):
        cost.layer_costs(bad)


def test_a_network_that_is_not_made_of_layers_is_refused():
    subclassed = Subclassed()
    subclassed(np.zeros((1, 6, 7, 4), "float32"))
    with pytest.raises(ValueError):
        cost.layer_costs(subclassed)


def test_a_network_for_images_of_any_size_is_refused():
    with pytest.raises(ValueError):
        cost.layer_costs(network(layers.Conv2D(3, 3), shape=(None, None, 3)))


# --- correct: MACs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_a_convolution_counts_as_a_loop_counts(options):
    shape, groups = options["shape"], options["groups"]
    layer = layers.Conv2D(6, **{key: value for key, value in options.items() if key != "shape"})
    found = row(network(layer, shape=shape))
    macs, size = multiplications(
        shape, 6, options["kernel_size"], options["strides"], [options["dilation_rate"]] * 2, options["padding"], groups
    )
    assert found["output_shape"] == (*size, 6)
    assert found["macs"] == macs
    assert found["params"] == math.prod(options["kernel_size"]) * shape[2] // groups * 6 + 6
    assert cost.convolution_macs(size, (*options["kernel_size"], shape[2] // groups, 6)) == macs


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("strides, dilation", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("shape", [(6, 7, 4), (9, 5, 3)])
def test_a_depthwise_convolution_counts_as_a_loop_counts(shape, padding, strides, dilation, multiplier):
    """Each channel is a group of its own, with `multiplier` filters."""
    layer = layers.DepthwiseConv2D(
        (3, 2), strides=strides, dilation_rate=dilation, padding=padding, depth_multiplier=multiplier
    )
    found = row(network(layer, shape=shape))
    channels = shape[2] * multiplier
    macs, size = multiplications(shape, channels, (3, 2), [strides] * 2, [dilation] * 2, padding, groups=shape[2])
    assert (found["macs"], found["output_shape"]) == (macs, (*size, channels))


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("strides, dilation", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_separable_convolution_is_a_depthwise_and_a_pointwise_one(padding, strides, dilation, multiplier):
    shape = (9, 7, 3)
    layer = layers.SeparableConv2D(
        5, 3, strides=strides, dilation_rate=dilation, padding=padding, depth_multiplier=multiplier
    )
    found = row(network(layer, shape=shape))
    between = 3 * multiplier
    depthwise, size = multiplications(shape, between, (3, 3), [strides] * 2, [dilation] * 2, padding, groups=3)
    pointwise, _ = multiplications((*size, between), 5, (1, 1), (1, 1), (1, 1), "valid", 1)
    assert (found["macs"], found["output_shape"]) == (depthwise + pointwise, (*size, 5))
    assert found["params"] == 9 * between + between * 5 + 5


@pytest.mark.parametrize("shape, expected", [((12,), 12 * 5), ((3, 12), 3 * 12 * 5), ((2, 3, 12), 6 * 12 * 5)])
def test_a_dense_layer_counts_at_every_position(shape, expected):
    assert row(network(layers.Dense(5), shape=shape))["macs"] == expected


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv2D(5, 3, use_bias=False),
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
    assert row(model)["macs"] == model.predict(np.ones((1, 9, 8, 4)), verbose=0).astype("float64").sum()


# --- correct: other operations and bytes -------------------------------------------------------------------------


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
        (layers.GlobalAveragePooling2D(), 6 * 8 * 4),
        (layers.GlobalMaxPooling2D(), 6 * 8 * 4),
        (layers.Flatten(), 0),
        (layers.Dropout(0.5), 0),
        (layers.ZeroPadding2D(1), 0),
    ],
    ids=lambda value: value.name if isinstance(value, layers.Layer) else "",
)
def test_operations_that_are_no_macs(layer, expected):
    found = row(network(layer, shape=(6, 8, 4)))
    assert found["other_ops"] == expected
    if not isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D, layers.Dense)):
        assert found["macs"] == 0


@pytest.mark.parametrize("merge, count", [(layers.Add, 2), (layers.Add, 3), (layers.Multiply, 2), (layers.Average, 3)])
def test_a_merge_is_an_operation_less_than_its_inputs(merge, count):
    inputs = [keras.Input((6, 7, 4)) for _ in range(count)]
    table = cost.layer_costs(keras.Model(inputs, merge()(inputs)))
    assert table["other_ops"].iloc[-1] == (count - 1) * 6 * 7 * 4
    assert table["activation_bytes"].iloc[-1] == 4 * 6 * 7 * 4  # the inputs are not made here


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("mixed_bfloat16", 2), ("mixed_float16", 2)])
def test_activations_take_the_bytes_of_the_precision(dtype, size):
    model = network(
        layers.Conv2D(5, 3, dtype=dtype),
        layers.BatchNormalization(dtype=dtype),
        layers.GlobalAveragePooling2D(dtype="float32"),
    )
    table = cost.layer_costs(model)
    assert table["activation_bytes"].tolist() == [4 * 5 * 5 * size, 4 * 5 * 5 * size, 5 * 4, 2 * 4 * 5 * 5 * size + 20]


@pytest.mark.parametrize("name", networks.THESIS_PLANS)
def test_precision_changes_the_bytes_and_nothing_else(name):
    tables = [cost.layer_costs(networks.build(name, dtype=dtype)) for dtype in ("float32", "mixed_bfloat16")]
    same = ["layer", "kind", "output_shape", "params", "trainable", "macs", "other_ops"]
    assert tables[0][same].equals(tables[1][same])
    ratio = (tables[0]["activation_bytes"] / tables[1]["activation_bytes"]).to_numpy()
    assert ratio[:-3].tolist() == [2] * (len(ratio) - 3)  # all but pooling and softmax, which stay in float32
    assert ratio[-3:-1].tolist() == [1, 1]


# --- correct: whole networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Sequential", "Functional"])
def test_a_network_in_a_network_counts_as_its_layers(kind):
    inputs = keras.Input((6, 7, 4))
    stack = [layers.Conv2D(5, 3, name="first"), layers.BatchNormalization(name="second")]
    inner = keras.Sequential([keras.Input((6, 7, 4)), *stack])
    if kind == "Functional":
        inner = keras.Model(inner.inputs[0], inner.outputs[0])
    nested = keras.Model(inputs, layers.Conv2D(3, 1, name="third")(inner(inputs)))
    plain = network(layers.Conv2D(5, 3), layers.BatchNormalization(), layers.Conv2D(3, 1))
    table = cost.layer_costs(nested)
    assert table.loc[table["kind"] != "InputLayer", "layer"].tolist() == ["first", "second", "third", "total"]
    assert cost.total_costs(nested) == cost.total_costs(plain)  # the images are counted once


@pytest.mark.parametrize("way", ["in a list", "by add", "loaded"])
def test_a_network_costs_the_same_however_it_was_made(tmp_path, way):
    expected = network(layers.Conv2D(5, 3), layers.BatchNormalization(), layers.Flatten(), layers.Dense(2))
    model = expected
    if way == "by add":
        model = keras.Sequential()
        model.add(keras.Input((6, 7, 4)))
        for layer in (layers.Conv2D(5, 3), layers.BatchNormalization(), layers.Flatten(), layers.Dense(2)):
            model.add(layer)
    elif way == "loaded":
        expected.save(tmp_path / "network.keras")
        model = keras.saving.load_model(tmp_path / "network.keras")
    assert cost.total_costs(model) == cost.total_costs(expected)
    assert cost.total_costs(model)["macs"] == 4 * 5 * 5 * 9 * 4 + 100 * 2


def profiled_macs(model):
    """MACs by TensorFlow's own profiler: half of the operations of its convolutions and matrix products."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("TensorFlow's profiler sees TensorFlow's graphs only")
    tf = pytest.importorskip("tensorflow")
    profiler = tf.compat.v1.profiler
    images = tf.TensorSpec((1, *model.input_shape[1:]), "float32")
    graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(images).graph
    options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
    found = profiler.profile(graph, cmd="op", options=options.with_empty_output().build())
    operations, node = {}, found
    while node.children:  # a chain, one node a kind of operation
        node = node.children[0]
        operations[node.name] = node.float_ops
    kinds = ("Conv2D", "DepthwiseConv2dNative", "MatMul")
    assert "Conv2D" in operations
    return sum(operations.get(kind, 0) for kind in kinds) / 2


@pytest.mark.parametrize("name", networks.THESIS_PLANS)
def test_the_networks_cost_what_tensorflow_counts(name):
    model = networks.build(name)
    assert cost.total_costs(model)["macs"] == profiled_macs(model)


@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50"])
def test_networks_of_others_cost_what_tensorflow_counts(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3))  # small, to be built quickly
    assert cost.total_costs(model)["macs"] == profiled_macs(model)
    assert cost.total_costs(model)["params"] == model.count_params()
