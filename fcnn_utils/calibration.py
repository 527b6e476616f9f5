"""Data-driven calibration on unlabelled images: predict losses, refit factors, re-estimate batch-norm statistics.

Nothing here computes a gradient. `images` are a few hundred inputs of the model, (N, H, W, C), normalised as in
training, in any of the forms that `check_images` takes. Models in half precision are copied to float32 for this,
because many processors only emulate half precision.
"""

import math

import keras
import numpy as np
from keras import layers

from fcnn_utils import _calibration_inputs, _graph_cut, factorizations, keras_graph, layer_kinds, rank_selection
from fcnn_utils._calibration_inputs import batches as _batches
from fcnn_utils._patches import Moments, linear_copy, output_rows, patch_rows
from fcnn_utils._progress import progress

_BATCH = 128  # images at a time
_SENSITIVITY_IMAGES = 256  # to refit a kernel with
_LOSS_IMAGES = 128  # to predict a loss from; with 256, the accuracy of the factorized networks is the same
_MOST_VALUES = 10_000  # of a patch whose covariance is estimated: that takes about 24 bytes times the square of this
_KEPT_BYTES = 2**30  # limit for the stored inputs of a layer, so that the layers before it need not run again


def check_images(model, images):
    """Return calibration images as a list of arrays, one for each input of the model.

    Args:
        model: built functional or Sequential model.
        images: (N, H, W, C) for a model with one input; a list or a dict (by input name) of arrays for several.
            Or an iterable of such batches: a tf.data.Dataset, a generator, a PyTorch DataLoader, a
            keras.utils.PyDataset; at most 2,000 inputs are taken from it. Pairs (inputs, labels) are taken without the
            labels.

    Raises:
        ValueError: the shapes or types do not fit the model's inputs, there are none, or they are not finite.
            Also if the images are integers, but the model has neither integer inputs nor a layer that rescales them.

    Warns:
        UserWarning: they are unlike the images of the training, by the statistics of the first batch norm.
    """
    inputs = _calibration_inputs.take(model, images)
    _calibration_inputs.warn_if_unlike_training(model, inputs)
    return inputs


# long: half of it is the docstring
def layer_sensitivity(model, method, images, nodes, fractions, *, verbose=0, **options):
    """Measure how much the network's outputs change when one layer is factorized, for every layer and size.

    Each kernel in turn is replaced by its decomposition; all other layers stay as they are. The last factor is
    refitted to the layer's output on these images (`refit_kernel`), unless `nodes` below says otherwise. The loss
    is the mean Kullback-Leibler divergence from the probabilities of the unchanged model, if the outputs of an
    image sum to 1 (one softmax). For other models it is the squared change of the output relative to its variance.

    Args:
        model: built functional or Sequential model. It is not changed.
        method: name or class of a factorization.
        images: see `check_images`. The first 256 are used for the refits, the first 128 for the losses.
        nodes: `keras_graph.LayerNode` of each layer, of one of the `layer_kinds.KINDS`. The kernels of grouped and of
            transposed convolutions are not refitted, nor those of layers that read more than 10,000 values.
        fractions: shares of a kernel's parameters to try, rising. Those below rank 1 are left out; if none is left,
            rank 1 is tried.
        verbose: 1 to print progress.
        options: of the decomposition. CP and Tucker make 5 sweeps here unless told otherwise.

    Returns:
        dict path -> list of (fraction, ranks, loss).

    Raises:
        ValueError: the model does not take the images, or there is no such method.
    """
    images, method = _calibration_inputs.take(model, images), factorizations.get(method)
    images = [x[:_SENSITIVITY_IMAGES] for x in images]
    if issubclass(method, (factorizations.CP, factorizations.Tucker2)):
        options = {"n_iter": 5} | options
    trial = keras_graph.rebuild(keras_graph.in_float32(model), {})
    trial_nodes = {node.path: node for node in keras_graph.layer_nodes(trial)}
    before, rest = _outputs(trial, [x[:_LOSS_IMAGES] for x in images]), _Rest(trial, images)
    wanted, curves = {node.path for node in nodes}, {}
    in_order = [node for path, node in trial_nodes.items() if path in wanted]
    for own in progress(in_order, "layers whose sensitivity is measured", verbose):
        curve = []
        kind, (kernel, *bias) = layer_kinds.KernelLayer(own.layer), own.layer.get_weights()
        kernels = kind.kernels()
        norms = _following_norms(own, trial_nodes)
        norm_weights = [norm.get_weights() for norm in norms]
        rest.start_before(own.layer)
        first = [x[:_LOSS_IMAGES] for x in rest.images]
        moments = None
        if kind.has_patches and math.prod(kind.kernel_shape[:-1]) <= _MOST_VALUES:
            mean, covariance = patch_moments(rest.model, own, rest.images)
            if not bias and not norms:  # no bias can correct the mean: measure it as a part of the error
                mean, covariance = np.zeros_like(mean), covariance + np.outer(mean, mean)
            moments = mean, covariance
        feasible = _feasible_fractions(fractions, method, kind.kernel_shape)
        all_ranks = [rank_selection.ranks_for_fraction(method, kind.kernel_shape, fraction) for fraction in feasible]
        try:
            ladders = [factorizations.decompose_ladder(method, part, all_ranks, **options) for part in kernels]
        except ValueError as error:
            raise ValueError(f"layer {own.path!r}: {error}") from None
        for fraction, ranks, *parts in zip(feasible, all_ranks, *ladders, strict=True):
            if moments is None:
                rebuilt, shift = [part.to_kernel() for part in parts], np.zeros(())
            else:
                rebuilt, shift = refit_kernel(kernels[0], parts[0], moments)
                rebuilt = [rebuilt]
            own.layer.set_weights([kind.keras_kernel(rebuilt), *(value + kind.keras_bias(shift) for value in bias)])
            for norm, values in zip(norms, norm_weights, strict=True):
                norm.moving_mean.assign(values[-2] - shift)
            curve.append((fraction, ranks, _loss(before, _outputs(rest.model, first))))
        own.layer.set_weights([kernel, *bias])
        for norm, values in zip(norms, norm_weights, strict=True):
            norm.set_weights(values)
        curves[own.path] = curve
    return curves


def patch_moments(model, node, images):
    """Estimate mean and covariance of the patches that a convolution or a Dense layer reads.

    It stops once there are three times as many patches as a patch has values.

    Args:
        model: built model with the layer in it.
        node: `keras_graph.LayerNode` of the layer.
        images: see `check_images`.

    Returns:
        mean (D,) and covariance (D, D) in float64, for patches of D = prod(kernel size) · S values.

    Raises:
        ValueError: the layer reads values that are not finite.
    """
    kind = layer_kinds.KernelLayer(node.layer)
    moments, whole = Moments(node.path), _Rest(model, _calibration_inputs.take(model, images))
    for read in whole.read(node, 64):
        for x in read:
            rows = patch_rows(kind, x)
            moments.add(rows, rows[:, :0])
        if moments.count > 3 * rows.shape[1]:
            break
    return moments.normal_equations()[:2]


def refit_kernel(kernel, decomposition, moments):
    """Fit the last factor of a decomposition to the layer's output rather than to its kernel.

    With the covariance of the patches p, and B the decomposition's `basis`:  min over W  E‖(K − B W)ᵀ (p − p̄)‖².

    Args:
        kernel: (kh, kw, S, T), the kernel that was decomposed.
        decomposition: of that kernel.
        moments: (mean, covariance) of the patches, from `patch_moments`.

    Returns:
        kernel (kh, kw, S, T), and the shift of the bias (T,) that keeps the mean output.
    """
    mean, covariance = moments
    dense = np.reshape(kernel, (-1, kernel.shape[-1])).astype(np.float64)
    basis, last = decomposition.basis(), decomposition.last_factor()
    weighted = basis.T @ covariance
    change = _least_squares(weighted @ basis, weighted @ (dense - basis @ last))
    rebuilt = basis @ (last + change)
    return rebuilt.reshape(kernel.shape), mean @ (dense - rebuilt)


def refit_layers(new, model, images, *, verbose=0):
    """Refit the factorized layers of `new` to what the dense layers of `model` compute on these images.

    The chains are refitted in their order in the model. In each, only the last layer changes: it gets the weights
    and the bias at which its output is nearest to that of the original layer. It reads what the refitted layers
    before it compute, so it corrects their errors, too (asymmetric reconstruction: Zhang et al. 2015, arXiv
    1505.06798). If a layer has no bias, the means of the batch norms behind it are shifted instead; without these
    the mean is part of the fit. A layer is taken for factorized if its kernel has another shape than in `model`.
    Grouped and transposed layers at the end of a chain are not refitted. `new` is changed in place.

    Args:
        new: a factorized copy of `model`, from `compress.factorize`, whose layers keep their names.
        model: built functional or Sequential model.
        images: see `check_images`.
        verbose: 1 to print progress.

    Raises:
        ValueError: the model does not take the images, or a layer reads values that are not finite.
    """
    images = _calibration_inputs.take(model, images)
    single, model = keras_graph.in_float32(new), keras_graph.in_float32(model)
    nodes = {node.path: node for node in keras_graph.layer_nodes(model)}
    new_nodes = {node.path: node for node in keras_graph.layer_nodes(single)}
    chains = [path for path, node in nodes.items() if _is_refitted(node, new_nodes.get(path))]
    new_rest, rest = _Rest(single, images), _Rest(model, images)
    for path in progress(chains, "layers refitted to the images", verbose):
        _refit(new_rest, new_nodes[path], rest, nodes[path], _following_norms(new_nodes[path], new_nodes))
    _copy_weights(single, new)


def reestimate(model, images):
    """Re-estimate the statistics of all batch norms as their mean over batches of these images. In place.

    The model runs in training mode, in batches of 128: dropout and random augmentation layers act, too.

    Args:
        model: built functional or Sequential model. It is changed.
        images: see `check_images`.

    Raises:
        ValueError: the model does not take the images.
    """
    images = _calibration_inputs.take(model, images)
    changed, model = model, keras_graph.in_float32(model)
    nodes = keras_graph.layer_nodes(model)
    norms = [node.layer for node in nodes if isinstance(node.layer, layers.BatchNormalization)]
    if not norms:
        return
    before = [(norm.momentum, norm.trainable) for norm in norms]
    try:
        seen = 0
        for batch in _batches(model, images, _BATCH):
            size = len(keras.tree.flatten(batch)[0])
            for norm in norms:
                norm.trainable, norm.momentum = True, seen / (seen + size)  # a mean, not a moving average
            model(batch, training=True)
            seen += size
    finally:
        for norm, (momentum, trainable) in zip(norms, before, strict=True):
            norm.momentum, norm.trainable = momentum, trainable
    _copy_weights(model, changed)


# --- parts -----------------------------------------------------------------------------------------------------------


def _copy_weights(one, other):
    """Give a model the weights of its copy in float32."""
    if one is not other:
        nodes = keras_graph.layer_nodes(one), keras_graph.layer_nodes(other)
        for source, target in zip(*nodes, strict=True):
            target.layer.set_weights(source.layer.get_weights())


class _Rest:
    """The part of a model that is still to be run on images that have gone through the part before.

    It is used for layers in the order of the model.

    Attributes:
        model: the part; it shares its layers with the whole model.
        images: list of arrays, what it reads.
    """

    def __init__(self, model, images):
        self.model, self.images = model, images

    def start_before(self, layer):
        """Run what comes before the layer and leave it out from now on, unless the result would be too large."""
        head, tail = _graph_cut.split_before(self.model, layer)
        shape = () if head is None else head.output_shape[1:]
        if head is None or None in shape or 4 * len(self.images[0]) * math.prod(shape) > _KEPT_BYTES:
            return
        batches = _batches(self.model, self.images, _BATCH)
        parts = [keras.ops.convert_to_numpy(head(batch, training=False)) for batch in batches]
        self.model, self.images = tail, [np.concatenate(parts)]

    def read(self, node, size):
        """Yield, for each batch, what a layer reads at each of its calls, in float32."""
        reader = keras_graph.input_model(self.model, node.path)
        for batch in _batches(self.model, self.images, size):
            yield [keras.ops.cast(x, "float32") for x in keras.tree.flatten(reader(batch, training=False))]


def _is_refitted(node, chain_end):
    """Return whether the nodes of one path are a layer with a kernel and the end of its chain, to be refitted."""
    if chain_end is None or any(type(one.layer) not in layer_kinds.KINDS for one in (node, chain_end)):
        return False
    is_changed = node.layer.kernel.shape != chain_end.layer.kernel.shape
    return is_changed and layer_kinds.KernelLayer(chain_end.layer).has_patches


def _feasible_fractions(fractions, method, kernel_shape):
    """Return the fractions at which the ranks are at least 1; if there is none, that of rank 1."""
    ones = (1,) * len(method.max_ranks(kernel_shape))
    least = (method.count_parameters(kernel_shape, ones) + 0.5) / np.prod(kernel_shape)
    return [fraction for fraction in fractions if fraction >= least] or [least]


def _following_norms(node, nodes):
    """Return the batch norms whose means can take a shift of a convolution without a bias.

    They must read the convolution directly, and nothing else may read it.
    """
    count, kind = len(node.calls[0][1]), layer_kinds.KernelLayer(node.layer)
    if node.layer.bias is not None or not keras_graph.has_linear_activation(node.layer):
        return []
    if kind.output_axes(count) != {count - 1}:
        return []
    norms = {id(other.layer): other.layer for other in nodes.values() if other.is_channel_norm}
    found = [norms.get(id(consumer)) for consumer in node.consumers]
    return [] if None in found else found


def _refit(new_rest, chain_end, rest, node, norms):
    """Fit the last layer of a chain to the dense layer's output, before its activation, by least squares.

    `rest` and `new_rest` are the `_Rest` of the dense and the factorized model, `norms` the batch norms that take the
    shift of the mean (`_following_norms`).
    """
    last, dense, linear = chain_end.layer, node.layer, None
    kind, last_kind = layer_kinds.KernelLayer(dense), layer_kinds.KernelLayer(last)
    new_rest.start_before(last)
    rest.start_before(dense)
    moments = Moments(node.path)
    for new_read, read in zip(new_rest.read(chain_end, _BATCH), rest.read(node, _BATCH), strict=True):
        linear = linear or linear_copy(dense, read[0])
        outputs = [output_rows(kind, linear(x)) for x in read]
        inputs = [patch_rows(last_kind, x) for x in new_read]
        for z, y in zip(inputs, outputs, strict=True):
            moments.add(z, y)
    mean, gram, mean_output, right = moments.normal_equations()
    if last.bias is None and not norms:  # nothing corrects the mean separately
        gram, right = gram + np.outer(mean, mean), right + np.outer(mean, mean_output)
    start = last_kind.kernels()[0].reshape(len(mean), -1).astype(np.float64)
    weights = start + _least_squares(gram, right - gram @ start)
    missing = mean_output - mean @ weights
    weights = last_kind.keras_kernel([weights.reshape(last_kind.kernel_shape)])
    last.set_weights([weights, *([] if last.bias is None else [last_kind.keras_bias(missing)])])
    for norm in norms:
        norm.moving_mean.assign(keras.ops.convert_to_numpy(norm.moving_mean) - missing)


def _least_squares(gram, right):
    """Solve the normal equations; directions that the data hardly show get (almost) no change."""
    values, vectors = np.linalg.eigh(gram)
    if values[-1] <= 0:
        return np.zeros_like(right)
    return vectors @ ((vectors.T @ right) / (np.maximum(values, 0) + 1e-6 * values[-1])[:, None])


def _outputs(model, images):
    """Return all outputs of the model as rows (N, D)."""
    # called, not by `predict_on_batch`: most models are run once, and compiling them would take longer
    parts = [keras.tree.flatten(model(batch, training=False)) for batch in _batches(model, images, _BATCH)]
    parts = [[keras.ops.convert_to_numpy(y) for y in part] for part in parts]
    rows = [np.concatenate([np.reshape(y, (len(y), -1)) for y in part], axis=1) for part in parts]
    return np.concatenate(rows).astype(np.float64)


def _loss(before, after):
    """Return the mean KL divergence in nats if the rows are probabilities, else the relative squared change."""
    if before.min() >= 0 and np.allclose(before.sum(axis=1), 1, atol=1e-2):
        return float(np.mean(np.sum(before * (np.log(before + 1e-9) - np.log(after + 1e-9)), axis=1)))
    return float(np.mean((after - before) ** 2) / max(np.var(before), 1e-30))
