"""Choose ranks: for a share of the dense cost, from the noise in a kernel, and within a budget over all layers.

This module works on shapes, kernels and numbers; it does not use Keras. The losses that `allocate` weighs come from
`sensitivity.predict_losses`.
"""

import functools
import math

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp, minimize_scalar
from scipy.sparse import block_diag, vstack

from fcnn_utils import factorizations
from fcnn_utils._checks import check_choice, check_number


def ranks_for_fraction(method, kernel_shape, fraction, *, cost="parameters", strides=1, multiple=1):
    """Return the largest ranks whose cost is at most a fraction of the dense kernel's.

    Several ranks grow in proportion to their maxima.

    Args:
        method: name or class of a factorization.
        kernel_shape: (*spatial, S, T).
        fraction: above 0.
        cost: "parameters" or "macs".
        strides: one whole number, or one for each spatial axis; the MACs depend on them.
        multiple: ranks are multiples of this, or the maximum rank if that is smaller. Engines are fast at
            multiples of 16.

    Returns:
        tuple of ints.

    Raises:
        ValueError: an argument is not allowed, or even the smallest ranks cost more (the message says how much).
    """
    check_choice("cost", cost, ("parameters", "macs"))
    check_number("multiple", multiple, int, 1, 4096)
    if not isinstance(fraction, (int, float)) or isinstance(fraction, bool) or not 0 < fraction < math.inf:
        raise ValueError(f"fraction must be a number above 0; got {fraction!r}")
    method = factorizations.get(method)
    largest, dense = method.max_ranks(kernel_shape), math.prod(kernel_shape)
    steps = max(largest)

    def ranks_at(step):
        exact = (-(-high * step // steps) for high in largest)  # rounded up: together they stay a possible chain
        return tuple(min(high, -(-rank // multiple) * multiple) for rank, high in zip(exact, largest, strict=True))

    def share(step):
        if cost == "parameters":
            return _parameters(method, tuple(kernel_shape), ranks_at(step)) / dense
        return method.count_macs(kernel_shape, ranks_at(step), strides) / dense

    if share(1) > fraction:
        raise ValueError(
            f"fraction must be at least {math.ceil(1e4 * share(1)) / 1e4:g}, the {cost} of {method.name} at rank "
            f"{max(ranks_at(1))} for a {tuple(kernel_shape)} kernel; got {fraction!r}"
        )
    low, high = 1, steps + 1  # bisection: share(low) <= fraction, and share rises with the step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle) <= fraction else (low, middle)
    return ranks_at(low)


@functools.lru_cache(10_000)  # a budget asks for the same ranks again and again
def _parameters(method, kernel_shape, ranks):
    return method.count_parameters(kernel_shape, ranks)


def break_even_ranks(method, kernel_shape, *, cost="parameters", strides=1):
    """Return the largest ranks at which the chain still costs less than the dense kernel.

    Raises:
        ValueError: even the smallest ranks cost as much, or an argument is not allowed (see `ranks_for_fraction`).
    """
    below_one = 1 - 0.5 / math.prod(kernel_shape)
    return ranks_for_fraction(method, kernel_shape, below_one, cost=cost, strides=strides)


def error_curve(kernel, method, fractions, **options):
    """Return the relative error of a kernel's decomposition against its size.

    Returns:
        DataFrame (ranks, parameters, share, relative_error), one row for each fraction of the parameters.

    Raises:
        ValueError: as `ranks_for_fraction` and `factorizations.decompose`.
    """
    method = factorizations.get(method)
    method.check_options(options)
    ladder = [ranks_for_fraction(method, np.shape(kernel), fraction) for fraction in fractions]
    results = factorizations.decompose_ladder(method, kernel, ladder, **options)
    rows = [(d.ranks, d.parameters, d.parameters / np.size(kernel), d.relative_error) for d in results]
    return pd.DataFrame(rows, columns=["ranks", "parameters", "share", "relative_error"])


def vbmf_rank(matrix):
    """Estimate the rank of a matrix with Gaussian noise of unknown variance, by empirical variational Bayes.

    The solution is in closed form but for the noise variance, which is found by search (Nakajima, Sugiyama, Babacan &
    Tomioka 2013, JMLR 14; threshold and bounds from Nakajima, Tomioka, Sugiyama & Babacan 2015, JMLR 16).

    Returns:
        int; 0 for pure noise.

    Raises:
        ValueError: it is not a matrix of finite numbers.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise ValueError(f"matrix must be a matrix of finite numbers; got an array of the shape {matrix.shape}")
    short, long = sorted(matrix.shape)
    gamma2 = np.linalg.svd(matrix, compute_uv=False) ** 2
    if gamma2[0] == 0:
        return 0
    gamma2 = np.maximum(gamma2 / gamma2[0], 1e-15)  # scaled; a noise-free matrix gets noise at the level of rounding
    alpha = short / long
    tau = 2.5129 * math.sqrt(alpha)  # from Nakajima et al. 2015
    edge = (1 + tau) * (1 + alpha / tau)
    kept = min(math.ceil(short / (1 + alpha)) - 1, short - 1)  # no more components than these can be kept
    lowest = max(gamma2[kept] / (long * edge), gamma2[kept:].mean() / long)
    highest = gamma2.sum() / (short * long)

    def free_energy(log_variance):
        x = gamma2 / (long * math.exp(log_variance))
        strong = x[x > edge]
        tau = 0.5 * (strong - 1 - alpha + np.sqrt((strong - 1 - alpha) ** 2 - 4 * alpha))
        return np.sum(x - np.log(x)) + np.sum(np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau)

    grid = np.linspace(math.log(lowest), math.log(max(highest, lowest * (1 + 1e-9))), 200)  # many local minima
    best = int(np.argmin([free_energy(value) for value in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    variance = math.exp(minimize_scalar(free_energy, bounds=around, method="bounded").x)
    return int(np.sum(gamma2 > long * variance * edge))


def vbmf_tucker_ranks(kernel):
    """Return Tucker-2 ranks (R1, R2) by VBMF of a kernel's unfoldings (Kim et al. 2015, arXiv 1511.06530).

    If an unfolding looks like noise its estimate is 0. A layer needs a channel, so 1 is returned then. The estimates
    are independent; a rank that is too large for the other is lowered.

    Raises:
        ValueError: the kernel is not (*spatial, S, T), real and finite.
    """
    kernel = factorizations.check_kernel(kernel)
    area = math.prod(kernel.shape[:-2])
    first, second = (
        max(1, vbmf_rank(np.moveaxis(kernel, mode, 0).reshape(kernel.shape[mode], -1))) for mode in (-2, -1)
    )
    return min(first, area * second), min(second, area * first)


def allocate(options, budget):
    """Choose one option for every layer within a budget, so that the sum of the predicted losses is smallest.

    The losses of different layers are assumed to add up. This is the multiple-choice knapsack problem; SciPy's `milp`
    solves it to 0.01% of the sum.

    Args:
        options: dict path -> list of (choice, cost, loss), with at least one. A choice may be anything.
        budget: largest sum of the costs.

    Returns:
        dict path -> choice.

    Raises:
        ValueError: even the cheapest choices exceed the budget.
    """
    cheapest = sum(min(cost for _, cost, _ in choices) for choices in options.values())
    if cheapest > budget:
        raise ValueError(f"budget must be at least {cheapest:,}, the cost of the cheapest choices; got {budget:,}")
    options = {path: _undominated(choices) for path, choices in options.items()}
    plan, lost = _simple_plan(options, budget)
    options = {  # enormous losses would spoil the solver's scale
        path: [row for row in choices if row[2] - choices[-1][2] <= lost * (1 + 1e-9)]
        for path, choices in options.items()
    }
    for limit in (budget, budget * (1 - 1e-6)):  # the solver may exceed its limit slightly; the second leaves a margin
        found = _best_plan(options, limit, lost)
        if found and sum(options[path][number][1] for path, number in found.items()) <= budget:
            return {path: options[path][number][0] for path, number in found.items()}
    return plan


def _best_plan(options, budget, lost):
    """Return dict path -> index of a choice; None if the solver finds no plan.

    Args:
        options: dict path -> list of undominated (choice, cost, loss), from the cheapest to the most expensive. Losses
            count relative to that of the most expensive choice.
        budget: largest sum of the costs.
        lost: sum of the losses of some plan.
    """
    one_each = block_diag([np.ones((1, len(choices))) for choices in options.values()])
    # The solver tolerates 1e-6: with these scales, 1e-14 of the budget and 1e-12 of the loss of a simple plan.
    scale = 1e8 / budget if budget else 1.0
    cost = np.array([cost * scale for choices in options.values() for _, cost, _ in choices])
    loss = np.concatenate([[loss - choices[-1][2] for *_, loss in choices] for choices in options.values()])
    loss *= 1e6 / max(lost, 1e-300)
    limits = LinearConstraint(vstack([one_each, cost]), [1] * len(options) + [0], [1] * len(options) + [budget * scale])
    taken = milp(loss, integrality=np.ones(len(loss)), bounds=Bounds(0, 1), constraints=limits).x
    if taken is None:
        return None
    ends = np.cumsum([len(choices) for choices in options.values()])
    return {path: int(np.argmax(own)) for path, own in zip(options, np.split(taken, ends[:-1]), strict=True)}


def _simple_plan(options, budget):
    """Return a plan within the budget, dict path -> choice, and the sum of its losses.

    In each layer it minimises loss + λ · cost, at the smallest λ that keeps the budget (Everett 1963, Oper. Res.
    11(3)). The best plan has no choice that loses more than this whole plan. `options`: as in `_best_plan`.
    """
    layers = [np.array([row[1:] for row in choices], float) for choices in options.values()]
    costs = [[row[1] for row in choices] for choices in options.values()]  # as they are: floats may be inexact

    def plan(weight):
        """Return the loss and the indices of the choices; None if they exceed the budget."""
        taken = [int(np.argmin(one[:, 1] - one[-1, 1] + weight * one[:, 0])) for one in layers]
        if sum(cost[number] for cost, number in zip(costs, taken, strict=True)) > budget:
            return None
        return sum(one[number, 1] - one[-1, 1] for one, number in zip(layers, taken, strict=True)), taken

    best = plan(0.0)
    if best is None:
        zeros = [0] * len(layers)
        best = sum(one[0, 1] - one[-1, 1] for one in layers), zeros
        low, high = -200.0, 200.0  # logarithms of λ
        for _ in range(100):
            middle = (low + high) / 2
            found = plan(math.exp(middle))
            low, high, best = (low, middle, min(best, found)) if found else (middle, high, best)
    lost, taken = best
    return {path: options[path][number][0] for path, number in zip(options, taken, strict=True)}, lost


def _undominated(choices):
    """Return the choices without those that cost at least as much as another one and lose at least as much."""
    kept = []
    for choice in sorted(choices, key=lambda choice: choice[1:]):
        if not kept or choice[2] < kept[-1][2]:
            kept.append(choice)
    return kept
