"""One factorized convolution as a chain of stock Keras layers, and the weights that make it a given kernel.

Every block is a function of a Keras tensor (N, H, W, S), to which it applies its chain, or of a shape (H, W, S), for
which it returns a `keras.Model`. Saved models load anywhere, with no custom objects.

    block = blocks.cp((32, 32, 96), filters=192, kernel_size=3, rank=64, strides=2)
    block.set_weights(blocks.weights(decompose.cp(kernel, 64), bias))     # or both at once: blocks.factorized

`filters`, `kernel_size` and the options are as in Conv2D, but that `padding` is "same" unless told otherwise:
`strides`, `dilation_rate`, `activation`, `use_bias`, `kernel_initializer`, `kernel_regularizer`, `bias_initializer`,
`bias_regularizer`, `trainable`, `dtype`, `name` (its layers are NAME_in, NAME_column, ...). A single rank may stand in
a tuple. Bias and activation are the last layer's. Images are channels-last.

**Strides.** A stride sits in the layer that moves along its axis, so that `same` padding falls where the dense layer's
does. A depthwise layer wants equal strides (TensorFlow): it takes their greatest common divisor and the last 1×1 layer
the rest. The padding, which must be that of the whole stride, is then a layer of its own, and the image must have a
fixed size. `cp4` pads so at every stride but 1.

**Errors.** Every block raises ValueError where a rank, or the value of an option, is not as above.
"""

import dataclasses
import math

import keras
import numpy as np
from keras import layers

from fcnn_utils._checks import check_choice, check_number, check_pair

# --- blocks that a kernel can be decomposed into -----------------------------------------------------------------


def cp(x, filters, kernel_size, rank, **options):
    """CP with merged spatial modes: 1×1 S→R, kh×kw depthwise, 1×1 R→T (see `decompose.cp`)."""
    o = _Options(kernel_size, **options)
    (rank,) = _check_ranks("rank", rank)

    def chain(x):
        x = o.convolution("in", rank)(x)
        return _depthwise_then_pointwise(x, o, filters)

    return _applied(chain, x, filters, o)


def cp4(x, filters, kernel_size, rank, **options):
    """CP with four modes: 1×1 S→R, kh×1 depthwise, 1×kw depthwise, 1×1 R→T (Lebedev et al. 2014, arXiv 1412.6553)."""
    o = _Options(kernel_size, **options)
    (rank,) = _check_ranks("rank", rank)

    def chain(x):
        x = o.convolution("in", rank)(x)
        padding = o.padding
        if o.strides != (1, 1):  # the column runs at stride 1, which would pad otherwise than the whole does
            x, padding = o.pad(x), "valid"
        row, rest = o.shared_strides
        (kh, kw), (dh, dw) = o.kernel_size, o.dilation_rate
        x = o.depthwise("column", (kh, 1), padding=padding, dilation_rate=(dh, 1))(x)
        x = o.depthwise("row", (1, kw), strides=row, padding=padding, dilation_rate=(1, dw))(x)
        return o.convolution("out", filters, strides=rest, last=True)(x)

    return _applied(chain, x, filters, o)


def tucker2(x, filters, kernel_size, ranks, **options):
    """Tucker-2: 1×1 S→R1, kh×kw R1→R2, 1×1 R2→T (Kim et al. 2015, arXiv 1511.06530)."""
    o = _Options(kernel_size, **options)
    enter, leave = _check_ranks("ranks", ranks, 2)

    def chain(x):
        x = o.convolution("in", enter)(x)
        x = o.convolution("core", leave, o.kernel_size, **o.geometry)(x)
        return o.convolution("out", filters, last=True)(x)

    return _applied(chain, x, filters, o)


def tensor_train(x, filters, kernel_size, ranks, **options):
    """Tensor train: 1×1 S→R1, kh×1 R1→R2, 1×kw R2→R3, 1×1 R3→T (see `decompose.tensor_train`)."""
    o = _Options(kernel_size, **options)
    enter, middle, leave = _check_ranks("ranks", ranks, 3)

    def chain(x):
        x = o.convolution("in", enter)(x)
        x = o.column(middle)(x)
        x = o.row(leave)(x)
        return o.convolution("out", filters, last=True)(x)

    return _applied(chain, x, filters, o)


def spatial_svd(x, filters, kernel_size, rank, **options):
    """Column and row: kh×1 S→R, 1×kw R→T (Jaderberg et al. 2014, arXiv 1405.3866)."""
    o = _Options(kernel_size, **options)
    (rank,) = _check_ranks("rank", rank)
    return _applied(lambda x: o.row(filters, last=True)(o.column(rank)(x)), x, filters, o)


def depthwise_separable(x, filters, kernel_size, multiplier=1, **options):
    """kh×kw depthwise with `multiplier` outputs a channel, 1×1 to T (Chollet 2017, arXiv 1610.02357)."""
    o = _Options(kernel_size, **options)
    (multiplier,) = _check_ranks("multiplier", multiplier)
    return _applied(lambda x: _depthwise_then_pointwise(x, o, filters, multiplier), x, filters, o)


BLOCKS = {
    "cp": cp,
    "cp4": cp4,
    "tucker": tucker2,
    "tt": tensor_train,
    "spatial": spatial_svd,
    "separable": depthwise_separable,
}


def weights(decomposition, bias=None):
    """The factors as the weights of the block's layers: a list for `set_weights` of the block's model.

    Args:
        decomposition: from `decompose`.
        bias: (T,) for a block with `use_bias`, None for one without.

    Returns:
        list of arrays, in the order of the layers.

    Raises:
        ValueError: the bias has not the shape (T,).
    """
    factors = decomposition.factors
    kh, kw, channels, filters = decomposition.shape
    arrays = {
        "cp": lambda a, c, d: [c[None, None], a.reshape(kh, kw, -1, 1), d.T[None, None]],
        "cp4": lambda a, b, c, d: [c[None, None], a[:, None, :, None], b[None, :, :, None], d.T[None, None]],
        "tucker": lambda u, core, v: [u[None, None], core, v.T[None, None]],
        "tt": lambda g1, g2, g3, g4: [
            g1[None, None],
            g2.transpose(1, 0, 2)[:, None],  # (R1, kh, R2) -> (kh, 1, R1, R2)
            g3.transpose(1, 0, 2)[None],  # (R2, kw, R3) -> (1, kw, R2, R3)
            g4[None, None],
        ],
        "spatial": lambda v, h: [v[:, None], h.transpose(1, 0, 2)[None]],  # (R, kw, T) -> (1, kw, R, T)
        "separable": lambda d, p: [d, p.reshape(1, 1, -1, filters)],  # depthwise outputs are ordered (s, m)
    }[decomposition.method](*factors)
    if bias is not None:
        if np.shape(bias) != (filters,):
            raise ValueError(f"bias must have the shape ({filters},), one value a filter; got {np.shape(bias)}")
        arrays.append(np.asarray(bias))
    return arrays


def factorized(x, decomposition, bias=None, **options):
    """The block of a decomposition with its weights in it: what the dense layer with that kernel computes, or near it.

    Args:
        x: Keras tensor (N, H, W, S) or shape (H, W, S).
        decomposition: from `decompose`.
        bias: (T,) or None.
        options: as of all blocks, but for `use_bias`, which the bias tells.

    Returns:
        Keras tensor (N, H', W', T), or a keras.Model where `x` is a shape.

    Raises:
        ValueError: `x` has not S channels, the bias not the shape (T,), or an option's value is not allowed.
    """
    kh, kw, channels, filters = decomposition.shape
    shape = tuple(x) if isinstance(x, (tuple, list)) else tuple(x.shape)
    if shape[-1] != channels:
        raise ValueError(f"the kernel reads {channels} channels; got an input of {shape[-1]}")
    block = BLOCKS[decomposition.method]
    y = block(x, filters, (kh, kw), decomposition.ranks, use_bias=bias is not None, **options)
    (y if isinstance(y, keras.Model) else keras.Model(x, y)).set_weights(weights(decomposition, bias))
    return y


# --- blocks that are designs of their own ------------------------------------------------------------------------


def bottleneck(x, filters, kernel_size, width, inner_activation="relu", **options):
    """1×1 S→width, kh×kw width→width, 1×1 width→T, with an activation between (He et al. 2015, arXiv 1512.03385).

    With `inner_activation=None` it is linear: a Tucker-2 of ranks (width, width).
    """
    o = _Options(kernel_size, **options)
    (width,) = _check_ranks("width", width)

    def chain(x):
        x = o.convolution("in", width, activation=inner_activation)(x)
        x = o.convolution("core", width, o.kernel_size, activation=inner_activation, **o.geometry)(x)
        return o.convolution("out", filters, last=True)(x)

    return _applied(chain, x, filters, o)


def single_intra_channel(x, filters, kernel_size, **options):
    """kh×kw depthwise plus the identity, then 1×1 to T: y = P (x + D ∗ x) (Wang et al. 2017, arXiv 1608.04337).

    Strides are the 1×1 layer's.

    Raises:
        ValueError: the padding is not "same", which the sum needs.
    """
    o = _Options(kernel_size, **options)
    _check_same("single intra-channel convolution", o)

    def chain(x):
        return o.convolution("out", filters, strides=o.strides, last=True)(_residual_depthwise(x, o))

    return _applied(chain, x, filters, o)


def topological(x, filters, kernel_size, grid, neighbourhood, **options):
    """Single intra-channel convolution whose 1×1 layer connects neighbours only (Wang et al. 2017, arXiv 1608.04337).

    The channels are laid out on a grid that wraps around. An output channel reads the input channels of its
    neighbourhood, from its own place on: c1 c2 weights instead of S. Built as a selection of channels, c1 c2 for each
    output, and a depthwise layer over these: a grouped 1×1 convolution of T groups is the same, and many times slower,
    its gradient above all.

    Args:
        x: Keras tensor (N, H, W, S) or shape (H, W, S), of a fixed size.
        filters: T, the same number as S.
        kernel_size: as in Conv2D.
        grid: (d1, d2) with d1 d2 = T.
        neighbourhood: (c1, c2), at most (d1, d2).
        options: as of all blocks.

    Raises:
        ValueError: the grid does not hold T channels, the neighbourhood does not fit into it, S is not T, the image
            has no fixed size, or the padding is not "same".
    """
    o = _Options(kernel_size, **options)
    _check_same("topological subdivisioning", o)
    grid, neighbourhood = check_pair("grid", grid), check_pair("neighbourhood", neighbourhood)
    if math.prod(grid) != filters or any(c > d for c, d in zip(neighbourhood, grid, strict=True)):
        raise ValueError(
            f"grid must hold the {filters} filters and the neighbourhood fit into it; got {grid} and {neighbourhood}"
        )

    def chain(x):
        if x.shape[-1] != filters:
            raise ValueError(
                f"topological subdivisioning keeps the number of channels; got {x.shape[-1]} in, {filters} out"
            )
        if None in x.shape[1:3]:
            raise ValueError(f"topological subdivisioning wants an image of a fixed size; got {x.shape[1:3]}")
        x = _residual_depthwise(x, o)
        if max(o.strides) > 1:
            x = o.layer(layers.MaxPooling2D, "stride", 1, o.strides, data_format="channels_last")(x)
        height, width = x.shape[1:3]
        reads = neighbours(grid, neighbourhood).T  # (c1 c2, T)
        x = keras.ops.take(x, reads.ravel(), axis=-1)  # (N, H, W, c1 c2 T)
        x = o.layer(layers.Reshape, "read", (height * width, *reads.shape))(x)
        x = o.depthwise("out", (1, len(reads)), last=True)(x)  # (N, H W, 1, T)
        return o.layer(layers.Reshape, "image", (height, width, filters))(x)

    return _applied(chain, x, filters, o)


def neighbours(grid, neighbourhood):
    """(T, c1 c2) integers: the input channels that each output channel of `topological` reads."""
    places = np.arange(math.prod(grid)).reshape(grid)
    shifted = [
        np.roll(places, (-i, -j), axis=(0, 1)).ravel() for i in range(neighbourhood[0]) for j in range(neighbourhood[1])
    ]
    return np.stack(shifted, axis=1)


def spatial_bottleneck(x, filters, kernel_size, **options):
    """kh×kw depthwise with that stride, 1×1 to T, kh×kw deconvolution back (Wang et al. 2017, arXiv 1608.04337).

    The costly 1×1 layer sees 1 / (kh kw) of the positions. It is no convolution: what it does depends on where in its
    kh×kw cell a pixel lies. The deconvolution is depthwise: a 1×1 layer with kh kw outputs a channel, which are then
    laid out in space; each of them has a bias of its own.

    Raises:
        ValueError: strides or dilation are not 1, the padding is not "same", or the image's height and width are not
            fixed multiples of kh and kw.
    """
    o = _Options(kernel_size, **options)
    _check_same("spatial bottleneck", o)
    if o.strides != (1, 1) or o.dilation_rate != (1, 1):
        raise ValueError(f"a spatial bottleneck has strides and dilation 1; got {o.strides} and {o.dilation_rate}")
    kh, kw = o.kernel_size

    def chain(x):
        height, width = x.shape[1:3]
        if None in (height, width) or height % kh or width % kw:
            raise ValueError(f"a spatial bottleneck wants images that {kh}×{kw} cells divide; got {(height, width)}")
        if kh == kw:
            x = o.depthwise("down", (kh, kw), strides=(kh, kw))(x)
        else:  # TensorFlow's depthwise layer refuses unequal strides; this is the same, and slower
            x = o.convolution("down", x.shape[-1], (kh, kw), strides=(kh, kw), groups=x.shape[-1])(x)
        x = o.convolution("project", filters)(x)  # (N, h, w, T)
        x = o.depthwise("up", (1, 1), depth_multiplier=kh * kw, last=True)(x)  # (N, h, w, T kh kw)
        x = o.layer(layers.Reshape, "cells", (height // kh, width // kw, filters, kh, kw))(x)
        x = o.layer(layers.Permute, "place", (1, 4, 2, 5, 3))(x)  # (N, h, kh, w, kw, T)
        return o.layer(layers.Reshape, "image", (height, width, filters))(x)

    return _applied(chain, x, filters, o)


# --- parts -------------------------------------------------------------------------------------------------------


def _applied(chain, x, filters, o):
    """The chain on a tensor, or as a model on images of a shape."""
    check_number("filters", filters, int, 1, 2**31)
    if not isinstance(x, (tuple, list)):
        return chain(x)
    inputs = keras.Input(tuple(x))
    return keras.Model(inputs, chain(inputs), name=o.name)


def _depthwise_then_pointwise(x, o, filters, multiplier=1):
    strides, rest = o.shared_strides
    padding = o.padding
    if rest != (1, 1):
        x, padding = o.pad(x), "valid"
    x = o.depthwise(
        "depthwise",
        o.kernel_size,
        strides=strides,
        padding=padding,
        dilation_rate=o.dilation_rate,
        depth_multiplier=multiplier,
    )(x)
    return o.convolution("out", filters, strides=rest, last=True)(x)


def _residual_depthwise(x, o):
    depthwise = o.depthwise("depthwise", o.kernel_size, padding="same", dilation_rate=o.dilation_rate)
    return o.layer(layers.Add, "add")([x, depthwise(x)])


def _check_ranks(name, ranks, count=1):
    given = tuple(ranks) if isinstance(ranks, (tuple, list)) else (ranks,)
    if len(given) != count:
        raise ValueError(f"{name} must be {count} whole numbers of at least 1; got {ranks!r}")
    for rank in given:
        check_number(name, rank, int, 1, 2**31)
    return given


def _check_same(what, o):
    if o.padding != "same":
        raise ValueError(f"{what} keeps the size of the image: padding must be 'same'; got {o.padding!r}")


@dataclasses.dataclass(frozen=True)
class _Options:
    """The options of all blocks, checked, and the layers made with them."""

    kernel_size: tuple
    strides: tuple = (1, 1)
    padding: str = "same"
    dilation_rate: tuple = (1, 1)
    activation: object = None
    use_bias: bool = True
    kernel_initializer: object = "glorot_uniform"
    kernel_regularizer: object = None
    bias_initializer: object = "zeros"
    bias_regularizer: object = None
    trainable: bool = True
    dtype: object = None
    name: str = "block"

    def __post_init__(self):
        for name in ("kernel_size", "strides", "dilation_rate"):
            object.__setattr__(self, name, check_pair(name, getattr(self, name)))
        check_choice("padding", self.padding, ("same", "valid"))
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:  # as Keras has it for the dense layer
            raise ValueError(
                f"strides and dilation_rate can't both be above 1; got {self.strides} and {self.dilation_rate}"
            )

    @property
    def geometry(self):
        """What a layer of the whole kernel size takes."""
        return {"strides": self.strides, "padding": self.padding, "dilation_rate": self.dilation_rate}

    @property
    def shared_strides(self):
        """The stride of a depthwise layer, equal along both axes, and what is left for the 1×1 layer after it."""
        shared = math.gcd(*self.strides)
        return (shared, shared), (self.strides[0] // shared, self.strides[1] // shared)

    def convolution(self, part, filters, kernel_size=(1, 1), *, last=False, **arguments):
        """A Conv2D; with the bias and the activation if it is the last of its chain."""
        return layers.Conv2D(
            filters,
            kernel_size,
            kernel_initializer=self.kernel_initializer,
            kernel_regularizer=self.kernel_regularizer,
            **(self._common(part, last) | arguments),
        )

    def column(self, filters):
        """kh×1, with the stride and the dilation along the height."""
        (kh, _), (sh, _), (dh, _) = self.kernel_size, self.strides, self.dilation_rate
        along = {"strides": (sh, 1), "dilation_rate": (dh, 1), "padding": self.padding}
        return self.convolution("column", filters, (kh, 1), **along)

    def row(self, filters, last=False):
        """1×kw, with the stride and the dilation along the width."""
        (_, kw), (_, sw), (_, dw) = self.kernel_size, self.strides, self.dilation_rate
        along = {"strides": (1, sw), "dilation_rate": (1, dw), "padding": self.padding}
        return self.convolution("row", filters, (1, kw), last=last, **along)

    def depthwise(self, part, kernel_size, *, last=False, **arguments):
        """A DepthwiseConv2D; with the bias and the activation if it is the last of its chain."""
        return layers.DepthwiseConv2D(
            kernel_size,
            depthwise_initializer=self.kernel_initializer,
            depthwise_regularizer=self.kernel_regularizer,
            **(self._common(part, last) | arguments),
        )

    def layer(self, kind, part, *arguments, **named):
        """A layer without weights."""
        return kind(*arguments, **named, **self._named(part))

    def pad(self, x):
        """`x` with the zeros around it that the dense layer would add, as a layer of their own."""
        if self.padding == "valid":
            return x
        if None in x.shape[1:3]:
            raise ValueError(
                f"strides {self.strides} with `same` padding need an image of a fixed size; got {x.shape[1:3]}"
            )
        edges = []
        for size, kernel, stride in zip(x.shape[1:3], self.kernel_size, self.strides, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            edges.append((total // 2, total - total // 2))
        return self.layer(layers.ZeroPadding2D, "pad", edges, data_format="channels_last")(x)

    def _common(self, part, last):
        return {
            "use_bias": self.use_bias and last,
            "activation": self.activation if last else None,
            "bias_initializer": self.bias_initializer,
            "bias_regularizer": self.bias_regularizer,
            "data_format": "channels_last",
        } | self._named(part)

    def _named(self, part):
        common = {"name": f"{self.name}_{part}", "trainable": self.trainable}
        return common | ({"dtype": self.dtype} if self.dtype is not None else {})
