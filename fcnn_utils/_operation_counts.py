"""Count the multiply-adds (MACs) and the other operations of one call, for one image: the rules behind `cost`.

A layer of Keras or a function of `keras.ops` has a rule below. A composite layer, such as an attention or a
user's own class, is traced: its `call` becomes a graph, and the calls in it are counted. What has neither a
rule nor a graph has NaN as its MACs. The batch counts as one image.
"""

import math
import re

import keras
from keras import layers

from fcnn_utils import _trace, keras_graph

_UNKNOWN = (math.nan, 0)
# Functions of keras.ops that move or create values.
_MOVES = """
    Append Arange Array BroadcastTo Cast Concatenate ConvertToTensor Copy CropImages DepthToSpace Diag Diagonal
    Dstack EmptyLike ExpandDims ExtractPatches Flip Full FullLike GetItem Hstack Identity Meshgrid Moveaxis Ndim
    OneHot OnesLike Pad PadImages Ravel Repeat Reshape Roll Rot90 SaturateCast Size Slice SpaceToDepth Split Squeeze
    Stack StopGradient Swapaxes Take TakeAlongAxis Tile Transpose Tril Triu Unfold Unstack View Vstack ZerosLike
"""
# Functions of the modules `numpy` and `nn` that are neither elementwise nor reductions.
_NOT_ELEMENTWISE = """
    Argpartition Argsort AveragePool Corrcoef Correlate CTCDecode CTCLoss Cross Histogram Kron MaxPool Median Nanmedian
    Percentile Quantile SearchSorted Slogdet Sort Unique Vander
"""


class SizeNotFixed(ValueError):
    """An axis besides the batch is not fixed."""


def count(operation, args, kwargs, outputs):
    """Return (MACs, other operations) of one call; MACs are NaN if they are not known.

    Args:
        operation: keras.Operation; a layer is one.
        args, kwargs: of the call; Keras tensors stand for values.
        outputs: list of Keras tensors.

    Raises:
        SizeNotFixed: an axis besides the batch is not fixed.
    """
    reads = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
    inputs, output = [shape_of(x)[1:] for x in reads], shape_of(outputs[0])[1:]
    if not isinstance(operation, keras.Layer):
        return _count_function(operation, args, reads, outputs)
    if keras_graph.is_graph(operation):
        return _total(keras_graph.operation_calls(operation, reads))
    rule = _RULES.get(type(operation))
    if rule is not None:
        return rule(operation, inputs, output)
    is_stock = type(operation) is getattr(layers, type(operation).__name__, None)
    if is_stock and not operation.weights and not isinstance(operation, (*_TRACED, layers.Lambda)):
        return 0, 0  # most only move values, as Flatten, or do nothing at inference, as Dropout
    graph = _trace.trace_layer(operation, args, kwargs)
    try:
        return _UNKNOWN if graph is None else _total(keras_graph.operation_calls(graph))
    except SizeNotFixed:  # inside
        return _UNKNOWN


def shape_of(x):
    """Return the shape of a Keras tensor or an array, with one image as the batch; raise SizeNotFixed."""
    shape = tuple(x.shape)
    if None in shape[1:]:
        raise SizeNotFixed(f"the shape {shape[1:]} is not fixed: build the model with a fixed input size")
    return (1, *shape[1:]) if shape and shape[0] is None else shape


def convolution_macs(output_shape, kernel_shape):
    """Count a convolution's MACs: each output position takes one product with each weight of the kernel.

    Args:
        output_shape: spatial sizes of the output; those of the input, if the convolution is transposed.
        kernel_shape: (*kernel_size, S / groups, T), or (*kernel_size, S, multiplier) if it is depthwise.
    """
    return math.prod(output_shape) * math.prod(kernel_shape)


def _total(calls):
    counts = [count(call.operation, call.args, call.kwargs, call.outputs) for call in calls]
    return tuple(map(sum, zip(*counts, strict=True))) if counts else (0, 0)


# --- layers ----------------------------------------------------------------------------------------------------------


def _convolution(layer, inputs, output):
    shape = inputs[0] if "Transpose" in type(layer).__name__ else output
    positions = shape[:-1] if layer.data_format == "channels_last" else shape[1:]
    if isinstance(layer, (layers.SeparableConv1D, layers.SeparableConv2D)):
        kernels = [layer.depthwise_kernel.shape, layer.pointwise_kernel.shape]
    elif isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D)):
        kernels = [layer.kernel.shape]
    else:  # from the configuration: a quantized kernel may be packed
        channels = inputs[0][-1 if layer.data_format == "channels_last" else 0]
        kernels = [(*layer.kernel_size, channels // getattr(layer, "groups", 1), layer.filters)]
    return sum(convolution_macs(positions, kernel) for kernel in kernels), math.prod(output) * _extras(layer)


def _dense(layer, inputs, output):
    return math.prod(output) * inputs[0][-1], math.prod(output) * _extras(layer)


def _einsum_dense(layer, inputs, output):
    reads, _, writes = re.split(",|->", layer.equation)  # all letters of the kernel are in the two others
    return _einsum_macs([reads, writes], [(1, *inputs[0]), (1, *output)]), math.prod(output) * _extras(layer)


def _extras(layer):
    """Count the operations on each output value that are not MACs: the bias and the activation."""
    use_bias = layer.bias_axes is not None if isinstance(layer, layers.EinsumDense) else layer.use_bias
    return use_bias + (layer.activation is not keras.activations.linear)


def _pooling(layer, inputs, output):
    return 0, math.prod(output) * math.prod(layer.pool_size)


def _recurrent(layer, inputs, output):
    """Each step multiplies the kernels of each cell once; a ConvLSTM convolves with them."""
    cells = getattr(layer.cell, "cells", [layer.cell])
    if not all(hasattr(cell, "kernel") and hasattr(cell, "recurrent_kernel") for cell in cells):
        return _UNKNOWN
    steps, *size = inputs[0]
    axes, positions = len(size) - 1, 1
    if axes:  # the positions of the state, which are those of the output
        last = layer.cell.data_format == "channels_last"
        positions = math.prod(output[-axes - 1 : -1] if last else output[-axes:])
    weights = sum(math.prod(kernel.shape) for cell in cells for kernel in (cell.kernel, cell.recurrent_kernel))
    return steps * positions * weights, 0


def _bidirectional(layer, inputs, output):
    both = [_recurrent(one, inputs, output) for one in (layer.forward_layer, layer.backward_layer)]
    return tuple(map(sum, zip(*both, strict=True)))


def _time_distributed(layer, inputs, output):
    x = keras.KerasTensor((None, *inputs[0][1:]), layer.compute_dtype)
    spec = keras.tree.flatten(layer.layer.compute_output_spec(x))
    macs, other_ops = count(layer.layer, (x,), {}, spec)
    return inputs[0][0] * macs, inputs[0][0] * other_ops


def _attention(layer, inputs, output):
    """Project queries, keys and values, compare each query with each key, sum the values, project the sums."""
    queries, keys = (math.prod(shape[:-1]) for shape in inputs[:2])
    projections = [layer._query_dense, layer._key_dense, layer._value_dense, layer._output_dense]
    weights = [math.prod(projection.kernel.shape) for projection in projections]
    heads, size = layer._query_dense.kernel.shape[-2:]
    scores = queries * keys * heads * (size + layer._value_dense.kernel.shape[-1])
    return queries * (weights[0] + weights[3]) + keys * (weights[1] + weights[2]) + scores, 0


def _kinds(pattern):
    """Return the layer classes of one to three dimensions, as far as Keras has them."""
    found = (getattr(layers, pattern.format(f"{n}D"), None) for n in (1, 2, 3))
    return [kind for kind in found if kind is not None]


_CONVOLUTIONS = [k for p in ("Conv{}", "Conv{}Transpose", "DepthwiseConv{}", "SeparableConv{}") for k in _kinds(p)]
_MERGES = [layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum]
_NORMS = [layers.BatchNormalization, layers.Normalization, layers.Rescaling, layers.LayerNormalization]
_NORMS += [layers.GroupNormalization, layers.UnitNormalization, layers.RMSNormalization]
_ACTIVATIONS = [layers.Activation, layers.ReLU, layers.LeakyReLU, layers.PReLU, layers.ELU, layers.Softmax]
_TRACED = (layers.Dot, layers.Attention, layers.AdditiveAttention)
_RULES = {
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_kinds("MaxPooling{}") + _kinds("AveragePooling{}"), _pooling),
    **dict.fromkeys(
        _kinds("GlobalMaxPooling{}") + _kinds("GlobalAveragePooling{}"),
        lambda layer, inputs, output: (0, math.prod(inputs[0])),
    ),
    **dict.fromkeys(_NORMS, lambda layer, inputs, output: (0, 2 * math.prod(output))),
    **dict.fromkeys(_MERGES, lambda layer, inputs, output: (0, math.prod(output) * (len(inputs) - 1))),
    **dict.fromkeys(_ACTIVATIONS, lambda layer, inputs, output: (0, math.prod(output))),
    **dict.fromkeys([layers.LSTM, layers.GRU, layers.SimpleRNN, layers.RNN, *_kinds("ConvLSTM{}")], _recurrent),
    layers.Dense: _dense,
    layers.EinsumDense: _einsum_dense,
    layers.Embedding: lambda layer, inputs, output: (0, 0),
    layers.Bidirectional: _bidirectional,
    layers.MultiHeadAttention: _attention,
    layers.GroupQueryAttention: _attention,
    layers.TimeDistributed: _time_distributed,
}


# --- functions of keras.ops ------------------------------------------------------------------------------------------


def _count_function(operation, args, reads, outputs):
    """Count a call of a function of keras.ops; arrays among its arguments, such as kernels, have shapes too."""
    arrays = [x for x in keras.tree.flatten(args) if hasattr(x, "shape")] or reads
    shapes, output = [shape_of(x) for x in arrays], shape_of(outputs[0])
    name, module = type(operation).__name__, type(operation).__module__
    if name in _PRODUCTS:
        return _PRODUCTS[name](operation, shapes, output), 0
    if name in _MOVES.split():
        return 0, 0
    if module in ("keras.src.ops.numpy", "keras.src.ops.nn") and name not in _NOT_ELEMENTWISE.split():
        return 0, max(math.prod(shape) for shape in (*shapes, output))
    return _UNKNOWN


def _einsum_macs(terms, shapes):
    """Each combination of index values is one product of n operands, which takes n − 1 MACs, at least 1."""
    sizes, batch = {}, 1
    for term, shape in zip(terms, shapes, strict=True):
        left, dots, right = term.partition("...")
        if dots:
            batch = max(batch, math.prod(shape[len(left) : len(shape) - len(right)]))
            shape = shape[: len(left)] + shape[len(shape) - len(right) :]
        sizes |= dict(zip(left + right, shape, strict=True))
    return batch * math.prod(sizes.values()) * max(1, len(terms) - 1)


def _tensordot_macs(operation, shapes, output):
    axes = operation.axes
    first = range(-axes, 0) if isinstance(axes, int) else keras.tree.flatten(axes[0])
    return math.prod(output) * math.prod(shapes[0][axis] for axis in first)


def _conv_macs(shape_index):
    """Make the rule of a convolution that has the positions of its input (0) or output (-1)."""

    def macs(operation, shapes, output):
        shape = (shapes[0], output)[shape_index]
        last = (operation.data_format or keras.config.image_data_format()) == "channels_last"
        positions = shape[1:-1] if last else shape[2:]
        return sum(convolution_macs(positions, kernel) for kernel in shapes[1:])

    return macs


_PRODUCTS = {
    "Matmul": lambda operation, shapes, output: math.prod(output) * shapes[0][-1],
    "Dot": lambda operation, shapes, output: math.prod(output) * shapes[0][-1],
    "Inner": lambda operation, shapes, output: math.prod(output) * shapes[0][-1],
    "Vdot": lambda operation, shapes, output: math.prod(shapes[0]),
    "Tensordot": _tensordot_macs,
    "Einsum": lambda operation, shapes, output: _einsum_macs(
        operation.subscripts.replace(" ", "").split("->")[0].split(","), shapes
    ),
    "Conv": _conv_macs(-1),
    "DepthwiseConv": _conv_macs(-1),
    "SeparableConv": _conv_macs(-1),
    "ConvTranspose": _conv_macs(0),
    # (batch, queries, heads, size) and (batch, keys, heads, size): the scores, and their sums of the values
    "DotProductAttention": lambda operation, shapes, output: (
        math.prod(shapes[0][:-1]) * shapes[1][1] * (shapes[0][-1] + shapes[2][-1])
    ),
}
