"""Data-driven calibration on unlabelled images: refit factors, re-estimate batch-norm statistics.

Nothing here computes a gradient. `images` are a few hundred inputs of the model, (N, H, W, C), normalised as in
training, in any of the forms that `check_images` takes. Models in half precision are copied to float32 for this,
because many processors only emulate half precision.
"""

import keras
import numpy as np
import scipy.linalg
from keras import layers

from fcnn_utils import _calibration_inputs, keras_graph, layer_kinds
from fcnn_utils._calibration_inputs import batches
from fcnn_utils._network_runs import Rest, batch_size, following_norms, images_within
from fcnn_utils._patches import Moments, linear_rows, mean_output, patch_rows, rows_per_image
from fcnn_utils._progress import Progress

_BATCH = 128  # images at a time in training mode, if their activations stay within 4 GiB
_FEWEST = 128  # images for patch statistics and refits, if there are so many
_PASS_MACS = 5e11  # budget of MACs for one pass over the images


def check_images(model, images):
    """Return calibration images as a list of arrays, one for each input of the model.

    Args:
        model: built functional or Sequential model.
        images: (N, H, W, C) for a model with one input; a list or a dict (by input name) of arrays for several.
            Or an iterable of such batches: a tf.data.Dataset, a generator, a PyTorch DataLoader or a
            keras.utils.PyDataset, of which at most 2,000 inputs are used. Labels in pairs (inputs, labels) are ignored.

    Returns:
        list of arrays (N, ...), in the dtypes and the order of the model's inputs.

    Raises:
        ValueError: the images do not have the shapes or types of the model's inputs, there are none, or they are not
            finite. Or they are pixels in whole numbers, and the model does not rescale them.

    Warns:
        UserWarning: the images differ from those of the training, by the statistics of the first batch norm.
    """
    inputs = _calibration_inputs.take(model, images)
    _calibration_inputs.warn_if_unlike_training(model, inputs)
    return inputs


def patch_moments(model, node, images):
    """Estimate mean and covariance of the patches that a convolution or a Dense layer reads.

    Reading stops after the batch with the 128th image, or later, when there are more than 3 · D patches of D values. If
    all images give fewer patches, the covariance is shrunk towards a multiple of the identity (OAS: Chen, Wiesel, Eldar
    & Hero 2010, arXiv 0907.4698).

    Args:
        model: built model with the layer in it.
        node: `keras_graph.LayerNode` of the layer.
        images: see `check_images`.

    Returns:
        mean (D,) and covariance (D, D) in float64, for patches of D = prod(kernel size) · S values.

    Raises:
        ValueError: the layer reads values that are not finite.
    """
    return moments_of(Rest(model, _calibration_inputs.take(model, images)), node)


def limit_images(model, images):
    """Return the first images within a budget of MACs for one pass, at least 128 if there are so many."""
    count = max(_FEWEST, images_within(model, images, _PASS_MACS))
    return [x[:count] for x in images]


def moments_of(rest, node):
    """Return `patch_moments` of a layer, from the `Rest` that contains it."""
    kind, moments, seen = layer_kinds.KernelLayer(node.layer), Moments(node.path), 0
    per_image = rows_per_image(rest.count)
    for read in rest.read(node):
        for x in read:
            rows = patch_rows(kind, x, per_image)
            moments.add(rows, rows[:, :0])
        seen += len(x)
        if moments.are_enough and seen >= _FEWEST:
            break
    mean, covariance = moments.normal_equations()[:2]
    return mean, covariance if moments.are_enough else _shrunk(covariance, moments.count)


def refit_kernel(kernel, decomposition, moments):
    """Fit the last factor of a decomposition to the layer's output rather than to its kernel.

    With the covariance of the patches p, and B the decomposition's `basis`:  min over W  E‖(K − B W)ᵀ (p − p̄)‖².

    Args:
        kernel: (kh, kw, S, T), the kernel that was decomposed.
        decomposition: of that kernel.
        moments: (mean, covariance) of the patches, from `patch_moments`. The fit uses the type of the covariance;
            float32 takes about half the time of float64.

    Returns:
        kernel (kh, kw, S, T), and the shift of the bias (T,) that keeps the mean output.
    """
    mean, covariance = moments
    rebuilt = fit_to_outputs(kernel, decomposition, covariance)[0]
    dense = np.reshape(kernel, rebuilt.shape).astype(rebuilt.dtype)
    return rebuilt.reshape(kernel.shape), mean @ (dense - rebuilt)


def fit_to_outputs(kernel, decomposition, covariance):
    """Fit the last factor of a decomposition as in `refit_kernel`.

    Args:
        kernel, decomposition: as in `refit_kernel`.
        covariance: (D, D) of the patches.

    Returns:
        the fitted kernel (D, T), and the covariance times the fitted kernel (D, T), which is cheap to compute here.
    """
    dense, basis, last = (
        x.astype(covariance.dtype)
        for x in (np.reshape(kernel, (-1, kernel.shape[-1])), decomposition.basis(), decomposition.last_factor())
    )
    weighted = basis.T @ covariance
    fitted = last + _least_squares(weighted @ basis, weighted @ (dense - basis @ last))
    return basis @ fitted, weighted.T @ fitted


def refit_layers(new, model, images, *, progress=None):
    """Refit the factorized layers of `new` to what the dense layers of `model` compute on these images.

    The chains are refitted in their order in the model. In each, only the last layer changes: it gets the weights
    and the bias at which its output is nearest to that of the original layer. It reads what the refitted layers
    before it compute, so it corrects their errors, too (asymmetric reconstruction: Zhang et al. 2015, arXiv
    1505.06798). If the images give it at most 3 · D rows of D values, their covariance is shrunk as in `patch_moments`,
    and the weights stay nearer to those from the kernel. If a layer has no bias, the moving means of the batch norms
    after it are shifted instead. If there are no such batch norms, the mean is part of the fit. A layer counts as
    factorized if its kernel has another shape than in `model`. Grouped and transposed layers at the end of a chain keep
    their weights. Only their mean output is corrected, by the bias or by the batch norms after them. An EinsumDense
    layer stays as it is if its bias is not one value for each column of its matrix. `new` is changed in place.

    Args:
        new: a factorized copy of `model`, from `compress.factorize`, whose layers keep their names.
        model: built functional or Sequential model.
        images: see `check_images`. The first ones within a budget of 5e11 MACs are used, but at least 128.
        progress: `Progress` to print with, or None.

    Raises:
        ValueError: the model does not take the images, or a layer reads values that are not finite.
    """
    images = _calibration_inputs.take(model, images)
    images = limit_images(model, images)
    single, model = keras_graph.in_float32(new), keras_graph.in_float32(model)
    nodes = {node.path: node for node in keras_graph.layer_nodes(model)}
    new_nodes = {node.path: node for node in keras_graph.layer_nodes(single)}
    chains = [path for path, node in nodes.items() if _is_factorized(node, new_nodes.get(path))]
    size = min(batch_size(each, images) for each in (single, model))  # the same batches for both
    new_rest, rest = Rest(single, images, size), Rest(model, images, size)
    for path in (progress or Progress(0)).over(chains, "layers refitted to the images"):
        chain_end = new_nodes[path]
        fit = _refit if layer_kinds.KernelLayer(chain_end.layer).has_patches else _match_means
        fit(new_rest, chain_end, rest, nodes[path], following_norms(chain_end, new_nodes))
    _copy_weights(single, new)


def reestimate(model, images):
    """Re-estimate the statistics of all batch norms as their mean over batches of these images. In place.

    The model runs in training mode. Therefore dropout and random augmentation layers act, too. A batch has 32 to 128
    images, depending on the memory that they need.

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
        for batch in batches(model, images, min(_BATCH, 4 * batch_size(model, images))):
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


def _is_factorized(node, chain_end):
    """Return whether the nodes of one path are a layer with a kernel and the end of its chain."""
    if chain_end is None or any(type(one.layer) not in layer_kinds.KINDS for one in (node, chain_end)):
        return False
    return node.layer.kernel.shape != chain_end.layer.kernel.shape


def _refit(new_rest, chain_end, rest, node, norms):
    """Fit the last layer of a chain to the dense layer's output, before its activation, by least squares.

    `rest` and `new_rest` are the `Rest` of the dense and the factorized model, `norms` the batch norms that take the
    shift of the mean (`following_norms`).
    """
    last, dense = chain_end.layer, node.layer
    kind, last_kind = layer_kinds.KernelLayer(dense), layer_kinds.KernelLayer(last)
    new_rest.start_before(last)
    rest.start_before(dense)
    per_image = rows_per_image(rest.count)
    outputs, moments = linear_rows(kind, per_image), Moments(node.path)
    for new_read, read in zip(new_rest.read(chain_end), rest.read(node), strict=True):
        for z, x in zip(new_read, read, strict=True):
            moments.add(patch_rows(last_kind, z, per_image), outputs(x))
    mean, gram, mean_output, right = moments.normal_equations()
    if last.bias is None and not norms:  # nothing corrects the mean separately
        gram, right = gram + np.outer(mean, mean), right + np.outer(mean, mean_output)
    start = last_kind.kernels()[0].reshape(len(mean), -1).astype(np.float64)
    residual = right - gram @ start
    if not moments.are_enough:  # stay near the start
        gram = _shrunk(gram, moments.count)
    weights = start + _least_squares(gram, residual)
    missing = mean_output - mean @ weights
    weights = last_kind.keras_kernel([weights.reshape(last_kind.kernel_shape)])
    bias = [] if last.bias is None else [keras.ops.convert_to_numpy(dense.bias) + last_kind.keras_bias(missing)]
    last.set_weights([weights, *bias])
    _shift_norms(norms, missing)


def _match_means(new_rest, chain_end, rest, node, norms):
    """Give the output of a chain the mean of the dense layer's output; the arguments are those of `_refit`."""
    last = chain_end.layer
    if layer_kinds.KernelLayer(last).einsum or (last.bias is None and not norms):
        return
    new_rest.start_before(last)
    rest.start_before(node.layer)
    means = [mean_output(each.layer, part.read(each)) for each, part in ((node, rest), (chain_end, new_rest))]
    missing = means[0] - means[1]
    if last.bias is not None:
        last.bias.assign(keras.ops.convert_to_numpy(last.bias) + missing)
    _shift_norms(norms, missing)


def _shift_norms(norms, missing):
    for norm in norms:
        norm.moving_mean.assign(keras.ops.convert_to_numpy(norm.moving_mean) - missing)


def _shrunk(covariance, count):
    """Shrink a sample covariance (D, D) of `count` rows by as much as is best for Gaussian rows (OAS)."""
    level, power = np.trace(covariance) / len(covariance), np.mean(covariance**2)
    excess = (count + 1) * (power - level**2 / len(covariance))
    share = 1.0 if excess <= 0 else min(1.0, (power + level**2) / excess)
    return (1 - share) * covariance + share * level * np.eye(len(covariance))


def _least_squares(gram, right):
    """Solve the normal equations; directions that the data hardly show get (almost) no change."""
    dtype, gram, right = right.dtype, gram.astype(np.float64), right.astype(np.float64)
    vector = gram[:, np.argmax(np.diagonal(gram))]
    if not vector.any():
        return np.zeros(right.shape, dtype)
    for _ in range(20):  # power iteration: an estimate of the largest eigenvalue
        vector = gram @ (vector / np.linalg.norm(vector))
    largest = np.linalg.norm(vector)
    try:
        factor = scipy.linalg.cho_factor(gram + 1e-6 * largest * np.eye(len(gram)))
        return scipy.linalg.cho_solve(factor, right).astype(dtype)
    except np.linalg.LinAlgError:  # rounding made a small eigenvalue negative
        values, vectors = np.linalg.eigh(gram)
        scaled = (vectors.T @ right) / (np.maximum(values, 0) + 1e-6 * largest)[:, None]
        return (vectors @ scaled).astype(dtype)
