"""Networks run on calibration images, part by part: `fcnn_utils._network_runs`."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import _network_runs, keras_graph
from tests.calibration_networks import numpy_outputs


def network(size=6):
    """Residual blocks, between which the network can be cut."""
    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv0")(inputs)
    for number in (1, 2, 3):
        y = layers.Conv2D(4, 3, padding="same", activation="relu", name=f"conv{number}")(x)
        x = layers.Add()([x, y])
    return keras.Model(inputs, layers.Dense(5, activation="softmax")(layers.GlobalAveragePooling2D()(x)))


def images(count):
    return np.random.default_rng(0).standard_normal((count, 6, 6, 3)).astype("float32")


@pytest.mark.parametrize("compiled_from", [0, 1e99])
def test_outputs_do_not_depend_on_batches_of_8_to_128_or_on_compilation(monkeypatch, compiled_from):
    model, x = network(), images(37)
    monkeypatch.setattr(_network_runs, "_COMPILED_MACS", compiled_from)
    for limit, size in ((1, 8), (2**30, 128)):  # at least 8, at most 128
        monkeypatch.setattr(_network_runs, "_ACTIVATION_BYTES", limit)
        assert _network_runs.batch_size(model, [x]) == size
        assert np.allclose(_network_runs.outputs_of(model, [x]), numpy_outputs(model, x), atol=1e-6)


def test_rest_computes_what_the_model_computes_and_keeps_the_images_of_the_user(monkeypatch):
    model, x = network(), images(20)
    given, expected = x.copy(), numpy_outputs(model, x)
    monkeypatch.setattr(_network_runs, "_ACTIVATION_BYTES", 1)  # three batches
    rest, parts_of_the_model = _network_runs.Rest(model, [x]), []
    nodes = {node.path: node for node in keras_graph.layer_nodes(model)}
    for number in range(4):
        rest.start_before(model.get_layer(f"conv{number}"))
        parts_of_the_model.append(rest.model)
        (read,) = zip(*rest.read(nodes[f"conv{number}"]), strict=True)
        whole = keras_graph.input_model(model, f"conv{number}")
        assert np.allclose(np.concatenate(read), numpy_outputs(whole, x), atol=1e-6)
        assert np.allclose(rest.outputs(11), expected[:11], atol=1e-6)
    assert len(set(map(id, parts_of_the_model))) == 4 and np.array_equal(x, given)


@pytest.mark.parametrize("size", [6, None])  # None: the network takes images of any size
def test_batch_size_and_number_of_images_follow_the_cost_of_one_image(monkeypatch, size):
    model = network(size)
    macs = 36 * (27 * 4 + 3 * 36 * 4) + 4 * 5
    assert _network_runs.images_within(model, [images(3)], 70.5 * macs) == 70
    values = 36 * 4 * 7 + 4 + 5
    monkeypatch.setattr(_network_runs, "_ACTIVATION_BYTES", 4 * values * 16)
    assert _network_runs.batch_size(model, [images(3)]) == 16


def test_read_keeps_to_the_number_of_images_and_the_size_of_a_batch(monkeypatch):
    model, x = network(), images(30)
    monkeypatch.setattr(_network_runs, "_ACTIVATION_BYTES", 1)  # batches of 8
    node = {node.path: node for node in keras_graph.layer_nodes(model)}["conv1"]
    found = [
        _network_runs.Rest(model, [x], size).read(node, count) for size, count in ((None, None), (None, 20), (5, 8))
    ]
    assert [[len(part) for (part,) in parts] for parts in found] == [[8, 8, 8, 6], [8, 8, 4], [5, 3]]
