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


@pytest.mark.parametrize("superfluous", [0, 0.3, 1])
def test_rest_computes_what_the_model_computes_and_keeps_the_images_of_the_user(monkeypatch, superfluous):
    model, x = network(), images(20)
    given, kept = x.copy(), []
    monkeypatch.setattr(_network_runs, "_ACTIVATION_BYTES", 1)  # three batches
    monkeypatch.setattr(_network_runs, "_SUPERFLUOUS", superfluous)
    rest = _network_runs.Rest(model, [x])
    nodes = {node.path: node for node in keras_graph.layer_nodes(model)}
    for number in range(4):
        layer = model.get_layer(f"conv{number}")
        rest.start_before(layer)
        kept.append(rest.model)
        (read,) = zip(*rest.read(nodes[layer.name]), strict=True)
        assert np.allclose(
            np.concatenate(read), numpy_outputs(keras_graph.input_model(model, layer.name), x), atol=1e-6
        )
        for scale in (1, 2, -1, 0.5):  # compiled from the third on, which must not fix the weights
            layer.kernel.assign(layer.kernel * scale)
            assert np.allclose(rest.outputs(11), numpy_outputs(model, x[:11]), atol=1e-6)
    assert len(set(map(id, kept))) == 4 and np.array_equal(x, given)


def test_networks_are_compiled_if_they_are_expensive_or_run_often(monkeypatch):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("other backends compile nothing here")
    import tensorflow as tf

    compiled, function = [], tf.function

    def noted(call=None, **options):
        compiled.extend([call] * ("reduce_retracing" in options))
        return function(call, **options)

    monkeypatch.setattr(tf, "function", noted)
    batches = [[images(8)], [images(8)]]
    runner = _network_runs.Runner(network(), batches)
    assert [len(compiled) for _ in range(4) if list(runner())] == [0, 0, 1, 1]
    monkeypatch.setattr(_network_runs, "_COMPILED_MACS", 16 * 3 * runner.macs)
    for times, expected in ((3, 0), (4, 1)):
        compiled.clear()
        list(_network_runs.Runner(network(), batches, times)())
        assert len(compiled) == expected


def test_few_networks_are_made_for_the_outputs(monkeypatch):
    """While at least 40% of a network is still to be run, it is used again; then another one is made."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("other backends start at each layer")
    model, made = network(), []
    monkeypatch.setattr(_network_runs, "_SUPERFLUOUS", 0.6)
    rest = _network_runs.Rest(model, [images(9)])
    for number in range(4):  # left to do: 100%, 80%, 53%, 27% of the MACs
        rest.start_before(model.get_layer(f"conv{number}"))
        rest.outputs(9)
        made += [runner for runner in rest._runners.values() if runner not in made]
    assert [round(runner.macs / made[0].macs, 1) for runner in made] == [1, 0.3]


@pytest.mark.parametrize("size", [6, None])  # None: the network takes images of any size
def test_batch_size_and_number_of_images_follow_the_cost_of_one_image(monkeypatch, size):
    model = network(size)
    macs = 36 * (27 * 4 + 3 * 36 * 4) + 4 * 5
    assert _network_runs.Runner(model, [[images(3)]]).macs == macs
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


def test_images_of_the_shape_of_a_result_stay_unchanged():
    """The outputs of a layer have the shape of the images here. They must not be written into the user's array."""
    convolutions = [layers.Conv2D(4, 3, padding="same", name=f"conv{number}") for number in range(3)]
    model, x = keras.Sequential([keras.Input((6, 6, 4)), *convolutions]), np.ones((20, 6, 6, 4), "float32")
    rest = _network_runs.Rest(model, [x])
    for layer in convolutions[1:]:
        rest.start_before(layer)
    assert (x == 1).all()


def test_a_model_whose_costs_are_not_known_runs_in_small_batches():
    inputs = keras.Input((None, None, 4))
    einsum = layers.EinsumDense("bhwc,c->bhwc", output_shape=(None, None, 4))
    model, x = keras.Model(inputs, einsum(inputs)), np.ones((9, 5, 5, 4), "float32")
    assert np.allclose(_network_runs.outputs_of(model, [x]), numpy_outputs(model, x).reshape(9, 100), atol=1e-6)
    assert _network_runs.batch_size(model, [x]) == 8 and _network_runs.images_within(model, [x], 1e12) == 0
