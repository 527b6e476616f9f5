"""Checks of answers: `fcnn_utils.course.exercises`."""

import numpy as np
import pytest

from fcnn_utils.course import exercises
from fcnn_utils.course.exercises import check


@pytest.fixture
def doubled(monkeypatch):
    """An exercise "99.1" whose right answer is a function that doubles."""
    monkeypatch.setattr(exercises, "_CHECKS", {})
    monkeypatch.setattr(exercises, "numbers", lambda chapter: ["99.1"] if chapter == "99" else [])
    exercises.exercise("99.1")(lambda answer: "" if answer(3) == 6 else "try it with 3")


def test_answers_are_right_wrong_or_not_given(doubled, capsys):
    for answer in (lambda x: 2 * x, lambda x: x, ..., None, lambda x: None, 7, lambda x: 1 / 0):
        assert check("99.1", answer) is None  # a notebook shows nothing besides what is printed
    assert capsys.readouterr().out.splitlines() == [
        "99.1: right",
        "99.1: not yet; try it with 3",
        *["99.1: no answer yet"] * 3,
        "99.1: not yet; your answer stops with TypeError: 'int' object is not callable",
        "99.1: not yet; your answer stops with ZeroDivisionError: division by zero",
    ]


def test_exercises_that_do_not_exist_are_rejected(doubled):
    with pytest.raises(ValueError, match="exercise '99.2' has no check; this chapter has 99.1"):
        check("99.2", 1)
    with pytest.raises(ValueError, match="this chapter has none"):
        check("98.1", 1)


def test_the_chapters_of_the_first_part_have_checks():
    for number in range(1, 8):
        assert len(exercises.numbers(f"{number:02}")) >= 3


def test_numbers_and_arrays_are_compared():
    assert exercises.compare_numbers((1, 2.0), [1, 2], "hint") == ""
    assert exercises.compare_numbers([1.001, 2], [1, 2], "hint") == "1 of the 2 numbers is wrong; hint"
    assert exercises.compare_numbers([1.001, 2], [1, 2], "hint", atol=0.01) == ""
    assert "in the shape (2,); these have the shape ()" in exercises.compare_numbers(1, [1, 2], "hint")
    assert exercises.compare_numbers([np.nan, 3], [1, 2], "hint") == "2 of the 2 numbers are wrong; hint"
    truth = np.ones((2, 3))
    assert exercises.compare_arrays(truth.tolist(), truth, "x") == ""
    assert exercises.compare_arrays(truth.T, truth, "x") == "for x the shape must be (2, 3); it is (3, 2)"
    assert exercises.compare_arrays(0 * truth, truth, "x", "it is zero") == "for x it is zero"
