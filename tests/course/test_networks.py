"""The networks of the course: `fcnn_utils.course.networks` and its networks from other papers, `cited`."""

import keras
import numpy as np
import pytest

from fcnn_utils import cost
from fcnn_utils.course import networks, records, thesis
from fcnn_utils.course.networks import cited

THESIS, OURS = list(networks.THESIS_PLANS), list(networks.OUR_PLANS)
ALL = [*THESIS, *OURS, "simple_cp", "wrn-10-1", *cited.STYLES]


@pytest.fixture(scope="module")
def built():
    """The networks of the thesis, for 32×32 images of 100 classes."""
    keras.utils.set_random_seed(0)
    return {name: networks.build(name) for name in THESIS}


def random_images(count, shape=(32, 32, 3)):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype("float32")


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Simple", "", "wrn", "wrn-4-1", "wrn-17-4", "wrn-16-0", "wrn-16-4 "])
def test_build_rejects_unknown_name_and_tells_the_rule_of_wide_residual_networks(name):
    assert not cited.known(name)
    rule = r"wrn-DEPTH-WIDTH with a depth of 6n \+ 4 .* and a width from 1 to 99, for example wrn-16-4"
    allowed = rule if str(name).startswith("wrn-") else f"one of {', '.join(networks.NAMES)}"
    with pytest.raises(ValueError, match=f"model must be {allowed}; got {name!r}"):
        networks.build(name)


@pytest.mark.parametrize(
    "shape",
    [(32, 32), (32, 32, 3, 1), (0, 32, 3), (-1, 32, 3), (32, 32, 3.0), (True, 32, 3), (None, None, 3), 32, "abc"],
)
def test_build_rejects_invalid_input_shape(shape):
    with pytest.raises(ValueError, match="input_shape must be .*; got"):
        networks.build("simple", input_shape=shape)


@pytest.mark.parametrize(
    "arguments, message",
    [({"classes": value}, "classes must be a whole number between 2 and") for value in (1, 0, 10.0, True, "ten", None)]
    + [({"width": value}, "width must be a number between") for value in (0, -1, "wide", float("nan"))]
    + [
        ({"initialization": "zeros"}, "initialization must be one of glorot, he; got 'zeros'"),
        ({"head_scale": 0}, "head_scale must be a number between 0.001 and"),
        ({"dtype": "float33"}, "float33"),
    ],
)
def test_build_rejects_invalid_option(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.build("simple", **arguments)


@pytest.mark.parametrize(
    "name, width, expected",
    [
        ("simple", 1.0, "simple"),
        ("simple", 0.6, "simple-width0.6"),
        ("wrn-100-12", 2.0, "wrn-100-12-width2"),
        ("wang", 1, "wang"),
    ],
)
def test_run_name_has_width_unless_it_is_1(name, width, expected):
    assert networks.run_name(name, width) == expected


# --- all networks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ALL)
def small(request):
    """Each network of the course, small, in mixed precision."""
    keras.utils.set_random_seed(0)
    options = {"width": 0.1, "dtype": "mixed_bfloat16", "initialization": "he"}
    return networks.build(request.param, (16, 16, 1), 2, **options)


def test_network_gives_float32_probabilities_in_mixed_precision(small):
    assert not small.compiled and small.output_shape == (None, 2)
    probabilities = np.asarray(small(random_images(3, (16, 16, 1))))
    assert probabilities.shape == (3, 2) and probabilities.dtype == np.float32 and probabilities.min() >= 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    policies = {layer.name: layer.dtype_policy.name for layer in small.layers[1:]}
    ends = {policies.pop(layer, "float32") for layer in ("pool", "scores", "softmax")}
    assert ends == {"float32"} and set(policies.values()) == {"mixed_bfloat16"}


def test_network_is_rebuilt_without_custom_objects(small):
    copy, images = keras.Model.from_config(small.get_config()), random_images(2, (16, 16, 1))
    copy.set_weights(small.get_weights())
    assert [layer.name for layer in copy.layers] == [layer.name for layer in small.layers]
    np.testing.assert_array_equal(copy(images), small(images))


def test_training_step_changes_every_kernel(small):
    before = small.get_weights()
    small.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy", run_eagerly=True)
    loss = small.train_on_batch(random_images(8, (16, 16, 1)), np.eye(2, dtype="float32")[np.arange(8) % 2])
    after = small.get_weights()
    assert np.isfinite(loss)
    assert all(not np.array_equal(old, new) for old, new in zip(before, after, strict=True) if old.ndim > 1)


def test_weights_follow_from_seed():
    kernels = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(seed)
        kernels.append(np.asarray(networks.build("wider_separable").get_layer("sep1").pointwise_kernel))
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


def test_width_scales_all_filters_but_the_classes():
    narrow = networks.build("simple", width=0.47)
    assert [layer.filters for layer in narrow.layers if hasattr(layer, "filters")] == [45] * 3 + [90] * 5 + [100]
    assert {weight.shape[-1] for weight in networks.build("wider_separable", width=1e-3).weights} == {1, 100}


# --- the thesis's networks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THESIS)
def test_layers_and_totals_equal_those_of_the_thesis(built, name):
    model = built[name]
    both = thesis.compare(name, cost.layer_costs(model))
    assert len(both) == len(thesis.layers(name))
    assert both["equal"].all(), both[~both["equal"]].to_string()
    trainable = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert (model.count_params(), trainable, model.count_params() - trainable) == thesis.PARAMS[name]


@pytest.mark.parametrize(
    "name, convolutions",
    [
        ("simple", "conv1 conv2 conv3 conv4 conv5 conv6 conv7 conv8 conv9"),
        ("wider_factorized", "conv1a conv1b conv2 conv3a conv3b conv4 conv5 conv6"),
        ("wider_separable", "sep1 conv2 sep3 conv4 conv5 conv6"),
    ],
)
def test_layer_names_count_convolutions(built, name, convolutions):
    expected = ["image"]
    for layer in convolutions.split():
        expected.append(layer)
        if not layer.endswith("a"):
            number = layer.strip("bcnopvse")
            expected += [f"bn{number}", f"relu{number}"]
    assert [layer.name for layer in built[name].layers] == [*expected, "pool", "softmax"]


def test_factorized_convolution_is_column_then_row_and_separable_has_one_filter_per_channel(built):
    first, second = (built["wider_factorized"].get_layer(f"conv1{part}").kernel for part in "ab")
    assert (tuple(first.shape), tuple(second.shape)) == ((3, 1, 3, 192), (1, 3, 192, 192))
    layer = built["wider_separable"].get_layer("sep3")
    assert tuple(layer.depthwise_kernel.shape) == (3, 3, 96, 1)
    assert tuple(layer.pointwise_kernel.shape) == (1, 1, 96, 384)


def test_dense_control_of_the_wider_networks_has_a_3x3_layer_for_each_factorized_one():
    dense, factorized = (networks.build(name) for name in ("wider_dense", "wider_factorized"))
    chains = [(9, 3, 192), (9, 192, 96), (9, 96, 384), (9, 384, 128), (9, 128, 256), (1, 256, 100)]
    expected = sum(taps * before * after + 5 * after for taps, before, after in chains)  # 5: bias, batch normalisation
    assert dense.count_params() == expected
    ends = [layer for layer in factorized.layers if hasattr(layer, "filters") and not layer.name.endswith("a")]
    layers = [layer for layer in dense.layers if hasattr(layer, "filters")]
    assert [(each.filters, each.strides) for each in layers] == [(each.filters, each.strides) for each in ends]


def test_network_ends_in_mean_over_positions_and_softmax(built):
    model = built["wider_separable"]
    maps, probabilities = keras.Model(model.inputs[0], [model.get_layer("pool").input, model.output])(random_images(2))
    maps = np.asarray(maps, "float64")
    assert maps.shape == (2, 8, 8, 100) and maps.min() >= 0
    powers = np.exp(maps.mean(axis=(1, 2)))
    np.testing.assert_allclose(probabilities, powers / powers.sum(axis=1, keepdims=True), rtol=1e-4)
    assert np.asarray(probabilities).std(axis=0).max() > 0  # they depend on the image


@pytest.mark.parametrize("name", THESIS)
def test_he_initialization_keeps_mean_square_through_convolution_and_relu(name):
    keras.utils.set_random_seed(1)
    model = networks.build(name, initialization="he")
    relus = [layer.output for layer in model.layers if layer.name.startswith("relu")]
    values = [np.asarray(each) for each in keras.Model(model.inputs[0], [model.inputs[0], *relus])(random_images(4))]
    for before, after in zip(values[:-1], values[1:], strict=True):
        assert 0.5 < (after[:, 2:-2, 2:-2] ** 2).mean() / (before**2).mean() < 2  # without the border's zeros


def test_head_scale_sets_scale_of_last_batch_norm():
    model = networks.build("simple", head_scale=4.0, width=0.1)
    gammas = [layer.gamma for layer in model.layers if layer.name.startswith("bn")]
    assert [float(np.unique(gamma).item()) for gamma in gammas] == [1.0] * 8 + [4.0]


# --- our networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_our_networks_are_smaller_than_simple_and_within_12_percent_of_their_control(built, name):
    ours, simple, dense = (
        cost.total_costs(model) for model in (networks.build(name), built["simple"], networks.build("deeper_dense"))
    )
    assert ours["params"] <= simple["params"] and ours["macs"] < simple["macs"]
    assert 0.88 <= dense["macs"] / ours["macs"] <= 1


@pytest.mark.parametrize(
    "name, before, numbers", [("deeper_tucker", "pool4", range(5, 11)), ("deeper_separable", "relu6", range(7, 13))]
)
def test_layers_with_shortcut_are_identity_if_batch_norms_scale_by_0(name, before, numbers):
    model = networks.build(name, width=0.1)
    shortcuts = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Add)]
    assert shortcuts[-6:] == [f"add{number}" for number in numbers]
    for number in numbers:
        gamma = model.get_layer(f"bn{number}").gamma
        gamma.assign(np.zeros(gamma.shape))
    ends = [model.get_layer(name).output for name in (before, shortcuts[-1])]
    np.testing.assert_array_equal(*keras.Model(model.inputs[0], ends)(random_images(2)))


def test_simple_cp_replaces_3x3_layers_by_chains_of_the_right_size():
    """A chain from S to T channels with rank T has S T + 9 T + T T weights; the dense layer has 9 S T."""
    simple, chains = (networks.build(name, width=0.1) for name in ("simple", "simple_cp"))
    for number in range(2, 8):
        inputs, outputs = simple.get_layer(f"conv{number}").kernel.shape[-2:]
        parts = [chains.get_layer(f"conv{number}_{part}") for part in ("in", "depthwise", "out")]
        counts = [int(np.prod(part.kernel.shape)) for part in parts]
        assert counts == [inputs * outputs, 9 * outputs, outputs * outputs]
        assert parts[-1].output.shape == simple.get_layer(f"conv{number}").output.shape


@pytest.mark.parametrize("column, kind, tolerance", [("params", "parameters", 0.07), ("macs", "MACs", 0.02)])
def test_equal_widths_have_equal_cost(column, kind, tolerance):
    widths = networks.EQUAL_WIDTHS[kind]
    costs = {name: cost.total_costs(networks.build(name, width=width))[column] for name, width in widths.items()}
    assert set(costs) >= set(THESIS)
    np.testing.assert_allclose(list(costs.values()), costs["simple"], rtol=tolerance)


def test_equal_widths_had_equal_time_in_committed_measurement():
    measured, _ = records.load("equal-cost")
    ms = {(row["model"], row["value"]): row["ms"] for row in measured["rows"]}
    times = [ms[pair] for pair in networks.EQUAL_WIDTHS["time"].items()]
    np.testing.assert_allclose(times, times[0], rtol=0.12)


# --- networks of other papers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, millions", [("wrn-40-4", "8.9"), ("wrn-16-8", "11.0"), ("wrn-28-10", "36.5")])
def test_wide_resnets_have_published_parameters(name, millions):
    """Table 4 of Zagoruyko & Komodakis, for 10 classes."""
    assert f"{cost.total_costs(networks.build(name, classes=10))['trainable'] / 1e6:.1f}" == millions


def test_wide_resnet_parameters_by_hand():
    """WRN-10-1 has one block per group; the first group needs no 1×1 shortcut."""
    kernels = 9 * 3 * 16 + 2 * 9 * 16 * 16  # first convolution, first group
    kernels += 16 * 32 + 9 * 16 * 32 + 9 * 32 * 32 + 32 * 64 + 9 * 32 * 64 + 9 * 64 * 64
    norms = 4 * (16 + 16 + 16 + 32 + 32 + 64 + 64)
    assert networks.build("wrn-10-1").count_params() == kernels + norms + 64 * 100 + 100


@pytest.mark.parametrize(
    "name, shape, classes, start, groups",
    [
        ("wrn-16-4", (32, 32, 3), 100, 16, ((32, 64), (16, 128), (8, 256))),
        ("resnet18", (28, 28, 1), 2, 64, ((28, 64), (14, 128), (7, 256), (4, 512))),
    ],
)
def test_resnet_macs_by_hand(name, shape, classes, start, groups):
    """Per group: four 3×3 layers, and a 1×1 shortcut if the number of channels changes."""
    macs, channels = shape[0] ** 2 * 9 * shape[2] * start + groups[-1][1] * classes, start
    for side, filters in groups:
        weights = 9 * channels * filters + 3 * 9 * filters**2 + (channels < filters) * channels * filters
        macs, channels = macs + side**2 * weights, filters
    assert cost.total_costs(networks.build(name, shape, classes))["macs"] == macs


def test_resnet18_has_parameters_of_its_pytorch_original():
    assert cost.total_costs(networks.build("resnet18", classes=10))["trainable"] == 11_173_962


@pytest.mark.parametrize(
    "name, params, macs",
    [("inception", 1_305_156, 199_104_000), ("xception", 1_206_404, 137_627_648), ("wang", 242_724, 19_121_152)],
)
def test_networks_of_our_size_have_the_counts_that_the_course_reports(name, params, macs):
    totals = cost.total_costs(networks.build(name))
    assert (totals["params"], totals["macs"]) == (params, macs)
    assert 0.2 < networks.build(name, width=0.5).count_params() / params < 0.6


@pytest.mark.parametrize("name", [*THESIS, *OURS, "simple_cp", "wider_dense"])
def test_list_of_layers_builds_the_network_of_its_name(name):
    by_name, by_list = networks.build(name, width=0.1), networks.build(networks.plan(name), width=0.1)
    assert [layer.name for layer in by_list.layers] == [layer.name for layer in by_name.layers]
    by_list.set_weights(by_name.get_weights())
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(by_list(images), by_name(images))


@pytest.mark.parametrize("kind", ["conv", "factorized", "separable", "cp", "tucker"])
def test_stride_of_a_layer_shrinks_the_image(kind):
    model = networks.build([(kind, 8, 3, 2), ("conv", 10, 1, 1)], (9, 9, 3), 10)
    assert model.get_layer("relu1").output.shape == (None, 5, 5, 8)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "network must be a name or a list of layers; got \\[\\]"),
        ({"conv": 1}, "network must be a name or a list"),
        (None, "network must be a name or a list of layers; got None"),
        (5, "network must be a name or a list of layers; got 5"),
        ([("conv", 8, 3)], "layer 1 must be \\(kind, filters, kernel size, stride\\)"),
        ([("convolution", 8, 3, 1)], "kind of layer 1 must be one of conv, factorized, .*; got 'convolution'"),
        ([("conv", 8, 3, 1), ("conv", 0, 3, 1)], "filters of layer 2 must be"),
        ([("conv", 8, 3, 1), ("conv+", 16, 3, 1)], "layer 2, .* has a shortcut: it must have 8 filters"),
        ([("conv", 8, 3, 1)], "the last layer must be a convolution with 10 filters"),
        ([("conv", 10, 3, 1), ("pool", None, 2, 2)], "the last layer must be a convolution"),
    ],
)
def test_wrong_list_of_layers_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        networks.build(rows, (8, 8, 3), 10)
