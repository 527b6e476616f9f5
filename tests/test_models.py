"""The three networks: `fcnn_utils.course.networks`."""

import keras
import numpy as np
import pytest

from fcnn_utils import cost
from fcnn_utils.course import networks, records, thesis

NAMES = list(networks.THESIS_PLANS)


@pytest.fixture(scope="module")
def networks():
    keras.utils.set_random_seed(0)
    return {name: networks.build(name) for name in NAMES}


def pictures(count, shape=(32, 32, 3), seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype("float32")


# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Simple", "wider", "", None])
def test_an_unknown_network_is_refused(name):
    with pytest.raises(
        ValueError,
        match=f"one of {', '.join(networks.NAMES)}; got {name!r}",
    ):
        networks.build(name)


@pytest.mark.parametrize(
    "shape",
    [(32, 32), (32, 32, 3, 1), (0, 32, 3), (-1, 32, 3), (32, 32, 3.0), (True, 32, 3), (None, None, 3), 32, "abc"],
)
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ValueError, match="height, width, channels.*at least 1; got") as error:
        networks.build("simple", input_shape=shape)
    assert str(error.value).endswith(f"got {shape!r}")


@pytest.mark.parametrize("classes", [1, 0, -3, 10.0, True, "ten", None])
def test_a_number_of_classes_that_is_none_is_refused(classes):
    with pytest.raises(ValueError, match=f"classes must be a whole number of at least 2; got {classes!r}"):
        networks.build("simple", classes=classes)


@pytest.mark.parametrize("dtype", ["float33", 5])
def test_a_dtype_that_is_none_is_refused(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        networks.build("simple", dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_called_by_their_name_and_not_compiled(networks, name):
    assert networks[name].name == name
    assert not networks[name].compiled
    assert set(networks.TITLES) == {*networks.THESIS_PLANS, *networks.OUR_PLANS}


@pytest.mark.parametrize(
    "name, convolutions",
    [
        ("simple", "conv1 conv2 conv3 conv4 conv5 conv6 conv7 conv8 conv9"),
        ("wider_factorized", "conv1a conv1b conv2 conv3a conv3b conv4 conv5 conv6"),
        ("wider_separable", "sep1 conv2 sep3 conv4 conv5 conv6"),
    ],
)
def test_layers_are_numbered_as_the_convolutions_stand(networks, name, convolutions):
    expected = ["image"]
    for layer in convolutions.split():
        expected.append(layer)
        if not layer.endswith("a"):
            number = layer[-2] if layer.endswith("b") else layer[-1]
            expected += [f"bn{number}", f"relu{number}"]
    assert [layer.name for layer in networks[name].layers] == [*expected, "pool", "softmax"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"initialization": "zeros"}, "initialization must be one of glorot, he; got 'zeros'"),
        ({"head_scale": 0}, "head_scale must be a number between 0.001 and"),
    ],
)
def test_a_start_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.build("simple", **arguments)


# --- correct -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_the_thesiss(networks, name):
    both = thesis.compare(name, cost.layer_costs(networks[name]))
    assert len(both) == len(thesis.layers(name))
    assert both["equal"].all(), both[~both["equal"]].to_string()


@pytest.mark.parametrize("name", NAMES)
def test_totals_are_the_thesiss(networks, name):
    model = networks[name]
    trainable = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert (model.count_params(), trainable, model.count_params() - trainable) == thesis.PARAMS[name]


@pytest.mark.parametrize("kernel, shape", [("conv1a", (3, 1, 3, 192)), ("conv1b", (1, 3, 192, 192))])
def test_a_factorized_convolution_is_a_column_and_then_a_row(networks, kernel, shape):
    assert tuple(networks["wider_factorized"].get_layer(kernel).kernel.shape) == shape


def test_a_separable_convolution_has_one_filter_a_channel(networks):
    layer = networks["wider_separable"].get_layer("sep3")
    assert tuple(layer.depthwise_kernel.shape) == (3, 3, 96, 1)
    assert tuple(layer.pointwise_kernel.shape) == (1, 1, 96, 384)


@pytest.mark.parametrize("name", networks.OUR_PLANS)
def test_ours_have_no_more_weights_than_the_simple_network_and_fewer_macs(networks, name):
    ours, simple = cost.total_costs(networks.build(name)), cost.total_costs(networks["simple"])
    assert ours["params"] <= simple["params"] and ours["macs"] < simple["macs"]
    assert 0.88 <= cost.total_costs(networks.build("deeper_dense"))["macs"] / ours["macs"] <= 1


@pytest.mark.parametrize(
    "name, before, layers, filters",
    [("deeper_tucker", "pool4", range(5, 11), 19), ("deeper_separable", "relu6", range(7, 13), 38)],
)
def test_a_shortcut_hands_on_what_its_layer_read(name, before, layers, filters):
    """With the scales behind them at 0, the layers with a shortcut are the identity."""
    model = networks.build(name, width=0.1)
    shortcuts = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Add)]
    assert shortcuts[-6:] == [f"add{number}" for number in layers]
    for number in layers:
        model.get_layer(f"bn{number}").gamma.assign(np.zeros(filters))
    read, handed_on = (
        keras.Model(model.inputs, model.get_layer(layer).output).predict(pictures(2), verbose=0)
        for layer in (before, shortcuts[-1])
    )
    np.testing.assert_array_equal(read, handed_on)


@pytest.mark.parametrize("name", NAMES)
def test_he_keeps_the_mean_square_through_each_convolution_with_its_relu(name):
    """Before training, each ReLU hands on about the mean square that its convolution, or pair of them, reads."""
    keras.utils.set_random_seed(1)
    model = networks.build(name, initialization="he")
    relus = [layer.output for layer in model.layers if layer.name.startswith("relu")]
    values = keras.Model(model.inputs, [model.inputs[0], *relus]).predict(pictures(8), verbose=0)
    for before, after in zip(values[:-1], values[1:], strict=True):
        assert 0.5 < (after[:, 2:-2, 2:-2] ** 2).mean() / (before**2).mean() < 2  # at the border it reads zeros, too


def test_the_head_starts_at_its_scale():
    gammas = [layer.gamma for layer in networks.build("simple", head_scale=4.0).layers if layer.name.startswith("bn")]
    assert [float(np.unique(gamma).item()) for gamma in gammas] == [1.0] * 8 + [4.0]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_probabilities(networks, name):
    probabilities = networks[name].predict(pictures(3), verbose=0)
    assert probabilities.shape == (3, 100) and probabilities.min() >= 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert probabilities.std(axis=0).max() > 0  # they depend on the image


@pytest.mark.parametrize("name", NAMES)
def test_the_end_is_a_mean_over_positions_and_a_softmax(networks, name):
    model = networks[name]
    inner = keras.Model(model.input, [model.get_layer("pool").input, model.output])
    maps, probabilities = inner.predict(pictures(2), verbose=0)
    assert maps.shape == (2, 8, 8, 100) and maps.min() >= 0
    powers = np.exp(maps.astype("float64").mean(axis=(1, 2)))
    np.testing.assert_allclose(probabilities, powers / powers.sum(axis=1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape, classes", [((9, 14, 1), 2), ((1, 1, 4), 7)])
def test_other_shapes_and_classes(name, shape, classes):
    model = networks.build(name, shape, classes)
    assert model.input_shape == (None, *shape) and model.output_shape == (None, classes)
    probabilities = model.predict(pictures(2, shape), verbose=0)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    usual = networks.build(name, classes=classes)  # only the first convolution sees the number of channels
    assert [layer.count_params() for layer in model.layers[2:]] == [layer.count_params() for layer in usual.layers[2:]]


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_ends_in_float32(name):
    model = networks.build(name, dtype="mixed_bfloat16")
    for layer in model.layers[1:]:
        expected = "float32" if layer.name in ("pool", "softmax") else "bfloat16"
        assert keras.backend.standardize_dtype(layer.compute_dtype) == expected, layer.name
        assert {weight.dtype for weight in layer.weights} <= {"float32"}
    assert model.get_layer("pool").output.dtype == model.output.dtype == "float32"
    assert model.predict(pictures(2), verbose=0).dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_saved_network_is_loaded_as_it_was(tmp_path, name, dtype):
    keras.utils.set_random_seed(1)
    model = networks.build(name, (12, 12, 3), 10, dtype=dtype)
    model.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")  # stock layers: no custom objects
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in model.layers]
    images = pictures(2, (12, 12, 3))
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))


def test_weights_come_from_the_seed():
    weights = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(seed)
        weights.append(np.asarray(networks.build("wider_separable").get_layer("sep1").pointwise_kernel))
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_networks_of_another_width():
    wide, narrow = (networks.build("simple", width=width) for width in (1, 0.47))
    assert [layer.filters for layer in narrow.layers if hasattr(layer, "filters")] == [45] * 3 + [90] * 5 + [100]
    assert (
        wide.count_params() == networks.build("simple").count_params() and narrow.count_params() < wide.count_params()
    )
    assert {w.shape[-1] for w in networks.build("wider_separable", width=1e-3).weights} == {1, 100}
    for width in (0, -1, "wide"):
        with pytest.raises(ValueError, match="width must be a number between"):
            networks.build("simple", width=width)


def test_a_width_is_in_the_name_of_a_record():
    assert networks.run_name("simple") == networks.run_name("simple", 1) == "simple"
    assert networks.run_name("simple", 0.6) == "simple-width0.6" and networks.run_name("simple", 2.0) == "simple-width2"
    with pytest.raises(ValueError, match="model must be one of"):
        networks.run_name("nope", 0.5)
    with pytest.raises(ValueError, match="width must be a number between"):
        networks.run_name("simple", float("nan"))


@pytest.mark.parametrize("what, kind, within", [("params", "parameters", 0.07), ("macs", "MACs", 0.02)])
def test_equal_widths_cost_the_same(what, kind, within):
    widths = networks.EQUAL_WIDTHS[kind]
    costs = {name: cost.total_costs(networks.build(name, width=width))[what] for name, width in widths.items()}
    assert set(costs) >= set(networks.THESIS_PLANS)
    np.testing.assert_allclose(list(costs.values()), costs["simple"], rtol=within)


def test_equal_widths_took_the_same_time(monkeypatch, tmp_path):
    """By the committed measurement, not by one that was made here."""
    monkeypatch.setenv("FCNN_OUTPUT", str(tmp_path))
    measured, _ = records.load("equal-cost")
    ms = {(row["model"], row["value"]): row["ms"] for row in measured["rows"]}
    times = [ms[pair] for pair in networks.EQUAL_WIDTHS["time"].items()]
    np.testing.assert_allclose(times, times[0], rtol=0.12)
