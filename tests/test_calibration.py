"""Calibration on unlabelled images, compared with least squares, moments and losses computed by hand."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import _network_runs, calibration, compress, factorizations, keras_graph, rank_selection, sensitivity
from tests.calibration_networks import (
    convolutions,
    least_squares_fit,
    makes,
    network,
    numpy_outputs,
    patches,
    pictures,
    reads,
    with_random_weights,
)


def with_ones(rows):
    return np.c_[rows, np.ones(len(rows))]


def spoil(layer):
    rng = np.random.default_rng(0)
    layer.set_weights([weight + rng.normal(0, 1, weight.shape) for weight in layer.get_weights()])


# --- images ------------------------------------------------------------------------------------------------------


def pair_of_inputs(names=("a", "b")):
    one, two = keras.Input((4, 4, 3), name=names[0]), keras.Input((5,), name=names[1])
    return keras.Model({"a": one, "b": two}, layers.Concatenate()([layers.Flatten()(one), two]), name="pair")


def test_images_that_the_model_does_not_take_are_rejected():
    model = keras.Sequential([keras.Input((10, 9, 6)), layers.Flatten()])
    for bad in (np.zeros((3, 10, 9)), np.zeros((3, 10, 9, 5)), np.zeros((0, 10, 9, 6)), [np.nan], "images", ["a"]):
        with pytest.raises(
            ValueError, match=r"must have the shape \(N, 10, 9, 6\), at least one, of floats or integers; got \("
        ):
            calibration.check_images(model, bad)
    with pytest.raises(ValueError, match="finite numbers"):
        calibration.check_images(model, np.full((1, 10, 9, 6), np.inf))
    with pytest.raises(ValueError, match="at least one batch; got none"):
        calibration.check_images(model, iter(()))
    with pytest.raises(ValueError, match="an iterable of batches; got a int"):
        calibration.check_images(model, 3)
    for bad in (np.zeros((1, 4, 4, 3)), [np.zeros((1, 4, 4, 3))]):
        with pytest.raises(ValueError, match=r"the shape \(N, 4, 4, 3\) and \(N, 5\), at least one, of floats"):
            calibration.check_images(pair_of_inputs(), bad)
    with pytest.raises(ValueError, match="keys must be the names of the inputs, a, b; got a"):
        calibration.check_images(pair_of_inputs(), {"a": np.zeros((1, 4, 4, 3))})
    with pytest.raises(ValueError, match=r"the same number of images; got \[1, 2\]"):
        calibration.check_images(pair_of_inputs(), [np.zeros((1, 4, 4, 3)), np.zeros((2, 5))])


class Batches(keras.utils.PyDataset):
    """Pairs of images and labels by number."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def __len__(self):
        return len(self.images) // 4

    def __getitem__(self, number):
        return self.images[4 * number : 4 * number + 4], np.zeros(4)


class Loader:
    """What a PyTorch DataLoader looks like: lists of tensors that have a method `numpy`."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        for start in range(0, len(self.images), 4):
            yield [keras.ops.convert_to_tensor(self.images[start : start + 4]), np.zeros(4)]


def stream(images, labels):
    for start in range(0, len(images), 4):
        yield (images[start : start + 4], np.zeros(4)) if labels else images[start : start + 4]


def tf_dataset(images):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((images, np.zeros(len(images)))).batch(4)


@pytest.mark.parametrize(
    "form",
    [
        list,
        lambda x: (x, np.zeros(len(x))),
        lambda x: [x],
        lambda x: stream(x, labels=False),
        lambda x: stream(x, labels=True),
        Batches,
        Loader,
        tf_dataset,
    ],
)
def test_images_are_taken_in_all_forms(form):
    images = pictures(8)
    model = keras.Sequential([keras.Input((10, 9, 6)), layers.Flatten()])
    (taken,) = calibration.check_images(model, form(images))
    np.testing.assert_array_equal(taken, images)


@pytest.mark.parametrize(
    "form", [list, tuple, lambda x: (x, np.zeros(6)), lambda x: {"b": x[1], "a": x[0]}, lambda x: iter([(x, 1)])]
)
def test_inputs_of_several_are_taken_in_all_forms(form):
    given = [np.ones((6, 4, 4, 3), "float32"), np.zeros((6, 5), "float32")]
    taken = calibration.check_images(pair_of_inputs(), form(given))
    assert len(taken) == 2 and all(map(np.array_equal, taken, given))


def test_of_an_endless_stream_two_thousand_images_are_taken():
    model = keras.Sequential([keras.Input((2,)), layers.Flatten()])
    (taken,) = calibration.check_images(model, (np.ones((300, 2)) for _ in itertools.count()))
    assert taken.shape == (2000, 2)


def after(*first):
    """Make a network of a convolution that reads (8, 8, 3) inputs after other layers."""
    x = inputs = keras.Input((8, 8, 3))
    for layer in first:
        x = layer(x)
    return keras.Model(inputs, layers.Flatten()(layers.Conv2D(4, 3)(x)), name="plain")


def nested(*first):
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, after(*first)(layers.ZeroPadding2D(0)(inputs)), name="plain")


def dense():
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(4)], name="plain")


@pytest.mark.parametrize("make", [after, lambda: after(layers.ZeroPadding2D(0), layers.Dropout(0.5)), nested, dense])
def test_pixels_in_whole_numbers_are_refused_if_a_kernel_reads_them(make):
    with pytest.raises(ValueError, match="images are whole numbers .uint8., and model 'plain' does not rescale them"):
        calibration.check_images(make(), np.full((2, 8, 8, 3), 255, "uint8"))


@pytest.mark.filterwarnings("ignore:the calibration images do not look like")
@pytest.mark.parametrize(
    "make",
    [
        lambda: after(layers.Rescaling(1 / 255)),
        lambda: after(lambda x: x / 255),
        lambda: after(layers.BatchNormalization()),
        lambda: nested(layers.Rescaling(1 / 255)),
        lambda: keras.Sequential([keras.Input((8, 8, 3), dtype="uint8"), layers.Flatten()]),
        lambda: keras.Sequential([keras.Input((8, 8, 3)), layers.Reshape((-1,)), layers.Embedding(256, 4)]),
    ],
)
def test_whole_numbers_are_taken_if_no_kernel_reads_them(make):
    model, images = make(), np.full((2, 8, 8, 3), 255, "uint8")
    assert calibration.check_images(model, images)[0].dtype == model.inputs[0].dtype


def test_whole_numbers_that_are_no_pixels_are_taken():
    assert calibration.check_images(after(), np.ones((2, 8, 8, 3), "uint8"))[0].dtype == "float32"
    features = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    assert calibration.check_images(features, np.full((2, 5), 40))[0].dtype == "float32"


@pytest.mark.parametrize("wrong", [lambda x: 255 * x, lambda x: 0 * x, lambda x: 0.1 * x, lambda x: x + 20])
def test_images_unlike_those_of_the_training_are_told(wrong):
    model = network()
    with pytest.warns(UserWarning, match="at 'bn1' the standard deviation is .*, in training it was"):
        calibration.check_images(model, wrong(pictures()))


def test_images_like_those_of_the_training_are_taken_without_a_word(recwarn):
    calibration.check_images(network(), pictures(32, seed=5))
    assert not [str(warning.message) for warning in recwarn if "training" in str(warning.message)]


def test_images_far_from_zero_like_those_of_the_training_are_taken_without_a_word(recwarn):
    model = keras.Sequential([keras.Input((6, 6, 3)), layers.BatchNormalization()])
    model.layers[0].moving_mean.assign([10.0] * 3)
    calibration.check_images(model, 10 + np.random.default_rng(0).standard_normal((40, 6, 6, 3)))
    assert not [warning for warning in recwarn if "calibration images" in str(warning.message)]


def test_values_that_are_not_finite_are_an_error_that_names_the_layer():
    model = network()
    model.get_layer("bn1").gamma.assign(np.full(8, np.inf))
    node = convolutions(model)[1]
    with pytest.raises(ValueError, match="layer 'conv2' reads or computes values that are not finite"):
        calibration.patch_moments(model, node, pictures())


# --- batch-norm statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, 300])  # fewer than a batch, and not a multiple of one
@pytest.mark.parametrize(("memory", "size"), [(2**30, 128), (1, 32)])
def test_reestimated_statistics_are_those_of_the_images(monkeypatch, count, memory, size):
    monkeypatch.setattr(_network_runs, "_ACTIVATION_BYTES", memory)
    model, images = network(), pictures(count, seed=5)
    frozen = model.get_layer("bn2")
    frozen.trainable, before = False, frozen.get_weights()[2]
    calibration.reestimate(model, images)
    x = reads(model, "bn1", images)
    mean, variance = model.get_layer("bn1").get_weights()[2:]
    batches = [x[start : start + size] for start in range(0, count, size)]
    assert np.allclose(mean, x.mean(axis=(0, 1, 2)), atol=1e-4)
    expected = sum(len(batch) * batch.var(axis=(0, 1, 2)) for batch in batches) / count
    assert np.allclose(variance, expected, rtol=1e-3)
    assert (frozen.trainable, frozen.momentum, model.get_layer("bn1").momentum) == (False, 0.99, 0.99)
    assert not np.allclose(frozen.get_weights()[2], before)  # frozen means: not changed by training


def test_reestimate_leaves_a_model_without_batch_norms_alone():
    inputs = keras.Input((10, 9, 6))
    model = keras.Model(inputs, layers.Conv2D(3, 3)(inputs))
    before = model.get_weights()
    calibration.reestimate(model, pictures(4))
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


# --- refitted factors --------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_patches_that_a_layer_reads():
    model, images = network(), pictures(200)
    mean, covariance = calibration.patch_moments(model, convolutions(model)[1], images)
    x = patches(
        reads(model, "conv2", images[:128])
    )  # reading stops after 128 images: there are more than 3 · D patches
    assert np.allclose(mean, x.mean(axis=0), atol=1e-4) and np.allclose(covariance, np.cov(x.T, bias=True), atol=1e-3)


@pytest.mark.parametrize("kernel", [1, 2, (3, 1), (2, 5)])
@pytest.mark.parametrize("strides, dilation", [(1, 1), (1, 2), (1, (3, 1)), (2, 1), (3, 1), ((1, 2), 1)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_moments_of_the_patches_predict_those_of_the_outputs_in_every_geometry(kernel, strides, dilation, padding):
    image = keras.Input((11, 10, 3))
    layer = layers.Conv2D(4, kernel, strides, padding, dilation_rate=dilation)
    model, images = keras.Model(image, layer(image)), np.random.default_rng(0).standard_normal((24, 11, 10, 3))
    mean, covariance = calibration.patch_moments(model, convolutions(model)[0], images)
    weights, outputs = layer.get_weights()[0].reshape(-1, 4), numpy_outputs(model, images).reshape(-1, 4)
    assert np.allclose(mean @ weights, outputs.mean(axis=0), atol=1e-5)
    assert np.allclose(weights.T @ covariance @ weights, np.cov(outputs.T, bias=True), atol=1e-4)


@pytest.mark.parametrize(("width", "expected"), [(4, 128), (60, 184)])  # in batches of 8: 128 images, or 3 · 60 rows
def test_moments_are_read_from_128_images_or_more_if_rows_are_wide(monkeypatch, width, expected):
    monkeypatch.setattr(_network_runs, "_ACTIVATION_BYTES", 1)
    model = keras.Sequential([keras.Input((width,)), layers.Dense(3)])
    x = np.random.default_rng(0).standard_normal((200, width)).astype("float32")
    (node,) = keras_graph.layer_nodes(model)
    assert np.allclose(calibration.patch_moments(model, node, x)[0], x[:expected].mean(axis=0), atol=1e-6)


def test_an_expensive_network_gets_fewer_images_but_at_least_128(monkeypatch):
    model, x = keras.Sequential([keras.Input((4,)), layers.Dense(3)]), np.zeros((300, 4), "float32")
    for budget, expected in ((5e11, 300), (12 * 200, 200), (1, 128)):
        monkeypatch.setattr(calibration, "_PASS_MACS", budget)
        assert len(calibration.limit_images(model, [x])[0]) == expected


def test_a_covariance_of_few_rows_is_shrunk():
    """As scikit-learn's OAS does: rows that are fewer than their values say nothing about most directions."""
    from sklearn.covariance import OAS

    inputs = keras.Input((30,))
    model, rows = keras.Model(inputs, layers.Dense(4, name="dense")(inputs)), np.random.default_rng(0)
    rows = rows.standard_normal((20, 30)) * np.arange(1, 31)
    (node,) = [node for node in keras_graph.layer_nodes(model) if node.path == "dense"]
    mean, covariance = calibration.patch_moments(model, node, rows)
    expected = OAS(assume_centered=True).fit(rows - rows.mean(axis=0)).covariance_
    assert np.allclose(mean, rows.mean(axis=0), atol=1e-5) and np.allclose(covariance, expected, rtol=1e-4, atol=1e-3)
    assert np.linalg.eigvalsh(covariance)[0] > 1


def test_moments_of_large_images_come_from_all_columns():
    image = keras.Input((100, 100, 1))
    layer = layers.Conv2D(2, 1)
    model, images = keras.Model(image, layer(image)), np.zeros((10, 100, 100, 1))
    images[:, :, ::5] = 1.0  # every fifth patch would see ones only
    mean, covariance = calibration.patch_moments(model, convolutions(model)[0], images)
    assert mean[0] == pytest.approx(0.2, abs=0.01) and covariance[0, 0] == pytest.approx(0.16, abs=0.01)


def test_a_refitted_kernel_is_the_least_squares_fit_of_the_outputs():
    model, images = network(), pictures()
    kernel = model.get_layer("conv2").get_weights()[0].astype(float)
    x = patches(reads(model, "conv2", images))
    moments, target = (x.mean(axis=0), np.cov(x.T, bias=True)), x @ kernel.reshape(-1, 8)
    for method in factorizations.FACTORIZATIONS:
        ranks = rank_selection.ranks_for_fraction(method, kernel.shape, 0.4)
        result = factorizations.decompose(kernel, method, ranks)
        refitted, shift = calibration.refit_kernel(kernel, result, moments)
        found = x @ refitted.reshape(-1, 8) + shift
        assert np.allclose(found, least_squares_fit(with_ones(x @ result.basis()), target), atol=2e-3 * target.std())
        plain = x @ result.to_kernel().reshape(-1, 8)
        assert np.mean((found - target) ** 2) < 0.9 * np.mean((plain - target) ** 2)


@pytest.mark.parametrize("use_bias", [True, False])
def test_refitting_restores_a_spoilt_last_layer(use_bias):
    """At full rank the dense output can be met, so least squares must meet it."""
    model, images = network(use_bias=use_bias), pictures()
    name = "conv2" if use_bias else "bn2"  # without a bias, the batch norm's mean takes its place
    expected = makes(model, name, images)
    for method in ("cp", "tt", "spatial", "separable"):
        whole = factorizations.get(method).max_ranks((3, 3, 8, 8))
        new, _ = compress.factorize(model, method, ranks={"conv2": whole})
        spoil(new.get_layer("conv2"))
        spoilt = np.abs(expected - makes(new, name, images)).max()
        calibration.refit_layers(new, model, images)
        assert np.abs(expected - makes(new, name, images)).max() < 1e-2 * spoilt
        variances = [one.get_layer("bn2").get_weights()[3] for one in (model, new)]
        assert np.array_equal(*variances)  # those of the dense network


@pytest.mark.parametrize("use_bias", [True, False])
def test_refitting_keeps_the_mean_of_a_truncated_layer(use_bias):
    model, images = network(use_bias=use_bias), pictures()
    new, _ = compress.factorize(model, "cp", ranks={"conv2": 2}, images=images)
    expected, found = (makes(one, "bn2", images).mean(axis=(0, 1, 2)) for one in (model, new))
    assert np.allclose(found, expected, atol=1e-3)
    assert np.abs(makes(new, "bn2", images) - makes(model, "bn2", images)).max() > 0.1


def test_refitting_corrects_the_errors_of_the_layers_before():
    """The second chain's last layer is the least-squares fit, by hand, of the dense output to what it reads: the output
    of the first, truncated chain. So it is nearer than a fit that assumes an undamaged input."""
    model, images, given = network(), pictures(), {"conv1": 5, "conv2": 5}
    plain, _ = compress.factorize(model, "cp", ranks=given)
    corrected, _ = compress.factorize(model, "cp", ranks=given, images=images)
    features, target = reads(corrected, "conv2", images).reshape(-1, 5), makes(model, "conv2", images).reshape(-1, 8)
    best = least_squares_fit(with_ones(features.astype(float)), target)
    assert np.allclose(makes(corrected, "conv2", images).reshape(-1, 8), best, atol=1e-2 * target.std())

    alone = keras_graph.rebuild(model, {})  # each layer refitted to what it reads in the dense network
    for node, rank in zip(convolutions(model), given.values(), strict=True):
        kernel, bias = node.layer.get_weights()
        result = factorizations.decompose(kernel, "cp", rank, max_norm=1.0)
        refitted, shift = calibration.refit_kernel(kernel, result, calibration.patch_moments(model, node, images))
        alone.get_layer(node.path).set_weights([refitted, bias + shift])
    unseen = pictures(seed=2)
    expected = makes(model, "conv2", unseen)
    errors = [np.mean((makes(one, "conv2", unseen) - expected) ** 2) for one in (corrected, alone, plain)]
    assert errors[0] < errors[1] < 0.75 * errors[2]


def test_refitting_a_shared_layer_fits_all_its_calls():
    inputs = keras.Input((10, 9, 6))
    shared = layers.Conv2D(6, 3, padding="same", activation="tanh", name="shared")
    model = with_random_weights(keras.Model(inputs, shared(shared(inputs))))
    new, _ = compress.factorize(model, "cp", ranks={"shared": 4})
    images = pictures()
    features, dense_inputs = (keras_graph.input_model(one, "shared")(images) for one in (new, model))
    features, dense_inputs = (list(map(keras.ops.convert_to_numpy, each)) for each in (features, dense_inputs))
    kernel, bias = shared.get_weights()
    target = np.concatenate([patches(x) @ kernel.reshape(-1, 6) + bias for x in dense_inputs])
    rows = with_ones(np.concatenate([x.reshape(-1, 4) for x in features]).astype(float))
    calibration.refit_layers(new, model, images)
    weights, bias = new.get_layer("shared").get_weights()
    found = rows @ np.r_[weights.reshape(4, 6), bias[None]]
    assert np.allclose(found, least_squares_fit(rows, target), atol=1e-2 * target.std())


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_nested_model_is_calibrated_as_a_flat_one(use_bias):
    images, found = pictures(), []
    for nested in (False, True):
        model = network(use_bias=use_bias, nested=nested)
        paths = ["conv1", "inner/conv2" if nested else "conv2"]
        curves = sensitivity.layer_sensitivity(model, "spatial", images, convolutions(model), [0.3, 0.6])
        assert list(curves) == paths
        new, _ = compress.factorize(model, "cp", ranks=dict.fromkeys(paths, 5), images=images)
        refitted = numpy_outputs(new, images)
        calibration.reestimate(new, pictures(seed=3))
        found.append((list(curves.values()), refitted, numpy_outputs(new, images)))
        assert not np.allclose(refitted, found[-1][2], atol=1e-4)
    (flat, *flat_outputs), (nested, *nested_outputs) = found
    assert np.allclose([loss for curve in flat for *_, loss in curve], [loss for curve in nested for *_, loss in curve])
    for one, other in zip(flat_outputs, nested_outputs, strict=True):
        assert np.allclose(one, other, atol=1e-5)


def test_refits_work_for_rows_of_a_constant_sum():
    """The covariance of such rows (after a softmax) times a vector of ones is zero."""
    gram = np.array([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]])
    wanted = np.array([[0.5, 2], [-0.5, -2], [0, 0]])
    assert np.allclose(calibration._least_squares(gram, gram @ wanted), wanted, atol=1e-5)


def test_a_gram_matrix_with_a_negative_eigenvalue_is_solved_where_it_is_known():
    rng = np.random.default_rng(0)
    vectors, right = np.linalg.qr(rng.standard_normal((4, 4)))[0], rng.standard_normal((4, 2))
    gram, known = vectors * [1, 0.5, 0.2, -1e-5] @ vectors.T, vectors[:, :3]  # -1e-5: rounding
    expected = known.T @ right / np.array([1, 0.5, 0.2])[:, None]
    assert np.allclose(known.T @ calibration._least_squares(gram, right), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "make", "method", "rank", "count"),
    [
        ((60, 60, 16), lambda: layers.Conv2D(96, 3, name="layer"), "svd", 60, 1),  # one large image
        ((60, 60, 16), lambda: layers.Conv2D(96, 3, name="layer"), "cp", 120, 1),
        ((200,), lambda: layers.Dense(120, name="layer"), "svd", 60, 64),  # hardly more rows than weights of a column
    ],
)
def test_refits_to_few_images_are_better_than_none_on_other_images(shape, make, method, rank, count):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(shape), make()])
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((shape[-1],) * 2) * np.geomspace(1, 0.02, shape[-1])

    def images(number):
        return (rng.standard_normal((number, *shape)) @ mix).astype("float32")

    some, others = images(count), images(100)
    expected, errors = model.predict(others, verbose=0), []
    for given in (some, None):
        new, _ = compress.factorize(model, method, ranks={"layer": rank}, images=given, verbose=0)
        errors.append(np.linalg.norm(new.predict(others, verbose=0) - expected))
    assert errors[0] < 0.95 * errors[1]
