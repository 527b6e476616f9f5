"""The equation of an EinsumDense layer, read as one matrix that maps some axes of the input to new ones.

    abc,cd->abd        contracts c, makes d; keeps a and b, the positions
    abde,dec->abc      contracts d and e, makes c
    ...x,xy->...y      keeps any number of axes

The kernel is then a matrix (S, T): S is the product of the contracted axes, T that of the new ones, both in the order
of the kernel's letters. Arrays here are NumPy's.
"""

import dataclasses
import math
import re
import string

_EQUATION = re.compile(r"(\.\.\.)?([a-zA-Z]+)(\.\.\.)?,([a-zA-Z]+)->(\.\.\.)?([a-zA-Z]+)(\.\.\.)?")


@dataclasses.dataclass(frozen=True)
class EinsumMatrix:
    """An equation that is a product with one matrix.

    Attributes:
        reads, kernel, writes: letters of the three terms.
        left, right: "..." on the side where the input has any number of further axes, else "".
    """

    reads: str
    kernel: str
    writes: str
    left: str = ""
    right: str = ""

    @classmethod
    def of(cls, equation):
        """Read an equation.

        Raises:
            ValueError: it is not a product with one matrix; the message says why, of "its equation".
        """
        match = _EQUATION.fullmatch(equation)
        if match is None or match.group(1, 3) != match.group(5, 7):
            raise ValueError(f"its equation {equation!r} is not one of an input and a kernel")
        left, reads, right, kernel, _, writes, _ = match.groups(default="")
        found = cls(reads, kernel, writes, left, right)
        shared = [letter for letter in kernel if letter in reads and letter in writes]
        kept = [letter for letter in reads if letter not in kernel]
        reasons = {
            "repeats a letter": any(len(set(term)) < len(term) for term in (reads, kernel, writes)),
            f"has another kernel for each position along {', '.join(shared)}": bool(shared),
            "sums over an axis that the kernel does not have": not set(kept) <= set(writes),
            "contracts no axis, or makes none": not (found.contracted and found.new),
            "does not keep the batch in front": not left and reads[0] != writes[0],
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"its equation {equation!r} {reason}")
        return found

    @property
    def contracted(self):
        """Letters that the kernel contracts, in its order."""
        return "".join(letter for letter in self.kernel if letter in self.reads)

    @property
    def new(self):
        """Letters that the kernel makes, in its order."""
        return "".join(letter for letter in self.kernel if letter in self.writes)

    def split(self, count, rank, output_shape):
        """Return the two layers in its place, with the kernels (*contracted, R) and (R, *new).

        Args:
            count: number of axes of the input.
            rank: R.
            output_shape: of the dense layer, as Keras takes it: sizes or None, without those that "..." stands for.

        Returns:
            dict of the arguments of the first layer, equation of the second.
        """
        free = (
            letter for letter in dict.fromkeys("r" + string.ascii_letters) if letter not in self.reads + self.writes
        )
        new, first = next(free), next(letter for letter in self.reads if letter in self.contracted)
        between = "".join(letter for letter in self.reads if letter not in self.contracted or letter == first)
        between = between.replace(first, new)
        left, batch = self.left, "" if self.left else self.writes[0]
        if left and count - len(self.reads) > 2:  # Keras confuses the sizes of several axes that "..." stands for
            left = "".join(next(free) for _ in range(count - len(self.reads)))
            batch = left[0]
        sizes = dict(zip(self.writes.removeprefix(batch), output_shape, strict=True)) | {new: rank}
        written = (between if left == self.left else left + between).removeprefix(batch)
        enter = {"equation": f"{left}{self.reads}{self.right},{self.contracted}{new}->{left}{between}{self.right}"}
        enter["output_shape"] = tuple(sizes.get(letter) for letter in written)
        return enter, f"{self.left}{between}{self.right},{new}{self.new}->{self.left}{self.writes}{self.right}"

    def sizes(self, letters, kernel_shape):
        """Return the sizes of some letters of the kernel, a list."""
        return [kernel_shape[self.kernel.index(letter)] for letter in letters]

    def matrix_shape(self, kernel_shape):
        """Return (S, T) for a kernel of this shape."""
        return tuple(math.prod(self.sizes(letters, kernel_shape)) for letters in (self.contracted, self.new))

    def to_matrix(self, kernel):
        """Return the kernel as the matrix (S, T)."""
        order = [self.kernel.index(letter) for letter in self.contracted + self.new]
        return kernel.transpose(order).reshape(self.matrix_shape(kernel.shape))

    def to_kernel(self, matrix, kernel_shape):
        """Return the kernel, of this shape, whose matrix is `matrix`."""
        letters = self.contracted + self.new
        kernel = matrix.reshape(self.sizes(letters, kernel_shape))
        return kernel.transpose([letters.index(letter) for letter in self.kernel])

    def to_bias(self, values, kernel_shape, bias_shape):
        """Reshape `values` (T,), one for each column of the matrix, to the bias of the layer, `bias_shape`."""
        in_output = sorted(self.new, key=self.writes.index)
        values = values.reshape(self.sizes(self.new, kernel_shape))
        return values.transpose([self.new.index(letter) for letter in in_output]).reshape(bias_shape)

    def output_shape(self, input_shape, kernel_shape):
        """Return the shape of the output for an input of this shape."""
        start, sizes = len(input_shape) - len(self.reads) if self.left else 0, {}
        end = start + len(self.reads)
        sizes |= dict(zip(self.kernel + self.reads, (*kernel_shape, *input_shape[start:end]), strict=True))
        return (*input_shape[:start], *(sizes[letter] for letter in self.writes), *input_shape[end:])

    def positions(self, input_shape):
        """Return the number of positions of one image; the shape has the batch axis."""
        return math.prod(input_shape[1:]) // math.prod(input_shape[axis] for axis in self.input_axes(len(input_shape)))

    def input_axes(self, count):
        """Return the axes that the kernel contracts in an input of `count` axes, in its order."""
        return self._axes(count, self.reads, self.contracted)

    def output_axes(self, count):
        """Return the axes that the kernel makes in an output of `count` axes, in its order."""
        return self._axes(count, self.writes, self.new)

    def input_rows(self, x):
        """Return an input as an array (*positions, S)."""
        return self._channels_last(x, self.reads, self.input_axes(x.ndim))

    def _channels_last(self, x, term, channels):
        kept = self._axes(x.ndim, term, [letter for letter in self.reads if letter not in self.kernel])
        further = [axis for axis in range(x.ndim) if axis not in kept + channels]
        positions = further + kept if self.left else kept + further
        return x.transpose(positions + channels).reshape(*(x.shape[axis] for axis in positions), -1)

    def _axes(self, count, term, letters):
        start = count - len(term) if self.left else 0
        return [start + term.index(letter) for letter in letters]
