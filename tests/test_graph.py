"""Layers in their places, and models rebuilt: `fcnn_utils.keras_graph`."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import keras_graph


def wave(x):
    return keras.ops.sin(3 * x)


def zoo():
    """A functional model with a branch, a layer called twice, a model within, a Sequential within, a bare operation."""
    inner_in = keras.Input((8, 8, 4))
    inner = keras.Model(inner_in, layers.Conv2D(4, 3, padding="same", name="conv")(inner_in), name="inner")
    stack = keras.Sequential([layers.Conv2D(4, 3, padding="same", name="conv"), layers.ReLU(name="r")], name="stack")
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="first")(x)
    shared = layers.Conv2D(4, 3, padding="same", activation="tanh", name="shared")
    x = layers.Add(name="add")([shared(shared(x)), inner(x), stack(x)])
    x = layers.BatchNormalization(name="norm")(keras.ops.abs(x))
    model = keras.Model(inputs, [x, layers.GlobalAveragePooling2D(name="pool")(x)], name="zoo")
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 0.5, weight.shape) for weight in model.get_weights()])
    return model


def sequential():
    return keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(), layers.ReLU()], name="s"
    )


def outputs(model, seed=0):
    x = np.random.default_rng(seed).standard_normal((2, *model.inputs[0].shape[1:])).astype("float32")
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x))]


# --- basic -------------------------------------------------------------------------------------------------------


def test_models_whose_layers_can_not_be_told_are_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    own = Own(name="own")
    own(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="model must be a built keras.Model; got str"):
        keras_graph.check_graph("simple")
    with pytest.raises(ValueError, match="'sequential.*' is not built: call it on images once"):
        keras_graph.check_graph(keras.Sequential([layers.Conv2D(4, 3)]))
    with pytest.raises(ValueError, match="model 'own' is not a graph of layers"):
        keras_graph.check_graph(own)


# --- correct -----------------------------------------------------------------------------------------------------


def test_places_of_branches_shared_layers_and_inner_models():
    places = {place.path: place for place in keras_graph.layer_nodes(zoo())}
    assert set(places) == {"first", "shared", "inner/conv", "stack/conv", "stack/r", "add", "norm", "pool"}
    assert [len(place.calls) for place in places.values()].count(2) == 1 and len(places["shared"].calls) == 2
    assert places["first"].calls == [([(None, 8, 8, 3)], (None, 8, 8, 4))]
    assert len(places["add"].calls[0][0]) == 3
    names = sorted(operation.name for operation in places["first"].after)
    assert names == ["inner", "shared", "stack"]
    assert {operation.name for operation in places["shared"].before} == {"first", "shared"}
    assert [operation.name for operation in places["stack/conv"].after] == ["r"] and places["inner/conv"].after == [
        None
    ]
    assert None in places["norm"].after and places["pool"].after == [None]


def test_an_inner_model_called_twice_counts_twice():
    inner = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(3, 3, padding="same", name="conv")], name="inner")
    inputs = keras.Input((8, 8, 3))
    (place,) = keras_graph.layer_nodes(keras.Model(inputs, inner(inner(inputs))))
    assert place.path == "inner/conv" and len(place.calls) == 2


@pytest.mark.parametrize("make", [zoo, sequential])
def test_a_rebuilt_model_is_the_same_and_shares_nothing(make):
    model = make()
    before = outputs(model)
    new = keras_graph.rebuild(model, {})
    assert type(new) is type(model) and new.name == model.name
    assert all(np.array_equal(a, b) for a, b in zip(outputs(new), before, strict=True))
    new.set_weights([weight + 1 for weight in new.get_weights()])
    assert all(np.array_equal(a, b) for a, b in zip(outputs(model), before, strict=True))
    assert not {id(place.layer) for place in keras_graph.layer_nodes(new)} & {
        id(place.layer) for place in keras_graph.layer_nodes(model)
    }
    assert [place.path for place in keras_graph.layer_nodes(new)] == [
        place.path for place in keras_graph.layer_nodes(model)
    ]


@pytest.mark.parametrize("make", [zoo, sequential])
def test_what_is_trainable_stays_so(make):
    model = make()
    model.trainable = False
    model.layers[1].trainable = True
    new = keras_graph.rebuild(model, {})
    pairs = list(zip(keras_graph.layer_nodes(model), keras_graph.layer_nodes(new), strict=True))
    assert [old.layer.trainable for old, _ in pairs] == [copy.layer.trainable for _, copy in pairs]
    assert len({old.layer.trainable for old, _ in pairs}) == 2


def test_a_thawed_layer_stays_so_as_a_chain():
    inner_in = keras.Input((8, 8, 4))
    inner = keras.Model(inner_in, layers.Conv2D(4, 3, name="conv")(inner_in), name="inner")
    outer = keras.Input((8, 8, 4))
    model = keras.Model(outer, inner(outer))
    inner.trainable = False
    inner.get_layer("conv").trainable = True
    new = keras_graph.rebuild(
        model, {id(inner.get_layer("conv")): [layers.Conv2D(2, 3, name="a"), layers.Conv2D(4, 1, name="b")]}
    )
    assert [place.layer.trainable for place in keras_graph.layer_nodes(new) if place.layer.weights] == [True, True]


def test_an_adapted_normalization_computes_the_same():
    inputs = keras.Input((8, 8, 3))
    normalization = layers.Normalization()
    x = np.random.default_rng(0).normal(5, 3, (10, 8, 8, 3)).astype("float32")
    normalization.adapt(x)
    model = keras.Model(inputs, normalization(inputs))
    assert np.allclose(keras_graph.rebuild(model, {}).predict_on_batch(x), model.predict_on_batch(x), atol=1e-5)
    assert abs(model.predict_on_batch(x).mean()) < 0.1


def test_chains_stand_for_layers_wherever_they_are_called():
    """Doubling layers in place of the activation-free ones, in the shared, the nested and the sequential one."""
    model = zoo()
    places = {place.path: place.layer for place in keras_graph.layer_nodes(model)}
    chains = {}
    for number, path in enumerate(("shared", "inner/conv", "stack/r")):
        chains[id(places[path])] = [layers.Rescaling(2.0, name=f"a{number}"), layers.Rescaling(0.5, name=f"b{number}")]
    new = keras_graph.rebuild(model, chains)
    found = [place.path for place in keras_graph.layer_nodes(new)]
    assert {"a0", "b0", "inner/a1", "inner/b1", "stack/a2", "stack/b2"} <= set(found)
    assert not {"shared", "inner/conv", "stack/r"} & set(found)

    weights = {path: layer.get_weights() for path, layer in places.items() if layer.weights}
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("float32")
    relu = lambda v: np.maximum(v, 0)  # noqa: E731
    convolve = lambda v, path: keras.ops.convert_to_numpy(  # noqa: E731
        keras.ops.conv(v, weights[path][0], padding="same") + weights[path][1]
    )
    first = relu(convolve(x, "first"))
    summed = np.abs(first + first + convolve(first, "stack/conv"))  # the doubled and halved are the identity
    gamma, beta, mean, variance = weights["norm"]
    expected = (summed - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    assert np.allclose(keras.ops.convert_to_numpy(new(x)[0]), expected, atol=1e-3)


def test_an_empty_chain_takes_a_layer_out():
    model = sequential()
    new = keras_graph.rebuild(model, {id(model.layers[1]): []})
    assert [type(layer) for layer in new.layers] == [layers.Conv2D, layers.ReLU]


def test_layers_in_another_dtype():
    new = keras_graph.rebuild(zoo(), {}, dtype="mixed_bfloat16")
    assert {place.layer.dtype_policy.name for place in keras_graph.layer_nodes(new)} == {"mixed_bfloat16"}
    assert {
        place.layer.dtype_policy.name for place in keras_graph.layer_nodes(keras_graph.rebuild(new, {}, "float32"))
    } == {"float32"}


def test_activations_that_keras_does_not_know_by_name_and_layers_as_activations():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, activation=wave)(inputs)
    x = layers.Conv2D(4, 3, activation=layers.ReLU(max_value=0.1), name="capped")(layers.Activation(wave)(x))
    model = keras.Model(inputs, x)
    new = keras_graph.rebuild(model, {})
    assert np.array_equal(outputs(model)[0], outputs(new)[0]) and outputs(new)[0].max() == pytest.approx(0.1)
    assert new.get_layer("capped").activation is not model.get_layer("capped").activation
    half = keras_graph.rebuild(model, {}, dtype="mixed_bfloat16").get_layer("capped")
    assert half.activation.compute_dtype == "bfloat16"


def test_a_class_that_reads_its_activation_from_its_configuration_is_given_what_it_wrote():
    class Own(layers.Dense):
        @classmethod
        def from_config(cls, config):
            return cls(**config | {"activation": keras.activations.deserialize(config["activation"])})

    inputs = keras.Input((3,))
    model = keras.Model(inputs, Own(2, activation="tanh")(inputs))
    new = keras_graph.rebuild(model, {})
    assert type(new.layers[-1]) is Own and new.layers[-1].activation is keras.activations.tanh


def test_layers_that_can_not_be_copied_are_named():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layers.Lambda(lambda x: 2 * x, name="double")(inputs))
    with pytest.raises(ValueError, match="layer 'double' can't be copied: Keras can't make its class, Lambda"):
        keras_graph.rebuild(model, {})
    model = keras.Model(inputs, layers.Conv2D(4, 3, activation=layers.PReLU(), name="steep")(inputs))
    model(np.zeros((1, 8, 8, 3)))  # now the activation has its weights
    with pytest.raises(ValueError, match="layer 'steep' has an activation with weights of its own, PReLU"):
        keras_graph.rebuild(model, {})
