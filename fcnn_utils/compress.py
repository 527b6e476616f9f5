"""Factorize a trained Keras model: layers with kernels become chains of small layers that carry their factors.

    small, report = factorize(model, macs=60e6, images=images)         # methods, ranks and factors from images
    small, report = factorize(model, "cp", ratio=0.15)                 # one method, from the weights alone

Functional and Sequential models are taken, with branches, shared layers and nested models. A subclassed model is traced
first. Layers are named by their path, `inner/conv1`. The model is not changed, and the new one shares nothing with it.
The added layers are stock layers: they are saved and loaded without custom objects.
"""

import math
import numbers
import warnings

import numpy as np

from fcnn_utils import _clock, _targets, calibration, factorizations, keras_graph
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils._network_runs import images_within, outputs_of
from fcnn_utils._planning import COSTS, Planner, megabytes, named_method
from fcnn_utils._progress import Progress
from fcnn_utils._report import Report
from fcnn_utils._sites import choose, find_sites

AUTO = ("svd", "spatial", "tucker", "cp")
_RANGES = {"ratio": (1e-9, 1), "size_mb": (1e-6, math.inf), "max_loss": (1e-9, math.inf), "speedup": (1.01, 1000)}
_LARGE_CP = 3e8  # a CP counts as large if kernel size × rank exceeds this
_SWEEPS_OF_LARGE = 30  # of a large CP; the error of the kernel is up to 4% larger than after 100
_FEW_IMAGES = 32  # with fewer images, the fit may be good on these images and poor on others
_COMPARED = 32, 128  # fewest and most images for the final comparison of outputs; fewer for expensive networks
_COMPARED_MACS = 1e11  # budget of MACs of this comparison, for each network


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
    speedup=None,
    max_loss=None,
    metric=None,
    engine="onnxruntime",
    batch=1,
    threads=None,
    layers=None,
    exclude=None,
    images=None,
    uniform=False,
    multiple=None,
    seed=0,
    verbose=1,
    **options,
):
    """Replace layers of a trained model by factorized ones that carry its weights.

    Dense and EinsumDense layers, convolutions and transposed convolutions of one to three axes are taken, grouped ones
    group by group (`layer_kinds`). Dense, EinsumDense and 1×1 layers have only the method "svd".

    A converted layer becomes a chain (see `blocks`). Its last layer keeps the name, the bias and the activation; the
    layers before it are NAME_in, NAME_depthwise, ... Stride, padding, dilation, initializers, regularizers, dtype
    policy and `trainable` are kept. Everything else is copied.

    Give exactly one target: `ratio`, `ranks`, `macs`, `params`, `size_mb`, `speedup`, `max_loss` or `metric`. With
    `images`, a budget is distributed over all layers and methods so that the predicted loss is smallest
    (`sensitivity.predict_losses`). Without `images`, all layers keep the same ratio, and each layer gets the method
    with the smallest error of its kernel.

    Args:
        model: built functional or Sequential model.
        method: "cp", "cp4", "tucker", "tt", "svd", "spatial" or "separable"; a class of `factorizations`; a list of
            these, from which each layer gets the best; or "auto" for svd, spatial, tucker and cp.
        ratio: largest share of each converted kernel's parameters that is kept, in (0, 1].
        ranks: dict path -> ranks of each layer to convert, for one `method`; or path -> (method, ranks), with any
            method. Paths must be exact, and none may be in `exclude`.
        macs: largest number of multiply-adds of the whole network for one image. If the dense network needs no more,
            all layers stay dense. With `images` and without `uniform`, the cheapest layers stay dense, up to 2% of what
            is left for the layers to convert, if the others can still meet the budget. All this holds for `params` and
            `size_mb`, too.
        params: largest number of weights of the whole network.
        size_mb: largest size of these weights in 10⁶ bytes, in the precision in which the model stores them.
        speedup: how many times as fast as the dense network the new one must be in `engine`, both with their batch
            norms folded (`fold_batch_norm`). `images` and a fixed input size are required. Layers and chains are timed
            once for each machine; these times are kept in `~/.cache/fcnn-utils` (or `FCNN_CACHE`). Then at most
            four whole networks are timed. If none meets the target, up to four more are timed. The search stops early
            if one exceeds the target by at most 5%, or if even the smallest network is too slow. Run nothing else
            meanwhile. You get the slowest of these networks that meets the target. If none meets it, you get the
            fastest. The chosen network is timed once more, and the report gives this last measurement.
        max_loss: largest change of the outputs on `images`, which are required, as is a fixed input size. You get the
            cheapest of six networks, as with `metric`. The change is the mean Kullback-Leibler divergence from the
            dense network's probabilities, in nats. For other outputs it is their mean squared change relative to their
            variance.
        metric: (function, at_least). Six networks are tried, by bisection on their MACs. You get the cheapest one for
            which `function(network)`, such as its accuracy on your validation set, is at least `at_least`. If none of
            the six reaches it, you get a copy of the dense network. The function is called seven times. `images` and a
            fixed input size are required.
        engine: with `speedup`, "onnxruntime", "openvino" or "litert".
        batch: with `speedup`, images per call.
        threads: with `speedup`, threads of the engine; default: all processors.
        layers: paths of the layers to convert, or patterns such as "block*/conv?". Default: all that can be converted,
            with three exceptions. Layers that are part of a factorization already stay. Layers that read fewer than 4
            channels stay, because there is little to save and much to lose. Of the remaining layers, the smallest stay:
            together they have at most 1% of the parameters and at most 1% of the MACs of the remaining layers.
        exclude: paths or patterns of layers to leave as they are.
        images: a few hundred inputs (N, H, W, C), normalised as in training, without labels; or a list, a dict, a
            dataset or another stream of batches (`calibration.check_images`). Shuffle them: some steps use only the
            first ones, as few as 16 for an expensive network. The factors are fitted to what the layers compute on them
            (`calibration.refit_layers`).
        uniform: with `images` and `macs`, `params` or `size_mb`: use one ratio for all layers. Other targets ignore it.
        multiple: ranks are multiples of this (or the maximum rank). Default: 16 with `speedup`, because engines compute
            blocks of 16 channels; else 1.
        seed: seed of the random numbers in a CP's starts.
        verbose: 1 to print progress if it takes longer than half a second, 0 to print nothing.
        options: options of the decompositions; each is passed to the methods that have it. The default for CP is
            `max_norm=1.0`, which bounds the norms of its components. With `images`, the default `n_iter` of a CP falls
            from 100 to 30 if kernel size × rank exceeds 3e8.

    Returns:
        (new model, report). The report is a DataFrame with a row for each layer with weights: layer, method, ranks,
        relative_error (of the kernel, before `images` are used), degeneracy (CP only), params_before, params_after,
        macs_before, macs_after (NaN if they are not known), and the reason if the layer was left as it is. Printed, it
        is a short table with totals. Its "output change" is the root mean square of the change of the outputs,
        divided by the root mean square of the outputs, on at most the first 128 images.

    Raises:
        ValueError: the model is not a built graph of layers; there is nothing to convert; a layer that is named does
            not exist or can't be converted; the budget is below the smallest possible; the model does not take the
            images; or an argument is not allowed.

    Warns:
        UserWarning: the dense network needs no more than the budget; there are fewer than 32 images, or they are unlike
            those of the training (`calibration.check_images`); or the speed-up is missed by more than 5%.
    """
    model, methods, progress = keras_graph.check_graph(model), _methods(method), Progress(verbose)
    kind, target = _target(
        options,
        ratio=ratio,
        ranks=ranks,
        macs=macs,
        params=params,
        size_mb=size_mb,
        speedup=speedup,
        max_loss=max_loss,
        metric=metric,
    )
    multiple = (_clock.MULTIPLE if kind == "speedup" else 1) if multiple is None else multiple
    check_number("multiple", multiple, int, 1, 4096)
    check_number("seed", seed, int, 0, 2**31 - 1)
    check_choice("uniform", uniform, (True, False))
    if kind == "ranks" and layers is not None:
        raise ValueError("ranks= names the layers already: leave out layers=")
    named = [named_method(value) for value in target.values()] if kind == "ranks" else []
    offered = list(dict.fromkeys([*methods, *filter(None, named)]))
    options_of = _options(offered, options, seed)
    if images is None and kind in ("speedup", "max_loss", "metric"):
        raise ValueError(f"{kind}= needs images=: a few hundred inputs of the model, without labels")
    if images is not None:
        for given in progress.over([images], "calibration images checked", name=lambda _: "done"):
            images = calibration.check_images(model, given)
        if len(images[0]) < _FEW_IMAGES:
            warnings.warn(
                f"calibration images: {len(images[0])} are few. The layers are fitted to these, so the outputs can "
                "change much more on other images than the report says. Give a few hundred images",
                stacklevel=2,
            )

    sites = find_sites(model)
    chosen = choose(sites, target if kind == "ranks" else layers, exclude, model, offered)
    planner = Planner(model, chosen, images, multiple, options_of, progress)
    builder = _Builder(model, sites, chosen, images, options_of, progress)
    if kind == "ranks":
        return builder(planner.given(target, methods))
    if kind == "ratio":
        return builder(planner.by_ratio(target), f"even rank {multiple} keeps more than the ratio")
    if kind == "speedup":
        plan, measured = _targets.by_speedup(model, chosen, planner, target, engine, batch, threads, progress)
        new, report = builder(plan)
        return new, report.note(**measured)
    if kind in ("max_loss", "metric"):
        metric = _targets.Metric(*target) if kind == "metric" else _targets.Metric.of_loss(model, images, target)
        return _targets.cheapest(model, planner, COSTS["macs"](model, chosen), metric, builder, progress)
    costs = COSTS[kind](model, chosen)
    if target >= costs.total:
        warnings.warn(f"the dense network needs no more than {kind}={target:g}: all layers stay dense", stacklevel=2)
    return builder(planner.within(costs, target, uniform))


def _methods(method):
    """Return the classes that are asked for."""
    if isinstance(method, str) and method == "auto":
        method = AUTO
    named = list(method) if isinstance(method, (tuple, list)) else [method]
    known = list(factorizations.FACTORIZATIONS)
    if not named or any(isinstance(each, str) and each not in known for each in named):
        raise ValueError(f"method must be 'auto', one of {', '.join(known)}, or a list of these; got {method!r}")
    return list(dict.fromkeys(factorizations.get(each) for each in named))


def _target(options, **targets):
    """Return name and value of the one target that is given; `options` are the further arguments of the call."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        names, got = [f"{name}=" for name in targets], [f"{name}=" for name in given]
        known = {name for method in factorizations.FACTORIZATIONS.values() for name in method.option_names()}
        unknown = [f"{name}= is not known" for name in options if name not in known]
        got = "; ".join([f"got {' and '.join(got) or 'none'}", *unknown])
        raise ValueError(f"give exactly one of {', '.join(names[:-1])} or {names[-1]}; {got}")
    ((kind, target),) = given.items()
    if kind == "ranks":
        if not isinstance(target, dict):
            raise ValueError(f"ranks must be a dict, path of a layer -> its ranks; got {target!r}")
        return kind, target
    if kind == "metric":
        if not (isinstance(target, (tuple, list)) and len(target) == 2 and callable(target[0])):
            raise ValueError(f"metric must be (function of a model, least value); got {target!r}")
        return kind, (
            target[0],
            float(check_number("least value of the metric", target[1], float, -math.inf, math.inf)),
        )
    low, high = _RANGES.get(kind, (1, math.inf))
    if kind in ("macs", "params") and isinstance(target, numbers.Real) and 0 < target < 1:
        raise ValueError(
            f"{kind} is a number of {'multiply-adds' if kind == 'macs' else 'weights'}, not a share of them; got "
            f"{target}: give this share of fcnn.total_costs(model)[{kind!r}], which `fcnn cost` prints"
        )
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


class _Builder:
    """Make networks from plans. Kernels that were decomposed for one plan are not decomposed again for another.

    Args:
        model, sites, chosen: the dense network, its `Site`s by path, and those that may be converted.
        images: list of arrays to refit the factors with, or None.
        options_of: function from a method to the options of its decompositions.
        progress: `Progress`.
    """

    # parameters: what `factorize` has decided
    def __init__(self, model, sites, chosen, images, options_of, progress):
        self._model, self._sites, self._chosen, self._images = model, sites, chosen, images
        self._options_of, self._progress, self._results = options_of, progress, {}

    def __call__(self, plan, dense_reason="left dense by the budget"):
        """Return the network and the report; `dense_reason` is that of a chosen layer which is not in the plan."""
        self._decompose(plan)
        taken, chains, rows = keras_graph.operation_names(self._model), {}, []
        for path, site in self._sites.items():
            row = {"layer": path, "params_before": site.parameters, "params_after": site.parameters}
            row |= {"macs_before": site.macs, "macs_after": site.macs, "reason": site.reason or "not chosen"}
            if path in self._chosen:
                row["reason"] = "" if path in plan else dense_reason
            if path in plan:
                parts = [self._results[self._key(name, plan[path])] for name in site.kernel_names]
                chain = chains[id(site.layer)] = site.chain(parts[0].layers, taken, parts)
                row |= _row_of_chain(site, plan[path].method, parts, chain)
            rows.append(row)
        new = keras_graph.rebuild(self._model, chains)
        report = Report.of(rows, size_mb_before=megabytes(self._model), size_mb_after=megabytes(new))
        if self._images is None:
            return new, report
        calibration.refit_layers(new, self._model, self._images, progress=self._progress)
        return new, report.note(output_change=_output_change(self._model, new, self._images))

    def _decompose(self, plan):
        kernels = {
            name: (choice.method, kernel, choice.ranks, self._decompose_options(choice, kernel))
            for path, choice in plan.items()
            for name, kernel in zip(self._sites[path].kernel_names, self._sites[path].kind.kernels(), strict=True)
            if self._key(name, choice) not in self._results
        }
        results = factorizations.decompose_many(kernels)
        for name, result in self._progress.over(results, "layers decomposed", len(kernels), name=_first):
            self._results[name, kernels[name][0], result.ranks] = result

    def _decompose_options(self, choice, kernel):
        """Return the options of one decomposition. With images, a large CP gets fewer sweeps: most are refitted."""
        options = self._options_of(choice.method) | choice.options
        is_large = issubclass(choice.method, factorizations.CP) and kernel.size * choice.ranks[0] > _LARGE_CP
        return {"n_iter": _SWEEPS_OF_LARGE} | options if is_large and self._images is not None else options

    @staticmethod
    def _key(name, choice):
        return name, choice.method, choice.ranks


def _first(pair):
    return pair[0]


def _row_of_chain(site, method, parts, chain):
    """Return what the report says of a converted layer: its decompositions `parts`, its new layers `chain`."""
    norms = np.array([part.kernel_norm for part in parts])
    errors = norms * [part.relative_error for part in parts]
    return {
        "method": method.name,
        "ranks": parts[0].ranks,
        "relative_error": float(np.linalg.norm(errors) / max(np.linalg.norm(norms), 1e-300)),
        "degeneracy": max(getattr(part, "degeneracy", math.nan) for part in parts),
        "params_after": sum(layer.count_params() for layer in chain),
        "macs_after": site.macs_at(method, parts[0].ranks),
    }


def _output_change(model, new, images):
    """Return the root mean square of the outputs' change relative to that of the outputs, on some of the images."""
    least, most = _COMPARED
    count = min(max(images_within(model, images, _COMPARED_MACS), least), most)
    images = [x[:count] for x in images]
    before, after = (outputs_of(keras_graph.in_float32(each), images) for each in (model, new))
    return float(np.linalg.norm(after - before) / max(np.linalg.norm(before), 1e-300))
