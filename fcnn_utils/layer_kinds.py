"""The kinds of Keras layers that can be factorized: each is read as a kernel and rebuilt as a chain of small layers.

    layer                                      kernel (*spatial, S, T)
    Dense                                      its matrix, without spatial axes; it works at every position
    EinsumDense                                its matrix, from the axes that it contracts to those that it makes
    Conv1D, Conv2D, Conv3D                     its own; with groups, one for each group, (*spatial, S / G, T / G)
    Conv1DTranspose, ..., Conv3DTranspose      its own; Keras stores it as (*spatial, T, S)

The chain of a transposed convolution has transposed layers, that of a grouped one grouped layers. Some methods need
layers that Keras does not have; `KernelLayer.block` then raises ValueError.
"""

import math

import numpy as np
from keras import layers

from fcnn_utils import blocks
from fcnn_utils._conv_options import CONVOLUTIONS, TRANSPOSED, LayerOptions
from fcnn_utils._einsum import EinsumMatrix

_AXES = {kind: axes for kinds in (CONVOLUTIONS, TRANSPOSED) for axes, kind in kinds.items()}
_AXES |= {layers.Dense: 0, layers.EinsumDense: 0}
KINDS = tuple(_AXES)


class KernelLayer:
    """A Keras layer of one of these `KINDS`, read as a kernel.

    Attributes:
        layer: the layer.
        axes: number of spatial axes of its kernel.
        groups: number of groups of channels.
        transposed: whether it is a transposed convolution.
        einsum: the `EinsumMatrix` of an EinsumDense, else None.

    Raises:
        ValueError: it is an EinsumDense whose equation is not a product with one matrix.
    """

    def __init__(self, layer):
        self.layer, self.axes = layer, _AXES[type(layer)]
        self.groups = getattr(layer, "groups", 1)
        self.transposed = type(layer) in TRANSPOSED.values()
        self.einsum = EinsumMatrix.of(layer.equation) if type(layer) is layers.EinsumDense else None

    @property
    def kernel_shape(self):
        """Shape (*spatial, S, T) of the kernel of one group."""
        if self.einsum:
            return self.einsum.matrix_shape(self.layer.kernel.shape)
        *spatial, channels, filters = self.layer.kernel.shape
        return (*spatial, filters, channels) if self.transposed else (*spatial, channels, filters // self.groups)

    @property
    def has_patches(self):
        """Whether each output is a product of a patch and one kernel, and a bias can shift each by itself."""
        is_shifted = self.layer.bias is None or not self.einsum or set(self.layer.bias_axes) == set(self.einsum.new)
        return self.groups == 1 and not self.transposed and is_shifted

    @property
    def is_pointwise(self):
        """Whether it reads one position for each output."""
        return math.prod(self.kernel_shape[:-2]) == 1

    def kernels(self):
        """Return the list of the kernels, (*spatial, S, T) arrays, one for each group."""
        kernel = self.layer.get_weights()[0]
        if self.einsum:
            return [self.einsum.to_matrix(kernel)]
        return np.split(np.swapaxes(kernel, -1, -2) if self.transposed else kernel, self.groups, axis=-1)

    def keras_kernel(self, kernels):
        """Join the kernels of all groups into the weight of the Keras layer."""
        if self.einsum:
            return self.einsum.to_kernel(kernels[0], self.layer.kernel.shape)
        kernel = np.concatenate(kernels, axis=-1)
        return np.swapaxes(kernel, -1, -2) if self.transposed else kernel

    def macs(self, chain, input_shape, output_shape):
        """Return the MACs of a chain in place of the layer, for one image; shapes have the batch axis."""
        if not self.axes:
            positions = [self.einsum.positions(input_shape)] if self.einsum else input_shape[1:-1]
            return blocks.chain_macs(chain, positions, strides=(), dilation_rate=())
        geometry = {name: getattr(self.layer, name) for name in ("strides", "padding", "dilation_rate")}
        geometry["output_size"] = output_shape[1:-1] if self.transposed else None
        return self.groups * blocks.chain_macs(chain, input_shape[1:-1], **geometry)

    def block(self, input_shape, chain, use_bias):
        """Build a keras.Model of the chain's layers, with new weights and the layer's other settings.

        Args:
            input_shape: of what the layer reads, without the batch axis.
            chain: from `factorizations.Factorization.chain`, for the kernel of one group.
            use_bias: whether the last layer has a bias.

        Raises:
            ValueError: Keras has no layer that the chain needs, or the chain needs an image of a fixed size.
        """
        layer = self.layer
        names = ["activation", "trainable", "name"]
        names += ["kernel_initializer", "kernel_regularizer", "bias_initializer", "bias_regularizer"]
        if self.axes:
            names += ["kernel_size", "strides", "padding", "dilation_rate"]
        options = {name: getattr(layer, name) for name in names} | {"dtype": layer.dtype_policy, "use_bias": use_bias}
        starts = layer.kernel_initializer
        if np.ndim(getattr(starts, "value", 0)) or getattr(starts, "input_axes", None):  # for the dense kernel's shape
            del options["kernel_initializer"]
        options |= {"axes": self.axes, "groups": self.groups, "transposed": self.transposed}
        options["output_padding"] = layer.output_padding if self.transposed else None
        options["einsum"] = self._einsum_arguments(input_shape, chain[0].filters, use_bias) if self.einsum else ()
        conv = LayerOptions(**{"kernel_size": ()} | options)
        return blocks.chain_block(tuple(input_shape), chain, conv)

    def input_rows(self, x):
        """Return what a layer without spatial axes reads, a NumPy array, as an array (*positions, S)."""
        return self.einsum.input_rows(x) if self.einsum else x

    def input_axes(self, count):
        """Return the set of the axes of its channels in an input of `count` axes."""
        return set(self.einsum.input_axes(count)) if self.einsum else {count - 1}

    def output_axes(self, count):
        """Return the set of the axes of its filters in an output of `count` axes."""
        return set(self.einsum.output_axes(count)) if self.einsum else {count - 1}

    def keras_bias(self, values):
        """Reshape `values`, (T,) for each filter or () for all, so that they can be added to the layer's bias."""
        if not self.einsum or not np.ndim(values):
            return values
        return self.einsum.to_bias(values, self.layer.kernel.shape, self.layer.bias.shape)

    def weights(self, decompositions, bias):
        """Return the weights of the layers of `block`, from a decomposition for each group and a bias or None."""
        found = []
        for layer, *parts in zip(
            decompositions[0].layers, *(each.layer_weights() for each in decompositions), strict=True
        ):
            kernel = np.concatenate(parts, axis=-2 if layer.is_depthwise else -1)
            swapped = self.transposed and layer.axes
            found.append(np.swapaxes(kernel, -1, -2) if swapped else kernel)
        if self.einsum:
            reads, writes = (
                self.einsum.sizes(each, self.layer.kernel.shape) for each in (self.einsum.contracted, self.einsum.new)
            )
            found = [found[0].reshape(*reads, -1), found[1].reshape(-1, *writes)]
        return [*found, *([] if bias is None else [np.asarray(bias)])]

    def _einsum_arguments(self, input_shape, rank, use_bias):
        """Return the arguments of the two EinsumDense layers of a chain that depend on the equation."""
        layer = self.layer
        first, equation = self.einsum.split(len(input_shape) + 1, rank, layer.partial_output_shape)
        second = {"equation": equation, "output_shape": layer.partial_output_shape}
        return first, second | {"bias_axes": layer.bias_axes if use_bias else None}


def read_kernel(layer):
    """Return the `KernelLayer` of a layer; None if it is not of the `KINDS` or not a product with one matrix."""
    try:
        return KernelLayer(layer) if type(layer) in KINDS else None
    except ValueError:
        return None
