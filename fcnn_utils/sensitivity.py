"""Predict how much a network's outputs change when one of its layers is factorized.

Unlabelled images are enough; see `calibration` for their forms. Each layer is tried by itself:
its kernel is replaced by a decomposition, and all other layers stay as they are. The last factor is refitted to the
layer's output on these images (`calibration.refit_kernel`). Grouped and transposed convolutions, and layers that read
more than 10,000 values for one output, are not refitted: only the mean of their output is corrected.

The loss is the mean Kullback-Leibler divergence from the probabilities of the unchanged model, if the outputs of an
image sum to 1 (one softmax). For other models it is the squared change of the outputs relative to their variance.

`layer_sensitivity` measures this loss for one method. `predict_losses` predicts it for any number of methods and ranks.
For layers that are refitted, it computes the error of the layer's output from the covariance of the patches, measures
the loss for a few decompositions, and interpolates the others by their output errors. For the other layers it measures
every loss.
"""

import dataclasses
import itertools
import math

import numpy as np

from fcnn_utils import _calibration_inputs, calibration, factorizations, keras_graph, layer_kinds, rank_selection
from fcnn_utils._network_runs import Rest, following_norms, images_within, output_change, outputs_of
from fcnn_utils._patches import mean_output
from fcnn_utils._progress import Progress

_IMAGES = 256  # most images for a refit; fewer for expensive networks (`calibration.limit_images`)
_LOSS_IMAGES = 16, 32  # fewest and most for a loss
_LOSS_MACS = 1e12  # budget of MACs for measuring one loss of every layer
_MEASURED = 3  # losses measured per layer; then one more per method
_MEASURED_IF_EXPENSIVE = 2  # losses measured per layer of an expensive network; no further ones per method
_EXACT = 1e-12  # an output error that is due to rounding
_FLOAT32_SIZE = 500  # use float32 for larger patches: it takes half the time
_FEW_SWEEPS_SIZE = 1_000_000  # kernels of so many values get half as many sweeps
_MOST_VALUES = 10_000  # of a patch whose covariance is estimated: that takes about 24 bytes times the square of this
# Sweeps of CP and Tucker: the errors of refitted outputs are then within 5% of those after 100 (on trained kernels).
_SWEEPS = {factorizations.CP: 20, factorizations.Tucker2: 5}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to factorize a layer.

    Attributes:
        method: class of the factorization.
        ranks: tuple of ints.
        loss: predicted loss of the network when only this layer is factorized (see the module).
        options: dict of the decomposition options that were computed from the images: `outputs` of SVD, or empty.
    """

    method: type
    ranks: tuple
    loss: float
    options: dict


def layer_sensitivity(model, method, images, nodes, fractions, *, verbose=0, **options):
    """Measure how much the network's outputs change when one layer is factorized, for every layer and size.

    Args:
        model: built functional or Sequential model. It is not changed.
        method: name or class of a factorization.
        images: see `calibration.check_images`. The refits use at most the first 256 images, fewer if the network is
            expensive, but at least 128. The losses use the first 128.
        nodes: `keras_graph.LayerNode` of each layer, of one of the `layer_kinds.KINDS`.
        fractions: shares of a kernel's parameters to try, rising. Those below rank 1 are left out; if none is left,
            rank 1 is tried.
        verbose: 1 to print progress.
        options: of the decomposition. The default of `n_iter` is 20 for CP and 5 for Tucker, and half of that for
            kernels of a million values or more.

    Returns:
        dict path -> list of (fraction, ranks, loss).

    Raises:
        ValueError: the model does not take the images, or there is no such method.
    """
    method, curves = factorizations.get(method), {}
    for trial in _trials(model, _calibration_inputs.take(model, images), nodes, 128, Progress(verbose)):
        shape = trial.kind.kernel_shape
        feasible = feasible_fractions(fractions, method, shape)
        ladder = [rank_selection.ranks_for_fraction(method, shape, fraction) for fraction in feasible]
        steps = trial.decompose([(method, ladder, options)])[0]
        losses = [trial.loss(trial.refit(step)) for step in steps]
        curves[trial.path] = list(zip(feasible, ladder, losses, strict=True))
    return curves


def predict_losses(model, images, ladders, *, progress=None):
    """Predict the loss for several methods and ranks of every layer.

    Args:
        model: built functional or Sequential model. It is not changed.
        images: see `calibration.check_images`. The output errors use at most the first 256 images, the losses at most
            the first 32. An expensive network gets fewer: at least 128 and 16, respectively.
        ladders: dict path -> list of (method, list of at least one tuple of ranks, options of the decomposition).
        progress: `Progress` to print with, or None.

    Returns:
        dict path -> list of lists of `Candidate`, one for each method in the order of its ranks.

    Raises:
        ValueError: the model does not take the images, or an argument is not allowed.
    """
    nodes = [node for node in keras_graph.layer_nodes(model) if node.path in ladders]
    found = {}
    images, (least, most) = _calibration_inputs.take(model, images), _LOSS_IMAGES
    count = min(max(images_within(model, images, _LOSS_MACS / max(len(nodes), 1)), least), most)
    for trial in _trials(model, images, nodes, count, progress):
        own = ladders[trial.path]
        fitted = [trial.fitted_options(method) for method, _, _ in own]
        groups = trial.decompose(
            [(method, ranks, options | more) for (method, ranks, options), more in zip(own, fitted, strict=True)]
        )
        losses = _losses(trial, groups, is_cheap=count > least)
        found[trial.path] = [
            [Candidate(method, step[0].ranks, loss, kept) for step, loss in zip(group, each, strict=True)]
            for (method, _, _), kept, group, each in zip(own, fitted, groups, losses, strict=True)
        ]
    return found


def feasible_fractions(fractions, method, kernel_shape):
    """Return the fractions at which the ranks are at least 1; if there is none, that of rank 1."""
    ones = (1,) * len(method.max_ranks(kernel_shape))
    least = (method.count_parameters(kernel_shape, ones) + 0.5) / np.prod(kernel_shape)
    return [fraction for fraction in fractions if fraction >= least] or [least]


# --- one layer -------------------------------------------------------------------------------------------------------


class _Trial:
    """A layer in a copy of the network, whose kernel is replaced to see what becomes of the outputs.

    Attributes:
        path: of the layer.
        kind: `layer_kinds.KernelLayer`.
    """

    # parameters: what the trials of all layers share
    def __init__(self, node, nodes, rest, before, count):
        self.path, self.kind, self._layer = node.path, layer_kinds.KernelLayer(node.layer), node.layer
        self._rest, self._before, self._count = rest, before, count
        self._kernel, *self._bias = node.layer.get_weights()
        self._kernels = self.kind.kernels()  # of the groups, as they are before a trial
        self._norms = following_norms(node, nodes)
        self._norm_weights = [norm.get_weights() for norm in self._norms]
        rest.start_before(node.layer)
        self._moments = self._reads = None
        if self.kind.has_patches and math.prod(self.kind.kernel_shape[:-1]) <= _MOST_VALUES:
            mean, covariance = calibration.moments_of(rest, node)
            if not self._bias and not self._norms:  # no bias can correct the mean: measure it as a part of the error
                mean, covariance = np.zeros_like(mean), covariance + np.outer(mean, mean)
            dtype = np.float32 if len(mean) > _FLOAT32_SIZE else np.float64
            self._moments = mean, covariance.astype(dtype)
            self._matrix = self._kernels[0].reshape(len(mean), -1).astype(dtype)
            self._weighted = self._moments[1] @ self._matrix
            self._outputs = self._matrix.T @ self._weighted
        elif (self._bias or self._norms) and not self.kind.einsum:
            self._reads = list(rest.read(node, count))
            self._mean = mean_output(node.layer, self._reads)

    @property
    def is_refitted(self):
        return self._moments is not None

    def fitted_options(self, method):
        """Return the options of the decomposition that come from the images."""
        return {"outputs": self._outputs} if self.is_refitted and issubclass(method, factorizations.SVD) else {}

    def decompose(self, ladders):
        """Return for each (method, ladder, options) a list over its ranks, of decompositions of all groups."""
        ladders = [(method, ranks, self._few_sweeps(method) | options) for method, ranks, options in ladders]
        try:
            groups = [factorizations.decompose_ladders(kernel, ladders) for kernel in self._kernels]
        except ValueError as error:
            raise ValueError(f"layer {self.path!r}: {error}") from None
        return [list(zip(*by_group, strict=True)) for by_group in zip(*groups, strict=True)]

    def _few_sweeps(self, method):
        count = next((count for kind, count in _SWEEPS.items() if issubclass(method, kind)), None)
        if count is None:
            return {}
        return {"n_iter": count if self._kernels[0].size < _FEW_SWEEPS_SIZE else math.ceil(count / 2)}

    def refit(self, parts):
        """Return (kernels, shift of the bias) of decompositions of all groups, refitted if it can be."""
        if not self.is_refitted:
            kernels = [part.to_kernel() for part in parts]
            return kernels, self._missing_mean(kernels)
        kernel, shift = calibration.refit_kernel(self._kernels[0], parts[0], self._moments)
        return [kernel], shift

    def _missing_mean(self, kernels):
        """Return what the mean of the layer's output lacks with other kernels, if a bias or a norm can correct it."""
        if self._reads is None:
            return np.zeros(())
        self._layer.set_weights([self.kind.keras_kernel(kernels), *self._bias])
        return self._mean - mean_output(self._layer, self._reads)

    def output_error(self, parts):
        """Return the squared error of the output of a refitted layer, relative to the variance of this output."""
        fitted, weighted = calibration.fit_to_outputs(self._kernels[0], parts[0], self._moments[1])
        lost = np.sum((self._matrix - fitted) * (self._weighted - weighted))
        return max(float(lost / max(np.trace(self._outputs), 1e-300)), 0.0)

    def loss(self, refitted):
        """Return the loss of the network with the kernels and the shift of `refit`."""
        kernels, shift = refitted
        biases = [value + self.kind.keras_bias(shift) for value in self._bias]
        self._layer.set_weights([self.kind.keras_kernel(kernels), *biases])
        for norm, values in zip(self._norms, self._norm_weights, strict=True):
            norm.moving_mean.assign(values[-2] - shift)
        return output_change(self._before, self._rest.outputs(self._count))

    def restore(self):
        """Give the layer its own weights again."""
        self._layer.set_weights([self._kernel, *self._bias])
        for norm, values in zip(self._norms, self._norm_weights, strict=True):
            norm.set_weights(values)


def _trials(model, images, nodes, count, progress):
    """Yield a `_Trial` of each layer in the order of the model; losses use the first `count` of the list `images`."""
    images = [x[:_IMAGES] for x in calibration.limit_images(model, images)]
    copy = keras_graph.rebuild(keras_graph.in_float32(model), {})
    copies = {node.path: node for node in keras_graph.layer_nodes(copy)}
    before, rest = outputs_of(copy, [x[:count] for x in images]), Rest(copy, images)
    wanted = {node.path for node in nodes}
    in_order = [node for path, node in copies.items() if path in wanted]
    for node in (progress or Progress(0)).over(in_order, "layers whose sensitivity is measured", name=_path):
        trial = _Trial(node, copies, rest, before, count)
        yield trial
        trial.restore()


def _path(node):
    return node.path


def _losses(trial, groups, is_cheap):
    """Return the losses of the decompositions of a layer, a list for each method.

    If the network is cheap to run, three losses are measured instead of two. With several methods, one more is measured
    for each that is not clearly worse than another.
    """
    if not trial.is_refitted:  # the kernel's error says little about the loss: measure each
        return [[trial.loss(trial.refit(step)) for step in group] for group in groups]
    errors = [[trial.output_error(step) for step in group] for group in groups]
    curve = _measured_curve(trial, groups, errors, _MEASURED if is_cheap else _MEASURED_IF_EXPENSIVE)
    scales = _scales(trial, groups, errors, curve) if is_cheap else [1.0] * len(groups)
    return [[scale * curve(error) for error in own] for scale, own in zip(scales, errors, strict=True)]


def _measured_curve(trial, groups, errors, count):
    """Measure the loss of at most `count` decompositions of a layer; return the function from output error to loss.

    The measured decompositions are those whose errors are nearest to `count` errors, evenly spaced on a logarithmic
    axis. Between the measured points the function is linear on logarithmic axes. Below the first point its slope is 1:
    the loss is proportional to the squared error of the output. Above the last point it continues with the last slope,
    limited to the range 1 to 2.
    """
    steps = dict(zip(itertools.chain(*errors), itertools.chain(*groups), strict=True))
    known = sorted(error for error in steps if error > _EXACT)
    if not known:
        return lambda error: 0.0
    lowest, highest = max(known[0], 1e-4 * known[-1]), min(known[-1], max(0.5, known[0]))
    aims = np.geomspace(lowest, highest, count)
    x = np.array(sorted({min(known, key=lambda error: abs(math.log(error / aim))) for aim in aims}))
    y = np.log(np.maximum([trial.loss(trial.refit(steps[error])) for error in x], 1e-9))
    x = np.log(x)
    steep = np.clip((y[-1] - y[-2]) / (x[-1] - x[-2]), 1, 2) if len(x) > 1 else 1

    def loss(error):
        position = math.log(max(error, _EXACT))
        return math.exp(np.interp(position, x, y) + min(position - x[0], 0) + steep * max(position - x[-1], 0))

    return loss


def _scales(trial, groups, errors, curve):
    """Return for each method by how much its losses differ from the curve of all methods, at its middle size."""
    if len(groups) == 1:
        return [1.0]
    scales, sizes = [], [[sum(part.parameters for part in step) for step in group] for group in groups]
    for number, (group, own) in enumerate(zip(groups, errors, strict=True)):
        middle = len(group) // 2
        predicted, scale = curve(own[middle]), 1.0
        if predicted > 1e-7 and not _is_beaten(number, sizes, errors):
            scale = float(np.clip(trial.loss(trial.refit(group[middle])) / predicted, 0.5, 2))
        scales.append(scale)
    return scales


def _is_beaten(number, sizes, errors):
    """Return whether a method has at all sizes over 1.5 times the error of another, which has no more weights."""
    steps = [list(zip(*each, strict=True)) for each in zip(sizes, errors, strict=True)]
    own = steps.pop(number)
    return any(
        all(any(less <= size and 1.5 * lower < error for less, lower in other) for size, error in own)
        for other in steps
    )
