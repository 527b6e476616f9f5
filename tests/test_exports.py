"""Factorized layers of every kind, folded, saved, and exported to every engine."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import batch_norm, compress, deploy

SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "litert": ".tflite"}
CASES = {  # name -> a layer, what it reads, methods
    "Dense": (layers.Dense(12), (10,), ["svd"]),
    "Dense of sequences": (layers.Dense(12), (5, 10), ["svd"]),
    "EinsumDense": (layers.EinsumDense("abc,cde->abde", (5, 3, 4), bias_axes="de"), (5, 10), ["svd"]),
    "EinsumDense of heads": (layers.EinsumDense("abde,dec->abc", (None, 12)), (5, 3, 4), ["svd"]),
    "1x1": (layers.Conv2D(12, 1, strides=2), (9, 8, 10), ["svd"]),
    "kxk": (layers.Conv2D(12, 3, strides=2, padding="same"), (9, 8, 10), ["svd", "cp", "cp4", "separable"]),
    "Conv1D": (layers.Conv1D(12, 3, padding="same"), (9, 10), ["cp", "tucker", "tt", "svd", "spatial"]),
    "dilated": (layers.Conv1D(12, 3, dilation_rate=2), (9, 10), ["cp", "tucker", "tt"]),
    "causal": (layers.Conv1D(12, 3, padding="causal"), (9, 10), ["tucker", "tt", "svd", "spatial"]),
    "Conv3D": (layers.Conv3D(12, 3, strides=2, padding="same"), (6, 5, 4, 10), ["tucker", "tt", "svd", "spatial"]),
    "grouped": (layers.Conv2D(12, 3, groups=2, padding="same"), (9, 8, 10), ["tucker", "svd", "cp"]),
    "grouped Conv1D": (layers.Conv1D(12, 3, groups=2), (9, 10), ["tucker", "svd"]),
    **{
        f"{axes}-D transposed, {padding}": (
            getattr(layers, f"Conv{axes}DTranspose")(12, 3, strides=2, padding=padding),
            (6, 5, 4)[:axes] + (10,),
            ["tucker", "svd", "tt", "spatial"],
        )
        for axes in (1, 2, 3)
        for padding in ("same", "valid")
    },
    "cropped": (layers.Conv2DTranspose(12, 3, strides=2, padding="same", output_padding=1), (6, 5, 10), ["tucker"]),
}
USUAL = {  # an export takes about a second
    ("onnxruntime", "EinsumDense", "svd"),
    ("onnxruntime", "grouped", "svd"),
    ("onnxruntime", "2-D transposed, same", "tucker"),
    ("litert", "causal", "svd"),
}
ALL = [(engine, case, method) for engine in SUFFIXES for case, (*_, methods) in CASES.items() for method in methods]


def model_of(layer, shape):
    """A model of a copy of the layer, a batch norm and a ReLU."""
    layer = layer.from_config(layer.get_config() | {"name": "mine"})
    model = keras.Sequential([keras.Input(shape), layer, layers.BatchNormalization(), layers.ReLU()], name="net")
    rng = np.random.default_rng(0)
    for part in model.layers:
        part.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in part.weights])
    layer.set_weights([rng.normal(0, 0.3, weight.shape) for weight in layer.weights])
    return model


@pytest.mark.parametrize(
    "engine, case, method",
    [pytest.param(*row, marks=[] if row in USUAL else pytest.mark.full, id=", ".join(row)) for row in ALL],
)
def test_factorized_layers_are_folded_saved_and_exported(engine, case, method, tmp_path):
    if engine not in deploy.available():
        pytest.skip(f"{engine} is not installed, or Keras cannot export to it from {keras.config.backend()}")
    layer, shape, _ = CASES[case]
    model, x = model_of(layer, shape), np.random.default_rng(1).standard_normal((3, *shape)).astype("float32")
    small, report = compress.factorize(model, method, layers="mine", ratio=0.7, verbose=0)
    expected = keras.ops.convert_to_numpy(small(x, training=False))
    folded, norms = batch_norm.fold_batch_norm(small, report=True)
    assert (
        np.std(expected) > 0.1
        and report["reason"][0] == ""
        and (norms["folded_into"][0] == "mine") == (not isinstance(layer, layers.EinsumDense))
    )
    folded.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(loaded.predict_on_batch(x), folded.predict_on_batch(x))
    run = deploy.load(deploy.export(loaded, tmp_path / f"model{SUFFIXES[engine]}"), threads=1)
    for count in (1, 3):
        assert np.allclose(run(x[:count]), expected[:count], rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.full
@pytest.mark.parametrize(
    "engine, layer, shape",
    [
        ("litert", layers.Conv3D(12, 2, dilation_rate=2), (6, 5, 6, 10)),
        ("litert", layers.Conv3D(12, 2, groups=2), (6, 5, 4, 10)),
        ("onnxruntime", layers.Conv3D(12, 2, groups=2), (6, 5, 4, 10)),
        ("onnxruntime", layers.Conv2DTranspose(12, 2, strides=3, padding="same"), (6, 5, 10)),
    ],
    ids=["dilated Conv3D", "grouped Conv3D", "grouped Conv3D in ONNX", "kernel smaller than strides"],
)
def test_what_an_engine_cannot_compute_is_named_before_and_after_factorizing(engine, layer, shape, tmp_path):
    if engine not in deploy.available() or keras.config.backend() != "tensorflow":
        pytest.skip("other backends export other layers")
    model, path = model_of(layer, shape), tmp_path / f"model{SUFFIXES[engine]}"
    small, _ = compress.factorize(model, "svd", layers="mine", ratio=0.7, verbose=0)
    for one, name in ((model, "mine"), (small, "mine_in")):
        with pytest.raises(
            ValueError, match=f"cannot be exported to .* because of its {type(layer).__name__} '{name}'"
        ):
            deploy.export(one, path)
    assert not list(tmp_path.iterdir())
