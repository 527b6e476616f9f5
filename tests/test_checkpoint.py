"""The state of a training on disk: `fcnn_utils.course.checkpoints`. Whole runs that are stopped are in test_training.py."""

import errno
import io
import json
import os

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils.course import checkpoints, records, training
from fcnn_utils.course.recipes import RECIPES

RECIPE = RECIPES["fast"]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The project's folder, an empty one, so that paths are shown whole."""
    monkeypatch.setattr(records, "ROOT", tmp_path / "project")


def network(seed, filters=2):
    """A compiled network with every kind of state, all of it drawn from `seed`, as if it had been trained."""
    stack = [keras.Input((4, 4, 1)), layers.Conv2D(filters, 3), layers.BatchNormalization(), layers.Dropout(0.5)]
    model = keras.Sequential([*stack, layers.Flatten(), layers.Dense(5, activation="softmax")], name="tiny")
    training.compile_model(model, RECIPE, 10)
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(seed)
    for variable in [*model.variables, *model.optimizer.variables]:
        variable.assign(rng.uniform(1, 1000, variable.shape).astype(variable.dtype))
    return model


def state(model):
    """All that a training changes."""
    return [keras.ops.convert_to_numpy(variable) for variable in [*model.variables, *model.optimizer.variables]]


def same(model, other):
    """Of each part of two states whether it is equal."""
    return [np.array_equal(a, b) for a, b in zip(state(model), other, strict=True)]


def record(**changes):
    epochs = [{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": 0.1 + 0.2}]
    settings = {"dataset": "standin", "fingerprint": "f", "model": "tiny", "recipe": RECIPE.as_dict(), "seed": 3}
    return settings | {"precision": "float32", "params": 10, "status": "running", "epochs": epochs} | changes


# --- basic -------------------------------------------------------------------------------------------------------


def test_files_of_a_run_lie_beside_its_record(output):
    folder = output / "results" / "standin" / "tiny" / "fast"
    assert checkpoints.file_of(record(), "checkpoint.npz") == folder / "seed3.checkpoint.npz"
    assert checkpoints.file_of(record(), "keras").parent == records.write(record()).parent


def test_without_a_checkpoint_there_is_nothing_to_go_on_from():
    model = network(0)
    before = state(model)
    assert checkpoints.resume(model, record(epochs=[])) == []
    assert all(same(model, before))


# --- correct: checkpoints ----------------------------------------------------------------------------------------


def test_a_checkpoint_restores_the_whole_state(output, capsys):
    model, fresh = network(0), network(1)
    saved = state(model)
    assert len(saved) > 12 and not any(same(fresh, saved))
    checkpoints.save(model, record())
    assert [path.name for path in output.rglob("*") if path.is_file()] == ["seed3.checkpoint.npz"]
    assert checkpoints.resume(fresh, record(epochs=[])) == record()["epochs"]
    assert all(same(fresh, saved))
    assert capsys.readouterr().out == "tiny · fast · going on after epoch 2\n"


def test_a_network_that_was_never_trained_can_go_on():
    model, fresh = network(0), network(1)
    training.compile_model(fresh, RECIPE, 10)  # a new optimizer, which has not seen the weights
    checkpoints.save(model, record())
    checkpoints.resume(fresh, record(epochs=[]))
    assert all(same(fresh, state(model)))


@pytest.mark.parametrize(
    "key, value",
    [
        ("fingerprint", "another"),
        ("precision", "mixed_bfloat16"),
        ("params", 11),
        ("recipe", RECIPE.as_dict() | {"learning_rate": 0.3}),
    ],
)
def test_a_checkpoint_of_other_settings_is_left(capsys, key, value):
    checkpoints.save(network(0), record())
    model = network(1)
    before = state(model)
    assert checkpoints.resume(model, record(epochs=[], **{key: value})) == []
    assert all(same(model, before))
    path = checkpoints.file_of(record(), "checkpoint.npz")
    assert capsys.readouterr().out == f"{path} belongs to other settings: starting anew\n"


def test_a_checkpoint_of_another_network_with_as_many_weights_is_left(capsys):
    checkpoints.save(network(0, filters=3), record())
    model = network(1)
    before = state(model)
    assert checkpoints.resume(model, record(epochs=[])) == []
    assert all(same(model, before))
    assert "belongs to other settings: starting anew" in capsys.readouterr().out


def archive(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "no record", "no JSON", "an array short"])
def test_a_damaged_checkpoint_is_named_and_nothing_of_it_taken(capsys, damage):
    saved = network(0)
    checkpoints.save(saved, record())
    path = checkpoints.file_of(record(), "checkpoint.npz")
    content = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    path.write_bytes(
        {
            "truncated": lambda: content[: len(content) // 2],
            "empty": lambda: b"",
            "text": lambda: b"not an archive",
            "no record": lambda: archive(v0=np.zeros(3)),
            "no JSON": lambda: archive(**arrays | {"record": "{"}),
            "an array short": lambda: archive(**{name: array for name, array in arrays.items() if name != "v1"}),
        }[damage]()
    )
    model = network(1)
    before = state(model)
    assert checkpoints.resume(model, record(epochs=[])) == []
    assert all(same(model, before))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path} is damaged (") and printed.endswith("): starting anew\n")


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(monkeypatch):
    model = network(0)
    checkpoints.save(model, record())
    saved = state(model)

    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match="checkpoint.npz: the disk is full"):
            checkpoints.save(network(1), record(epochs=[]))
    fresh = network(2)
    assert checkpoints.resume(fresh, record()) == record()["epochs"]
    assert all(same(fresh, saved))


# --- correct: the trained network --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Sequential", "Functional"])
def test_a_network_is_kept_without_its_optimizer(kind):
    model = network(0)
    if kind == "Functional":
        model = keras.Model(model.inputs[0], model.outputs[0], name="tiny")
        training.compile_model(model, RECIPE, 10)
    folder = records.write(record()).parent
    checkpoints.keep(model, record())
    assert sorted(path.name for path in folder.iterdir()) == ["seed3.keras", "seed3.partial.json"]
    kept = keras.saving.load_model(checkpoints.file_of(record(), "keras"))
    assert type(kept) is type(model) and not kept.compiled and model.compiled
    images = np.random.default_rng(5).normal(size=(3, 4, 4, 1))
    np.testing.assert_array_equal(kept.predict(images, verbose=0), model.predict(images, verbose=0))


def test_a_network_that_cannot_be_kept_leaves_the_earlier_one(monkeypatch):
    folder = records.write(record()).parent
    checkpoints.keep(network(0), record())
    path = checkpoints.file_of(record(), "keras")
    content = path.read_bytes()

    def read_only(*args):
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", read_only)
        with pytest.raises(ValueError, match="seed3.keras: the folder is read-only; set FCNN_OUTPUT"):
            checkpoints.keep(network(1), record())
    assert sorted(path.name for path in folder.iterdir()) == ["seed3.keras", "seed3.partial.json"]
    assert path.read_bytes() == content


def test_a_record_in_a_checkpoint_is_read_back_as_it_was():
    checkpoints.save(network(0), record())
    with np.load(checkpoints.file_of(record(), "checkpoint.npz")) as file:
        assert json.loads(str(file["record"])) == record()
