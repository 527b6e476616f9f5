"""Runs with records, checkpoints and kept predictions: `fcnn_utils.course.experiments`.

The networks have a hundred weights, because how a run is kept, stopped and resumed does not depend on
what it learns.
"""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import cost
from fcnn_utils.course import (
    augmentation,
    checkpoints,
    environment,
    experiments,
    networks,
    paths,
    predictions,
    records,
    training,
)
from fcnn_utils.course.recipes import RECIPES

RECIPE = RECIPES["fast"].replace(epochs=3, batch_size=50, precision="float32", learning_rate=0.05)
SHORT = RECIPE.replace(epochs=1)


@pytest.fixture(scope="module")
def dataset(small_dataset):
    return small_dataset


@pytest.fixture(autouse=True)
def course(course_folder):
    return course_folder


def network(seed=0):
    """A small network with every kind of state: weights, moving averages, dropout's seed, optimizer."""
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, strides=2), layers.BatchNormalization(momentum=0.5)]
    stack += [layers.ReLU(), layers.Dropout(0.2), layers.GlobalAveragePooling2D()]
    return keras.Sequential([*stack, layers.Dense(10, activation="softmax")], name="tiny")


def path_of(recipe=RECIPE, model="tiny", seed=0):
    return records.path_of("standin-100", model, recipe.name, seed)


def is_complete(recipe=RECIPE):
    return records.lookup("standin-100", "tiny", recipe.name, 0) != (None, None)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def stop_at(patch, where, name, call):
    """Interrupt the `call`-th call of the function `name`, before it does anything."""
    original, calls = getattr(where, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    patch.setattr(where, name, interrupted)


def train_interrupted(where, name, call, dataset, recipe=RECIPE, **options):
    """Train until the `call`-th call of the function `name`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, where, name, call)
        with pytest.raises(KeyboardInterrupt):
            experiments.train(network(), dataset, recipe, **options)
    assert not is_complete(recipe)


@pytest.fixture
def trained_epochs(monkeypatch):
    """List of the epochs, from 0, that are trained from now on."""
    original, epochs = training.fit_epoch, []

    def fit_epoch(model, batches, steps, epoch=0):
        epochs.append(epoch)
        return original(model, batches, steps, epoch)

    monkeypatch.setattr(training, "fit_epoch", fit_epoch)
    return epochs


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset):
    """An uninterrupted run: (model, record, output folder)."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FCNN_OUTPUT", str(folder))
        patch.setattr(paths, "root", lambda: folder / "course")
        model = network()
        return model, experiments.train(model, dataset, RECIPE), folder


@pytest.fixture
def done(whole, output):
    """Path of the uninterrupted run's record, copied to the output folder of this test."""
    shutil.copytree(whole[2], output)
    return path_of()


def assert_same_run(model, record, whole):
    """Figures and weights are those of the uninterrupted run."""
    figures = ("epoch", "loss", "cross_entropy", "top1", "top5")
    for row, other in zip(record["epochs"], whole[1]["epochs"], strict=True):
        np.testing.assert_allclose([row[key] for key in figures], [other[key] for key in figures], rtol=1e-4)
    np.testing.assert_allclose(record["test"]["loss"], whole[1]["test"]["loss"], rtol=1e-4)
    assert record["test"]["correct_by_class"] == whole[1]["test"]["correct_by_class"]
    assert_equal_weights(model, whole[0], rtol=1e-3, atol=1e-5)


def assert_equal_weights(model, other, **tolerance):
    for weight, expected in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, **tolerance)


# --- records -----------------------------------------------------------------------------------------------------


def test_record_has_all_documented_entries(whole, dataset):
    model, record, folder = whole
    path = folder / "results" / "standin-100" / "tiny" / RECIPE.name / "seed0.json"
    assert [file for file in folder.rglob("*") if file.is_file()] == [path]  # no checkpoint, no partial record
    assert json.loads(path.read_text()) == {"schema": 1} | record
    expected = {"status": "complete", "dataset": "standin-100", "fingerprint": dataset.fingerprint, "stand_in": True}
    expected |= {"train_images": 100, "model": "tiny", "recipe": RECIPE.as_dict(), "seed": 0, "precision": "float32"}
    expected |= {"params": model.count_params(), "trainable": model.count_params() - 8}
    expected |= {"macs": cost.total_costs(model)["macs"]}
    assert {key: record[key] for key in expected} == expected
    assert record.keys() == expected.keys() | environment.describe().keys() | {"epochs", "test"}
    assert [row["epoch"] for row in record["epochs"]] == [1, 2, 3] and "background_load" in record["epochs"][0]
    assert record["test"]["images"] == 50 and len(record["test"]["correct_by_class"]) == 10


def test_lines_describe_the_run(whole):
    record = whole[1]
    row = record["epochs"][1] | {"loss": 4.5678, "top1": 0.12345, "top5": 0.5, "seconds": 61.4, "ms_per_step": 7.6}
    line = experiments.progress_line(record, row)
    assert line.startswith(f"tiny · {RECIPE.name} · epoch 2/3 · loss 4.568 · top-1 12.3% · top-5 50.0% · 61 s · 8 ms")
    assert "· validation 25.0% ·" in experiments.progress_line(record, row | {"validation": {"top1": 0.25}})
    result = {"top1": 0.0123, "top5": 0.2, "images": 10_000}
    line = experiments.result_line(record | {"test": result})
    start = f"tiny · {RECIPE.name} · seed 0: top-1 1.2%, top-5 20.0% on 10,000"
    assert line.startswith(f"{start} test images of standin-100 (one seed; {environment.summary(record)}, float32")
    epochs = [row | {"validation": result}]
    assert experiments.result_line(record | {"test": None, "epochs": epochs}).startswith(f"{start} validation images")


def test_run_is_read_instead_of_trained(dataset, whole, done, course, trained_epochs, capsys):
    model = network(seed=9)
    before = network(seed=9)
    assert experiments.train(model, dataset, RECIPE) == {"schema": 1} | whole[1]
    assert f"read from {done}" in capsys.readouterr().out
    experiments.train(model, dataset, RECIPE, quiet=True)
    assert not capsys.readouterr().out
    assert_equal_weights(model, before)
    with pytest.raises(ValueError, match="its predictions were not kept: pass retrain=True to replace it"):
        experiments.train(network(), dataset, RECIPE, save_predictions=True)
    done.rename(course.parent / "moved")
    assert trained_epochs == []


def test_run_of_the_course_is_read_if_there_is_no_nearer_one(dataset, whole, course, trained_epochs):
    shutil.copytree(whole[2] / "results", course / "results")
    assert experiments.train(network(), dataset, RECIPE)["test"] == whole[1]["test"]
    assert trained_epochs == []


def test_retraining_replaces_the_record(dataset, whole, done):
    record = json.loads(done.read_text())
    done.write_text(json.dumps(record | {"test": record["test"] | {"top1": 0.123}}))
    assert experiments.train(network(), dataset, RECIPE)["test"]["top1"] == 0.123
    model = network()
    again = experiments.train(model, dataset, RECIPE, retrain=True)
    assert_same_run(model, again, whole)
    assert json.loads(done.read_text()) == {"schema": 1} | again and files(done.parent) == ["seed0.json"]


def test_other_settings_or_data_under_the_same_name_are_rejected(dataset, done, trained_epochs):
    for setting, value in (("learning_rate", 0.06), ("shift", 0), ("epochs", 4)):
        with pytest.raises(ValueError, match=f"another recipe, {setting}; pass retrain=True to replace it") as error:
            experiments.train(network(), dataset, dataclasses.replace(RECIPE, **{setting: value}))
        assert str(done) in str(error.value)
    with pytest.raises(ValueError, match="another fingerprint; pass retrain=True"):
        experiments.train(network(), dataclasses.replace(dataset, test=dataset.validation), RECIPE)
    assert trained_epochs == []


def test_record_that_lacks_a_new_setting_counts_as_its_default(dataset, done, trained_epochs):
    record = json.loads(done.read_text())
    del record["recipe"]["distillation"], record["recipe"]["clip_norm"]
    done.write_text(json.dumps(record))
    assert experiments.train(network(), dataset, RECIPE)["test"] == record["test"]
    with pytest.raises(ValueError, match="another recipe, clip_norm"):
        experiments.train(network(), dataset, dataclasses.replace(RECIPE, clip_norm=1.0))
    assert trained_epochs == []


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("nope", RECIPE), {}, "model must be one of simple, .*; got 'nope'"),
        (("simple", "nope"), {}, "recipe must be one of thesis, .*; got 'nope'"),
        (("simple", RECIPE, -1), {}, "seed must be .*; got -1"),
        ((network, RECIPE), {}, "model must be a network's name, a built keras.Model, or a function and a name"),
        ((3, RECIPE), {"name": "three"}, "model must be a network's name, a built keras.Model, or a function"),
        (("simple", RECIPE), {"name": "mine", "width": 0.5}, "width must be 1 .*; got 0.5"),
        (("simple", RECIPE.replace(batch_size=101)), {}, "batch_size must be at most 100, the training images"),
        (("simple", RECIPE.replace(train_on="train", batch_size=81)), {}, "batch_size must be at most 80"),
    ],
)
def test_train_rejects_bad_arguments(dataset, output, arguments, options, message):
    model, *rest = arguments
    with pytest.raises(ValueError, match=message):
        experiments.train(model, dataset, *rest, **options)
    assert not output.exists()


def test_output_that_cannot_be_written_is_found_before_training(dataset, output, trained_epochs):
    output.write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="cannot write"):
        experiments.train(network(), dataset, RECIPE)
    assert trained_epochs == []


def test_function_makes_the_network_from_the_seed_if_there_is_no_record(dataset, whole, trained_epochs):
    seeds = []

    def make(seed):
        seeds.append(seed)
        return network(seed)

    first = experiments.train(make, dataset, SHORT, 3, name="made")
    second = experiments.train(make, dataset, SHORT, 3, name="made")
    direct = experiments.train(network(3), dataset, SHORT, 3)  # another seed is another run
    assert seeds == [3] and trained_epochs == [0, 0] and first["model"] == "made"
    assert second["test"] == first["test"] == direct["test"]
    assert first["seed"] == first["recipe"]["seed"] == 3
    assert first["epochs"][0]["loss"] != whole[1]["epochs"][0]["loss"]


def test_network_is_built_by_its_name_as_the_recipe_says_and_kept(dataset):
    """At rate 0 the kept network is the built one. Its scale is that of the recipe."""
    keras.utils.set_random_seed(2)
    recipe = SHORT.replace(learning_rate=0, initialization="he", head_scale=3.0, precision="mixed_bfloat16")
    record = experiments.train("wider_separable", dataset, recipe, 2, width=0.05, save_model=True)
    assert (record["model"], record["precision"]) == ("wider_separable-width0.05", "mixed_bfloat16")
    keras.utils.set_random_seed(2)
    options = {"width": 0.05, "initialization": "he", "head_scale": 3.0}
    fresh = networks.build("wider_separable", (8, 8, 3), 10, **options)
    assert (record["params"], record["seed"]) == (fresh.count_params(), 2)
    kept = experiments.load_trained(record["model"], "standin-100", recipe.name, 2)
    assert not kept.compiled and kept.get_layer("bn6").gamma.numpy().tolist() == [3.0] * 10
    for weight, expected in zip(kept.weights, fresh.weights, strict=True):
        if "moving" not in weight.name:
            np.testing.assert_array_equal(weight, expected)
    assert files(path_of(recipe, record["model"], 2).parent) == ["seed2.json", "seed2.keras"]


def test_kept_network_is_the_trained_one_and_the_nearest_is_loaded(dataset, course):
    model = network()
    record = experiments.train(model, dataset, SHORT, save_model=True)
    kept = experiments.load_trained("tiny", "standin-100", SHORT.name)
    assert_equal_weights(kept, model)
    found = training.evaluate(kept, dataset.test, augmentation.channel_statistics(dataset))
    assert found["correct_by_class"] == record["test"]["correct_by_class"]
    far = records.path_of("standin-100", "tiny", SHORT.name, 0, course / "results").with_suffix(".keras")
    far.parent.mkdir(parents=True)
    network(seed=1).save(far)
    assert_equal_weights(experiments.load_trained("tiny", "standin-100", SHORT.name), model)
    path_of(SHORT).with_suffix(".keras").unlink()
    assert_equal_weights(experiments.load_trained("tiny", "standin-100", SHORT.name), network(seed=1))
    far.unlink()
    assert experiments.load_trained("tiny", "standin-100", SHORT.name) is None


# --- predictions -------------------------------------------------------------------------------------------------


def test_predictions_are_kept_after_every_cycle(dataset):
    recipe, model = RECIPE.replace(epochs=4, cycles=2, train_on="train", batch_size=40), network()
    record = experiments.train(model, dataset, recipe, save_predictions=True)
    said = predictions.load("standin-100", "tiny", recipe.name)
    assert said["validation"].shape == (2, 20, 10) and said["test"].shape == (2, 50, 10)
    scale = augmentation.channel_statistics(dataset)
    for split in said:  # the last ones are those of the network as it is now
        exact = training.predict(model, getattr(dataset, split), scale)
        np.testing.assert_allclose(said[split][-1], predictions.decode(predictions.encode(exact)), rtol=1e-5)
        assert not np.allclose(said[split][0], said[split][-1], rtol=0.01)
    right = said["test"][-1].argmax(axis=1) == dataset.test.fine
    assert record["test"]["top1"] == right.mean() and record["epochs"][-1]["validation"]["images"] == 20
    assert record["train_images"] == 80
    without = experiments.train(network(), dataset, recipe, retrain=True)
    assert without["test"] is None and without["epochs"][-1]["validation"] == record["epochs"][-1]["validation"]


def test_interrupted_run_has_the_predictions_of_an_uninterrupted_one(dataset, output):
    recipe = RECIPE.replace(epochs=4, cycles=2)
    experiments.train(network(), dataset, recipe, save_predictions=True)
    whole = predictions.load("standin-100", "tiny", recipe.name)
    assert list(whole) == ["test"]  # not of the images that are trained on
    shutil.rmtree(output)
    train_interrupted(checkpoints, "save", 4, dataset, recipe, save_predictions=True)  # the last cycle's are written
    experiments.train(network(), dataset, recipe, save_predictions=True)
    again = predictions.load("standin-100", "tiny", recipe.name)["test"]
    np.testing.assert_allclose(again, whole["test"], rtol=1e-3)
    assert files(output) == ["seed0.json", "seed0.predictions.npz"]


# --- interrupted and diverged runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, name, call, left",
    [
        (training, "fit_epoch", 1, [0, 1, 2]),
        (training, "fit_epoch", 2, [1, 2]),
        (checkpoints, "save", 2, [1, 2]),
        (records, "write", 2, [2]),
        (training, "evaluate", 1, []),
    ],
    ids=["epoch 1", "epoch 2", "checkpoint 2", "record 2", "evaluation"],
)
def test_interrupted_run_continues_as_if_it_had_not_been(
    dataset, whole, output, trained_epochs, capsys, where, name, call, left
):
    train_interrupted(where, name, call, dataset)
    found = records.find(status="running")["epochs"].tolist()
    assert found == {"fit_epoch": [1] * (call > 1), "save": [1], "write": [1], "evaluate": [3]}[name]
    trained_epochs.clear()
    capsys.readouterr()
    model = network()
    if len(left) < 3:  # other weights to start from: those of the checkpoint count
        model.set_weights([weight + 1 for weight in model.get_weights()])
    record = experiments.train(model, dataset, RECIPE)
    assert trained_epochs == left
    assert_same_run(model, record, whole)
    assert files(output) == ["seed0.json"]
    assert (f"going on after epoch {3 - len(left)}" in capsys.readouterr().out) == (len(left) < 3)


def test_run_with_a_damaged_checkpoint_starts_anew(dataset, whole, trained_epochs, capsys):
    train_interrupted(training, "fit_epoch", 2, dataset)
    path = path_of().with_suffix(".checkpoint.npz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    trained_epochs.clear()
    model = network()
    record = experiments.train(model, dataset, RECIPE)
    assert trained_epochs == [0, 1, 2] and f"{path} is damaged" in capsys.readouterr().out
    assert_same_run(model, record, whole)


@pytest.mark.parametrize("epoch", [1, 3])
def test_diverged_run_keeps_its_epochs_and_continues_after_them(dataset, whole, monkeypatch, epoch):
    original = training.fit_epoch

    def fit_epoch(model, *arguments):
        row = original(model, *arguments)
        if row["epoch"] == epoch:
            model.weights[0].assign(np.full(model.weights[0].shape, np.nan))
        return row

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit_epoch", fit_epoch)
        with pytest.raises(training.Diverged, match="lower learning rate.* kept in .*seed0.partial.json"):
            experiments.train(network(), dataset, RECIPE)
    assert records.find(status="diverged")["epochs"].tolist() == [epoch - 1] and not is_complete()
    model = network()
    assert_same_run(model, experiments.train(model, dataset, RECIPE), whole)
    assert len(records.find(status="diverged")) == 0


def test_run_whose_test_loss_is_not_finite_is_not_complete(dataset, monkeypatch):
    original = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *arguments: original(*arguments) | {"loss": np.inf})
    with pytest.raises(training.Diverged, match="on the test images"):
        experiments.train(network(), dataset, SHORT)
    assert records.find(status="diverged")["epochs"].tolist() == [1] and not is_complete(SHORT)


def test_teacher_reaches_the_training(dataset):
    recipe = SHORT.replace(distillation=0.5)
    with pytest.raises(ValueError, match="give a teacher"):
        experiments.train(network(), dataset, recipe)
    taught = experiments.train(network(), dataset, recipe, teacher=network(1))
    plain = experiments.train(network(), dataset, SHORT)
    assert taught["epochs"][0]["loss"] != plain["epochs"][0]["loss"]
