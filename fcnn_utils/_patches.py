"""Rows for least squares: the patches that a layer reads, what it computes from them, and their moments."""

import math

import keras
import numpy as np
from keras import layers

from fcnn_utils import layer_kinds

_TARGET_ROWS = 20_000  # about so many patches of a batch are read: neighbouring patches are redundant


class Moments:
    """Mean and covariance of rows, summed up in float64; the products of rows are in float32, twice as fast.

    The rows are shifted by the mean of the first ones, so that large means cost no digits.
    """

    def __init__(self, path):
        self.path, self.shift, self.total, self.squares, self.count = path, 0, 0, 0, 0

    def add(self, rows):
        if not self.count:
            self.shift = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        rows = rows - self.shift
        self.total = self.total + rows.sum(axis=0, dtype=np.float64)
        products = rows.T @ rows
        self.squares = np.add(self.squares, products, out=self.squares if self.count else None, dtype=np.float64)
        self.count += len(rows)

    def mean_and_covariance(self):
        if not np.isfinite(self.squares).all():
            raise ValueError(
                f"layer {self.path!r} reads or computes values that are not finite on the calibration images: check "
                "their normalisation and the weights of the layers before it"
            )
        mean = self.total / self.count
        return mean + self.shift, self.squares / self.count - np.outer(mean, mean)


def linear_rows(layer, x):
    """Return what a layer with a kernel computes before its activation, as rows (positions, T)."""
    kernel, kind = keras.ops.cast(layer.kernel, x.dtype), layer_kinds.KernelLayer(layer)
    if kind.transposed:
        names = ("strides", "padding", "output_padding", "dilation_rate")
        y = keras.ops.conv_transpose(x, kernel, **{name: getattr(layer, name) for name in names})
    else:
        y = layer.convolution_op(x, kernel) if kind.axes else keras.ops.matmul(x, kernel)
    y = keras.ops.add(y, keras.ops.cast(layer.bias, x.dtype)) if layer.use_bias else y
    y = keras.ops.convert_to_numpy(y)
    return y[_positions(y.shape[:-1])]


def patch_rows(layer, x):
    """Return the patches that a convolution or a Dense layer reads, as rows (positions, prod(kernel size) · S).

    `keras.ops.image.extract_patches` convolves with an identity, which takes as long as a layer of as many filters.
    """
    x = keras.ops.convert_to_numpy(x)
    if isinstance(layer, layers.Dense):
        return x[_positions(x.shape[:-1])]
    geometry, axes = (layer.kernel_size, layer.strides, layer.dilation_rate), tuple(range(1, x.ndim - 1))
    spans = [(size - 1) * dilation + 1 for size, _, dilation in zip(*geometry, strict=True)]
    if layer.padding == "same":
        steps = zip(x.shape[1:-1], spans, layer.strides, strict=True)
        missing = [max((-(-n // stride) - 1) * stride + span - n, 0) for n, span, stride in steps]
        x = np.pad(x, ((0, 0), *((total // 2, total - total // 2) for total in missing), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axes)  # (N, *positions, S, *spans)
    steps, dilations = ([slice(None, None, n) for n in sizes] for sizes in geometry[1:])
    windows = windows[(slice(None), *steps, slice(None), *dilations)]
    rows = np.moveaxis(windows, len(axes) + 1, -1)[_positions(windows.shape[: len(axes) + 1])]  # (rows, *kernel, S)
    return rows.reshape(len(rows), -1)


def _positions(shape):
    """Return the indices (image, *position) of at most about `_TARGET_ROWS` positions of feature maps."""
    step = math.prod(shape) // _TARGET_ROWS
    step += 1 - step % 2
    while math.gcd(step, shape[-1]) > 1:  # else it would keep to some columns of the image
        step += 2
    return np.unravel_index(np.arange(0, math.prod(shape), step), shape)
