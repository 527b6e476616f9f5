"""Trained networks factorized: the new network's outputs, costs, report, options and budgets."""

import re
import sys
import time

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import batch_norm, compress, cost, factorizations, keras_graph
from fcnn_utils.layer_kinds import KernelLayer

UP = "the chain needs a transposed depthwise layer, which Keras does not have"

METHODS = list(factorizations.FACTORIZATIONS)


def with_random_weights(model, seed=0):
    """Give a model weights of the size that a trained network has, with moving variances above zero."""
    rng = np.random.default_rng(seed)
    for node in keras_graph.layer_nodes(model):
        for weight in node.layer.weights:
            if "kernel" in weight.path:
                weight.assign(rng.normal(0, (2 / np.prod(weight.shape[:-1])) ** 0.5, weight.shape))
            else:
                weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


@pytest.fixture(scope="module")  # one for all tests: `factorize` does not change it
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
    return with_random_weights(keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name="zoo"))


def small_model(*stack):
    """Make a functional model of these layers on images (8, 8, 4)."""
    x = inputs = keras.Input((8, 8, 4))
    for layer in stack:
        x = layer(x)
    return with_random_weights(keras.Model(inputs, x))


def images(model, count=4, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *model.inputs[0].shape[1:])).astype("float32")


def outputs(model, x):
    """Return the outputs without compilation, which takes longer than a few images."""
    return keras.ops.convert_to_numpy(model(x, training=False))


def distance(one, other, x=None):
    """Return the largest difference of the outputs, relative to the largest output of the first."""
    x = images(one) if x is None else x
    y, z = outputs(one, x), outputs(other, x)
    return float(np.abs(y - z).max() / np.abs(y).max())


def squared_error(one, other, x):
    return np.mean((outputs(one, x) - outputs(other, x)) ** 2)


def full_ranks(model, method):
    return {
        node.path: factorizations.get(method).max_ranks(KernelLayer(node.layer).kernel_shape)
        for node in keras_graph.layer_nodes(model)
        if type(node.layer) is layers.Conv2D and not KernelLayer(node.layer).is_pointwise
    }


def macs(model):
    return cost.total_costs(model)["macs"]


def smallest_budget(model, **options):
    with pytest.raises(ValueError, match="macs must be at least ([0-9,]+), with cp at rank") as refusal:
        compress.factorize(model, "cp", macs=1, **options)
    return int(str(refusal.value).split("at least ")[1].split(", with")[0].replace(",", ""))


def assert_loads_without_custom_objects(model, x, folder):
    assert {type(node.layer).__module__.split(".")[0] for node in keras_graph.layer_nodes(model)} == {"keras"}
    model.save(folder / "model.keras")
    assert distance(model, keras.saving.load_model(folder / "model.keras"), x) < 1e-4


# --- the new network computes what it should ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_network_is_the_same_at_full_rank_and_that_of_the_rebuilt_kernels_if_truncated(zoo, method):
    new, report = compress.factorize(zoo, method, ranks=full_ranks(zoo, method))
    assert (report["reason"] == "").sum() == 6 and distance(zoo, new) < 1e-4
    options = {"n_iter": 20} if method in ("cp", "cp4") else {}
    new, report = compress.factorize(zoo, method, ratio=0.6, **options)
    expected = keras_graph.rebuild(zoo, {})
    nodes = {node.path: node.layer for node in keras_graph.layer_nodes(expected)}
    options |= {"max_norm": 1.0} if options else {}
    for path, ranks in report[report["reason"] == ""].set_index("layer")["ranks"].items():
        kind, (_, *bias) = KernelLayer(nodes[path]), nodes[path].get_weights()
        kernels = [factorizations.decompose(part, method, ranks, **options).to_kernel() for part in kind.kernels()]
        nodes[path].set_weights([kind.keras_kernel(kernels), *bias])
    assert distance(expected, new) < 1e-4 and distance(zoo, new) > 1e-3


def test_the_original_is_not_changed_and_shares_nothing(zoo):
    before = zoo.get_weights()
    new, _ = compress.factorize(zoo, ratio=0.5, images=images(zoo, 20))
    new.set_weights([0 * weight for weight in new.get_weights()])
    assert all(np.array_equal(a, b) for a, b in zip(zoo.get_weights(), before, strict=True))


def test_layer_by_layer_gives_the_same_as_all_at_once_with_the_same_seed(zoo):
    given, options = {"first": 5, "shared": 6, "inner/conv": 7, "last": 8}, {"n_starts": 2, "n_iter": 20}
    at_once, other = (compress.factorize(zoo, "cp", ranks=given, seed=seed, **options)[0] for seed in (1, 2))
    in_turn = zoo
    for path, rank in given.items():
        in_turn, _ = compress.factorize(in_turn, "cp", ranks={path: rank}, seed=1, **options)
    assert distance(at_once, in_turn) < 1e-6 < distance(at_once, other)


def test_images_bring_the_outputs_nearer(zoo):
    """With images the ranks are chosen, unless `uniform`, and the factors refitted; compared on unseen images."""
    budget, x, unseen = 0.4 * macs(zoo), images(zoo, 100, 1), images(zoo, 200, 2)
    ranks, errors = [], []
    for options in ({}, {"images": x, "uniform": True}, {"images": x}):
        new, report = compress.factorize(zoo, "cp", macs=budget, **options)
        assert macs(new) <= budget
        ranks.append(report["ranks"].dropna().to_dict())
        errors.append(squared_error(zoo, new, unseen))
    assert ranks[0] == ranks[1] != ranks[2]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.2 * errors[0]


def test_a_factorized_network_is_saved_and_loaded_and_its_batch_norms_fold(zoo, tmp_path):
    new, _ = compress.factorize(zoo, "cp", ratio=0.5, layers=["first", "shared", "inner/conv"])
    assert_loads_without_custom_objects(new, images(zoo), tmp_path)
    folded = batch_norm.fold_batch_norm(new)
    assert not [n for n in keras_graph.layer_nodes(folded) if isinstance(n.layer, layers.BatchNormalization)]
    assert distance(new, folded) < 1e-4 and outputs(new, images(zoo)).std() > 1e-2


def test_a_sequential_network_stays_sequential():
    stack = [layers.Conv2D(6, 3, name="a", activation="relu"), layers.Conv2D(6, 3, name="b")]
    model = with_random_weights(keras.Sequential([keras.Input((8, 8, 4)), *stack]))
    new, _ = compress.factorize(model, "tt", ranks=full_ranks(model, "tt"))
    assert isinstance(new, keras.Sequential) and {"a", "b"} <= {layer.name for layer in new.layers}
    assert distance(model, new) < 1e-4


def test_a_factorization_is_added_by_one_class():
    """The mean over space, with rank 1: a depthwise box filter and a 1×1 layer."""

    class Mean(factorizations.Factorization):
        name = "mean"

        @classmethod
        def structure(cls, spatial):
            return [("box", 0, f"{spatial}sr", "s->sr"), ("out", 1, "srt", "sr->t")]

        @classmethod
        def _max_ranks(cls, kernel_shape):
            return (1,)

        @classmethod
        def _factors(cls, kernel, ranks):
            return [np.ones((*kernel.shape[:-1], 1)), kernel.mean(axis=(0, 1))[:, None]]

    try:
        model = small_model(layers.Conv2D(6, 3, strides=2, padding="same", name="conv"))
        kernel, bias = model.get_layer("conv").get_weights()
        new, report = compress.factorize(model, "mean", ratio=0.5)
        assert report["method"].tolist() == ["mean"] and report["ranks"].tolist() == [(1,)]
        assert report["params_after"].tolist() == [9 * 4 + 4 * 6 + 6] and report["macs_after"].sum() == macs(new)
        expected = keras_graph.rebuild(model, {})
        expected.get_layer("conv").set_weights([np.broadcast_to(kernel.mean(axis=(0, 1)), kernel.shape), bias])
        assert [layer.name for layer in new.layers[1:]] == ["conv_box", "conv"]
        assert distance(expected, new) < 1e-5 and distance(model, new) > 1e-2
        x = images(model, 50)
        refitted, _ = compress.factorize(model, "mean", macs=macs(new), images=x)
        assert macs(refitted) == macs(new) and squared_error(model, refitted, x) < squared_error(model, new, x)
    finally:
        del factorizations.FACTORIZATIONS["mean"]
    assert list(factorizations.FACTORIZATIONS) == METHODS


# --- what is kept, and what is left ------------------------------------------------------------------------------


def test_options_of_the_layer_are_kept():
    options = {"kernel_regularizer": "l2", "bias_regularizer": "l1", "activity_regularizer": "l2"}
    options |= {"strides": 2, "activation": "elu", "dtype": "mixed_bfloat16", "bias_constraint": "non_neg"}
    layer = layers.Conv2D(6, 3, name="conv", **options)
    model = small_model(layer, layers.ReLU(name="conv_in"))  # a name that the chain cannot have then
    layer.trainable = False
    new, _ = compress.factorize(model, "cp", ranks={"conv": 4})
    enter, depthwise, last = (new.get_layer(name) for name in ("conv_in_", "conv_depthwise", "conv"))
    assert last.activation is keras.activations.elu and enter.activation is keras.activations.linear
    assert depthwise.strides == (2, 2) and last.output.shape == layer.output.shape
    assert all(part.dtype_policy.name == "mixed_bfloat16" for part in (enter, depthwise, last))
    assert not any(part.trainable for part in (enter, depthwise, last)) and new.get_layer("conv_in").trainable
    assert enter.kernel_regularizer.l2 == depthwise.depthwise_regularizer.l2 == last.kernel_regularizer.l2 > 0
    assert last.bias_regularizer.l1 > 0 and last.activity_regularizer.l2 > 0 and enter.activity_regularizer is None
    assert isinstance(last.bias_constraint, keras.constraints.NonNeg)


def test_initializers_and_activations_that_a_file_could_not_hold():
    """An array of the dense kernel's shape is left out; a function that Keras does not know by name is passed on."""

    def wave(x):
        return keras.ops.sin(3 * x)

    array = keras.initializers.Constant(np.full((3, 3, 4, 6), 0.5, "float32"))
    layer = layers.Conv2D(6, 3, kernel_initializer=array, bias_initializer="ones", activation=wave, name="conv")
    model = small_model(layer, layers.BatchNormalization())
    new, _ = compress.factorize(model, "tucker", ranks={"conv": (4, 6)})
    last = new.get_layer("conv")
    assert last.activation is wave and isinstance(last.bias_initializer, keras.initializers.Ones)
    assert distance(model, new) < 1e-4


def test_every_layer_with_weights_is_reported_with_its_costs(zoo):
    new, report = compress.factorize(zoo, "cp", ratio=0.5)
    report, nodes = report.set_index("layer"), keras_graph.layer_nodes(zoo)
    assert list(report.index) == [node.path for node in nodes if node.layer.weights]
    converted = report[report["reason"] == ""]
    assert set(converted.index) == {"inner/conv", "shared", "last", "stack/conv", "grouped"}
    assert (converted["params_after"] < converted["params_before"]).all() and (converted["method"] == "cp").all()
    assert converted["relative_error"].between(0, 1).all() and converted["degeneracy"].between(0, 1).all()
    reasons = report["reason"].to_dict()
    assert reasons["first"].startswith("reads 3 channels") and reasons["point"].startswith("1×1")
    assert reasons["depthwise"] == "depthwise"
    for column, model in (("before", zoo), ("after", new)):
        assert report[f"macs_{column}"].sum() == macs(model)
        assert report[f"params_{column}"].sum() == cost.total_costs(model)["params"]


def test_convolutions_that_cannot_be_factorized_are_left_with_the_reason():
    class Own(layers.Conv2D):
        pass

    def conv(name, kind=layers.Conv2D, filters=4, **options):
        return kind(filters, 3, padding="same", activation="relu", name=name, **options)

    tuned = conv("tuned")
    stack = [conv("bound", kernel_constraint="max_norm"), conv("first", filters=8, data_format="channels_first")]
    stack += [conv("separable", layers.SeparableConv2D), conv("own", Own)]
    model = small_model(*stack, tuned, conv("plain"))
    tuned.enable_lora(2)
    _, report = compress.factorize(model, "tucker", ratio=0.5)
    reasons = report.set_index("layer")["reason"].to_dict()
    expected = {"bound": "constraint", "first": "channels come first", "own": "a Own, not"}
    expected |= {"separable": "separable already", "tuned": "LoRA", "plain": ""}
    assert reasons.keys() == expected.keys()
    assert all(expected[path] in reasons[path] for path in expected) and reasons["plain"] == ""


def test_a_layer_called_on_images_of_several_sizes_is_converted_if_its_chain_needs_no_size():
    inputs = keras.Input((8, 8, 6))
    heads = {
        name: layers.Conv2D(6, 3, strides=strides, padding="same", name=name) for name, strides in (("a", 1), ("b", 2))
    }
    smaller = layers.MaxPooling2D()(inputs)
    outputs = [layers.GlobalAveragePooling2D()(head(x)) for head in heads.values() for x in (inputs, smaller)]
    model = with_random_weights(keras.Model(inputs, layers.Concatenate()(outputs)))
    new, report = compress.factorize(model, "cp4", ranks={"a": 54})
    macs_of = report.set_index("layer")["macs_after"]["a"]
    assert distance(model, new) < 1e-4 and macs_of == (64 + 16) * 54 * (6 + 3 + 3 + 6)
    with pytest.raises(ValueError, match="layer 'b' can't be factorized: .* need an image of a fixed size"):
        compress.factorize(model, "cp4", ranks={"b": 54})


class StandardizedConv(layers.Conv2D):
    """A convolution that standardizes its weights."""

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - keras.ops.mean(kernel, axis=(0, 1, 2), keepdims=True))


def test_every_kind_of_layer_with_weights_has_a_row_with_the_reason():
    x = inputs = keras.Input((3, 8, 8, 6))
    x = layers.TimeDistributed(layers.Conv2D(6, 3), name="frames")(x)
    x = layers.ConvLSTM2D(6, 3, name="recurrent")(x)
    x = layers.SpectralNormalization(layers.Conv2D(6, 3, padding="same"), name="spectral")(x)
    x = StandardizedConv(6, 3, padding="same", name="own")(x)
    x = layers.Conv2D(6, 3, activation="relu", name="plain")(x)
    model = with_random_weights(keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x))))
    new, report = compress.factorize(model, "tucker", ratio=0.5)
    reasons = report.set_index("layer")["reason"].to_dict()
    assert reasons == {
        "frames": "a TimeDistributed, not a layer by itself",
        "recurrent": "a ConvLSTM2D, which is not factorized",
        "spectral": "a SpectralNormalization, not a layer by itself",
        "own": "a StandardizedConv, not a layer of Keras",
        "plain": "",
        "head": "dense: only svd factorizes it",
    }
    assert report["params_before"].sum() == model.count_params()


def test_quantized_layers_and_layers_with_a_lora_are_left():
    x = inputs = keras.Input((8, 8, 6))
    x = layers.Conv2D(6, 3, activation="relu", name="tuned")(x)
    x = layers.Conv2D(6, 3, activation="relu", name="plain")(x)
    model = with_random_weights(keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x))))
    model.get_layer("tuned").enable_lora(2)
    new, report = compress.factorize(model, "tucker", ranks={"plain": (6, 6)})
    assert "LoRA" in report.set_index("layer")["reason"]["tuned"] and distance(model, new) < 1e-4
    model.get_layer("head").quantize("int8")
    new, report = compress.factorize(model, "tucker", ranks={"plain": (6, 6)})
    assert distance(model, new) < 1e-4


def test_linear_neighbours_are_no_factorization_by_themselves():
    x = inputs = keras.Input((8, 8, 6))
    head = layers.Conv2D(8, 3, padding="same", name="head")(x)  # as in EDSR: linear head, linear ends of blocks
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="first")(head)
    x = layers.Add()([layers.Conv2D(8, 3, padding="same", name="second")(x), head])
    x = layers.Conv2DTranspose(8, 2, strides=2, name="up")(x)
    model = with_random_weights(keras.Model(inputs, layers.Conv2D(3, 3, padding="same", name="tail")(x)))
    _, report = compress.factorize(model, "cp", ratio=0.5)
    reasons = report.set_index("layer")["reason"].to_dict()
    assert reasons == {"head": "", "first": "", "second": "", "up": UP, "tail": ""}


@pytest.mark.parametrize("kind", ["input", "inner model", "operation"])
def test_names_of_new_layers_avoid_all_names_of_the_model(kind):
    x = inputs = keras.Input((8, 8, 6), name="conv_in" if kind == "input" else "images")
    if kind == "inner model":
        x = keras.Sequential([keras.Input((8, 8, 6)), layers.ReLU()], name="conv_in")(x)
    if kind == "operation":
        x = layers.Identity(name="conv_in")(x)
    model = with_random_weights(keras.Model(inputs, layers.Conv2D(6, 3, name="conv")(x)))
    new, _ = compress.factorize(model, "cp", ranks={"conv": 36})
    assert distance(model, new) < 1e-4 and "conv_in_" in [layer.name for layer in new.layers]


def test_a_budget_is_kept_beside_layers_that_are_not_touched():
    x = inputs = keras.Input((8, 8, 6))
    x = layers.PReLU()(layers.Conv2D(8, 3, padding="same", name="conv")(x))
    x = layers.GroupNormalization(2)(layers.Conv2DTranspose(8, 2, strides=2)(x))
    x = layers.LayerNormalization()(layers.Reshape((-1, 8))(x))
    x = layers.GRU(4)(layers.Attention()([x, x]))
    model = with_random_weights(keras.Model(inputs, x))
    new, _ = compress.factorize(model, "cp", macs=macs(model) - 10_000)
    assert macs(new) <= macs(model) - 10_000


def test_a_nested_network_is_converted_at_the_size_of_its_call():
    stack = [layers.Conv2D(8, 3, activation="relu", name="conv"), layers.GlobalAveragePooling2D()]
    inner = keras.Sequential([keras.Input((None, None, 6)), *stack], name="inner")
    inputs = keras.Input((12, 10, 6))
    model = with_random_weights(keras.Model(inputs, layers.Dense(2)(inner(inputs))))
    new, report = compress.factorize(model, "tucker", macs=0.5 * macs(model))
    assert report.set_index("layer")["macs_before"]["inner/conv"] == 10 * 8 * 9 * 6 * 8
    assert macs(new) <= 0.5 * macs(model)


@pytest.mark.parametrize("ratio", [np.float32(0.4), np.float64(0.4), 1])
def test_numbers_of_numpy_are_numbers(zoo, ratio):
    _, report = compress.factorize(zoo, "tucker", ratio=ratio)
    converted = report[report["reason"] == ""]
    assert (converted["params_after"] <= ratio * converted["params_before"] + 12).all() and len(converted)


def test_a_subclassed_model_is_traced_and_converted():
    class Own(keras.Model):
        def __init__(self):
            super().__init__(name="own")
            self.conv, self.head = layers.Conv2D(8, 3, activation="relu", name="conv"), layers.Dense(2)

        def call(self, x):
            return self.head(keras.ops.mean(self.conv(x), axis=(1, 2)))

    model = Own()
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 6)).astype("float32")
    model(x)
    with pytest.warns(UserWarning, match="'own' is subclassed: it was traced"):
        new, report = compress.factorize(model, "tucker", ranks={"conv": (6, 8)})
    assert distance(model, new, x) < 1e-4 and report["reason"].tolist() == ["", "dense: only svd factorizes it"]


def test_a_network_with_several_inputs_and_outputs_is_calibrated():
    one, two = keras.Input((8, 8, 6), name="left"), keras.Input((8, 8, 6), name="right")
    shared = layers.Conv2D(8, 3, activation="relu", name="shared")
    x = layers.Concatenate()([shared(one), shared(two)])
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, activation="relu", name="conv")(x))
    outputs = {"class": layers.Dense(3, activation="softmax", name="class")(x), "size": layers.Dense(1, name="size")(x)}
    model = with_random_weights(keras.Model({"left": one, "right": two}, outputs))
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((40, 8, 8, 6)).astype("float32") for name in ("left", "right")}
    errors = []
    for pictures in (None, given):
        new, _ = compress.factorize(model, "cp", ratio=0.4, images=pictures)
        expected, found = model(given)["class"], new(given)["class"]
        errors.append(float(keras.ops.mean((expected - found) ** 2)))
    assert errors[1] < 0.95 * errors[0]


def test_the_report_prints_totals_and_reasons(zoo):
    _, report = compress.factorize(zoo, "cp", ratio=0.5)
    text = str(report)
    assert "5 converted" in text and "left: depthwise (depthwise)" in text and "norm" not in text and "..." not in text
    assert max(map(len, text.splitlines())) < 130
    assert str(report[["layer"]]) == str(report[["layer"]].copy())  # a part prints as pandas prints it


def test_progress_is_shown_if_it_takes_longer_than_half_a_second(capsys):
    from fcnn_utils import _progress

    for seconds, verbose, shown in ((0.0, 1, False), (0.6, 1, True), (0.6, 0, False)):
        for _ in _progress.Progress(verbose).over(range(3), "work"):
            time.sleep(seconds)
        text = capsys.readouterr().out
        assert ("work" in text and "3/3" in text) == shown
    for _ in _progress.Progress(1).over([0], "slow"):
        time.sleep(0.8)
        assert "slow: 0/1, " in capsys.readouterr().out  # before the first item is done


@pytest.mark.parametrize("method", ["cp", "tucker", "spatial"])
def test_a_second_time_leaves_what_is_factorized_unless_it_is_named(zoo, method):
    once, _ = compress.factorize(zoo, method, ratio=0.6, layers=["shared", "last"])
    _, report = compress.factorize(once, method, ratio=0.6)
    reasons = report.set_index("layer")["reason"]
    parts = [path for path in reasons.index if path.startswith(("shared", "last"))]
    assert len(parts) >= 4 and all(reasons[path] for path in parts) and reasons["inner/conv"] == ""
    named = [path for path in parts if "factorized already" in reasons[path]]
    if method != "cp":  # the core of a Tucker, the column of a spatial one are kernels that can be factorized again
        whole = {path: ranks for path, ranks in full_ranks(once, "tt").items() if path in named}
        again, _ = compress.factorize(once, "tt", ranks=whole)
        assert len(again.layers) > len(once.layers) and distance(once, again) < 1e-4


# --- budgets and arguments -------------------------------------------------------------------------------------------


def test_a_budget_is_kept_and_used(zoo):
    for share in (0.97, 0.6, 0.4):
        new, report = compress.factorize(zoo, "spatial", macs=share * macs(zoo))
        assert 0.85 * share * macs(zoo) < macs(new) <= share * macs(zoo)  # a rank more is some percent of so few MACs
        assert (report["macs_after"] <= report["macs_before"]).all()
    with pytest.warns(UserWarning, match=r"the dense network needs no more than macs=1e\+12: all layers stay dense"):
        untouched, report = compress.factorize(zoo, "cp", macs=1e12)
    assert distance(zoo, untouched) == 0 and (report["reason"] != "").all()
    smallest = smallest_budget(zoo)
    assert macs(compress.factorize(zoo, "cp", macs=smallest)[0]) == smallest
    with pytest.raises(ValueError, match="macs must be at least"):
        compress.factorize(zoo, "cp", macs=smallest - 1)


def test_a_budget_that_leaves_no_choice_is_kept_with_images_too():
    """A small layer's rank 1 is a large share of it: curves around the common ratio say nothing about it."""
    sizes = {"few": 4, "more": 64, "most": 64}
    model = small_model(*(layers.Conv2D(sizes[name], 3, activation="relu", name=name) for name in sizes))
    smallest = smallest_budget(model)
    for share in (1.0, 1.001, 1.3):
        new, _ = compress.factorize(model, "cp", macs=np.int64(share * smallest), images=images(model, 20))
        assert macs(new) <= share * smallest


def test_a_budget_needs_images_of_a_fixed_size():
    inputs = keras.Input((None, None, 8))
    model = keras.Model(inputs, layers.Conv2D(8, 3, name="conv")(inputs))
    with pytest.raises(ValueError, match="a fixed input size: use params=, size_mb=, ratio= or ranks="):
        compress.factorize(model, macs=1e6)
    new, report = compress.factorize(model, ratio=0.5)
    assert np.isnan(report["macs_after"][0]) and new(np.zeros((1, 9, 7, 8), "float32")).shape == (1, 7, 5, 8)
    strided = keras.Model(inputs, layers.Conv2D(8, 3, strides=2, padding="same", name="conv")(inputs))
    with pytest.raises(ValueError, match="no layer to factorize by cp4 .conv: .* image of a fixed size"):
        compress.factorize(strided, "cp4", ratio=0.5)
    with pytest.raises(ValueError, match="layer 'conv' can't be factorized: .* image of a fixed size"):
        compress.factorize(strided, "cp4", ratio=0.5, layers="conv")


def test_a_layer_that_a_method_cannot_take_is_left_and_the_others_are_converted():
    inputs = keras.Input((None, None, 8))
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="strided")(inputs)
    model = with_random_weights(keras.Model(inputs, layers.Conv2D(8, 3, name="plain")(x)))
    _, report = compress.factorize(model, "cp4", ratio=0.5)
    reasons = report.set_index("layer")["reason"]
    assert "image of a fixed size" in reasons["strided"] and reasons["plain"] == ""


def test_ranks_are_multiples_of_a_step(zoo):
    for arguments in ({"ratio": 0.6}, {"macs": 0.6 * macs(zoo)}):
        _, report = compress.factorize(zoo, "cp", multiple=4, **arguments)
        assert {rank % 4 for (rank,) in report["ranks"].dropna()} == {0}
    assert smallest_budget(zoo, multiple=4) > smallest_budget(zoo)
    with pytest.raises(
        ValueError, match="at least ([0-9.]+), the share of cp at rank 16; got 0.05: raise it"
    ) as refusal:
        compress.factorize(zoo, "cp", ratio=0.05, multiple=16)
    least = float(re.search("at least ([0-9.]+)", str(refusal.value))[1])
    compress.factorize(zoo, "cp", ratio=least, multiple=16)  # what the message says is allowed


@pytest.mark.parametrize("count", [31, 32])
def test_a_warning_says_that_few_images_are_fitted_too_well(recwarn, count):
    model = small_model(layers.Conv2D(16, 3))
    images = np.random.default_rng(0).standard_normal((count, *model.input_shape[1:])).astype("float32")
    compress.factorize(model, "svd", ratio=0.5, images=images, verbose=0)
    assert [str(each.message).split(".")[0] for each in recwarn if "few" in str(each.message)] == (
        ["calibration images: 31 are few"] if count < 32 else []
    )


def test_invalid_arguments_are_rejected_with_what_is_allowed(zoo):
    methods = ", ".join(factorizations.FACTORIZATIONS)
    for arguments, message in (
        ({}, "give exactly one of ratio=, ranks=, macs=, .* or metric=; got none$"),
        ({"ration": 0.5}, "got none; ration= is not known$"),
        ({"ratio": 0.5, "macs": 1e6}, "give exactly one of .* or metric=; got ratio= and macs=$"),
        ({"ratio": 0}, "ratio must be a number between"),
        ({"ratio": 0.001}, "ratio must be at least [0-9.]+, the share of cp at rank 1; got 0.001"),
        ({"method": "qr", "ratio": 0.5}, f"method must be 'auto', one of {methods}, or a list of these; got 'qr'"),
        ({"ratio": 0.5, "layers": ["shared", "nope"]}, "no layer 'nope' with weights in model 'zoo'.*inner/conv"),
        ({"ratio": 0.5, "layers": []}, "name at least one layer"),
        ({"ratio": 0.5, "layers": "point"}, "layer 'point' can't be factorized: 1×1: only svd factorizes it"),
        ({"ranks": {"shared": 1000}}, "rank of cp for a .* kernel must be a whole number between 1 and"),
        ({"ranks": {"shared": 3}, "layers": ["shared"]}, "leave out layers="),
        (
            {"ratio": 0.5, "images": np.zeros((2, 3))},
            r"the shape \(N, 11, 16, 3\), at least one, of floats or integers; got \(2, 3\) float64",
        ),
        ({"ratio": 0.5, "multiple": 0}, "multiple must be a whole number between"),
        ({"ratio": 0.5, "uniform": "yes"}, "uniform must be one of True, False; got 'yes'"),
        ({"ratio": 0.5, "max_norm": 0.1}, "max_norm must be a number"),
        ({"ratio": 0.5, "seed": -1}, "seed must be a whole number"),
        ({"ratio": 0.5, "speed": 3}, "cp has no option 'speed'; it has .*n_starts"),
        ({"ratio": 0.5, "speed": 3, "method": "auto"}, "none of svd, spatial, tucker, cp has an option 'speed'"),
        ({"method": [], "ratio": 0.5}, r"method must be 'auto', one of .*, or a list of these; got \[\]"),
        ({"ratio": 0.5, "exclude": "nope*"}, "no layer 'nope.' with weights in model 'zoo'"),
        ({"ratio": 0.5, "exclude": "*"}, "no layer to factorize by cp .*: excluded"),
        ({"ranks": {"shared": 3}, "method": ["cp", "svd"]}, "must name the method .*: {'shared': .'cp', 3.}"),
        ({"ranks": {"shared": ("qr", 3)}}, "method must be one of"),
        ({"ranks": {"point": ("cp", 3)}}, "layer 'point' can't be factorized: 1×1: only svd factorizes it"),
        ({"ranks": {"point": 3}, "method": ["cp", "tt"]}, "layer 'point' can't be factorized: 1×1: only svd"),
        (
            {"ranks": {"point": ("cp", 3), "shared": ("svd", 3)}},
            "layer 'point' can't be factorized by cp: 1×1: only svd factorizes it",
        ),
        ({"ranks": {"shar*": 3}}, "ranks= takes exact paths of layers that are not excluded; got 'shar.'"),
        ({"ranks": {"shared": 3}, "exclude": "shared"}, "no layer to factorize|ranks= takes exact paths"),
        ({"size_mb": 1e-5}, "size_mb must be at least [0-9.]+ MB, with cp at rank 1"),
        ({"ratio": 0.5, "model": keras.Sequential([layers.Conv2D(4, 3)])}, "is not built"),
        ({"ratio": 0.5, "model": small_model(layers.Flatten())}, "no layer to factorize by cp .no layer has a kernel"),
        (
            {"ratio": 0.5, "model": small_model(layers.Conv2D(4, 1, name="point"))},
            "no layer to factorize by cp .*point: 1×1",
        ),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            compress.factorize(**{"model": zoo, "method": "cp"} | arguments)
        assert "\n" not in str(refusal.value)


# --- networks of keras.applications ------------------------------------------------------------------------------

NETWORKS = {"MobileNetV2": 1, "ResNet50": 17, "VGG16": 13, "DenseNet121": 59, "EfficientNetB0": 1}  # k×k convolutions


def application(name):
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=10)
    return model, np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")


CASES = [(name, method) for name in NETWORKS for method in ("spatial", "tucker", "tt")]


@pytest.mark.parametrize(
    ("name", "method"), [CASES[1], *(pytest.param(*case, marks=pytest.mark.full) for case in CASES)]
)
def test_networks_of_keras_applications_are_the_same_at_full_rank(name, method):
    model, x = application(name)
    new, report = compress.factorize(model, method, ranks=full_ranks(model, method))
    assert (report["reason"] == "").sum() == NETWORKS[name]
    others = {
        "dense: only svd factorizes it",
        "a BatchNormalization: it has no kernel",
        "a Normalization: it has no kernel",
    }
    assert set(report["reason"]) <= {"", "1×1: only svd factorizes it", "depthwise"} | others
    reads = [keras.Model(one.input, one.layers[-1].input) for one in (model, new)]  # random logits hardly differ
    assert distance(*reads, x) < 1e-3


@pytest.mark.bench
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_keras_applications_take_five_minutes_and_eight_gigabytes_at_most(name, tmp_path):
    import resource  # here, since Windows has none

    (model, x), count = application(name), NETWORKS[name]
    start = time.perf_counter()
    named = None if count > 1 else list(full_ranks(model, "cp"))  # the only one reads three channels
    new, report = compress.factorize(model, "cp", ratio=0.25, layers=named)
    assert time.perf_counter() - start < 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) < 8e9
    assert (report["reason"] == "").sum() == count - (count > 1)
    assert_loads_without_custom_objects(new, x, tmp_path)
    assert distance(new, batch_norm.fold_batch_norm(new), x) < 1e-4
