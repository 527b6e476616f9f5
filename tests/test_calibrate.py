"""What images without labels do for a factorized network: `fcnn_utils.calibrate`."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import calibrate, convert, decompose, keras_graph, ranks


def network(activation="relu", use_bias=True, softmax=True):
    """Two convolutions with batch norms, random weights."""
    rng = np.random.default_rng(0)
    x = inputs = keras.Input((10, 9, 6))
    for number in (1, 2):
        x = layers.Conv2D(8, 3, padding="same", use_bias=use_bias, name=f"conv{number}")(x)
        x = layers.Activation(activation)(layers.BatchNormalization(name=f"bn{number}")(x))
    x = layers.Dense(5, activation="softmax" if softmax else None)(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, x)
    for weight in model.trainable_variables:
        scale = 0.1 if "kernel" in weight.path else 0.3
        weight.assign(rng.normal(1.0 if "gamma" in weight.path else 0.0, scale, weight.shape))
    calibrate.reestimate(model, pictures())  # statistics that a training on such images would have left
    return model


def pictures(count=64, seed=1):
    """Smooth: neighbours resemble each other, channels too."""
    noise = np.random.default_rng(seed).standard_normal((count, 12, 11, 6))
    smooth = sum(noise[:, i : i + 10, j : j + 9] for i, j in itertools.product(range(3), range(3)))
    return (smooth + 2 * smooth.mean(axis=-1, keepdims=True)).astype("float32")


def reads(model, name):
    """Model from the images to what a layer reads."""
    return keras.Model(model.input, model.get_layer(name).input)


def makes(model, name, images):
    return keras.ops.convert_to_numpy(keras.Model(model.input, model.get_layer(name).output)(images))


# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.zeros((3, 10, 9)), np.zeros((3, 10, 9, 5)), np.zeros((0, 10, 9, 6)), [np.nan]])
def test_images_that_the_model_does_not_take(bad):
    with pytest.raises(ValueError, match=r"finite numbers of the shape \(N, 10, 9, 6\), at least one; got \("):
        calibrate.check_images(network(), bad)
    with pytest.raises(ValueError, match="finite numbers"):
        calibrate.check_images(network(), np.full((1, 10, 9, 6), np.inf))


def test_a_model_of_two_inputs_is_refused():
    one, two = keras.Input((4, 4, 3), name="a"), keras.Input((4, 4, 3), name="b")
    with pytest.raises(ValueError, match="one input; 'pair' has 2"):
        calibrate.check_images(keras.Model([one, two], layers.Add()([one, two]), name="pair"), np.zeros((1, 4, 4, 3)))


# --- correct: statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, 300])  # fewer than a batch, and no multiple of one
def test_statistics_are_those_of_the_images(count):
    model, images = network(), pictures(count, seed=5)
    frozen = model.get_layer("bn2")
    frozen.trainable = False
    calibrate.reestimate(model, images)
    x = keras.ops.convert_to_numpy(reads(model, "bn1")(images))
    mean, variance = (np.asarray(value) for value in model.get_layer("bn1").get_weights()[2:])
    batches = [x[start : start + 128] for start in range(0, count, 128)]
    assert np.allclose(mean, x.mean(axis=(0, 1, 2)), atol=1e-4)
    expected = sum(len(part) * part.var(axis=(0, 1, 2)) for part in batches) / count
    assert np.allclose(variance, expected, rtol=1e-3)
    assert (frozen.trainable, frozen.momentum, model.get_layer("bn1").momentum) == (False, 0.99, 0.99)
    before = network().get_layer("bn2").get_weights()[2]
    assert not np.allclose(frozen.get_weights()[2], before)  # frozen is what training leaves alone


def test_without_batch_norms_nothing_happens():
    inputs = keras.Input((10, 9, 6))
    model = keras.Model(inputs, layers.Conv2D(3, 3)(inputs))
    before = model.get_weights()
    calibrate.reestimate(model, pictures(4))
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


# --- correct: factors --------------------------------------------------------------------------------------------


def patches_by_hand(x):
    """(N h w, 9 S) of a 3×3 kernel with `same` padding."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))  # (N, h, w, S, 3, 3)
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[-1]).astype(float)


@pytest.mark.parametrize("method", ranks.METHODS)
def test_a_refitted_kernel_is_the_least_squares_fit_of_the_outputs(method):
    model, images = network(), pictures()
    layer = model.get_layer("conv2")
    kernel = layer.get_weights()[0].astype(float)
    x = patches_by_hand(keras.ops.convert_to_numpy(reads(model, "conv2")(images)))
    mean, covariance = x.mean(axis=0), np.cov(x.T, bias=True)
    result = decompose.decompose(kernel, method, ranks.for_fraction(method, kernel.shape, 0.4))
    refitted, shift = calibrate.refitted(kernel, result, (mean, covariance))

    features, target = np.c_[x @ result.basis(), np.ones(len(x))], x @ kernel.reshape(-1, 8)
    expected = features @ np.linalg.lstsq(features, target, rcond=None)[0]
    found = x @ refitted.reshape(-1, 8) + shift
    assert np.allclose(found, expected, atol=2e-3 * target.std())
    plain = x @ result.to_kernel().reshape(-1, 8)
    assert np.mean((found - target) ** 2) < 0.9 * np.mean((plain - target) ** 2)


def test_the_moments_of_what_a_layer_reads():
    model, images = network(), pictures(200)
    mean, covariance = calibrate.moment(model, model.get_layer("conv2"), images)
    used = 16 * -(-(20 * 72 + 1) // (16 * 90))  # it stops when it has seen 20 patches a value
    x = patches_by_hand(keras.ops.convert_to_numpy(reads(model, "conv2")(images[:used])))
    assert np.allclose(mean, x.mean(axis=0), atol=1e-4) and np.allclose(covariance, np.cov(x.T, bias=True), atol=1e-3)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("method", ["cp", "tt", "spatial", "separable"])
def test_correction_finds_back_a_last_layer_that_was_spoilt(method, use_bias):
    """At full rank the dense output can be met, so that least squares must meet it."""
    model, images = network(use_bias=use_bias), pictures()
    whole = ranks.maximum(method, (3, 3, 8, 8))
    new, _ = convert.factorize(model, method, ranks={"conv2": whole})
    last = new.get_layer("conv2")
    rng = np.random.default_rng(0)
    last.set_weights([weight + rng.normal(0, 1, weight.shape) for weight in last.get_weights()])
    name = "conv2" if use_bias else "bn2"  # without a bias the batch norm's mean takes its place
    spoilt = np.abs(makes(model, name, images) - makes(new, name, images)).max()
    calibrate.correct(new, model, images)
    difference = makes(model, name, images) - makes(new, name, images)
    assert np.abs(difference).max() < 1e-2 * spoilt
    variances = [one.get_layer("bn2").get_weights()[3] for one in (model, new)]
    assert np.array_equal(*variances)  # the dense network's


def test_correction_makes_up_for_the_layers_before():
    """The second chain's last layer is the least-squares fit, by hand, of the dense output to what it reads: the work
    of the first, truncated chain. So it is nearer than a fit that takes the first for undamaged."""
    model, images = network(), pictures()
    given = {"conv1": 5, "conv2": 5}
    plain, _ = convert.factorize(model, "cp", ranks=given)
    corrected, _ = convert.factorize(model, "cp", ranks=given, images=images)
    features = keras.ops.convert_to_numpy(reads(corrected, "conv2")(images)).reshape(-1, 5).astype(float)
    features, target = np.c_[features, np.ones(len(features))], makes(model, "conv2", images).reshape(-1, 8)
    best = features @ np.linalg.lstsq(features, target, rcond=None)[0]
    assert np.allclose(makes(corrected, "conv2", images).reshape(-1, 8), best, atol=1e-2 * target.std())

    alone = keras_graph.rebuild(model, {})  # each layer by itself, for what the dense network hands on
    for name, rank in given.items():
        kernel, bias = model.get_layer(name).get_weights()
        seen = calibrate.moment(model, model.get_layer(name), images)
        refitted, shift = calibrate.refitted(kernel, decompose.cp(kernel, rank, max_norm=1.0), seen)
        alone.get_layer(name).set_weights([refitted, bias + shift])
    expected = makes(model, "conv2", pictures(seed=2))
    errors = [np.mean((makes(one, "conv2", pictures(seed=2)) - expected) ** 2) for one in (corrected, alone, plain)]
    assert errors[0] < errors[1] < 0.75 * errors[2]


# --- correct: ranks ----------------------------------------------------------------------------------------------


def test_sensitivity_by_hand():
    """Each kernel alone replaced by what the module says, in a model of its own."""
    model, images = network(), pictures()
    places = [place for place in keras_graph.layer_nodes(model) if isinstance(place.layer, layers.Conv2D)]
    before = model.get_weights()
    curves = calibrate.sensitivity(model, "spatial", images, places, [0.001, 0.3, 0.6])
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert [path for path in curves] == ["conv1", "conv2"]
    fractions = [[fraction for fraction, _, _ in curve] for curve in curves.values()]
    assert fractions == [[0.3, 0.6]] * 2  # 0.001 is below rank 1
    assert all(curve[0][2] > curve[1][2] > 0 for curve in curves.values())

    other, layer = network(), model.get_layer("conv2")
    kernel, bias = layer.get_weights()
    result = decompose.spatial_svd(kernel, curves["conv2"][0][1])
    kernel, shift = calibrate.refitted(kernel, result, calibrate.moment(model, layer, images))
    other.get_layer("conv2").set_weights([kernel, bias + shift])
    p, q = (one.predict_on_batch(images).astype(float) for one in (model, other))
    assert curves["conv2"][0][2] == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)), rel=1e-3)


def test_sensitivity_is_the_same_without_a_bias_before_a_batch_norm():
    """The norm's mean takes what a bias of zero would."""
    with_bias, without = network(), network(use_bias=False)
    for layer, other in zip(without.layers, with_bias.layers, strict=True):
        is_convolution = isinstance(layer, layers.Conv2D)
        other.set_weights([*layer.get_weights(), *([np.zeros(8)] if is_convolution else [])])
    both = []
    for model in (with_bias, without):
        places = [place for place in keras_graph.layer_nodes(model) if isinstance(place.layer, layers.Conv2D)]
        before = model.get_weights()
        both.append(calibrate.sensitivity(model, "spatial", pictures(), places, [0.3, 0.6]))
        assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    for path in ("conv1", "conv2"):
        for one, other in zip(both[0][path], both[1][path], strict=True):
            assert one[2] == pytest.approx(other[2], rel=1e-3) and one[:2] == other[:2]


def test_sensitivity_without_a_bias_or_a_norm_fits_the_output_itself():
    inputs = keras.Input((10, 9, 6))
    model = keras.Model(inputs, layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv")(inputs))
    (place,) = keras_graph.layer_nodes(model)
    place.layer.set_weights([np.random.default_rng(0).standard_normal(place.layer.kernel.shape)])
    images = pictures(16) + 1  # whose mean counts; one batch, which `moment` takes whole
    ((_, taken, loss),) = calibrate.sensitivity(model, "spatial", images, [place], [0.3])["conv"]
    kernel = model.get_layer("conv").get_weights()[0]
    rows, basis = patches_by_hand(images), decompose.spatial_svd(kernel, taken).basis()
    y = rows @ kernel.reshape(-1, 8)
    fit = rows @ basis @ np.linalg.lstsq(rows @ basis, y, rcond=None)[0]
    assert loss == pytest.approx(np.mean((fit - y) ** 2) / np.var(y), rel=1e-4)


def test_where_all_fractions_are_too_small_rank_one_is_tried():
    model = network()
    places = [place for place in keras_graph.layer_nodes(model) if isinstance(place.layer, layers.Conv2D)]
    curves = calibrate.sensitivity(model, "tt", pictures(8), places[:1], [1e-6, 1e-5])
    assert [taken for _, taken, _ in curves["conv1"]] == [(1, 1, 1)]


def test_without_probabilities_the_loss_is_the_relative_square():
    before = np.array([[1.0, -1.0], [3.0, 5.0]])
    assert calibrate._loss(before, before) == 0
    assert calibrate._loss(before, before + 1) == pytest.approx(1 / np.var(before))
    assert calibrate._loss(np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])) == pytest.approx(0.5108, abs=1e-3)


def test_all_outputs_of_a_model_count_whatever_they_are_held_in():
    inputs = keras.Input((2, 2, 1))
    flat, mean = layers.Flatten()(inputs), layers.GlobalAveragePooling2D()(inputs)
    x = np.arange(12, dtype="float32").reshape(3, 2, 2, 1)
    for held in ([flat, mean], {"flat": flat, "mean": mean}):
        seen = calibrate._outputs(keras.Model(inputs, held), x)
        assert np.allclose(seen, np.column_stack([x.reshape(3, 4), x.mean(axis=(1, 2))]))


def test_the_choice_is_the_best_of_all():
    """Against every combination, on curves whose costs are their fractions."""
    rng = np.random.default_rng(0)
    curves, costs = {}, {}
    for path in "abc":
        fractions = np.array([0.1, 0.2, 0.4])
        curves[path] = [(f, None, loss) for f, loss in zip(fractions, np.sort(rng.uniform(0, 1, 3))[::-1], strict=True)]
        size = int(rng.integers(50, 150))
        costs[path] = lambda f, size=size: (None, float(size)) if f is None else ((round(f, 6),), size * f)
    for budget in (30.0, 60.0, 120.0):
        plan = calibrate.choose(curves, costs, budget)
        assert sum(costs[path](plan[path][0] if path in plan else None)[1] for path in curves) <= budget
        assert total_loss(curves, plan) <= best_of_all(curves, costs, budget) * (1 + 1e-6) + 0.02


def test_a_budget_that_no_points_meet_is_refused():
    curves = {"a": [(0.1, None, 0.5)], "b": []}
    costs = {"a": lambda f: (None, 100.0) if f is None else ((1,), 60.0), "b": lambda f: (None, 50.0)}
    with pytest.raises(ValueError, match="no points of the curves together cost at most 100"):
        calibrate.choose(curves, costs, 100.0)
    assert calibrate.choose(curves, costs, 111.0) == {"a": (1,)}


def total_loss(curves, plan):
    return sum(interpolated(curves[path], plan[path][0]) for path in plan)


def interpolated(curve, fraction):
    fractions, losses = np.log([(f, loss) for f, _, loss in curve]).T
    return float(np.exp(np.interp(np.log(fraction), fractions, losses)))


def best_of_all(curves, costs, budget):
    options = {
        path: [(costs[path](None)[1], 0.0)]
        + [(costs[path](f)[1], interpolated(curve, f)) for f in np.geomspace(0.1, 0.4, 60)]
        for path, curve in curves.items()
    }
    combinations = itertools.product(*options.values())
    return min(sum(loss for _, loss in each) for each in combinations if sum(cost for cost, _ in each) <= budget)


def test_within_a_large_budget_everything_stays_dense():
    curves = {"a": [(0.1, None, 0.5)]}
    assert calibrate.choose(curves, {"a": lambda f: (None, 10.0) if f is None else ((1,), 10 * f)}, 10.0) == {}
    assert calibrate.choose(curves, {"a": lambda f: (None, 10.0) if f is None else ((1,), 10 * f)}, 9.0) == {"a": (1,)}
