"""Training without files: `fcnn_utils.course.training`, compared with formulas in double precision."""

import inspect

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers

from fcnn_utils import fine_tuning
from fcnn_utils.course import augmentation, data, feeding, networks, training
from fcnn_utils.course.recipes import RECIPES

RECIPE = RECIPES["fast"].replace(epochs=3, batch_size=20, precision="float32", learning_rate=0.05)
PLAIN = RECIPE.replace(schedule="constant", label_smoothing=0.0, momentum=0.0)


@pytest.fixture(scope="module")
def scale(dataset):
    return augmentation.channel_statistics(dataset)


def linear(seed=0):
    """A softmax of a linear map, which can be computed by hand."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(10, activation="softmax")])


def softmax(images, kernel, bias):
    """Class probabilities of `linear`, in double precision."""
    scores = images.reshape(len(images), -1).astype("float64") @ kernel.astype("float64") + bias.astype("float64")
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def top(probabilities, labels, count):
    """(N,) whether the label is among the `count` most probable classes."""
    return (np.argsort(-probabilities, axis=1, kind="stable")[:, :count] == labels[:, None]).any(axis=1)


def assert_equal_weights(model, other, **tolerance):
    for weight, expected in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, **tolerance)


def stop():
    raise KeyboardInterrupt


def with_nan(model, count=None):
    """Set the first `count` weights of the model to nan (default: all)."""
    for weight in model.weights[:count]:
        weight.assign(np.full(weight.shape, np.nan))
    return model


# --- fit ---------------------------------------------------------------------------------------------------------


def test_fit_yields_a_row_per_epoch_and_validates_if_settings_are_chosen(dataset, scale):
    model, again, figures = linear(), linear(), {"loss", "cross_entropy", "top1", "top5"}
    rows = training.fit(model, dataset, RECIPE.replace(train_on="train"))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        times = {"seconds", "ms_per_step", "first_step_ms", "background_load"}
        assert row.keys() == {"epoch", "validation"} | figures | times
        assert 0 <= row["top1"] <= row["top5"] <= 1 and 0 <= row["background_load"] <= 1
        assert row["ms_per_step"] > 0 and 0 < row["first_step_ms"] <= 1e3 * row["seconds"]
    final = training.evaluate(model, dataset.validation, scale, dataset.coarse_names)
    assert rows[-1]["validation"] == final != rows[0]["validation"]
    assert final["images"] == 20 and final["top1_by_superclass"].keys() == {"low", "high"}
    pair = (dataset.train, dataset.validation)  # the same training, whatever the recipe trains on
    losses = [row["validation"]["loss"] for row in training.fit(again, pair, RECIPE)]
    assert losses == pytest.approx([row["validation"]["loss"] for row in rows], rel=1e-5)
    assert_equal_weights(again, model, rtol=1e-5, atol=1e-6)


def test_fit_continues_from_the_first_epoch_that_is_asked_for(dataset):
    whole, parts = linear(), linear()
    rows = training.fit(whole, dataset, RECIPE)
    assert len(rows) == 3 and "validation" not in rows[0]
    stopped = []
    with pytest.raises(KeyboardInterrupt):
        training.fit(parts, dataset, RECIPE, on_epoch=lambda row: stopped.append(row) or stop())
    continued = training.fit(parts, dataset, RECIPE, first_epoch=1)
    assert [row["epoch"] for row in stopped + continued] == [1, 2, 3]
    assert_equal_weights(parts, whole, rtol=1e-5, atol=1e-6)
    assert training.fit(parts, dataset, RECIPE, first_epoch=3) == []
    training.fit(parts, dataset, RECIPE)  # from the first epoch on, it starts with a new schedule
    assert float(parts.optimizer.iterations) == 15


@pytest.mark.parametrize("train_on, images", [("all", 100), ("train", 80)])
def test_fit_rejects_a_batch_larger_than_the_data(dataset, train_on, images):
    with pytest.raises(ValueError, match=f"needs at least 101 training images, one batch; got {images}: take more"):
        training.fit(linear(), dataset, RECIPE.replace(batch_size=101, train_on=train_on))


def test_teacher_has_its_share_of_the_target(dataset, scale):
    """One step, compared with one on a target that is mixed by hand."""
    recipe = RECIPE.replace(epochs=1, batch_size=100, distillation=0.3)
    model, teacher, expected = linear(1), linear(2), linear(1)
    with pytest.raises(ValueError, match="share of distillation, 0.3: give a teacher"):
        training.fit(model, dataset, recipe)
    ((images, labels),) = augmentation.batches(dataset.everything, recipe, 0, scale, 10)
    training.compile_model(expected, recipe, 1)
    expected.train_on_batch(images, 0.7 * labels + 0.3 * softmax(images, *teacher.get_weights()).astype("float32"))
    training.fit(model, dataset, recipe, teacher=teacher)
    assert_equal_weights(model, expected, atol=1e-6)
    assert not np.allclose(model.get_weights()[0], linear(1).get_weights()[0], atol=1e-6)


def test_recipe_tune_is_fine_tuning_by_the_library(dataset, scale):
    """With the same images, it makes the same steps; without other settings, it has the same ones."""
    recipe = RECIPES["tune"].replace(epochs=2, batch_size=20, distillation=0.4, label_smoothing=0, precision="float32")
    model, student, teacher = linear(1), linear(1), linear(2)
    training.fit(model, dataset, recipe, teacher=teacher)
    batches = (
        batch for epoch in range(2) for batch in augmentation.batches(dataset.everything, recipe, epoch, scale, 10)
    )
    options = {"epochs": 2, "steps_per_epoch": 5, "distillation": 0.4, "verbose": 0}
    fine_tuning.fine_tune(student, batches, teacher=teacher, **options)
    assert_equal_weights(student, model, atol=1e-5)
    assert not np.allclose(student.get_weights()[0], linear(1).get_weights()[0], atol=1e-4)
    arguments = inspect.signature(fine_tuning.fine_tune).parameters
    for setting in ("epochs", "learning_rate", "warmup", "clip_norm"):
        assert arguments[setting].default == getattr(RECIPES["tune"], setting)
    assert RECIPES["tune"].batch_size == 128 and "default 128" in fine_tuning.fine_tune.__doc__


def test_epoch_figures_are_means_over_its_images(dataset, scale):
    """At rate 0 the network does not change, so the figures can be computed afterwards."""
    recipe = RECIPE.replace(learning_rate=0, label_smoothing=0.2, epochs=1, batch_size=30, seed=5)
    model = linear()
    (row,) = training.fit(model, dataset, recipe)
    batches = list(augmentation.batches(dataset.everything, recipe, 0, scale, 10))
    assert len(batches) == 3
    images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    logs, fine = np.log(softmax(images, *model.get_weights())), labels.argmax(axis=1)
    np.testing.assert_allclose(row["cross_entropy"], -(labels * logs).sum(axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose(row["loss"], -((0.8 * labels + 0.2 / 10) * logs).sum(axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose(row["top1"], top(logs, fine, 1).mean(), atol=1e-6)
    np.testing.assert_allclose(row["top5"], top(logs, fine, 5).mean(), atol=1e-6)


def test_fit_stops_at_the_first_step_with_a_loss_that_is_not_finite(dataset, monkeypatch):
    with pytest.raises(training.Diverged, match="the loss is nan at epoch 1, step 1: try a lower learning rate"):
        training.fit(with_nan(linear()), dataset, RECIPE)
    model, rows, begun = linear(), [], []

    def ruin(batch, logs):
        begun.append(batch)
        if len(begun) == 8:  # the third step of the second epoch
            getattr(model, "jax_state_sync", int)()  # JAX keeps the weights elsewhere during an epoch
            with_nan(model)

    ruining = keras.callbacks.LambdaCallback(on_train_batch_begin=ruin)
    with pytest.raises(training.Diverged, match="epoch 2, step 3"):
        training.fit(model, dataset, RECIPE, on_epoch=rows.append, callbacks=[ruining])
    assert [row["epoch"] for row in rows] == [1]


@pytest.mark.parametrize("ruined", [None, 1], ids=["all weights", "first kernel"])
def test_fit_detects_that_the_last_step_of_an_epoch_diverged(dataset, monkeypatch, ruined):
    """The loss is that before a step, and a ReLU can hide a nan. Therefore the weights are checked."""
    model, original = linear(), training.Epochs.on_epoch_end

    def on_epoch_end(self, epoch, logs=None):
        with_nan(model, ruined)
        original(self, epoch, logs)

    monkeypatch.setattr(training.Epochs, "on_epoch_end", on_epoch_end)
    with pytest.raises(training.Diverged, match="after epoch 1"):
        training.fit(model, dataset, RECIPE)


def test_callbacks_of_fit_see_the_validation_and_a_log_of_each_epoch_is_written(dataset, tmp_path):
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    rows = training.fit(linear(), dataset, RECIPE.replace(train_on="train"), callbacks=[log])
    written = pd.read_csv(tmp_path / "log.csv")
    assert written["epoch"].tolist() == [0, 1, 2]
    for name in ("loss", "top1"):
        np.testing.assert_allclose(written[name], [row[name] for row in rows], rtol=1e-5)
        np.testing.assert_allclose(written[f"val_{name}"], [row["validation"][name] for row in rows], rtol=1e-5)


def test_backup_and_restore_of_keras_continues_as_if_there_had_been_no_stop(dataset, tmp_path):
    whole, rows = linear(), []
    expected = training.fit(whole, dataset, RECIPE)
    for _ in range(2):
        model, backup = linear(), keras.callbacks.BackupAndRestore(tmp_path / "backup")
        stopping = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: epoch == 2 and not rows[2:] and stop()
        )
        try:
            training.fit(model, dataset, RECIPE, callbacks=[backup, stopping], on_epoch=rows.append)
        except KeyboardInterrupt:
            rows.append("stopped")
    assert [row if row == "stopped" else row["epoch"] for row in rows] == [1, 2, "stopped", 3]
    assert rows[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-5)
    assert_equal_weights(model, whole, rtol=1e-5, atol=1e-6)


# --- steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.THESIS_PLANS)
def test_step_changes_every_layer_of_the_thesis_networks(name):
    keras.utils.set_random_seed(0)
    model = networks.build(name, (16, 16, 3), 10, width=0.05)
    training.compile_model(model, PLAIN, 1)
    model.run_eagerly = True  # faster for one step
    before = model.get_weights()
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((4, 16, 16, 3)).astype("float32"), np.eye(10, dtype="float32")[:4]
    figures = model.train_on_batch(*batch, return_dict=True)
    assert 1 < figures["cross_entropy"] < 5  # ln 10 = 2.3 for a network that knows nothing
    for weight, old, new in zip(model.weights, before, model.get_weights(), strict=True):
        assert np.isfinite(new).all(), weight.path
        if not weight.path.endswith("bias"):  # a bias before a batch normalisation has no effect, so no gradient
            assert not np.array_equal(old, new), weight.path


@pytest.mark.parametrize("momentum, smoothing", [(0.0, 0.0), (0.9, 0.1)])
def test_steps_are_those_of_gradient_descent(dataset, scale, momentum, smoothing):
    """Steps of SGD with Nesterov momentum on a linear softmax, whose gradient is known."""
    model, rate = linear(), 1e-3
    recipe = PLAIN.replace(learning_rate=rate, momentum=momentum, label_smoothing=smoothing)
    training.compile_model(model, recipe, 4)
    batches = list(augmentation.batches(dataset.train, recipe, 0, scale, 10))
    start = weights = [weight.astype("float64") for weight in model.get_weights()]
    velocities = [0.0, 0.0]
    for images, labels in batches:
        error = softmax(images, *weights) - (labels * (1 - smoothing) + smoothing / 10)
        gradients = images.reshape(len(images), -1).astype("float64").T @ error / len(images), error.mean(axis=0)
        velocities = [momentum * v - rate * g for v, g in zip(velocities, gradients, strict=True)]
        weights = [w + momentum * v - rate * g for w, v, g in zip(weights, velocities, gradients, strict=True)]
    feeding.Feed(model, dataset.train, recipe, scale).fit(range(1))
    for found, expected, old in zip(model.get_weights(), weights, start, strict=True):
        np.testing.assert_allclose((found - old) / rate, (expected - old) / rate, rtol=1e-3, atol=1e-4)


def test_long_gradient_is_clipped_to_the_norm_of_the_recipe():
    """One step of SGD at rate 1 moves the weights by the clipped gradient."""
    images = 3 * np.random.default_rng(0).standard_normal((10, 8, 8, 3)).astype("float32")
    moved = {}
    for clip in (0.0, 0.1, 1e5):
        model = linear()
        before = model.get_weights()
        training.compile_model(model, PLAIN.replace(learning_rate=1.0, clip_norm=clip), 1)
        model.train_on_batch(images, np.eye(10, dtype="float32"))
        moved[clip] = np.concatenate(
            [(new - old).ravel() for new, old in zip(model.get_weights(), before, strict=True)]
        )
    length = {clip: np.linalg.norm(change) for clip, change in moved.items()}
    assert length[0.1] == pytest.approx(0.1, rel=1e-4) and length[0.0] > 1
    np.testing.assert_allclose(moved[0.0], moved[1e5], atol=1e-6)
    np.testing.assert_allclose(moved[0.0] * 0.1 / length[0.0], moved[0.1], atol=1e-5)


@pytest.mark.parametrize(
    "optimizer, kind",
    [
        ("sgd", keras.optimizers.SGD),
        ("adam", keras.optimizers.Adam),
        ("rmsprop", keras.optimizers.RMSprop),
        ("muon", keras.optimizers.Muon),
    ],
)
def test_optimizer_is_the_recipes_and_decays_kernels_only(optimizer, kind):
    """At a gradient of zero, a step at rate 0.5 leaves 1 - 0.5 × 0.2 of a kernel."""
    inputs = keras.Input((4, 4, 3))
    x = layers.BatchNormalization()(layers.SeparableConv2D(2, 3)(inputs))
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    for weight in model.weights:
        weight.assign(keras.ops.ones(weight.shape))
    training.compile_model(model, PLAIN.replace(optimizer=optimizer, learning_rate=0.5, weight_decay=0.2), 1)
    assert type(model.optimizer).__name__ == kind.__name__ and float(model.optimizer.learning_rate) == 0.5
    model.optimizer.build(model.trainable_variables)
    zeros = [keras.ops.zeros(weight.shape) for weight in model.trainable_variables]
    model.optimizer.apply(zeros, model.trainable_variables)
    for weight in model.trainable_variables:
        expected = 0.9 if "kernel" in weight.name else 1.0
        np.testing.assert_allclose(keras.ops.convert_to_numpy(weight), expected, rtol=1e-5, err_msg=weight.path)


# --- schedules ---------------------------------------------------------------------------------------------------


def rates(recipe, steps):
    """Learning rate at each step of a run, and after it, as the optimizer has it."""
    model, found = linear(), []
    training.compile_model(model, recipe, steps)
    for step in range(recipe.epochs * steps + 1):
        model.optimizer.iterations.assign(step)
        found.append(float(model.optimizer.learning_rate))
    return found


@pytest.mark.parametrize("warmup", [0.0, 0.2, 1.0])
def test_one_cycle_rises_linearly_and_falls_along_half_a_cosine(warmup):
    recipe = RECIPE.replace(epochs=2, warmup=warmup, learning_rate=0.2)
    steps, peak = 20, round(20 * warmup)
    expected = [
        0.2 * step / peak if step < peak else 0.1 * (1 + np.cos(np.pi * (step - peak) / max(1, steps - peak)))
        for step in range(steps + 1)
    ]
    assert expected[peak] == 0.2 and (warmup == 0 or expected[0] == 0) and (warmup == 1 or expected[-1] == 0)
    np.testing.assert_allclose(rates(recipe, 10), expected, rtol=1e-5, atol=1e-7)


def test_cycles_repeat_one_cycle_and_other_rates_follow_their_formulas():
    """Inverse time: 0.5 / (1 + 0.5 / 2 × step), half of it after 4 steps, a third after 8."""
    once, thrice = (RECIPES["fast"].replace(epochs=2 * cycles, cycles=cycles) for cycles in (1, 3))
    np.testing.assert_allclose(rates(thrice, 5)[:-1], np.tile(rates(once, 5)[:-1], 3), rtol=1e-6)
    np.testing.assert_allclose(rates(PLAIN.replace(epochs=2), 3), [0.05] * 7, rtol=1e-6)
    found = rates(RECIPE.replace(schedule="inverse_time", epochs=2, learning_rate=0.5), 4)
    np.testing.assert_allclose(np.array(found)[[0, 4, 8]], [0.5, 0.25, 0.5 / 3], rtol=1e-6)


# --- evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_equals_the_computation_by_hand(dataset, scale):
    """Half of the labels are the network's own predictions, so that it is often right and often wrong."""
    model, rng = linear(seed=3), np.random.default_rng(0)
    images = rng.integers(0, 256, (600, 8, 8, 3), dtype="uint8")  # more than one batch
    probabilities = softmax((images.astype("float64") - scale[0]) / scale[1], *model.get_weights())
    fine = np.where(rng.random(600) < 0.5, probabilities.argmax(axis=1), rng.integers(0, 10, 600))
    split = data.Split(images, fine, np.where(fine < 5, 0, 2))
    right, near = top(probabilities, fine, 1), top(probabilities, fine, 5)
    assert 50 < right.sum() < near.sum() < 550

    np.testing.assert_allclose(training.predict(model, split, scale), probabilities, rtol=1e-3, atol=1e-7)
    found = training.evaluate(model, split, scale, ["low", "absent", "high"])
    np.testing.assert_allclose(found["loss"], -np.log(probabilities[np.arange(600), fine]).mean(), rtol=1e-4)
    assert (found["images"], found["top1"], found["top5"]) == (600, right.mean(), near.mean())
    assert found["correct_by_class"] == [int(right[fine == label].sum()) for label in range(10)]
    assert found["top1_by_superclass"] == {"low": right[fine < 5].mean(), "high": right[fine >= 5].mean()}


def test_network_that_cannot_choose_is_right_by_chance_and_one_with_nan_never(dataset, scale):
    model = linear()
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    found = training.evaluate(model, dataset.test, scale)
    np.testing.assert_allclose(found["loss"], np.log(10), rtol=1e-6)
    assert (found["top1"], found["top5"], sum(found["correct_by_class"])) == (0.1, 0.5, 5)
    found = training.evaluate(with_nan(model), dataset.test, scale)
    assert (found["top1"], found["top5"], sum(found["correct_by_class"])) == (0, 0, 0)
