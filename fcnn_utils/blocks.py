"""Factorized convolutions as chains of stock Keras layers, and other cheap replacements of a convolution.

Every block is a function. Given a Keras tensor (N, H, W, S) it applies its layers; given a shape (H, W, S) it returns
a `keras.Model`. Saved models load anywhere, without custom objects.

    y = blocks.factorized_conv(x, "cp", filters=192, kernel_size=3, ranks=64, strides=2)    # new weights
    y = blocks.from_decomposition(x, decompose(kernel, "cp", 64), bias, strides=2)          # those of a kernel

Options of all blocks, as in Conv2D: `strides`, `padding` (here "same" by default), `dilation_rate`, `activation`,
`use_bias`, `kernel_initializer`, `kernel_regularizer`, `bias_initializer`, `bias_regularizer`, `trainable`, `dtype`,
and `name`, from which the layers get theirs: NAME_in, NAME_depthwise, ... The last layer has the bias and the
activation. Images are channels-last.

Strides: a layer takes the stride of the axes along which its kernel extends, so that `same` padding falls where the
dense layer's does. TensorFlow's depthwise layers take equal strides only. Therefore a later layer takes the rest in
"cp4" at any stride, and in "cp" and "separable" at unequal strides. `same` padding is then a layer of its own, and the
image needs a fixed size.

All blocks raise ValueError if an option's value is not allowed. Two blocks in one model need different names.
"""

import math

import keras
import numpy as np
from keras import layers

from fcnn_utils import factorizations
from fcnn_utils._checks import check_number, check_sizes
from fcnn_utils._conv_options import ConvOptions, same_padding


def factorized_conv(x, method, filters, kernel_size, ranks, **options):
    """Apply a factorized convolution with new weights.

    Args:
        x: Keras tensor (N, H, W, S) or shape (H, W, S).
        method: "cp", "cp4", "tucker", "tt", "svd", "spatial" or "separable", or a class of `factorizations`.
        filters: T, number of output channels.
        kernel_size: as in Conv2D.
        ranks: an int, or one for each rank of the method; they may exceed `max_ranks`.
        options: see the module.

    Returns:
        Keras tensor (N, H', W', T), or a keras.Model if `x` is a shape.
    """
    conv = ConvOptions(kernel_size, **options)
    check_number("filters", filters, int, 1, 2**31)
    kernel_shape = (*conv.kernel_size, _shape(x)[-1], filters)
    return chain_block(x, factorizations.get(method).chain(kernel_shape, ranks), conv)


def chain_block(x, chain, conv):
    """Apply a chain of layers with new weights; `x` and the result are as in `factorized_conv`.

    Args:
        chain: from `factorizations.Factorization.chain`, of one group.
        conv: `ConvOptions` of the dense layer.
    """

    def apply(x):
        for layer, strides, padding, needs_zeros in _placed_layers(chain, conv.strides, conv.padding, conv.transposed):
            x = conv.pad(x) if needs_zeros else x
            x = conv.chain_layer(layer, strides, padding, last=layer is chain[-1])(x)
        return x

    return _applied(apply, x, chain[-1].filters, conv)


def from_decomposition(x, decomposition, bias=None, **options):
    """Apply a decomposed kernel: what the dense layer with that kernel computes, up to the decomposition's error.

    Args:
        x: Keras tensor (N, H, W, S) or shape (H, W, S).
        decomposition: a `factorizations.Factorization` of a (kh, kw, S, T) kernel.
        bias: (T,) or None.
        options: see the module, without `use_bias`.

    Returns:
        Keras tensor (N, H', W', T), or a keras.Model if `x` is a shape.

    Raises:
        ValueError: `x` does not have S channels, or the bias does not have the shape (T,).
    """
    *kernel_size, channels, filters = decomposition.kernel_shape
    if _shape(x)[-1] != channels:
        raise ValueError(f"the kernel reads {channels} channels; got an input of {_shape(x)[-1]}")
    if bias is not None and np.shape(bias) != (filters,):
        raise ValueError(f"bias must have the shape ({filters},), one value per filter; got {np.shape(bias)}")
    method, use_bias = type(decomposition), bias is not None
    y = factorized_conv(x, method, filters, tuple(kernel_size), decomposition.ranks, use_bias=use_bias, **options)
    model = y if isinstance(y, keras.Model) else keras.Model(x, y)
    model.set_weights([*decomposition.layer_weights(), *([np.asarray(bias)] if use_bias else [])])
    return y


def chain_macs(chain, image_size, *, strides=(1, 1), padding="same", dilation_rate=(1, 1), output_size=None):
    """Return the MACs of a chain for one image, with the exact output size of every layer.

    Args:
        chain: from `factorizations.Factorization.chain`.
        image_size: (height, width), or as many sizes as the kernel has spatial axes; any for a dense layer.
        strides, padding, dilation_rate: of the dense layer, tuples as Keras stores them.
        output_size: of a transposed convolution, else None.
    """
    size, total = list(image_size), 0
    if output_size is not None:
        for layer in chain:
            total += math.prod(size) * layer.parameters  # every value that is read meets the whole kernel
            size = [output_size[axis] if axis in layer.axes else n for axis, n in enumerate(size)]
        return total
    for layer, taken, pads, needs_zeros in _placed_layers(chain, strides, padding):
        if needs_zeros:
            whole = [max(sizes) for sizes in zip(*(part.kernel_size for part in chain), strict=True)]
            size = [n + sum(same_padding(n, k, s)) for n, k, s in zip(size, whole, strides, strict=True)]
        for axis, stride in enumerate(taken):
            reach = (layer.kernel_size[axis] - 1) * dilation_rate[axis] if pads == "valid" else 0
            size[axis] = -(-(size[axis] - reach) // stride)
        total += math.prod(size) * layer.parameters
    return total


# --- blocks that are not the factorization of a kernel ---------------------------------------------------------------


def bottleneck(x, filters, kernel_size, width, inner_activation="relu", **options):
    """Residual networks' bottleneck: 1×1 S→width, kh×kw width→width, 1×1 width→T, with activations between.

    (He et al. 2015, arXiv 1512.03385.) With `inner_activation=None` it is linear: Tucker-2 of the ranks (width, width).

    Args:
        x: Keras tensor (N, H, W, S) or shape (H, W, S).
        filters: T.
        kernel_size: as in Conv2D.
        width: number of channels inside.
        inner_activation: of the first two layers.
        options: see the module.

    Returns:
        Keras tensor (N, H', W', T), or a keras.Model if `x` is a shape. All blocks below return the same.
    """
    conv = ConvOptions(kernel_size, **options)
    check_number("width", width, int, 1, 2**31)

    def apply(x):
        x = conv.conv("in", width, activation=inner_activation)(x)
        x = conv.conv("core", width, conv.kernel_size, activation=inner_activation, **conv.geometry)(x)
        return conv.conv("out", filters, last=True)(x)

    return _applied(apply, x, filters, conv)


def single_intra_channel(x, filters, kernel_size, **options):
    """Single intra-channel convolution, kh×kw depthwise plus the identity, then 1×1 to T: y = P (x + D ∗ x).

    (Wang et al. 2017, arXiv 1608.04337.) The 1×1 layer has the strides. Arguments as in Conv2D.

    Raises:
        ValueError: the padding is not "same", which the sum needs.
    """
    conv = ConvOptions(kernel_size, **options)
    conv.check_same("single intra-channel convolution")

    def apply(x):
        return conv.conv("out", filters, strides=conv.strides, last=True)(_residual_depthwise(x, conv))

    return _applied(apply, x, filters, conv)


def topological(x, filters, kernel_size, grid, neighbourhood, **options):
    """Single intra-channel convolution whose 1×1 layer connects neighbours only (Wang et al. 2017, arXiv 1608.04337).

    The channels lie on a grid that wraps around. An output channel reads c1 · c2 input channels, those of its
    neighbourhood, instead of all. It is built as a selection of channels and a depthwise layer over them. A grouped
    1×1 convolution with T groups computes the same sums, but is many times slower to train. Strides are a 1×1 pooling.

    Args:
        x: Keras tensor (N, H, W, S) or shape (H, W, S), of a fixed size.
        filters: T, equal to S.
        kernel_size: as in Conv2D.
        grid: (d1, d2) with d1 · d2 = T.
        neighbourhood: (c1, c2), at most (d1, d2).
        options: see the module.

    Raises:
        ValueError: the grid, the neighbourhood, the number of channels, the image's size or the padding does not fit.
    """
    conv = ConvOptions(kernel_size, **options)
    conv.check_same("topological subdivisioning")
    grid, neighbourhood = check_sizes("grid", grid), check_sizes("neighbourhood", neighbourhood)
    if math.prod(grid) != filters or any(c > d for c, d in zip(neighbourhood, grid, strict=True)):
        raise ValueError(
            f"grid must hold the {filters} filters and the neighbourhood fit into it; got {grid} and {neighbourhood}"
        )

    def apply(x):
        if x.shape[-1] != filters:
            raise ValueError(f"topological subdivisioning keeps the channels; got {x.shape[-1]} in, {filters} out")
        if None in x.shape[1:3]:
            raise ValueError(f"topological subdivisioning needs an image of a fixed size; got {x.shape[1:3]}")
        x = _residual_depthwise(x, conv)
        if max(conv.strides) > 1:
            x = conv.layer(layers.MaxPooling2D, "stride", 1, conv.strides, data_format="channels_last")(x)
        height, width = x.shape[1:3]
        reads = neighbours(grid, neighbourhood).T  # (c1 c2, T)
        x = keras.ops.take(x, reads.ravel(), axis=-1)  # (N, H, W, c1 c2 T)
        x = conv.layer(layers.Reshape, "read", (height * width, *reads.shape))(x)
        x = conv.depthwise("out", (1, len(reads)), last=True)(x)  # (N, H W, 1, T)
        return conv.layer(layers.Reshape, "image", (height, width, filters))(x)

    return _applied(apply, x, filters, conv)


def neighbours(grid, neighbourhood):
    """Return the input channels that each output channel of `topological` reads: (T, c1 c2) integers."""
    places = np.arange(math.prod(grid)).reshape(grid)
    shifts = [(i, j) for i in range(neighbourhood[0]) for j in range(neighbourhood[1])]
    return np.stack([np.roll(places, (-i, -j), axis=(0, 1)).ravel() for i, j in shifts], axis=1)


def spatial_bottleneck(x, filters, kernel_size, **options):
    """Spatial bottleneck: kh×kw depthwise with stride (kh, kw), 1×1 to T, kh×kw transposed convolution back.

    (Wang et al. 2017, arXiv 1608.04337.) The expensive 1×1 layer sees 1 / (kh kw) of the positions. This is not a
    convolution: what a pixel becomes depends on its place in its kh×kw cell. The transposed convolution is depthwise: a
    1×1 layer with kh · kw outputs per channel, which are then laid out in space. So there is a bias for each channel
    and place in the cell. Arguments as in Conv2D.

    Raises:
        ValueError: strides or dilation are not 1, the padding is not "same", or the image's height and width are not
            fixed multiples of kh and kw.
    """
    conv = ConvOptions(kernel_size, **options)
    conv.check_same("spatial bottleneck")
    if conv.strides != (1, 1) or conv.dilation_rate != (1, 1):
        raise ValueError(f"a spatial bottleneck needs strides and dilation 1; got {conv.strides}, {conv.dilation_rate}")
    kh, kw = conv.kernel_size

    def apply(x):
        height, width = x.shape[1:3]
        if None in (height, width) or height % kh or width % kw:
            raise ValueError(f"a spatial bottleneck needs images that {kh}×{kw} cells divide; got {(height, width)}")
        if kh == kw:
            x = conv.depthwise("down", (kh, kw), strides=(kh, kw))(x)
        else:  # TensorFlow's depthwise layer refuses unequal strides; this is the same, and slower
            x = conv.conv("down", x.shape[-1], (kh, kw), strides=(kh, kw), groups=x.shape[-1])(x)
        x = conv.conv("project", filters)(x)  # (N, h, w, T)
        x = conv.depthwise("up", (1, 1), depth_multiplier=kh * kw, last=True)(x)  # (N, h, w, T kh kw)
        x = conv.layer(layers.Reshape, "cells", (height // kh, width // kw, filters, kh, kw))(x)
        x = conv.layer(layers.Permute, "place", (1, 4, 2, 5, 3))(x)  # (N, h, kh, w, kw, T)
        return conv.layer(layers.Reshape, "image", (height, width, filters))(x)

    return _applied(apply, x, filters, conv)


# --- parts -----------------------------------------------------------------------------------------------------------


def _shape(x):
    return tuple(x) if isinstance(x, (tuple, list)) else tuple(x.shape)


def _applied(apply, x, filters, conv):
    """Apply a block to a tensor, or make a model for images of a shape."""
    check_number("filters", filters, int, 1, 2**31)
    if not isinstance(x, (tuple, list)):
        return apply(x)
    inputs = keras.Input(tuple(x))
    return keras.Model(inputs, apply(inputs), name=conv.name)


def _residual_depthwise(x, conv):
    depthwise = conv.depthwise("depthwise", conv.kernel_size, padding="same", dilation_rate=conv.dilation_rate)
    return conv.layer(layers.Add, "add")([x, depthwise(x)])


def _placed_layers(chain, strides, padding, transposed=False):
    """Yield (layer, its strides, its padding, whether zeros are added before it) for each layer of a chain.

    If a layer strides along an axis that belongs to an earlier one, their own `same` padding would fall in other places
    than the dense layer's. Zeros are then added before the first spatial layer.
    """
    placed = factorizations.place_strides(chain, tuple(strides))
    own = [tuple(s if axis in layer.axes else 1 for axis, s in enumerate(strides)) for layer in chain]
    if transposed:  # in the chains of these no layer is depthwise
        placed = own
    explicit = padding == "same" and placed != own
    for layer, taken in zip(chain, placed, strict=True):
        needs_zeros = explicit and bool(layer.axes)
        if needs_zeros:
            explicit, padding = False, "valid"
        yield layer, taken, padding, needs_zeros
