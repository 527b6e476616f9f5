"""Small models with random weights, written for an inference engine without Keras, to be timed.

An export by Keras takes seconds. Here a model is written in the engine's own terms, which takes milliseconds: as an
ONNX graph, as a graph of OpenVINO's operations, or as the flatbuffer of a .tflite file. A model has an entrance, then
several equal copies of a `Piece` that all read what the entrance writes:

    input -> entrance -> piece -> exit
                      -> piece -> exit

The entrance is a 3×3 depthwise convolution. An exit keeps one position. Between them a piece works as it does inside a
network: ONNX Runtime and OpenVINO store channels in blocks there, and reorder them only before the entrance and after
an exit. Without pieces the model has the entrance and the exits alone. The difference of both times is that of the
pieces. Before a matrix product the entrance is a ReLU, and there are no exits.
"""

import math

import numpy as np

from fcnn_utils._pieces import Piece

PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "litert": "ai-edge-litert"}
_SPIN_DURATION_SINCE = 1, 32  # the oldest ONNX Runtime in which this was tried


def start(engine, piece, copies, batch, threads, *, empty=False):
    """Build a small model and load it.

    Args:
        engine: "onnxruntime", "openvino" or "litert".
        piece: what is copied.
        copies: how many times.
        batch: number of images.
        threads: threads of the engine.
        empty: leave the pieces out.

    Returns:
        A function without arguments that runs the model once.
    """
    values = np.random.default_rng(0).standard_normal(_input_shape(engine, piece, batch), np.float32)
    return _ENGINES[engine](piece, 0 if empty else copies, copies, values, threads)


def _input_shape(engine, piece, batch):
    if not piece.kernel_size:
        return batch * piece.size[0], piece.reads
    return (batch, *piece.size, piece.reads) if engine == "litert" else (batch, piece.reads, *piece.size)


def _entrance(piece):
    one, axes = (1,) * len(piece.size), len(piece.size)
    return Piece(piece.size, piece.reads, piece.reads, piece.reads, (3,) * axes, one, one, ((1, 1),) * axes)


def _kernel_shape(piece):
    """Return the shape of a kernel with the filters first."""
    shape = (piece.writes, piece.reads // piece.groups)
    return (*((piece.reads, piece.writes // piece.groups) if piece.transposed else shape), *piece.kernel_size)


def _exit_strides(size, number):
    """Return strides of a pooling that keep one position, different for each exit: equal ones would be merged."""
    return [n + number for n in size]


class _Weights:
    """Random weights that keep the size of the values. None are denormal, which would be slow."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, *shape):
        return self.rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(math.prod(shape[1:])))


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------


def _start_onnxruntime(piece, copies, exits, values, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait for work in a loop are awake for the next call, but after that they disturb other models.
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= _SPIN_DURATION_SINCE:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "500")
    else:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    model = _onnx_model(piece, copies, exits, values.shape)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": values})


def _onnx_model(piece, copies, exits, shape):
    """Return an ONNX model as bytes."""
    from onnx import TensorProto, helper, numpy_helper

    weights, nodes, constants = _Weights(), [], []

    def constant(array):
        constants.append(numpy_helper.from_array(array, f"w{len(constants)}"))
        return constants[-1].name

    def apply(kind, *inputs, **attributes):
        nodes.append(helper.make_node(kind, inputs, [f"v{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def layer(x, piece):
        if not piece.kernel_size:
            product = apply("MatMul", x, constant(weights(piece.writes, piece.reads).T.copy()))
            return apply("Add", product, constant(weights(piece.writes)))
        before, after = zip(*piece.pads, strict=True)
        options = {"group": piece.groups, "strides": piece.strides, "dilations": piece.dilation}
        options |= {"kernel_shape": piece.kernel_size, "pads": before + after}
        kernel, bias = constant(weights(*_kernel_shape(piece))), constant(weights(piece.writes))
        return apply("ConvTranspose" if piece.transposed else "Conv", x, kernel, bias, **options)

    x = layer("x", _entrance(piece)) if piece.kernel_size else apply("Relu", "x")
    ends, size = ([layer(x, piece) for _ in range(copies)], piece.output_size) if copies else ([x] * exits, piece.size)
    if piece.kernel_size:
        one = (1,) * len(size)
        ends = [
            apply("MaxPool", end, kernel_shape=one, strides=_exit_strides(size, number))
            for number, end in enumerate(ends)
        ]
    ends = list(dict.fromkeys(ends))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(end, TensorProto.FLOAT, None) for end in ends]
    graph = helper.make_graph(nodes, "small", inputs, outputs, constants)
    # An old version of the format, which every ONNX Runtime reads.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8).SerializeToString()


# --- OpenVINO --------------------------------------------------------------------------------------------------------


def _start_openvino(piece, copies, exits, values, threads):
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = _openvino_model(piece, copies, exits, values.shape)
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(values))
    return request.infer


def _openvino_model(piece, copies, exits, shape):
    import openvino
    from openvino import opset13 as ops

    weights = _Weights()

    def layer(x, piece):
        if not piece.kernel_size:
            product = ops.matmul(x, weights(piece.writes, piece.reads), False, True)
            return ops.add(product, weights(1, piece.writes))
        kernel, kind = weights(*_kernel_shape(piece)), "convolution" + "_backprop_data" * piece.transposed
        if piece.groups > 1:
            first, *others = kernel.shape
            kernel, kind = kernel.reshape(piece.groups, first // piece.groups, *others), f"group_{kind}"
        before, after = map(list, zip(*piece.pads, strict=True))
        options = {"strides": list(piece.strides), "pads_begin": before, "pads_end": after}
        y = getattr(ops, kind)(x, kernel, dilations=list(piece.dilation), **options)
        return ops.add(y, weights(1, piece.writes, *(1 for _ in piece.size)))

    inputs = ops.parameter(list(shape), np.float32, name="x")
    x = layer(inputs, _entrance(piece)) if piece.kernel_size else ops.relu(inputs)
    ends, size = ([layer(x, piece) for _ in range(copies)], piece.output_size) if copies else ([x] * exits, piece.size)
    if piece.kernel_size:
        one, zero = [1] * len(size), [0] * len(size)
        ends = [
            ops.max_pool(end, _exit_strides(size, number), one, zero, zero, one).output(0)
            for number, end in enumerate(ends)
        ]
    return openvino.Model(ends if copies or piece.kernel_size else ends[:1], [inputs])


# --- LiteRT ----------------------------------------------------------------------------------------------------------


def _start_litert(piece, copies, exits, values, threads):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=_litert_model(piece, copies, values.shape), num_threads=threads)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values)
    return interpreter.invoke


def _litert_model(piece, copies, shape):
    """Return a .tflite model as bytes. It needs no exits, because channels come last everywhere."""
    file = _Flatbuffer()
    inputs = file.tensor(shape)
    is_flat = len(piece.size) == 2  # LiteRT has no depthwise convolution of volumes
    x = _litert_layer(file, inputs, _entrance(piece)) if is_flat else file.apply("RELU", [inputs], shape)
    return file.pack([inputs], [_litert_layer(file, x, piece) for _ in range(copies)] or [x])


def _litert_layer(file, x, piece):
    """Add a piece to the file and return its output tensor."""
    rows = file.tensors[x].shape[0]
    reads, bias = piece.reads // piece.groups, file.weights(piece.writes)
    if not piece.kernel_size:
        return file.apply("FULLY_CONNECTED", [x, file.weights(piece.writes, reads), bias], [rows, piece.writes])
    shape, is_flat = [rows, *piece.output_size, piece.writes], len(piece.size) == 2
    letters, is_padded = "DHW"[-len(piece.size) :], any(map(any, piece.pads))
    options = {f"stride{letter}": stride for letter, stride in zip(letters, piece.strides, strict=True)}
    if piece.transposed:
        options["padding"] = 0 if is_padded else 1  # SAME or VALID
        kernel = (piece.writes, *piece.kernel_size, reads) if is_flat else (*piece.kernel_size, piece.writes, reads)
        tensors = [file.constant(np.array(shape, np.int32)), file.weights(*kernel), x, bias]
        return file.apply("TRANSPOSE_CONV" if is_flat else "CONV_3D_TRANSPOSE", tensors, shape, **options)
    if is_padded and not piece.has_same_padding:
        zeros = file.constant(np.array([(0, 0), *piece.pads, (0, 0)], np.int32))
        padded = [n + sum(pads) for n, pads in zip(piece.size, piece.pads, strict=True)]
        x, is_padded = file.apply("PAD", [x, zeros], [rows, *padded, piece.reads]), False
    options["padding"] = 0 if is_padded else 1
    options |= {f"dilation{letter}Factor": rate for letter, rate in zip(letters, piece.dilation, strict=True)}
    if piece.is_depthwise and is_flat:
        options["depthMultiplier"] = piece.writes // piece.reads
        tensors = [x, file.weights(1, *piece.kernel_size, piece.writes), bias]
        return file.apply("DEPTHWISE_CONV_2D", tensors, shape, **options)
    kernel = (piece.writes, *piece.kernel_size, reads) if is_flat else (*piece.kernel_size, reads, piece.writes)
    return file.apply("CONV_2D" if is_flat else "CONV_3D", [x, file.weights(*kernel), bias], shape, **options)


class _Flatbuffer:
    """The tensors and operators of a .tflite file, by the classes that LiteRT generates from its schema."""

    # operator -> name of its options in the schema
    OPTIONS = {
        "CONV_2D": "Conv2DOptions",
        "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
        "TRANSPOSE_CONV": "TransposeConvOptions",
        "CONV_3D": "Conv3DOptions",
        "CONV_3D_TRANSPOSE": "Conv3DOptions",
        "FULLY_CONNECTED": "FullyConnectedOptions",
        "PAD": "PadOptions",
    }
    VERSIONS = {"DEPTHWISE_CONV_2D": 2, "TRANSPOSE_CONV": 3, "CONV_2D": 2}  # those with dilation or a bias

    def __init__(self):
        from ai_edge_litert import schema_py_generated

        self.schema, self.draw = schema_py_generated, _Weights()
        self.tensors, self.operators, self.kinds = [], [], {}
        self.buffers = [self.schema.BufferT()]  # the first is empty, for tensors that are computed

    def tensor(self, shape, array=None):
        """Add a tensor, a constant one if an array is given, and return its number."""
        tensor, types = self.schema.TensorT(), self.schema.TensorType
        tensor.shape, tensor.buffer, tensor.name = list(map(int, shape)), 0, f"t{len(self.tensors)}"
        tensor.type = types.FLOAT32 if array is None or array.dtype == np.float32 else types.INT32
        if array is not None:
            tensor.buffer = len(self.buffers)
            self.buffers.append(self.schema.BufferT())
            self.buffers[-1].data = np.frombuffer(array.tobytes(), np.uint8)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, array):
        return self.tensor(array.shape, array)

    def weights(self, *shape):
        return self.constant(self.draw(*shape))

    def apply(self, kind, inputs, shape, **options):
        """Add an operator with one output of this shape and return the number of that tensor."""
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self.kinds.setdefault(kind, len(self.kinds))
        operator.inputs, operator.outputs = list(inputs), [self.tensor(shape)]
        name = self.OPTIONS.get(kind)
        if name:
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, name)
            operator.builtinOptions = getattr(self.schema, f"{name}T")()
        for key, value in options.items():
            setattr(operator.builtinOptions, key, value)
        self.operators.append(operator)
        return operator.outputs[0]

    def pack(self, inputs, outputs):
        """Return the file as bytes."""
        graph, model = self.schema.SubGraphT(), self.schema.ModelT()
        graph.tensors, graph.operators, graph.inputs, graph.outputs = self.tensors, self.operators, inputs, outputs
        model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [graph], self.buffers, []
        for kind in self.kinds:
            code = self.schema.OperatorCodeT()
            code.builtinCode = getattr(self.schema.BuiltinOperator, kind)
            code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), self.VERSIONS.get(kind, 1)
            model.operatorCodes.append(code)
        builder = self.schema.flatbuffers.Builder(1 << 16)  # the package that the schema's classes are written with
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


_ENGINES = {"onnxruntime": _start_onnxruntime, "openvino": _start_openvino, "litert": _start_litert}
