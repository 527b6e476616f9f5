"""Factorize a trained Keras model: layers with kernels become chains of small layers that carry their factors.

    small, report = factorize(model, macs=60e6, images=images)         # methods, ranks and factors from images
    small, report = factorize(model, "cp", ratio=0.15)                 # one method, from the weights alone

Functional and Sequential models are taken, with branches, shared layers and nested models. A subclassed model is traced
first. Layers are named by their path, `inner/conv1`. The model is not changed, and the new one shares nothing with it.
The added layers are stock layers: they are saved and loaded without custom objects.
"""

import math

import numpy as np

from fcnn_utils import calibration, factorizations, keras_graph
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils._planning import COSTS, Planner
from fcnn_utils._progress import Progress
from fcnn_utils._report import Report
from fcnn_utils._sites import choose, find_sites

AUTO = ("svd", "spatial", "tucker", "cp")
_SMALLEST = 1e-9  # ratio


# parameters: the front door; a call sets one budget and few of the rest
# long: most of it is the docstring
def factorize(
    model,
    method="auto",
    *,
    ratio=None,
    ranks=None,
    macs=None,
    params=None,
    size_mb=None,
    layers=None,
    exclude=None,
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

    Give one of `ratio`, `ranks`, `macs`, `params` and `size_mb`. With `images`, a budget is dealt out over all layers
    and methods so that the predicted loss is smallest (`sensitivity.predict_losses`). Without them, one ratio serves
    all layers, and of several methods each layer gets that with the smallest error of its kernel.

    Args:
        model: built functional or Sequential model.
        method: "cp", "cp4", "tucker", "tt", "svd", "spatial" or "separable"; a class of `factorizations`; a list of
            these, from which each layer gets the best; or "auto" for svd, spatial, tucker and cp.
        ratio: largest share of each converted kernel's parameters that is kept, in (0, 1].
        ranks: dict path -> ranks of each layer to convert, or path -> (method, ranks).
        macs: largest number of multiply-adds of the whole network for one image. If the dense network needs no more,
            all layers stay dense. So it is for `params` and `size_mb`.
        params: largest number of weights of the whole network.
        size_mb: largest size of these weights in 10⁶ bytes.
        layers: paths of the layers to convert, or patterns such as "block*/conv?". Default: all that can be converted,
            except those that read fewer than 4 channels (little to save, much to lose) and those that are part of a
            factorization already.
        exclude: paths or patterns of layers to leave as they are.
        images: a few hundred inputs (N, H, W, C), normalised as in training, without labels; or a list, a dict, a
            dataset or another stream of batches (`calibration.check_images`). The factors are then fitted to what the
            layers compute on them (`calibration.refit_layers`).
        uniform: with a budget and `images`, use one ratio for all layers.
        multiple: ranks are multiples of this (or the maximum rank). 16 suits processors.
        seed: seed of the random numbers in a CP's starts.
        verbose: 1 to print progress if it takes longer than a second, 0 to print nothing.
        options: of the decompositions; each goes to the methods that have it. A CP's norms are bounded by
            `max_norm=1.0` by default.

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
    model, methods, progress = keras_graph.check_graph(model), _methods(method), Progress(verbose)
    check_number("multiple", multiple, int, 1, 4096)
    check_number("seed", seed, int, 0, 2**31 - 1)
    check_choice("uniform", uniform, (True, False))
    kind, target = _target(ratio=ratio, ranks=ranks, macs=macs, params=params, size_mb=size_mb)
    if kind == "ranks" and layers is not None:
        raise ValueError("ranks= names the layers already: leave out layers=")
    options_of = _options(methods, options, seed)
    if images is not None:
        (images,) = progress.over([images], "calibration images checked", name=lambda _: "")
        images = calibration.check_images(model, images)

    sites = find_sites(model)
    chosen = choose(sites, target if kind == "ranks" else layers, exclude, model, methods)
    planner = Planner(model, chosen, images, multiple, options_of, progress)
    if kind == "ranks":
        plan = planner.given(target)
    elif kind == "ratio":
        plan = planner.by_ratio(target)
    else:
        plan = planner.within(COSTS[kind](model, chosen), target, uniform)
    dense_reason = f"at rank {multiple} it keeps more than the ratio" if kind == "ratio" else "left dense by the budget"
    new, report = _convert(model, sites, chosen, plan, options_of, dense_reason, progress)
    if images is not None:
        calibration.refit_layers(new, model, images, progress=progress)
    return new, report


def _methods(method):
    """Return the classes that are asked for."""
    if isinstance(method, str) and method == "auto":
        method = AUTO
    named = list(method) if isinstance(method, (tuple, list)) else [method]
    if not named:
        raise ValueError("method must be a name, or a list of at least one")
    return list(dict.fromkeys(factorizations.get(each) for each in named))


def _target(**targets):
    """Return name and value of the one target that is given."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        names = [f"{name}=" for name in targets]
        raise ValueError(f"give one of {', '.join(names[:-1])} and {names[-1]}")
    ((kind, target),) = given.items()
    if kind == "ranks":
        if not isinstance(target, dict):
            raise ValueError(f"ranks must be a dict, path of a layer -> its ranks; got {target!r}")
        return kind, target
    low, high = (_SMALLEST, 1) if kind == "ratio" else (1e-6 if kind == "size_mb" else 1, math.inf)
    return kind, float(check_number(kind, target, float, low, high))


def _options(methods, options, seed):
    """Return a function from a method to the options of its decompositions."""
    defaults = {"max_norm": 1.0, "seed": seed}
    known = {method: method.option_names() for method in methods}
    for name in options:
        if not any(name in names for names in known.values()):
            if len(methods) == 1:
                methods[0].check_options({name: None})  # says which options it has
            raise ValueError(f"none of {', '.join(method.name for method in methods)} has an option {name!r}")
    given = {
        method: {name: value for name, value in (defaults | options).items() if name in known[method]}
        for method in methods
    }
    return given.__getitem__


# parameters: what `factorize` has decided
def _convert(model, sites, chosen, plan, options_of, dense_reason, progress):
    """Build the new model and the report; `dense_reason` is that of a chosen layer which is not in the plan."""
    kernels = {
        name: (choice.method, kernel, choice.ranks, options_of(choice.method) | choice.options)
        for path, choice in plan.items()
        for name, kernel in zip(sites[path].kernel_names, sites[path].kind.kernels(), strict=True)
    }
    results = factorizations.decompose_many(kernels)
    results = dict(progress.over(results, "layers decomposed", len(kernels), name=lambda result: result[0]))
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
                "method": plan[path].method.name,
                "ranks": parts[0].ranks,
                "relative_error": float(np.linalg.norm(errors) / max(np.linalg.norm(norms), 1e-300)),
                "degeneracy": max(getattr(part, "degeneracy", math.nan) for part in parts),
                "params_after": sum(layer.count_params() for layer in chain),
                "macs_after": site.macs_at(plan[path].method, parts[0].ranks),
            }
        rows.append(row)
    return keras_graph.rebuild(model, chains), Report.of(rows)
