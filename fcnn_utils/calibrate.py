"""What a few images without labels do for a factorized network: choose its ranks, and correct what it computes.

Nothing here takes a gradient. `images` are inputs of the model (N, H, W, C), normalised as in training: some hundreds.
"""

import contextlib

import keras
import numpy as np
from keras import layers

from fcnn_utils import decompose, keras_graph
from fcnn_utils import ranks as ranks_of

_BATCH = 128
_ROWS = 20_000  # patches of a batch that least squares reads: neighbours tell the same
_FEW = 256  # images that tell a sensitivity
_BINS = 4000  # steps in which the budget is dealt out


def check_images(model, images):
    """`images` as a float32 array if the model takes them; else ValueError."""
    images = np.asarray(images, "float32")
    if len(model.inputs) != 1:
        raise ValueError(f"calibration wants a model with one input; {model.name!r} has {len(model.inputs)}")
    wanted = tuple(model.inputs[0].shape)
    fits = images.ndim == len(wanted) and all(
        a in (None, b) for a, b in zip(wanted[1:], images.shape[1:], strict=False)
    )
    if not fits or not len(images) or not np.isfinite(images).all():
        raise ValueError(
            f"calibration images must be finite numbers of the shape (N, {', '.join(map(str, wanted[1:]))}), at least "
            f"one; got {images.shape}"
        )
    return images


def sensitivity(model, method, images, places, fractions, **options):
    """How much worse the network's answers get when one kernel is factorized, layer by layer and size by size.

    Every kernel in turn is replaced by its decomposition, whose last factor is refitted to the layer's output on these
    images (`refitted`) and whose lost mean goes where `correct` puts it, all others staying as they are. Worse is the
    mean Kullback-Leibler divergence of the model's probabilities from those that it had; of a model without
    probabilities, the squared change of its output relative to the output's variance.

    Args:
        model: built, functional or sequential, of one input. It is not changed.
        method: of the decomposition, as in `decompose.decompose`.
        images: (N, H, W, C), of which the first 256 count.
        places: of the Conv2D layers, each a `keras_graph.LayerNode`.
        fractions: of a kernel's parameters, rising: the sizes to try; those below rank 1 are left out, and where that
            leaves none of them, rank 1 is tried.
        options: of the decomposition; a CP is content with 10 sweeps here unless told otherwise.

    Returns:
        dict path -> list of (fraction, ranks, loss).

    Raises:
        ValueError: the model does not take the images, or there is no such method.
    """
    images = check_images(model, images)[:_FEW]
    if method in ("cp", "cp4"):
        options = {"n_iter": 10} | options
    trial = keras_graph.rebuild(model, {})
    copies = {place.path: place for place in keras_graph.layer_nodes(trial)}
    before = _outputs(trial, images)
    curves = {}
    for place in places:
        layer, curve = copies[place.path].layer, []
        weights = layer.get_weights()
        means = [(norm, norm.get_weights()) for norm in _norms_behind(copies[place.path], copies)]
        mean, covariance = moment(trial, layer, images, len(place.calls))
        if not layer.use_bias and not means:  # nothing can take a mean
            mean, covariance = np.zeros_like(mean), covariance + np.outer(mean, mean)
        for fraction in _possible(fractions, method, weights[0].shape):
            ranks = ranks_of.for_fraction(method, weights[0].shape, fraction)
            result = decompose.decompose(weights[0], method, ranks, **options)
            kernel, shift = refitted(weights[0], result, (mean, covariance))
            layer.set_weights([kernel, *(bias + shift for bias in weights[1:])])
            for norm, values in means:
                norm.moving_mean.assign(values[-2] - shift)
            curve.append((fraction, ranks, _loss(before, _outputs(trial, images))))
        layer.set_weights(weights)
        for norm, values in means:
            norm.set_weights(values)
        curves[place.path] = curve
    return curves


def moment(model, layer, images, calls=1):
    """Mean and covariance of the patches that a Conv2D reads, of so many images as it takes to know them.

    Args:
        model: built, with the layer in it.
        layer: the Conv2D.
        images: (N, H, W, C).
        calls: how often the model calls the layer.

    Returns:
        mean (kh kw S,), covariance (kh kw S, kh kw S); float64.
    """
    total, squares, count = 0, 0, 0
    for part in _batches(images, 16):
        for rows in _seen(model, layer, part, lambda x: _patches(layer, x), calls):
            rows = rows.astype(np.float64)
            total, squares, count = total + rows.sum(axis=0), squares + rows.T @ rows, count + len(rows)
        if count > 20 * rows.shape[1]:
            break
    mean = total / count
    return mean, squares / count - np.outer(mean, mean)


def refitted(kernel, decomposition, moment):
    """The kernel of the decomposition with the last factor that is best for the layer's output, not for the kernel.

    It is least squares in the metric of the covariance of the patches p that the layer reads; B is the decomposition's
    `basis`:

        min over W  E‖(K − B W)ᵀ(p − p̄)‖²

    Args:
        kernel: (kh, kw, S, T), what was decomposed.
        decomposition: of that kernel, from `decompose`.
        moment: (mean (kh kw S,), covariance (kh kw S, kh kw S)) of the patches, from `moment`.

    Returns:
        kernel (kh, kw, S, T), and the shift of the bias (T,) that keeps the mean output.
    """
    mean, covariance = moment
    dense = np.reshape(kernel, (-1, kernel.shape[-1])).astype(np.float64)
    basis, last = decomposition.basis(), decomposition.last_factor()
    change = _least_squares(basis.T @ covariance @ basis, basis.T @ covariance @ (dense - basis @ last))
    rebuilt = basis @ (last + change)
    return rebuilt.reshape(kernel.shape), mean @ (dense - rebuilt)


def choose(curves, costs, budget):
    """The cheapest sum of losses within a budget: which point of its curve each layer takes, or none (it stays dense).

    Between its measured points a curve is interpolated, both axes logarithmic. The losses of layers are taken to add
    up. Exact but for the steps of the budget, by dynamic programming (the multiple-choice knapsack).

    Args:
        curves: from `sensitivity`.
        costs: dict path -> function of a fraction that gives (ranks, cost), or (None, the dense layer's cost) for None.
        budget: largest sum of the costs.

    Returns:
        dict path -> ranks, without the layers that stay dense.

    Raises:
        ValueError: no points of the curves are within the budget.
    """
    unit = budget / _BINS
    best, choices = np.zeros(_BINS + 1), []
    for path, curve in curves.items():
        options = [(*costs[path](None), 0.0)]
        if curve:
            fractions, losses = np.array([(fraction, loss) for fraction, _, loss in curve]).T
            losses = np.maximum(losses, 1e-9)
            for fraction in np.geomspace(fractions[0], fractions[-1], 80):
                loss = np.exp(np.interp(np.log(fraction), np.log(fractions), np.log(losses)))
                options.append((*costs[path](float(fraction)), loss))
        total, chosen = np.full(_BINS + 1, np.inf), np.zeros(_BINS + 1, int)
        for number, (_, cost, loss) in enumerate(options):
            steps = int(np.ceil(cost / unit))
            if steps <= _BINS:
                reached = np.full(_BINS + 1, np.inf)
                reached[steps:] = best[: _BINS + 1 - steps] + loss
                chosen[reached < total] = number
                total = np.minimum(total, reached)
        choices.append((path, options, chosen))
        best = total
    if not np.isfinite(best[-1]):
        raise ValueError(f"no points of the curves together cost at most {budget:,}")
    left, plan = _BINS, {}
    for path, options, chosen in reversed(choices):
        ranks, cost, _ = options[chosen[left]]
        left -= int(np.ceil(cost / unit))
        if ranks is not None:
            plan[path] = ranks
    return dict(reversed(plan.items()))


def correct(new, model, images):
    """Refit the factorized layers of `new` to what the layers of `model` compute on these images.

    From the first layer to the last, the last small layer of each chain gets the weights (and the bias) at which its
    output is nearest to the dense layer's, given what the layers before it, corrected already, hand on: so it makes up
    for their errors, too (asymmetric reconstruction, Zhang et al. 2015, arXiv 1505.06798). Without a bias the means of
    the batch norms behind it take its place; the rest of their statistics stays the dense network's, whose outputs
    these are again. `new` is changed in place.

    Args:
        new: a factorized copy of `model`, from `convert.factorize`, whose layers keep their names.
        model: built, functional or sequential, of one input.
        images: (N, H, W, C).

    Raises:
        ValueError: the model does not take the images.
    """
    images = check_images(model, images)
    ours = {place.path: place for place in keras_graph.layer_nodes(new)}
    for place in keras_graph.layer_nodes(model):
        dense, chain = place.layer, ours.get(place.path)
        last = chain and chain.layer
        if (
            type(dense) is not layers.Conv2D
            or type(last) is not layers.Conv2D
            or dense.kernel.shape == last.kernel.shape
        ):
            continue
        _refit(new, last, model, dense, images, _norms_behind(chain, ours), len(place.calls))


def reestimate(model, images):
    """Batch-norm statistics anew, as training on these images would gather them: the mean over batches. In place.

    Raises:
        ValueError: the model does not take the images.
    """
    images = check_images(model, images)
    norms = [
        place.layer for place in keras_graph.layer_nodes(model) if isinstance(place.layer, layers.BatchNormalization)
    ]
    if not norms:
        return
    before = [(norm.momentum, norm.trainable) for norm in norms]
    try:
        seen = 0
        for part in _batches(images):
            for norm in norms:
                norm.trainable, norm.momentum = True, seen / (seen + len(part))  # a mean, not a moving average
            model(part, training=True)
            seen += len(part)
    finally:
        for norm, (momentum, trainable) in zip(norms, before, strict=True):
            norm.momentum, norm.trainable = momentum, trainable


# --- parts -------------------------------------------------------------------------------------------------------


def _possible(fractions, method, shape):
    """Those at which the ranks are at least 1; where there is none, the one of rank 1."""
    ones = (1,) * len(ranks_of.maximum(method, shape))
    least = (ranks_of.parameters(method, shape, ones) + 0.5) / ranks_of.dense(shape)
    return [fraction for fraction in fractions if fraction >= least] or [least]


def _norms_behind(place, places):
    """The batch norms whose means take that of a convolution without a bias: they read it, and nothing else does."""
    norms = {id(other.layer): other.layer for other in places.values() if other.is_channel_norm}
    behind = [norms.get(id(after)) for after in place.after]
    own = place.layer.use_bias or not keras_graph.is_linear(place.layer)  # with an activation they read something else
    return [] if own or None in behind else behind


def _refit(new, last, model, dense, images, norms, calls):
    """Least squares of the dense layer's output, before its activation, on the patches that `last` reads.

    `norms`: whose means take the missing one (`_norms_behind`).
    """
    sums = 0
    for part in _batches(images):
        outputs = _seen(model, dense, part, lambda x: _linear(dense, x), calls)
        inputs = _seen(new, last, part, lambda x: _patches(last, x), calls)
        for z, y in zip(inputs, outputs, strict=True):
            rows = np.concatenate([np.ones((len(z), 1)), z, y], axis=1, dtype=np.float64)
            sums = sums + rows.T @ rows  # all sums, squares and products at once
    size = int(np.prod(last.kernel.shape[:3]))
    products = sums / sums[0, 0]
    mean, squares = products[0, 1:], products[1:, 1:]
    if last.use_bias or norms:  # something can take a mean
        squares = squares - np.outer(mean, mean)
    start = last.get_weights()[0].reshape(size, -1).astype(np.float64)
    gram, right = squares[:size, :size], squares[:size, size:]
    weights = start + _least_squares(gram, right - gram @ start)
    missing = mean[size:] - mean[:size] @ weights
    last.set_weights([weights.reshape(last.kernel.shape), *([missing] if last.use_bias else [])])
    for norm in norms:
        norm.moving_mean.assign(keras.ops.convert_to_numpy(norm.moving_mean) - missing)


def _least_squares(gram, right):
    """Least-squares solution from the normal equations, directions that the data hardly show left at zero."""
    values, vectors = np.linalg.eigh(gram)
    if values[-1] <= 0:
        return np.zeros_like(right)
    return vectors @ ((vectors.T @ right) / (np.maximum(values, 0) + 1e-6 * values[-1])[:, None])


def _linear(layer, x):
    y = layer.convolution_op(x, keras.ops.cast(layer.kernel, x.dtype))
    return _rows(keras.ops.add(y, keras.ops.cast(layer.bias, x.dtype)) if layer.use_bias else y)


def _patches(layer, x):
    """(N h w, kh kw S) what a layer reads, by a convolution with the identity in its own geometry."""
    kh, kw, channels, _ = layer.kernel.shape
    identity = np.eye(kh * kw * channels, dtype="float32").reshape(kh, kw, channels, -1)
    return _rows(layer.convolution_op(x, keras.ops.cast(identity, x.dtype)))


def _rows(x):
    rows = keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")).reshape(-1, x.shape[-1])
    return rows[:: len(rows) // _ROWS | 1]  # an odd step, so that it does not keep to some columns of the image


class _Enough(BaseException):  # no Exception, to which Keras would add its own words
    """Nothing behind this layer is of interest."""


def _seen(model, layer, images, function, calls):
    """`function` of what the layer reads, for each of its `calls`, when the model sees the images."""
    seen, call = [], layer.call

    def watched(inputs, *args, **kwargs):
        seen.append(function(inputs))
        if len(seen) == calls:
            raise _Enough
        return call(inputs, *args, **kwargs)

    layer.call = watched  # as Keras's own calibration of quantized layers does it
    with contextlib.suppress(_Enough):
        try:
            model(images, training=False)
        finally:
            del layer.call  # the class's own again
    return seen


def _outputs(model, images):
    """(N, D) all outputs of the model."""
    parts = [keras.tree.flatten(model.predict_on_batch(part)) for part in _batches(images)]
    rows = [np.concatenate([np.reshape(y, (len(y), -1)) for y in part], axis=1) for part in parts]
    return np.concatenate(rows).astype(np.float64)


def _loss(before, after):
    if before.min() >= 0 and np.allclose(before.sum(axis=1), 1, atol=1e-2):
        return float(np.mean(np.sum(before * (np.log(before + 1e-9) - np.log(after + 1e-9)), axis=1)))
    return float(np.mean((after - before) ** 2) / max(np.var(before), 1e-30))


def _batches(images, size=_BATCH):
    return [images[start : start + size] for start in range(0, len(images), size)]
