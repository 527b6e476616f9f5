"""Checks of the exercises of chapter 18, factorize, prune or quantise?"""

import numpy as np

from fcnn_utils.course.exercises import compare_arrays, compare_numbers, exercise


@exercise("18.1")
def share_of_filters(answer):
    """1 / √4.5 stays."""
    kept = 4.5**-0.5
    return compare_numbers(answer, [kept, 1 - kept], "the MACs fall with the square of the share", rtol=2e-2)


@exercise("18.2")
def pruned_pair(function):
    """Random layers; the filters are found by a loop over their norms."""
    rng = np.random.default_rng(5)
    for size, channels, filters, after, count in ((3, 4, 8, 5, 3), (1, 3, 6, 2, 4)):
        kernel = rng.normal(size=(size, size, channels, filters))
        norm, reads = list(rng.normal(size=(4, filters))), rng.normal(size=(size, size, filters, after))
        norms = [sum(abs(x) for x in kernel[..., t].ravel()) for t in range(filters)]
        kept = sorted(sorted(range(filters), key=lambda t, norms=norms: -norms[t])[:count])
        found = function(kernel.copy(), [x.copy() for x in norm], reads.copy(), count)
        if not isinstance(found, tuple | list) or len(found) != 3:
            return "return three things: the kernel, the list of arrays of the norm, and the next kernel"
        case = f"{filters} filters of which {count} stay"
        truth = [kernel[..., kept], np.array(norm)[:, kept], reads[:, :, kept]]
        for part, right in zip(found, truth, strict=True):
            wrong = compare_arrays(np.asarray(part, float), right, case, "other filters stay, or in another order")
            if wrong:
                return wrong
    return ""


@exercise("18.3")
def pareto_front(function):
    """Small sets of points whose fronts were found by looking; ties among them."""
    points = {"a": (1.0, 50.0), "b": (2.0, 60.0), "c": (3.0, 55.0), "d": (4.0, 61.0)}
    ties = {"a": (1.0, 50.0), "b": (1.0, 52.0), "c": (2.0, 52.0), "d": (0.5, 40.0)}
    twins = {"a": (1.0, 50.0), "b": (1.0, 50.0), "c": (2.0, 49.0)}
    for given, truth in ((points, {"a", "b", "d"}), (ties, {"b", "d"}), (twins, {"a", "b"})):
        found = function(dict(given))
        if not isinstance(found, set | list | tuple | dict):
            return f"return a set of names; you return {type(found).__name__}"
        if set(found) != truth:
            return f"for {given} it is {sorted(truth)}; yours is {sorted(map(str, found))}"
    return ""
