"""Rows for least squares: the patches that a layer reads, what it computes from them, and their moments."""

import itertools
import math

import keras
import numpy as np

from fcnn_utils import keras_graph
from fcnn_utils._conv_options import same_padding

_ROWS_OF_AN_IMAGE = 100  # fewest patches to read of each image; neighbouring patches are redundant
_ROWS_OF_ALL = 20_000  # of fewer than 200 images more patches are read, so that there are about this many in all
_BUFFER_VALUES = 2**24  # values that are collected before a matrix product


class Moments:
    """Means and covariances of rows (n, D) with themselves and with rows of outputs (n, T).

    Sums over blocks of rows are in float64. Products within a block are in float32, which takes half the time. The
    rows are shifted by the mean of the first ones, so that large means cost no digits.
    """

    def __init__(self, path):
        self.path, self.count, self.size, self._buffer = path, 0, 0, []
        self.shifts, self.totals, self.products = None, [0, 0], [0, 0]

    def add(self, rows, outputs):
        """Add float32 rows and outputs. They are collected; the products are updated when the buffer is full."""
        self._buffer.append((rows, outputs))
        self.count, self.size = self.count + len(rows), rows.shape[1]
        if sum(rows.size + outputs.size for rows, outputs in self._buffer) >= _BUFFER_VALUES:
            self._flush()

    def _flush(self):
        both, self._buffer = [np.concatenate(x) for x in zip(*self._buffer, strict=True)], []
        is_first = self.shifts is None
        if is_first:
            self.shifts = [x.mean(axis=0, dtype=np.float64).astype(np.float32) for x in both]
        for number, (x, shift) in enumerate(zip(both, self.shifts, strict=True)):
            x -= shift  # in place: np.concatenate made a copy
            self.totals[number] = self.totals[number] + x.sum(axis=0, dtype=np.float64)
            out = None if is_first else self.products[number]
            self.products[number] = np.add(self.products[number], both[0].T @ x, out=out, dtype=np.float64)

    @property
    def are_enough(self):
        """Whether there are more than 3 · D rows of D values. With fewer, the covariance must be shrunk."""
        return self.count > 3 * self.size

    def normal_equations(self):
        """Return mean (D,) and covariance (D, D) of the rows, mean (T,) of the outputs and their covariance (D, T).

        Raises:
            ValueError: a row is not finite.
        """
        if self._buffer:
            self._flush()
        if not all(np.isfinite(product).all() for product in self.products):
            raise ValueError(
                f"layer {self.path!r} reads or computes values that are not finite on the calibration images: check "
                "their normalisation and the weights of the layers before it"
            )
        means = [total / self.count for total in self.totals]
        covariances = [
            product / self.count - np.outer(means[0], mean) for product, mean in zip(self.products, means, strict=True)
        ]
        mean, mean_output = (mean + shift for mean, shift in zip(means, self.shifts, strict=True))
        return mean, covariances[0], mean_output, covariances[1]


def linear_copy(layer, x):
    """Copy a layer with its weights, but without its activation; `x` is what it reads."""
    copy = keras_graph.copy_layer(layer, activation="linear", activity_regularizer=None)
    copy.build(tuple(x.shape))
    copy.set_weights(layer.get_weights())
    return copy


def mean_output(layer, reads):
    """Return the mean (T,) of what a layer computes before its activation, from an iterable of lists of inputs."""
    total, count, linear = 0, 0, None
    for x in itertools.chain.from_iterable(reads):
        linear = linear or linear_copy(layer, x)
        y = keras.ops.convert_to_numpy(linear(x))
        total, count = total + y.sum(axis=tuple(range(y.ndim - 1)), dtype=np.float64), count + math.prod(y.shape[:-1])
    return total / count


def rows_per_image(image_count):
    """Return how many patches of each image are to be read."""
    return max(_ROWS_OF_AN_IMAGE, _ROWS_OF_ALL // image_count)


def linear_rows(kind, per_image):
    """Return a function that computes a layer's outputs, without bias and activation, as rows (positions, T).

    The rows match those of `patch_rows` with the same `per_image`.
    """
    if kind.has_patches:
        matrix = kind.kernels()[0].reshape(-1, kind.kernel_shape[-1])
        return lambda x: patch_rows(kind, x, per_image) @ matrix
    # transposed: run a copy of the layer
    layer = keras_graph.copy_layer(kind.layer, activation="linear", activity_regularizer=None, use_bias=False)

    def rows(x):
        if not layer.built:
            layer.build(tuple(x.shape))
            layer.set_weights(kind.layer.get_weights()[:1])
        y = keras.ops.convert_to_numpy(layer(x))
        return y[_positions(y.shape[:-1], per_image)]

    return rows


def patch_rows(kind, x, per_image):
    """Return the patches that a layer reads, as rows (positions, prod(kernel size) · S).

    Args:
        kind: `layer_kinds.KernelLayer`, neither grouped nor transposed.
        x: what the layer reads.
        per_image: number of positions of each image that are taken; all, if an image has fewer.

    `keras.ops.image.extract_patches` is not used: it convolves with an identity kernel, which takes as long as a layer
    with prod(kernel size) · S filters.
    """
    x = _without_copy(x)
    layer = kind.layer
    if not kind.axes:
        x = kind.input_rows(x)
        return x[_positions(x.shape[:-1], per_image)]
    geometry, axes = (layer.kernel_size, layer.strides, layer.dilation_rate), tuple(range(1, x.ndim - 1))
    spans = [(size - 1) * dilation + 1 for size, _, dilation in zip(*geometry, strict=True)]
    if layer.padding == "causal":
        x = np.pad(x, ((0, 0), (spans[0] - 1, 0), (0, 0)))
    if layer.padding == "same":
        edges = [same_padding(*each) for each in zip(x.shape[1:-1], spans, layer.strides, strict=True)]
        x = np.pad(x, ((0, 0), *edges, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axes)  # (N, *positions, S, *spans)
    steps, dilations = ([slice(None, None, n) for n in sizes] for sizes in geometry[1:])
    windows = windows[(slice(None), *steps, slice(None), *dilations)]
    rows = np.moveaxis(windows, len(axes) + 1, -1)[
        _positions(windows.shape[: len(axes) + 1], per_image)
    ]  # (rows, *kernel, S)
    return rows.reshape(len(rows), -1)


def _without_copy(x):
    """Return a tensor as an array, which shares its memory where the backend allows it. Do not write to it."""
    try:
        return np.asarray(memoryview(x))
    except (TypeError, BufferError):
        return keras.ops.convert_to_numpy(x)


def _positions(shape, per_image):
    """Return the indices (image, *position) of `per_image` positions of each image, of all if it has fewer.

    The positions of an image are divided into consecutive stretches of nearly equal length. One position is drawn at
    random from each, so that no row or column is preferred. The same shape always gives the same positions.
    """
    size = math.prod(shape[1:])
    count = min(size, per_image)
    starts = np.arange(count + 1) * size // count
    offsets = (np.random.default_rng(0).random((shape[0], count)) * np.diff(starts)).astype(int)
    first = np.arange(shape[0])[:, None] * size
    return np.unravel_index((first + starts[:-1] + offsets).ravel(), shape)
