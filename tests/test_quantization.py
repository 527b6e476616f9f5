"""Networks in int8: `fcnn_utils.quantization`. An engine that cannot be reached here is skipped."""

import importlib.util

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import _equalize, benchmark, blocks, deploy, keras_graph, quantization

SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "litert": ".tflite"}
ENGINES = list(SUFFIXES)
# LiteRT and OpenVINO take seconds for an export: the usual tests have one network for each.
ONNX_AT_LEAST = ["onnxruntime", *(pytest.param(engine, marks=pytest.mark.full) for engine in ENGINES[1:])]


def needs(engine):
    if engine == "openvino" and importlib.util.find_spec("nncf") is None:
        pytest.skip("NNCF is not installed")
    if engine not in deploy.available():
        pytest.skip(f"{engine} is not installed, or Keras cannot export to it from {keras.config.backend()}")


def images(count=48, size=8):
    return np.random.default_rng(0).standard_normal((count, size, size, 3)).astype("float32")


def factorized(dtype="float32"):
    """A network of a dense and a CP convolution with batch norms, whose statistics are not the initial ones."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, dtype=dtype)(inputs)
    x = layers.ReLU(dtype=dtype)(layers.BatchNormalization(dtype=dtype)(x))
    x = blocks.factorized_conv(x, "cp", 12, 3, 6, strides=2, activation="relu", name="cp", dtype=dtype)
    x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    model = keras.Model(inputs, layers.Dense(5, activation="softmax", dtype="float32")(x), name="factorized")
    model.layers[2].set_weights([np.linspace(a, b, 8) for a, b in ((0.5, 2), (-1, 1), (-0.3, 0.3), (0.5, 4))])
    model.layers[-1].kernel.assign(6 * model.layers[-1].kernel)
    return model


def unevenly_scaled(model):
    """Scale the ranks of the CP layer by factors from 1 to 1,000 between its layers, which changes no output."""
    layer = {each.name: each for each in model.layers}
    scale = np.logspace(0, 3, 6)
    for name, other, factor in (
        ("cp_in", "cp_depthwise", scale[::-1]),
        ("cp_depthwise", "cp_out", scale),
    ):
        _equalize._scale_output(layer[name], factor)
        _equalize._scale_input(layer[other], 1 / factor)
    return model


@pytest.mark.parametrize("engine", ENGINES)
def test_the_outputs_of_an_int8_file_change_as_reported(engine, tmp_path):
    needs(engine)
    model, path = factorized("mixed_bfloat16"), tmp_path / "new folder" / f"int8{SUFFIXES[engine]}"
    before = [weight.copy() for weight in model.get_weights()]
    result = quantization.quantize(model, images(), path)
    assert result.path == path and all(map(np.array_equal, before, model.get_weights()))
    assert result.size == sum(file.stat().st_size for file in path.parent.iterdir())
    expected = keras.ops.convert_to_numpy(keras_graph.in_float32(model)(images(), training=False))
    found = deploy.load(path, threads=1)(images())
    change = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert result.change == pytest.approx(change, rel=1e-2) and 1e-4 < change < 0.1
    assert result.agreement == np.mean(found.argmax(1) == expected.argmax(1)) > 0.9
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-2)
    for count in (1, 5):  # batches of any size
        np.testing.assert_allclose(deploy.load(path)(images()[:count]), found[:count], atol=2e-2)
    assert repr(result).startswith(f"<Quantized int8{SUFFIXES[engine]}: ") and "keep their class>" in repr(result)


def test_weights_have_a_scale_for_each_channel_and_are_8_bit(tmp_path):
    needs("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model = factorized()
    quantization.quantize(model, images(), tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    values = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    read = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    kernels = {}
    for node in graph.node:
        if node.op_type == "Conv":
            dequantize = read[node.input[1]]
            kernels[values[dequantize.input[0]].shape] = [values[name] for name in dequantize.input]
    assert set(kernels) == {(8, 3, 3, 3), (6, 8, 1, 1), (6, 1, 3, 3), (12, 6, 1, 1)}
    for (filters, *_), (kernel, scale, zero) in kernels.items():
        assert kernel.dtype == np.int8 and scale.shape == (filters,) and not zero.any()
        assert (np.abs(kernel.astype(int)).reshape(filters, -1).max(axis=1) == 127).all()
    (softmax,) = (node for node in graph.node if node.op_type == "Softmax")
    assert softmax.output[0] == graph.output[0].name  # probabilities are not rounded to multiples of 1/256


def test_a_big_network_shrinks_to_a_quarter(tmp_path):
    needs("onnxruntime")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4, 4, 3)), layers.Conv2D(256, 3), layers.Conv2D(256, 2)])
    result = quantization.quantize(model, images(size=4), tmp_path / "int8.onnx")
    assert 3.5 < result.float_size / result.size < 4 and result.agreement is None
    assert "class" not in repr(result)


# --- equalization -------------------------------------------------------------------------------------------------


def test_a_factorized_layer_of_uneven_ranks_is_quantized_as_well_as_an_even_one(tmp_path, monkeypatch):
    """Its channels differ by a factor of 1,000: without the equalization most of them are rounded to zero."""
    needs("onnxruntime")
    even = quantization.quantize(factorized(), images(), tmp_path / "even.onnx")
    uneven = quantization.quantize(unevenly_scaled(factorized()), images(), tmp_path / "uneven.onnx")
    assert uneven.change == pytest.approx(even.change, rel=0.3)
    monkeypatch.setattr(_equalize, "equalize", lambda *_: [])
    monkeypatch.setattr(quantization, "_LARGE_CHANGE", 10 * uneven.change)
    with pytest.warns(UserWarning, match="int8 changes the outputs of model 'factorized' by .*more images"):
        plain = quantization.quantize(unevenly_scaled(factorized()), images(), tmp_path / "plain.onnx")
    assert plain.change > 10 * uneven.change


def test_equalized_layers_compute_the_same_with_even_ranges():
    """All kinds of layers and what may lie between them; the pairs are those without an activation between."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 1, name="first")(inputs)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(layers.ZeroPadding2D()(x))
    x = layers.Conv2D(8, 1, groups=2, name="grouped")(x)
    x = layers.Conv2D(8, 3, groups=8, name="each")(x)
    x = layers.Conv2DTranspose(5, 2, name="transposed")(x)
    x = layers.Conv2DTranspose(4, 1, name="other", activation="relu")(x)
    x = layers.Dense(5, name="dense")(x)
    y = layers.Dense(3, name="head")(x)
    model = keras.Model(inputs, [y, layers.Dense(2, name="side")(x)])
    for layer in model.layers:
        layer.set_weights([3.0 ** np.random.default_rng(0).normal(size=w.shape) for w in layer.get_weights()])
    x = images()
    before = model.predict_on_batch(x)
    pairs = _equalize.equalize(model, [x])
    expected = ["first", "depthwise", "grouped", "each", "transposed", "other"]
    assert pairs == list(zip(expected, expected[1:], strict=False))
    for one, other in zip(before, model.predict_on_batch(x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3)
    for path in ("depthwise", "each"):
        read = np.abs(keras_graph.input_model(model, path).predict_on_batch(x))
        reached = read.max(axis=(0, 1, 2))
        np.testing.assert_allclose(reached, reached[0], rtol=1e-3)
    reached = np.abs(keras_graph.input_model(model, "other").predict_on_batch(x)).max(axis=(0, 1, 2))
    weights = np.abs(model.get_layer("other").get_weights()[0]).max(axis=(0, 1, 2))
    np.testing.assert_allclose(reached / weights, reached[0] / weights[0], rtol=1e-3)


def test_a_channel_that_is_always_zero_stays_finite():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 1), layers.DepthwiseConv2D(3)])
    kernel, bias = model.layers[0].get_weights()
    kernel[..., 1] = 0
    model.layers[0].set_weights([kernel, bias])
    expected = model.predict_on_batch(images())
    assert _equalize.equalize(model, [images()])
    np.testing.assert_allclose(model.predict_on_batch(images()), expected, atol=1e-6)


# --- inputs and outputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ONNX_AT_LEAST)
def test_several_inputs_and_outputs_and_pixels_in_bytes(engine, tmp_path):
    needs(engine)
    keras.utils.set_random_seed(0)
    pixels, extra = keras.Input((8, 8, 3), name="pixels", dtype="uint8"), keras.Input((4,), name="a b")
    x = layers.Conv2D(4, 3, activation="relu")(layers.Rescaling(1 / 255)(pixels))
    x = layers.GlobalAveragePooling2D()(x)
    y = layers.Dense(3)(extra)
    model = keras.Model([pixels, extra], {"sum": layers.Dense(6)(keras.ops.concatenate([x, y], axis=-1)), "alone": y})
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 256, (40, 8, 8, 3)).astype("uint8"), rng.standard_normal((40, 4)).astype("float32")]
    path = tmp_path / f"int8{SUFFIXES[engine]}"
    result = quantization.quantize(model, dict(zip(["pixels", "a b"], values, strict=True)), path)
    run, expected = deploy.load(path, threads=1), model.predict_on_batch(values)
    found = run(values)
    assert set(found) == {"sum", "alone"} and result.change < 0.1
    for name, value in expected.items():
        assert np.sqrt(np.mean((found[name] - value) ** 2)) < 0.1 * value.std()
    assert run.input_shapes == [(8, 8, 3), (4,)]
    drawn = run.random_inputs(3)
    assert [x.shape for x in drawn] == [(3, 8, 8, 3), (3, 4)] and drawn[0].dtype == "uint8" and drawn[0].max() > 99


def test_networks_and_files_of_one_engine_are_timed_together(tmp_path):
    needs("onnxruntime")
    path = tmp_path / "int8.onnx"
    model = factorized()
    quantization.quantize(model, images(), path)
    models = {"dense": model, "int8": path, "text": str(path)}
    table = benchmark.latency(models, 2, "onnxruntime", rounds=2, threads=1)
    assert table["model"].tolist() == list(models) and (table["median_ms"] > 0).all()
    assert benchmark.latency(path, rounds=2, threads=1)[["model", "engine"]].values.tolist() == [
        ["int8", "onnxruntime"]
    ]
    for engine in ("keras", "litert"):
        with pytest.raises(ValueError, match=f"all models must run in one engine; got {engine} and onnxruntime"):
            benchmark.latency(models, engine=engine)
    models["other"] = keras.Model(*[keras.Input((4, 4, 3))] * 2)
    with pytest.raises(ValueError, match=r"one fixed size; got \(4, 4, 3\), \(8, 8, 3\)"):
        benchmark.latency(models)


@pytest.mark.full
def test_files_are_timed_in_a_process_of_their_own(tmp_path, monkeypatch):
    needs("onnxruntime")
    model = factorized()
    model.save(tmp_path / "model.keras")
    deploy.export(model, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    models = {"keras": "model.keras", "own": model, "file": "model.onnx"}
    table = benchmark.latency(models, rounds=2, environment={"OMP_NUM_THREADS": "1"})
    assert table["engine"].tolist() == ["onnxruntime"] * 3 and table["model"].tolist() == list(models)


# --- errors -------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_rejected_in_one_sentence(tmp_path, monkeypatch):
    needs("onnxruntime")
    path = tmp_path / "int8.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"suffix .* must be one of .onnx, .xml, .tflite; got '.h5'"):
        quantization.quantize(factorized(), images(), tmp_path / "model.h5")
    with pytest.raises(ValueError, match=r"must have the shape \(N, 8, 8, 3\)"):
        quantization.quantize(factorized(), images(size=9), path)
    with pytest.raises(ValueError, match="calibration images are whole numbers"):
        quantization.quantize(factorized(), np.full((4, 8, 8, 3), 9, "uint8"), path)
    with pytest.raises(ValueError, match="model must be a built keras.Model; got int"):
        quantization.quantize(3, images(), path)
    monkeypatch.setattr(quantization, "_quantize_onnx", lambda *_: {}["Conv"])
    with pytest.raises(ValueError, match="model 'factorized' cannot be quantized for ONNX Runtime .'Conv'.: choose"):
        quantization.quantize(factorized(), images(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_openvino_without_nncf_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "engine_of", lambda path: "openvino")
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="int8 for OpenVINO needs nncf: pip install nncf"):
        quantization.quantize(factorized(), images(), tmp_path / "int8.xml")
