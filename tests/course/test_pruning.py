"""Structured filter pruning, the baseline of the comparison with factorized networks."""

import keras
import numpy as np
import pytest
from keras import layers

import fcnn_utils as fcnn
from fcnn_utils.course import networks, pruning


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(1)
    net = networks.build("simple", (8, 8, 3), 10, width=0.125)
    for layer in net.layers:
        if isinstance(layer, layers.BatchNormalization):
            size = layer.gamma.shape[0]
            values = np.random.default_rng(size).uniform(0.5, 1.5, (4, size))
            layer.set_weights(list(values))
    return net


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(2).normal(size=(60, 8, 8, 3)).astype("float32")


def logits(model, images):
    return keras.Model(model.inputs, model.get_layer("pool").output).predict(images, verbose=0)


def relative_error(pruned, model, images):
    wanted = logits(model, images)
    return np.linalg.norm(logits(pruned, images) - wanted) / np.linalg.norm(wanted)


def test_whole_budget_keeps_the_network(model, images):
    macs = fcnn.total_costs(model)["macs"]
    for given in (None, images):
        pruned = pruning.prune_filters(model, macs, images=given)
        assert fcnn.total_costs(pruned)["macs"] == macs
        assert relative_error(pruned, model, images) < 1e-2


def test_filters_with_the_smallest_l1_norm_are_removed(model):
    macs = fcnn.total_costs(model)["macs"]
    pruned = pruning.prune_filters(model, macs / 3)
    assert 0.2 * macs < fcnn.total_costs(pruned)["macs"] <= macs / 3
    kernel, bias = model.get_layer("conv3").get_weights()
    before = model.get_layer("conv2").get_weights()[0]
    count = pruned.get_layer("conv3").filters
    kept = np.sort(np.argsort(-np.abs(kernel).sum(axis=(0, 1, 2)))[:count])
    read = np.sort(np.argsort(-np.abs(before).sum(axis=(0, 1, 2)))[: pruned.get_layer("conv2").filters])
    assert np.array_equal(pruned.get_layer("conv3").get_weights()[0], kernel[:, :, read][..., kept])
    assert np.array_equal(pruned.get_layer("bn3").get_weights()[0], model.get_layer("bn3").get_weights()[0][kept])
    assert pruned.output_shape == model.output_shape


def test_channels_that_are_always_zero_are_removed_first(model, images):
    """Half of the channels of every layer are switched off: without them nothing changes."""
    off = keras.models.clone_model(model)
    off.set_weights(model.get_weights())
    macs = {}
    for number in range(1, 9):
        gamma, beta, mean, variance = off.get_layer(f"bn{number}").get_weights()
        gamma[::2], beta[::2] = 0, -1
        off.get_layer(f"bn{number}").set_weights([gamma, beta, mean, variance])
        macs[number] = off.get_layer(f"conv{number}").filters // 2
    half = networks.build("simple", (8, 8, 3), 10, width=0.0625)
    assert [half.get_layer(f"conv{n}").filters for n in range(1, 9)] == list(macs.values())
    pruned = pruning.prune_filters(off, fcnn.total_costs(half)["macs"], by="activation", images=images)
    assert relative_error(pruned, off, images) < 1e-2
    assert relative_error(pruning.prune_filters(off, fcnn.total_costs(half)["macs"]), off, images) > 0.1


def test_fit_to_images_brings_the_outputs_nearer(model, images):
    macs = fcnn.total_costs(model)["macs"] / 2
    plain, fitted = (pruning.prune_filters(model, macs, images=given) for given in (None, images))
    other = np.random.default_rng(3).normal(size=(60, 8, 8, 3)).astype("float32")
    assert relative_error(fitted, model, other) < 0.5 * relative_error(plain, model, other)


def test_numbers_of_filters_are_multiples(model):
    pruned = pruning.prune_filters(model, fcnn.total_costs(model)["macs"] / 2, multiple=4)
    convolutions = [layer for layer in pruned.layers if isinstance(layer, layers.Conv2D)]
    assert all(layer.filters % 4 == 0 for layer in convolutions[:-1]) and convolutions[-1].filters == 10


def test_rejects_other_networks_and_small_budgets(model):
    with pytest.raises(ValueError, match="macs must be at least"):
        pruning.prune_filters(model, 10)
    with pytest.raises(ValueError, match="needs images"):
        pruning.prune_filters(model, 1e6, by="activation")
    with pytest.raises(ValueError, match="in a row"):
        pruning.prune_filters(networks.build("deeper_separable", (8, 8, 3), 10, width=0.25), 1e6)
    with pytest.raises(ValueError, match="by must be one of"):
        pruning.prune_filters(model, 1e6, by="random")
