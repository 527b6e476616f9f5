"""Models cut in two before a layer: `fcnn_utils._graph_cut`."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import _graph_cut


def conv(name):
    return layers.Conv2D(4, 3, padding="same", activation="relu", name=name)


def network():
    """A stem, a residual block, a nested model, and two outputs in a dict."""
    inner = keras.Sequential([keras.Input((6, 6, 4)), conv("inside"), layers.BatchNormalization()], name="inner")
    inputs = keras.Input((6, 6, 3))
    x = stem = conv("stem")(inputs)
    x = layers.Add(name="add")([conv("second")(conv("first")(x)), stem])
    x = inner(x)
    pooled = layers.GlobalAveragePooling2D()(conv("last")(x))
    return keras.Model(inputs, {"a": layers.Dense(2)(pooled), "b": layers.Dense(3)(pooled)})


@pytest.mark.parametrize(
    ("name", "cut_after"),
    [("first", "stem"), ("second", "stem"), ("inside", "add"), ("last", "inner"), ("stem", None)],
)
def test_head_and_tail_compute_what_the_model_computes(name, cut_after):
    model = network()
    found = model.get_layer("inner").get_layer(name) if name == "inside" else model.get_layer(name)
    head, tail = _graph_cut.split_before(model, found)
    if cut_after is None:
        assert head is None and tail is model
        return
    assert head.layers[-1].name == cut_after
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype("float32")
    found.set_weights([weight + 0.1 for weight in found.get_weights()])  # the parts share the layer
    expected, y = model(x), tail(head(x))
    assert expected.keys() == y.keys()
    for key in expected:
        np.testing.assert_allclose(y[key], expected[key], rtol=1e-5)


def test_no_cut_where_a_second_input_is_still_to_come_or_the_layer_was_called_before():
    one, two, shared = keras.Input((6, 6, 3)), keras.Input((6, 6, 4)), conv("shared")
    x = layers.Add()([shared(conv("left")(one)), two])
    model = keras.Model([one, two], conv("right")(shared(x)))
    assert _graph_cut.split_before(model, model.get_layer("left"))[0] is None
    assert _graph_cut.split_before(model, shared)[0] is None
    head, tail = _graph_cut.split_before(model, model.get_layer("right"))
    given = [np.ones((1, *x.shape[1:]), "float32") for x in model.inputs]
    np.testing.assert_allclose(tail(head(given)), model(given), rtol=1e-5)


def test_no_layer_is_called_on_both_sides_of_a_cut():
    inputs, one, two = keras.Input((6, 6, 4)), conv("one"), conv("two")
    model = keras.Model(inputs, conv("last")(two(one(two(one(inputs))))))
    assert _graph_cut.split_before(model, two)[0] is None
    head, tail = _graph_cut.split_before(model, model.get_layer("last"))
    assert [layer.name for layer in tail.layers[1:]] == ["last"]
    x = np.ones((1, 6, 6, 4), "float32")
    np.testing.assert_allclose(tail(head(x)), model(x), rtol=1e-5)
