"""Trained networks factorized: `fcnn_utils.convert`."""

import os
import resource
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import convert, cost, decompose, keras_graph, ranks
from fcnn_utils.course import networks

METHODS = ["cp", "cp4", "tucker", "tt", "spatial", "separable"]


def random_weights(model, seed=0):
    """Weights of the size that a trained network has, moving variances above zero."""
    rng = np.random.default_rng(seed)
    for place in keras_graph.layer_nodes(model):
        for weight in place.layer.weights:
            if "kernel" in weight.path:
                weight.assign(rng.normal(0, (2 / np.prod(weight.shape[:-1])) ** 0.5, weight.shape))
            else:
                weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def wave(x):
    return keras.ops.sin(3 * x)


def zoo():
    """Every kind of convolution and connection: branches, shared, nested, strided, dilated, grouped, depthwise, 1×1."""
    inner_in = keras.Input((6, 8, 8))
    y = layers.Conv2D(8, 3, padding="same", dilation_rate=2, activation="relu", name="conv")(inner_in)
    inner = keras.Model(inner_in, y, name="inner")
    stack = keras.Sequential([layers.Conv2D(8, (1, 3), padding="same", name="conv"), layers.ReLU()], name="stack")
    shared = layers.Conv2D(8, 3, padding="same", activation="tanh", name="shared")
    x = inputs = keras.Input((11, 16, 3))
    x = layers.Conv2D(8, 5, strides=2, padding="same", use_bias=False, name="first")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Add()([shared(shared(x)), inner(x), stack(x), layers.Conv2D(8, 1, name="point", activation="relu")(x)])
    x = layers.Conv2D(8, 3, groups=2, padding="same", activation="relu", name="grouped")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(x)
    x = layers.Conv2D(12, 3, strides=(2, 1), activation=layers.LeakyReLU(0.1), name="last")(x)
    return random_weights(keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name="zoo"))


def images(model, count=4, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *model.inputs[0].shape[1:])).astype("float32")


def outputs(model, x):
    """Without compilation, which takes longer than the few images."""
    return keras.ops.convert_to_numpy(model(x, training=False))


def peak_memory():
    """Bytes, of this process since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def distance(one, other, x):
    """Largest difference of the outputs, relative to the largest output of the first."""
    y, z = outputs(one, x), outputs(other, x)
    return float(np.abs(y - z).max() / np.abs(y).max())


def full_ranks(model, method):
    found = {place.path: place.layer for place in keras_graph.layer_nodes(model) if type(place.layer) is layers.Conv2D}
    return {
        path: ranks.maximum(method, tuple(layer.kernel.shape))
        for path, layer in found.items()
        if layer.kernel_size != (1, 1) and layer.groups == 1
    }


# --- basic -------------------------------------------------------------------------------------------------------


def test_arguments_that_can_not_be_are_refused_with_what_can():
    model = zoo()
    with pytest.raises(ValueError, match="is not built"):
        convert.factorize(keras.Sequential([layers.Conv2D(4, 3)]), ratio=0.5)
    with pytest.raises(ValueError, match="method must be one of cp, cp4, tucker"):
        convert.factorize(model, "svd", ratio=0.5)
    for arguments in ({}, {"ratio": 0.5, "macs": 1e6}):
        with pytest.raises(ValueError, match="give one of ratio=, ranks= and macs="):
            convert.factorize(model, **arguments)
    for ratio in (0, 1.1, "half", float("nan")):
        with pytest.raises(ValueError, match="ratio must be a number between"):
            convert.factorize(model, ratio=ratio)
    with pytest.raises(ValueError, match="ratio 0.001 is below what cp takes at rank 1"):
        convert.factorize(model, ratio=0.001)
    with pytest.raises(ValueError, match="layer 'nope' is no convolution of model 'zoo'; it has .*inner/conv"):
        convert.factorize(model, ratio=0.5, layers=["shared", "nope"])
    with pytest.raises(ValueError, match="name at least one layer"):
        convert.factorize(model, ratio=0.5, layers=[])
    for path, reason in (("point", "1×1"), ("grouped", "grouped"), ("depthwise", "depthwise")):
        with pytest.raises(ValueError, match=f"layer '{path}' can't be factorized: {reason}"):
            convert.factorize(model, ratio=0.5, layers=path)
    with pytest.raises(ValueError, match="rank of cp for a .* kernel must be a whole number between 1 and"):
        convert.factorize(model, ranks={"shared": 1000})
    with pytest.raises(ValueError, match="leave out layers="):
        convert.factorize(model, ranks={"shared": 3}, layers=["shared"])
    with pytest.raises(ValueError, match=r"calibration images must be .* \(N, 11, 16, 3\), at least one; got \(2, 3\)"):
        convert.factorize(model, ratio=0.5, images=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="multiple must be a whole number between"):
        convert.factorize(model, ratio=0.5, multiple=0)
    with pytest.raises(ValueError, match="uniform must be one of True, False; got 'yes'"):
        convert.factorize(model, ratio=0.5, uniform="yes")
    with pytest.raises(ValueError, match="max_norm must be a number"):
        convert.factorize(model, ratio=0.5, max_norm=0.1)


def test_a_model_without_a_convolution_to_convert_says_why():
    inputs = keras.Input((8, 8, 3))
    with pytest.raises(ValueError, match="no convolution to factorize .*it has none at all"):
        convert.factorize(keras.Model(inputs, layers.Flatten()(inputs)), ratio=0.5)
    with pytest.raises(ValueError, match="no convolution to factorize .*point: 1×1"):
        convert.factorize(keras.Model(inputs, layers.Conv2D(4, 1, name="point")(inputs)), ratio=0.5)


def test_a_budget_below_the_smallest_says_what_that_is():
    model = zoo()
    with pytest.raises(ValueError, match="macs must be at least ([0-9,]+), with cp at rank 1 in all layers") as error:
        convert.factorize(model, macs=1000)
    smallest = int(str(error.value).split("at least ")[1].split(", with")[0].replace(",", ""))
    new, _ = convert.factorize(model, macs=smallest)
    assert cost.total_costs(new)["macs"] == smallest
    with pytest.raises(ValueError, match="macs must be at least"):
        convert.factorize(model, macs=smallest - 1)


def test_a_budget_needs_images_of_a_fixed_size():
    inputs = keras.Input((None, None, 8))
    model = keras.Model(inputs, layers.Conv2D(8, 3, name="conv")(inputs))
    with pytest.raises(ValueError, match="layer 'conv' has none: use ratio= or ranks="):
        convert.factorize(model, macs=1e6)
    new, report = convert.factorize(model, ratio=0.5)
    assert np.isnan(report["macs_after"][0]) and new(np.zeros((1, 9, 7, 8), "float32")).shape == (1, 7, 5, 8)


def test_every_convolution_is_reported():
    model = zoo()
    new, report = convert.factorize(model, "cp", ratio=0.5)
    report = report.set_index("layer")
    assert list(report.index) == [
        p.path for p in keras_graph.layer_nodes(model) if "conv" in type(p.layer).__name__.lower()
    ]
    converted = report[report["reason"] == ""]
    assert set(converted.index) == {"inner/conv", "shared", "last", "stack/conv"}
    assert (converted["params_after"] < converted["params_before"]).all() and (converted["method"] == "cp").all()
    assert converted["relative_error"].between(0, 1).all() and converted["degeneracy"].between(0, 1).all()
    reasons = report["reason"].to_dict()
    assert reasons["first"] == "reads 3 channels: little to save, much to lose"
    assert reasons["point"].startswith("1×1") and (reasons["grouped"], reasons["depthwise"]) == ("grouped", "depthwise")
    for column, of in (("before", model), ("after", new)):
        rest = cost.total_costs(of)
        others = [
            p for p in keras_graph.layer_nodes(of) if not isinstance(p.layer, (layers.Conv2D, layers.DepthwiseConv2D))
        ]
        assert report[f"macs_{column}"].sum() == rest["macs"]
        assert report[f"params_{column}"].sum() == rest["params"] - sum(p.layer.count_params() for p in others)


# --- correct -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_at_full_rank_the_network_is_the_same(method):
    model, x = zoo(), images(zoo())
    new, report = convert.factorize(model, method, ranks=full_ranks(model, method))
    assert (report["reason"] == "").sum() == 5
    assert distance(model, new, x) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_truncated_the_network_is_that_of_the_rebuilt_kernels(method):
    model, x = zoo(), images(zoo())
    new, report = convert.factorize(model, method, ratio=0.6)
    for place in keras_graph.layer_nodes(model):
        row = report[(report["layer"] == place.path) & (report["reason"] == "")]
        if len(row):
            kernel, *bias = place.layer.get_weights()
            options = {"max_norm": 1.0} if method in ("cp", "cp4") else {}
            rebuilt = decompose.decompose(kernel, method, row["ranks"].iloc[0], **options).to_kernel()
            place.layer.set_weights([rebuilt, *bias])
    assert distance(model, new, x) < 1e-4
    assert distance(zoo(), new, x) > 1e-3


def test_the_original_is_not_changed():
    model = zoo()
    before, x = model.get_weights(), images(model)
    expected = keras.ops.convert_to_numpy(model(x))
    new, _ = convert.factorize(model, ratio=0.5)
    new.set_weights([weight * 0 for weight in new.get_weights()])
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))
    assert np.array_equal(keras.ops.convert_to_numpy(model(x)), expected)


def test_options_of_the_layer_survive():
    inputs = keras.Input((8, 8, 4))
    options = {"kernel_regularizer": "l2", "bias_regularizer": "l1", "activity_regularizer": "l2", "name": "conv"}
    layer = layers.Conv2D(6, 3, strides=2, activation="elu", dtype="mixed_bfloat16", **options)
    model = keras.Model(inputs, layers.ReLU(name="end")(layer(inputs)))
    layer.trainable = False
    new, _ = convert.factorize(model, "cp", ranks={"conv": 4})
    enter, depthwise, last = (new.get_layer(name) for name in ("conv_in", "conv_depthwise", "conv"))
    assert last.activation is keras.activations.elu and enter.activation is keras.activations.linear
    assert depthwise.strides == (2, 2) and last.output.shape == layer.output.shape
    assert all(part.dtype_policy.name == "mixed_bfloat16" for part in (enter, depthwise, last))
    assert not any(part.trainable for part in (enter, depthwise, last)) and new.get_layer("end").trainable
    assert enter.kernel_regularizer.l2 == depthwise.depthwise_regularizer.l2 == last.kernel_regularizer.l2 > 0
    assert last.bias_regularizer.l1 > 0 and last.activity_regularizer.l2 > 0 and enter.activity_regularizer is None


def test_an_initializer_and_an_activation_that_no_factor_could_take_from_a_file():
    """An array of the dense kernel's shape is left out; a function that Keras does not know by name is handed on."""
    array = keras.initializers.Constant(np.full((3, 3, 4, 6), 0.5, "float32"))
    inputs = keras.Input((8, 8, 4))
    layer = layers.Conv2D(6, 3, kernel_initializer=array, bias_initializer="ones", activation=wave, name="conv")
    model = keras.Model(inputs, layers.BatchNormalization()(layer(inputs)))
    new, _ = convert.factorize(model, "tucker", ranks={"conv": (4, 6)})
    assert new.get_layer("conv").activation is wave and new.get_layer("conv").bias_initializer is not None
    assert distance(model, new, images(model)) < 1e-4


def test_layers_with_what_factors_can_not_keep_are_left():
    x = inputs = keras.Input((8, 8, 4))
    for name, options in {"bound": {"kernel_constraint": "max_norm"}, "plain": {}}.items():
        x = layers.Conv2D(4, 3, activation="relu", name=name, **options)(x)
    _, report = convert.factorize(keras.Model(inputs, x), "tucker", ratio=0.5)
    assert report["reason"].tolist() == ["its kernel has a constraint", ""]


@pytest.mark.parametrize("method", ["cp", "tucker", "spatial"])
def test_a_second_time_leaves_what_is_factorized_unless_it_is_named(method):
    model = zoo()
    once, _ = convert.factorize(model, method, ratio=0.6, layers=["shared", "last"])
    twice, report = convert.factorize(once, method, ratio=0.6)
    report = report.set_index("layer")
    parts = [path for path in report.index if path.startswith(("shared", "last"))]
    assert len(parts) >= 4 and all(report["reason"][path] for path in parts)
    assert report["reason"]["inner/conv"] == ""
    named = [path for path in parts if "factorized already" in report["reason"][path]]
    if method != "cp":  # the core of a Tucker, the column of a spatial one are kernels that can be taken apart again
        whole = {path: ranks.maximum("tt", tuple(once.get_layer(path).kernel.shape)) for path in named}
        again, _ = convert.factorize(once, "tt", ranks=whole)
        assert len(again.layers) > len(once.layers) and distance(once, again, images(model)) < 1e-4


def test_networks_that_are_sequential_stay_so():
    model = keras.Sequential(
        [keras.Input((8, 8, 4)), layers.Conv2D(6, 3, name="a", activation="relu"), layers.Conv2D(6, 3, name="b")]
    )
    new, _ = convert.factorize(random_weights(model), "tt", ranks=full_ranks(model, "tt"))
    assert isinstance(new, keras.Sequential) and {"a", "b"} <= {layer.name for layer in new.layers}
    assert distance(model, new, images(model)) < 1e-4


def test_a_budget_is_kept_and_used():
    model = zoo()
    for share in (0.9, 0.6, 0.4):
        budget = share * cost.total_costs(model)["macs"]
        macs = cost.total_costs(convert.factorize(model, "spatial", macs=budget)[0])["macs"]
        assert 0.85 * budget < macs <= budget  # a rank more is some percent of so small a network
    untouched, report = convert.factorize(model, "cp", macs=1e12)
    assert distance(model, untouched, images(model)) == 0 and (report["reason"] != "").all()


@pytest.mark.parametrize("share", [1.0, 1.001, 1.3])
def test_a_budget_that_leaves_no_choice_is_kept_with_images_too(share):
    """A small layer's rank 1 is a large share of it: curves around the common ratio say nothing of it."""
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="few")(inputs)
    x = layers.Conv2D(64, 3, padding="same", activation="relu", name="more")(x)
    model = random_weights(keras.Model(inputs, layers.Conv2D(64, 3, activation="relu", name="most")(x)))
    with pytest.raises(ValueError, match="macs must be at least") as refusal:
        convert.factorize(model, "cp", macs=1)
    smallest = int(str(refusal.value).split("at least ")[1].split(", with")[0].replace(",", ""))
    new, _ = convert.factorize(model, "cp", macs=np.int64(share * smallest), images=images(model, 20))
    assert cost.total_costs(new)["macs"] <= share * smallest


def test_with_images_the_outputs_are_nearer():
    """Chosen ranks and refitted factors, on images of their own, against one ratio and the weights alone."""
    model = zoo()
    x, unseen = images(model, 100, 1), images(model, 200, 2)
    budget = 0.4 * cost.total_costs(model)["macs"]
    plain, _ = convert.factorize(model, "cp", macs=budget)
    aware, _ = convert.factorize(model, "cp", macs=budget, images=x)
    assert cost.total_costs(aware)["macs"] <= budget
    expected, *others = (keras.ops.convert_to_numpy(one(unseen)) for one in (model, plain, aware))
    errors = [np.mean((output - expected) ** 2) for output in others]
    assert errors[1] < 0.2 * errors[0]


def test_layer_by_layer_is_as_all_at_once():
    model = zoo()
    given = {"first": 5, "shared": 6, "inner/conv": 7, "last": 8}
    at_once, _ = convert.factorize(model, "cp", ranks=given)
    in_turn = model
    for path, rank in given.items():
        in_turn, report = convert.factorize(in_turn, "cp", ranks={path: rank})
        assert report["reason"].eq("").sum() == 1
    assert distance(at_once, in_turn, images(model)) < 1e-6


def test_ranks_in_steps_of_what_engines_compute_at_once():
    model = zoo()
    for arguments in ({"ratio": 0.6}, {"macs": 0.6 * cost.total_costs(model)["macs"]}):
        _, report = convert.factorize(model, "cp", multiple=4, **arguments)
        assert {rank % 4 for (rank,) in report["ranks"].dropna()} == {0}
    with pytest.raises(ValueError, match="with cp at rank 4 in all layers"):
        convert.factorize(model, "cp", macs=1000, multiple=4)
    with pytest.raises(ValueError, match="ratio 0.05 is below what cp takes at rank 16 in every layer"):
        convert.factorize(model, "cp", ratio=0.05, multiple=16)


def test_one_ratio_for_all_although_there_are_images():
    model = zoo()
    budget, x = 0.5 * cost.total_costs(model)["macs"], images(model, 20)
    without, with_images, chosen = (
        convert.factorize(model, "cp", macs=budget, **options)[1]["ranks"].tolist()
        for options in ({}, {"images": x, "uniform": True}, {"images": x})
    )
    assert str(without) == str(with_images) != str(chosen)


LOAD = """
import sys, keras, numpy as np
assert not any(name.startswith("fcnn_utils") for name in sys.modules)
model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[3], keras.ops.convert_to_numpy(model(np.load(sys.argv[2]))))
"""


def outputs_in_a_fresh_process(model, x, folder):
    model.save(folder / "model.keras")
    np.save(folder / "x.npy", x)
    paths = [str(folder / name) for name in ("model.keras", "x.npy", "y.npy")]
    environment = os.environ | {"KERAS_BACKEND": keras.config.backend()}
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True, env=environment, cwd=folder)
    return np.load(folder / "y.npy")


def test_a_factorized_network_loads_in_a_fresh_process_without_custom_objects(tmp_path):
    model, x = zoo(), images(zoo())
    new, _ = convert.factorize(model, "cp", ratio=0.5)
    expected = keras.ops.convert_to_numpy(new(x))
    assert np.allclose(outputs_in_a_fresh_process(new, x, tmp_path), expected, atol=1e-5) and expected.std() > 1e-3


# --- batch normalisation -----------------------------------------------------------------------------------------


def normalised():
    """Batch norms behind every kind of layer, and some that can't be folded."""
    x = inputs = keras.Input((9, 9, 4))
    x = layers.Conv2D(6, 3, use_bias=False, name="conv")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="bn1")(x))
    x = layers.BatchNormalization(scale=False, name="bn2")(
        layers.DepthwiseConv2D(3, depth_multiplier=2, name="depth")(x)
    )
    x = layers.BatchNormalization(center=False, name="bn3")(layers.SeparableConv2D(8, 3, name="separable")(x))
    x = layers.Conv2D(8, 1, activation="relu", name="active")(x)
    x = layers.BatchNormalization(name="kept1")(x)  # behind an activation
    y = layers.Conv2D(8, 1, name="branching")(x)
    x = layers.Add()([layers.BatchNormalization(name="kept2")(y), y])  # the convolution is read by others, too
    x = layers.BatchNormalization(name="bn4")(layers.Dense(5, name="dense")(layers.Flatten()(x)))
    return random_weights(keras.Model(inputs, x))


def test_batch_norms_are_folded_where_they_can_be():
    model = normalised()
    folded = convert.fold_batch_norm(model)
    left = [layer.name for layer in folded.layers if isinstance(layer, layers.BatchNormalization)]
    assert left == ["kept1", "kept2"]
    assert distance(model, folded, images(model)) < 1e-4
    assert folded.get_layer("conv").use_bias and not model.get_layer("conv").use_bias


def test_folding_reaches_factorized_and_inner_layers():
    model, x = zoo(), images(zoo())
    new, _ = convert.factorize(model, "cp", ranks={"first": 20})
    folded = convert.fold_batch_norm(new)
    assert not [p for p in keras_graph.layer_nodes(folded) if isinstance(p.layer, layers.BatchNormalization)]
    assert distance(new, folded, x) < 1e-4


def test_a_norm_that_is_told_to_use_its_batch_stays():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    model = random_weights(keras.Model(inputs, layers.BatchNormalization(name="norm")(x, training=True)))
    folded = convert.fold_batch_norm(model)
    assert [layer.name for layer in folded.layers][1:] == ["conv", "norm"]
    assert distance(model, folded, images(model)) < 1e-5


def test_folding_into_another_precision():
    model = keras_graph.rebuild(normalised(), {}, dtype="mixed_bfloat16")
    folded = convert.fold_batch_norm(model, dtype="float32")
    assert {layer.dtype_policy.name for layer in folded.layers} == {"float32"}
    assert distance(normalised(), folded, images(model)) < 1e-4


@pytest.mark.timed
def test_the_simple_network_in_half_a_minute():
    """Decomposed and swapped in, all six layers."""
    dense = networks.build("simple")
    start = time.perf_counter()
    convert.factorize(dense, "cp", macs=cost.total_costs(dense)["macs"] / 4.5)
    assert time.perf_counter() - start < 30
