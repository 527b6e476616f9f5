"""Checks of the exercises of chapter 15, your own model in ten minutes."""

import pandas as pd

from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("15.1")
def speed_of_a_part(answer):
    """8 ms must become 2 ms, 4 times faster; without them 2 of 10 ms remain, 5 times faster."""
    return compare_numbers(answer, [4.0, 5.0], "the other 2 ms do not change")


@exercise("15.2")
def fastest_of_the_accurate(function):
    """A table in which each drop has another answer, found by looking."""
    ms, accuracy = [9.0, 5.0, 3.0, 2.0, 1.0, 8.0], [90.0, 89.7, 89.2, 87.5, 80.0, 91.0]
    table = pd.DataFrame({"median_ms": ms, "accuracy (%)": accuracy}, index=["dense", "a", "b", "c", "d", "e"])
    for drop, name in ((0.5, "a"), (1.0, "b"), (3.0, "c"), (0.0, "e"), (20.0, "d")):
        found = function(table.copy(), drop)
        if found != name:
            rows = table.to_dict("index")
            return f"with a drop of at most {drop:g} points it is {name!r}; yours is {found!r}; the table was {rows}"
    return ""
