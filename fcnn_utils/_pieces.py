"""The convolutions and matrix products that a layer, or a chain in its place, is made of, as plain data."""

import dataclasses
import math

from fcnn_utils import blocks
from fcnn_utils._conv_options import same_padding
from fcnn_utils.factorizations.chain import SPATIAL, ChainLayer


@dataclasses.dataclass(frozen=True, order=True)
class Piece:
    """A convolution, transposed convolution or matrix product, as plain data.

    Attributes:
        size: spatial size of what it reads; of a matrix product, the number of its rows for one image.
        reads, writes: numbers of channels.
        groups: number of groups of channels; equal to `reads` for a depthwise layer.
        kernel_size: along each axis; empty for a matrix product.
        strides, dilation: along each axis.
        pads: (zeros before, zeros after) along each axis; of a transposed convolution, what is cut off its output.
        transposed: whether it is a transposed convolution.
    """

    size: tuple
    reads: int
    writes: int
    groups: int = 1
    kernel_size: tuple = ()
    strides: tuple = ()
    dilation: tuple = ()
    pads: tuple = ()
    transposed: bool = False

    @property
    def output_size(self):
        """Spatial size of what it writes."""
        if not self.kernel_size:
            return self.size
        axes = zip(self.size, self.reach, self.strides, self.pads, strict=True)
        if self.transposed:
            return tuple((n - 1) * stride + reach - sum(cut) for n, reach, stride, cut in axes)
        return tuple((n + sum(zeros) - reach) // stride + 1 for n, reach, stride, zeros in axes)

    @property
    def reach(self):
        """Size of its kernel along each axis, with the dilation."""
        return tuple((k - 1) * rate + 1 for k, rate in zip(self.kernel_size, self.dilation, strict=True))

    @property
    def is_depthwise(self):
        """Whether every channel is filtered by itself."""
        return self.groups == self.reads > 1

    @property
    def has_same_padding(self):
        """Whether its zeros are those of TensorFlow's `same` padding."""
        return self.pads == tuple(map(same_padding, self.size, self.reach, self.strides))

    @property
    def parameters(self):
        """Number of weights, without a bias."""
        return math.prod(self.kernel_size) * self.reads * self.writes // self.groups

    @property
    def macs(self):
        """Multiply-adds for one image."""
        return math.prod(self.size if self.transposed else self.output_size) * self.parameters


def pieces_of(site, method=None, ranks=None):
    """Return the pieces of all calls of a layer; the list has one entry for each piece of each call.

    The bias costs nothing in an engine. The activation is left out: it is the same after the dense layer and after the
    chain, so that it does not change their difference. The zeros that a chain adds before its first spatial layer are
    part of that piece.

    Args:
        site: `_sites.Site`.
        method: a class of `factorizations`, for the chain; None for the dense layer.
        ranks: of the chain.

    Raises:
        ValueError: the layer reads images of any size.
    """
    chain = [_dense_layer(site.kernel_shape)] if method is None else method.chain(site.kernel_shape, ranks)
    found = []
    for (read, *_), written in site.node.calls:
        if None in (*read[1:], *written[1:]):
            raise ValueError(
                f"the time of layer {site.node.path!r} can't be measured, since its input has no fixed size: {read}"
            )
        found += _pieces(site.kind, chain, read[1:-1], written[1:-1])
    return found


def _dense_layer(kernel_shape):
    """Return a layer with a whole kernel as the `ChainLayer` of a chain of its own."""
    *spatial, channels, filters = kernel_shape
    letters = SPATIAL[: len(spatial)]
    sizes = dict(zip(letters, spatial, strict=True)) | {"s": channels, "t": filters}
    return ChainLayer("dense", 0, f"{letters}st", "s", "t", sizes, tuple(range(len(spatial))), tuple(spatial))


def _pieces(kind, chain, size, output_size):
    """Return the pieces of a chain, for a `layer_kinds.KernelLayer`, in one call."""
    if not kind.axes:
        return [Piece((math.prod(size),), part.in_channels, part.filters) for part in chain]
    layer, found = kind.layer, []
    placed = blocks._placed_layers(chain, layer.strides, layer.padding, kind.transposed)
    for part, strides, padding, needs_zeros in placed:
        channels = [kind.groups * count for count in (part.in_channels, part.filters)]
        groups = channels[0] if part.is_depthwise else kind.groups
        dilation = tuple(rate if axis in part.axes else 1 for axis, rate in enumerate(layer.dilation_rate))
        unpadded = ((0, 0),) * kind.axes
        transposed = kind.transposed and bool(part.axes)
        piece = Piece(tuple(size), *channels, groups, part.kernel_size, strides, dilation, unpadded, transposed)
        if transposed:
            wanted = [output_size[axis] if axis in part.axes else n for axis, n in enumerate(size)]
            cuts = [max(0, full - n) for full, n in zip(piece.output_size, wanted, strict=True)]
            pads = tuple((cut // 2, cut - cut // 2) for cut in cuts)
        elif needs_zeros:
            pads = tuple(map(same_padding, size, layer.kernel_size, layer.strides))
        elif padding == "causal":
            pads = tuple((reach - 1, 0) for reach in piece.reach)
        else:
            pads = tuple(map(same_padding, size, piece.reach, strides)) if padding == "same" else unpadded
        found.append(dataclasses.replace(piece, pads=pads))
        size = found[-1].output_size
    return [_with_two_axes(piece) for piece in found] if kind.axes == 1 else found


def _with_two_axes(piece):
    """Return a piece of one axis as one of two, as Keras exports it."""
    changes = {name: (1, *getattr(piece, name)) for name in ("size", "kernel_size", "strides", "dilation")}
    return dataclasses.replace(piece, pads=((0, 0), *piece.pads), **changes)
