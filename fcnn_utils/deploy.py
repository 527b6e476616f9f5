"""Export a model and run it in an inference engine: Keras, ONNX Runtime, OpenVINO or LiteRT.

    run = deploy.load(batch_norm.fold_batch_norm(model), "onnxruntime")
    probabilities = run(images)

The engines besides Keras are optional: they are the extra `export` of this package. Exporting needs further packages,
which depend on the Keras backend.
"""

import collections
import contextlib
import errno
import functools
import importlib.util
import os
import re
import tempfile
import time
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import layers

from fcnn_utils import _engines, _trace, keras_graph
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils._engines import ENGINES, TITLES
from fcnn_utils._files import cannot_write
from fcnn_utils._processors import available_cores

_SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "litert": ".tflite"}
_ENGINE_OF = {suffix: engine for engine, suffix in _SUFFIXES.items()}
_FORMATS = {"onnxruntime": "onnx", "openvino": "openvino", "litert": "litert"}  # the names in keras.Model.export
_RUNTIMES = {"onnxruntime": ("onnxruntime",), "openvino": ("openvino",), "litert": ("ai_edge_litert",)}
_EXPORTERS = {  # Keras backend -> engines that Keras exports to from it -> packages that the export needs
    "tensorflow": {"onnxruntime": ("onnx", "tf2onnx"), "openvino": (), "litert": ()},
    "jax": {"onnxruntime": ("onnx", "jax2onnx")},
    "torch": {"onnxruntime": ("onnx", "onnxscript"), "openvino": ()},
}
# Engines sum in another order than Keras, and GPUs multiply with 10 bits: the outputs then differ by up to some 0.1% of
# their range. A wrong operation changes them by tens of percent.
_TOLERANCE = 0.01
_NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_SEARCH_SECONDS = 20  # for the layer that cannot be exported


class _ExportError(Exception):
    """A file was not written, cannot be run, or computes something else than Keras."""


def available():
    """Return the engines that models can be exported to and run in here: a tuple in the order of `ENGINES`."""
    return tuple(engine for engine in ENGINES if not _obstacle(engine, exports=True))


def export(model, path):
    """Write a model to a file in the format of its suffix: .onnx, .xml (OpenVINO) or .tflite (LiteRT).

    The file computes in float32, whatever the precision of `model`, on batches of any size, and as in
    inference: layers such as dropout and augmentation do nothing. It is first run on two random inputs. If
    an output differs from that of Keras by more than 1% of its range, nothing is written. An OpenVINO model is two
    files: the weights are in a .bin beside the .xml. Missing folders are created and existing files replaced.

    Args:
        model: built, functional or Sequential, with any number of inputs and outputs. A subclassed model is
            traced, with a warning.
        path: path of the file.

    Returns:
        The path.

    Raises:
        ValueError: the suffix is none of these, the model is not as above, a package is not installed, Keras cannot
            write the format from this backend, the engine does not compute what Keras computes, or the file
            cannot be written. What was at `path` before stays.
    """
    path = Path(path)
    engine = engine_of(path)
    with temporary_folder() as folder:
        _export(keras_graph.check_graph(model), engine, folder / path.name)
        replace(folder, path)
    return path


def load(model, engine=None, *, precision="float32", threads=None):
    """Make a model ready to run in an engine.

    Args:
        model: built keras.Model, or the path of a file for the engine.
        engine: "keras", "onnxruntime", "openvino" or "litert"; default: the engine of the file's suffix, or Keras.
        precision: "float32"; also "bfloat16" in OpenVINO, which uses it if the processor can. In Keras the
            model's own precision holds.
        threads: number of threads; default: all available processors. Keras always uses its backend's.

    Returns:
        A function from images (N, H, W, C) to the model's output (N, ...), both NumPy arrays. If the model has
        several inputs or outputs, the function takes a list or dict of arrays and returns the structure of the model's
        outputs. It casts the inputs to the dtypes that the model reads. For engines other than Keras it is an
        `_engines.Runner`.

    Raises:
        ValueError: an argument is not as above, the file does not exist or is damaged, the engine is not
            installed, or `export` refuses the model.
    """
    is_file = isinstance(model, (str, Path))
    if engine is None:
        engine = engine_of_file(model) if is_file else "keras"
    check_choice("engine", engine, ENGINES)
    check_choice("precision", precision, ("float32", "bfloat16") if engine == "openvino" else ("float32",))
    threads = check_number("threads", available_cores() if threads is None else threads, int, 1, 4096)
    if is_file and not Path(model).exists():
        raise ValueError(f"there is no file {model} to load")
    if engine == "keras":
        return (_engines.load_keras(model) if is_file else keras_graph.check_graph(model)).predict_on_batch
    _check_installed(engine, exports=not is_file)
    if is_file:
        return _engines.start(engine, Path(model), threads, precision)
    with temporary_folder() as folder:
        file = folder / f"model{_SUFFIXES[engine]}"
        _export(keras_graph.check_graph(model), engine, file)
        return _engines.start(engine, file, threads, precision)


def engine_of(path):
    """Return the engine to which `export` exports a file with the suffix of `path`.

    Raises:
        ValueError: there is none, a package is not installed, or Keras cannot write the format from this backend.
    """
    engine = _ENGINE_OF[check_choice("suffix of the exported file", Path(path).suffix, _ENGINE_OF)]
    _check_installed(engine, exports=True)
    return engine


def engine_of_file(path):
    """Return the engine that runs files with the suffix of `path`; Keras for other suffixes."""
    return _ENGINE_OF.get(Path(path).suffix, "keras")


def random_inputs(model, batch=2):
    """Draw inputs of the shapes and dtypes that a model reads, always the same.

    Floats are normally distributed. Integers are 0 to 255, as far as the dtype reaches. If a layer reads indices, such
    as an Embedding, all inputs are valid indices.

    Args:
        model: built, functional or Sequential.
        batch: number of images.

    Returns:
        Arrays in the structure that the model reads: an array, a list or a dict. 64 stands in for a free size.
    """
    rng = np.random.default_rng(0)
    indexed = [node.layer for node in keras_graph.layer_nodes(model)]
    indexed = [layer for layer in indexed if isinstance(layer, (layers.Embedding, layers.CategoryEncoding))]
    limits = [getattr(layer, "input_dim", None) or getattr(layer, "num_tokens", None) or 256 for layer in indexed]

    def draw(tensor):
        shape = [batch, *(64 if size is None else size for size in tensor.shape[1:])]
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if "float" in dtype and not indexed:
            return rng.standard_normal(shape).astype(dtype)
        return rng.integers(0, min([{"bool": 2, "int8": 128}.get(dtype, 256), *limits]), shape).astype(dtype)

    return keras.tree.map_structure(draw, _input_structure(model))


@contextlib.contextmanager
def temporary_folder():
    """Make a folder, which is deleted afterwards; if it cannot be written, raise ValueError."""
    place = None
    try:
        place = tempfile.gettempdir()
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        place = place or "the folder of temporary files"
        raise ValueError(f"{cannot_write(place, error)}, or set TMPDIR to another folder") from error


# --- exporting ---------------------------------------------------------------------------------------------------


def _export(model, engine, file):
    """Write a checked model to `file`, in a folder of its own, and compare it with Keras."""
    model = keras_graph.in_float32(model)
    try:
        _write_and_compare(model, engine, file)
    except _ExportError as error:
        culprit, why = _find_culprit(model, engine) or ("", str(error))
        raise ValueError(
            f"model {model.name!r} cannot be exported to {TITLES[engine]}{culprit}: {why}; replace what fails or "
            "choose another format"
        ) from error


def _without_normalization(model):
    """Return the model with each Normalization as a Rescaling: tf2onnx takes its mean and variance for inputs."""
    chains = {}
    for layer in (node.layer for node in keras_graph.layer_nodes(model)):
        if type(layer) is layers.Normalization:
            mean, variance = (keras.ops.convert_to_numpy(x) for x in (layer.mean, layer.variance))
            size = np.maximum(np.sqrt(variance), keras.config.epsilon())
            scale, offset = (size, mean) if layer.invert else (1 / size, -mean / size)
            chains[id(layer)] = [layers.Rescaling(scale.tolist(), offset.tolist(), name=layer.name)]
    return keras_graph.rebuild(model, chains) if chains else model


def _write_and_compare(model, engine, file):
    """Export a model and compare the file with what Keras computes.

    Raises:
        _ExportError: the export failed, or the file computes something else.
        ValueError: Keras itself cannot run the model on random inputs.
        OSError: the folder cannot be written.
    """
    inputs = random_inputs(model, model.inputs[0].shape[0] or 2)
    try:
        expected = keras.tree.map_structure(keras.ops.convert_to_numpy, model(inputs, training=False))
    except Exception as error:  # a layer may raise anything
        raise ValueError(
            f"model {model.name!r} cannot be run on random inputs ({_engines.reason(error)}), so that its export "
            "cannot be checked"
        ) from error
    try:
        write(model, engine, file)
        outputs = _engines.run_file(engine, file, available_cores(), "float32")(inputs)
    except Exception as error:  # each exporter and each engine has exceptions of its own
        if getattr(error, "errno", None) in _NOT_WRITTEN:
            raise
        if re.search("No space left|iostream error", str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise _ExportError(_engines.reason(error)) from error
    for wanted, found in zip(keras.tree.flatten(expected), keras.tree.flatten(outputs), strict=True):
        _compare(wanted, np.asarray(found))


def write(model, engine, file, **settings):
    """Export a checked model in float32 by Keras, with its inputs and outputs in lists; compare nothing.

    Args:
        model, engine, file: as in `export`.
        settings: of Keras's exporter to this format.
    """
    names = _input_names(model)
    model = _without_normalization(model) if engine == "onnxruntime" else model
    named = list(zip(model.inputs, names, strict=True))
    # From a dict Keras would give OpenVINO the names of the inputs in another order.
    inputs = [keras.Input(batch_shape=x.shape, dtype=x.dtype, name=name) for x, name in named]
    # Without `training` some exporters would trace what augmentation does in training.
    outputs = model(keras.tree.pack_sequence_as(_input_structure(model), inputs), training=False)
    labels, outputs = _labels(model, names, outputs), keras.tree.flatten(outputs)
    flat = keras.Model(*(x if len(x) > 1 else x[0] for x in (inputs, outputs)), name=model.name)
    signature = [keras.InputSpec(shape=(None, *x.shape[1:]), dtype=x.dtype, name=name) for x, name in named]
    with warnings.catch_warnings(), _engines.ready_for_tf2onnx(engine):
        warnings.simplefilter("ignore")  # the exporters warn about their own code
        signature = [signature] if len(signature) > 1 else signature
        flat.export(str(file), format=_FORMATS[engine], verbose=False, input_signature=signature, **settings)
    _engines.complete(engine, file, labels)


def _input_names(model):
    """Return a file's names of the inputs: those of Keras, in letters that all engines take."""
    names = []
    for x in model.inputs:
        name = re.sub(r"\W", "_", x.name, flags=re.ASCII)
        name = name if name[:1].isalpha() else f"input_{name}"
        names.append(f"{name}_{len(names)}" if name in names else name)
    return names


def _labels(model, names, outputs):
    """Return the labels of a file with these names of the inputs."""
    read = _input_structure(model)
    is_flat = isinstance(read, dict) and len(read) == len(names)
    keys = sorted(read) if is_flat else [x.name for x in model.inputs]
    count = len(keras.tree.flatten(outputs))
    return _engines.Labels(names, keys, keras.tree.pack_sequence_as(outputs, list(range(count))))


def _input_structure(model):
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def _compare(expected, found):
    """Raise _ExportError unless an output of the file agrees with that of Keras."""
    if expected.shape != found.shape:
        raise _ExportError(f"its output has the shape {found.shape}, in Keras {expected.shape}")
    if not np.issubdtype(expected.dtype, np.floating):  # such as classes, where two may be about equal
        share = np.mean(expected != found) if expected.size else 0.0
        if share > _TOLERANCE:
            raise _ExportError(f"{share:.0%} of its output differs from Keras")
        return
    finite = np.isfinite(expected)
    values = expected[finite].astype("float64")
    error = np.abs(values - found[finite]).max(initial=0.0)
    # A constant output has no range: a hundred roundings are allowed then.
    allowed = 1e-5 * np.abs(values).max(initial=0.0) + (_TOLERANCE * np.ptp(values) if values.size else 0.0)
    if not error <= allowed or not np.array_equal(expected[~finite], found[~finite], equal_nan=True):
        raise _ExportError(f"its output differs from that of Keras by {error:.2g}, {allowed:.2g} is allowed")


# --- finding the layer that cannot be exported --------------------------------------------------------------------


def _find_culprit(model, engine):
    """Return (which layer cannot be exported, why), or None."""
    end, seen, ranked = time.monotonic() + _SEARCH_SECONDS, collections.Counter(), []
    calls = keras_graph.operation_calls(model)
    for call in calls:
        kind = type(call.operation), getattr(call.operation, "activation", None)
        ranked.append((seen[kind], -len(getattr(call.operation, "weights", ())), call))
        seen[kind] += 1
    for *_, call in sorted(ranked, key=lambda rank: rank[:2]):  # each kind of layer first, and those of many parts
        build = functools.partial(_trace.model_of_call, call.operation, call.args, call.kwargs)
        why = time.monotonic() < end and _failure(build, engine)
        if why:
            return f" because of its {type(call.operation).__name__} {call.path!r}", why
    # An engine may fail on a layer only after those before it. Bisect, by the layers that are not in nested models.
    calls, low, why = [call for call in calls if "/" not in call.path], 0, ""
    high = len(calls)
    while low < high and time.monotonic() < end:
        middle = (low + high) // 2
        failure = _failure(functools.partial(keras.Model, model.inputs, calls[middle].node.outputs), engine)
        why, low, high = (failure, low, middle) if failure else (why, middle + 1, high)
    if not why or low < high:
        return None
    return f" with its {type(calls[low].operation).__name__} {calls[low].path!r} after the layers before it", why


def _failure(build, engine):
    """Return why the model that `build` makes cannot be exported; "" if it can, or if Keras cannot run it."""
    try:
        part = build()
        with temporary_folder() as folder:
            _write_and_compare(part, engine, folder / f"part{_SUFFIXES[engine]}")
    except _ExportError as error:
        return str(error)
    except (TypeError, ValueError):
        return ""
    return ""


def replace(folder, path):
    """Copy all files of `folder` beside `path`, then rename them one by one."""
    staged = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir()):  # the .bin comes before the .xml that refers to it
            new = staged[path.with_name(file.name)] = path.with_name(f".{file.name}.{os.getpid()}.tmp")
            with open(new, "wb") as copy:
                copy.write(file.read_bytes())
                copy.flush()
                os.fsync(copy.fileno())
        for place, new in staged.items():
            os.replace(new, place)
    except OSError as error:
        raise ValueError(cannot_write(path, error)) from error
    finally:
        for new in staged.values():
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)


# --- checks ------------------------------------------------------------------------------------------------------


def _check_installed(engine, exports):
    obstacle = _obstacle(engine, exports)
    if obstacle:
        raise ValueError(obstacle)


def _obstacle(engine, exports):
    """Return why an engine cannot be used, or with `exports` why no model can be exported to it; "" if it can."""
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
