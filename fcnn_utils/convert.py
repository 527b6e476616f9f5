"""A trained network -> a factorized one: chosen convolutions become chains of small ones that carry their factors.

    compressed, report = convert.factorize(model, "cp", ratio=0.15)                # from the weights alone
    compressed, report = convert.factorize(model, "cp", macs=60e6, images=images)  # ranks and factors from images, too

Functional and Sequential models, with branches, shared layers and models within models, whose layers are named by
their path, `inner/conv1`. The original is not changed, and the new model shares nothing with it; it is of stock
layers, so that it is saved and loaded without custom objects.
"""

import contextlib
import dataclasses
import functools
import math

import numpy as np
import pandas as pd
from keras import layers as keras_layers

from fcnn_utils import blocks, calibrate, cost, decompose, keras_graph
from fcnn_utils import ranks as ranks_of
from fcnn_utils._checks import check_choice, check_number

COLUMNS = [
    "layer",
    "method",
    "ranks",
    "relative_error",
    "degeneracy",
    "params_before",
    "params_after",
    "macs_before",
    "macs_after",
    "reason",
]
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
_FEW_CHANNELS = 4
_FOLDABLE = (  # with their kernel's output channels last, or (depthwise) in its last two axes
    keras_layers.Conv1D,
    keras_layers.Conv2D,
    keras_layers.Conv3D,
    keras_layers.DepthwiseConv2D,
    keras_layers.SeparableConv2D,
    keras_layers.Dense,
)


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

    A converted layer becomes a chain (see `blocks`) whose last layer keeps its name, with the bias and the activation;
    the ones before are NAME_in, NAME_depthwise, ... Stride, padding, dilation, initializers, regularizers (the kernel's
    on every factor), dtype policy and `trainable` are the layer's. Everything else is copied.

    Layers can be converted one after another, with a training in between:

        for path, rank in ranks.items():
            model, _ = factorize(model, ranks={path: rank})
            training.train(model, ...)

    Args:
        model: built, functional or sequential.
        method: "cp", "cp4", "tucker", "tt", "spatial" or "separable" (see `ranks`).
        ratio: share of each converted kernel's parameters kept, in (0, 1]. Give one of `ratio`, `ranks` and `macs`.
        ranks: the ranks of each layer to convert, {path: ranks}.
        macs: the most multiply-adds that the whole network may take for one image. With `images` the ranks are chosen
            by sensitivity (`calibrate.sensitivity`, `calibrate.choose`), unless `uniform`; without them, and where the
            budget is so near the smallest that it leaves no choice, one ratio serves all layers.
        layers: paths of the layers to convert; default: all that can be, but those that read fewer than 4 channels
            (there is little to save and much to lose) and those that are part of a factorization already.
        images: some hundred inputs (N, H, W, C), normalised as in training, without labels: the factors are then
            fitted to what the layers compute on them (`calibrate.correct`), not to the kernels alone.
        uniform: whether one ratio serves all layers although there are images.
        multiple: chosen ranks are multiples of this. 16 suits the vector units of processors: ONNX Runtime and oneDNN
            then need no other, slower kernels.
        seed: of the random numbers in a CP's starts.
        options: of the decomposition; a CP's norms are bounded, `max_norm=1.0`, unless told otherwise.

    Returns:
        (new model, report). The report is a DataFrame, a row for each convolution, with the columns layer, method,
        ranks, relative_error (of the kernel, before `images` came in), degeneracy (CP only), params_before,
        params_after, macs_before, macs_after, and `reason` where it was left as it is. MACs are NaN on images of no
        fixed size.

    Raises:
        ValueError: a model that is not built or no graph of layers; nothing to convert; a layer that is not there or
            can't be converted; a budget below the smallest possible; images that the model does not take.
    """
    keras_graph.check_graph(model)
    check_choice("method", method, ranks_of.METHODS)
    check_number("seed", seed, int, 0, 2**31 - 1)
    check_number("multiple", multiple, int, 1, 4096)
    check_choice("uniform", uniform, (True, False))
    if sum(value is not None for value in (ratio, ranks, macs)) != 1:
        raise ValueError("give one of ratio=, ranks= and macs=")
    if ranks is not None and layers is not None:
        raise ValueError("ranks= names the layers already: leave out layers=")
    if images is not None:
        images = calibrate.check_images(model, images)
    if method in ("cp", "cp4"):
        options = {"max_norm": 1.0, "seed": seed} | options

    sites = {
        place.path: _Site(place) for place in keras_graph.layer_nodes(model) if isinstance(place.layer, _CONVOLUTIONS)
    }
    chosen = _chosen(sites, layers if ranks is None else ranks, model)
    if ranks is not None:
        plan = {path: ranks_of.check(method, chosen[path].shape, given) for path, given in ranks.items()}
    elif ratio is not None:
        plan = _by_ratio(chosen, method, check_number("ratio", ratio, float, 1e-9, 1), multiple)
    else:
        plan = _by_budget(model, chosen, method, macs, None if uniform else images, multiple, options)

    chains, rows, taken = {}, [], {place.layer.name for place in keras_graph.layer_nodes(model)}
    for path, site in sites.items():
        row = {"layer": path, "params_before": site.parameters, "params_after": site.parameters}
        row |= {"macs_before": site.macs, "macs_after": site.macs, "reason": site.reason}
        if path in plan:
            row |= _converted(site, method, plan[path], options, chains, taken)
        elif path in chosen:
            row["reason"] = f"the ratio is below {method} at rank {multiple}" if ratio else "left dense by the budget"
        elif not site.reason:
            row["reason"] = "not chosen"
        rows.append(row)
    new = keras_graph.rebuild(model, chains)
    if images is not None:
        calibrate.correct(new, model, images)
    return new, pd.DataFrame(rows, columns=COLUMNS)


def fold_batch_norm(model, dtype=None):
    """The model for inference: every batch normalisation behind a convolution or a dense layer is in its weights.

        y = γ (W x + b − μ) / √(σ² + ε) + β  =  (γ / √(σ² + ε)) W x + γ (b − μ) / √(σ² + ε) + β

    Folded where the layer before has no activation and is read by the normalisation alone, both called once; others
    stay. Exact but for rounding; to be used, not trained on.

    Args:
        model: built, functional or sequential.
        dtype: dtype policy of the new model's layers, "float32" to leave mixed precision; default: as they are.

    Returns:
        keras.Model, not compiled; it shares nothing with `model`.

    Raises:
        ValueError: a model that is not built or no graph of layers; a layer that can't be copied (`keras_graph.copy_layer`).
    """
    if dtype is not None:
        model = keras_graph.rebuild(model, {}, dtype=dtype)
    chains, places = {}, {id(place.layer): place for place in keras_graph.layer_nodes(model)}
    for place in places.values():
        if place.is_channel_norm:
            before = places.get(id(place.before[0]))
            if _folds(place, before):
                chains[id(before.layer)], chains[id(place.layer)] = [_scaled(before.layer, place.layer)], []
    return keras_graph.rebuild(model, chains)


# --- which layers, which ranks -----------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Site:
    """A convolution in a model: whether it can be converted, and what that costs."""

    place: keras_graph.LayerNode

    @property
    def layer(self):
        return self.place.layer

    @property
    def shape(self):
        return tuple(self.layer.kernel.shape)

    @property
    def parameters(self):
        return self.layer.count_params()

    @functools.cached_property
    def obstacle(self):
        """Why it can't be converted; "" if it can."""
        layer = self.layer
        if type(layer) is not keras_layers.Conv2D:
            kinds = {"Depthwise": "depthwise", "Separable": "separable already", "Transpose": "transposed"}
            name = type(layer).__name__
            return next((said for kind, said in kinds.items() if kind in name), f"a {name}, not a Conv2D")
        refusals = {
            "grouped": layer.groups > 1,
            "1×1: nothing to separate": layer.kernel_size == (1, 1),
            "channels come first": layer.data_format != "channels_last",
            "its kernel has a constraint": layer.kernel_constraint is not None,
            "its weights are quantized or have a LoRA": "float" not in layer.kernel.dtype
            or getattr(layer, "lora_enabled", False),
            "it is called on images of several sizes": len({str(call[0]) for call in self.place.calls}) > 1,
        }
        return next((reason for reason, holds in refusals.items() if holds), "")

    @functools.cached_property
    def reason(self):
        """Why it is left unless it is named; "" if it is not."""
        if self.obstacle:
            return self.obstacle
        joined = self._joined()
        if joined:
            return f"no activation between it and {joined[0].name}: factorized already"
        if self.shape[2] < _FEW_CHANNELS:
            return f"reads {self.shape[2]} channel{'s' * (self.shape[2] > 1)}: little to save, much to lose"
        return ""

    def _joined(self):
        """Convolutions before and after it with nothing in between."""
        before = [other for other in self.place.before if keras_graph.is_linear(other)]
        after = self.place.after if keras_graph.is_linear(self.layer) else []
        return [other for other in (*before, *after) if isinstance(other, _CONVOLUTIONS)]

    @property
    def input_shape(self):
        return self.place.calls[0][0][0][1:]

    @property
    def options(self):
        names = ("strides", "padding", "dilation_rate", "activation", "trainable", "name")
        names += ("kernel_initializer", "kernel_regularizer", "bias_initializer", "bias_regularizer")
        options = {name: getattr(self.layer, name) for name in names} | {"dtype": self.layer.dtype_policy}
        if np.ndim(getattr(self.layer.kernel_initializer, "value", 0)):  # an array of the dense kernel's shape
            del options["kernel_initializer"]
        return options

    @functools.cached_property
    def macs(self):
        """Of all calls; NaN where they are not known."""
        try:
            return cost.node_macs(self.place)
        except ValueError:
            return math.nan

    def macs_at(self, method, ranks):
        """MACs of the chain at these ranks, of all calls."""
        ones = (1,) * len(ranks)
        if method not in self._positions:
            block = blocks.BLOCKS[method](
                self.input_shape, self.shape[3], self.shape[:2], ones, **self.options | {"use_bias": False}
            )
            table = cost.layer_costs(block).iloc[:-1]
            table = table[table["params"] > 0]
            self._positions[method] = (table["macs"] / table["params"]).to_numpy() * len(self.place.calls)
        return round(float(self._positions[method] @ ranks_of.layer_parameters(method, self.shape, ranks)))

    @functools.cached_property
    def _positions(self):
        return {}

    def chain(self, result, bias, taken):
        """New layers of a decomposition, with their weights; the last one has the layer's name, the others new ones."""
        block = blocks.factorized(self.input_shape, result, bias, **self.options)
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
    """The sites to convert, by path."""
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
    unknown = [path for path in named if path not in sites]
    if unknown:
        raise ValueError(f"layer {unknown[0]!r} is no convolution of model {model.name!r}; it has {', '.join(sites)}")
    for path in named:
        if sites[path].obstacle:
            raise ValueError(f"layer {path!r} can't be factorized: {sites[path].obstacle}")
    return {path: site for path, site in sites.items() if path in named}


def _by_ratio(chosen, method, ratio, multiple):
    plan = {}
    for path, site in chosen.items():
        try:
            plan[path] = ranks_of.for_fraction(method, site.shape, ratio, multiple=multiple)
        except ValueError:  # even the smallest rank is larger: it stays
            continue
    if not plan:
        raise ValueError(
            f"ratio {ratio} is below what {method} takes at rank {multiple} in every layer: {', '.join(chosen)}"
        )
    return plan


def _by_budget(model, chosen, method, macs, images, multiple, options):
    """Ranks at which the whole network stays within `macs`."""
    check_number("macs", macs, float, 1, math.inf)
    unknown = [path for path, site in chosen.items() if math.isnan(site.macs)]
    if unknown:
        raise ValueError(f"macs= needs images of a fixed size, and layer {unknown[0]!r} has none: use ratio= or ranks=")

    def at(site, fraction):
        """(ranks, MACs): of the fraction, at least the smallest; of the dense layer where that costs no more."""
        if fraction is None:
            return None, site.macs
        least = tuple(min(multiple, high) for high in ranks_of.maximum(method, site.shape))
        share = max(fraction, (ranks_of.parameters(method, site.shape, least) + 0.5) / ranks_of.dense(site.shape))
        ranks = ranks_of.for_fraction(method, site.shape, share, multiple=multiple)
        count = site.macs_at(method, ranks)
        return (ranks, count) if count < site.macs else (None, site.macs)

    if macs >= cost.total_costs(model)["macs"]:
        return {}
    fixed = cost.total_costs(model)["macs"] - sum(site.macs for site in chosen.values())
    smallest = fixed + sum(at(site, 1e-9)[1] for site in chosen.values())
    if macs < smallest:
        raise ValueError(
            f"macs must be at least {smallest:,}, with {method} at rank {multiple} in all layers; got {macs:,}"
        )
    low, high = 1e-9, 1.0
    if fixed + sum(at(site, high)[1] for site in chosen.values()) <= macs:
        low = high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2 if low > 1e-6 else high / 2
        fits = fixed + sum(at(site, middle)[1] for site in chosen.values()) <= macs
        low, high = (middle, high) if fits else (low, middle)
    plan = {path: at(site, low)[0] for path, site in chosen.items()}
    plan = {path: ranks for path, ranks in plan.items() if ranks is not None}
    if images is not None:
        fractions = np.geomspace(max(low / 3, 1e-9), min(2.5 * low, 0.9), 6)  # around what would be the same for all
        curves = calibrate.sensitivity(
            model, method, images, [site.place for site in chosen.values()], fractions.tolist(), **options
        )
        costs = {path: functools.partial(at, site) for path, site in chosen.items()}
        with contextlib.suppress(ValueError):  # a budget that only the smallest ranks meet leaves no choice
            plan = calibrate.choose(curves, costs, macs - fixed)
    return plan


def _converted(site, method, ranks, options, chains, taken):
    """Decompose a site's kernel, put its chain into `chains`, its names to those `taken`; its entries in the report."""
    kernel, *bias = site.layer.get_weights()
    try:
        result = decompose.decompose(kernel, method, ranks, **options)
        chain = site.chain(result, bias[0] if bias else None, taken)
    except ValueError as error:
        raise ValueError(f"layer {site.place.path!r}: {error}") from None
    chains[id(site.layer)] = chain
    return {
        "method": method,
        "ranks": result.ranks,
        "relative_error": result.relative_error,
        "degeneracy": result.degeneracy if method in ("cp", "cp4") else math.nan,
        "params_after": sum(layer.count_params() for layer in chain),
        "macs_after": math.nan if math.isnan(site.macs) else site.macs_at(method, result.ranks),
        "reason": "",
    }


# --- folding -----------------------------------------------------------------------------------------------------


def _folds(place, before):
    """Whether a batch normalisation goes into the layer before it, whose place is `before` (or None)."""
    return (
        before is not None
        and isinstance(before.layer, _FOLDABLE)
        and keras_graph.is_linear(before.layer)
        and getattr(before.layer, "data_format", "channels_last") == "channels_last"
        and not getattr(before.layer, "lora_enabled", False)
        and len(before.calls) == len(before.after) == 1
        and not any(place.training)  # told to normalise by its batch
    )


def _scaled(layer, norm):
    """A copy of a layer with the normalisation in its weights."""
    mean, variance = (np.asarray(value, np.float64) for value in (norm.moving_mean, norm.moving_variance))
    gamma, beta = (1.0 if norm.gamma is None else norm.gamma), (0.0 if norm.beta is None else norm.beta)
    scale = np.asarray(gamma, np.float64) / np.sqrt(variance + norm.epsilon)
    kernels = layer.get_weights()
    bias = kernels.pop() if layer.use_bias else 0.0
    last = np.asarray(kernels[-1], np.float64)
    kernels[-1] = last * scale.reshape(last.shape[2:] if isinstance(layer, keras_layers.DepthwiseConv2D) else -1)
    copy = keras_graph.copy_layer(layer, use_bias=True)
    copy.build(layer.input.shape)
    copy.set_weights([*kernels, (np.asarray(bias, np.float64) - mean) * scale + np.asarray(beta, np.float64)])
    return copy
