"""Checks of the exercises of chapter 13, where does the time go?"""

import numpy as np

from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("13.1")
def time_of_step_and_start(answer):
    """0.1 s per step, 3 s for the start."""
    if np.shape(answer) == (2,) and np.allclose(answer, [3, 0.1]):
        return "the order is: seconds per step, seconds of the start"
    return compare_numbers(answer, [0.1, 3.0], "subtract the two runs: the start cancels")


@exercise("13.2")
def slope_on_logarithmic_axes(function):
    """The least-squares slope, from the formula for a line."""
    rng = np.random.default_rng(7)
    for q in (2.0, 1.4, -0.5):
        values = np.array([16.0, 24.0, 32.0, 48.0])
        times = 3 * values**q * np.exp(rng.normal(0, 0.05, 4))  # not exactly on a line
        x, y = np.log(values), np.log(times)
        truth = np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2)
        got = function(values.copy(), times.copy())
        if np.size(got) != 1:
            return f"return one number, the slope; you return {np.size(got)}"
        got = float(np.ravel(got)[0])
        if not np.isclose(got, truth):
            ends = (y[-1] - y[0]) / (x[-1] - x[0])
            hint = "; use all points, not only the first and the last" if np.isclose(got, ends) else ""
            return f"for times of about value^{q:g} it is {truth:.4f}; yours is {got:.4f}{hint}"
    return ""


@exercise("13.3")
def limit_of_faster_convolutions(answer):
    """1.6 times by Amdahl's law, at most 2."""
    return compare_numbers(answer, [1.6, 2.0], "the other half takes as long as before", rtol=1e-2)


@exercise("13.4")
def fair_comparison(function):
    """A clock that the functions advance; a warm-up round is too fast, and all rounds but one are disturbed."""
    for quiet in (2, 3, 4):  # the undisturbed round, after a warm-up of two
        now, calls = [0.0], []

        def work(name, seconds, now=now, calls=calls, quiet=quiet):
            def run():
                number = calls.count(name)
                calls.append(name)
                now[0] += seconds * (0.1 if number == 0 else 1 if number == quiet else 3 + number)

            return run

        found = function({"a": work("a", 1.0), "b": work("b", 2.0)}, 3, 2, lambda now=now: now[0])
        if any(sorted(calls[n : n + 2]) != ["a", "b"] for n in range(0, 10, 2)) or len(calls) != 10:
            return f"each round must call both functions: 3 rounds and 2 of warm-up are 10 calls; yours were {calls}"
        if not isinstance(found, dict) or set(found) != {"a", "b"}:
            return "return a dict from each name to its shortest time"
        if not (np.isclose(found["a"], 1.0) and np.isclose(found["b"], 2.0)):
            return f"the shortest times after the warm-up are 1 and 2 s; you return {found}"
    return ""
