"""Factorize a trained Keras model: convolutions become chains of small layers that carry their factors.

    small, report = factorize(model, "cp", ratio=0.15)                  # from the weights alone
    small, report = factorize(model, "cp", macs=60e6, images=images)    # ranks and factors from images, too

Functional and Sequential models are taken, with branches, shared layers and nested models. Layers are named by their
path, `inner/conv1`. The model is not changed, and the new one shares nothing with it. The added layers are stock
layers: they are saved and loaded without custom objects.
"""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd
from keras import layers as keras_layers
from keras.backend import standardize_dtype

from fcnn_utils import blocks, calibration, cost, factorizations, keras_graph, rank_selection
from fcnn_utils._checks import check_choice, check_number

COLUMNS = ["layer", "method", "ranks", "relative_error", "degeneracy"]
COLUMNS += ["params_before", "params_after", "macs_before", "macs_after", "reason"]
_CONVOLUTIONS = (
    keras_layers.Conv1D,
    keras_layers.Conv2D,
    keras_layers.Conv3D,
    keras_layers.DepthwiseConv1D,
    keras_layers.DepthwiseConv2D,
    keras_layers.SeparableConv1D,
    keras_layers.SeparableConv2D,
    keras_layers.Conv1DTranspose,
    keras_layers.Conv2DTranspose,
    keras_layers.Conv3DTranspose,
)
_KINDS = {"Depthwise": "depthwise", "Separable": "separable already", "Transpose": "transposed"}
_FEW_CHANNELS = 4  # a layer that reads fewer is skipped by default
_SMALLEST = 1e-9  # a fraction of the parameters that every smallest rank exceeds


# parameters: the front door; a call sets one of ratio, ranks and macs, and few of the rest
# long: half of it is the docstring
def factorize(
    model,
    method="cp",
    *,
    ratio=None,
    ranks=None,
    macs=None,
    layers=None,
    images=None,
    uniform=False,
    multiple=1,
    seed=0,
    **options,
):
    """Replace convolutions of a trained model by factorized ones that carry its weights.

    A converted layer becomes a chain (see `blocks`). Its last layer keeps the name, the bias and the activation; the
    layers before it are NAME_in, NAME_depthwise, ... Stride, padding, dilation, initializers, regularizers, dtype
    policy and `trainable` are kept. Everything else is copied.

    Args:
        model: built functional or Sequential model.
        method: "cp", "cp4", "tucker", "tt", "spatial" or "separable", or a class of `factorizations`.
        ratio: largest share of each converted kernel's parameters that is kept, in (0, 1]. Give one of `ratio`,
            `ranks` and `macs`.
        ranks: dict path -> ranks of each layer to convert.
        macs: largest number of multiply-adds of the whole network for one image. With `images` the ranks are chosen by
            sensitivity, unless `uniform`; without them one ratio serves all layers. If the dense network needs no more,
            all layers stay dense.
        layers: paths of the layers to convert. Default: all that can be converted, except those that read fewer than 4
            channels (little to save, much to lose) and those that are part of a factorization already.
        images: a few hundred inputs (N, H, W, C), normalised as in training, without labels. The factors are then
            fitted to what the layers compute on them (`calibration.refit_layers`).
        uniform: with `macs` and `images`, use one ratio for all layers.
        multiple: with `ratio` or `macs`, ranks are multiples of this (or the maximum rank). 16 suits processors.
        seed: seed of the random numbers in a CP's starts.
        options: of the decomposition. A CP's norms are bounded by `max_norm=1.0` by default.

    Returns:
        (new model, report). The report is a DataFrame with a row for each convolution: layer, method, ranks,
        relative_error (of the kernel, before `images` are used), degeneracy (CP only), params_before, params_after,
        macs_before, macs_after (NaN if the image size is not fixed), and the reason if it was left as it is.

    Raises:
        ValueError: the model is not a built graph of layers; there is nothing to convert; a layer does not exist or
            can't be converted; the budget is below the smallest possible, or the cost of a layer is not known; the
            model does not take the images; or an argument is not allowed.
    """
    keras_graph.check_graph(model)
    method = factorizations.get(method)
    check_number("multiple", multiple, int, 1, 4096)
    check_number("seed", seed, int, 0, 2**31 - 1)
    check_choice("uniform", uniform, (True, False))
    if sum(value is not None for value in (ratio, ranks, macs)) != 1:
        raise ValueError("give one of ratio=, ranks= and macs=")
    if ranks is not None and layers is not None:
        raise ValueError("ranks= names the layers already: leave out layers=")
    if images is not None:
        images = calibration.check_images(model, images)
    if issubclass(method, factorizations.CP):
        options = {"max_norm": 1.0, "seed": seed} | options
    method.check_options(options)

    nodes = keras_graph.layer_nodes(model)
    sites = {node.path: _Site(node) for node in nodes if isinstance(node.layer, _CONVOLUTIONS)}
    chosen = _chosen(sites, layers if ranks is None else ranks, model)
    if ranks is not None:
        plan = {path: method.check_ranks(chosen[path].kernel_shape, given) for path, given in ranks.items()}
    elif ratio is not None:
        plan = _plan_by_ratio(chosen, method, check_number("ratio", ratio, float, _SMALLEST, 1), multiple)
    else:
        plan = _plan_by_macs(model, chosen, method, macs, None if uniform else images, multiple, options)
    dense_reason = f"the ratio is below {method.name} at rank {multiple}" if ratio else "left dense by the budget"
    new, report = _convert(model, sites, chosen, method, plan, options, dense_reason)
    if images is not None:
        calibration.refit_layers(new, model, images)
    return new, report


def _convert(model, sites, chosen, method, plan, options, dense_reason):
    """Build the new model and the report; `dense_reason` is that of a chosen layer which is not in the plan."""
    taken = {node.layer.name for node in keras_graph.layer_nodes(model)}
    chains, rows = {}, []
    for path, site in sites.items():
        reason = site.reason or "not chosen"
        if path in chosen:
            reason = "" if path in plan else dense_reason
        row = {"layer": path, "params_before": site.parameters, "params_after": site.parameters, "reason": reason}
        row |= {"macs_before": site.macs, "macs_after": site.macs}
        if path in plan:
            kernel, *bias = site.layer.get_weights()
            try:
                result = method.decompose(kernel, plan[path], **options)
                chain = site.chain(result, bias[0] if bias else None, taken)
            except ValueError as error:
                raise ValueError(f"layer {path!r}: {error}") from None
            chains[id(site.layer)] = chain
            row |= {
                "method": method.name,
                "ranks": result.ranks,
                "relative_error": result.relative_error,
                "degeneracy": getattr(result, "degeneracy", math.nan),
                "params_after": sum(layer.count_params() for layer in chain),
                "macs_after": site.macs_at(method, result.ranks),
            }
        rows.append(row)
    return keras_graph.rebuild(model, chains), pd.DataFrame(rows, columns=COLUMNS)


# --- which layers ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Site:
    """A convolution in a model: whether it can be converted, and what that costs."""

    node: keras_graph.LayerNode

    @property
    def layer(self):
        return self.node.layer

    @property
    def kernel_shape(self):
        return tuple(self.layer.kernel.shape)

    @property
    def parameters(self):
        return self.layer.count_params()

    @functools.cached_property
    def obstacle(self):
        """Why it can't be converted; "" if it can."""
        layer = self.layer
        if type(layer) is not keras_layers.Conv2D:
            name = type(layer).__name__
            return next((said for kind, said in _KINDS.items() if kind in name), f"a {name}, not a Conv2D")
        refusals = {
            "grouped": layer.groups > 1,
            "1×1: nothing to separate": layer.kernel_size == (1, 1),
            "channels come first": layer.data_format != "channels_last",
            "its kernel has a constraint": layer.kernel_constraint is not None,
            "its weights are quantized or have a LoRA": "float" not in standardize_dtype(layer.kernel.dtype)
            or getattr(layer, "lora_enabled", False),
            "it is called on images of several sizes": len({str(call[0]) for call in self.node.calls}) > 1,
        }
        return next((reason for reason, holds in refusals.items() if holds), "")

    @functools.cached_property
    def reason(self):
        """Why it is skipped by default; "" if it is not."""
        if self.obstacle:
            return self.obstacle
        before = [other for other in self.node.producers if keras_graph.has_linear_activation(other)]
        after = self.node.consumers if keras_graph.has_linear_activation(self.layer) else []
        joined = [other for other in (*before, *after) if isinstance(other, _CONVOLUTIONS)]
        if joined:
            return f"no activation between it and {joined[0].name}: factorized already"
        channels = self.kernel_shape[2]
        if channels < _FEW_CHANNELS:
            return f"reads {channels} channel{'s' * (channels > 1)}: little to save, much to lose"
        return ""

    @property
    def input_shape(self):
        return self.node.calls[0][0][0][1:]

    @functools.cached_property
    def macs(self):
        """MACs of all calls; NaN if they are not known."""
        try:
            return cost.node_macs(self.node)
        except ValueError:
            return math.nan

    def macs_at(self, method, ranks):
        """MACs of the chain at these ranks, of all calls; NaN if they are not known."""
        if math.isnan(self.macs):
            return math.nan
        geometry = {name: getattr(self.layer, name) for name in ("strides", "padding", "dilation_rate")}
        chain = method.chain(self.kernel_shape, ranks)
        return len(self.node.calls) * blocks.chain_macs(chain, self.input_shape[:2], **geometry)

    def chain(self, result, bias, taken):
        """Return the new layers with their weights; the last has the layer's name, the others names not `taken`."""
        names = ("strides", "padding", "dilation_rate", "activation", "trainable", "name")
        names += ("kernel_initializer", "kernel_regularizer", "bias_initializer", "bias_regularizer")
        options = {name: getattr(self.layer, name) for name in names} | {"dtype": self.layer.dtype_policy}
        if np.ndim(getattr(self.layer.kernel_initializer, "value", 0)):  # an array of the dense kernel's shape
            del options["kernel_initializer"]
        block = blocks.from_decomposition(self.input_shape, result, bias, **options)
        return [self._copy(layer, taken, last=layer is block.layers[-1]) for layer in block.layers[1:]]

    def _copy(self, layer, taken, last):
        name = self.layer.name if last else layer.name
        while not last and name in taken:
            name += "_"
        taken.add(name)
        kept = ("activity_regularizer", "bias_constraint") if last else ()
        copy = keras_graph.copy_layer(layer, name=name, **{key: getattr(self.layer, key) for key in kept})
        copy.build(layer.input.shape)
        copy.set_weights(layer.get_weights())
        return copy


def _chosen(sites, named, model):
    """Return the sites to convert, by path."""
    if named is None:
        chosen = {path: site for path, site in sites.items() if not site.reason}
        if not chosen:
            reasons = "; ".join(f"{path}: {site.reason}" for path, site in list(sites.items())[:5])
            raise ValueError(
                f"model {model.name!r} has no convolution to factorize ({reasons or 'it has none at all'})"
            )
        return chosen
    named = [named] if isinstance(named, str) else list(named)
    if not named:
        raise ValueError("name at least one layer to convert")
    for path in named:
        if path not in sites:
            raise ValueError(f"layer {path!r} is not a convolution of model {model.name!r}; it has {', '.join(sites)}")
        if sites[path].obstacle:
            raise ValueError(f"layer {path!r} can't be factorized: {sites[path].obstacle}")
    return {path: site for path, site in sites.items() if path in named}


# --- which ranks -----------------------------------------------------------------------------------------------------


def _plan_by_ratio(chosen, method, ratio, multiple):
    plan = {}
    for path, site in chosen.items():
        if _least_fraction(site, method, multiple) <= ratio:
            plan[path] = rank_selection.ranks_for_fraction(method, site.kernel_shape, ratio, multiple=multiple)
    if not plan:
        raise ValueError(
            f"ratio {ratio} is below what {method.name} takes at rank {multiple} in every layer: {', '.join(chosen)}"
        )
    return plan


def _plan_by_macs(model, chosen, method, macs, images, multiple, options):
    """Return ranks at which the whole network stays within `macs`."""
    check_number("macs", macs, float, 1, math.inf)
    unknown = [path for path, site in chosen.items() if math.isnan(site.macs)]
    if unknown:
        raise ValueError(f"macs= needs images of a fixed size, and layer {unknown[0]!r} has none: use ratio= or ranks=")

    def at(site, fraction):
        """Return (ranks, MACs) at a fraction or the smallest ranks; (None, dense MACs) if the chain is not cheaper."""
        if fraction is None:
            return None, site.macs
        share = max(fraction, _least_fraction(site, method, multiple))
        ranks = rank_selection.ranks_for_fraction(method, site.kernel_shape, share, multiple=multiple)
        count = site.macs_at(method, ranks)
        return (ranks, count) if count < site.macs else (None, site.macs)

    def total(fraction):
        return fixed + sum(at(site, fraction)[1] for site in chosen.values())

    dense = cost.total_costs(model)["macs"]
    if macs >= dense:
        return {}
    fixed = dense - sum(site.macs for site in chosen.values())
    if macs < total(_SMALLEST):
        raise ValueError(
            f"macs must be at least {total(_SMALLEST):,}, with {method.name} at rank {multiple} in all layers; "
            f"got {macs:,}"
        )
    low, high = _SMALLEST, 1.0
    if total(high) <= macs:
        low = high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2 if low > 1e-6 else high / 2  # halve first: the fraction may be very small
        low, high = (middle, high) if total(middle) <= macs else (low, middle)
    plan = {path: at(site, low)[0] for path, site in chosen.items()}
    if images is not None:
        fractions = np.geomspace(max(low / 3, _SMALLEST), min(2.5 * low, 0.9), 6).tolist()  # around the uniform one
        nodes = [site.node for site in chosen.values()]
        curves = calibration.layer_sensitivity(model, method, images, nodes, fractions, **options)
        costs = {path: functools.partial(at, site) for path, site in chosen.items()}
        plan = rank_selection.allocate(curves, costs, macs - fixed)
    return {path: ranks for path, ranks in plan.items() if ranks is not None}


def _least_fraction(site, method, multiple):
    """Return a share of the dense parameters that is just enough for the smallest ranks."""
    least = tuple(min(multiple, high) for high in method.max_ranks(site.kernel_shape))
    return (method.count_parameters(site.kernel_shape, least) + 0.5) / math.prod(site.kernel_shape)
