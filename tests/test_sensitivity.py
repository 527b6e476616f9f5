"""Predicted losses, compared with losses of networks whose kernels are replaced by hand."""

import keras
import numpy as np
import pytest
from keras import layers
from scipy.stats import spearmanr

from fcnn_utils import _network_runs, calibration, compress, factorizations, keras_graph, sensitivity
from tests.calibration_networks import (
    convolutions,
    least_squares_fit,
    network,
    numpy_outputs,
    patches,
    pictures,
    with_random_weights,
)


def test_layer_sensitivity_is_the_divergence_after_replacing_one_kernel():
    """Each kernel alone replaced by what the module says, in a model of its own."""
    model, images = network(), pictures()
    before = model.get_weights()
    curves = sensitivity.layer_sensitivity(model, "spatial", images, convolutions(model), [0.001, 0.3, 0.6])
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert list(curves) == ["conv1", "conv2"]
    fractions = [[fraction for fraction, _, _ in curve] for curve in curves.values()]
    assert fractions == [[0.3, 0.6]] * 2  # 0.001 is below rank 1
    assert all(curve[0][2] > curve[1][2] > 0 for curve in curves.values())

    other, node = network(), convolutions(model)[1]
    kernel, bias = node.layer.get_weights()
    result = factorizations.decompose(kernel, "spatial", curves["conv2"][0][1])
    kernel, shift = calibration.refit_kernel(kernel, result, calibration.patch_moments(model, node, images))
    other.get_layer("conv2").set_weights([kernel, bias + shift])
    p, q = (numpy_outputs(one, images).astype(float) for one in (model, other))
    assert curves["conv2"][0][2] == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-3)


def test_without_a_bias_the_mean_of_the_batch_norm_takes_the_shift():
    with_bias, without = network(), network(use_bias=False)
    for layer, other in zip(without.layers, with_bias.layers, strict=True):
        other.set_weights([*layer.get_weights(), *([np.zeros(8)] if isinstance(layer, layers.Conv2D) else [])])
    curves = []
    for model in (with_bias, without):
        before = model.get_weights()
        curves.append(sensitivity.layer_sensitivity(model, "spatial", pictures(), convolutions(model), [0.3, 0.6]))
        assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    for path in ("conv1", "conv2"):
        for one, other in zip(curves[0][path], curves[1][path], strict=True):
            assert one[2] == pytest.approx(other[2], rel=1e-3) and one[:2] == other[:2]


@pytest.mark.parametrize("container", [list, dict])
def test_without_probabilities_the_loss_is_the_relative_squared_change_of_all_outputs(container):
    """Without a bias or a norm, the output itself is fitted, with its mean."""
    inputs = keras.Input((10, 9, 6))
    y = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv")(inputs)
    outputs = {"a": y, "b": layers.GlobalAveragePooling2D()(y)}
    model = with_random_weights(keras.Model(inputs, outputs if container is dict else list(outputs.values())))
    (node, *_), images = convolutions(model), pictures(16) + 1  # whose mean counts; one batch, which is read whole
    ((_, ranks, loss),) = sensitivity.layer_sensitivity(model, "spatial", images, [node], [0.3])["conv"]
    kernel = node.layer.get_weights()[0]
    rows, basis = patches(images), factorizations.decompose(kernel, "spatial", ranks).basis()
    y = rows @ kernel.reshape(-1, 8)
    fit = least_squares_fit(rows @ basis, y)
    y, fit = (np.c_[x.reshape(16, -1), x.reshape(16, 90, 8).mean(axis=1)] for x in (y, fit))
    assert loss == pytest.approx(np.mean((fit - y) ** 2) / np.var(y), rel=1e-3)


def test_rank_one_is_tried_where_all_fractions_are_too_small():
    model = network()
    curves = sensitivity.layer_sensitivity(model, "tt", pictures(8), convolutions(model)[:1], [1e-6, 1e-5])
    assert [ranks for _, ranks, _ in curves["conv1"]] == [(1, 1, 1)]


def ladders(nodes, *methods, ranks=(2, 4, 8)):
    return {
        node.path: [(factorizations.get(method), [(r,) for r in ranks], {}) for method in methods] for node in nodes
    }


def test_predicted_losses_are_close_to_measured_ones(monkeypatch):
    """Of 15 candidates a layer six are measured. The others are interpolated by the error of the layer's output."""
    model, images = network(), pictures()
    monkeypatch.setattr(sensitivity, "_LOSS_IMAGES", (16, len(images)))  # as many as `layer_sensitivity` uses
    nodes = convolutions(model)
    found = sensitivity.predict_losses(model, images, ladders(nodes, "spatial", "svd", "cp", ranks=(1, 2, 3, 5, 7)))
    assert list(found) == ["conv1", "conv2"]
    for node in nodes:
        size, predicted, measured = node.layer.kernel.shape, [], []
        for group in found[node.path]:
            fractions = [(c.method.count_parameters(size, c.ranks) + 0.5) / np.prod(size) for c in group]
            curve = sensitivity.layer_sensitivity(
                model, group[0].method, images, [node], fractions, **group[0].options
            )[node.path]
            assert [ranks for _, ranks, _ in curve] == [candidate.ranks for candidate in group]
            assert group[2].loss == pytest.approx(curve[2][2], rel=1e-2)  # the middle one of each method is measured
            predicted += [candidate.loss for candidate in group]
            measured += [loss for *_, loss in curve]
        assert spearmanr(predicted, measured)[0] > 0.94
        assert (
            np.exp(np.mean(np.abs(np.log(np.divide(predicted, measured))))) < 1.5
        )  # one is a third of the measured one


def test_each_loss_of_a_layer_that_is_not_refitted_is_measured(monkeypatch):
    """The loss is that of the network that `factorize` makes, whose mean outputs are corrected."""
    inputs = keras.Input((10, 9, 6))
    x = layers.Conv2D(8, 3, groups=2, activation="relu", name="grouped")(inputs)
    x = layers.Dense(5, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    model, images = with_random_weights(keras.Model(inputs, x)), pictures()
    monkeypatch.setattr(sensitivity, "_LOSS_IMAGES", (16, len(images)))
    (node, _) = [node for node in keras_graph.layer_nodes(model) if node.layer.weights]
    ((group,),) = sensitivity.predict_losses(model, images, ladders([node], "svd", ranks=(1, 2, 3))).values()
    for candidate in group:
        new, _ = compress.factorize(model, ranks={"grouped": ("svd", candidate.ranks)}, images=images, verbose=0)
        p, q = (numpy_outputs(each, images).astype(float) for each in (model, new))
        assert candidate.loss == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-2)


def test_of_an_expensive_network_two_losses_per_layer_are_measured(monkeypatch):
    """They use 16 images. The predicted losses differ from those of a larger budget by less than a factor of 1.5."""
    model, images, counts = network(), pictures(), []
    monkeypatch.setattr(sensitivity, "_LOSS_IMAGES", (16, len(images)))
    nodes = convolutions(model)
    asked = ladders(nodes, "spatial", "svd", "cp", ranks=(1, 2, 3, 5, 7))
    plain, outputs = sensitivity.predict_losses(model, images, asked), _network_runs.Rest.outputs
    monkeypatch.setattr(sensitivity, "_LOSS_MACS", 1)
    monkeypatch.setattr(_network_runs.Rest, "outputs", lambda rest, count: counts.append(count) or outputs(rest, count))
    found = sensitivity.predict_losses(model, images, asked)
    assert counts == [16] * 2 * len(nodes)
    for path in found:
        both = [[each.loss for group in losses[path] for each in group] for losses in (found, plain)]
        assert np.exp(np.mean(np.abs(np.log(np.divide(*both))))) < 1.5


def test_prediction_leaves_the_model_as_it_was():
    model = network()
    before = model.get_weights()
    sensitivity.predict_losses(model, pictures(), ladders(convolutions(model), "spatial"))
    assert all(np.array_equal(one, other) for one, other in zip(before, model.get_weights(), strict=True))


def test_a_layer_that_is_kept_exactly_loses_nothing():
    model = network()
    node = convolutions(model)[0]
    full = factorizations.SpatialSVD.max_ranks(node.layer.kernel.shape)
    ((group,),) = sensitivity.predict_losses(
        model, pictures(), {node.path: [(factorizations.SpatialSVD, [full], {})]}
    ).values()
    assert group[0].loss < 1e-6


def test_output_errors_of_wide_patches_in_float32_are_those_in_float64(monkeypatch):
    """Inputs far from zero, patches of 540 values."""
    keras.utils.set_random_seed(0)
    layer = layers.Conv2D(40, 3, name="wide")
    model = keras.Sequential([keras.Input((9, 9, 60)), layer, layers.Flatten()])
    images = (np.random.default_rng(0).standard_normal((60, 9, 9, 60)) + 30).astype("float32")
    ladders, seen = {"wide": [(factorizations.SVD, [(10,), (39,)], {})]}, {}
    output_error = sensitivity._Trial.output_error
    for size in (500, 1000):
        monkeypatch.setattr(sensitivity, "_FLOAT32_SIZE", size)
        seen[size] = []
        monkeypatch.setattr(
            sensitivity._Trial,
            "output_error",
            lambda trial, step, found=seen[size]: found.append(output_error(trial, step)) or found[-1],
        )
        sensitivity.predict_losses(model, images, ladders)
    assert len(seen[500]) == 2 and np.allclose(seen[500], seen[1000], rtol=2e-5, atol=0)
    assert seen[500] != seen[1000]


def test_svd_with_outputs_has_the_smallest_output_error():
    """Against the truncated SVD of the outputs themselves, which no kernel of that rank can beat."""
    model, images = network(), pictures()
    node = convolutions(model)[0]
    kernel = node.layer.get_weights()[0]
    _, covariance = calibration.patch_moments(model, node, images)
    matrix = kernel.reshape(-1, 8).astype(float)
    outputs = matrix.T @ covariance @ matrix
    for rank in (1, 3, 6):
        errors = []
        for options in ({}, {"outputs": outputs}):
            difference = matrix - factorizations.SVD.decompose(kernel, rank, **options).to_kernel().reshape(
                matrix.shape
            )
            errors.append(np.trace(difference.T @ covariance @ difference))
        assert errors[1] == pytest.approx(np.linalg.eigvalsh(outputs)[:-rank].sum(), rel=1e-6) and errors[1] < errors[0]
    with pytest.raises(ValueError, match="outputs must be a finite covariance of the shape .8, 8."):
        factorizations.SVD.decompose(kernel, 1, outputs=np.eye(3))
