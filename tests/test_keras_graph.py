"""Layer graphs read and rebuilt, and batch normalisations folded: `fcnn_utils.keras_graph`."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import keras_graph


def wave(x):
    return keras.ops.sin(3 * x)


def randomize(model, seed=0):
    """Give a model positive weights of a size that keeps its outputs finite."""
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.1, 0.5, weight.shape) for weight in model.get_weights()])
    return model


def branched():
    """A functional model with a branch, a shared layer, two nested models, a bare operation and two outputs."""
    inner_in = keras.Input((8, 8, 4))
    inner = keras.Model(inner_in, layers.Conv2D(4, 3, padding="same", name="conv")(inner_in), name="inner")
    stack = keras.Sequential([layers.Conv2D(4, 3, padding="same", name="conv"), layers.ReLU(name="r")], name="stack")
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="first")(x)
    shared = layers.Conv2D(4, 3, padding="same", activation="tanh", name="shared")
    x = layers.Add(name="add")([shared(shared(x)), inner(x), stack(x)])
    x = layers.BatchNormalization(name="norm")(keras.ops.abs(x))
    return randomize(keras.Model(inputs, [x, layers.GlobalAveragePooling2D(name="pool")(x)], name="branched"))


def sequential():
    stack = [layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(), layers.ReLU(name="end")]
    return keras.Sequential([keras.Input((8, 8, 3)), *stack], name="s")


def images(model, count=2):
    return np.random.default_rng(0).standard_normal((count, *model.inputs[0].shape[1:])).astype("float32")


def outputs(model, x=None):
    """List the outputs of a model at inference, as arrays."""
    values = model(images(model) if x is None else x, training=False)
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(values)]


def assert_close(model, other, tolerance=1e-4):
    expected, found = outputs(model)[0], outputs(other)[0]
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def nodes_by_path(model):
    return {node.path: node for node in keras_graph.layer_nodes(model)}


def test_models_that_are_no_graph_of_layers_are_rejected():
    with pytest.raises(ValueError, match="built keras.Model; got str"):
        keras_graph.check_graph("simple")
    with pytest.raises(ValueError, match="'sequential.*' is not built"):
        keras_graph.check_graph(keras.Sequential([layers.Conv2D(4, 3)]))


# --- reading the graph -------------------------------------------------------------------------------------------


def test_layer_nodes_of_branches_shared_layers_and_nesteds():
    nodes = nodes_by_path(branched())
    assert set(nodes) == {"first", "shared", "inner/conv", "stack/conv", "stack/r", "add", "norm", "pool"}
    assert {path for path, node in nodes.items() if len(node.calls) == 2} == {"shared"}
    assert nodes["first"].calls == [([(None, 8, 8, 3)], (None, 8, 8, 4))]
    assert len(nodes["add"].calls[0][0]) == 3
    assert sorted(operation.name for operation in nodes["first"].consumers) == ["inner", "shared", "stack"]
    assert [operation.name for operation in nodes["shared"].producers] == ["first", "shared"]
    assert [operation.name for operation in nodes["shared"].consumers] == ["shared", "add"]
    assert [operation.name for operation in nodes["stack/conv"].consumers] == ["r"]
    assert nodes["inner/conv"].consumers == [None] == nodes["pool"].consumers
    assert [getattr(operation, "name", None) for operation in nodes["norm"].consumers] == ["pool", None]
    assert repr(nodes["shared"]) == "<LayerNode shared: Conv2D, (None, 8, 8, 4) -> (None, 8, 8, 4), calls: 2>"


def test_calls_of_a_nested_and_of_a_layer_in_two_models_add_up():
    conv = layers.Conv2D(3, 3, padding="same", name="conv")
    inner = keras.Sequential([keras.Input((8, 8, 3)), conv], name="inner")
    inputs = keras.Input((8, 8, 3))
    (node,) = keras_graph.layer_nodes(keras.Model(inputs, inner(inner(inputs))))
    assert node.path == "inner/conv" and len(node.calls) == 2
    (node,) = keras_graph.layer_nodes(keras.Model(inputs, conv(inner(inner(inputs)))))
    assert len(node.calls) == len(node.producers) == len(node.consumers) == len(node.training) == 3


# --- what a layer reads ------------------------------------------------------------------------------------------


class Recorder(layers.Conv2D):
    """A convolution that records what it reads."""

    seen = []

    def call(self, inputs):
        Recorder.seen.append(inputs)
        return super().call(inputs)


def recorder(name="conv"):
    return Recorder(3, 3, padding="same", name=name)


def plain(name):
    return layers.Conv2D(3, 3, padding="same", activation="tanh", name=name)


def residual():
    x = inputs = keras.Input((6, 6, 3))
    y = layers.Dropout(0.5)(layers.ReLU()(layers.BatchNormalization()(plain("before")(x))))
    x = layers.ReLU()(recorder()(layers.Add()([keras.ops.abs(x), y])))
    return keras.Model(inputs, plain("after")(x)), "conv", 1


def first():
    inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, plain("after")(recorder()(inputs))), "conv", 1


def shared():
    inputs, conv = keras.Input((6, 6, 3)), recorder()
    return keras.Model(inputs, plain("after")(conv(layers.BatchNormalization()(conv(inputs))))), "conv", 2


def stacked():
    return keras.Sequential([keras.Input((6, 6, 3)), plain("before"), layers.Dropout(0.5), recorder()]), "conv", 1


def nested():
    """A nested model called twice, once with an argument: then it normalises by the batch."""
    inner = keras.Sequential([keras.Input((6, 6, 3)), layers.BatchNormalization(), recorder()], name="inner")
    inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, inner(plain("between")(inner(inputs)), training=True)), "inner/conv", 2


def deeply_nested():
    """Two levels, each called twice; the layer is called in both."""
    conv = recorder()
    deep = keras.Sequential([keras.Input((6, 6, 3)), plain("before"), conv], name="deep")
    inputs = keras.Input((6, 6, 3))
    inner = keras.Model(inputs, conv(deep(layers.Dropout(0.5)(deep(inputs)))), name="inner")
    outer = keras.Input((6, 6, 3))
    return keras.Model(outer, layers.Add()([inner(plain("first")(inner(outer))), outer])), "inner/deep/conv", 6


def two_inputs():
    """Two inputs in a dict, and a nested model that reads both."""
    pair = [keras.Input((6, 6, 3)), keras.Input((6, 6, 3))]
    inner = keras.Model(pair, recorder()(layers.Subtract()(pair)), name="inner")
    inputs = {name: keras.Input((6, 6, 3), name=name) for name in ("b", "a")}
    x = inner([plain("first")(inputs["a"]), inputs["b"]])
    return keras.Model(inputs, layers.Add()([x, inputs["a"]])), "inner/conv", 1


def state(model):
    """All that Keras knows of a model's graph: its layer nodes, and the number of links of each operation."""
    nodes = keras_graph.layer_nodes(model)
    operations = [node.layer for node in nodes] + (getattr(model, "_functional", None) or model).operations
    return [repr(node) for node in nodes], [(len(x._inbound_nodes), len(x._outbound_nodes)) for x in operations]


@pytest.mark.parametrize("make", [residual, first, shared, stacked, nested, deeply_nested, two_inputs])
def test_input_model_computes_what_the_layer_reads(make):
    model, path, calls = make()
    randomize(model)
    rng, names = np.random.default_rng(0), [x.name for x in model.inputs]
    x = [rng.standard_normal((2, 6, 6, 3)).astype("float32") for _ in names]
    x = dict(zip(names, x, strict=True)) if len(x) > 1 else x[0]
    before = state(model)
    reads = keras_graph.input_model(model, path)
    assert state(model) == before
    for _ in range(2):  # the second time with other weights: the layers are shared
        Recorder.seen.clear()
        model(x, training=False)
        expected = [keras.ops.convert_to_numpy(value) for value in Recorder.seen]
        found = outputs(reads, x)
        assert len(found) == len(expected) == calls
        for one, other in zip(sorted(found, key=np.sum), sorted(expected, key=np.sum), strict=True):  # in any order
            assert np.allclose(one, other, rtol=1e-5, atol=1e-6)
        randomize(model, seed=1)


def test_input_model_of_a_layer_with_several_inputs_and_of_no_layer():
    model = branched()
    (pooled,) = outputs(keras_graph.input_model(model, "pool"))
    assert np.allclose(pooled, outputs(model)[0])
    reads = keras_graph.input_model(model, "add")
    assert [tuple(x.shape) for x in reads.outputs] == [(None, 8, 8, 4)] * 3
    assert np.allclose(np.abs(sum(outputs(reads))), outputs(keras_graph.input_model(model, "norm"))[0], atol=1e-5)
    with pytest.raises(ValueError, match="path of the layer must be one of first, .*inner/conv.*; got 'conv'"):
        keras_graph.input_model(model, "conv")


def test_a_model_can_be_rebuilt_and_read_after_input_model():
    model, path, _ = nested()
    keras_graph.input_model(model, path)
    keras_graph.input_model(model, path)
    new = keras_graph.rebuild(model, {})
    assert list(nodes_by_path(new)) == list(nodes_by_path(model))
    assert np.array_equal(outputs(new)[0], outputs(model)[0])


# --- rebuilding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [branched, sequential])
def test_a_rebuilt_model_computes_the_same_and_shares_nothing(make):
    model = make()
    before = outputs(model)
    new = keras_graph.rebuild(model, {})
    assert (
        type(new) is type(model) and new.name == model.name and list(nodes_by_path(new)) == list(nodes_by_path(model))
    )
    assert all(np.array_equal(a, b) for a, b in zip(outputs(new), before, strict=True))
    new.set_weights([weight + 1 for weight in new.get_weights()])
    assert all(np.array_equal(a, b) for a, b in zip(outputs(model), before, strict=True))
    old_layers, new_layers = ({id(node.layer) for node in keras_graph.layer_nodes(one)} for one in (model, new))
    assert not old_layers & new_layers


@pytest.mark.parametrize("make", [branched, sequential])
def test_a_rebuilt_model_keeps_which_layers_are_trainable(make):
    model = make()
    model.trainable = False
    model.layers[1].trainable = True
    new = keras_graph.rebuild(model, {})
    before, after = ([node.layer.trainable for node in keras_graph.layer_nodes(one)] for one in (model, new))
    assert before == after and len(set(before)) == 2


def test_a_chain_is_trainable_if_its_layer_was_unfrozen_in_a_frozen_model():
    inner_in = keras.Input((8, 8, 4))
    inner = keras.Model(inner_in, layers.Conv2D(4, 3, name="conv")(inner_in), name="inner")
    outer = keras.Input((8, 8, 4))
    model = keras.Model(outer, inner(outer))
    inner.trainable = False
    conv = inner.get_layer("conv")
    conv.trainable = True
    new = keras_graph.rebuild(model, {id(conv): [layers.Conv2D(2, 3, name="a"), layers.Conv2D(4, 1, name="b")]})
    assert [node.layer.trainable for node in keras_graph.layer_nodes(new)] == [True, True]


def test_a_rebuilt_model_keeps_an_adapted_normalization():
    inputs = keras.Input((8, 8, 3))
    normalization = layers.Normalization()
    x = np.random.default_rng(0).normal(5, 3, (10, 8, 8, 3)).astype("float32")
    normalization.adapt(x)
    model = keras.Model(inputs, normalization(inputs))
    assert np.allclose(outputs(keras_graph.rebuild(model, {}), x), outputs(model, x), atol=1e-5)
    assert abs(outputs(model, x)[0].mean()) < 0.1


def test_chains_replace_layers_wherever_they_are_called():
    """Shared, nested and Sequential layers become a doubling and a halving, which together are the identity."""
    model = branched()
    nodes = nodes_by_path(model)
    chains = {}
    for number, path in enumerate(("shared", "inner/conv", "stack/r")):
        doubling, halving = layers.Rescaling(2.0, name=f"a{number}"), layers.Rescaling(0.5, name=f"b{number}")
        chains[id(nodes[path].layer)] = [doubling, halving]
    new = keras_graph.rebuild(model, chains)
    assert {"a0", "b0", "inner/a1", "inner/b1", "stack/a2", "stack/b2"} <= set(nodes_by_path(new))
    assert not {"shared", "inner/conv", "stack/r"} & set(nodes_by_path(new))

    def convolve(x, path):
        kernel, bias = nodes[path].layer.get_weights()
        return keras.ops.convert_to_numpy(keras.ops.conv(x, kernel, padding="same") + bias)

    first = np.maximum(convolve(images(model), "first"), 0)
    summed = np.abs(first + first + convolve(first, "stack/conv"))
    gamma, beta, mean, variance = nodes["norm"].layer.get_weights()
    expected = (summed - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    assert np.allclose(outputs(new)[0], expected, atol=1e-3)


def test_an_empty_chain_removes_a_layer():
    model = sequential()
    new = keras_graph.rebuild(model, {id(model.layers[1]): []})
    assert [type(layer) for layer in new.layers] == [layers.Conv2D, layers.ReLU]


def test_rebuild_changes_the_dtype_policy():
    half = keras_graph.rebuild(branched(), {}, dtype="mixed_bfloat16")
    assert {node.layer.dtype_policy.name for node in keras_graph.layer_nodes(half)} == {"mixed_bfloat16"}
    single = keras_graph.rebuild(half, {}, "float32")
    assert {node.layer.dtype_policy.name for node in keras_graph.layer_nodes(single)} == {"float32"}


def test_rebuild_copies_activations_without_a_name_and_activations_that_are_layers():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, activation=wave)(inputs)
    x = layers.Conv2D(4, 3, activation=layers.ReLU(max_value=0.1), name="capped")(layers.Activation(wave)(x))
    model = keras.Model(inputs, x)
    new = keras_graph.rebuild(model, {})
    assert np.array_equal(outputs(model)[0], outputs(new)[0]) and outputs(new)[0].max() == pytest.approx(0.1)
    assert new.get_layer("capped").activation is not model.get_layer("capped").activation
    half = keras_graph.rebuild(model, {}, dtype="mixed_bfloat16").get_layer("capped")
    assert half.activation.compute_dtype == "bfloat16"


def test_a_users_class_gets_its_own_configuration_back():
    class Own(layers.Dense):
        @classmethod
        def from_config(cls, config):
            return cls(**config | {"activation": keras.activations.deserialize(config["activation"])})

    inputs = keras.Input((3,))
    new = keras_graph.rebuild(keras.Model(inputs, Own(2, activation="tanh")(inputs)), {})
    assert type(new.layers[-1]) is Own and new.layers[-1].activation is keras.activations.tanh


def test_layers_that_cannot_be_copied_are_named():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layers.Lambda(lambda x: 2 * x, name="double")(inputs))
    with pytest.raises(ValueError, match="layer 'double' cannot be copied: .*Lambda"):
        keras_graph.rebuild(model, {})
    model = keras.Model(inputs, layers.Conv2D(4, 3, activation=layers.PReLU(), name="steep")(inputs))
    model(np.zeros((1, 8, 8, 3)))  # now the activation has its weights
    with pytest.raises(ValueError, match="layer 'steep' has an activation with its own weights, PReLU"):
        keras_graph.rebuild(model, {})


# --- subclassed models, state outside the weights, sizes of nested models --------------------------------------------


class Subclassed(keras.Model):
    """A model whose graph can be traced: layers, keras.ops and a branch on a Python value."""

    def __init__(self, **options):
        super().__init__(**options)
        self.conv, self.norm, self.head = layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Dense(2)

    def call(self, x, training=False):
        x = self.norm(self.conv(x), training=training)
        return self.head(keras.ops.mean(x, axis=(1, 2)) if len(x.shape) == 4 else x)


def test_a_subclassed_model_is_traced_with_a_warning():
    model = Subclassed(name="own")
    model(np.zeros((1, 8, 8, 3), "float32"))
    randomize(model)
    with pytest.warns(UserWarning, match="model 'own' is subclassed: it was traced"):
        graph = keras_graph.check_graph(model)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(outputs(graph, x)[0], outputs(model, x)[0], rtol=1e-6)
    assert [node.layer for node in keras_graph.layer_nodes(graph)] == [model.conv, model.norm, model.head]


def test_a_subclassed_model_that_cannot_be_traced_is_told():
    class Untraceable(keras.Model):
        def call(self, x):
            return x * np.asarray(x).sum()

    model = Untraceable(name="own")
    model(np.zeros((1, 2), "float32"))
    with pytest.raises(ValueError, match="model 'own' is subclassed and can't be traced .*: write its call with"):
        keras_graph.check_graph(model)


def test_a_subclassed_model_inside_is_a_layer():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, Subclassed(name="own")(layers.Conv2D(3, 3, name="conv")(inputs)))
    assert list(nodes_by_path(model)) == ["conv", "own"]


def test_a_vocabulary_is_carried_over():
    words, numbers = keras.Input((2,), dtype="string", name="words"), keras.Input((2,), dtype="int64", name="numbers")
    lookup, index = layers.StringLookup(name="lookup"), layers.IntegerLookup(name="index")
    lookup.adapt(["a", "b", "b"])
    index.adapt([7, 9, 9])
    x = layers.Concatenate()([lookup(words), index(numbers)])
    model = keras.Model([words, numbers], x)
    given = [keras.ops.convert_to_tensor([["b", "z"]]), keras.ops.convert_to_tensor([[7, 9]])]
    copy = keras_graph.rebuild(model, {})
    np.testing.assert_array_equal(outputs(copy, given)[0], outputs(model, given)[0])


def test_sizes_in_a_nested_model_are_those_of_its_call():
    stack = [layers.Conv2D(4, 3, strides=2, name="conv"), layers.GlobalAveragePooling2D(name="pool")]
    inner = keras.Sequential([keras.Input((None, None, 3)), *stack], name="inner")
    inputs = keras.Input((9, 7, 3))
    nodes = nodes_by_path(keras.Model(inputs, [inner(inputs), inner(layers.ZeroPadding2D(1)(inputs))]))
    shapes = [((None, 9, 7, 3), (None, 4, 3, 4)), ((None, 11, 9, 3), (None, 5, 4, 4))]
    assert sorted(nodes["inner/conv"].calls, key=str) == sorted([([a], b) for a, b in shapes], key=str)


@pytest.mark.parametrize(("own", "expected"), [({}, True), ({"training": False}, False)])
def test_training_of_a_nested_model_holds_for_its_layers(own, expected):
    inner_in = keras.Input((4,))
    inner = keras.Model(inner_in, layers.BatchNormalization(name="norm")(inner_in, **own), name="inner")
    inputs = keras.Input((4,))
    assert nodes_by_path(keras.Model(inputs, inner(inputs, training=True)))["inner/norm"].training == [expected]


def test_names_of_inputs_operations_and_nested_models_are_listed():
    inputs = keras.Input((4,), name="given")
    inner = keras.Sequential([keras.Input((4,), name="inside"), layers.Dense(4, name="dense")], name="inner")
    model = keras.Model(inputs, keras.ops.add(inner(inputs), 1.0))
    assert {"given", "inside", "dense", "inner"} < keras_graph.operation_names(model)
    assert any(name.startswith("add") for name in keras_graph.operation_names(model))
