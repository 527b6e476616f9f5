"""Ranks of a factorized convolution: which are possible, what they cost, which to choose. Formulas only, no Keras.

A kernel (kh, kw, S, T) reads S channels and writes T. Each method makes it a chain of small convolutions with these
ranks, at most those that are enough for every kernel (a CP of a given kernel needs fewer as a rule):

    method       chain                                        ranks         at most
    "cp"         1×1 S→R, kh×kw depthwise, 1×1 R→T            (R,)          min(kh kw S, kh kw T, S T)
    "cp4"        1×1 S→R, kh×1 and 1×kw depthwise, 1×1 R→T    (R,)          kh kw S T / max(kh, kw, S, T)
    "tucker"     1×1 S→R1, kh×kw R1→R2, 1×1 R2→T              (R1, R2)      min(S, kh kw T), min(T, kh kw S)
    "tt"         1×1 S→R1, kh×1 R1→R2, 1×kw R2→R3, 1×1 R3→T   (R1, R2, R3)  as tucker, with min(kh S, kw T) between
    "spatial"    kh×1 S→R, 1×kw R→T                           (R,)          min(kh S, kw T)
    "separable"  kh×kw depthwise S→S R, 1×1 S R→T             (R,)          min(kh kw, T)

Costs are per output position; with strides (sh, sw) an image before the stride has sh sw times as many positions.
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar

from fcnn_utils._checks import check_choice, check_number, check_pair

METHODS = ("cp", "cp4", "tucker", "tt", "spatial", "separable")


def maximum(method, shape):
    """Ranks that are enough to represent every kernel of this shape exactly, a tuple of ints.

    For CP an upper bound of the largest tensor rank, which is not known in general; for the others the smallest.

    Args:
        method: one of the table above.
        shape: (kh, kw, S, T) of the kernel.

    Raises:
        ValueError: no such method, or no such shape.
    """
    check_choice("method", method, METHODS)
    kh, kw, channels, filters = check_shape(shape)
    area, size = kh * kw, math.prod(shape)
    return {
        "cp": (size // max(area, channels, filters),),
        "cp4": (size // max(shape),),
        "tucker": (min(channels, area * filters), min(filters, area * channels)),
        "tt": (min(channels, area * filters), min(kh * channels, kw * filters), min(filters, area * channels)),
        "spatial": (min(kh * channels, kw * filters),),
        "separable": (min(area, filters),),
    }[method]


def check(method, shape, ranks):
    """`ranks` as a tuple of ints, checked: a whole number for one rank, a sequence for several.

    Raises:
        ValueError: no such method, or no such shape; not as many ranks as the method has; one that is not a whole
            number from 1 to its maximum; or ranks that no chain can have together (R2 > kh R1 in a tensor train).
    """
    largest = maximum(method, shape)
    given = tuple(ranks) if isinstance(ranks, (tuple, list, np.ndarray)) else (ranks,)
    if len(given) != len(largest):
        raise ValueError(
            f"{method} has {len(largest)} rank{'s' * (len(largest) > 1)}, at most {largest}; got {ranks!r}"
        )
    given = tuple(int(rank) if isinstance(rank, np.integer) else rank for rank in given)
    for rank, high in zip(given, largest, strict=True):
        check_number(f"rank of {method} for a {tuple(shape)} kernel", rank, int, 1, high)
    for left, right, factor in _together(method, shape, given):
        if right > factor * left:
            raise ValueError(f"{method} ranks {given}: a rank of {right} beside one of {left} can be {factor * left}")
    return given


def parameters(method, shape, ranks):
    """Number of weights of the chain, without bias. ValueError as `check`."""
    return sum(layer_parameters(method, shape, ranks))


def layer_parameters(method, shape, ranks):
    """List of the number of weights of each layer of the chain, in its order, without bias. ValueError as `check`."""
    return [count for count, _ in _layers(method, shape, check(method, shape, ranks))]


def macs(method, shape, ranks, strides=(1, 1)):
    """MACs of the chain per output position.

    Times the output's height and width they are those of an image that the strides divide, with `same` padding; a layer
    before the stride has sh (or sw, or both) times as many positions. A chain that pads in a layer of its own, as
    `blocks` tells, has a row or column more or less of these.

    Args:
        method: one of the table above.
        shape: (kh, kw, S, T) of the kernel.
        ranks: as in that table.
        strides: (sh, sw), or one number for both.

    Raises:
        ValueError: as `check`, or the strides are not whole numbers of at least 1.
    """
    sh, sw = check_pair("strides", strides)
    common = math.gcd(sh, sw)  # the stride that a depthwise layer can take: TensorFlow's wants equal ones
    positions = {"before": sh * sw, "column": sw, "depthwise": sh * sw // common**2, "after": 1}
    return sum(count * positions[where] for count, where in _layers(method, shape, check(method, shape, ranks)))


def dense(shape):
    """Weights of a dense kernel of the shape (kh, kw, S, T): its MACs per output position, too.

    Raises:
        ValueError: it is not four whole numbers of at least 1.
    """
    return math.prod(check_shape(shape))


def for_fraction(method, shape, fraction, *, cost="parameters", strides=(1, 1), multiple=1):
    """Largest ranks whose cost is at most `fraction` of the dense kernel's; several in proportion to their maxima.

    Args:
        method: one of the table above.
        shape: (kh, kw, S, T) of the kernel.
        fraction: above 0.
        cost: "parameters" or "macs".
        strides: (sh, sw), on which the MACs depend.
        multiple: ranks are multiples of this (or their maxima), as engines like them that compute 16 channels at once.

    Raises:
        ValueError: even the smallest ranks cost more (the sentence says how much), or an argument is not as above.
    """
    check_choice("cost", cost, ("parameters", "macs"))
    check_number("multiple", multiple, int, 1, 4096)
    if not isinstance(fraction, (int, float)) or isinstance(fraction, bool) or not 0 < fraction < math.inf:
        raise ValueError(f"fraction must be a number above 0; got {fraction!r}")
    largest = maximum(method, shape)
    steps = max(largest)

    def ranks_at(step):
        exact = (-(-high * step // steps) for high in largest)  # rounded up: together they stay a possible chain
        return tuple(min(high, -(-rank // multiple) * multiple) for rank, high in zip(exact, largest, strict=True))

    def share(step):
        ranks = ranks_at(step)
        count = parameters(method, shape, ranks) if cost == "parameters" else macs(method, shape, ranks, strides)
        return count / dense(shape)

    if share(1) > fraction:
        raise ValueError(
            f"fraction must be at least {share(1):.4g}, the {cost} of {method} at rank {max(ranks_at(1))} for a "
            f"{tuple(shape)} kernel; got {fraction!r}"
        )
    low, high = 1, steps + 1  # share(low) <= fraction; share rises with the step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle) <= fraction else (low, middle)
    return ranks_at(low)


def break_even(method, shape, *, cost="parameters", strides=(1, 1)):
    """Largest ranks at which the chain still costs less than the dense kernel; ValueError where none does."""
    return for_fraction(method, shape, 1 - 0.5 / dense(shape), cost=cost, strides=strides)


def vbmf(matrix):
    """Rank of a matrix under Gaussian noise of unknown variance, by empirical variational Bayes; 0 for pure noise.

    The global solution in closed form but for the noise variance, which is found by search (Nakajima, Sugiyama,
    Babacan & Tomioka 2013, JMLR 14; threshold and bounds from Nakajima, Tomioka, Sugiyama & Babacan 2015, JMLR 16).

    Raises:
        ValueError: it is no matrix of finite numbers.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise ValueError(f"vbmf takes a matrix of finite numbers; got an array of the shape {matrix.shape}")
    short, long = sorted(matrix.shape)
    gamma2 = np.linalg.svd(matrix, compute_uv=False) ** 2
    if gamma2[0] == 0:
        return 0
    gamma2 = np.maximum(gamma2 / gamma2[0], 1e-15)  # scaled; a noise-free matrix gets noise at the level of rounding
    alpha = short / long
    tau = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    kept = min(math.ceil(short / (1 + alpha)) - 1, short - 1)  # no more components than these can be kept
    lowest = max(gamma2[kept] / (long * edge), gamma2[kept:].mean() / long)
    highest = gamma2.sum() / (short * long)

    def free_energy(log_variance):
        x = gamma2 / (long * math.exp(log_variance))
        strong = x[x > edge]
        tau = 0.5 * (strong - 1 - alpha + np.sqrt((strong - 1 - alpha) ** 2 - 4 * alpha))
        return np.sum(x - np.log(x)) + np.sum(np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau)

    grid = np.linspace(math.log(lowest), math.log(max(highest, lowest * (1 + 1e-9))), 200)  # it has many local minima
    best = int(np.argmin([free_energy(value) for value in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    variance = math.exp(minimize_scalar(free_energy, bounds=around, method="bounded").x)
    return int(np.sum(gamma2 > long * variance * edge))


def vbmf_tucker(kernel):
    """Tucker ranks (R1, R2) of a kernel (kh, kw, S, T) by VBMF of its unfoldings (Kim et al. 2015, arXiv 1511.06530).

    An unfolding that looks like noise has the estimate 0; a layer needs a channel, so it gets 1.

    Raises:
        ValueError: the kernel is not 4-way, real and finite.
    """
    kernel = check_kernel(kernel)
    return tuple(max(1, vbmf(np.moveaxis(kernel, mode, 0).reshape(kernel.shape[mode], -1))) for mode in (2, 3))


def check_kernel(kernel):
    """`kernel` in float64 if it is (kh, kw, S, T), real and finite; else ValueError."""
    kernel = np.asarray(kernel)
    if kernel.dtype.kind not in "fiu" and kernel.dtype.name != "bfloat16":
        raise ValueError(f"a kernel is an array of real numbers; got {kernel.dtype}")
    kernel = kernel.astype(np.float64)
    check_shape(kernel.shape)
    if not np.isfinite(kernel).all():
        raise ValueError(f"the kernel has {np.size(kernel) - np.isfinite(kernel).sum()} values that are not finite")
    return kernel


def check_shape(shape):
    """`shape` as a tuple of ints if it is (kh, kw, S, T), four whole numbers of at least 1; else ValueError."""
    if len(shape) != 4 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in shape):
        raise ValueError(f"a kernel has the shape (kh, kw, in_channels, filters), each at least 1; got {tuple(shape)}")
    return tuple(int(n) for n in shape)


def _layers(method, shape, ranks):
    """(weights, where) of each layer of the chain: before the stride, after the column's, in the depthwise, after."""
    kh, kw, channels, filters = shape
    first, middle, last = ranks[0], ranks[len(ranks) // 2], ranks[-1]
    enter, leave = (channels * first, "before"), (last * filters, "after")
    return {
        "cp": [enter, (kh * kw * first, "depthwise"), leave],
        "cp4": [enter, (kh * first, "before"), (kw * first, "depthwise"), leave],
        "tucker": [enter, (kh * kw * first * last, "after"), leave],
        "tt": [enter, (first * kh * middle, "column"), (middle * kw * last, "after"), leave],
        "spatial": [(kh * channels * first, "column"), (first * kw * filters, "after")],
        "separable": [(kh * kw * channels * first, "depthwise"), (channels * first * filters, "after")],
    }[method]


def _together(method, shape, ranks):
    """(rank, its neighbour, how many times the rank the neighbour can be)."""
    kh, kw, *_ = shape
    if method == "tucker":
        return [(*ranks, kh * kw), (*ranks[::-1], kh * kw)]
    if method == "tt":
        first, middle, last = ranks
        return [(first, middle, kh), (middle, first, kh), (middle, last, kw), (last, middle, kw)]
    return []
