"""Even out the ranges of channels between linear layers, before a network is quantized.

int8 has one scale for all channels of an array of activations. If one channel reaches 100 and another 0.1, the second
is rounded to zero. Between two linear layers, a channel can be divided by s in the first and multiplied by s in the
second; the network then computes the same (cross-layer equalization: Nagel et al. 2019, arXiv 1906.04721). A
factorized layer is a chain of two to four linear layers.
"""

import keras
import numpy as np
from keras import layers

from fcnn_utils import keras_graph
from fcnn_utils._calibration_inputs import batches

_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SCALABLE = (layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.Dense, *_TRANSPOSED, *_DEPTHWISE)
_PADDINGS = (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D)
_IMAGES = 64  # to measure ranges with; they need not be exact
_FLOOR = 1e-3  # of the largest range: a channel below is taken to reach this far


def equalize(model, inputs):
    """Even out the ranges between the linear layers of a model. In place.

    A channel with the range a, read by weights up to w, is divided by s = √(a / w), so that both have equal ranges. A
    depthwise layer has a scale for each channel of its weights; in front of it s = a, and all channels get one range.

    Args:
        model: functional or Sequential.
        inputs: list of arrays, as from `calibration.check_images`.

    Returns:
        list of (path, path), the pairs of layers that were changed.
    """
    pairs = _linear_pairs(model)
    part = [x[:_IMAGES] for x in inputs]
    ranges = [_channel_ranges(model, second, part) for _, second in pairs]  # before anything changes
    for (first, second), reached in zip(pairs, ranges, strict=True):
        scale = _with_floor(reached)
        if not _is_depthwise(second.layer):
            scale = np.sqrt(scale / _with_floor(_weight_ranges(second.layer)))
        scale /= np.exp(np.log(scale).mean())
        _scale_output(first.layer, 1 / scale)
        _scale_input(second.layer, scale)
    return [(first.path, second.path) for first, second in pairs]


def _linear_pairs(model):
    """Return pairs of nodes: a linear layer, and a layer that is the only one to read its output."""
    nodes = {id(node.layer): node for node in keras_graph.layer_nodes(model)}
    pairs = []
    for second in nodes.values():
        if not _is_scalable(second):
            continue
        first, read_by = nodes.get(id(second.producers[0])), second
        if first is not None and type(first.layer) in _PADDINGS and _has_one_reader(first, second):
            first, read_by = nodes.get(id(first.producers[0])), first  # zeros stay zeros
        if first is None or not _is_scalable(first) or not _has_one_reader(first, read_by):
            continue
        if keras_graph.has_linear_activation(first.layer):
            pairs.append((first, second))
    return pairs


def _is_scalable(node):
    layer = node.layer
    is_usual = type(layer) in _SCALABLE and getattr(layer, "data_format", "channels_last") == "channels_last"
    return is_usual and len(node.calls) == 1 and not getattr(layer, "lora_enabled", False)


def _has_one_reader(node, reader):
    return len(node.calls) == 1 and len(node.consumers) == 1 and node.consumers[0] is reader.layer


def _is_depthwise(layer):
    return type(layer) in _DEPTHWISE or (layer.kernel.shape[-2] == 1 and getattr(layer, "groups", 1) > 1)


def _channel_ranges(model, node, inputs):
    """Return the largest absolute value of each channel that a layer reads, (S,)."""
    reader = keras_graph.input_model(model, node.path)
    (batch,) = batches(model, inputs, len(inputs[0]))
    values = np.abs(keras.ops.convert_to_numpy(keras.tree.flatten(reader(batch, training=False))[0]))
    return values.reshape(-1, values.shape[-1]).max(axis=0).astype(np.float64)


def _weight_ranges(layer):
    """Return the largest absolute weight that reads each input channel, (S,)."""
    kernel = np.abs(np.asarray(layer.get_weights()[0], np.float64))
    kernel = np.swapaxes(kernel, -1, -2) if type(layer) in _TRANSPOSED else kernel
    groups, filters = getattr(layer, "groups", 1), kernel.shape[-1]
    kernel = kernel.reshape(-1, kernel.shape[-2], groups, filters // groups)  # (space, S / G, G, T / G)
    return kernel.max(axis=(0, 3)).T.ravel()


def _with_floor(ranges):
    """Return ranges without very small ones; channels that are always 0 get the largest."""
    largest = ranges.max(initial=0.0) or 1.0
    return np.where(ranges == 0, largest, np.maximum(ranges, _FLOOR * largest))


def _scale_output(layer, scale):
    """Multiply each output channel of a layer by `scale` (T,)."""
    kernel, *bias = layer.get_weights()
    if type(layer) in _DEPTHWISE:
        factor = scale.reshape(kernel.shape[-2:])
    else:
        factor = scale[:, None] if type(layer) in _TRANSPOSED else scale
    layer.set_weights([kernel * factor, *(value * scale for value in bias)])


def _scale_input(layer, scale):
    """Multiply the weights that read each input channel by `scale` (S,)."""
    kernel, *bias = layer.get_weights()
    if type(layer) in _DEPTHWISE:
        factor = scale[:, None]
    elif type(layer) in _TRANSPOSED:
        factor = scale
    else:
        groups = getattr(layer, "groups", 1)
        factor = np.repeat(scale.reshape(groups, -1), kernel.shape[-1] // groups, axis=0).T  # (S / G, T)
    layer.set_weights([kernel * factor, *bias])
