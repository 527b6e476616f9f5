"""Count what a network costs, layer by layer: parameters, MACs and activation bytes.

1 MAC is one multiply-add; FLOPs = 2 × MACs. A kernel position that overlaps the border counts in full,
as in TensorFlow's profiler. Operations that are not MACs are counted separately, in `other_ops`: one for
each bias addition, each activated value and each addition of a merge layer, two for each normalised or
rescaled value (scale and shift), and one for each input value that a pooling window reads. Other layers
without weights count 0, and so do operations of `keras.ops` between layers.
"""

import math

import keras
import numpy as np
import pandas as pd
from keras import layers

from fcnn_utils import keras_graph

_SUMMED = ["params", "trainable", "macs", "other_ops", "activation_bytes"]
COLUMNS = ["layer", "kind", "output_shape", *_SUMMED]

_POOLING = (layers.MaxPooling2D, layers.AveragePooling2D)
_GLOBAL_POOLING = (layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D)
_MERGES = (layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum)


def layer_costs(model):
    """Count the cost of one image's forward pass, with a row for each call of a layer and a row "total".

    Rows are in the order of the model. A layer that is called several times has its parameters in the
    first of its rows. The columns:

        layer             name of the layer
        kind              its class
        output_shape      of one image, without the batch axis
        params            number of weights, those of batch-norm statistics included
        trainable         number of trainable weights
        macs              multiply-adds
        other_ops         operations that are not multiply-adds (see the module)
        activation_bytes  size of the output in the compute dtype; its total is a sum, not a peak

    Args:
        model: built, functional or Sequential.

    Returns:
        DataFrame with these columns.

    Raises:
        ValueError: the cost of a layer with weights is not known here, or the model is not a graph of layers
            on images of a fixed size.
    """
    rows = [
        _row(node.layer, inputs, output, first=number == 0)
        for node in keras_graph.layer_nodes(model)
        for number, (inputs, output) in enumerate(node.calls)
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    total = {"layer": "total", "kind": "", "output_shape": table["output_shape"].iloc[-1], **table[_SUMMED].sum()}
    return pd.concat([table, pd.DataFrame([total])], ignore_index=True)


def total_costs(model):
    """Return the total row of `layer_costs` as a dict: params, trainable, macs, other_ops, activation_bytes."""
    row = layer_costs(model).iloc[-1]
    return {key: int(row[key]) for key in _SUMMED}


def node_macs(node):
    """Count a layer's MACs for one image, all its calls together.

    Args:
        node: `keras_graph.LayerNode`.

    Raises:
        ValueError: as `layer_costs`.
    """
    rows = [_row(node.layer, inputs, output, first=False) for inputs, output in node.calls]
    return sum(row[COLUMNS.index("macs")] for row in rows)


def convolution_macs(output_shape, kernel_shape):
    """Count a convolution's MACs: each output position takes one product with each weight of the kernel.

    Args:
        output_shape: (height, width) of the output.
        kernel_shape: (kh, kw, S / groups, T), or (kh, kw, S, multiplier) if the convolution is depthwise.
    """
    return math.prod(output_shape) * math.prod(kernel_shape)


def value_bytes(dtype):
    """Return the bytes of one value of a layer's `compute_dtype` or `variable_dtype`."""
    return np.dtype("uint16" if "float16" in dtype else dtype).itemsize  # NumPy has no bfloat16


def _row(layer, inputs, output, first):
    """Make the row of one call; only the `first` call has the layer's parameters."""
    shape = output[1:]
    if None in shape:
        raise ValueError(f"layer {layer.name!r} has the output shape {shape}: give the model images of a fixed size")
    macs, other_ops = _operations(layer, [one[1:] for one in inputs], shape)
    params, trainable = (_count(layer.weights), _count(layer.trainable_weights)) if first else (0, 0)
    size = math.prod(shape) * value_bytes(layer.compute_dtype)
    return layer.name, type(layer).__name__, shape, params, trainable, macs, other_ops, size


def _operations(layer, inputs, shape):
    """Return (MACs, other operations) of one call for one image."""
    size = math.prod(shape)
    if isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)):
        positions = shape[:-1] if layer.data_format == "channels_last" else shape[1:]
        if isinstance(layer, layers.SeparableConv2D):
            kernels = [layer.depthwise_kernel, layer.pointwise_kernel]
        else:
            kernels = [layer.kernel]
        return sum(convolution_macs(positions, kernel.shape) for kernel in kernels), size * _extras(layer)
    if isinstance(layer, layers.Dense):
        return convolution_macs(shape[:-1], layer.kernel.shape), size * _extras(layer)
    if isinstance(layer, (layers.BatchNormalization, layers.Normalization, layers.Rescaling)):
        return 0, 2 * size
    if isinstance(layer, _POOLING):
        return 0, size * math.prod(layer.pool_size)
    if isinstance(layer, _GLOBAL_POOLING):
        return 0, math.prod(inputs[0])
    if isinstance(layer, _MERGES):
        return 0, size * (len(inputs) - 1)
    if isinstance(layer, (layers.Activation, layers.ReLU, layers.LeakyReLU, layers.Softmax)):
        return 0, size
    if not layer.weights:  # it only moves values, as Flatten, or does nothing at inference, as Dropout
        return 0, 0
    known = "Conv2D, DepthwiseConv2D, SeparableConv2D, Dense, BatchNormalization, Normalization"
    raise ValueError(
        f"layer {layer.name!r} is a {type(layer).__name__}; the cost of layers with weights is known for {known}"
    )


def _extras(layer):
    """Count the operations on each output value that are not MACs: the bias and the activation."""
    return layer.use_bias + (layer.activation is not keras.activations.linear)


def _count(weights):
    return sum(math.prod(weight.shape) for weight in weights)
