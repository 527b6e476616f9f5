"""Checks of the exercises of chapter 14, what did factorizing buy?"""

import numpy as np

from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("14.1")
def images_for_a_standard_error(answer):
    """0.25 / 0.001² = 250,000."""
    if np.isclose(float(np.ravel(answer)[0]), 25):
        return "0.1 percentage points are 0.001, not 0.1"
    return compare_numbers(answer, 250_000, "solve sqrt(0.25 / n) = 0.001 for n")


@exercise("14.2")
def networks_that_are_not_dominated(function):
    """Each pair compared, on numbers with a trade-off and with equal networks."""
    rng = np.random.default_rng(3)
    by_hand = {"a": (1, 50), "b": (2, 52), "twin": (2, 52), "c": (3, 55), "d": (3, 54), "e": (2, 51), "f": (4, 55)}
    drawn = [dict(zip("abcdefgh", rng.integers((1, 50), (9, 60), (8, 2)).tolist(), strict=True)) for _ in range(3)]
    for networks in ({"a": (1, 50)}, by_hand, *drawn):
        costs, accuracies = ({name: pair[which] for name, pair in networks.items()} for which in (0, 1))
        truth = {
            name
            for name, (price, level) in networks.items()
            if not any(
                (other, more) != (price, level) and other <= price and more >= level
                for other, more in networks.values()
            )
        }
        found = set(function(dict(costs), dict(accuracies)))
        if found != truth:
            return f"for costs {costs} and accuracies {accuracies} it is {sorted(truth)}; yours is {sorted(found)}"
    return ""


@exercise("14.3")
def epochs_in_the_same_time(answer):
    """14 / 0.7 = 20."""
    return compare_numbers(answer, 20, "14 epochs times 1 = epochs times 0.7")
