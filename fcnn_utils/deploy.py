"""A network where its users run it: Keras, ONNX Runtime, OpenVINO, LiteRT.

    run = deploy.load(convert.fold_batch_norm(model), "onnxruntime")
    probabilities = run(images)

The engines beside Keras are optional (`requirements-export.txt`), and so is Keras's way there, `model.export`.
"""

import importlib.util
import os
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np

from fcnn_utils import keras_graph
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils._files import write_atomic

ENGINES = ("keras", "onnxruntime", "openvino", "litert")
TITLES = {"keras": "Keras", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "litert": "LiteRT"}
_ENDINGS = {"onnxruntime": ".onnx", "openvino": ".xml", "litert": ".tflite"}
_FORMATS = {"onnxruntime": "onnx", "openvino": "openvino", "litert": "litert"}  # as `keras.Model.export` calls them
_NEEDS = {  # to export from TensorFlow, and to run; other backends may want more, and Keras then says so
    "onnxruntime": ("onnx", "tf2onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "litert": ("ai_edge_litert",),
}


def available():
    """Those of "keras", "onnxruntime", "openvino", "litert" whose packages are installed: a tuple in this order."""
    return tuple(engine for engine in ENGINES if not _missing(engine))


def export(model, path):
    """Write a built model to `path` in the format that its ending names: .onnx, .xml (OpenVINO) or .tflite (LiteRT).

    It is exported in float32, whatever precision it was trained in, for batches of any size. An OpenVINO model is two
    files, the weights in a .bin beside the .xml.

    Returns:
        The path.

    Raises:
        ValueError: another ending; a model that is not built, or of several inputs or outputs; a package that is not
            installed; a file that can't be written.
    """
    path = Path(path)
    engine_of = {ending: engine for engine, ending in _ENDINGS.items()}
    engine = engine_of[check_choice("ending of the exported file", path.suffix, engine_of)]
    _check_installed(engine)
    model = _single_precision(_checked(model))
    model(np.zeros([1, *(64 if size is None else size for size in model.inputs[0].shape[1:])], "float32"))  # wanted
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the exporters' own, of NumPy names to come
            model.export(str(made), format=_FORMATS[engine], verbose=False)
        for file in sorted(made.parent.iterdir()):  # the .bin before the .xml that reads it
            write_atomic(path.with_name(file.name), file.read_bytes())
    return path


def load(model, engine="keras", *, precision="float32", threads=None):
    """A model made ready to run on an engine.

    Args:
        model: built keras.Model of one input and one output, or the path of an exported file for its engine.
        engine: "keras", "onnxruntime", "openvino" or "litert".
        precision: "float32", or "bfloat16" on OpenVINO, which computes in it where the processor can. Keras has the
            precision that its model has.
        threads: how many; default: as many as there are processors (Keras always takes what its backend has).

    Returns:
        A function from images (N, H, W, C) to the model's output (N, …), both NumPy arrays.

    Raises:
        ValueError: an argument is not as above, there is no such file, or the engine is not installed.
    """
    check_choice("engine", engine, ENGINES)
    check_choice("precision", precision, ("float32", "bfloat16") if engine == "openvino" else ("float32",))
    threads = check_number("threads", available_cores() if threads is None else threads, int, 1, 4096)
    is_file = isinstance(model, (str, Path))
    if is_file and not Path(model).exists():
        raise ValueError(f"there is no file {model} to load")
    if engine == "keras":
        return _checked(keras.saving.load_model(model, compile=False) if is_file else model).predict_on_batch
    _check_installed(engine)
    start = {"onnxruntime": _onnxruntime, "openvino": _openvino, "litert": _litert}[engine]
    if is_file:
        return start(str(model), threads, precision)
    with tempfile.TemporaryDirectory() as folder:
        return start(str(export(model, Path(folder) / f"model{_ENDINGS[engine]}")), threads, precision)


def available_cores():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --- one engine each ---------------------------------------------------------------------------------------------


def _onnxruntime(path, threads, precision):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that go on spinning after a call slow down whatever runs next, such as the model it is compared with.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: np.asarray(images, "float32")})[0]


def _openvino(path, threads, precision):
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file may be gone before the model is
    settings = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision]}
    settings |= {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda images: model(np.asarray(images, "float32"))[0]


def _litert(path, threads, precision):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=Path(path).read_bytes(), num_threads=threads)
    (enter,), (leave,) = interpreter.get_input_details(), interpreter.get_output_details()
    shape = None

    def run(images):
        nonlocal shape
        images = np.asarray(images, "float32")
        if images.shape != shape:
            interpreter.resize_tensor_input(enter["index"], images.shape)
            interpreter.allocate_tensors()
            shape = images.shape
        interpreter.set_tensor(enter["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(leave["index"])

    return run


# --- parts -------------------------------------------------------------------------------------------------------


def _checked(model):
    if len(keras_graph.check_graph(model).inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"model {model.name!r} must have one input and one output; it has {len(model.inputs)} and "
            f"{len(model.outputs)}"
        )
    return model


def _single_precision(model):
    """The model, or a copy of it that computes in float32 where it does not."""
    if all(place.layer.compute_dtype == "float32" for place in keras_graph.layer_nodes(model)):
        return model
    return keras_graph.rebuild(model, {}, dtype="float32")


def _missing(engine):
    return [package for package in _NEEDS.get(engine, ()) if importlib.util.find_spec(package) is None]


def _check_installed(engine):
    missing = _missing(engine)
    if missing:
        raise ValueError(
            f"{TITLES[engine]} needs {', '.join(missing).replace('_', '-')}: pip install -r requirements-export.txt"
        )
