"""Fold batch normalisations into the weights of the layers before them."""

import numpy as np
import pandas as pd
from keras import layers

from fcnn_utils import keras_graph

# Layers whose kernel has the output channels in the last axis, in the last two, or in the last but one. A subclass may
# compute something else, so only these very classes are folded into.
_LAST = (layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.SeparableConv1D, layers.SeparableConv2D, layers.Dense)
_LAST_TWO = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_LAST_BUT_ONE = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_FOLDABLE = _LAST + _LAST_TWO + _LAST_BUT_ONE


def fold_batch_norm(model, dtype=None, *, report=False):
    """Copy a model for inference, with each batch normalisation folded into the layer before it.

    A normalisation after a convolution or a dense layer becomes part of that layer's weights:

        y = γ (W x + b − μ) / √(σ² + ε) + β  =  (γ / √(σ² + ε)) W x + γ (b − μ) / √(σ² + ε) + β

    The layer must be a channels-last convolution or Dense of Keras, without activation, LoRA and quantization.
    Only the normalisation may read its output. Each is called once, and the normalisation, which is over the
    last axis, not with `training=True`. Several normalisations in a row fold one after another. Others stay.
    The outputs are equal up to rounding. Do not train the new model.

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
    into, rows = {}, []  # id of a folded normalisation -> node of the layer that it is folded into
    folded = {}  # id of such a layer -> (its node, its normalisations)
    for norm in nodes.values():
        if not isinstance(norm.layer, layers.BatchNormalization):
            continue
        before = nodes.get(id(norm.producers[0]))
        target = into.get(id(norm.producers[0]), before)
        reason = _obstacle(norm, before, target)
        if not reason:
            into[id(norm.layer)] = target
            folded.setdefault(id(target.layer), (target, []))[1].append(norm.layer)
        rows.append((norm.path, "" if reason else target.path, reason))
    chains = {key: [_fold(node, norms)] for key, (node, norms) in folded.items()}
    new = keras_graph.rebuild(model, chains | {key: [] for key in into})
    return (new, pd.DataFrame(rows, columns=["layer", "folded_into", "reason"])) if report else new


def _obstacle(norm, before, target):
    """Return why a normalisation can't be folded, "" if it can.

    `before` is the node of what it reads, `target` that of the layer whose weights would take it: the same, unless a
    folded normalisation lies between.
    """
    if type(norm.layer) is not layers.BatchNormalization:
        return f"it is a {type(norm.layer).__name__}, a subclass, which may compute something else"
    if len(norm.calls) > 1:
        return "it is called several times"
    if not norm.is_channel_norm:
        return "it does not normalise the last axis"
    if any(norm.training):  # then it normalises by the batch, not by its moving statistics
        return "it is called with training=True"
    if target is None or type(target.layer) not in _FOLDABLE:
        kind = "an input or an operation" if target is None else type(target.layer).__name__
        return f"it reads {kind}, not a convolution or dense layer of Keras"
    layer = target.layer
    refusals = {
        f"{layer.name} has an activation": not keras_graph.has_linear_activation(layer),
        f"{layer.name} has its channels first": getattr(layer, "data_format", "channels_last") != "channels_last",
        f"{layer.name} has a LoRA": getattr(layer, "lora_enabled", False),
        f"{layer.name} is quantized": keras_graph.is_quantized(layer),
        f"{before.path} is called or read several times": not len(before.calls) == len(before.consumers) == 1,
    }
    return next((reason for reason, holds in refusals.items() if holds), "")


def _fold(node, norms):
    """Return a copy of the node's layer with the batch normalisations in its weights, one after another."""
    layer = node.layer
    kernels = [np.asarray(value, np.float64) for value in layer.get_weights()]
    bias = kernels.pop() if layer.use_bias else 0.0
    for norm in norms:
        mean, variance = (np.asarray(value, np.float64) for value in (norm.moving_mean, norm.moving_variance))
        gamma, beta = (1.0 if norm.gamma is None else norm.gamma), (0.0 if norm.beta is None else norm.beta)
        scale = np.asarray(gamma, np.float64) / np.sqrt(variance + norm.epsilon)
        shape = (-1,)
        if type(layer) in _LAST_TWO:
            shape = kernels[-1].shape[-2:]
        elif type(layer) in _LAST_BUT_ONE:
            shape = (-1, 1)
        kernels[-1] = kernels[-1] * scale.reshape(shape)
        bias = (bias - mean) * scale + np.asarray(beta, np.float64)
    copy = keras_graph.copy_layer(layer, use_bias=True)
    copy.build(node.calls[0][0][0])
    copy.set_weights([*kernels, bias])
    return copy
