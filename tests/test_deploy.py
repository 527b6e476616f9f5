"""Models exported and run outside Keras: `fcnn_utils.deploy`. An engine that cannot be reached here is skipped."""

import errno
import os
import sys

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import batch_norm, deploy

OTHERS = deploy.ENGINES[1:]
# OpenVINO and LiteRT take seconds for an export: where the engine hardly matters, the usual tests have one of them.
ONNX_AT_LEAST = ["onnxruntime", *(pytest.param(engine, marks=pytest.mark.full) for engine in OTHERS[1:])]


def in_part(kinds):
    """Return all pairs (engine, kind); the usual tests have all kinds for ONNX Runtime and one for the others."""
    usual = [(OTHERS[0], kind) for kind in kinds] + list(zip(OTHERS[1:], kinds, strict=True))
    pairs = [(engine, kind) for engine in OTHERS for kind in kinds]
    return [pair if pair in usual else pytest.param(*pair, marks=pytest.mark.full) for pair in pairs]


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


def needs_the_gaps_of(engine):
    """Skip a test of layers that Keras can't export to `engine` from TensorFlow; from other backends it often can."""
    needs(engine)
    if keras.config.backend() != "tensorflow":
        pytest.skip("other backends export other layers")


def stack(*stacked, shape=(8, 8, 3), dtype="float32", name="stack"):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(shape, dtype=dtype), *stacked], name=name)


def assert_same(found, expected):
    """Compare arrays in lists, tuples and dicts, which must be the same ones."""
    keras.tree.assert_same_structure(found, expected)
    for one, other in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("engine", ONNX_AT_LEAST)
def test_a_folded_network_in_mixed_precision_is_exported_in_float32_to_a_file_of_any_name(engine, tmp_path):
    needs(engine)
    folded = batch_norm.fold_batch_norm(small("mixed_bfloat16"))
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


@pytest.mark.parametrize("engine", ONNX_AT_LEAST)
def test_a_network_for_images_of_any_size_is_exported_for_any_size(engine):
    needs(engine)
    model = stack(layers.Conv2D(4, 3, padding="same", activation="relu"), layers.UpSampling2D(), shape=(None, None, 3))
    run, rng = deploy.load(model, engine, threads=1), np.random.default_rng(0)
    for shape in ((2, 8, 12, 3), (1, 5, 7, 3)):
        x = rng.standard_normal(shape).astype("float32")
        assert run(x).shape == (shape[0], 2 * shape[1], 2 * shape[2], 4)
        assert_same(run(x), model.predict_on_batch(x))


# --- several inputs and outputs, and inputs of integers -----------------------------------------------------------


def branched(kind):
    """A network of three inputs and outputs, whose names have letters that engines do not take."""
    keras.utils.set_random_seed(0)
    z, a = keras.Input((4, 4, 3), name="z 1"), keras.Input((4, 4, 3), name="a.b")
    codes = keras.Input((4,), name="codes:0", dtype="int32")
    x = layers.Conv2D(4, 1)(z) + 2 * layers.Conv2D(4, 1)(a)
    first, second = layers.Dense(3)(x), layers.Dense(3)(a)
    third = keras.ops.expand_dims(layers.Embedding(7, 4)(codes), -1) * x
    if kind == "list":
        return keras.Model([z, a, codes], [second, {"y": first, "x": (third,)}])
    return keras.Model({"late": z, "early": a, "codes": codes}, {"q": second, "b": first, "c": third})


@pytest.mark.parametrize("engine, kind", in_part(["list", "dict"]))
@pytest.mark.filterwarnings("ignore:When providing .inputs. as a dict")
def test_several_inputs_and_outputs_are_those_of_keras(engine, kind, tmp_path):
    needs(engine)
    if (engine, keras.config.backend()) == ("openvino", "torch"):
        pytest.skip("an Embedding exported from torch only takes batches of one")
    model, rng = branched(kind), np.random.default_rng(0)
    z, a = rng.standard_normal((2, 3, 4, 4, 3)).astype("float32")
    codes = rng.integers(0, 7, (3, 4))
    # Keras takes also a list in the order of `Model.inputs`, or a dict of the inputs' names.
    inputs, other = [z, a, codes], {"codes:0": codes, "a.b": a, "z 1": z}
    if kind == "dict":
        inputs, other = {"late": z, "early": a, "codes": codes}, [other[x.name] for x in model.inputs]
    expected = model.predict_on_batch(inputs)
    run = deploy.load(deploy.export(model, tmp_path / f"model{SUFFIXES[engine]}"), threads=1)
    assert_same(run(inputs), expected)
    assert_same(run(other), expected)
    assert_same(
        run(keras.tree.map_structure(lambda x: x[:1], inputs)), keras.tree.map_structure(lambda x: x[:1], expected)
    )
    with pytest.raises(ValueError, match="the model reads 3 inputs: .*; got 2"):
        run([z, a])
    with pytest.raises(ValueError, match="the model reads 3 inputs: .*; got a dict of x, y, z"):
        run({"x": z, "y": a, "z": codes})


@pytest.mark.parametrize("engine", OTHERS)
def test_a_file_of_another_program_takes_its_inputs_in_its_own_order(engine, monkeypatch, tmp_path):
    needs(engine)
    monkeypatch.setattr(deploy._engines, "complete", lambda *_: None)  # the file carries no labels
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    model = keras.Model([a, b], [a - b, layers.Dense(2)(a)])
    run = deploy.load(deploy.export(model, tmp_path / f"model{SUFFIXES[engine]}"), threads=1)
    x, y = np.random.default_rng(0).standard_normal((2, 2, 3)).astype("float32")
    if keras.config.backend() != "torch":  # Keras gives its files other names
        assert_same(run({"a": x, "b": y}), model.predict_on_batch([x, y]))
    assert_same(run([x, y]), model.predict_on_batch([x, y]))


@pytest.mark.parametrize("engine, dtype", in_part(["uint8", "int32"]))
def test_inputs_are_cast_to_the_dtype_that_the_model_reads(engine, dtype):
    needs(engine)
    model = stack(layers.Rescaling(1 / 255), layers.Conv2D(4, 3), dtype=dtype)
    run, pixels = deploy.load(model, engine, threads=1), np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3))
    for kind in (dtype, "int64", "float32"):
        assert_same(run(pixels.astype(kind)), model.predict_on_batch(pixels.astype(dtype)))


def test_random_inputs_have_the_models_shapes_and_dtypes():
    pixels = deploy.random_inputs(stack(layers.Rescaling(1 / 255), shape=(None, 8, 3), dtype="uint8"), 4)
    assert pixels.shape == (4, 64, 8, 3) and pixels.dtype == "uint8" and pixels.max() > 200
    values = deploy.random_inputs(stack(layers.Flatten()))
    assert values.shape == (2, 8, 8, 3) and values.dtype == "float32" and 0.8 < values.std() < 1.2
    assert deploy.random_inputs(stack(layers.Flatten(), dtype="bool")).dtype == "bool"
    codes = deploy.random_inputs(stack(layers.Embedding(5, 2), shape=(50,)))  # Keras reads codes as floats, too
    assert set(np.unique(codes)) == {0, 1, 2, 3, 4}
    mixed = deploy.random_inputs(branched("list"))
    assert [x.dtype.name for x in mixed] == ["float32", "float32", "int32"] and mixed[2].max() < 7


# --- what a file computes -----------------------------------------------------------------------------------------


class Mirror(layers.RandomFlip):
    """A user's augmentation."""


@pytest.mark.parametrize("engine", ONNX_AT_LEAST)
def test_what_acts_in_training_only_does_nothing_in_a_file(engine, tmp_path):
    needs(engine)
    inputs = keras.Input((8, 8, 3), dtype="uint8")
    augment = keras.Sequential([layers.RandomFlip(), layers.RandomContrast(0.5), layers.RandomCrop(8, 8)])
    x = layers.RandomRotation(0.5)(Mirror()(augment(inputs)))
    x = layers.Dropout(0.5)(layers.GaussianNoise(1.0)(layers.Rescaling(1 / 255)(x)), training=True)
    x = layers.ActivityRegularization(0.1)(layers.BatchNormalization()(layers.Conv2D(4, 3)(x), training=True))
    model, pixels = keras.Model(inputs, x), np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype("uint8")
    path = deploy.export(model, tmp_path / f"model{SUFFIXES[engine]}")
    assert_same(deploy.load(path, threads=1)(pixels), model.predict_on_batch(pixels))


@pytest.mark.parametrize("engine", ONNX_AT_LEAST)
def test_gelu_is_exported(engine, tmp_path):
    """`gelu` of very negative and very positive numbers, too; tf2onnx has no rule for TensorFlow's `Erfc`."""
    model = stack(layers.Conv2D(3, 1, activation="gelu"), layers.Activation("gelu"))
    path = deploy.export(model, tmp_path / f"model{SUFFIXES[engine]}")
    x = np.random.default_rng(0).normal(0, 30, (2, 8, 8, 3)).astype("float32")
    assert_same(deploy.load(path, threads=1)(x), model.predict_on_batch(x))


@pytest.mark.parametrize(
    "engine, bad, message",
    [
        ("onnxruntime", {"activation": "celu"}, "because of its Conv2D 'bad': No Op registered for Expm1"),
        (
            "litert",
            {"interpolation": "bicubic"},
            r"because of its Resizing 'bad': Node number \d+ \(FlexResizeBicubic\)",
        ),
        pytest.param(
            "openvino",
            {"activation": "log_softmax"},
            "because of its Conv2D 'bad': its output differs from that of Keras by",
            marks=pytest.mark.full,  # the search for the layer takes 10 seconds
        ),
    ],
    ids=["celu", "bicubic", "log_softmax"],
)
def test_export_refuses_a_model_it_cannot_reproduce(engine, bad, message, tmp_path):
    needs_the_gaps_of(engine)
    bad = layers.Conv2D(4, 3, **bad, name="bad") if "activation" in bad else layers.Resizing(9, 9, **bad, name="bad")
    model, path = stack(layers.Conv2D(3, 1), bad, name="net"), tmp_path / f"model{SUFFIXES[engine]}"
    path.write_bytes(b"old")
    with pytest.raises(
        ValueError, match=f"model 'net' cannot be exported to {deploy.TITLES[engine]} {message}"
    ) as caught:
        deploy.export(model, path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_without_its_constants_is_refused(tmp_path):
    """tf2onnx sometimes makes inputs of the constants of a Normalization."""
    onnx = pytest.importorskip("onnx")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in ("x", "mean", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Sub", ["x", "mean"], ["y"])], "net", values[:2], values[2:])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="an input of the constant mean"):
        deploy._engines.complete("onnxruntime", tmp_path / "model.onnx", deploy._engines.Labels(["x"], ["x"], 0))


def test_the_layer_that_cannot_be_exported_is_found_in_a_nested_model_and_within_a_time(monkeypatch, tmp_path):
    needs_the_gaps_of("onnxruntime")
    inner = stack(layers.Dense(3), layers.Dense(3, activation="celu", name="bad"), name="inner")
    model = stack(layers.Conv2D(3, 1), inner, name="net")
    with pytest.raises(ValueError, match="because of its Dense 'inner/bad': No Op registered for Expm1; replace"):
        deploy.export(model, tmp_path / "model.onnx")
    monkeypatch.setattr(deploy, "_SEARCH_SECONDS", 0)
    with pytest.raises(ValueError, match="exported to ONNX Runtime: No Op registered for Expm1; replace"):
        deploy.export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_outputs_are_compared_by_their_range():
    expected = np.array([[1000.0, 1001.0], [1000.5, np.nan]], "float32")
    deploy._compare(expected, expected + np.float32(5e-3))
    deploy._compare(np.array([[1, 2]]), np.array([[1, 2]]))
    deploy._compare(np.zeros((2, 0)), np.zeros((2, 0)))
    for found in (expected + np.float32(0.1), np.nan_to_num(expected), np.full((2, 2), np.nan), expected[:, :1]):
        with pytest.raises(deploy._ExportError, match="its output (differs|has the shape)"):
            deploy._compare(expected, found)
    with pytest.raises(deploy._ExportError, match="50% of its output differs"):
        deploy._compare(np.array([[1, 2]]), np.array([[1, 3]]))


def test_a_model_that_cannot_be_run_or_copied_is_refused_in_one_sentence(tmp_path):
    needs("onnxruntime")
    table = np.zeros((3, 2), "float32")
    codes = keras.Input((4,), dtype="int32")
    model = keras.Model(codes, keras.ops.take(table, codes, axis=0), name="net")
    if keras.config.backend() == "tensorflow":  # the other backends clip the index
        with pytest.raises(ValueError, match="model 'net' cannot be run on random inputs"):
            deploy.export(model, tmp_path / "model.onnx")
    mixed = stack(layers.Conv2D(2, 3, dtype="mixed_bfloat16"), layers.Lambda(lambda x: 2 * x, name="twice"))
    with pytest.raises(ValueError, match="layer 'twice' cannot be copied: .*Lambda"):
        deploy.export(mixed, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    plain = stack(layers.Conv2D(2, 3), layers.Lambda(lambda x: 2 * x))
    assert_same(deploy.load(plain, "onnxruntime", threads=1)(images()), plain.predict_on_batch(images()))


class Own(keras.Model):
    """A subclassed model, whose `call` can be traced or not."""

    def __init__(self, symbolic):
        super().__init__(name="own")
        self.convolution, self.symbolic = layers.Conv2D(2, 3), symbolic

    def call(self, x):
        return self.convolution(x if self.symbolic else np.asarray(x))


def test_a_subclassed_model_is_traced_or_refused_in_one_sentence(tmp_path):
    needs("onnxruntime")
    model = Own(True)
    expected = keras.ops.convert_to_numpy(model(images()))
    with pytest.warns(UserWarning, match="model 'own' is subclassed"):
        path = deploy.export(model, tmp_path / "model.onnx")
    assert_same(deploy.load(path, threads=1)(images()), expected)
    model = Own(False)
    model(images())
    with pytest.raises(ValueError, match="model 'own' is subclassed and can't be traced"):
        deploy.export(model, tmp_path / "model.onnx")


# --- files that cannot be written or read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("basic_ios::clear: iostream error"),  # OpenVINO
        RuntimeError("/tmp/variables/part-0; No space left on device [Op:SaveV2]"),  # TensorFlow, on the way to LiteRT
    ],
    ids=["python", "openvino", "tensorflow"],
)
def test_a_full_temporary_folder_is_named(error, monkeypatch, tmp_path):
    needs("onnxruntime")

    def export(*_, **__):
        raise error

    monkeypatch.setattr(keras.Model, "export", export)
    for act in (lambda: deploy.export(small(), tmp_path / "model.onnx"), lambda: deploy.load(small(), "onnxruntime")):
        with pytest.raises(ValueError, match="cannot write .*: the disk is full; free some space .*, or set TMPDIR"):
            act()
    assert not list(tmp_path.iterdir())


def test_of_two_files_both_are_replaced_or_none(monkeypatch, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, content in ((source, "new"), (target, "old")):
        folder.mkdir()
        for suffix in (".bin", ".xml"):
            (folder / f"model{suffix}").write_text(content)
    calls = []

    def fsync(number):
        calls.append(number)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ValueError, match=r"cannot write .*target/model.xml: the disk is full"):
        deploy.replace(source, target / "model.xml")
    assert {file.name: file.read_text() for file in target.iterdir()} == {"model.bin": "old", "model.xml": "old"}
    deploy.replace(source, target / "model.xml")
    assert {file.name: file.read_text() for file in target.iterdir()} == {"model.bin": "new", "model.xml": "new"}


@pytest.mark.parametrize("engine", deploy.ENGINES)
def test_a_damaged_file_is_named(engine, tmp_path):
    needs(engine)
    path = tmp_path / f"model{SUFFIXES.get(engine, '.keras')}"
    if engine == "keras":
        small().save(path)
    else:
        deploy.export(small(), path)
    for file in sorted(tmp_path.iterdir()):
        content = file.read_bytes()
        for part in (0, len(content) // 2):
            file.write_bytes(content[:part])
            with pytest.raises(
                ValueError, match=f"{path.name} cannot be loaded in {deploy.TITLES[engine]} .*damaged"
            ) as caught:
                deploy.load(path)
            assert "\n" not in str(caught.value)
        file.write_bytes(content)
    deploy.load(path)


def test_a_file_whose_classes_are_unknown_is_named(tmp_path):
    stack(Mirror()).save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="model.keras cannot be loaded in Keras .*Mirror.*import the classes"):
        deploy.load(tmp_path / "model.keras")


@pytest.mark.parametrize("engine", OTHERS)
def test_an_engine_that_cannot_be_imported_is_named(engine, monkeypatch, tmp_path):
    needs(engine)
    (tmp_path / "model").write_bytes(b"")
    monkeypatch.setattr(deploy.importlib.util, "find_spec", lambda package: package)
    package = {"litert": "ai_edge_litert.interpreter"}.get(engine, engine)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=f"{deploy.TITLES[engine]} is installed but cannot be imported .*: reinstall it"
    ):
        deploy.load(tmp_path / "model", engine)


@pytest.mark.skipif("onnxruntime" not in deploy.available(), reason="ONNX Runtime or its exporter is not installed")
def test_a_wrong_replacement_of_a_normalization_is_noticed(tmp_path, monkeypatch):
    stack = [layers.Normalization(mean=[0.5, 3.0, -2.0], variance=[1.0, 2.0, 3.0]), layers.Conv2D(2, 1)]
    model = keras.Sequential([keras.Input((4, 4, 3)), *stack])
    monkeypatch.setattr(deploy.layers, "Rescaling", lambda scale, offset, name: layers.ReLU(name=name))
    with pytest.raises(ValueError, match="differs from that of Keras"):
        deploy.export(model, tmp_path / "model.onnx")
