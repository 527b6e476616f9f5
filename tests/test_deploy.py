"""Models exported and run outside Keras: `fcnn_utils.deploy`. An engine that cannot be reached here is skipped."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import deploy, keras_graph

OTHERS = deploy.ENGINES[1:]
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "litert": ".tflite"}


def needs(engine):
    if engine not in deploy.available():
        pytest.skip(f"{engine} is not installed, or Keras cannot export to it from {keras.config.backend()}")


def small(dtype="float32", size=8):
    """A network with the usual layers, always with the same weights."""
    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, dtype=dtype)(inputs)
    x = layers.ReLU(dtype=dtype)(layers.BatchNormalization(dtype=dtype)(x))
    x = layers.Add(dtype=dtype)([x, layers.DepthwiseConv2D(3, padding="same", dtype=dtype)(x)])
    x = layers.GlobalAveragePooling2D(dtype="float32")(layers.SeparableConv2D(6, 3, dtype=dtype)(x))
    model = keras.Model(inputs, layers.Dense(5, activation="softmax", dtype="float32")(x), name="small")
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(-0.5, 1, weight.shape) ** 2 for weight in model.get_weights()])
    return model


def images(count=3):
    return np.random.default_rng(0).standard_normal((count, 8, 8, 3)).astype("float32")


def test_keras_is_always_available(tmp_path):
    assert deploy.available()[0] == "keras" and set(deploy.available()) <= set(deploy.ENGINES)
    model = small()
    assert np.array_equal(deploy.load(model)(images()), model.predict_on_batch(images()))
    model.save(tmp_path / "model.keras")
    assert np.allclose(deploy.load(tmp_path / "model.keras")(images()), model.predict_on_batch(images()))


def test_bad_arguments_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="engine must be one of keras, onnxruntime, openvino, litert; got 'tensorrt'"):
        deploy.load(small(), "tensorrt")
    with pytest.raises(ValueError, match="precision must be one of float32; got 'bfloat16'"):
        deploy.load(small(), "keras", precision="bfloat16")
    with pytest.raises(ValueError, match="threads must be a whole number between 1 and"):
        deploy.load(small(), threads=0)
    with pytest.raises(ValueError, match=r"suffix .* must be one of .onnx, .xml, .tflite; got '.h5'"):
        deploy.export(small(), tmp_path / "model.h5")
    with pytest.raises(ValueError, match="model must be a built keras.Model; got int"):
        deploy.load(3)
    with pytest.raises(ValueError, match="there is no file .*nothing.keras"):
        deploy.load(tmp_path / "nothing.keras")
    inputs = keras.Input((4, 4, 3))
    pair = keras.Model(inputs, [inputs, layers.Flatten()(inputs)], name="pair")
    with pytest.raises(ValueError, match="'pair' must have one input and one output; it has 1 and 2"):
        deploy.load(pair)


@pytest.mark.parametrize("engine", OTHERS)
def test_an_engine_that_is_not_installed_says_what_to_install(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(deploy.importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(keras.config, "backend", lambda: "tensorflow")
    assert deploy.available() == ("keras",)
    with pytest.raises(ValueError, match=f"{deploy.TITLES[engine]} needs .*: pip install "):
        deploy.load(small(), engine)
    with pytest.raises(ValueError, match="pip install"):
        deploy.export(small(), tmp_path / f"model{SUFFIXES[engine]}")
    (tmp_path / "there").write_bytes(b"")
    with pytest.raises(ValueError, match="pip install (?!.*tf2onnx)"):  # a file needs no exporter
        deploy.load(tmp_path / "there", engine)


def test_an_export_that_keras_cannot_do_names_the_backends_that_can(monkeypatch, tmp_path):
    model = small()
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(
        ValueError, match="cannot export to LiteRT from the jax backend: set KERAS_BACKEND to tensorflow"
    ):
        deploy.export(model, tmp_path / "model.tflite")
    with pytest.raises(ValueError, match="OpenVINO from the jax backend: set KERAS_BACKEND to tensorflow or torch"):
        deploy.load(model, "openvino")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", OTHERS)
def test_engines_compute_what_keras_computes(engine):
    needs(engine)
    run = deploy.load(small(), engine, threads=1)
    for count in (1, 3, 2):  # batches of any size
        expected = keras.ops.convert_to_numpy(small()(images(count)))
        assert np.allclose(run(images(count)), expected, rtol=1e-4, atol=1e-6) and expected.std() > 1e-3


@pytest.mark.parametrize("engine", OTHERS)
def test_a_folded_network_in_mixed_precision_is_exported_in_float32_to_a_file_of_any_name(engine, tmp_path):
    needs(engine)
    folded = keras_graph.fold_batch_norm(small("mixed_bfloat16"))
    path = deploy.export(folded, tmp_path / f"model[1]{SUFFIXES[engine]}")
    expected = keras.ops.convert_to_numpy(small()(images()))
    assert np.allclose(deploy.load(str(path), engine)(images()), expected, rtol=1e-4, atol=1e-6)
    assert {file.stem for file in tmp_path.iterdir()} == {"model[1]"}


def test_openvino_computes_in_bfloat16_if_the_processor_can(tmp_path):
    needs("openvino")
    import openvino

    path = deploy.export(small(), tmp_path / "model.xml")
    single, half = (deploy.load(path, "openvino", precision=kind)(images()) for kind in ("float32", "bfloat16"))
    assert np.allclose(single, half, atol=0.02)
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert np.abs(single - half).max() > 1e-6
