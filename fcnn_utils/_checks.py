"""Check arguments: a bad value raises ValueError with one sentence that says what is allowed."""

import numbers


def check_number(name, value, kind, low, high):
    """Return `value` if it is a number of `kind` (int or float) between `low` and `high`; else raise ValueError."""
    is_number = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(
            f"{name} must be a {'whole ' if kind is int else ''}number between {low} and {high}; got {value!r}"
        )
    return value


def check_choice(name, value, allowed):
    """Return `value` if it is one of `allowed`; else raise ValueError."""
    if value not in list(allowed):  # a list, since `in` a dict fails on a value that cannot be hashed
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
    return value


def check_sizes(name, value, axes=2):
    """Return a tuple of a size for each axis, from one whole number of at least 1 or several; else raise ValueError."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(sizes) != axes or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes):
        count = {1: "", 2: ", or two of them", 3: ", or three of them"}[axes]
        raise ValueError(f"{name} must be a whole number of at least 1{count}; got {value!r}")
    return sizes
