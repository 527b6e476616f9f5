"""Parameters of the notebooks: `fcnn_utils.course.parameters`."""

import pytest

from fcnn_utils.course import parameters
from fcnn_utils.course.recipes import RECIPES


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
def test_check_accepts_allowed_values(good):
    parameters.check(**good)


@pytest.mark.parametrize(
    "bad, allowed",
    [
        ({"EPOCHS": 0}, "EPOCHS must be a whole number between 1 and 1000; got 0"),
        ({"EPOCHS": 1.0}, "EPOCHS must be a whole number between 1 and 1000; got 1.0"),
        ({"EPOCHS": True}, "EPOCHS must be a whole number between 1 and 1000; got True"),
        ({"EPOCHS": "5"}, "EPOCHS must be a whole number between 1 and 1000; got '5'"),
        ({"SEED": 1, "EPOCHS": 0}, "EPOCHS must be"),
        ({"SEED": -1}, "SEED must be a whole number between 0 and 2147483647; got -1"),
        ({"BATCH_SIZE": 4097}, "BATCH_SIZE must be a whole number between 0 and 4096; got 4097"),
        ({"MEDICAL_DATASET": "chestmnist"}, "MEDICAL_DATASET must be one of pathmnist, dermamnist, "),
        ({"DATASET": "cifar10"}, "DATASET must be one of auto, cifar100, standin; got 'cifar10'"),
        ({"RECIPE": None}, "RECIPE must be one of faster, muon, fast, long, thesis; got None"),
        ({"RETRAIN": "yes"}, "RETRAIN must be one of True, False; got 'yes'"),
        ({"RETRAIN": 1}, "RETRAIN must be one of True, False; got 1"),
        ({"RETRAIN": 0.0}, "RETRAIN must be one of True, False; got 0.0"),
        ({"NOPE": 1}, "parameter must be one of SEED, DATASET, "),
    ],
    ids=str,
)
def test_check_rejects_other_values(bad, allowed):
    with pytest.raises(ValueError) as error:
        parameters.check(**bad)
    assert str(error.value).startswith(allowed)


def test_recipes_for_notebooks_exist():
    for_other_purposes = {"tune", "medical"}  # pretrained weights; other images
    assert set(parameters.PARAMETERS["RECIPE"]) == set(RECIPES) - for_other_purposes


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("EPOCHS", "5", 5),
        ("SEED", "0", 0),
        ("RETRAIN", "true", True),
        ("RETRAIN", "False", False),
        ("DATASET", "standin", "standin"),
    ],
)
def test_parse_converts_text(name, text, value):
    parsed = parameters.parse(name, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("EPOCHS", "five", "between 1 and 1000; got 'five'"),
        ("EPOCHS", "", "between 1 and 1000; got ''"),
        ("EPOCHS", "0", "between 1 and 1000; got 0"),
        ("EPOCHS", "2.5", "between 1 and 1000; got '2.5'"),
        ("EPOCHS", "true", "between 1 and 1000; got True"),
        ("SEED", "-1", "between 0 and 2147483647; got -1"),
        ("RETRAIN", "1", "one of True, False; got"),
        ("RETRAIN", "maybe", "one of True, False; got 'maybe'"),
        ("DATASET", "5", "one of auto, cifar100, standin; got 5"),
        ("NOPE", "1", "one of SEED, .*; got 'NOPE'"),
    ],
)
def test_parse_rejects_text_that_is_no_value(name, text, message):
    with pytest.raises(ValueError, match=message):
        parameters.parse(name, text)
