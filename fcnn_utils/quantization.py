"""Quantize a trained network to int8 for an inference engine, from a few hundred unlabelled images.

    result = quantize(small, images, "small-int8.onnx")
    run = deploy.load("small-int8.onnx")

Weights and activations become 8-bit integers q, with x ≈ scale · (q − zero). Weights have one scale for each output
channel. An array of activations has one scale for all channels, which follows from its range on the images (static
quantization). Each engine has its own quantizer: ONNX Runtime's, NNCF for OpenVINO, TensorFlow's converter for LiteRT.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import warnings
from pathlib import Path

import keras
import numpy as np

from fcnn_utils import _calibration_inputs, _engines, _equalize, batch_norm, calibration, deploy, keras_graph
from fcnn_utils._engines import TITLES

_BATCH = 32  # images at a time
_LARGE_CHANGE = 0.3  # of the outputs' standard deviation
# Operations at the end of a network that stay in float: the probabilities of a softmax would be multiples of 1/256.
_LAST = {"Softmax", "LogSoftmax", "Sigmoid", "Identity", "Squeeze", "Reshape", "Flatten", "Transpose", "Cast"}


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What `quantize` has written.

    Attributes:
        path: path of the file.
        size: bytes of the file; in OpenVINO of both files.
        float_size: bytes of the same network in float32.
        change: root mean square of the change of the outputs on the calibration images, relative to the standard
            deviation of the float outputs; of several outputs, the largest. For integers the share that differs.
        agreement: share of images whose largest output stays the same; None if the outputs are not (N, classes).
    """

    path: Path
    size: int
    float_size: int
    change: float
    agreement: float | None

    def __repr__(self):
        same = "" if self.agreement is None else f", {self.agreement:.1%} of the images keep their class"
        size = f"{self.size / 1e6:.3g} MB (float32: {self.float_size / 1e6:.3g} MB)"
        return f"<Quantized {self.path.name}: {size}, outputs change by {self.change:.1%}{same}>"


def quantize(model, images, path):
    """Quantize a model to int8 and write it in the format of the suffix: .onnx, .xml (OpenVINO) or .tflite (LiteRT).

    Batch norms are folded first. The ranges of the channels between linear layers, such as those of a factorized
    layer, are evened out, which changes nothing in float32. A float32 file is written and compared with Keras, as in
    `deploy.export`. Then the engine's quantizer writes the int8 file: for LiteRT from the Keras model, for the other
    engines from the float32 file. Both files are run on the images. Layers that the quantizer does not know stay in
    float32, and so do the inputs and outputs of the file.

    For OpenVINO, install NNCF (`pip install nncf`). NNCF reports its use to its authors by default; here this is
    switched off. On processors without 8-bit dot products (VNNI, Arm's dotprod) int8 may be slower than float32. On x86
    processors without them, sums may saturate. In ONNX Runtime, `deploy.load` prevents this by the option
    "session.x64quantprecision". Set it in sessions of your own, too. In the other engines, compare the outputs again.

    Args:
        model: built, functional or Sequential, as in `deploy.export`. It does not change.
        images: a few hundred inputs of the model, normalised as in training, in any form that
            `calibration.check_images` takes.
        path: path of the file.

    Returns:
        Quantized: the path, the sizes of both files, and the change of the outputs on the images.

    Raises:
        ValueError: the suffix is none of these, a package is not installed, the images do not fit, a layer cannot be
            copied or exported, or the quantizer or the engine fails. What was at `path` before stays.

    Warns:
        UserWarning: the outputs change by more than 30%, or the images are unlike those of the training.
    """
    path = Path(path)
    engine = deploy.engine_of(path)
    if engine == "openvino" and importlib.util.find_spec("nncf") is None:
        raise ValueError("int8 for OpenVINO needs nncf: pip install nncf")
    model = keras_graph.check_graph(model)
    inputs = calibration.check_images(model, images)
    model = batch_norm.fold_batch_norm(model, "float32")
    _equalize.equalize(model, inputs)
    with deploy.temporary_folder() as folder:
        source, target = folder / "float32" / path.name, folder / "int8" / path.name
        target.parent.mkdir()
        run_float = deploy.load(deploy.export(model, source))
        batches = [run_float.named(batch) for batch in _calibration_inputs.batches(model, inputs, _BATCH)]
        _write(engine, model, batches, source, target)
        change, agreement = _compare(run_float, _start(engine, target), model, inputs)
        sizes = [sum(file.stat().st_size for file in each.parent.iterdir()) for each in (target, source)]
        deploy.replace(target.parent, path)
    result = Quantized(path, *sizes, change, agreement)
    if not change <= _LARGE_CHANGE:
        warnings.warn(
            f"int8 changes the outputs of model {model.name!r} by {change:.0%} of their standard deviation: give more "
            "images like those of the training, or deploy the model in float32",
            stacklevel=2,
        )
    return result


def _write(engine, model, batches, source, target):
    """Write the int8 file `target`; `source` is the float one, `batches` are dicts of its inputs."""
    try:
        if engine == "onnxruntime":
            _quantize_onnx(source, target, batches)
        elif engine == "openvino":
            _quantize_openvino(source, target, batches)
        else:
            _quantize_litert(model, target, batches)
    except Exception as error:  # each quantizer has exceptions of its own
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(
            f"model {model.name!r} cannot be quantized for {TITLES[engine]} ({_engines.reason(error)}): choose another "
            "format, or export it in float32"
        ) from error


def _start(engine, target):
    try:
        return deploy.load(target)
    except ValueError as error:
        raise ValueError(f"{TITLES[engine]} cannot run the model in int8 ({_engines.reason(error)})") from error


# --- quantizers ------------------------------------------------------------------------------------------------------


def _quantize_onnx(source, target, batches):
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.rest = iter(batches)

        def get_next(self):
            return next(self.rest, None)

    prepared = source.with_name(f"prepared-{source.name}")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)  # symbolic shapes need SymPy
    try:
        graph = onnx.load(prepared)
        names = [node.name or f"node_{number}" for number, node in enumerate(graph.graph.node)]
        for node, name in zip(graph.graph.node, names, strict=True):
            node.name = name
        onnx.save(graph, prepared)
        quantization.quantize_static(
            str(prepared),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_last_operations(graph.graph),
        )
    finally:
        prepared.unlink()
    quantized = onnx.load(target)
    onnx.helper.set_model_props(quantized, {entry.key: entry.value for entry in onnx.load(source).metadata_props})
    onnx.save(quantized, target)


def _last_operations(graph):
    """Return the names of the nodes between the last layer with weights and the outputs."""
    made_by = {name: node for node in graph.node for name in node.output}
    found, names = [], [entry.name for entry in graph.output]
    while names:
        node = made_by.get(names.pop())
        if node is not None and node.op_type in _LAST:
            found.append(node.name)
            names.append(node.input[0])
    return found


def _quantize_openvino(source, target, batches):
    os.environ.setdefault("NNCF_CI", "1")  # read when NNCF is imported: it reports its use otherwise
    import nncf
    import openvino
    from nncf.quantization import range_estimator

    nncf.set_log_level(logging.ERROR)
    images = _one_by_one(batches)
    if len(images[0]) == 1:  # the only input may have no name
        images = [next(iter(image.values())) for image in images]
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        quantized = nncf.quantize(
            core.read_model(source),
            nncf.Dataset(images),
            subset_size=len(images),
            fast_bias_correction=False,
            # By default the ends of the range are means over the images, which clips too much.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=range_estimator.RangeEstimatorParametersSet.MINMAX
            ),
        )
    openvino.save_model(quantized, target, compress_to_fp16=False)


def _quantize_litert(model, target, batches):
    import tensorflow as tf  # the converter's settings are TensorFlow's; Keras only passes them on

    deploy.write(
        model,
        "litert",
        target,
        optimizations=[tf.lite.Optimize.DEFAULT],
        representative_dataset=lambda: iter(_one_by_one(batches)),  # of several inputs it takes no other batches
        experimental_enable_resource_variables=False,  # the calibration cannot read variables
    )


def _one_by_one(batches):
    """Return the batches as batches of one image."""
    return [
        {name: values[number : number + 1] for name, values in batch.items()}
        for batch in batches
        for number in range(len(next(iter(batch.values()))))
    ]


# --- the change of the outputs ----------------------------------------------------------------------------------


def _compare(run_float, run_int8, model, inputs):
    """Return the change of the outputs and the share of images that keep their class, as in `Quantized`."""
    found = []  # for each run, a list of its outputs
    for run in (run_float, run_int8):
        parts = [keras.tree.flatten(run(batch)) for batch in _calibration_inputs.batches(model, inputs, _BATCH)]
        found.append([np.concatenate(part) for part in zip(*parts, strict=True)])
    changes, agreements = [], []
    for before, after in zip(*found, strict=True):
        if before.dtype.kind != "f":
            changes.append(np.mean(before != after))
            continue
        before, after = before.astype(np.float64), after.astype(np.float64)
        difference = np.sqrt(np.mean((after - before) ** 2))
        changes.append(difference / before.std() if before.std() else float(difference > 0))
        if before.ndim == 2 and before.shape[1] > 1:
            agreements.append(np.mean(before.argmax(axis=1) == after.argmax(axis=1)))
    return float(max(changes)), float(min(agreements)) if agreements else None
