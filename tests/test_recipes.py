"""How a network is trained, as data: `fcnn_utils.course.recipes`."""

import dataclasses
import json

import pytest

from fcnn_utils.course.recipes import RECIPES, Recipe, get_recipe

FAST = RECIPES["fast"]

# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("epochs", 0, "between 1 and 1000"),
        ("epochs", 2.0, "whole number"),
        ("epochs", True, "whole number"),
        ("batch_size", 0, "between 1 and 65536"),
        ("learning_rate", -0.1, "between 0 and 100"),
        ("learning_rate", float("nan"), "between 0 and 100"),
        ("learning_rate", "0.1", "between 0 and 100"),
        ("momentum", 1, "between 0 and 0.9999"),
        ("warmup", 1.5, "between 0 and"),
        ("label_smoothing", 1, "between 0 and 0.9999"),
        ("cycles", 0, "between 1 and 5"),
        ("cycles", 6, "between 1 and 5"),
        ("clip_norm", -1, "between 0 and"),
        ("weight_decay", 2, "between 0 and 1"),
        ("flip", "random", "one of True, False, alternating"),
        ("distillation", 0.6, "between 0 and 0.5"),
        ("shift", 9, "between 0 and 8"),
        ("seed", -1, "between 0 and 2147483647"),
        ("seed", None, "between 0 and 2147483647"),
        ("optimizer", "adamw", "one of sgd, adam, rmsprop"),
        ("schedule", "cosine", "one of constant, one_cycle"),
        ("precision", "float16", "one of float32, mixed_bfloat16, auto"),
        ("train_on", "test", "one of train, all"),
    ],
)
def test_a_setting_out_of_range_is_refused(name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} must be.*{allowed}") as error:
        FAST.replace(**{name: value})
    assert str(error.value).endswith(f"; got {value!r}")


@pytest.mark.parametrize("changes", [{"cycles": 2}, {"cycles": 5, "schedule": "constant"}])
def test_cycles_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="^cycles are of the one_cycle schedule, and divide the epochs; got"):
        FAST.replace(**changes)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="no setting 'decay' to change; it has epochs, batch_size"):
        FAST.replace(epochs=2, decay=0.1)


def test_the_name_is_not_a_setting_to_change():
    with pytest.raises(ValueError, match="name"):
        FAST.replace(name="mine")


@pytest.mark.parametrize("name", ["slow", "", None])
def test_an_unknown_recipe_is_refused(name):
    with pytest.raises(
        ValueError, match=f"recipe must be one of thesis, fast, faster, long, medical, tune; got {name!r}"
    ):
        get_recipe(name)


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FAST.epochs = 3


# --- correct -----------------------------------------------------------------------------------------------------


def test_the_recipes_are_those_of_the_course():
    assert list(RECIPES) == ["thesis", "fast", "faster", "long", "medical", "tune"] and all(
        recipe.name == name for name, recipe in RECIPES.items()
    )
    thesis = RECIPES["thesis"]
    assert (thesis.epochs, thesis.batch_size, 50_000 // thesis.batch_size) == (5, 32, 1562)
    assert (thesis.optimizer, thesis.learning_rate, thesis.schedule) == ("sgd", 0.01, "inverse_time")
    assert len(thesis.assumed) == 4  # what the thesis does not state is said
    assert (FAST.epochs, FAST.batch_size, FAST.schedule, FAST.precision) == (5, 128, "one_cycle", "auto")


@pytest.mark.parametrize(
    "changes, suffix",
    [
        ({}, ""),
        ({"epochs": 5}, ""),  # what it is already
        ({"epochs": 2}, "-epochs2"),
        ({"learning_rate": 0.05, "batch_size": 64}, "-batchsize64-learningrate0.05"),
        ({"batch_size": 64, "learning_rate": 0.05}, "-batchsize64-learningrate0.05"),
        ({"train_on": "train", "flip": False}, "-flipFalse-trainontrain"),
        ({"seed": 3}, ""),  # it has a place of its own in a record's path
        ({"seed": 3, "shift": 0}, "-shift0"),
    ],
)
def test_a_changed_recipe_is_named_after_its_changes(changes, suffix):
    changed = FAST.replace(**changes)
    assert changed.name == f"fast{suffix}"
    assert dataclasses.asdict(changed) == dataclasses.asdict(FAST) | changes | {"name": f"fast{suffix}"}


def test_changes_of_a_named_recipe_that_are_0_count_as_none():
    assert get_recipe("thesis") == RECIPES["thesis"]
    assert get_recipe("fast", epochs=0, batch_size=0) == FAST
    assert get_recipe("fast", epochs=2, batch_size=0) == FAST.replace(epochs=2)
    with pytest.raises(ValueError, match="no setting 'decay'"):
        get_recipe("fast", decay=1)


def test_a_recipe_survives_json():
    for recipe in [*RECIPES.values(), FAST.replace(epochs=2, flip=False)]:
        settings = json.loads(json.dumps(recipe.as_dict()))
        assert settings == recipe.as_dict()
        assert Recipe(**settings | {"assumed": tuple(settings["assumed"])}) == recipe
