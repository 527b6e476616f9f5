"""What all factorizations share: ranks, factors, and the chain of small layers that the factors stand for.

A kernel has the shape (*spatial, S, T): zero to three spatial axes, S input channels, T filters. A
factorization writes it as a product of factors. Each factor is the weight of one small layer, and the
sequence of these layers, the chain, is equivalent to the factorized kernel. A subclass describes the
chain in `structure`, one entry for each layer, first to last:

    (name, factor, letters, flow)       ("core", 1, "ijab", "a->b")

    name     suffix of the Keras layer's name
    factor   index of the factor that is the layer's weight
    letters  axes of that factor: i, j, k are spatial, s the input channels, t the filters; other lower
             case letters are ranks
    flow     letters of the channels that the layer reads, and of those that it writes. A layer that
             writes what it reads ("r->r", "s->sr") is depthwise

Rules: the letters of a factor are its spatial letters, those it reads, and those it writes. There is at
least one rank; ranks are given in the alphabetical order of their letters. The last layer is not
depthwise and writes "t". A factor may have its spatial axes merged into one, if they come first.

Everything else follows from this: the rebuilt kernel (an einsum over the letters), the number of
parameters and MACs, the Keras layers and their weights, and the factor that `calibration` refits.
This module does not use Keras.
"""

import contextlib
import dataclasses
import inspect
import math

import numpy as np

from fcnn_utils._checks import check_number
from fcnn_utils._processors import one_blas_thread
from fcnn_utils.factorizations.chain import SPATIAL, ChainLayer, place_strides

_LARGE = 500_000  # nested methods may use several BLAS threads for the one SVD of a larger kernel

FACTORIZATIONS = {}  # name -> class; a subclass that sets a name registers itself


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Factorization:
    """A kernel in factors. `decompose` of a subclass makes one.

    A subclass sets `name` and defines `structure`, `_max_ranks` and `_factors` (or `decompose`).

    Attributes:
        kernel_shape: (*spatial, S, T) of the dense kernel.
        factors: tuple of arrays, described in each subclass.
        relative_error: ‖K − K̂‖ / ‖K‖ in the Frobenius norm; 0 for a kernel of zeros.
        kernel_norm: ‖K‖.
    """

    kernel_shape: tuple
    factors: tuple
    relative_error: float
    kernel_norm: float

    name = ""
    is_exact = True  # whether `max_ranks` represents every kernel exactly
    is_nested = False  # whether it has one rank, and lower ranks take the first columns of the factors

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name, _, letters, flow in cls.structure("ij"):
            reads, writes = flow.split("->")
            if set(letters) - set("ij") != set(reads + writes):
                raise TypeError(f"{cls.__name__}: the letters {letters!r} of layer {name!r} do not fit {flow!r}")
        if writes != "t" or reads == "t":
            raise TypeError(f"{cls.__name__}: the last layer must write 't' and not be depthwise; got {flow!r}")
        if "name" in vars(cls):
            FACTORIZATIONS[cls.name] = cls

    # --- what a subclass defines -----------------------------------------------------------------

    @classmethod
    def structure(cls, spatial):
        """Return the layers of the chain for the spatial letters, such as "ij" (see the module)."""
        raise NotImplementedError

    @classmethod
    def _max_ranks(cls, kernel_shape):
        """Return the largest useful ranks for kernels of this (checked) shape, as a tuple of ints."""
        raise NotImplementedError

    @classmethod
    def _factors(cls, kernel, ranks, **options):
        """Return the list of factors, float64 arrays, of a checked kernel at checked ranks."""
        raise NotImplementedError

    # --- making one ------------------------------------------------------------------------------

    @classmethod
    def decompose(cls, kernel, ranks, **options):
        """Decompose a kernel.

        Args:
            kernel: (*spatial, S, T) array of real, finite numbers.
            ranks: an int if the method has one rank, a sequence of ints if it has several.
            options: of the method; see the class.

        Returns:
            An instance of the class.

        Raises:
            ValueError: the kernel, a rank or the value of an option is not allowed.
        """
        kernel = check_kernel(kernel)
        may_use_threads = cls.is_nested and kernel.size > _LARGE
        with contextlib.nullcontext() if may_use_threads else one_blas_thread():
            return cls.from_factors(kernel, cls._factors(kernel, cls.check_ranks(kernel.shape, ranks), **options))

    @classmethod
    def option_names(cls):
        """Return the names of the options of `decompose`."""
        overridden = cls.decompose.__func__ is not Factorization.decompose.__func__
        parameters = inspect.signature(cls.decompose if overridden else cls._factors).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]

    @classmethod
    def check_options(cls, options):
        """Raise ValueError if a key of the dict `options` is not an option of `decompose`."""
        allowed = cls.option_names()
        for name in options:
            if name not in allowed:
                raise ValueError(f"{cls.name} has no option {name!r}; it has {', '.join(allowed) or 'none'}")

    @classmethod
    def from_factors(cls, kernel, factors):
        """Make an instance from factors of `kernel`, (*spatial, S, T), and measure its error."""
        norm = float(np.linalg.norm(kernel))
        result = cls(np.shape(kernel), tuple(factors), 0.0, norm)
        error = float(np.linalg.norm(kernel - result.to_kernel()))
        if error == 0:
            return result
        return dataclasses.replace(result, relative_error=error / norm if norm else math.inf)

    # --- ranks and costs, without a kernel -------------------------------------------------------

    @classmethod
    def max_ranks(cls, kernel_shape):
        """Return the ranks that are enough to represent every kernel of this shape, as a tuple of ints.

        For CP this is an upper bound of the largest tensor rank, which is not known in general.
        """
        return cls._max_ranks(check_kernel_shape(kernel_shape))

    @classmethod
    def check_ranks(cls, kernel_shape, ranks):
        """Return `ranks` as a tuple of ints if the method can have them for this kernel.

        Raises:
            ValueError: the number of ranks is wrong; a rank is not a whole number from 1 to its maximum; or
                the ranks are inconsistent (a rank must not exceed the product of the other axes of its factor).
        """
        largest = cls.max_ranks(kernel_shape)
        given = cls._as_ranks(ranks, len(largest), f", at most {largest}")
        for rank, high in zip(given, largest, strict=True):
            check_number(f"rank of {cls.name} for a {tuple(kernel_shape)} kernel", rank, int, 1, high)
        for layer in cls.chain(kernel_shape, given):
            letters = [letter for letter in layer.letters if letter not in SPATIAL + "st"]
            for letter in letters if len(letters) > 1 else ():
                high = layer.parameters // layer.sizes[letter]
                if layer.sizes[letter] > high:
                    raise ValueError(
                        f"{cls.name} ranks {given} are inconsistent: the rank {layer.sizes[letter]} of the "
                        f"{layer.name} layer can be at most {high}"
                    )
        return given

    @classmethod
    def chain(cls, kernel_shape, ranks):
        """Return the chain of small layers, a tuple of `ChainLayer`, first to last.

        Ranks above `max_ranks` are allowed here: a network trained from scratch may have them.
        """
        *sizes, channels, filters = check_kernel_shape(kernel_shape)
        spatial = SPATIAL[: len(sizes)]
        entries = cls.structure(spatial)
        names = sorted({letter for _, _, letters, _ in entries for letter in letters} - set(spatial + "st"))
        ranks = cls._as_ranks(ranks, len(names))
        for rank in ranks:
            check_number(f"rank of {cls.name}", rank, int, 1, 2**31)
        sizes = dict(zip(spatial, sizes, strict=True)) | {"s": channels, "t": filters}
        sizes |= dict(zip(names, ranks, strict=True))
        layers = []
        for name, factor, letters, flow in entries:
            reads, writes = flow.split("->")
            axes = tuple(axis for axis, letter in enumerate(spatial) if letter in letters)
            kernel_size = tuple(sizes[letter] if letter in letters else 1 for letter in spatial)
            layers.append(ChainLayer(name, factor, letters, reads, writes, sizes, axes, kernel_size))
        return tuple(layers)

    @classmethod
    def count_parameters(cls, kernel_shape, ranks):
        """Return the number of weights of the chain, without a bias."""
        return sum(layer.parameters for layer in cls.chain(kernel_shape, cls.check_ranks(kernel_shape, ranks)))

    @classmethod
    def count_macs(cls, kernel_shape, ranks, strides=1):
        """Return the MACs of the chain for one output position.

        Multiplied by the output's height and width this gives the MACs for an image whose size the strides
        divide, with `same` padding. A layer before a stride works at more positions.

        Args:
            kernel_shape: (*spatial, S, T).
            ranks: as in `decompose`.
            strides: one whole number, or one for each spatial axis.

        Raises:
            ValueError: an argument is not allowed.
        """
        chain = cls.chain(kernel_shape, cls.check_ranks(kernel_shape, ranks))
        total, positions = 0, 1
        for layer, taken in reversed(list(zip(chain, place_strides(chain, strides), strict=True))):
            total += positions * layer.parameters
            positions *= math.prod(taken)
        return total

    # --- an instance -----------------------------------------------------------------------------

    @property
    def ranks(self):
        """Ranks, as `decompose` takes them: a tuple of ints."""
        spatial = SPATIAL[: len(self.kernel_shape) - 2]
        found = {}
        for _, factor, letters, _ in self.structure(spatial):
            axes = self.factors[factor].shape[::-1]  # merged spatial axes come first: count from the end
            found |= {letter: size for letter, size in zip(letters[::-1], axes, strict=False)}
        return tuple(found[letter] for letter in sorted(set(found) - set(spatial + "st")))

    @property
    def parameters(self):
        """Number of values in the factors."""
        return sum(factor.size for factor in self.factors)

    @property
    def layers(self):
        """The chain of this decomposition, a tuple of `ChainLayer`."""
        return self.chain(self.kernel_shape, self.ranks)

    def to_kernel(self):
        """Rebuild the dense kernel (*spatial, S, T) from the factors."""
        equation = ",".join(layer.letters for layer in self.layers)
        factors = [self._factor(layer) for layer in self.layers]
        return _contract(f"{equation}->{self._kernel_letters}", factors)

    def layer_weights(self):
        """Return the Keras weights of the chain's layers, in their order, without a bias."""
        return [layer.keras_kernel(self.factors[layer.factor]) for layer in self.layers]

    def basis(self):
        """Return the matrix B of all layers but the last: the kernel as a matrix is B @ `last_factor()`.

        Returns:
            (prod(spatial) · S, F) array; F is the number of values that the last layer reads for one output.
        """
        *others, last = self.layers
        rows, reads = self._kernel_letters[:-1], last.letters.replace("t", "")
        own = [letter for letter in reads if letter in rows]  # the last layer reads every position along these
        terms = [layer.letters for layer in others] + [letter + letter.upper() for letter in own]
        factors = [self._factor(layer) for layer in others] + [np.eye(last.sizes[letter]) for letter in own]
        columns = "".join(letter.upper() if letter in own else letter for letter in reads)
        product = _contract(f"{','.join(terms)}->{rows}{columns}", factors)
        return product.reshape(math.prod(self.kernel_shape[:-1]), -1)

    def last_factor(self):
        """Return the weights of the last layer as a matrix (F, T); see `basis`."""
        last = self.layers[-1]
        return np.moveaxis(self._factor(last), last.letters.index("t"), -1).reshape(-1, self.kernel_shape[-1])

    def __repr__(self):
        size = "×".join(map(str, self.kernel_shape))
        share = self.parameters / math.prod(self.kernel_shape)
        ranks = ", ".join(map(str, self.ranks))
        return (
            f"{type(self).__name__}: {size} kernel, rank {ranks}, {self.parameters:,} parameters "
            f"({share:.1%} of the dense kernel), relative error {self.relative_error:.3g}"
        )

    @property
    def _kernel_letters(self):
        return SPATIAL[: len(self.kernel_shape) - 2] + "st"

    def _factor(self, layer):
        return self.factors[layer.factor].reshape(layer.factor_shape)

    @classmethod
    def _as_ranks(cls, ranks, count, allowed=""):
        """Return `count` ranks as a tuple."""
        given = tuple(ranks) if isinstance(ranks, (tuple, list, np.ndarray)) else (ranks,)
        if len(given) != count:
            raise ValueError(f"{cls.name} has {count} rank{'s' * (count > 1)}{allowed}; got {ranks!r}")
        return tuple(int(rank) if isinstance(rank, np.integer) else rank for rank in given)


def _contract(equation, factors):
    """Contract the factors from left to right. NumPy's own order may make arrays far larger than the kernel."""
    path = [(0, 1), *((0, product) for product in range(len(factors) - 2, 0, -1))]  # each product is appended
    return np.einsum(equation, *factors, optimize=["einsum_path", *path] if len(factors) > 1 else False)


def get(method):
    """Return the factorization class of a name such as "cp"; a class is returned as it is.

    Raises:
        ValueError: there is no such factorization.
    """
    if isinstance(method, type) and issubclass(method, Factorization) and method.name:
        return method
    if method not in list(FACTORIZATIONS):
        raise ValueError(f"method must be one of {', '.join(FACTORIZATIONS)}; got {method!r}")
    return FACTORIZATIONS[method]


def decompose(kernel, method, ranks, **options):
    """Decompose a kernel by the name of a method.

    Args:
        kernel: (*spatial, S, T) array.
        method: "cp", "cp4", "tucker", "tt", "svd", "spatial" or "separable", or a class.
        ranks: an int if the method has one rank, a sequence if it has several.
        options: of the method; see its class.

    Returns:
        `Factorization`.

    Raises:
        ValueError: an argument is not allowed.
    """
    method = get(method)
    method.check_options(options)
    return method.decompose(kernel, ranks, **options)


def check_kernel(kernel):
    """Return `kernel` in float64 if it is (*spatial, S, T), real and finite; else raise ValueError."""
    kernel = np.asarray(kernel)
    if kernel.dtype.kind not in "fiu" and kernel.dtype.name != "bfloat16":
        raise ValueError(f"kernel must be an array of real numbers; got {kernel.dtype}")
    kernel = kernel.astype(np.float64, order="C")  # the axes are merged again and again: without copies
    check_kernel_shape(kernel.shape)
    if not np.isfinite(kernel).all():
        raise ValueError(f"kernel must be finite; {kernel.size - np.isfinite(kernel).sum()} of its values are not")
    return kernel


def check_kernel_shape(kernel_shape):
    """Return `kernel_shape` as a tuple of ints if it is (*spatial, S, T); else raise ValueError."""
    if not 2 <= len(kernel_shape) <= 5 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in kernel_shape):
        raise ValueError(
            "kernel shape must be (*spatial, in_channels, filters) with at most three spatial axes, each at least "
            f"1; got {tuple(kernel_shape)}"
        )
    return tuple(int(n) for n in kernel_shape)
