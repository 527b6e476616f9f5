"""Training: `fcnn_utils.course.training`.

Networks of a thousand weights on 200 generated images: what is tested here is how a run is kept, stopped, resumed
and measured, and none of that depends on what is learnt.
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
    data,
    environment,
    networks,
    predictions,
    records,
    thesis,
    training,
)
from fcnn_utils.course.recipes import RECIPES

RECIPE = RECIPES["fast"].replace(epochs=3, batch_size=50, precision="float32", learning_rate=0.05)
FIGURES = ("loss", "cross_entropy", "top1", "top5")


@pytest.fixture(scope="module")
def dataset():
    return data.load("standin", 200, 100)


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The project's folder, an empty one: no record of the real one is read."""
    monkeypatch.setattr(records, "ROOT", tmp_path / "project")
    return tmp_path / "project"


def network(seed=0, extra=(), name="tiny"):
    """A small network with every kind of state: weights, moving averages, and what the optimizer adds."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(8, 3, strides=4),
            layers.BatchNormalization(momentum=0.5),
            layers.ReLU(),
            *extra,
            layers.GlobalAveragePooling2D(),
            layers.Dense(100, activation="softmax"),
        ],
        name=name,
    )


def linear(seed=0):
    """A softmax of a linear map: small enough to be computed by hand."""
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((32, 32, 3)), layers.Flatten(), layers.Dense(100, activation="softmax")]
    return keras.Sequential(stack, name="linear")


def by_hand(model, images):
    """Class probabilities of `linear()`, in double precision."""
    kernel, bias = (weight.astype("float64") for weight in model.get_weights())
    scores = images.reshape(len(images), -1).astype("float64") @ kernel + bias
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def top(probabilities, labels, count):
    """(N,) whether the label is among the `count` likeliest classes."""
    return (np.argsort(-probabilities, axis=1, kind="stable")[:, :count] == labels[:, None]).any(axis=1)


def never(*args, **kwargs):
    pytest.fail("trained although there was no need to")


def stop_at(monkeypatch, where, name, call):
    """Ctrl-C at the `call`-th call of the function `name`, before it has done anything."""
    original, calls = getattr(where, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, interrupted)


def watched(monkeypatch):
    """List of the epochs (from 0) that are trained from now on."""
    original, epochs = training.fit_epoch, []

    def fit_epoch(model, batches, steps, epoch=0):
        epochs.append(epoch)
        return original(model, batches, steps, epoch)

    monkeypatch.setattr(training, "fit_epoch", fit_epoch)
    return epochs


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def run(where, make, dataset, **options):
    """A run of its own, in the folder `where`: its model, record and folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FCNN_OUTPUT", str(where))
        patch.setattr(records, "ROOT", where / "project")
        model = make()
        record = training.train(model, dataset, RECIPE, **options)
    return model, record, where


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset):
    """An uninterrupted run: (model, record, folder)."""
    return run(tmp_path_factory.mktemp("whole"), network, dataset)


@pytest.fixture
def done(whole, output):
    """This test's output folder with the uninterrupted run in it; returns the path of its record."""
    shutil.copytree(whole[2], output)
    return records.path_of("standin-200", "tiny", RECIPE.name, 0)


def assert_same_run(model, record, whole):
    """The run's figures and weights are those of the uninterrupted one."""
    expected = whole[1]
    assert [row["epoch"] for row in record["epochs"]] == [1, 2, 3]
    for row, other in zip(record["epochs"], expected["epochs"], strict=True):
        np.testing.assert_allclose([row[key] for key in FIGURES], [other[key] for key in FIGURES], rtol=1e-4)
    np.testing.assert_allclose(record["test"]["loss"], expected["test"]["loss"], rtol=1e-4)
    assert record["test"]["correct_by_class"] == expected["test"]["correct_by_class"]
    for weight, other in zip(model.get_weights(), whole[0].get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-3, atol=1e-5)


# --- basic -------------------------------------------------------------------------------------------------------


def test_a_record_has_all_that_is_documented(whole, dataset):
    model, record, folder = whole
    path = folder / "results" / "standin-200" / "tiny" / RECIPE.name / "seed0.json"
    assert [file for file in folder.rglob("*") if file.is_file()] == [path]  # no checkpoint, no partial record is left
    assert json.loads(path.read_text()) == {"schema": records.SCHEMA} | record
    assert (
        record.items()
        >= {
            "status": "complete",
            "dataset": "standin-200",
            "fingerprint": dataset.fingerprint,
            "stand_in": True,
            "train_images": 200,
            "model": "tiny",
            "recipe": RECIPE.as_dict(),
            "seed": 0,
            "precision": "float32",
            "params": model.count_params(),
            "trainable": model.count_params() - 16,
            "macs": cost.total_costs(model)["macs"],
        }.items()
    )
    assert record.keys() >= environment.describe().keys()
    assert [row["epoch"] for row in record["epochs"]] == [1, 2, 3]
    for row in record["epochs"]:
        assert row.keys() == {*FIGURES, "epoch", "seconds", "ms_per_step", "first_step_ms", "background_load"}
        assert 0 <= row["top1"] <= row["top5"] <= 1 and 0 <= row["background_load"] <= 1
        assert row["ms_per_step"] > 0 and 0 < row["first_step_ms"] <= 1e3 * row["seconds"]
    test = record["test"]
    assert test.keys() == {"images", "loss", "top1", "top5", "correct_by_class", "top1_by_superclass"}
    assert test["images"] == 100 == len(test["correct_by_class"])


def test_what_is_printed_tells_the_run(whole, dataset):
    record = whole[1]
    row = record["epochs"][1] | {"loss": 4.5678, "top1": 0.12345, "top5": 0.5, "seconds": 61.4, "ms_per_step": 7.6}
    line = training.progress_line(record, row)
    assert line.startswith(f"tiny · {RECIPE.name} · epoch 2/3 · loss 4.568 · top-1 12.3% · top-5 50.0% · 61 s · 8 ms")
    assert "· validation 25.0% ·" in training.progress_line(record, row | {"validation": {"top1": 0.25}})
    line = training.result_line(record | {"test": record["test"] | {"top1": 0.0123, "top5": 0.2, "images": 10_000}})
    assert line.startswith(
        f"tiny · {RECIPE.name} · seed 0: top-1 1.2%, top-5 20.0% on 10,000 test images of standin-200"
    )
    assert "one seed" in line and environment.summary(record) in line and "float32" in line


@pytest.mark.parametrize("train_on, images", [("all", 200), ("train", 180)])
def test_a_batch_larger_than_the_data_is_refused(dataset, train_on, images):
    recipe = RECIPE.replace(batch_size=201, train_on=train_on)
    with pytest.raises(ValueError, match=f"batch_size must be at most {images}, the training images; got 201"):
        training.train(network(), dataset, recipe)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nope", RECIPE), "model must be one of simple, .*; got 'nope'"),
        (("simple", "nope"), "recipe must be one of thesis, fast, faster, long, medical, tune; got 'nope'"),
        (("simple", RECIPE, -1), "seed must be .*; got -1"),
    ],
)
def test_bad_arguments_are_refused(dataset, arguments, message):
    model, *rest = arguments
    with pytest.raises(ValueError, match=message):
        training.train(model, dataset, *rest)


def test_an_output_that_cannot_be_written_is_found_before_training(dataset, output, monkeypatch):
    output.write_text("a file where a folder should be")
    monkeypatch.setattr(training, "fit_epoch", never)
    with pytest.raises(ValueError, match="cannot write"):
        training.train(network(), dataset, RECIPE)


# --- correct: a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.THESIS_PLANS)
def test_a_step_changes_every_layer(dataset, name):
    keras.utils.set_random_seed(0)
    model = networks.build(name)
    recipe = RECIPE.replace(batch_size=4, schedule="constant")  # a handful of images: one step is what is looked at
    training.compile_model(model, recipe, 1)
    before = model.get_weights()
    batches = augmentation.batches(dataset.test, recipe, 0, augmentation.channel_statistics(dataset), 100)
    row = training.fit_epoch(model, batches, 1)
    assert row["epoch"] == 1 and 3 < row["cross_entropy"] < 7  # ln 100 = 4.6 for a network that knows nothing
    for weight, old, new in zip(model.weights, before, model.get_weights(), strict=True):
        assert np.isfinite(new).all(), weight.path
        if not weight.path.endswith("bias"):  # a bias before a normalisation has no effect, and no gradient
            assert not np.array_equal(old, new), weight.path


@pytest.mark.parametrize("momentum, smoothing", [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1)])
def test_steps_are_those_of_gradient_descent(dataset, momentum, smoothing):
    """Three steps of SGD with Nesterov's momentum on a linear softmax, whose gradient is known."""
    model, rate = linear(), 1e-3
    changes = {"learning_rate": rate, "momentum": momentum, "label_smoothing": smoothing}
    recipe = dataclasses.replace(RECIPE, schedule="constant", **changes)
    training.compile_model(model, recipe, 3)
    batches = list(augmentation.batches(dataset.train, recipe, 0, augmentation.channel_statistics(dataset), 100))
    start = weights = [weight.astype("float64") for weight in model.get_weights()]
    velocities = [0.0, 0.0]
    for images, labels in batches:
        flat = images.reshape(len(images), -1).astype("float64")
        scores = flat @ weights[0] + weights[1]
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        error = powers / powers.sum(axis=1, keepdims=True) - (labels * (1 - smoothing) + smoothing / 100)
        gradients = flat.T @ error / len(flat), error.mean(axis=0)
        velocities = [momentum * v - rate * g for v, g in zip(velocities, gradients, strict=True)]
        weights = [w + momentum * v - rate * g for w, v, g in zip(weights, velocities, gradients, strict=True)]
    training.fit_epoch(model, (batch for batch in batches), len(batches))
    for found, expected, old in zip(model.get_weights(), weights, start, strict=True):
        np.testing.assert_allclose((found - old) / rate, (expected - old) / rate, rtol=1e-3, atol=1e-4)


def test_a_long_gradient_is_shortened_to_the_norm_of_the_recipe(dataset):
    """One step of SGD at rate 1 moves the weights by the clipped gradient."""
    images = np.random.default_rng(0).standard_normal((20, 32, 32, 3)).astype("float32")
    labels = np.eye(100, dtype="float32")[np.arange(20)]
    moved = {}
    for clip in (0.0, 0.1, 1e5):
        model = linear()
        before = model.get_weights()
        training.compile_model(
            model, RECIPE.replace(learning_rate=1.0, momentum=0.0, schedule="constant", clip_norm=clip), 1
        )
        model.train_on_batch(images, labels)
        moved[clip] = [new - old for new, old in zip(model.get_weights(), before, strict=True)]
    length = {clip: np.sqrt(sum(np.sum(change**2) for change in changes)) for clip, changes in moved.items()}
    assert length[0.1] == pytest.approx(0.1, rel=1e-4) and length[0.0] > 1
    assert all(np.allclose(a, b) for a, b in zip(moved[0.0], moved[1e5], strict=True))
    assert all(np.allclose(a * 0.1 / length[0.0], b, atol=1e-5) for a, b in zip(moved[0.0], moved[0.1], strict=True))


def test_a_teacher_has_its_share_of_the_target(dataset):
    """One step on the mixed target, against the target mixed by hand."""
    recipe = RECIPE.replace(epochs=1, batch_size=200, distillation=0.3)
    model, teacher = linear(1), linear(2)
    with pytest.raises(ValueError, match="has a share of distillation, 0.3: give a teacher"):
        training.train(model, dataset, recipe)
    (batch,) = augmentation.batches(dataset.everything, recipe, 0, augmentation.channel_statistics(dataset), 100)
    expected = linear(1)
    training.compile_model(expected, recipe, 1)
    expected.train_on_batch(batch[0], 0.7 * batch[1] + 0.3 * by_hand(teacher, batch[0]).astype("float32"))
    training.train(model, dataset, recipe, teacher=teacher)
    pairs = list(zip(model.get_weights(), expected.get_weights(), linear(1).get_weights(), strict=True))
    assert all(np.allclose(ours, theirs, atol=1e-6) for ours, theirs, _ in pairs)
    assert not all(np.allclose(ours, before, atol=1e-6) for ours, _, before in pairs)


def test_a_record_from_before_a_setting_was_there_is_the_default_of_that_setting(dataset, done, monkeypatch):
    path = next(iter(records.output().glob("results/**/seed0.json")))
    record = json.loads(path.read_text())
    del record["recipe"]["distillation"], record["recipe"]["clip_norm"]
    path.write_text(json.dumps(record))
    monkeypatch.setattr(training, "fit_epoch", None)
    assert training.train(network(), dataset, RECIPE)["test"] == record["test"]
    with pytest.raises(ValueError, match="another recipe, clip_norm"):
        training.train(network(), dataset, dataclasses.replace(RECIPE, clip_norm=1.0))


@pytest.mark.parametrize(
    "optimizer, kind",
    [("sgd", keras.optimizers.SGD), ("adam", keras.optimizers.Adam), ("rmsprop", keras.optimizers.RMSprop)],
)
def test_the_optimizer_is_the_recipes(optimizer, kind):
    model = linear()
    training.compile_model(model, RECIPE.replace(optimizer=optimizer, schedule="constant"), 1)
    assert type(model.optimizer) is kind
    np.testing.assert_allclose(float(model.optimizer.learning_rate), 0.05, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
def test_weight_decay_takes_its_share_of_the_kernels_and_of_nothing_else(optimizer):
    """Where the gradient is zero, a step at rate 0.5 leaves a kernel 1 - 0.5 × 0.2 of what it was."""
    inputs = keras.Input((4, 4, 3))
    x = keras.layers.SeparableConv2D(2, 3)(inputs)
    x = keras.layers.BatchNormalization()(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    for weight in model.weights:
        weight.assign(keras.ops.ones(weight.shape))
    recipe = RECIPE.replace(optimizer=optimizer, schedule="constant", learning_rate=0.5, weight_decay=0.2, momentum=0.0)
    training.compile_model(model, recipe, 1)
    model.optimizer.build(model.trainable_variables)
    zeros = [keras.ops.zeros(weight.shape) for weight in model.trainable_variables]
    model.optimizer.apply(zeros, model.trainable_variables)
    for weight in model.trainable_variables:
        expected = 0.9 if "kernel" in weight.name else 1.0
        np.testing.assert_allclose(keras.ops.convert_to_numpy(weight), expected, rtol=1e-5, err_msg=weight.path)


def test_figures_of_an_epoch_are_means_over_its_images(dataset):
    """With rate 0 the network stays as it is, and an epoch's figures can be computed afterwards."""
    recipe = RECIPE.replace(learning_rate=0, label_smoothing=0.2, epochs=1, batch_size=60)
    model = linear()
    record = training.train(model, dataset, recipe, seed=5)
    batches = list(
        augmentation.batches(
            dataset.everything, recipe.replace(seed=5), 0, augmentation.channel_statistics(dataset), 100
        )
    )
    assert len(batches) == 3
    images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    logs = np.log(by_hand(model, images))
    fine, row = labels.argmax(axis=1), record["epochs"][0]
    np.testing.assert_allclose(row["cross_entropy"], -(labels * logs).sum(axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose(row["loss"], -((0.8 * labels + 0.2 / 100) * logs).sum(axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose(row["top1"], top(logs, fine, 1).mean(), atol=1e-6)
    np.testing.assert_allclose(row["top5"], top(logs, fine, 5).mean(), atol=1e-6)


# --- correct: the schedule ---------------------------------------------------------------------------------------


def rates(recipe, steps):
    """Learning rate at each step of a run, as its optimizer has it."""
    model = linear()
    training.compile_model(model, recipe, steps)
    found = []
    for step in range(recipe.epochs * steps + 1):
        model.optimizer.iterations.assign(step)
        found.append(float(model.optimizer.learning_rate))
    return found


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5, 1.0])
def test_one_cycle_goes_up_a_line_and_down_half_a_cosine(warmup):
    recipe = dataclasses.replace(RECIPE, epochs=2, warmup=warmup, learning_rate=0.2)
    steps, peak = 20, round(20 * warmup)
    expected = [
        0.2 * step / peak if step < peak else 0.1 * (1 + np.cos(np.pi * (step - peak) / max(1, steps - peak)))
        for step in range(steps + 1)
    ]
    assert expected[peak] == 0.2 and (warmup == 0 or expected[0] == 0) and (warmup == 1 or expected[-1] == 0)
    np.testing.assert_allclose(rates(recipe, 10), expected, rtol=1e-5, atol=1e-7)


def test_cycles_go_through_it_again_and_again():
    once, thrice = (RECIPES["fast"].replace(epochs=2 * cycles, cycles=cycles) for cycles in (1, 3))
    one_after_another = np.tile(rates(once, 10)[:-1], 3)  # the last is that of a step that is not made
    np.testing.assert_allclose(rates(thrice, 10)[:-1], one_after_another, rtol=1e-6)


def test_a_constant_rate_is_constant():
    np.testing.assert_allclose(rates(RECIPE.replace(schedule="constant", epochs=2), 3), [0.05] * 7, rtol=1e-6)


def test_an_inverse_time_rate_falls_as_its_formula_says():
    """0.5 / (1 + 0.5 / 2 × step): half of it after 4 steps, a third after 8."""
    found = rates(RECIPE.replace(schedule="inverse_time", epochs=2, learning_rate=0.5), 4)
    np.testing.assert_allclose(np.array(found)[[0, 4, 8]], [0.5, 0.25, 0.5 / 3], rtol=1e-6)


# --- correct: evaluation -----------------------------------------------------------------------------------------


def test_evaluation_is_what_is_computed_by_hand(dataset):
    """On labels of which half are what the network thinks likeliest: it is right often, and wrong often."""
    model, scale, rng = linear(seed=3), augmentation.channel_statistics(dataset), np.random.default_rng(0)
    images = dataset.train.images
    probabilities = by_hand(model, (images.astype("float64") - scale[0]) / scale[1])
    fine = np.where(rng.random(len(images)) < 0.5, probabilities.argmax(axis=1), rng.integers(0, 100, len(images)))
    split = data.Split(images, fine, fine // 5)
    right, near = top(probabilities, fine, 1), top(probabilities, fine, 5)
    assert 50 < right.sum() < near.sum() < len(split) - 50

    found = training.evaluate(model, split, scale, dataset.coarse_names)
    np.testing.assert_allclose(found["loss"], -np.log(probabilities[np.arange(len(fine)), fine]).mean(), rtol=1e-4)
    assert (found["images"], found["top1"], found["top5"]) == (len(split), right.mean(), near.mean())
    assert found["correct_by_class"] == [int(right[fine == label].sum()) for label in range(100)]
    present = [label for label in range(20) if (split.coarse == label).any()]
    assert found["top1_by_superclass"] == {
        dataset.coarse_names[label]: right[split.coarse == label].mean() for label in present
    }


def test_a_network_that_cannot_choose_is_right_by_chance(dataset):
    """All classes equally likely, as when every ReLU is dead: one of a hundred is right, not each."""
    model = linear()
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    found = training.evaluate(model, dataset.test, augmentation.channel_statistics(dataset), dataset.coarse_names)
    np.testing.assert_allclose(found["loss"], np.log(100), rtol=1e-6)
    assert (found["top1"], found["top5"], sum(found["correct_by_class"])) == (0.01, 0.05, 1)


def test_a_network_of_no_numbers_is_never_right(dataset):
    model = linear()
    model.set_weights([np.full_like(weight, np.nan) for weight in model.get_weights()])
    found = training.evaluate(model, dataset.test, augmentation.channel_statistics(dataset), dataset.coarse_names)
    assert (found["top1"], found["top5"], sum(found["correct_by_class"])) == (0, 0, 0)


def test_a_recipe_that_chooses_settings_is_validated_and_never_tested(dataset):
    model, recipe = network(), RECIPE.replace(train_on="train", epochs=1)
    record = training.train(model, dataset, recipe)
    assert record["train_images"] == 180
    scale = augmentation.channel_statistics(dataset)
    assert record["epochs"][0]["validation"] == training.evaluate(
        model, dataset.validation, scale, dataset.coarse_names
    )
    assert record["test"] is None


def test_predictions_are_kept_after_every_cycle_and_are_what_the_network_says(dataset, output):
    recipe = RECIPE.replace(epochs=4, cycles=2, train_on="train")
    model = network()
    record = training.train(model, dataset, recipe, save_predictions=True)
    said = predictions.load(dataset.name, "tiny", recipe.name)
    assert said["validation"].shape == (2, 20, 100) and said["test"].shape == (2, 100, 100)
    for split in said:  # the last are those of the network as it is left
        exact = training.predict(model, getattr(dataset, split), augmentation.channel_statistics(dataset))
        np.testing.assert_allclose(said[split][-1], predictions.decoded(predictions.coded(exact)), rtol=1e-6)
        assert not np.allclose(said[split][0], said[split][-1], rtol=0.1)
    right = said["test"][-1].argmax(axis=1) == dataset.test.fine
    assert record["test"]["top1"] == right.mean() and record["epochs"][-1]["validation"]["images"] == 20


def test_what_was_trained_on_is_not_among_the_predictions(dataset, output):
    training.train(network(), dataset, RECIPE, save_predictions=True)
    assert list(predictions.load(dataset.name, "tiny", RECIPE.name)) == ["test"]


def test_a_run_without_the_predictions_that_are_asked_for_is_an_error(dataset, done, monkeypatch):
    monkeypatch.setattr(training, "fit_epoch", never)
    with pytest.raises(ValueError, match="its predictions were not kept: pass retrain=True to replace it"):
        training.train(network(), dataset, RECIPE, save_predictions=True)


def test_an_interrupted_run_has_the_predictions_of_one_that_was_not(dataset, output, monkeypatch):
    recipe = RECIPE.replace(epochs=4, cycles=2)
    training.train(network(), dataset, recipe, save_predictions=True)
    whole = predictions.load(dataset.name, "tiny", recipe.name)["test"]
    shutil.rmtree(output)
    stop_at(monkeypatch, checkpoints, "save", 4)  # what the last cycle says is kept already
    with pytest.raises(KeyboardInterrupt):
        training.train(network(), dataset, recipe, save_predictions=True)
    training.train(network(), dataset, recipe, save_predictions=True)
    again = predictions.load(dataset.name, "tiny", recipe.name)["test"]
    assert again.shape == whole.shape and np.isclose(again, whole, rtol=0.02).mean() > 0.98  # a step is 20% and more
    assert not list(output.rglob("*partial*"))


def test_a_network_by_name_starts_as_its_recipe_says(dataset):
    """At rate 0 it stays as it starts, and its scores are three times what they are with a scale of 1."""
    still = RECIPE.replace(epochs=1, learning_rate=0, initialization="he")
    for scale in (1.0, 3.0):
        training.train("wider_separable", dataset, still.replace(head_scale=scale), save_model=True)
    names = [still.name, still.replace(head_scale=3.0).name]
    one, three = (training.load_trained("wider_separable", dataset.name, name) for name in names)
    keras.utils.set_random_seed(RECIPE.seed)
    fresh = networks.build("wider_separable", initialization="he", head_scale=3.0)
    for weights, expected in ((three, fresh), (one, three)):
        for ours, theirs in zip(weights.weights, expected.weights, strict=True):
            if "moving" not in ours.name and (weights is three or "bn6/gamma" not in ours.path):
                np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(three.get_layer("bn6").gamma, 3 * one.get_layer("bn6").gamma)


def test_a_network_of_another_width_is_another_run(dataset):
    recipe = RECIPE.replace(epochs=1)
    runs = [training.train("wider_separable", dataset.subset(100, 50), recipe, width=width) for width in (0.05, 0.06)]
    assert [run["model"] for run in runs] == ["wider_separable-width0.05", "wider_separable-width0.06"]
    built = [cost.total_costs(networks.build("wider_separable", width=width)) for width in (0.05, 0.06)]
    assert [run["params"] for run in runs] == [totals["params"] for totals in built]
    for model, name in ((network(), None), ("wider_separable", "mine")):
        with pytest.raises(ValueError, match="width is for a network that is given, and recorded, by its own name"):
            training.train(model, dataset, recipe, width=0.5, name=name)


# --- correct: networks that are made when they are needed ---------------------------------------------------------


def test_a_function_makes_the_network_only_where_there_is_no_record(dataset):
    made = []

    def make(seed):
        made.append(seed)
        return network(seed)

    first = training.train(make, dataset, RECIPE.replace(epochs=1), 3, name="made")
    second = training.train(make, dataset, RECIPE.replace(epochs=1), 3, name="made")
    direct = training.train(network(3), dataset, RECIPE.replace(epochs=1), 3)
    assert made == [3] and first["model"] == "made" and second["test"] == first["test"] == direct["test"]
    for model, name in ((make, None), (3, "three"), (None, None)):
        with pytest.raises(
            ValueError, match="model must be a network's name, a built keras.Model, or a function and a"
        ):
            training.train(model, dataset, RECIPE, name=name)


# --- correct: records of earlier runs ----------------------------------------------------------------------------


def test_a_run_that_was_made_is_read(dataset, whole, done, monkeypatch, capsys):
    monkeypatch.setattr(training, "fit_epoch", never)
    model = network(seed=9)
    before = model.get_weights()
    assert training.train(model, dataset, RECIPE) == {"schema": records.SCHEMA} | whole[1]
    assert f"read from {done}" in capsys.readouterr().out
    training.train(model, dataset, RECIPE, quiet=True)
    assert not capsys.readouterr().out
    for weight, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)


def test_a_run_of_the_project_is_read_where_there_is_no_nearer_one(dataset, whole, project, monkeypatch):
    shutil.copytree(whole[2] / "results", project / "results")
    monkeypatch.setattr(training, "fit_epoch", never)
    assert training.train(network(), dataset, RECIPE)["test"] == whole[1]["test"]


def test_retraining_replaces_the_record(dataset, whole, done):
    record = json.loads(done.read_text())
    done.write_text(json.dumps(record | {"test": record["test"] | {"top1": 0.123}}))
    assert training.train(network(), dataset, RECIPE)["test"]["top1"] == 0.123
    model = network()
    again = training.train(model, dataset, RECIPE, retrain=True)
    assert_same_run(model, again, whole)
    assert json.loads(done.read_text()) == {"schema": records.SCHEMA} | again
    assert files(done.parent) == ["seed0.json"]


def test_another_seed_is_another_run(dataset, whole, done, monkeypatch):
    epochs = watched(monkeypatch)
    record = training.train(network(), dataset, RECIPE.replace(epochs=1), seed=1)
    assert epochs == [0] and record["seed"] == record["recipe"]["seed"] == 1
    assert record["epochs"][0]["loss"] != whole[1]["epochs"][0]["loss"]


@pytest.mark.parametrize("setting, value", [("learning_rate", 0.06), ("shift", 0), ("epochs", 4)])
def test_other_settings_under_the_same_name_are_an_error(dataset, done, monkeypatch, setting, value):
    monkeypatch.setattr(training, "fit_epoch", never)
    with pytest.raises(ValueError, match=f"another recipe, {setting}; pass retrain=True to replace it") as error:
        training.train(network(), dataset, dataclasses.replace(RECIPE, **{setting: value}))
    assert str(done) in str(error.value)


def test_other_data_under_the_same_name_are_an_error(dataset, done, monkeypatch):
    monkeypatch.setattr(training, "fit_epoch", never)
    with pytest.raises(ValueError, match="another fingerprint; pass retrain=True"):
        training.train(network(), dataclasses.replace(dataset, fingerprint="0" * 64), RECIPE)


# --- correct: interrupted runs -----------------------------------------------------------------------------------


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
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(dataset, whole, output, monkeypatch, where, name, call, left):
    with monkeypatch.context() as patch:
        stop_at(patch, where, name, call)
        with pytest.raises(KeyboardInterrupt):
            training.train(network(), dataset, RECIPE)
    assert records.lookup("standin-200", "tiny", RECIPE.name, 0) == (None, None)
    epochs = watched(monkeypatch)
    model = network()
    if len(left) < 3:  # other weights to start from: those of the checkpoint count
        model.set_weights([weight + 1 for weight in model.get_weights()])
    record = training.train(model, dataset, RECIPE)
    assert epochs == left
    assert_same_run(model, record, whole)
    assert files(output) == ["seed0.json"]


def test_an_interrupted_run_keeps_what_it_has(dataset, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, training, "fit_epoch", 3)
        with pytest.raises(KeyboardInterrupt):
            training.train(network(), dataset, RECIPE)
    found = records.find(status="running")
    assert found["epochs"].tolist() == [2] and found["path"].iloc[0].endswith("seed0.partial.json")
    capsys.readouterr()
    training.train(network(), dataset, RECIPE)
    assert "going on after epoch 2" in capsys.readouterr().out


def test_a_network_with_dropout_goes_on_as_if_it_had_not_been_interrupted(dataset, tmp_path, monkeypatch):
    """Dropout draws from a state of its own, which belongs to a checkpoint too."""

    def make():
        return network(extra=[layers.Dropout(0.5)])

    expected = run(tmp_path / "whole", make, dataset)
    with monkeypatch.context() as patch:
        stop_at(patch, training, "fit_epoch", 2)
        with pytest.raises(KeyboardInterrupt):
            training.train(make(), dataset, RECIPE)
    model = make()
    assert_same_run(model, training.train(model, dataset, RECIPE), expected)


def test_a_run_with_a_damaged_checkpoint_starts_anew(dataset, whole, output, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, training, "fit_epoch", 2)
        with pytest.raises(KeyboardInterrupt):
            training.train(network(), dataset, RECIPE)
    (path,) = output.rglob("*.checkpoint.npz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    epochs, model = watched(monkeypatch), network()
    record = training.train(model, dataset, RECIPE)
    assert epochs == [0, 1, 2]
    assert f"{path} is damaged" in capsys.readouterr().out
    assert_same_run(model, record, whole)


# --- correct: a loss that is not finite --------------------------------------------------------------------------


def test_a_network_of_no_numbers_stops_at_once(dataset, output):
    model = network()
    model.set_weights([np.full_like(weight, np.nan) for weight in model.get_weights()])
    with pytest.raises(training.Diverged, match="the loss is nan at epoch 1, step 1: try a lower learning rate"):
        training.train(model, dataset, RECIPE)
    assert records.find(status="diverged")["epochs"].tolist() == [0]


def test_a_run_that_diverges_later_keeps_its_epochs(dataset, whole, monkeypatch):
    original = augmentation.batches

    def batches(split, recipe, epoch, scale, classes):
        for step, (images, labels) in enumerate(original(split, recipe, epoch, scale, classes)):
            yield images, (np.full_like(labels, np.nan) if (epoch, step) == (1, 2) else labels)

    with monkeypatch.context() as patch:
        patch.setattr(training.feed, "batches", batches)
        with pytest.raises(training.Diverged, match="epoch 2, step 3"):
            training.train(network(), dataset, RECIPE)
    (record,) = records.find(status="diverged")["record"]
    assert [row["epoch"] for row in record["epochs"]] == [1]
    assert records.lookup("standin-200", "tiny", RECIPE.name, 0) == (None, None)
    model = network()
    assert_same_run(model, training.train(model, dataset, RECIPE), whole)  # it goes on after its first epoch
    assert len(records.find(status="diverged")) == 0


@pytest.mark.parametrize("ruined", ["all weights", "the first kernel"])
def test_a_network_that_the_last_step_ruined_is_no_complete_run(dataset, monkeypatch, ruined):
    """The loss is that before a step, and a ReLU may make 0 of what is not a number: the weights tell."""
    original = training.fit_epoch

    def fit_epoch(model, *arguments):
        row = original(model, *arguments)
        if row["epoch"] == 3:
            for weight in model.weights if ruined == "all weights" else model.weights[:1]:
                weight.assign(np.full(weight.shape, np.nan))
        return row

    monkeypatch.setattr(training, "fit_epoch", fit_epoch)
    with pytest.raises(training.Diverged):
        training.train(network(), dataset, RECIPE)
    assert records.lookup("standin-200", "tiny", RECIPE.name, 0) == (None, None)
    assert records.find(status="diverged")["epochs"].iloc[0] >= 2


# --- correct: by name, and the network that is kept --------------------------------------------------------------


def test_a_network_by_name_is_built_from_the_seed_and_kept(dataset):
    small = dataset.subset(20, 20)  # the real network on few images, as its steps are slow
    recipe = RECIPE.replace(epochs=1, batch_size=10, precision="mixed_bfloat16")
    record = training.train("wider_separable", small, recipe, seed=2, save_model=True)
    assert (record["model"], record["seed"], record["precision"]) == ("wider_separable", 2, "mixed_bfloat16")
    assert (record["params"], record["trainable"]) == thesis.PARAMS["wider_separable"][:2]
    kept = training.load_trained("wider_separable", "standin-20", recipe.name, 2)
    assert not kept.compiled
    found = training.evaluate(kept, small.test, augmentation.channel_statistics(small), small.coarse_names)
    np.testing.assert_allclose(found["loss"], record["test"]["loss"], rtol=1e-5)
    assert found["correct_by_class"] == record["test"]["correct_by_class"]
    folder = records.path_of("standin-20", "wider_separable", recipe.name, 2).parent
    assert files(folder) == ["seed2.json", "seed2.keras"]
    keras.utils.set_random_seed(2)
    fresh, rate = networks.build("wider_separable"), RECIPE.learning_rate
    for weight, start, end in zip(kept.weights, fresh.get_weights(), kept.get_weights(), strict=True):
        if weight.path.endswith("kernel"):  # two steps from the weights of the seed, and not from others
            assert 0 < np.abs(end - start).max() < rate


def test_any_network_can_be_kept(dataset):
    model = network()
    training.train(model, dataset, RECIPE.replace(epochs=1), save_model=True)
    kept = training.load_trained("tiny", "standin-200", RECIPE.replace(epochs=1).name)
    for weight, other in zip(kept.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other)


def test_a_network_that_was_not_kept_is_none(done):
    assert training.load_trained("tiny", "standin-200", RECIPE.name) is None


def test_a_kept_network_is_found_in_the_project(project, output):
    for folder, seed in ((project, 1), (output, 2)):
        path = records.path_of("standin", "tiny", "fast", 0, folder / "results").with_suffix(".keras")
        path.parent.mkdir(parents=True)
        model = network(seed=seed)
        model.save(path)
        loaded = training.load_trained("tiny", "standin", "fast")  # the nearer one, once it is there
        np.testing.assert_array_equal(loaded.get_weights()[0], model.get_weights()[0])
