"""Runs with records, checkpoints and kept predictions: `fcnn_utils.course.experiments`.

The networks are tiny, because how a run is kept, stopped and resumed does not depend on what it learns.
"""

import dataclasses
import json
import shutil
from unittest.mock import DEFAULT, Mock

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import cost
from fcnn_utils.course import augmentation, checkpoints, environment, experiments, networks, predictions, records
from fcnn_utils.course import training as loop
from fcnn_utils.course.recipes import RECIPES

RECIPE = RECIPES["fast"].replace(epochs=3, batch_size=50, precision="float32", learning_rate=0.05)
SHORT = RECIPE.replace(epochs=1)
pytestmark = pytest.mark.usefixtures("course_folder")


def network(seed=0):
    """A small network with every kind of state: weights, moving averages, dropout's seed, optimizer."""
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, strides=2), layers.BatchNormalization(momentum=0.5)]
    stack += [layers.ReLU(), layers.Dropout(0.2), layers.GlobalAveragePooling2D()]
    return keras.Sequential([*stack, layers.Dense(10, activation="softmax")], name="tiny")


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def train_until(where, name, call, dataset, recipe=RECIPE, message=None, **options):
    """Interrupt a training at the `call`-th call of the function `name`, before it does anything."""
    interrupted = Mock(wraps=getattr(where, name), side_effect=[DEFAULT] * (call - 1) + [KeyboardInterrupt])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, lambda *arguments, **options: interrupted(*arguments, **options))  # also a method
        with pytest.raises(KeyboardInterrupt, match=message):
            experiments.train(network(), dataset, recipe, **options)
    assert records.find().empty  # no complete run


@pytest.fixture
def begun(monkeypatch):
    """List of the epochs that are begun."""
    epochs, original = [], loop.Epochs.on_epoch_begin

    def on_epoch_begin(self, epoch, logs=None):
        epochs.append(epoch)
        original(self, epoch, logs)

    monkeypatch.setattr(loop.Epochs, "on_epoch_begin", on_epoch_begin)
    return epochs


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset):
    """An uninterrupted run: (model, record, output folder)."""
    folder, model = tmp_path_factory.mktemp("whole"), network()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FCNN_OUTPUT", str(folder))
        patch.setattr("fcnn_utils.course.paths.root", lambda: None)
        return model, experiments.train(model, dataset, RECIPE), folder


@pytest.fixture
def done(whole, output):
    """Path of the uninterrupted run's record, copied to the output folder of this test."""
    shutil.copytree(whole[2], output)
    return records.path_of("standin-100", "tiny", RECIPE.name, 0)


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
    start = f"tiny · {RECIPE.name} · epoch 2/3 · loss 4.568 · top-1 12.3% · top-5 50.0%"
    assert experiments.progress_line(record, row) == f"{start} · 61 s · 8 ms/step"
    line = experiments.progress_line(record, row | {"validation": {"top1": 0.25}})
    assert line == f"{start} · validation 25.0% · 61 s · 8 ms/step"
    result = {"top1": 0.0123, "top5": 0.2, "images": 10_000}
    start = f"tiny · {RECIPE.name} · seed 0: top-1 1.2%, top-5 20.0% on 10,000"
    end = f"images of standin-100 (one seed; {environment.summary(record)}, float32)"
    assert experiments.result_line(record | {"test": result}) == f"{start} test {end}"
    chosen = record | {"test": None, "epochs": [row | {"validation": result}]}
    assert experiments.result_line(chosen) == f"{start} validation {end}"


def test_run_is_read_instead_of_trained(dataset, whole, done, course_folder, begun, capsys):
    model = network(seed=9)
    assert experiments.train(model, dataset, RECIPE) == {"schema": 1} | whole[1]
    assert f"read from {done}" in capsys.readouterr().out
    experiments.train(model, dataset, RECIPE, quiet=True)
    assert not capsys.readouterr().out
    assert_equal_weights(model, network(seed=9))
    with pytest.raises(ValueError, match="its predictions were not kept: pass retrain=True .* to replace it"):
        experiments.train(model, dataset, RECIPE, save_predictions=True)
    shutil.move(done.parents[3], course_folder / "results")
    assert experiments.train(model, dataset, RECIPE)["test"] == whole[1]["test"]  # of the course, if none is nearer
    assert not begun


def test_retraining_replaces_the_record(dataset, whole, done):
    record = json.loads(done.read_text())
    done.write_text(json.dumps(record | {"test": record["test"] | {"top1": 0.123}}))
    assert experiments.train(network(), dataset, RECIPE)["test"]["top1"] == 0.123
    model = network()
    again = experiments.train(model, dataset, RECIPE, retrain=True)
    assert_same_run(model, again, whole)
    assert json.loads(done.read_text()) == {"schema": 1} | again and files(done.parent) == ["seed0.json"]


def test_retraining_does_not_take_the_checkpoint_of_a_run_that_was_killed_at_its_end(dataset, whole, done, begun):
    model, record, _ = whole
    checkpoints.save(model, record)
    again = experiments.train(network(), dataset, RECIPE, retrain=True)
    assert len(begun) == len(again["epochs"]) == RECIPE.epochs


def test_record_of_other_settings_or_data_is_rejected_and_a_missing_setting_is_the_default(dataset, done, begun):
    record = json.loads(done.read_text())
    del record["recipe"]["distillation"], record["recipe"]["clip_norm"]  # written before these settings existed
    done.write_text(json.dumps(record))
    assert experiments.train(network(), dataset, RECIPE)["test"] == record["test"]
    for setting, value in (("learning_rate", 0.06), ("shift", 0), ("epochs", 4), ("clip_norm", 1.0)):
        with pytest.raises(ValueError, match=f"another recipe, {setting}; pass retrain=True .*--retrain") as error:
            experiments.train(network(), dataset, dataclasses.replace(RECIPE, **{setting: value}))
        assert str(done) in str(error.value)
    with pytest.raises(ValueError, match="another fingerprint; pass retrain=True"):
        experiments.train(network(), dataclasses.replace(dataset, test=dataset.validation), RECIPE)
    assert not begun


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
        (("simple", RECIPE.replace(batch_size=101)), {}, "needs at least 101 training images, one batch; got 100"),
        (("simple", RECIPE.replace(train_on="train", batch_size=81)), {}, "needs at least 81 .*; got 80"),
        ((pytest.fail, RECIPE), {"name": "../up", "retrain": True}, "name of the network becomes a folder.*'../up'"),
        ((pytest.fail, RECIPE), {"name": ""}, "name of the network becomes a folder.*; got ''"),
        (("simple", dataclasses.replace(RECIPE, name="/tmp/x")), {}, "name of the recipe becomes a folder"),
    ],
)
def test_train_rejects_bad_arguments(dataset, output, arguments, options, message):
    model, *rest = arguments
    with pytest.raises(ValueError, match=message):
        experiments.train(model, dataset, *rest, **options)
    assert not output.exists()


@pytest.mark.parametrize("folder", ["output", "json", "partial.json", "checkpoint.npz", "keras", "predictions.npz"])
def test_output_that_cannot_be_written_is_found_before_training(dataset, output, begun, folder):
    if folder == "output":
        output.write_text("a file where a folder should be")
    else:
        records.path_of("standin-100", "tiny", RECIPE.name, 0).with_suffix(f".{folder}").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot write|is a folder where a file goes"):
        experiments.train(network(), dataset, RECIPE, retrain=True)
    assert not begun


def test_disk_without_space_for_a_checkpoint_is_found_before_training(dataset, monkeypatch, begun):
    sizes = []

    def write(path, content):
        sizes.append(len(content))
        raise ValueError(f"cannot write {path}: the disk is full")

    model = network()
    monkeypatch.setattr("fcnn_utils._files.write_atomic", write)
    with pytest.raises(ValueError, match="the disk is full"):
        experiments.train(model, dataset, RECIPE)
    assert sizes == [8 * model.count_params()]
    assert not begun


def test_network_whose_outputs_are_no_probabilities_is_refused_before_training(dataset, begun):
    def ending(layer):
        return keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layer], name="tiny")

    for layer, message in (
        (layers.Dense(10), "model must give class probabilities, .* end it in a softmax"),
        (layers.Dense(10, activation="sigmoid"), "model must give class probabilities"),
        (layers.Dense(9, activation="softmax"), r"model must give 10 class probabilities .* its output is \(2, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            experiments.train(ending(layer), dataset, RECIPE)
        with pytest.raises(ValueError, match=message.replace("model", "teacher", 1)):
            taught = RECIPE.replace(distillation=0.5)
            experiments.train(network(), dataset, taught, teacher=ending(layer))
    assert not begun


def test_record_that_is_damaged_is_not_replaced_unasked(dataset, done, begun):
    done.write_text(done.read_text().replace('"top5"', '"top6"'))
    with pytest.raises(ValueError, match="seed0.json is not a readable record .*'top5'.*; delete it and train again"):
        experiments.train(network(), dataset, RECIPE)
    assert not begun


def test_network_that_would_run_code_or_is_damaged_is_not_loaded(done):
    path, model = done.with_suffix(".keras"), network()
    keras.Sequential([keras.Input((2,)), layers.Lambda(lambda x: x)]).save(path)
    for damage in (None, 0.5, 0.0):
        if damage is not None:
            model.save(path)
            path.write_bytes(path.read_bytes()[: int(damage * path.stat().st_size)])
        with pytest.raises(
            ValueError, match="seed0.keras cannot be loaded: it is damaged, .* or contains code"
        ) as error:
            experiments.load_trained("tiny", "standin-100", RECIPE.name)
        assert "safe_mode" not in str(error.value) and len(str(error.value).splitlines()) == 1


def test_function_makes_the_network_from_the_seed_if_there_is_no_record(dataset, whole):
    make = Mock(side_effect=network)
    first, second = (experiments.train(make, dataset, SHORT, 3, name="made") for _ in range(2))
    direct = experiments.train(network(3), dataset, SHORT, 3)  # another seed is another run
    make.assert_called_once_with(3)
    assert first["model"] == "made" and first["seed"] == first["recipe"]["seed"] == 3
    assert second["test"] == first["test"] == direct["test"]
    assert first["epochs"][0]["loss"] != whole[1]["epochs"][0]["loss"]


def test_network_is_built_by_its_name_as_the_recipe_says(dataset, monkeypatch):
    monkeypatch.setattr(loop, "fit", lambda *arguments, **options: [])  # keeps the network as it is built
    recipe = RECIPE.replace(initialization="he", head_scale=3.0, precision="mixed_bfloat16")
    record = experiments.train("wider_separable", dataset, recipe, 2, width=0.05, save_model=True)
    keras.utils.set_random_seed(2)
    options = {"width": 0.05, "initialization": "he", "head_scale": 3.0}
    fresh = networks.build("wider_separable", (8, 8, 3), 10, **options)
    assert (record["model"], record["precision"]) == ("wider_separable-width0.05", "mixed_bfloat16")
    assert (record["params"], record["seed"]) == (fresh.count_params(), 2)
    kept = experiments.load_trained(record["model"], "standin-100", recipe.name, 2)
    assert not kept.compiled and kept.get_layer("sep1").dtype_policy.name == "mixed_bfloat16"
    assert_equal_weights(kept, fresh)
    path = records.path_of("standin-100", record["model"], recipe.name, 2)
    assert files(path.parent) == ["seed2.json", "seed2.keras"]


def test_kept_network_is_the_trained_one_and_the_nearest_is_loaded(dataset, course_folder):
    model, other = network(), network(seed=1)
    record = experiments.train(model, dataset, SHORT, save_model=True, save_predictions=True)
    assert list(predictions.load("standin-100", "tiny", SHORT.name)) == ["test"]  # not of images that are trained on
    run = ("standin-100", "tiny", SHORT.name, 0)
    near, far = (records.path_of(*run, folder).with_suffix(".keras") for folder in (None, course_folder / "results"))
    far.parent.mkdir(parents=True)
    other.save(far)
    kept = experiments.load_trained("tiny", "standin-100", SHORT.name)
    assert_equal_weights(kept, model)
    found = loop.evaluate(kept, dataset.test, augmentation.channel_statistics(dataset))
    assert found["correct_by_class"] == record["test"]["correct_by_class"]
    expected = [layer.get_weights()[0] for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    for kernel, found in zip(records.trained_kernels("tiny", "standin-100", SHORT.name), expected, strict=True):
        assert np.array_equal(kernel, found)
    near.write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match="seed0.keras is not a network that Keras saved"):
        records.trained_kernels("tiny", "standin-100", SHORT.name)
    near.unlink()
    assert_equal_weights(experiments.load_trained("tiny", "standin-100", SHORT.name), other)
    far.unlink()
    assert experiments.load_trained("tiny", "standin-100", SHORT.name) is None
    with pytest.raises(ValueError, match="no network is kept for standin-100/tiny"):
        records.trained_kernels("tiny", "standin-100", SHORT.name)


def test_run_that_chooses_settings_is_not_tested_and_its_teacher_is_used(dataset):
    recipe = SHORT.replace(distillation=0.5, train_on="train")
    with pytest.raises(ValueError, match="give a teacher"):
        experiments.train(network(), dataset, recipe)
    record = experiments.train(network(), dataset, recipe, teacher=network(1))
    assert record["test"] is None and record["train_images"] == 80
    assert record["epochs"][0]["validation"]["images"] == 20


# --- interrupted and diverged runs -------------------------------------------------------------------------------


def test_predictions_are_kept_after_every_cycle_even_if_the_run_is_interrupted(dataset, output):
    recipe, model = RECIPE.replace(epochs=4, cycles=2, train_on="train", batch_size=40), network()
    record = experiments.train(model, dataset, recipe, save_predictions=True)
    kept = predictions.load("standin-100", "tiny", recipe.name)
    assert kept["validation"].shape == (2, 20, 10) and kept["test"].shape == (2, 50, 10)
    scale = augmentation.channel_statistics(dataset)
    for split in kept:  # the last ones are those of the network as it is now
        exact = loop.predict(model, getattr(dataset, split), scale)
        np.testing.assert_allclose(kept[split][-1], predictions.decode(predictions.encode(exact)), rtol=1e-5)
        assert not np.allclose(kept[split][0], kept[split][-1], rtol=0.01)
    right = kept["test"][-1].argmax(axis=1) == dataset.test.fine
    assert record["test"]["top1"] == right.mean() and record["epochs"][-1]["validation"]["images"] == 20

    shutil.rmtree(output)
    train_until(predictions, "keep", 2, dataset, recipe, save_predictions=True)
    train_until(checkpoints, "save", 1, dataset, recipe, save_predictions=True)  # the last cycle's are written
    train_until(records, "write", 2, dataset, recipe, save_predictions=True)  # they have their final name
    experiments.train(network(), dataset, recipe, save_predictions=True)
    again = predictions.load("standin-100", "tiny", recipe.name)
    for split in kept:
        np.testing.assert_allclose(again[split], kept[split], rtol=1e-3)
    assert files(output) == ["seed0.json", "seed0.predictions.npz"]


@pytest.mark.parametrize(
    "where, name, call, written, left",
    [
        pytest.param(loop.Epochs, "on_epoch_begin", 1, [], [0, 1, 2], id="epoch 1"),
        pytest.param(loop.Epochs, "on_epoch_begin", 2, [1], [1, 2], id="epoch 2"),
        pytest.param(checkpoints, "save", 2, [1], [1, 2], id="checkpoint 2"),
        pytest.param(records, "write", 2, [1], [2], id="record 2"),
        pytest.param(loop, "evaluate", 1, [3], [], id="evaluation"),
        pytest.param(loop.Epochs, "on_epoch_begin", 3, [2], [0, 1, 2], id="damaged checkpoint"),
    ],
)
def test_interrupted_run_continues_as_if_it_had_not_been(
    dataset, whole, output, begun, capsys, request, where, name, call, written, left
):
    is_damaged = "damaged" in request.node.callspec.id
    kept = 2 if is_damaged else 3 - len(left)
    message = f"epochs 1 to {kept} of 3 of tiny are kept in .*checkpoint.npz; the next call continues after them"
    train_until(
        where, name, call, dataset, message=message if kept else "no epoch of tiny was done, so nothing is kept"
    )
    (output / "results" / "standin-100" / "tiny" / RECIPE.name / ".seed0.json.7.tmp").touch()  # as after a kill
    assert records.find(status="running")["epochs"].tolist() == written
    if is_damaged:
        (path,) = output.rglob("*.checkpoint.npz")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    begun.clear()
    model = network()
    if len(left) < 3:  # other weights to start from: those of the checkpoint count
        model.set_weights([weight + 1 for weight in model.get_weights()])
    record = experiments.train(model, dataset, RECIPE)
    assert begun == left
    assert_same_run(model, record, whole)
    assert files(output) == ["seed0.json"]
    assert (f"going on after epoch {3 - len(left)}" in capsys.readouterr().out) == (len(left) < 3)


def test_diverged_run_keeps_its_epochs_and_continues_after_them(dataset, whole, monkeypatch):
    original = loop.Epochs.on_epoch_end

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self.model.weights[0].assign(np.full(self.model.weights[0].shape, np.nan))
        original(self, epoch, logs)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Epochs, "on_epoch_end", on_epoch_end)
        with pytest.raises(loop.Diverged, match="lower learning rate.* kept in .*seed0.partial.json"):
            experiments.train(network(), dataset, RECIPE)
    assert records.find(status="diverged")["epochs"].tolist() == [1] and records.find().empty
    model = network()
    assert_same_run(model, experiments.train(model, dataset, RECIPE), whole)
    assert len(records.find(status="diverged")) == 0


def test_run_whose_test_loss_is_not_finite_is_not_complete(dataset, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: {"loss": np.inf})
    with pytest.raises(loop.Diverged, match="on the test images"):
        experiments.train(network(), dataset, SHORT)
    assert records.find(status="diverged")["epochs"].tolist() == [1] and records.find().empty
