"""Thirteen networks in the styles that people use (`example_networks`): converted, counted, folded and exported."""

import collections
import dataclasses
import functools
import importlib.util
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

from fcnn_utils import batch_norm, compress, cost, deploy, factorizations, keras_graph


def load(name):
    """Import a file beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nets = load("example_networks")
METHODS = ("cp", "tucker")
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "litert": ".tflite"}
RGB = "reads 3 channels: little to save, much to lose"
GREY = "reads 1 channel: little to save, much to lose"
POINT = "1×1: only svd factorizes it"
NORM = "a BatchNormalization: it has no kernel"
DENSE = "dense: only svd factorizes it"
UP = "the chain needs a transposed depthwise layer, which Keras does not have"


@dataclasses.dataclass
class Example:
    """What is known about a network from its code.

    Attributes:
        converted: number of layers that are converted.
        left: reason -> number of the layers with weights that are left for it.
        norms: (number of batch normalisations that can be folded, of all).
        share: of the dense MACs, a budget that can be kept.
        options: of `factorize`.
        unknown: layers whose MACs are not known.
    """

    converted: int
    left: dict
    norms: tuple = (0, 0)
    share: float = 0.7
    options: dict = dataclasses.field(default_factory=dict)
    unknown: str = ""


MOBILENET = Example(1, {RGB: 1, "depthwise": 3, POINT: 5, NORM: 10}, (10, 10), 0.75)
EXAMPLES = {
    "unet": Example(9, {RGB: 1, POINT: 1, UP: 2}),
    "deeplab": Example(5, {RGB: 1, POINT: 5, NORM: 10}, (10, 10)),
    "edsr": Example(7, {RGB: 1}),
    "srgan": Example(7, {RGB: 1, NORM: 5, "a PReLU, which is not factorized": 4}, (5, 5)),
    "captcha": Example(1, {GREY: 1, DENSE: 2, "a Bidirectional, which is not factorized": 2}),
    "transformer": Example(
        1,
        {
            RGB: 1,
            DENSE: 6,
            "an attention layer, which makes its projections itself: no chain can take their place": 2,
            "a LayerNormalization: it has no kernel": 5,
            "a Positions, not a layer of Keras": 1,
        },
    ),
    "convmixer": Example(  # the normalisations come after the activations
        1, {"depthwise": 3, POINT: 3, NORM: 7, DENSE: 1}, (0, 7), 0.95, {"layers": "stem"}
    ),
    "video": MOBILENET,
    "siamese": Example(1, {GREY: 1, NORM: 3, DENSE: 2}, (1, 3)),
    "multimodal": Example(1, {RGB: 1, NORM: 3, DENSE: 3}, (3, 3)),
    "pix2pix": Example(2, {RGB: 1, NORM: 4, UP: 3}, (4, 4), 0.8),
    "ddpm": Example(
        9,
        {
            RGB: 1,
            POINT: 1,
            DENSE: 5,
            "a GroupNormalization: it has no kernel": 7,
            "a PixelAttention, not a layer of Keras": 1,
        },
        unknown="pixel_attention",
    ),
    "retinanet": Example(12, {RGB: 1, POINT: 3, NORM: 3}, (3, 3), 0.7),
}
PARAMETERS = pytest.mark.parametrize("name", EXAMPLES)


@functools.cache
def network(name):
    """Make a network with random weights; of the video classifier its encoder, since `factorize` sees no parts."""
    return nets.with_random_weights(getattr(nets, "mobilenet" if name == "video" else name)())


def in_video(encoder):
    """Make the video classifier around an encoder, always with the same weights after it."""
    model = nets.video(encoder)
    for layer in model.layers[2:]:
        nets.with_random_weights(layer)
    return model


def model_layer(model, path):
    return next(node.layer for node in keras_graph.layer_nodes(model) if node.path == path)


def outputs(model, inputs):
    found = keras.tree.flatten(model(inputs, training=False))
    return [keras.ops.convert_to_numpy(y).astype("float64") for y in found]


def distance(one, other, inputs=None):
    """Return the largest difference of the outputs, relative to the range of the first model's."""
    inputs = deploy.random_inputs(one) if inputs is None else inputs
    pairs = zip(outputs(one, inputs), outputs(other, inputs), strict=True)
    return max(float(np.abs(y - z).max() / np.ptp(y)) for y, z in pairs)


def known_costs(model, unknown=""):
    """Return the total costs, and check that a warning names the layer whose costs are unknown, or that none is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        total = cost.total_costs(model)
    said = [f"the MACs of {unknown} are not known and are missing in the total"] if unknown else []
    assert [str(each.message) for each in caught] == said
    return total


def needs(engine):
    if engine not in deploy.available():
        pytest.skip(f"{engine} is not installed, or Keras cannot export to it from {keras.config.backend()}")


def factorized(name, method, **options):
    if method == "cp":
        options |= {"n_iter": 5}  # random kernels are far from any rank
    return compress.factorize(network(name), method, verbose=0, **EXAMPLES[name].options, **options)


@functools.cache
def halved(name, method):
    return factorized(name, method, ratio=0.5)


@pytest.mark.parametrize("method", METHODS)
@PARAMETERS
def test_each_layer_is_converted_or_its_reason_is_reported(name, method):
    model, example = network(name), EXAMPLES[name]
    small, report = halved(name, method)
    paths = [node.path for node in keras_graph.layer_nodes(model) if node.layer.weights]
    assert report["layer"].tolist() == paths
    left = dict(example.left)
    transposed = left.pop(UP, 0) if method == "tucker" else 0
    assert collections.Counter(report["reason"]) == {"": example.converted + transposed, **left}
    converted = report[report["reason"] == ""]
    filters = [model_layer(model, path).filters for path in converted["layer"]]  # a bias for each is kept
    assert (converted["params_after"] - filters <= 0.5 * (converted["params_before"] - filters) + 1).all()
    before, after = known_costs(model, example.unknown), known_costs(small, example.unknown)
    for key in ("params", "macs"):
        assert before[key] - after[key] == report[f"{key}_before"].sum() - report[f"{key}_after"].sum() > 0
    assert before["params"] == model.count_params() and after["params"] == small.count_params()


@pytest.mark.filterwarnings("ignore:the MACs of pixel_attention")
@PARAMETERS
def test_a_budget_of_macs_is_kept(name):
    budget = EXAMPLES[name].share * cost.total_costs(network(name))["macs"]
    small, report = factorized(name, "tucker", macs=budget)
    assert 0.8 * budget < cost.total_costs(small)["macs"] <= budget and (report["reason"] == "").any()


@pytest.mark.parametrize(("name", "method"), [(name, METHODS[number % 2]) for number, name in enumerate(EXAMPLES)])
def test_the_outputs_are_the_same_at_full_rank(name, method):
    model, report = network(name), halved(name, method)[1]
    paths = report["layer"][report["reason"] == ""]
    kernels = {path: tuple(model_layer(model, path).kernel.shape) for path in paths}
    ranks = {path: factorizations.get(method).max_ranks(shape) for path, shape in kernels.items()}
    full, report = compress.factorize(model, method, ranks=ranks, verbose=0)
    assert (report["reason"] == "").sum() == EXAMPLES[name].converted
    assert len(keras_graph.layer_nodes(full)) >= len(keras_graph.layer_nodes(model)) + 2 * len(ranks)
    assert distance(model, full) < 1e-4 < distance(model, halved(name, method)[0])


@PARAMETERS
def test_the_norms_that_can_be_folded_are_folded(name):
    model = network(name)
    folded, report = batch_norm.fold_batch_norm(model, report=True)
    assert ((report["reason"] == "").sum(), len(report)) == EXAMPLES[name].norms
    assert distance(model, folded) < 1e-4


def test_a_network_of_which_nothing_is_converted_says_why():
    with pytest.raises(
        ValueError, match=r"'convmixer' has no layer to factorize by cp \(stem: reads 3 channels: .*wise"
    ):
        compress.factorize(network("convmixer"), "cp", ratio=0.5)
    with pytest.raises(
        ValueError, match="'video' has no layer to factorize by cp .*frames: a TimeDistributed, not a layer"
    ):
        compress.factorize(in_video(network("video")), "cp", ratio=0.5)


def test_a_factorized_encoder_serves_in_a_video_classifier():
    encoder = network("video")
    video, folded = in_video(encoder), in_video(batch_norm.fold_batch_norm(encoder))
    small = in_video(batch_norm.fold_batch_norm(halved("video", "cp")[0]))
    assert distance(video, folded) < 1e-4 < distance(video, small)
    before, after = known_costs(video), known_costs(small)
    saved = known_costs(encoder)["macs"] - known_costs(halved("video", "cp")[0])["macs"]
    assert before["macs"] - after["macs"] == 3 * saved  # for three frames
    assert after["params"] == small.count_params()


@pytest.mark.parametrize("name", ["multimodal", "transformer", "edsr"])
def test_factors_fitted_to_inputs_bring_the_outputs_nearer(name):
    model = network(name)
    drawn = deploy.random_inputs(model, 56)
    inputs = keras.tree.map_structure(lambda x: x[:48], drawn)
    others = keras.tree.map_structure(lambda x: x[48:], drawn)
    fitted = factorized(name, "tucker", ratio=0.5, images=inputs)[0]

    def errors(other):
        pairs = zip(outputs(model, others), outputs(other, others), strict=True)
        return [np.mean((y - z) ** 2) / np.var(y) for y, z in pairs]

    assert max(errors(fitted)) < 0.5 * max(errors(halved(name, "tucker")[0]))


@pytest.mark.parametrize("name", ["deeplab", "srgan", "video"])
def test_the_networks_cost_what_tensorflow_counts(name):
    for model in (network(name), halved(name, "cp")[0]):
        assert cost.total_costs(model)["macs"] == load("test_cost").profiled_macs(model)


# --- exported --------------------------------------------------------------------------------------------------------

REFUSED = {  # what the exporters cannot do
    ("captcha", "litert"): "because of its Bidirectional 'bidirectional.*': .*FlexTensorListReserve.* failed; replace",
    ("video", "litert"): "because of its GRU 'gru.*': .*FlexTensorListReserve.* failed; replace",
    ("captcha", "openvino"): "because of its Bidirectional '.*': No conversion rule .*TensorList.*; replace",
    ("video", "openvino"): "because of its GRU '.*': No conversion rule .*TensorList.*; replace",
}
USUAL = [("multimodal", "onnxruntime"), ("pix2pix", "litert")]
EXPORTS = [(name, engine) for name in EXAMPLES for engine in SUFFIXES]
EXPORTS = [case if case in USUAL else pytest.param(*case, marks=pytest.mark.full) for case in EXPORTS]


@pytest.mark.parametrize(("name", "engine"), EXPORTS)
def test_the_exported_network_computes_the_same_or_a_layer_is_named(name, engine, tmp_path):
    needs(engine)
    model = batch_norm.fold_batch_norm(halved(name, "cp")[0])
    model = in_video(model) if name == "video" else model
    path = tmp_path / f"{name}{SUFFIXES[engine]}"
    if (name, engine) in REFUSED and keras.config.backend() == "tensorflow":
        with pytest.raises(
            ValueError, match=f"model '{name}' cannot be exported to .*{REFUSED[name, engine]}"
        ) as caught:
            deploy.export(model, path)
        assert "\n" not in str(caught.value)
        return
    run, inputs = deploy.load(deploy.export(model, path), threads=1), deploy.random_inputs(model, 3)
    found = [np.asarray(y, "float64") for y in keras.tree.flatten(run(inputs))]
    for wanted, got in zip(outputs(model, inputs), found, strict=True):
        assert np.abs(wanted - got).max() < 1e-4 * np.ptp(wanted)


def test_a_normalization_is_exported_whether_it_is_adapted_or_inverted():
    needs("onnxruntime")
    pixels = np.random.default_rng(0).normal(3, 2, (50, 4, 4, 3)).astype("float32")
    adapted, inverted = keras.layers.Normalization(), keras.layers.Normalization(mean=2.0, variance=9.0, invert=True)
    adapted.adapt(pixels)
    model = keras.Sequential([keras.Input((4, 4, 3)), adapted, keras.layers.ReLU(), inverted])
    expected = np.maximum((pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2)), 0) * 3 + 2
    assert np.allclose(deploy.load(model, "onnxruntime", threads=1)(pixels), expected, atol=1e-4)


def test_the_search_for_a_layer_that_fails_starts_with_those_of_many_parts(monkeypatch):
    monkeypatch.setattr(deploy, "_failure", lambda build, engine: "the reason")
    assert deploy._find_culprit(network("captcha"), "openvino")[0].startswith(" because of its Bidirectional")
