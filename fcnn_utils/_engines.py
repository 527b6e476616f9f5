"""Run exported files in ONNX Runtime, OpenVINO and LiteRT.

Each engine numbers the inputs and outputs of a file in an order of its own. A file of several therefore carries
`Labels`: the names of its inputs in the order of Keras, and the structure of its outputs.
"""

import ast
import contextlib
import dataclasses
import functools
import re
import zipfile
from pathlib import Path

import keras
import numpy as np

ENGINES = ("keras", "onnxruntime", "openvino", "litert")
TITLES = {"keras": "Keras", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "litert": "LiteRT"}
_LABELS = "fcnn_utils_labels"  # the name under which a file keeps its labels
# What the engines and Keras say of an operation or class that they lack, somewhere in a long message.
_LACKS = "|".join(
    (
        r"No conversion rule found for operations?: [^\n]*",
        r"No Op registered for \w+",
        r"Node number \d+ \([^)]*\) failed",
        r"Could not locate \w+ '[^']*'",
    )
)


@dataclasses.dataclass
class Labels:
    """How the inputs and outputs of a file correspond to those of the Keras model.

    Attributes:
        inputs: the file's names of the inputs, in the order of `keras.Model.inputs`.
        keys: the keys that Keras takes in a dict of inputs, in the same order.
        outputs: structure of the model's outputs; the numbers in it count the outputs of the file.
    """

    inputs: list
    keys: list
    outputs: object


def load_keras(path):
    """Load a saved Keras model; if that fails, raise ValueError."""
    path = Path(path)
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # a damaged file or a user's class may raise anything
        is_damaged = path.suffix == ".keras" and not zipfile.is_zipfile(path)
        why = "the file is damaged" if is_damaged else reason(error)
        raise ValueError(
            f"{path} cannot be loaded in Keras ({why}): save the model again, and import the classes that it uses"
        ) from error


def start(engine, path, threads, precision):
    """Return the function that runs a file in an engine, from inputs to outputs as in `keras.Model`.

    Raises:
        ValueError: the engine cannot be imported or cannot read the file.
    """
    try:
        return run_file(engine, path, threads, precision)
    except ImportError as error:
        raise ValueError(
            f"{TITLES[engine]} is installed but cannot be imported ({reason(error)}): reinstall it"
        ) from error
    except Exception as error:  # each engine has exceptions of its own
        raise ValueError(
            f"{path} cannot be loaded in {TITLES[engine]} ({reason(error)}): the file may be damaged or have another "
            "format: export the model again"
        ) from error


def run_file(engine, path, threads, precision):
    """As `start`, with the engine's own exceptions."""
    return {"onnxruntime": _onnxruntime, "openvino": _openvino, "litert": _litert}[engine](path, threads, precision)


@contextlib.contextmanager
def ready_for_tf2onnx(engine):
    """Make TensorFlow inline the functions of a model, such as its grouped convolutions; make tf2onnx convert GELU."""
    if engine != "onnxruntime" or keras.config.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf  # Keras has no name for this setting

    _register_erfc()

    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@functools.cache
def _register_erfc():
    """Register a rule of tf2onnx for `Erfc`, 1 - erf(x), which GELU uses and tf2onnx lacks."""
    from tf2onnx import utils
    from tf2onnx.handler import tf_op

    @tf_op("Erfc")
    class Erfc:
        @classmethod
        def version_9(cls, graph, node, **_):
            shape, dtype = graph.get_shape(node.output[0]), graph.get_dtype(node.output[0])
            graph.remove_node(node.name)
            one = graph.make_const(utils.make_name("one"), np.ones((), utils.map_onnx_to_numpy_type(dtype)))
            inputs = [one.output[0], graph.make_node("Erf", node.input).output[0]]
            graph.make_node("Sub", inputs, name=node.name, outputs=node.output, shapes=[shape], dtypes=[dtype])


def complete(engine, path, labels):
    """Write labels into a file that Keras has exported, if its inputs or outputs are several.

    An OpenVINO file loses outputs that nobody asked for.

    Raises:
        ValueError: an ONNX file has more inputs than the model.
    """
    is_plain = len(labels.inputs) == 1 and labels.outputs == 0
    text = repr(dataclasses.astuple(labels))
    if engine == "openvino":
        _complete_openvino(path, labels.inputs, None if is_plain else text)
    elif engine == "onnxruntime":
        import onnx

        model = onnx.load(path)
        known = {*labels.inputs, *(entry.name for entry in model.graph.initializer)}
        lost = [entry.name for entry in model.graph.input if entry.name not in known]
        if lost:
            raise ValueError(f"the exporter makes an input of the constant {lost[0]}")
        if not is_plain:
            onnx.helper.set_model_props(model, {_LABELS: text})
            onnx.save(model, path)
    elif not is_plain:  # a .tflite file carries other files in a ZIP archive behind the model
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_LABELS, text)


def _complete_openvino(path, inputs, text):
    import openvino

    model = _openvino_core().read_model(path)
    named = [any(name.startswith("Identity") for name in entry.names) for entry in model.outputs]
    for result, is_output in zip(model.get_results(), named, strict=True):
        if any(named) and not is_output:  # TensorFlow names outputs so; OpenVINO adds values that nothing reads
            model.remove_result(result)
    if text is not None:
        for entry, name in zip(model.inputs, inputs, strict=True):  # from some backends they have no names
            entry.tensor.set_names({name})
        model.set_rt_info(text, [_LABELS])
    elif all(named):
        return
    openvino.serialize(model, path)


def reason(error):
    """Return the one line of an exception that says most."""
    text = str(error)
    lacks = re.search(_LACKS, text)
    lines = [line.strip() for line in text.splitlines()]
    # OpenVINO first names places in its source.
    lines = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    line = lacks[0] if lacks else (lines or [type(error).__name__])[0]
    return line.rstrip(".:") if len(line) <= 200 else f"{line[:200]}..."


def _onnxruntime(path, threads, precision):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that keep spinning after a call slow down whatever runs next, such as the model it is compared with.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without VNNI, x86 processors add int8 products in 16 bits, where sums may saturate. This prevents it.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = {"float": "float32", "double": "float64"}
    inputs = {}
    for entry in session.get_inputs():
        kind = entry.type.removeprefix("tensor(").removesuffix(")")
        shape = [size if isinstance(size, int) else None for size in entry.shape]
        inputs[entry.name] = Input(shape[1:], kinds.get(kind, kind))
    labels = session.get_modelmeta().custom_metadata_map.get(_LABELS)
    return Runner(inputs, len(session.get_outputs()), labels, lambda values: session.run(None, values))


def _openvino_core():
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file may be changed or deleted while the model is in use
    return core


def _openvino(path, threads, precision):
    settings = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision]}
    settings |= {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    core = _openvino_core()
    read = core.read_model(path)
    labels = read.get_rt_info([_LABELS]).astype(str) if read.has_rt_info([_LABELS]) else None
    model = core.compile_model(read, "CPU", settings)
    ports = {min(entry.names, default=f"input_{number}"): entry for number, entry in enumerate(model.inputs)}
    inputs = {}
    for name, entry in ports.items():
        shape = [None if size.is_dynamic else size.get_length() for size in entry.get_partial_shape()]
        inputs[name] = Input(shape[1:], entry.get_element_type().to_dtype())

    def call(values):
        return list(model({ports[name]: value for name, value in values.items()}).values())

    return Runner(inputs, len(model.outputs), labels, call)


def _litert(path, threads, precision):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=Path(path).read_bytes(), num_threads=threads)
    if len(interpreter.get_signature_list()) == 1:  # its names are those of Keras, the tensors' are not
        signature = interpreter.get_signature_runner()
        enter, leave = signature.get_input_details(), signature.get_output_details()
    else:
        enter = {entry["name"]: entry for entry in interpreter.get_input_details()}
        leave = {entry["name"]: entry for entry in interpreter.get_output_details()}
    leave = [leave[name]["index"] for name in sorted(leave, key=lambda name: (len(name), name))]  # output_9, output_10
    labels = None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            labels = archive.read(_LABELS).decode() if _LABELS in archive.namelist() else None
    shapes = None

    def call(values):
        nonlocal shapes
        found = {name: value.shape for name, value in values.items()}
        if found != shapes:
            for name, shape in found.items():
                interpreter.resize_tensor_input(enter[name]["index"], shape)
            interpreter.allocate_tensors()
            shapes = found
        for name, value in values.items():
            interpreter.set_tensor(enter[name]["index"], value)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in leave]

    details = {entry["index"]: entry for entry in interpreter.get_input_details()}  # a signature has no free sizes
    inputs = {}
    for name, entry in enter.items():
        shape = details[entry["index"]]["shape_signature"]
        inputs[name] = Input([None if size < 0 else int(size) for size in shape[1:]], entry["dtype"])
    return Runner(inputs, len(leave), labels, call)


@dataclasses.dataclass
class Input:
    """An input of a file: its shape without the batch axis, None for a free size, and its dtype."""

    shape: list
    dtype: object


class Runner:
    """Run a file, from inputs to outputs as in `keras.Model`.

    Args:
        inputs: dict name -> `Input`; one that the outputs don't depend on may be missing.
        count: number of the file's outputs.
        labels: text that `complete` has written; None: the inputs and outputs are in the file's order.
        call: function from a dict name -> array to the list of output arrays.
    """

    def __init__(self, inputs, count, labels, call):
        self._inputs, self._call = inputs, call
        if labels is None:
            self.labels = Labels([*inputs], [*inputs], 0 if count == 1 else list(range(count)))
        else:
            self.labels = Labels(*ast.literal_eval(labels))

    def __call__(self, inputs):
        found = self._call(self.named(inputs))
        return keras.tree.map_structure(lambda number: found[number], self.labels.outputs)

    def named(self, inputs):
        """Return dict name -> array of the inputs as the file takes them."""
        named = zip(self.labels.inputs, _in_order(inputs, self.labels), strict=True)
        return {name: np.asarray(value, self._inputs[name].dtype) for name, value in named if name in self._inputs}

    @property
    def input_shapes(self):
        """Shapes of the inputs without the batch axis, None for a free size; () for one that the file lacks."""
        return [tuple(self._inputs[name].shape) if name in self._inputs else () for name in self.labels.inputs]

    def random_inputs(self, batch):
        """Draw inputs, always the same: normally distributed floats, bytes from 0 to 127, other integers 0 or 1.

        A file does not tell which integers are indices.
        """
        rng = np.random.default_rng(0)

        def draw(name, shape):
            dtype = np.dtype(self._inputs[name].dtype) if name in self._inputs else np.dtype("float32")
            shape = [batch, *(64 if size is None else size for size in shape)]
            if dtype.kind in "iub":
                return rng.integers(0, 128 if dtype.itemsize == 1 and dtype.kind != "b" else 2, shape).astype(dtype)
            return rng.standard_normal(shape).astype(dtype)

        values = [draw(name, shape) for name, shape in zip(self.labels.inputs, self.input_shapes, strict=True)]
        return values if len(values) > 1 else values[0]


def _in_order(inputs, labels):
    """Return the list of input values in the order of `labels.inputs`."""
    count, got = len(labels.inputs), type(inputs).__name__
    if isinstance(inputs, dict):
        got = f"a dict of {', '.join(map(str, inputs))}"
        is_nested = any(isinstance(value, (dict, list, tuple)) for value in inputs.values())
        if set(labels.keys) <= set(inputs):
            inputs = [inputs[key] for key in labels.keys]
        elif count > 1 and not is_nested:
            raise ValueError(f"the model reads {count} inputs: {', '.join(labels.keys)}; got {got}")
    is_several = isinstance(inputs, (dict, list, tuple)) and (count > 1 or len(inputs) == 1)
    values = keras.tree.flatten(inputs) if is_several else [inputs]
    if len(values) != count:
        raise ValueError(f"the model reads {count} inputs: {', '.join(labels.keys)}; got {len(values)}")
    return values
