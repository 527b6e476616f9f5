"""Recipes as data: `fcnn_utils.course.recipes`."""

import dataclasses
import json

import pytest

from fcnn_utils.course.recipes import RECIPES, Recipe, get_recipe

FAST = RECIPES["fast"]


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
        ("balanced", "yes", "one of True, False"),
        ("distillation", 0.6, "between 0 and 0.5"),
        ("shift", 9, "between 0 and 8"),
        ("seed", -1, "between 0 and 2147483647"),
        ("seed", None, "between 0 and 2147483647"),
        ("optimizer", "adamw", "one of sgd, adam, rmsprop"),
        ("schedule", "cosine", "one of constant, one_cycle"),
        ("precision", "float16", "one of float32, mixed_bfloat16, auto"),
        ("train_on", "test", "one of train, all"),
        ("initialization", "lecun", "one of glorot, he"),
        ("head_scale", 0, "between 0.001 and"),
    ],
)
def test_recipe_rejects_settings_out_of_range(name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} must be.*{allowed}") as error:
        FAST.replace(**{name: value})
    assert str(error.value).endswith(f"; got {value!r}")


@pytest.mark.parametrize("changes", [{"cycles": 2}, {"cycles": 5, "schedule": "constant"}])
def test_recipe_rejects_cycles_that_do_not_fit(changes):
    with pytest.raises(ValueError, match="^cycles .*one_cycle.* divide the epochs"):
        FAST.replace(**changes)


def test_replace_rejects_unknown_settings_and_the_name():
    with pytest.raises(ValueError, match="no setting 'decay' to change; it has epochs, batch_size"):
        FAST.replace(epochs=2, decay=0.1)
    with pytest.raises(ValueError, match="name"):
        FAST.replace(name="mine")
    with pytest.raises(dataclasses.FrozenInstanceError):
        FAST.epochs = 3


@pytest.mark.parametrize("name", ["slow", "", None])
def test_get_recipe_rejects_unknown_names(name):
    with pytest.raises(ValueError, match=f"one of thesis, fast, faster, muon, long, medical, tune; got {name!r}"):
        get_recipe(name)


def test_recipes_have_the_settings_of_the_published_runs():
    common = {"optimizer": "sgd", "schedule": "one_cycle", "momentum": 0.9, "label_smoothing": 0.1, "precision": "auto"}
    searched = common | {"weight_decay": 5e-4, "head_scale": 6.0}
    expected = {
        "thesis": {"epochs": 5, "batch_size": 32, "learning_rate": 0.01, "shift": 3, "schedule": "inverse_time"},
        "fast": common | {"epochs": 5, "batch_size": 128, "learning_rate": 0.2, "shift": 2},
        "faster": searched | {"epochs": 5, "batch_size": 64, "learning_rate": 0.2, "shift": 2},
        "muon": searched | {"epochs": 5, "batch_size": 64, "learning_rate": 0.24, "shift": 2, "optimizer": "muon"},
        "long": searched | {"epochs": 20, "batch_size": 128, "learning_rate": 0.2, "shift": 4},
        "medical": searched | {"epochs": 20, "batch_size": 64, "learning_rate": 0.05, "shift": 2},
        "tune": common | {"epochs": 1, "batch_size": 128, "learning_rate": 0.01, "shift": 2, "clip_norm": 1.0},
    }
    expected["thesis"] |= {"optimizer": "sgd", "assumed": RECIPES["thesis"].assumed}
    expected["muon"] |= {"weight_decay": 0.0, "precision": "float32"}
    expected["medical"] |= {"balanced": True, "train_on": "train"}
    assert {name: Recipe(name=name, **settings) for name, settings in expected.items()} == RECIPES
    assert len(RECIPES["thesis"].assumed) == 4 and 50_000 // RECIPES["thesis"].batch_size == 1562


@pytest.mark.parametrize(
    "changes, suffix",
    [
        ({}, ""),
        ({"epochs": 5}, ""),  # no change
        ({"epochs": 2}, "-epochs2"),
        ({"learning_rate": 0.05, "batch_size": 64}, "-batchsize64-learningrate0.05"),
        ({"batch_size": 64, "learning_rate": 0.05}, "-batchsize64-learningrate0.05"),
        ({"train_on": "train", "flip": False}, "-flipFalse-trainontrain"),
        ({"seed": 3}, ""),  # a record's path names the seed anyway
        ({"seed": 3, "shift": 0}, "-shift0"),
    ],
)
def test_replace_adds_the_changes_to_the_name(changes, suffix):
    changed = FAST.replace(**changes)
    assert changed.name == f"fast{suffix}"
    assert dataclasses.asdict(changed) == dataclasses.asdict(FAST) | changes | {"name": f"fast{suffix}"}


def test_get_recipe_ignores_changes_that_are_zero_none_or_false():
    assert get_recipe("fast", epochs=0, batch_size=None, flip=False) == FAST
    assert get_recipe("fast", epochs=2, batch_size=0) == FAST.replace(epochs=2)
    with pytest.raises(ValueError, match="no setting 'decay'"):
        get_recipe("fast", decay=1)


def test_recipe_survives_json():
    for recipe in [*RECIPES.values(), FAST.replace(epochs=2, flip=False)]:
        settings = json.loads(json.dumps(recipe.as_dict()))
        assert settings == recipe.as_dict()
        assert Recipe(**settings | {"assumed": tuple(settings["assumed"])}) == recipe


def test_printed_recipe_is_one_line_with_all_settings_that_are_not_at_their_default():
    line = str(RECIPES["medical"])
    facts = ["medical: 20 epochs", "64", "sgd at 0.05", "one_cycle", "weight_decay 0.0005", "balanced True", "shift 2"]
    assert all(fact in line for fact in [*facts, "train_on train", "head_scale 6.0"]) and "\n" not in line
    assert "warmup" not in line and "seed" not in line
    assert repr(FAST).startswith("Recipe(name='fast', epochs=5, ")
