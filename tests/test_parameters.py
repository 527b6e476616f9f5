"""Settings and their checks: `fcnn_utils.course.parameters`."""

import pytest

from fcnn_utils.course import parameters

# --- basic: good values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, kind, low, high", [(1, int, 1, 5), (5, int, 1, 5), (1, float, 0, 1), (0.5, float, 0, 1)]
)
def test_a_number_in_range_is_returned(value, kind, low, high):
    assert parameters.check_number("x", value, kind, low, high) is value


def test_a_value_that_is_allowed_is_returned():
    assert parameters.check_choice("x", "b", ("a", "b")) == "b"


@pytest.mark.parametrize(
    "good",
    [
        {"SEED": 0, "EPOCHS": 1, "BATCH_SIZE": 0, "TRAIN_IMAGES": 0, "TEST_IMAGES": 0},
        {"SEED": 2**31 - 1, "EPOCHS": 1000, "TRAIN_IMAGES": 50_000, "TEST_IMAGES": 10_000},
        {"DATASET": "auto", "RECIPE": "thesis", "RETRAIN": True},
        {"DATASET": "standin", "RECIPE": "fast", "RETRAIN": False},
        {},
    ],
    ids=str,
)
def test_good_parameters_pass(good):
    parameters.check(**good)


# --- basic: bad values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 6, -1, 2.0, 2.5, "2", True, None, float("nan"), [2]], ids=repr)
def test_what_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(ValueError) as error:
        parameters.check_number("rank", value, int, 1, 5)
    assert str(error.value) == f"rank must be a whole number between 1 and 5; got {value!r}"


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", False, None, float("nan"), float("inf"), 1j], ids=repr)
def test_what_is_no_number_in_range_is_refused(value):
    with pytest.raises(ValueError) as error:
        parameters.check_number("rate", value, float, 0, 1)
    assert str(error.value) == f"rate must be a number between 0 and 1; got {value!r}"


@pytest.mark.parametrize("value", ["A", "", None, 1, ["a"]], ids=repr)
@pytest.mark.parametrize("allowed", [("a", "b"), {"a": 1, "b": 2}], ids=["tuple", "dict"])
def test_what_is_not_allowed_is_refused(value, allowed):
    with pytest.raises(ValueError) as error:
        parameters.check_choice("letter", value, allowed)
    assert str(error.value) == f"letter must be one of a, b; got {value!r}"


@pytest.mark.parametrize(
    "bad, allowed",
    [
        ({"EPOCHS": 0}, "EPOCHS must be a whole number between 1 and 1000; got 0"),
        ({"EPOCHS": 1.0}, "EPOCHS must be a whole number between 1 and 1000; got 1.0"),
        ({"EPOCHS": True}, "EPOCHS must be a whole number between 1 and 1000; got True"),
        ({"EPOCHS": "5"}, "EPOCHS must be a whole number between 1 and 1000; got '5'"),
        ({"SEED": -1}, "SEED must be a whole number between 0 and 2147483647; got -1"),
        ({"BATCH_SIZE": 4097}, "BATCH_SIZE must be a whole number between 0 and 4096; got 4097"),
        ({"MEDICAL_DATASET": "chestmnist"}, "MEDICAL_DATASET must be one of pathmnist, dermamnist, "),
        ({"DATASET": "cifar10"}, "DATASET must be one of auto, cifar100, standin; got 'cifar10'"),
        ({"RECIPE": None}, "RECIPE must be one of faster, fast, long, thesis; got None"),
        ({"RETRAIN": "yes"}, "RETRAIN must be one of True, False; got 'yes'"),
        ({"SEED": 1, "EPOCHS": 0}, "EPOCHS must be"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused(bad, allowed):
    with pytest.raises(ValueError) as error:
        parameters.check(**bad)
    assert str(error.value).startswith(allowed)


@pytest.mark.parametrize("value", [1, 0, 1.0, 0.0])
def test_a_number_is_no_truth_value(value):
    with pytest.raises(ValueError, match="RETRAIN must be one of True, False; got"):
        parameters.check(RETRAIN=value)


def test_an_unknown_parameter_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="parameter must be one of SEED, DATASET, .*; got 'NOPE'"):
        parameters.check(NOPE=1)


# --- correct: text from the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("EPOCHS", "5", 5),
        ("SEED", "0", 0),
        ("RETRAIN", "true", True),
        ("RETRAIN", "True", True),
        ("RETRAIN", "false", False),
        ("DATASET", "standin", "standin"),
    ],
)
def test_text_becomes_a_parameters_value(name, text, value):
    parsed = parameters.parsed(name, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("EPOCHS", "five", "between 1 and 1000; got 'five'"),
        ("EPOCHS", "", "between 1 and 1000; got ''"),
        ("EPOCHS", "0", "between 1 and 1000; got 0"),
        ("EPOCHS", "2.5", "between 1 and 1000; got '2.5'"),
        ("EPOCHS", "true", "between 1 and 1000; got True"),
        ("RETRAIN", "1", "one of True, False; got"),
        ("RETRAIN", "maybe", "one of True, False; got 'maybe'"),
        ("DATASET", "5", "one of auto, cifar100, standin; got 5"),
        ("NOPE", "1", "one of SEED, .*; got 'NOPE'"),
    ],
)
def test_text_that_is_no_value_is_refused(name, text, message):
    with pytest.raises(ValueError, match=message):
        parameters.parsed(name, text)
