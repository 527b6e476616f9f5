"""The chain of small layers that a factorization stands for, as plain data.

A layer is described by the letters of its factor's axes: i, j, k are spatial, s the input channels, t the filters,
others ranks; and by the channels that it reads and writes ("a->b"). A layer that writes what it reads ("r->r",
"s->sr") is depthwise.
"""

import dataclasses
import math

from fcnn_utils._checks import check_number

SPATIAL = "ijk"
AXIS_NAMES = {0: (), 1: ("column",), 2: ("column", "row"), 3: ("depth", "column", "row")}


@dataclasses.dataclass(frozen=True)
class ChainLayer:
    """One layer of a chain, as plain data.

    Attributes:
        name: suffix of the layer's name.
        factor: index of the factor that is its weight.
        letters: axes of that factor (see the module).
        reads: letters of the channels that it reads.
        writes: letters of the channels that it writes.
        sizes: dict letter -> size, of all letters of the chain.
        axes: indices of the spatial axes along which its kernel extends.
        kernel_size: size of its kernel along every spatial axis.
    """

    name: str
    factor: int
    letters: str
    reads: str
    writes: str
    sizes: dict
    axes: tuple
    kernel_size: tuple

    @property
    def is_depthwise(self):
        """Whether every channel is filtered by itself."""
        return set(self.reads) <= set(self.writes)

    @property
    def in_channels(self):
        """Number of channels that it reads."""
        return self._size(self.reads)

    @property
    def filters(self):
        """Number of channels that it writes."""
        return self._size(self.writes)

    @property
    def parameters(self):
        """Number of weights, without a bias."""
        return self._size(self.letters)

    @property
    def factor_shape(self):
        """Shape of its factor, one axis for each letter."""
        return tuple(self.sizes[letter] for letter in self.letters)

    def keras_kernel(self, factor):
        """Return a factor as this layer's Keras weight.

        Returns:
            (*kernel_size, in_channels, filters) array; for a depthwise layer
            (*kernel_size, in_channels, depth multiplier).
        """
        spatial = "".join(letter for letter in self.letters if letter in SPATIAL)
        new = "".join(letter for letter in self.writes if letter not in self.reads)
        order = spatial + self.reads + new
        kernel = factor.reshape(self.factor_shape).transpose([self.letters.index(letter) for letter in order])
        return kernel.reshape(*self.kernel_size, self.in_channels, self._size(new))

    def _size(self, letters):
        return math.prod(self.sizes[letter] for letter in letters)


def place_strides(chain, strides):
    """Distribute the strides of a convolution over the layers of its chain.

    A layer takes the stride of the axes along which its kernel extends, so that `same` padding falls where
    the dense layer's does. TensorFlow's depthwise layers require equal strides: such a layer takes the greatest
    common divisor, and a later layer takes what is left.

    Args:
        chain: sequence of `ChainLayer`, of which the last is not depthwise.
        strides: one whole number, or one for each spatial axis.

    Returns:
        list of tuples, the strides of each layer.

    Raises:
        ValueError: the strides are not whole numbers of at least 1.
    """
    count = len(chain[0].kernel_size)
    strides = tuple(strides) if isinstance(strides, (tuple, list)) else (strides,) * count
    if len(strides) != count:
        raise ValueError(f"strides must be one whole number or {count}; got {strides}")
    for stride in strides:
        check_number("strides", stride, int, 1, math.inf)
    left, placed = (1,) * count, []
    for layer in chain:
        wanted = tuple(rest * (strides[axis] if axis in layer.axes else 1) for axis, rest in enumerate(left))
        taken = (math.gcd(*wanted),) * count if layer.is_depthwise else wanted
        left = tuple(want // take for want, take in zip(wanted, taken, strict=True))
        placed.append(taken)
    return placed
