"""State of a run on disk: `fcnn_utils.course.checkpoints`. Whole runs that are stopped are in test_experiments.py."""

import errno
import json
from unittest.mock import Mock

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils.course import checkpoints, records, training
from fcnn_utils.course.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("course_folder")
RECIPE = RECIPES["fast"]
FIGURES = {"cross_entropy": 0.25, "top1": 0.5, "top5": 1, "seconds": 0.5, "ms_per_step": 2.0}
EPOCHS = [{"epoch": 1, "loss": 2.5, **FIGURES}, {"epoch": 2, "loss": 0.1 + 0.2, **FIGURES}]


def network(seed, filters=2):
    """A compiled network with every kind of state, all of it random, as if it had been trained."""
    stack = [keras.Input((4, 4, 1)), layers.Conv2D(filters, 3), layers.BatchNormalization(), layers.Dropout(0.5)]
    model = keras.Sequential([*stack, layers.Flatten(), layers.Dense(5, activation="softmax")], name="tiny")
    training.compile_model(model, RECIPE, 10)
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(seed)
    for variable in [*model.variables, *model.optimizer.variables]:
        variable.assign(rng.uniform(1, 1000, variable.shape).astype(variable.dtype))
    return model


def state(model):
    """Everything that a training changes."""
    return [keras.ops.convert_to_numpy(variable) for variable in [*model.variables, *model.optimizer.variables]]


def equal_parts(model, other):
    return [np.array_equal(a, b) for a, b in zip(state(model), other, strict=True)]


def record(**changes):
    settings = {"dataset": "standin", "fingerprint": "f", "model": "tiny", "recipe": RECIPE.as_dict(), "seed": 3}
    settings |= {"precision": "float32", "params": 10, "trainable": 9, "macs": 8, "train_images": 7, "stand_in": True}
    settings |= {"device": "CPU", "cores": 2, "backend": "jax", "versions": {"keras": "3"}, "date": "2026-01-02"}
    return settings | {"status": "running", "epochs": EPOCHS, "test": None} | changes


def assert_not_resumed(**changes):
    """A run with these settings starts anew, from its own weights."""
    model = network(1)
    before = state(model)
    assert checkpoints.resume(model, record(epochs=[], **changes)) == []
    assert all(equal_parts(model, before))


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_files_of_a_run_lie_beside_its_record_and_without_one_nothing_is_resumed():
    assert checkpoints.file_of(record(), "keras") == records.write(record()).with_name("seed3.keras")
    assert_not_resumed()


@pytest.mark.parametrize("optimizer", ["used", "new"])
def test_checkpoint_restores_the_whole_state(output, capsys, optimizer):
    model, fresh = network(0), network(1)
    saved = state(model)
    assert len(saved) > 12 and not any(equal_parts(fresh, saved))
    if optimizer == "new":  # it has not seen the weights
        training.compile_model(fresh, RECIPE, 10)
    checkpoints.save(model, record())
    assert [path.name for path in output.rglob("*") if path.is_file()] == ["seed3.checkpoint.npz"]
    assert checkpoints.resume(fresh, record(epochs=[])) == EPOCHS
    assert all(equal_parts(fresh, saved))
    assert capsys.readouterr().out == "tiny · fast · going on after epoch 2\n"


def test_checkpoint_of_the_first_edition_is_resumed_with_the_current_names():
    checkpoints.save(network(0), record(epochs=[EPOCHS[0] | {"others_cpu": 0.1}]))
    assert checkpoints.resume(network(1), record(epochs=[])) == [EPOCHS[0] | {"background_load": 0.1}]


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "another"},
        {"precision": "mixed_bfloat16"},
        {"params": 11},
        {"recipe": RECIPE.as_dict() | {"learning_rate": 0.3}},
        {},
    ],
    ids=str,
)
def test_checkpoint_of_other_settings_is_not_loaded(capsys, changes):
    checkpoints.save(network(0, filters=2 if changes else 3), record())  # other shapes, but as many weights
    assert_not_resumed(**changes)
    path = checkpoints.file_of(record(), "checkpoint.npz")
    assert capsys.readouterr().out == f"{path} belongs to other settings: starting anew\n"


DAMAGES = [
    "truncated",
    "empty",
    "text",
    "no record",
    "no JSON",
    "an array short",
    "nan",
    "object",
    "9 of 5",
    "no epochs",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_not_loaded(capsys, damage):
    checkpoints.save(network(0), record())
    path = checkpoints.file_of(record(), "checkpoint.npz")
    content, arrays = path.read_bytes(), dict(np.load(path))
    assert json.loads(str(arrays["record"])) == record()
    if damage in ("truncated", "empty", "text"):
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not an archive"}[damage])
    elif damage == "no JSON":
        np.savez(path, **arrays | {"record": "{"})
    elif damage in ("nan", "object"):
        np.savez(path, **arrays | {"v1": arrays["v1"] * np.nan if damage == "nan" else np.array({})})
    elif damage in ("9 of 5", "no epochs"):
        epochs = [EPOCHS[0] | {"epoch": number} for number in range(1, 10)] if damage == "9 of 5" else []
        np.savez(path, **arrays | {"record": json.dumps(record(epochs=epochs))})
    else:
        del arrays["record" if damage == "no record" else "v1"]
        np.savez(path, **arrays)
    assert_not_resumed()
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path} is damaged (") and printed.endswith("): starting anew\n")
    assert len(printed.splitlines()) == 1 and "pickle" not in printed


def test_checkpoint_of_another_type_is_not_loaded(capsys):
    checkpoints.save(network(0), record())
    path = checkpoints.file_of(record(), "checkpoint.npz")
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"v1": arrays["v1"].astype("float64")})
    assert_not_resumed()
    assert "belongs to other settings" in capsys.readouterr().out


def test_failed_write_keeps_the_earlier_checkpoint(monkeypatch):
    model = network(0)
    checkpoints.save(model, record())
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", Mock(side_effect=OSError(errno.ENOSPC, "full")))
        with pytest.raises(ValueError, match="checkpoint.npz: the disk is full"):
            checkpoints.save(network(1), record(epochs=[]))
    fresh = network(2)
    assert checkpoints.resume(fresh, record()) == EPOCHS
    assert all(equal_parts(fresh, state(model)))


# --- the trained network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Sequential", "Functional"])
def test_network_is_kept_without_its_optimizer(kind, monkeypatch):
    model = network(0)
    if kind == "Functional":
        model = keras.Model(model.inputs[0], model.outputs[0], name="tiny")
        training.compile_model(model, RECIPE, 10)
    folder = records.write(record()).parent
    checkpoints.keep(model, record())
    path = checkpoints.file_of(record(), "keras")
    kept = keras.saving.load_model(path)
    assert type(kept) is type(model) and not kept.compiled and model.compiled
    images = np.random.default_rng(5).normal(size=(3, 4, 4, 1)).astype("float32")
    np.testing.assert_array_equal(kept(images), model(images))
    content = path.read_bytes()
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(errno.EROFS, "read-only")))
    with pytest.raises(ValueError, match="seed3.keras: the folder is read-only"):
        checkpoints.keep(network(1), record())
    assert sorted(path.name for path in folder.iterdir()) == ["seed3.keras", "seed3.partial.json"]
    assert path.read_bytes() == content
