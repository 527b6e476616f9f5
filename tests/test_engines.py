"""Networks exported and run outside Keras: `fcnn_utils.deploy`. An engine that is not installed is skipped."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import convert, deploy
from fcnn_utils.course import environment, networks, records

CHECKPOINT = records.ROOT / "results" / "cifar100" / "simple" / "fast" / "seed0.keras"
ELSEWHERE = deploy.ENGINES[1:]


def needs(engine):
    """Skips the test where the engine is not installed, or where Keras exports to it from TensorFlow alone."""
    if engine not in deploy.available():
        pytest.skip(f"{engine} is not installed (requirements-export.txt)")
    if keras.config.backend() != "tensorflow":
        pytest.skip("exports are tested on TensorFlow")


def small(dtype="float32"):
    keras.utils.set_random_seed(0)
    return networks.build("wider_separable", (8, 8, 3), 5, width=0.05, dtype=dtype)


def pictures(count=3, size=8):
    return np.random.default_rng(0).standard_normal((count, size, size, 3)).astype("float32")


# --- basic -------------------------------------------------------------------------------------------------------


def test_keras_is_always_there():
    assert deploy.available()[0] == "keras" and set(deploy.available()) <= set(deploy.ENGINES)
    model = small()
    assert np.array_equal(deploy.load(model)(pictures()), model.predict_on_batch(pictures()))


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="engine must be one of keras, onnxruntime, openvino, litert; got 'tensorrt'"):
        deploy.load(small(), "tensorrt")
    with pytest.raises(ValueError, match="precision must be one of float32; got 'bfloat16'"):
        deploy.load(small(), "keras", precision="bfloat16")
    with pytest.raises(ValueError, match="threads must be a whole number between 1 and"):
        deploy.load(small(), threads=0)
    with pytest.raises(ValueError, match=r"ending of the exported file must be one of .onnx, .xml, .tflite; got '.h5'"):
        deploy.export(small(), tmp_path / "model.h5")
    with pytest.raises(ValueError, match="model must be a built keras.Model; got int"):
        deploy.load(3)
    with pytest.raises(ValueError, match="there is no file .*nothing.keras to load"):
        deploy.load(tmp_path / "nothing.keras")
    inputs = keras.Input((4, 4, 3))
    pair = keras.Model(inputs, [inputs, layers.Flatten()(inputs)], name="pair")
    with pytest.raises(ValueError, match="model 'pair' must have one input and one output; it has 1 and 2"):
        deploy.load(pair)


@pytest.mark.parametrize("engine", ELSEWHERE)
def test_an_engine_that_is_not_installed_says_what_to_install(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(deploy.importlib.util, "find_spec", lambda package: None)
    assert deploy.available() == ("keras",)
    with pytest.raises(ValueError, match=f"{deploy.TITLES[engine]} needs .*: pip install -r requirements-export.txt"):
        deploy.load(small(), engine)
    ending = {"onnxruntime": "onnx", "openvino": "xml", "litert": "tflite"}[engine]
    with pytest.raises(ValueError, match="pip install -r requirements-export.txt"):
        deploy.export(small(), tmp_path / f"model.{ending}")
    assert not list(tmp_path.iterdir())


# --- correct -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ELSEWHERE)
@pytest.mark.parametrize("kind", ["float32", "mixed_bfloat16"])
def test_outputs_are_those_of_keras_in_float32(engine, kind):
    needs(engine)
    run, reference = deploy.load(small(kind), engine, threads=1), small()
    for count in (1, 3, 2):  # batches of any size
        x = pictures(count)
        assert np.allclose(run(x), keras.ops.convert_to_numpy(reference(x)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ELSEWHERE)
def test_a_trained_network_factorized_folded_and_exported(engine, tmp_path):
    """The way that a user goes: the committed baseline, CP, batch norms folded, a file, an engine."""
    needs(engine)
    dense = keras.saving.load_model(CHECKPOINT, compile=False)
    compressed, _ = convert.factorize(dense, "cp", ratio=0.15)
    folded = convert.fold_batch_norm(compressed, dtype="float32")
    path = deploy.export(folded, tmp_path / f"model{deploy._ENDINGS[engine]}")
    x = pictures(4, 32)
    expected = folded.predict_on_batch(x)
    assert np.allclose(deploy.load(path, engine)(x), expected, atol=1e-5) and expected.std() > 1e-3
    assert not [file for file in tmp_path.iterdir() if file.stem != "model"]


def test_openvino_computes_in_bfloat16_where_it_is_told(tmp_path):
    needs("openvino")
    x = pictures(4)
    single, half = (deploy.load(small(), "openvino", precision=kind)(x) for kind in ("float32", "bfloat16"))
    assert np.allclose(single, half, atol=0.02)
    if environment.has_bfloat16():
        assert np.abs(single - half).max() > 1e-5


def test_a_file_may_have_any_name(tmp_path):
    needs("litert")
    assert deploy.export(small(), tmp_path / "model[1].tflite").stat().st_size > 1000


def test_a_saved_model_in_keras(tmp_path):
    model = small()
    model.save(tmp_path / "model.keras")
    assert np.allclose(deploy.load(tmp_path / "model.keras")(pictures()), model.predict_on_batch(pictures()))
