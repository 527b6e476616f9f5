"""What a network costs by count: parameters, MACs and activation bytes, layer by layer.

Convention, for the whole course: 1 MAC is one multiplication with its addition, FLOPs = 2 × MACs. Positions where
a kernel hangs over the border count in full (as TensorFlow's profiler counts them). What is no MAC is counted
apart, in `other_ops`: one a bias addition, two a batch-normalised value (scale and shift), one an activated value,
one an input value that a pooling window reads.
"""

import math

import keras
import numpy as np
import pandas as pd
from keras import layers

from fcnn_utils import keras_graph

COLUMNS = ["layer", "kind", "output_shape", "params", "trainable", "macs", "other_ops", "activation_bytes"]

_FREE = (  # layers without weights, which move values or do nothing at inference
    layers.Reshape,
    layers.Flatten,
    layers.Permute,
    layers.Dropout,
    layers.SpatialDropout2D,
    layers.ZeroPadding2D,
    layers.Cropping2D,
    layers.UpSampling2D,
    layers.Concatenate,
    layers.Identity,
)
_POOLING = (layers.MaxPooling2D, layers.AveragePooling2D)
_GLOBAL_POOLING = (layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D)
_MERGES = (layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum)


def layer_costs(model):
    """Cost of one image's forward pass: a row for each call of a layer, in the order of the model, and a row "total".

    A layer that is called more than once has its weights in the first of its rows. The columns:

        layer             its name
        kind              its class
        output_shape      of one image, without the batch axis
        params            number of weights
        trainable         how many of them are trained
        macs              multiply-adds
        other_ops         operations that are no multiply-adds (see the module)
        activation_bytes  size of the output

    Args:
        model: built, functional or sequential.

    Returns:
        DataFrame with these columns.

    Raises:
        ValueError: a layer has weights and is none of those counted here, or the model is no graph of layers on
            images of a fixed size.
    """
    rows = [
        _row(place.layer, inputs, output, number)
        for place in keras_graph.layer_nodes(model)
        for number, (inputs, output) in enumerate(place.calls)
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    sums = table[["params", "trainable", "macs", "other_ops", "activation_bytes"]].sum()
    total = {"layer": "total", "kind": "", "output_shape": table["output_shape"].iloc[-1], **sums}
    return pd.concat([table, pd.DataFrame([total])], ignore_index=True)


def total_costs(model):
    """Dict of the total row: params, trainable, macs, other_ops, activation_bytes. ValueError as `layer_costs`."""
    row = layer_costs(model).iloc[-1]
    return {key: int(row[key]) for key in ("params", "trainable", "macs", "other_ops", "activation_bytes")}


def convolution_macs(output_shape, kernel_shape):
    """MACs of a convolution: every output position takes one product with every weight of the kernel.

    Args:
        output_shape: (height, width) of the output.
        kernel_shape: of the weights, (kh, kw, S / groups, T), or (kh, kw, S, multiplier) for a depthwise one.
    """
    return math.prod(output_shape) * math.prod(kernel_shape)


def node_macs(place):
    """MACs of a layer (`keras_graph.LayerNode`) for one image, all its calls together; ValueError where that is not known."""
    rows = [_row(place.layer, inputs, output, 0) for inputs, output in place.calls]
    return sum(row[COLUMNS.index("macs")] for row in rows)


def value_bytes(dtype):
    """Bytes of one value of a layer's `compute_dtype` or `variable_dtype`; NumPy has no bfloat16."""
    return np.dtype("uint16" if "float16" in dtype else dtype).itemsize


def _row(layer, inputs, output, number):
    shape = output[1:]
    if None in shape:
        raise ValueError(f"layer {layer.name!r} has the output shape {shape}: give the model images of a fixed size")
    macs, other_ops = _operations(layer, [one[1:] for one in inputs], shape)
    params, trainable = (0, 0) if number else (_count(layer.weights), _count(layer.trainable_weights))
    size = math.prod(shape) * value_bytes(layer.compute_dtype)
    return layer.name, type(layer).__name__, shape, params, trainable, macs, other_ops, size


def _operations(layer, inputs, shape):
    """(MACs, other operations) of one layer for one image."""
    size = math.prod(shape)
    if isinstance(layer, layers.SeparableConv2D):
        depthwise = math.prod(layer.depthwise_kernel.shape)
        pointwise = math.prod(layer.pointwise_kernel.shape)
        return _positions(layer, shape) * (depthwise + pointwise), size * (layer.use_bias + _activates(layer))
    if isinstance(layer, layers.Conv2DTranspose):
        return _unknown(layer)  # a subclass of the convolution's base, but it counts by input positions
    if isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D)):
        macs = _positions(layer, shape) * math.prod(layer.kernel.shape)
        return macs, size * (layer.use_bias + _activates(layer))
    if isinstance(layer, layers.Dense):
        macs = math.prod(shape[:-1]) * math.prod(layer.kernel.shape)
        return macs, size * (layer.use_bias + _activates(layer))
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
    if isinstance(layer, _FREE) or not layer.weights:
        return 0, 0
    return _unknown(layer)


def _unknown(layer):
    known = "Conv2D, DepthwiseConv2D, SeparableConv2D, Dense, BatchNormalization, Normalization"
    raise ValueError(
        f"layer {layer.name!r} is a {type(layer).__name__}; the cost of layers with weights is known for {known}"
    )


def _positions(layer, shape):
    return math.prod(shape[:-1] if layer.data_format == "channels_last" else shape[1:])


def _activates(layer):
    return layer.activation is not keras.activations.linear


def _count(weights):
    return sum(math.prod(weight.shape) for weight in weights)
