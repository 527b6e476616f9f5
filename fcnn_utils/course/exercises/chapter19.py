"""Checks of the exercises of chapter 19, longer and wider."""

import numpy as np
import pandas as pd

from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("19.1")
def rank_of_equal_cost(answer):
    """R (S + k² + T) = k² S + S T."""
    return compare_numbers(answer, (9 * 256 + 256**2) / (256 + 9 + 256), "solve for R; do not round", rtol=1e-3)


@exercise("19.2")
def epochs_within_a_budget(function):
    """Budgets of which some are exact multiples."""
    cases = [(10.0, 100, 9000.0, 3), (10.0, 100, 8999.0, 2), (7.0, 50, 1049.0, 0), (2e7, 50_000, 6e13, 20)]
    for macs, images, budget, truth in cases:
        found = function(macs, images, budget)
        if np.size(found) != 1 or float(np.ravel(found)[0]) != truth:
            return f"for {macs:g} MACs, {images:,} images and a budget of {budget:g} it is {truth}; yours is {found}"
    return ""


@exercise("19.3")
def beaten_networks(function):
    """A table whose answer was found by looking; twins do not beat each other, and no pair may beat one together."""
    table = pd.DataFrame(
        {"macs": [1.0, 2, 3, 3, 3, 2], "ms": [3.0, 2, 2, 1, 1, 2], "top1": [50.0, 60, 60, 55, 55, 59]},
        index=list("abcdef"),
    )
    for costs, truth in ((["macs", "ms"], {"c", "f"}), (["macs"], {"c", "d", "e", "f"}), (["ms"], {"a", "f"})):
        found = function(table.copy(), list(costs))
        if not isinstance(found, set | list | tuple):
            return f"return a set of names; you return {type(found).__name__}"
        if set(found) != truth:
            return f"by {costs} it is {sorted(truth)}; yours is {sorted(map(str, found))}; the table was\n{table}"
    return ""
