"""Remove whole filters from a trained network: the baseline that factorized networks are compared with.

A filter that is removed takes its output channel with it, and the weights of the next convolution that read this
channel. The network stays a network of ordinary layers, with fewer filters.

`prune_filters` takes the least important filters of each layer, by one of two criteria:

    "l1"          sum of the absolute weights of the filter (Li et al. 2017, arXiv 1608.08710)
    "activation"  mean square of the channel on some images, times the squared norm of the weights that read it

With images, it then fits the convolutions, from the second one on, to the outputs of the dense network (He, Zhang & Sun
2017, arXiv 1707.06168), as `calibration.refit_layers` does for factorized layers.
"""

import bisect

import keras
import numpy as np
from keras import layers

from fcnn_utils import cost
from fcnn_utils._checks import check_choice
from fcnn_utils._patches import Moments, linear_rows, patch_rows, rows_per_image
from fcnn_utils.layer_kinds import KernelLayer

_PASSING = (layers.BatchNormalization, layers.Activation, layers.ReLU, layers.Dropout, layers.GlobalAveragePooling2D)
_PASSING += (layers.InputLayer,)
_RIDGE = 1e-6  # relative to the mean variance of what a layer reads
CRITERIA = ("l1", "activation")


def prune_filters(model, macs, *, by="l1", images=None, multiple=1):
    """Remove filters until a budget is met: every convolution but the last loses the same share.

    Args:
        model: built model of layers in a row: Conv2D with a bias, without groups or an activation of their own; batch
            norms, activations, global pooling.
        macs: largest number of multiply-adds for one image.
        by: "l1" or "activation" (see the module).
        images: (N, H, W, C), normalised as in training. Required for "activation". If given, the convolutions are
            fitted to the outputs of `model`.
        multiple: the numbers of filters are multiples of this; a layer with fewer filters keeps them all.

    Returns:
        A new keras.Model, not compiled.

    Raises:
        ValueError: the model has other layers or fewer than 2 convolutions, the budget is below the smallest network,
            or `images` are missing.
    """
    check_choice("by", by, CRITERIA)
    if by == "activation" and images is None:
        raise ValueError('by="activation" needs images')
    convolutions = _convolutions(model)
    importance = _importance(model, convolutions, by, images)
    names = [layer.name for layer in convolutions[:-1]]
    most = max(-(-len(importance[name]) // multiple) for name in names)
    shares = [_kept(importance, names, step / most, multiple) for step in range(1, most + 1)]
    fitting = bisect.bisect_right(shares, macs, key=lambda kept: cost.total_costs(_without(model, kept))["macs"])
    if not fitting:
        least = cost.total_costs(_without(model, shares[0]))["macs"]
        raise ValueError(
            f"macs must be at least {least:,}, for the fewest filters at multiple={multiple}; got {macs:,}"
        )
    kept = shares[fitting - 1]
    pruned = _without(model, kept)
    if images is not None:
        _refit(pruned, model, convolutions, kept, images)
    return pruned


def _convolutions(model):
    found = []
    for layer in model.layers:
        is_linear = getattr(layer, "activation", None) is keras.activations.linear
        if type(layer) is layers.Conv2D and layer.groups == 1 and layer.use_bias and is_linear:
            found.append(layer)
        elif not isinstance(layer, _PASSING) or isinstance(layer.output, list):
            raise ValueError(
                f"layers must be Conv2D with a bias, batch norms, activations, dropout or global pooling, in a row; "
                f"{layer.name} is {type(layer).__name__}"
            )
    if len(found) < 2:
        raise ValueError(f"the model must have at least 2 convolutions; it has {len(found)}")
    return found


def _importance(model, convolutions, by, images):
    """Return dict name -> importance of each filter."""
    if by == "l1":
        return {layer.name: np.abs(np.asarray(layer.kernel)).sum(axis=(0, 1, 2)) for layer in convolutions}
    read = _inputs_of(model, convolutions[1:], images)
    found = {}
    for layer, after, x in zip(convolutions[:-1], convolutions[1:], read, strict=True):
        weights = np.square(np.asarray(after.kernel, np.float64)).sum(axis=(0, 1, 3))
        found[layer.name] = np.square(x, dtype=np.float64).mean(axis=(0, 1, 2)) * weights
    return found


def _kept(importance, names, share, multiple):
    """Return dict name -> sorted indices of the filters that stay."""
    kept = {}
    for name in names:
        count = max(1, round(share * len(importance[name]) / multiple)) * multiple
        kept[name] = np.sort(np.argsort(-importance[name], kind="stable")[:count])
    return kept


def _without(model, kept):
    """Copy the model with only these filters of each convolution."""

    def copy(layer):
        config = layer.get_config()
        if layer.name in kept:
            config["filters"] = len(kept[layer.name])
        return type(layer).from_config(config)

    new = keras.models.clone_model(model, clone_function=copy)
    channels = np.arange(model.input_shape[-1])
    for layer in model.layers:
        weights = layer.get_weights()
        if isinstance(layer, layers.Conv2D):
            kernel, bias = weights
            own = kept.get(layer.name, np.arange(kernel.shape[3]))
            weights, channels = [kernel[:, :, channels][..., own], bias[own]], own
        elif isinstance(layer, layers.BatchNormalization):
            weights = [values[channels] for values in weights]
        if weights:
            new.get_layer(layer.name).set_weights(weights)
    return new


def _refit(new, model, convolutions, kept, images):
    """Fit kernels and biases, from the second convolution on, to the outputs of the dense network. In place."""
    per_image = rows_per_image(len(images))
    read_by = _inputs_of(model, convolutions[1:], images)
    for layer, x in zip(convolutions[1:], read_by, strict=True):
        own, moments = new.get_layer(layer.name), Moments(layer.name)
        (reads,) = _inputs_of(new, [own], images)
        outputs = linear_rows(KernelLayer(layer), per_image)(x)[:, kept.get(layer.name, slice(None))]
        moments.add(patch_rows(KernelLayer(own), reads, per_image), outputs)
        read_mean, covariance, mean, products = moments.normal_equations()
        ridge = _RIDGE * np.trace(covariance) / len(covariance)
        weights = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), products)
        bias = np.asarray(layer.bias)[kept.get(layer.name, slice(None))]
        own.set_weights([weights.reshape(own.kernel.shape), bias + mean - read_mean @ weights])


def _inputs_of(model, chosen, images):
    """Return what each of these layers reads, a list of arrays."""
    read = keras.Model(model.inputs, [layer.input for layer in chosen]).predict(images, batch_size=50, verbose=0)
    return read if isinstance(read, list) else [read]
