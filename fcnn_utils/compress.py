"""Factorize a trained Keras model: convolutions become chains of small layers that carry their factors.

    small, report = factorize(model, "cp", ratio=0.15)                  # from the weights alone
    small, report = factorize(model, "cp", macs=60e6, images=images)    # ranks and factors from images, too

Functional and Sequential models are taken, with branches, shared layers and nested models. A subclassed model is traced
first. Layers are named by their path, `inner/conv1`. The model is not changed, and the new one shares nothing with it.
The added layers are stock layers: they are saved and loaded without custom objects.
"""

import dataclasses
import functools
import math

import numpy as np
from keras import layers as keras_layers

from fcnn_utils import blocks, calibration, cost, factorizations, keras_graph, rank_selection
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils._progress import progress
from fcnn_utils._report import Report

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
    verbose=1,
    **options,
):
    """Replace convolutions of a trained model by factorized ones that carry its weights.

    A converted layer becomes a chain (see `blocks`). Its last layer keeps the name, the bias and the activation; the
    layers before it are NAME_in, NAME_depthwise, ... Stride, padding, dilation, initializers, regularizers, dtype
    policy and `trainable` are kept. Everything else is copied.

    Args:
        model: built functional or Sequential model.
        method: "cp", "cp4", "tucker", "tt", "svd", "spatial" or "separable", or a class of `factorizations`.
        ratio: largest share of each converted kernel's parameters that is kept, in (0, 1]. Give one of `ratio`,
            `ranks` and `macs`.
        ranks: dict path -> ranks of each layer to convert.
        macs: largest number of multiply-adds of the whole network for one image. With `images` the ranks are chosen by
            sensitivity, unless `uniform`; without them one ratio serves all layers. If the dense network needs no more,
            all layers stay dense.
        layers: paths of the layers to convert. Default: all that can be converted, except those that read fewer than 4
            channels (little to save, much to lose) and those that are part of a factorization already.
        images: a few hundred inputs (N, H, W, C), normalised as in training, without labels; or a list, a dict, a
            dataset or another stream of batches (`calibration.check_images`). The factors are then fitted to what the
            layers compute on them (`calibration.refit_layers`).
        uniform: with `macs` and `images`, use one ratio for all layers.
        multiple: with `ratio` or `macs`, ranks are multiples of this (or the maximum rank). 16 suits processors.
        seed: seed of the random numbers in a CP's starts.
        verbose: 1 to print progress if it takes longer than a second, 0 to print nothing.
        options: of the decomposition. A CP's norms are bounded by `max_norm=1.0` by default.

    Returns:
        (new model, report). The report is a DataFrame with a row for each layer with weights: layer, method, ranks,
        relative_error (of the kernel, before `images` are used), degeneracy (CP only), params_before, params_after,
        macs_before, macs_after (NaN if they are not known), and the reason if the layer was left as it is. Printed, it
        is a short table with totals.

    Raises:
        ValueError: the model is not a built graph of layers; there is nothing to convert; a layer that is named does
            not exist or can't be converted; the budget is below the smallest possible; the model does not take the
            images; or an argument is not allowed.
    """
    model, method = keras_graph.check_graph(model), factorizations.get(method)
    check_number("multiple", multiple, int, 1, 4096)
    check_number("seed", seed, int, 0, 2**31 - 1)
    check_choice("uniform", uniform, (True, False))
    if sum(value is not None for value in (ratio, ranks, macs)) != 1:
        raise ValueError("give one of ratio=, ranks= and macs=")
    if ranks is not None and layers is not None:
        raise ValueError("ranks= names the layers already: leave out layers=")
    if ranks is not None and not isinstance(ranks, dict):
        raise ValueError(f"ranks must be a dict, path of a layer -> its ranks; got {ranks!r}")
    if images is not None:
        images = calibration.check_images(model, images)
    if issubclass(method, factorizations.CP):
        options = {"max_norm": 1.0, "seed": seed} | options
    method.check_options(options)

    sites = _sites(model)
    chosen = _chosen(sites, layers if ranks is None else ranks, model, method)
    if ranks is not None:
        plan = {path: method.check_ranks(chosen[path].kernel_shape, given) for path, given in ranks.items()}
    elif ratio is not None:
        plan = _plan_by_ratio(chosen, method, float(check_number("ratio", ratio, float, _SMALLEST, 1)), multiple)
    else:
        budget = None if uniform else images
        plan = _plan_by_macs(model, chosen, method, macs, budget, multiple, verbose, options)
    dense_reason = (
        f"at rank {multiple} {method.name} keeps more than the ratio" if ratio else "left dense by the budget"
    )
    new, report = _convert(model, sites, chosen, method, plan, options, dense_reason, verbose)
    if images is not None:
        calibration.refit_layers(new, model, images, verbose=verbose)
    return new, report


# parameters: what `factorize` has decided
def _convert(model, sites, chosen, method, plan, options, dense_reason, verbose):
    """Build the new model and the report; `dense_reason` is that of a chosen layer which is not in the plan."""
    kernels = {path: (sites[path].layer.get_weights()[0], ranks) for path, ranks in plan.items()}
    results = factorizations.decompose_many(method, kernels, **options)
    results = dict(progress(results, f"layers decomposed by {method.name}", verbose, len(plan)))
    taken, chains, rows = keras_graph.operation_names(model), {}, []
    for path, site in sites.items():
        row = {"layer": path, "params_before": site.parameters, "params_after": site.parameters}
        row |= {"macs_before": site.macs, "macs_after": site.macs, "reason": site.reason or "not chosen"}
        if path in chosen:
            row["reason"] = "" if path in plan else dense_reason
        if path in plan:
            result, weights = results[path], site.layer.get_weights()
            chain = chains[id(site.layer)] = site.chain(result, weights[1] if len(weights) > 1 else None, taken)
            row |= {
                "method": method.name,
                "ranks": result.ranks,
                "relative_error": result.relative_error,
                "degeneracy": getattr(result, "degeneracy", math.nan),
                "params_after": sum(layer.count_params() for layer in chain),
                "macs_after": site.macs_at(method, result.ranks),
            }
        rows.append(row)
    return keras_graph.rebuild(model, chains), Report.of(rows)


# --- which layers ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Site:
    """A layer with weights in a model: whether it can be converted, and what that costs."""

    node: keras_graph.LayerNode
    macs: float  # of all its calls; NaN if they are not known
    nodes: dict  # id of a layer -> its node, of all layers

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
            return self._other_kind()
        refusals = {
            "grouped": layer.groups > 1,
            "1×1: nothing to separate": layer.kernel_size == (1, 1),
            "channels come first": layer.data_format != "channels_last",
            "its kernel has a constraint": layer.kernel_constraint is not None,
            "its weights are quantized or have a LoRA": keras_graph.is_quantized(layer)
            or getattr(layer, "lora_enabled", False),
        }
        return next((reason for reason, holds in refusals.items() if holds), "")

    def _other_kind(self):
        layer, name = self.layer, type(self.layer).__name__
        if type(layer) is not getattr(keras_layers, name, None):
            return f"a {name}, not a layer of Keras"
        if isinstance(layer, keras_layers.Wrapper):
            return f"a {name}, not a layer by itself"
        if all(len(weight.shape) < 2 for weight in layer.weights):
            return f"a {name}: it has no kernel"
        return next((said for kind, said in _KINDS.items() if kind in name), f"a {name}, not a Conv2D")

    @functools.cached_property
    def reason(self):
        """Why it is skipped by default; "" if it is not."""
        if self.obstacle:
            return self.obstacle
        neighbour = self._other_part()
        if neighbour is not None:
            return f"factorized already, together with {neighbour.name}"
        channels = self.kernel_shape[2]
        if channels < _FEW_CHANNELS:
            return f"reads {channels} channel{'s' * (channels > 1)}: little to save, much to lose"
        return ""

    def refuse(self, method):
        """Find out whether the chain of a method can be built here: set `obstacle` if it can't."""
        try:
            ranks = (1,) * len(method.max_ranks(self.kernel_shape))
            self._block(method, ranks, None)
        except ValueError as error:
            self.obstacle = self.reason = str(error)

    def _other_part(self):
        """Return a layer that forms a factorization together with this one; None if there is none.

        Two patterns are known: the k×k layer of a Tucker-2 chain (a 1×1 that does not widen, k×k, a 1×1 that does not
        narrow), and either layer of a pair k×1, 1×k. Nothing lies between the layers, not even an activation.
        """
        before, after = (_only_convolution(found) for found in (self.node.producers, self.node.consumers))
        if before is not None:
            is_joined = keras_graph.has_linear_activation(before) and len(set(self.nodes[id(before)].consumers)) == 1
            before = before if is_joined else None
        if not keras_graph.has_linear_activation(self.layer):
            after = None
        for other in filter(None, (before, after)):
            sizes = zip(self.layer.kernel_size, other.kernel_size, strict=True)
            if all(min(pair) == 1 < max(pair) for pair in sizes):  # each extends along the other's axis of size 1
                return other
        if before is not None and after is not None and before.kernel_size == after.kernel_size == (1, 1):
            narrows = before.filters <= before.kernel.shape[2] and after.filters >= after.kernel.shape[2]
            return before if narrows else None
        return None

    @property
    def input_shape(self):
        """Shape of what the layer reads, with None for sizes in which its calls differ."""
        shapes = [inputs[0][1:] for inputs, _ in self.node.calls]
        return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))

    def macs_at(self, method, ranks):
        """MACs of the chain at these ranks, of all calls; NaN if they are not known."""
        if math.isnan(self.macs):
            return math.nan
        geometry = {name: getattr(self.layer, name) for name in ("strides", "padding", "dilation_rate")}
        chain = method.chain(self.kernel_shape, ranks)
        return sum(blocks.chain_macs(chain, inputs[0][1:3], **geometry) for inputs, _ in self.node.calls)

    def chain(self, result, bias, taken):
        """Return the new layers with their weights; the last has the layer's name, the others names not `taken`."""
        block = self._block(type(result), result.ranks, bias)
        block.set_weights([*result.layer_weights(), *([] if bias is None else [np.asarray(bias)])])
        return [self._copy(layer, taken, last=layer is block.layers[-1]) for layer in block.layers[1:]]

    def _block(self, method, ranks, bias):
        """Build the model of a chain with new weights."""
        layer = self.layer
        names = ("strides", "padding", "dilation_rate", "activation", "trainable", "name")
        names += ("kernel_initializer", "kernel_regularizer", "bias_initializer", "bias_regularizer")
        options = {name: getattr(layer, name) for name in names} | {"dtype": layer.dtype_policy}
        if np.ndim(getattr(layer.kernel_initializer, "value", 0)):  # an array of the dense kernel's shape
            del options["kernel_initializer"]
        options |= {"use_bias": bias is not None}
        return blocks.factorized_conv(self.input_shape, method, layer.filters, layer.kernel_size, ranks, **options)

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


def _only_convolution(operations):
    """Return the Conv2D that the operations are, if they are one and the same; else None."""
    is_one = len(set(operations)) == 1 and type(operations[0]) is keras_layers.Conv2D
    return operations[0] if is_one else None


def _sites(model):
    """Return the layers with weights, by path."""
    nodes, macs = {id(node.layer): node for node in keras_graph.layer_nodes(model)}, {}
    try:
        for call, count, _ in cost.call_costs(model):
            macs[id(call.operation)] = macs.get(id(call.operation), 0) + count
    except cost.SizeNotFixed:
        macs = dict.fromkeys(nodes, math.nan)
    return {node.path: _Site(node, macs[key], nodes) for key, node in nodes.items() if node.layer.weights}


def _chosen(sites, named, model, method):
    """Return the sites to convert, by path."""
    if named is None:
        for site in sites.values():
            if not site.reason:
                site.refuse(method)
        chosen = {path: site for path, site in sites.items() if not site.reason}
        if not chosen:
            reasons = [f"{path}: {site.reason}" for path, site in sites.items() if "no kernel" not in site.reason][:5]
            said = "; ".join(reasons) or "no layer has a kernel"
            raise ValueError(f"model {model.name!r} has no convolution to factorize ({said})")
        return chosen
    named = [named] if isinstance(named, str) else list(named)
    if not named:
        raise ValueError("name at least one layer to convert")
    for path in named:
        if path not in sites:
            raise ValueError(
                f"there is no layer {path!r} with weights in model {model.name!r}; it has {', '.join(sites)}"
            )
        if not sites[path].obstacle:
            sites[path].refuse(method)
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
        least = min(_least_fraction(site, method, multiple) for site in chosen.values())
        raise ValueError(
            f"ratio must be at least {math.ceil(1e4 * least) / 1e4:g}, the share of {method.name} at rank {multiple}; "
            f"got {ratio:g}: raise it, or lower multiple="
        )
    return plan


# parameters: what `factorize` was given
def _plan_by_macs(model, chosen, method, macs, images, multiple, verbose, options):
    """Return ranks at which the whole network stays within `macs`."""
    check_number("macs", macs, float, 1, math.inf)
    unknown = [path for path, site in chosen.items() if math.isnan(site.macs)]
    if unknown:
        raise ValueError("macs= needs a model with a fixed input size: use ratio= or ranks=")

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

    dense = cost.total_costs(model)["macs"]  # warns if some are not known
    if macs >= dense:
        return {}
    fixed = dense - sum(site.macs for site in chosen.values())
    if macs < total(_SMALLEST):
        raise ValueError(
            f"macs must be at least {math.ceil(total(_SMALLEST)):,}, with {method.name} at rank {multiple} in every "
            f"layer that is converted; got {macs:,.0f}: raise it, lower multiple=, or name more layers"
        )
    low, high = _SMALLEST, 1.0
    if total(high) <= macs:
        low = high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2 if low > 1e-6 else high / 2  # halve first: the fraction may be very small
        low, high = (middle, high) if total(middle) <= macs else (low, middle)
    plan = {path: at(site, low)[0] for path, site in chosen.items()}
    if images is not None:
        fractions = np.geomspace(max(low / 3, _SMALLEST), min(2.5 * low, 0.9), 5).tolist()  # around the uniform one
        nodes = [site.node for site in chosen.values()]
        curves = calibration.layer_sensitivity(model, method, images, nodes, fractions, verbose=verbose, **options)
        costs = {path: functools.partial(at, site) for path, site in chosen.items()}
        plan = rank_selection.allocate(curves, costs, macs - fixed)
    return {path: ranks for path, ranks in plan.items() if ranks is not None}


def _least_fraction(site, method, multiple):
    """Return a share of the dense parameters that is just enough for the smallest ranks."""
    least = tuple(min(multiple, high) for high in method.max_ranks(site.kernel_shape))
    return (method.count_parameters(site.kernel_shape, least) + 0.5) / math.prod(site.kernel_shape)
