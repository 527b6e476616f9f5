"""Checks of the exercises of chapter 17, ranks and budgets."""

import numpy as np

from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("17.1")
def small_knapsack(answer):
    """30 + 20 MACs cost a loss of 0.5; 10 + 50 MACs fit, too, and cost 0.7."""
    return compare_numbers(answer, [30.0, 20.0, 0.5], "write down all four plans with their MACs and losses")


@exercise("17.2")
def divergence(function):
    """Two images with the values of the formula, written out; one class has p = 0, and another case q = p."""
    p = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q = np.array([[0.25, 0.5, 0.25], [0.5, 0.3, 0.2]])
    truth = (0.5 * np.log(2) + 0.2 * np.log(0.4) + 0.5 * np.log(2.5)) / 2
    for first, second, right in ((p, q, truth), (p, p.copy(), 0.0)):
        found = function(first.copy(), second.copy())
        if np.size(found) != 1:
            return f"return one number; you return {np.size(found)}"
        if not np.isclose(float(np.ravel(found)[0]), right, atol=1e-9):
            return f"for p = {first.tolist()} and q = {second.tolist()} it is {right:.4f}; yours is {found}"
    return ""


@exercise("17.3")
def knapsack(function):
    """Three instances whose best plans were found by hand; in the last one a greedy choice fails."""
    small = {"a": [(10, 0.5), (30, 0.1)], "b": [(20, 0.4), (50, 0.2)]}
    other = {"a": [(1, 1.0), (2, 0.4), (4, 0.0)], "b": [(1, 1.0), (3, 0.1)], "c": [(2, 0.3), (1, 0.5)]}
    for options, budget, truth in (
        (small, 60, {"a": 1, "b": 0}),
        (small, 80, {"a": 1, "b": 1}),
        (small, 30, {"a": 0, "b": 0}),
        (other, 6, {"a": 1, "b": 1, "c": 1}),
        (other, 7, {"a": 1, "b": 1, "c": 0}),
        (other, 4, {"a": 1, "b": 0, "c": 1}),
    ):
        found = function({layer: list(rows) for layer, rows in options.items()}, budget)
        if not isinstance(found, dict) or set(found) != set(options):
            return "return a dict from each layer to the index of its choice"
        if {layer: int(index) for layer, index in found.items()} != truth:
            return f"for {options} and a budget of {budget} it is {truth}; yours is {found}"
    return ""
