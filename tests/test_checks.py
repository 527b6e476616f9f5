"""Argument checks: `fcnn_utils._checks`."""

import numpy as np
import pytest

from fcnn_utils._checks import check_choice, check_number, check_sizes


@pytest.mark.parametrize(
    "value, kind, low, high",
    [(1, int, 1, 5), (5, int, 1, 5), (np.int64(3), int, 1, 5), (1, float, 0, 1), (0.5, float, 0, 1)],
)
def test_check_number_returns_a_number_in_range(value, kind, low, high):
    assert check_number("x", value, kind, low, high) is value


@pytest.mark.parametrize("value", [0, 6, -1, 2.0, 2.5, "2", True, None, float("nan"), [2]], ids=repr)
def test_check_number_rejects_what_is_not_a_whole_number_in_range(value):
    with pytest.raises(ValueError) as error:
        check_number("rank", value, int, 1, 5)
    assert str(error.value) == f"rank must be a whole number between 1 and 5; got {value!r}"


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", False, None, float("nan"), float("inf"), 1j], ids=repr)
def test_check_number_rejects_what_is_not_a_number_in_range(value):
    with pytest.raises(ValueError) as error:
        check_number("rate", value, float, 0, 1)
    assert str(error.value) == f"rate must be a number between 0 and 1; got {value!r}"


@pytest.mark.parametrize("allowed", [("a", "b"), {"a": 1, "b": 2}], ids=["tuple", "dict"])
def test_check_choice_returns_an_allowed_value_and_rejects_others(allowed):
    assert check_choice("letter", "b", allowed) == "b"
    for value in ("A", "", None, 1, ["a"]):
        with pytest.raises(ValueError) as error:
            check_choice("letter", value, allowed)
        assert str(error.value) == f"letter must be one of a, b; got {value!r}"


@pytest.mark.parametrize("value, pair", [(3, (3, 3)), ((3, 1), (3, 1)), ([1, 2], (1, 2))])
def test_check_sizes_returns_rows_and_columns(value, pair):
    assert check_sizes("kernel_size", value) == pair


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "33", (1, 0), (1, 2, 3), (1,), (1, 2.5)], ids=repr)
def test_check_sizes_rejects_what_is_not_one_or_two_whole_numbers(value):
    with pytest.raises(ValueError, match="kernel_size must be a whole number of at least 1, or two of them; got"):
        check_sizes("kernel_size", value)
