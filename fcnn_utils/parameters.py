"""What a setting may be: checks that answer a bad value with one sentence."""


def check_number(name, value, kind, low, high):
    """`value` if it is a number of `kind` (int, float) between `low` and `high`; else ValueError says what is allowed."""
    is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(f"{name} must be a {'whole ' if kind is int else ''}number between {low} and {high}; got {value!r}")
    return value


def check_choice(name, value, allowed):
    """`value` if it is one of `allowed`; else ValueError names them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
    return value
