"""Check answers to the exercises of the notebooks: `check("01.2", answer)`.

The checks of chapter NN are in the module `chapterNN`. Each takes an answer and returns an empty string if it is right,
else a sentence that helps. An answer may be a number, an array, a dict, or a function that the check calls. If such a
function returns None, its body is not written yet, and the check ends there.
"""

import functools
import importlib
import importlib.util

import numpy as np

_CHECKS = {}  # number such as "01.2" -> function


def exercise(number):
    """Register a function as the check of an exercise."""

    def register(function):
        _CHECKS[number] = function
        return function

    return register


def numbers(chapter):
    """Return the numbers of a chapter's exercises that have a check, such as ["01.1", "01.2"]."""
    if not importlib.util.find_spec(f"{__name__}.chapter{chapter}"):
        return []
    importlib.import_module(f"{__name__}.chapter{chapter}")
    return sorted(number for number in _CHECKS if number.startswith(f"{chapter}."))


def check(number, answer):
    """Print whether an answer is right. An answer that is not given yet (... or None) is neither right nor wrong.

    Raises:
        ValueError: no exercise of this number has a check.
    """
    print(f"{number}: {verdict(number, answer)}")


def verdict(number, answer):
    """Return "right", "no answer yet", or "not yet; ..." with a sentence that helps; see `check`."""
    known = numbers(str(number).partition(".")[0])
    if number not in known:
        raise ValueError(f"exercise {number!r} has no check; this chapter has {', '.join(known) or 'none'}")
    if answer is ... or answer is None:
        return "no answer yet"
    try:
        wrong = _CHECKS[number](_written(answer) if callable(answer) else answer)
    except _NotWritten:
        return "no answer yet"
    except Exception as error:  # the answer may be anything, and a function of the reader's may fail
        wrong = f"your answer stops with {type(error).__name__}: {error}"
    return f"not yet; {wrong}" if wrong else "right"


def compare_numbers(answer, truth, hint, *, rtol=1e-6, atol=0.0):
    """Return an empty string if an answer has the numbers `truth` in the same shape, else a sentence with the hint."""
    found, truth = np.asarray(answer, float), np.asarray(truth, float)
    if found.shape != truth.shape:
        return f"give numbers in the shape {truth.shape}; these have the shape {found.shape}"
    wrong = int(np.sum(~np.isclose(found, truth, rtol, atol)))
    return f"{wrong} of the {truth.size} numbers {'is' if wrong == 1 else 'are'} wrong; {hint}" if wrong else ""


def compare_arrays(found, truth, case, hint="the values or their order are wrong"):
    """Return an empty string if an array is `truth`, else a sentence that names the case, the shapes or the hint."""
    if np.shape(found) != truth.shape:
        return f"for {case} the shape must be {truth.shape}; it is {np.shape(found)}"
    return "" if np.allclose(found, truth) else f"for {case} {hint}"


class _NotWritten(Exception):
    """The reader's function returns None, as the starter cell does."""


def _written(function):
    @functools.wraps(function)
    def call(*args):
        result = function(*args)
        if result is None:
            raise _NotWritten
        return result

    return call
