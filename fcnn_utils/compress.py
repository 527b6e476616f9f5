"""Factorize a trained Keras model: layers with kernels become chains of small layers that carry their factors.

    small, report = factorize(model, "cp", ratio=0.15)                  # from the weights alone
    small, report = factorize(model, "cp", macs=60e6, images=images)    # ranks and factors from images, too

Functional and Sequential models are taken, with branches, shared layers and nested models. A subclassed model is traced
first. Layers are named by their path, `inner/conv1`. The model is not changed, and the new one shares nothing with it.
The added layers are stock layers: they are saved and loaded without custom objects.
"""

import functools
import math

import numpy as np

from fcnn_utils import calibration, cost, factorizations, keras_graph, rank_selection
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils._progress import progress
from fcnn_utils._report import Report
from fcnn_utils._sites import choose, find_sites

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
    """Replace layers of a trained model by factorized ones that carry its weights.

    Dense layers, convolutions and transposed convolutions of one to three axes are taken, grouped ones group by group
    (`layer_kinds`). Dense and 1×1 layers have only the method "svd".

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

    sites = find_sites(model)
    chosen = choose(sites, layers if ranks is None else ranks, model, method)
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
    kernels = {
        name: (kernel, ranks)
        for path, ranks in plan.items()
        for name, kernel in zip(sites[path].kernel_names, sites[path].kind.kernels(), strict=True)
    }
    results = factorizations.decompose_many(method, kernels, **options)
    results = dict(progress(results, f"layers decomposed by {method.name}", verbose, len(kernels)))
    taken, chains, rows = keras_graph.operation_names(model), {}, []
    for path, site in sites.items():
        row = {"layer": path, "params_before": site.parameters, "params_after": site.parameters}
        row |= {"macs_before": site.macs, "macs_after": site.macs, "reason": site.reason or "not chosen"}
        if path in chosen:
            row["reason"] = "" if path in plan else dense_reason
        if path in plan:
            parts = [results[name] for name in site.kernel_names]
            chain = chains[id(site.layer)] = site.chain(parts, taken)
            norms = np.array([part.kernel_norm for part in parts])
            errors = norms * [part.relative_error for part in parts]
            row |= {
                "method": method.name,
                "ranks": parts[0].ranks,
                "relative_error": float(np.linalg.norm(errors) / max(np.linalg.norm(norms), 1e-300)),
                "degeneracy": max(getattr(part, "degeneracy", math.nan) for part in parts),
                "params_after": sum(layer.count_params() for layer in chain),
                "macs_after": site.macs_at(method, parts[0].ranks),
            }
        rows.append(row)
    return keras_graph.rebuild(model, chains), Report.of(rows)


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
