"""Export a model and run it in an inference engine: Keras, ONNX Runtime, OpenVINO or LiteRT.

    run = deploy.load(keras_graph.fold_batch_norm(model), "onnxruntime")
    probabilities = run(images)

The engines besides Keras are optional: they are the extra `export` of this package. Exporting needs further packages,
which depend on the Keras backend.
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
_SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "litert": ".tflite"}
_ENGINE_OF = {suffix: engine for engine, suffix in _SUFFIXES.items()}
_FORMATS = {"onnxruntime": "onnx", "openvino": "openvino", "litert": "litert"}  # the names in keras.Model.export
_RUNTIMES = {"onnxruntime": ("onnxruntime",), "openvino": ("openvino",), "litert": ("ai_edge_litert",)}
_EXPORTERS = {  # Keras backend -> engines that Keras exports to from it -> packages that this takes besides the engine
    "tensorflow": {"onnxruntime": ("onnx", "tf2onnx"), "openvino": (), "litert": ()},
    "jax": {"onnxruntime": ("onnx", "jax2onnx")},
    "torch": {"onnxruntime": ("onnx", "onnxscript"), "openvino": ()},
}


def available():
    """Return the engines that models can be exported to and run in here: a tuple in the order of `ENGINES`."""
    return tuple(engine for engine in ENGINES if not _obstacle(engine, exports=True))


def export(model, path):
    """Write a model to a file in the format of its suffix: .onnx, .xml (OpenVINO) or .tflite (LiteRT).

    The file computes in float32, whatever the precision of `model`, on batches of any size. An OpenVINO
    model is two files: the weights are in a .bin beside the .xml. Missing folders are created and existing
    files replaced.

    Args:
        model: built, functional or Sequential, with one input and one output.
        path: path of the file.

    Returns:
        The path.

    Raises:
        ValueError: the suffix is another, the model is not as above, a package is not installed, Keras cannot
            write the format from this backend, or the file cannot be written.
    """
    path = Path(path)
    engine = _ENGINE_OF[check_choice("suffix of the exported file", path.suffix, _ENGINE_OF)]
    _check_installed(engine, exports=True)
    model = _single_precision(_check_one_input(model))
    # Keras exports a model only after a call; 64 stands in for a free size.
    model(np.zeros([1, *(64 if size is None else size for size in model.inputs[0].shape[1:])], "float32"))
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / path.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own code
            model.export(str(exported), format=_FORMATS[engine], verbose=False)
        for file in sorted(exported.parent.iterdir()):  # the .bin comes before the .xml that refers to it
            write_atomic(path.with_name(file.name), file.read_bytes())
    return path


def load(model, engine=None, *, precision="float32", threads=None):
    """Make a model ready to run in an engine.

    Args:
        model: built keras.Model with one input and one output, or the path of a file for the engine.
        engine: "keras", "onnxruntime", "openvino" or "litert"; default: the engine of the file's suffix, or Keras.
        precision: "float32"; also "bfloat16" in OpenVINO, which uses it if the processor can. In Keras the
            model's own precision holds.
        threads: number of threads; default: all available processors. Keras always uses its backend's.

    Returns:
        A function from images (N, H, W, C) to the model's output (N, ...), both NumPy arrays.

    Raises:
        ValueError: an argument is not as above, the file does not exist, the engine is not installed, or
            Keras cannot export to it from this backend.
    """
    is_file = isinstance(model, (str, Path))
    if engine is None:
        engine = _ENGINE_OF.get(Path(model).suffix, "keras") if is_file else "keras"
    check_choice("engine", engine, ENGINES)
    check_choice("precision", precision, ("float32", "bfloat16") if engine == "openvino" else ("float32",))
    threads = check_number("threads", available_cores() if threads is None else threads, int, 1, 4096)
    if is_file and not Path(model).exists():
        raise ValueError(f"there is no file {model} to load")
    if engine == "keras":
        model = keras.saving.load_model(model, compile=False) if is_file else model
        return _check_one_input(model).predict_on_batch
    _check_installed(engine, exports=not is_file)
    start = {"onnxruntime": _onnxruntime, "openvino": _openvino, "litert": _litert}[engine]
    if is_file:
        return start(str(model), threads, precision)
    with tempfile.TemporaryDirectory() as folder:
        return start(str(export(model, Path(folder) / f"model{_SUFFIXES[engine]}")), threads, precision)


def available_cores():
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --- the engines -------------------------------------------------------------------------------------------------


def _onnxruntime(path, threads, precision):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that keep spinning after a call slow down whatever runs next, such as the model it is compared with.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: np.asarray(images, "float32")})[0]


def _openvino(path, threads, precision):
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file may be deleted while the model is in use
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


# --- checks ------------------------------------------------------------------------------------------------------


def _check_one_input(model):
    keras_graph.check_graph(model)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        counts = f"{len(model.inputs)} and {len(model.outputs)}"
        raise ValueError(f"model {model.name!r} must have one input and one output; it has {counts}")
    return model


def _single_precision(model):
    """Return the model if it computes in float32 throughout, else a copy that does."""
    if all(node.layer.compute_dtype == "float32" for node in keras_graph.layer_nodes(model)):
        return model
    return keras_graph.rebuild(model, {}, dtype="float32")


def _check_installed(engine, exports):
    obstacle = _obstacle(engine, exports)
    if obstacle:
        raise ValueError(obstacle)


def _obstacle(engine, exports):
    """Return one sentence that says why the engine cannot be used, or with `exports` exported to; "" if it can."""
    if engine == "keras":
        return ""
    packages = _RUNTIMES[engine]
    if exports:
        backend = keras.config.backend()
        exporters = _EXPORTERS.get(backend, {})
        if engine not in exporters:
            able = " or ".join(name for name, engines in _EXPORTERS.items() if engine in engines)
            return f"Keras cannot export to {TITLES[engine]} from the {backend} backend: set KERAS_BACKEND to {able}"
        packages = exporters[engine] + packages
    missing = [name.replace("_", "-") for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"{TITLES[engine]} needs {', '.join(missing)}: pip install {' '.join(missing)}"
