"""The checked options of a block, and the Keras layers made with them.

`ConvOptions` are those of a block of `blocks`, for images. `LayerOptions` are those of a layer of any kind of
`layer_kinds`.
"""

import dataclasses

from keras import layers

from fcnn_utils._checks import check_choice, check_sizes

CONVOLUTIONS = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}  # by the number of spatial axes
TRANSPOSED = {1: layers.Conv1DTranspose, 2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}
DEPTHWISE = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}


@dataclasses.dataclass(frozen=True)
class ConvOptions:
    """The checked options of a block, and the Keras layers made with them."""

    kernel_size: tuple
    strides: tuple = 1
    padding: str = "same"
    dilation_rate: tuple = 1
    activation: object = None
    use_bias: bool = True
    kernel_initializer: object = "glorot_uniform"
    kernel_regularizer: object = None
    bias_initializer: object = "zeros"
    bias_regularizer: object = None
    trainable: bool = True
    dtype: object = None
    name: str = "block"

    # no fields here: only `LayerOptions` may set them
    axes = 2
    groups = 1
    transposed = False
    output_padding = None
    einsum = ()

    def __post_init__(self):
        for name in ("kernel_size", "strides", "dilation_rate"):
            sizes = check_sizes(name, getattr(self, name), self.axes) if self.axes else ()
            object.__setattr__(self, name, sizes)
        check_choice("padding", self.padding, ("same", "valid", "causal") if self.axes == 1 else ("same", "valid"))
        if self.axes and max(self.strides) > 1 and max(self.dilation_rate) > 1:  # Keras refuses this, too
            raise ValueError(
                f"strides and dilation_rate can't both be above 1; got {self.strides} and {self.dilation_rate}"
            )

    @property
    def geometry(self):
        """Arguments of a layer with the whole kernel size."""
        return {"strides": self.strides, "padding": self.padding, "dilation_rate": self.dilation_rate}

    def check_same(self, what):
        """Raise ValueError unless the padding is "same"."""
        if self.padding != "same":
            raise ValueError(f"{what} keeps the image's size: padding must be 'same'; got {self.padding!r}")

    def chain_layer(self, layer, strides, padding, *, last):
        """Make the Keras layer of a `factorizations.ChainLayer`."""
        if not self.axes:
            return self.dense(layer.name, layer.filters, last=last)
        options = {"strides": strides}
        if layer.axes:
            dilation = tuple(d if axis in layer.axes else 1 for axis, d in enumerate(self.dilation_rate))
            options |= {"padding": padding, "dilation_rate": dilation}
        if layer.is_depthwise:
            multiplier = layer.filters // layer.in_channels
            return self.depthwise(layer.name, layer.kernel_size, depth_multiplier=multiplier, last=last, **options)
        if self.transposed and layer.axes:
            kept = self.output_padding
            if kept is not None:
                kept = tuple(size if axis in layer.axes else 0 for axis, size in enumerate(kept))
            return self.conv(layer.name, layer.filters, layer.kernel_size, last=last, output_padding=kept, **options)
        if self.groups > 1:
            options["groups"] = self.groups
        return self.conv(layer.name, self.groups * layer.filters, layer.kernel_size, last=last, **options)

    def conv(self, part, filters, kernel_size=(1, 1), *, last=False, **arguments):
        """Make a convolution, with the bias and the activation if it is the last of its block."""
        starts = {"kernel_initializer": self.kernel_initializer, "kernel_regularizer": self.kernel_regularizer}
        kind = (TRANSPOSED if "output_padding" in arguments else CONVOLUTIONS)[self.axes]
        return kind(filters, kernel_size, **(starts | self._common(part, last) | arguments))

    def dense(self, part, units, *, last=False):
        """Make a Dense or an EinsumDense layer, with the bias and the activation if it is the last of its block."""
        starts = {"kernel_initializer": self.kernel_initializer, "kernel_regularizer": self.kernel_regularizer}
        common = self._common(part, last)
        del common["data_format"]
        if not self.einsum:
            return layers.Dense(units, **starts, **common)
        del common["use_bias"]
        return layers.EinsumDense(**self.einsum[last], **starts, **common)

    def depthwise(self, part, kernel_size, *, last=False, **arguments):
        """Make a depthwise layer, with the bias and the activation if it is the last of its block."""
        if self.axes not in DEPTHWISE or self.transposed or self.padding == "causal":
            what = "transposed" if self.transposed else "causal" if self.padding == "causal" else "3-D"
            raise ValueError(f"the chain needs a {what} depthwise layer, which Keras does not have")
        starts = {"depthwise_initializer": self.kernel_initializer, "depthwise_regularizer": self.kernel_regularizer}
        return DEPTHWISE[self.axes](kernel_size, **(starts | self._common(part, last) | arguments))

    def layer(self, kind, part, *arguments, **named):
        """Make a layer without weights."""
        return kind(*arguments, **named, **self._named(part))

    def pad(self, x):
        """Add the zeros that the dense layer's `same` padding would add, as a layer of their own."""
        if None in x.shape[1:-1]:
            raise ValueError(
                f"strides {self.strides} with `same` padding need an image of a fixed size; got {x.shape[1:-1]}"
            )
        edges = [same_padding(*each) for each in zip(x.shape[1:-1], self.kernel_size, self.strides, strict=True)]
        pad = {1: layers.ZeroPadding1D, 2: layers.ZeroPadding2D, 3: layers.ZeroPadding3D}[self.axes]
        return self.layer(pad, "pad", edges[0] if self.axes == 1 else edges, data_format="channels_last")(x)

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


@dataclasses.dataclass(frozen=True)
class LayerOptions(ConvOptions):
    """The options of a layer of any kind.

    Attributes:
        axes: number of spatial axes; without any, the layers are Dense or EinsumDense.
        groups: number of groups of channels.
        transposed: whether the convolution is transposed.
        output_padding: of a transposed convolution, as its layer stores it.
        einsum: if the layers are EinsumDense, their further arguments, two dicts.
    """

    axes: int = 2
    groups: int = 1
    transposed: bool = False
    output_padding: object = None
    einsum: tuple = ()


def same_padding(size, kernel_size, stride):
    """Return (before, after), the zeros that `same` padding adds along one axis."""
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2
