"""Checks of the exercises of chapter 15, your own model in ten minutes."""

import pandas as pd

from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("15.1")
def speed_of_a_part(answer):
    """8 ms must become 2 ms, 4 times faster; without them 2 of 10 ms remain, 5 times faster."""
    return compare_numbers(answer, [4.0, 5.0], "the other 2 ms do not change")


@exercise("15.2")
def fastest_of_the_accurate(function):
    """Two tables in which each drop has another answer, found by looking."""
    ms, accuracy = [8.0, 5.0, 3.0, 2.0, 1.0, 9.0], [90.0, 89.75, 89.25, 87.5, 79.75, 91.0]
    table = pd.DataFrame({"median_ms": ms, "accuracy (%)": accuracy}, index=["dense", "a", "b", "c", "d", "e"])
    other = pd.DataFrame({"median_ms": [4.0, 3.0, 7.0], "accuracy (%)": [70.0, 60.0, 71.0]}, index=["dense", "f", "g"])
    cases = [(table, 0.5, "a"), (table, 1.0, "b"), (table, 2.5, "c"), (table, 0.0, "dense"), (table, 10.5, "d")]
    for given, drop, name in [*cases, (other, 5.0, "dense"), (other, 10.0, "f")]:
        found = function(given.copy(), drop)
        if not isinstance(found, str):
            return f"return one name, a str; you return {type(found).__name__}"
        if found != name:
            rows = given.to_dict("index")
            return f"with a drop of at most {drop:g} points it is {name!r}; yours is {found!r}; the table was {rows}"
    return ""
