"""Fold batch normalisations into the weights of the layers before or behind them."""

import numpy as np
import pandas as pd
from keras import layers

from fcnn_utils import keras_graph
from fcnn_utils._conv_options import same_padding

# Layers whose kernel has the output channels in the last axis, in the last two, or in the last but one. A subclass may
# compute something else, so only these very classes are folded into.
_LAST = (layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.SeparableConv1D, layers.SeparableConv2D, layers.Dense)
_LAST_TWO = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_LAST_BUT_ONE = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_FOLDABLE = _LAST + _LAST_TWO + _LAST_BUT_ONE
_DEPTHWISE_FIRST = (*_LAST_TWO, layers.SeparableConv1D, layers.SeparableConv2D)  # their first kernel is (*size, S, M)


def fold_batch_norm(model, dtype=None, *, report=False):
    """Copy a model for inference, with each batch normalisation folded into a layer beside it.

    A normalisation after a convolution or a dense layer becomes part of that layer's weights:

        y = γ (W x + b − μ) / √(σ² + ε) + β  =  (γ / √(σ² + ε)) W x + γ (b − μ) / √(σ² + ε) + β

    The layer must be a channels-last convolution or Dense of Keras, without activation, LoRA and quantization.
    Only the normalisation may read its output. Both must be called exactly once. The normalisation must be over the
    last axis, and must not be called with `training=True`. Several normalisations in a row fold one after another.

    If that is not possible, a normalisation is folded into such a layer after it, which may have an activation:

        W (a x + s) + b  =  (W a) x + (W s + b),    a = γ / √(σ² + ε),    s = β − a μ

    This layer must be the only one that reads the normalisation. A convolution does not shift its padding zeros by s.
    Therefore it must have no padding, or s must be 0. The outputs of a transposed convolution use different parts of
    its kernel. Therefore s must be 0, unless its kernel size and strides are 1.

    Other normalisations stay. The outputs are equal up to rounding. Do not train the new model.

    Args:
        model: built, functional or Sequential (see `keras_graph.check_graph`).
        dtype: dtype policy of the new layers, such as "float32" to leave mixed precision; default: each
            keeps its own.
        report: return a table, too.

    Returns:
        keras.Model, not compiled, that shares nothing with `model`. With `report`, a pair of it and a DataFrame
        (layer, folded_into, reason) with a row for each normalisation; `reason` says why it was left.

    Raises:
        ValueError: `check_graph` refuses the model, a layer cannot be copied, or `dtype` is given and a layer
            is quantized.
    """
    model = keras_graph.check_graph(model)
    if dtype is not None:
        model = keras_graph.rebuild(model, {}, dtype=dtype)
    nodes = {id(node.layer): node for node in keras_graph.layer_nodes(model)}
    norms = [node for node in nodes.values() if isinstance(node.layer, layers.BatchNormalization)]
    behind, reasons = _fold_backward(nodes, norms)
    in_front = _fold_forward(nodes, [norm for norm in norms if id(norm.layer) not in behind], reasons)
    into = behind | in_front
    folded = {id(target.layer): (target, [], []) for target in into.values()}
    for place, found in enumerate((in_front, behind), start=1):
        for key, target in found.items():
            folded[id(target.layer)][place].append(nodes[key].layer)
    chains = {key: [_fold(*parts)] for key, parts in folded.items()}
    new = keras_graph.rebuild(model, chains | {key: [] for key in into})
    rows = [(norm.path, getattr(into.get(id(norm.layer)), "path", ""), reasons[id(norm.layer)]) for norm in norms]
    return (new, pd.DataFrame(rows, columns=["layer", "folded_into", "reason"])) if report else new


def _fold_backward(nodes, norms):
    """Find normalisations that can be folded into the layer before them.

    Args:
        nodes: dict id of a layer -> its node.
        norms: nodes of the normalisations, in the order of the model.

    Returns:
        dict id of such a normalisation -> node of the layer, the nearest to the layer first; and dict id of each
        normalisation -> why it can't be folded so, or "".
    """
    into, reasons = {}, {}
    for norm in norms:
        key, read = id(norm.layer), id(norm.producers[0])
        target = into.get(read, nodes.get(read))
        reasons[key] = _obstacle(norm, nodes.get(read), target)
        if not reasons[key]:
            into[key] = target
    return into, reasons


def _fold_forward(nodes, norms, reasons):
    """Find normalisations that can be folded into the layer behind them, and add to `reasons` why others can't.

    Arguments and result are as in `_fold_backward`.
    """
    into = {}
    for norm in reversed(norms):
        key, reader = id(norm.layer), id(norm.consumers[0]) if norm.consumers else None
        target = into.get(reader, nodes.get(reader))
        if _own_obstacle(norm) or target is None or type(target.layer) not in _FOLDABLE:
            continue
        reason = _forward_obstacle(norm, nodes[reader], target)
        reasons[key] = f"{reasons[key]}; {reason}" if reason else ""
        if not reason:
            into[key] = target
    return into


def _own_obstacle(norm):
    """Return why a normalisation can't be folded into any layer, "" if it can."""
    if type(norm.layer) is not layers.BatchNormalization:
        return f"it is a {type(norm.layer).__name__}, a subclass, which may compute something else"
    if len(norm.calls) > 1:
        return "it is called several times"
    if not norm.is_channel_norm:
        return "it does not normalise the last axis"
    if any(norm.training):  # then it normalises by the batch, not by its moving statistics
        return "it is called with training=True"
    return ""


def _obstacle(norm, before, target):
    """Return why a normalisation can't be folded into the layer before it, "" if it can.

    `before` is the node of what it reads, `target` that of the layer whose weights would take it: the same, unless a
    folded normalisation lies between.
    """
    if _own_obstacle(norm):
        return _own_obstacle(norm)
    if target is None or type(target.layer) not in _FOLDABLE:
        kind = "an input or an operation" if target is None else type(target.layer).__name__
        return f"it reads {kind}, not a convolution or dense layer of Keras"
    layer = target.layer
    refusals = {
        f"{layer.name} has an activation": not keras_graph.has_linear_activation(layer),
        **_refusals(layer),
        f"{before.path} is called or read several times": not len(before.calls) == len(before.consumers) == 1,
    }
    return next((reason for reason, holds in refusals.items() if holds), "")


def _forward_obstacle(norm, behind, target):
    """Return why a normalisation can't be folded into the layer behind it, "" if it can.

    `behind` is the node of what reads it, `target` that of the layer whose weights would take it (see `_obstacle`).
    """
    layer, (_, shift) = target.layer, _scale_and_shift(norm.layer)
    refusals = _refusals(layer) | {
        f"{behind.path} is called several times": not len(behind.calls) == len(target.calls) == 1,
        "several layers read it": len(norm.consumers) > 1,
        "it reads integers": "float" not in norm.layer.input.dtype,
        f"{layer.name} would have to shift each place by itself": shift.any() and not _shifts_evenly(target),
    }
    return next((reason for reason, holds in refusals.items() if holds), "")


def _refusals(layer):
    """Return dict reason -> whether it keeps a layer from taking a normalisation."""
    return {
        f"{layer.name} has its channels first": getattr(layer, "data_format", "channels_last") != "channels_last",
        f"{layer.name} has a LoRA": getattr(layer, "lora_enabled", False),
        f"{layer.name} is quantized": keras_graph.is_quantized(layer),
    }


def _shifts_evenly(node):
    """Return whether a constant, added to what a layer reads, changes its output by the same at every position."""
    layer, sizes = node.layer, node.calls[0][0][0][1:-1]
    if isinstance(layer, layers.Dense):
        return True
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    if type(layer) in _LAST_BUT_ONE:
        return {*spans, *layer.strides} == {1}
    if layer.padding == "valid" or set(spans) == {1}:
        return True
    if layer.padding == "causal" or None in sizes:
        return False
    return all(same_padding(*each) == (0, 0) for each in zip(sizes, spans, layer.strides, strict=True))


def _scale_and_shift(norm):
    """Return a and s of a normalisation a x + s, float64 arrays of a value for each channel."""
    mean, variance = (np.asarray(value, np.float64) for value in (norm.moving_mean, norm.moving_variance))
    gamma, beta = (1.0 if norm.gamma is None else norm.gamma), (0.0 if norm.beta is None else norm.beta)
    scale = np.asarray(gamma, np.float64) / np.sqrt(variance + norm.epsilon)
    return scale, np.asarray(beta, np.float64) - mean * scale


def _fold(node, in_front, behind):
    """Return a copy of the node's layer with batch normalisations in its weights, one after another."""
    layer = node.layer
    kernels = [np.asarray(value, np.float64) for value in layer.get_weights()]
    bias = kernels.pop() if layer.use_bias else 0.0
    for norm in in_front:
        scale, shift = (_by_input(layer, values) for values in _scale_and_shift(norm))
        bias = bias + _sum_over_inputs(layer, [kernels[0] * shift, *kernels[1:]])
        kernels[0] = kernels[0] * scale
    for norm in behind:
        scale, shift = _scale_and_shift(norm)
        shape = (-1,)
        if type(layer) in _LAST_TWO:
            shape = kernels[-1].shape[-2:]
        elif type(layer) in _LAST_BUT_ONE:
            shape = (-1, 1)
        kernels[-1] = kernels[-1] * scale.reshape(shape)
        bias = bias * scale + shift
    copy = keras_graph.copy_layer(layer, use_bias=True)
    copy.build(node.calls[0][0][0])
    copy.set_weights([*kernels, bias])
    return copy


def _by_input(layer, values):
    """Return a value for each input channel in a shape that multiplies the layer's first kernel."""
    if type(layer) in _LAST_BUT_ONE:
        return values  # the kernel is (*size, T, S)
    if type(layer) in _DEPTHWISE_FIRST:
        return values[:, None]
    groups = getattr(layer, "groups", 1)  # the kernel is (*size, S / groups, T)
    filters = layer.units if isinstance(layer, layers.Dense) else layer.filters
    return np.repeat(values.reshape(groups, -1), filters // groups, axis=0).T


def _sum_over_inputs(layer, kernels):
    """Return what the layer without bias computes from ones, where all of the kernel is used: a value per filter."""
    kernel, *pointwise = kernels
    spatial = tuple(range(kernel.ndim - 2))
    if type(layer) in _DEPTHWISE_FIRST:
        found = kernel.sum(axis=spatial).ravel()  # (S, M) -> (S M,)
        return found @ pointwise[0].reshape(len(found), -1) if pointwise else found
    return kernel.sum(axis=(*spatial, -1 if type(layer) in _LAST_BUT_ONE else -2))
