"""Training by recipe: fit, time, checkpoint, resume, evaluate; the result is a run record.

A recipe is data: everything that decides a run but the network, the images and the seed it is given. `train`
returns the record of that run from disk where it was made before (see `records`), so a course that is read on a
laptop shows the numbers of a machine that had the time; the record tells which machine that was.
"""

import dataclasses
import math
import time

import keras
import numpy as np

from fcnn_utils import _files, benchmark, cost
from fcnn_utils.course import augmentation, checkpoints, environment, networks, predictions, records
from fcnn_utils.course.recipes import get_recipe

_EVALUATION_BATCH = 500


class Diverged(ArithmeticError):
    """The loss was not finite; the record up to there is kept, with status "diverged"."""


def train(
    model,
    dataset,
    recipe,
    seed=None,
    *,
    width=1.0,
    name=None,
    teacher=None,
    retrain=False,
    save_model=False,
    save_predictions=False,
    quiet=False,
):
    """Train `model` on `dataset` by `recipe`, or read the record of the same run where there is one.

    Interrupted at any point and called again, it goes on after the last whole epoch: the order of the images, the
    augmentation and the learning rate of an epoch depend on seed and epoch alone. The record has, beside what was
    trained and where:

        epochs     list of a dict for each epoch, with
            epoch          its number, from 1
            loss           as trained, on the augmented training images
            cross_entropy  without label smoothing, on the same
            top1, top5     shares, on the same
            seconds        of the whole epoch
            ms_per_step    the median without the first step
            first_step_ms  of the first step
            background_load     share of the processor that other programs took
            validation     where the recipe trains on "train": as `test`, on all validation images
        test       dict of `evaluate`, on all test images; None where the recipe trains on "train", unless the
                   predictions are kept
        params     number of weights
        trainable  how many of them are trained
        macs       multiply-adds for one image

    Args:
        model: a name that `networks.build` knows, built here from `seed`; or a built keras.Model, which is trained in
            place and recorded under its own name (and precision); or a function of the seed that makes such a model,
            which is called only where there is no record.
        dataset: `data.Dataset`.
        recipe: `recipes.Recipe`, or the name of one that `recipes` lists.
        seed: starts weights, order and augmentation; default: the recipe's.
        width: factor of the numbers of filters of a network that is given by its name (`networks.build`).
        name: what the record calls the network; default: the model's own name, with the width where that is not 1
            ("simple-width0.6"). A function needs it.
        teacher: keras.Model whose probabilities are a part of the target where the recipe has `distillation`.
        retrain: train anew though there is a record, and replace it. Without it `model` is not trained where there
            is one.
        save_model: also keep the trained network, as `seedN.keras` beside the record.
        save_predictions: also keep what the network says of all test images, and of the validation images where it is
            not trained on them, after each of the recipe's cycles (see `predictions`); and test it in either case.
        quiet: do not say that a record was read.

    Returns:
        The record, a dict (see above and `records`).

    Raises:
        ValueError: bad arguments; a record of the same name but other settings; a file that cannot be written.
        Diverged: the loss was not finite.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    recipe = recipe if seed is None else dataclasses.replace(recipe, seed=seed)
    is_maker = not isinstance(model, (str, keras.Model))
    if is_maker and (name is None or not callable(model)):
        raise ValueError(
            f"model must be a network's name, a built keras.Model, or a function and a name; got {model!r}"
        )
    if width != 1 and (name or not isinstance(model, str)):
        raise ValueError(f"width is for a network that is given, and recorded, by its own name; got {width!r}")
    name = name or (networks.run_name(model, width) if isinstance(model, str) else model.name)
    if not retrain:
        stored = _stored(name, dataset, recipe, quiet)
        if stored:
            if save_predictions and predictions.load(dataset.name, name, recipe.name, recipe.seed) is None:
                raise ValueError(
                    f"{result_line(stored)}; its predictions were not kept: pass retrain=True to replace it"
                )
            return stored
    split = dataset.everything if recipe.train_on == "all" else dataset.train
    if len(split) < recipe.batch_size:
        raise ValueError(f"batch_size must be at most {len(split)}, the training images; got {recipe.batch_size}")
    if recipe.distillation and teacher is None:
        raise ValueError(f"recipe {recipe.name} has a share of distillation, {recipe.distillation}: give a teacher")
    _files.check_writable(records.path_of(dataset.name, name, recipe.name, recipe.seed).parent)

    keras.utils.set_random_seed(recipe.seed)
    shape, classes = dataset.train.images.shape[1:], len(dataset.fine_names)
    if isinstance(model, str):
        starts = {"initialization": recipe.initialization, "head_scale": recipe.head_scale}
        kind = environment.precision(recipe.precision)
        model = networks.build(model, shape, classes, width=width, dtype=kind, **starts)
    elif is_maker:
        model = model(recipe.seed)
        keras.utils.set_random_seed(recipe.seed)
    steps = len(split) // recipe.batch_size  # the rest of the images waits for another epoch's order
    compile_model(model, recipe, steps)
    record = _new_record(model, name, dataset, recipe, len(split))
    record["epochs"] = checkpoints.resume(model, record)

    scale = augmentation.channel_statistics(dataset)
    try:
        for epoch in range(len(record["epochs"]), recipe.epochs):
            batches = augmentation.batches(split, recipe, epoch, scale, classes)
            if recipe.distillation:
                batches = _taught(batches, teacher, recipe.distillation)
            row = fit_epoch(model, batches, steps, epoch)
            if not all(np.isfinite(weight).all() for weight in model.get_weights()):
                _check_finite(float("nan"), f"or soon will be: weights are not finite after epoch {epoch + 1}")
            if recipe.train_on == "train":
                row["validation"] = evaluate(model, dataset.validation, scale, dataset.coarse_names)
                _check_finite(row["validation"]["loss"], f"on the validation images after epoch {epoch + 1}")
            record["epochs"].append(row)
            if save_predictions and len(record["epochs"]) % recipe.epochs_a_cycle == 0:
                kept = ("test",) if recipe.train_on == "all" else ("validation", "test")
                said = {part: predict(model, getattr(dataset, part), scale) for part in kept}
                predictions.keep(record, epoch // recipe.epochs_a_cycle, said)
            checkpoints.save(model, record)
            records.write(record)
            print(progress_line(record, row), flush=True)
        if recipe.train_on == "all" or save_predictions:
            record["test"] = evaluate(model, dataset.test, scale, dataset.coarse_names)
            _check_finite(record["test"]["loss"], "on the test images after the last epoch")
    except Diverged:
        records.write(record | {"status": "diverged", "test": None})
        raise
    record["status"] = "complete"
    if save_model:
        checkpoints.keep(model, record)
    if save_predictions:
        predictions.finish(record)
    path = records.write(record)
    for left_over in ("checkpoint.npz", "partial.json"):
        checkpoints.file_of(record, left_over).unlink(missing_ok=True)
    print(f"{result_line(record)}; record in {records.shown(path)}", flush=True)
    return record


def fit_epoch(model, batches, steps, epoch=0):
    """Fit a compiled `model` to one epoch of `steps` batches, and time it; a dict as `train` describes it.

    Step by step and not by `fit`: on TensorFlow 2.21 each `fit` or `predict` ends with a wait for the autotuner of
    tf.data, which wakes 10, 20, 40, … ms after the start, so that a call may take twice its time.

    Args:
        model: compiled (`compile_model`).
        batches: iterable of (images, one-hot labels), as from `augmentation.batches`.
        steps: how many of them.
        epoch: number of the epoch, from 0.

    Raises:
        Diverged: the loss was not finite.
    """
    load, times, rows = benchmark.BackgroundLoad(), [time.perf_counter()], []
    for step, (images, labels) in zip(range(1, steps + 1), batches, strict=False):
        rows.append(model.train_on_batch(images, labels, return_dict=True))
        times.append(time.perf_counter())
        _check_finite(rows[-1]["loss"], f"at epoch {epoch + 1}, step {step}")
    step_times = np.diff(times) * 1e3
    return {
        "epoch": epoch + 1,
        **{key: float(np.mean([row[key] for row in rows])) for key in rows[0]},  # all batches are of one size
        "seconds": round(times[-1] - times[0], 3),
        "ms_per_step": round(float(np.median(step_times[1:] if steps > 1 else step_times)), 3),
        "first_step_ms": round(float(step_times[0]), 3),
        "background_load": round(load.share(), 4),
    }


def predict(model, split, scale):
    """Probabilities (N, classes) float64 that `model` gives the images of `split`, normalised by `scale`."""
    images = augmentation.normalize(split.images, scale)
    parts = [images[start : start + _EVALUATION_BATCH] for start in range(0, len(images), _EVALUATION_BATCH)]
    return np.concatenate([model.predict_on_batch(part) for part in parts]).astype("float64")


def evaluate(model, split, scale, coarse_names):
    """How well `model` does on all images of `split`, normalised by `scale` (`augmentation.channel_statistics`).

    Returns:
        Dict of the cross-entropy `loss`, the shares `top1` and `top5`, the number of `images`, `correct_by_class`
        (a number for each class) and `top1_by_superclass` (a share for each of `coarse_names`).
    """
    probabilities = predict(model, split, scale)
    own = probabilities[np.arange(len(split)), split.fine]
    # Classes before the right one: the likelier ones, and of equally likely ones those with a lower label.
    ties = (probabilities == own[:, None]) & (np.arange(probabilities.shape[1]) < split.fine[:, None])
    rank = ((probabilities > own[:, None]) | ties).sum(axis=1)
    rank[~np.isfinite(own)] = probabilities.shape[1]  # what is not a number is not a guess
    shares = {name: rank[split.coarse == label] < 1 for label, name in enumerate(coarse_names)}
    return {
        "images": len(split),
        "loss": float(-np.log(np.maximum(own, 1e-12)).mean()),
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "correct_by_class": np.bincount(split.fine[rank < 1], minlength=probabilities.shape[1]).tolist(),
        "top1_by_superclass": {name: float(right.mean()) for name, right in shares.items() if len(right)},
    }


def load_trained(model, dataset, recipe, seed=0):
    """The network that a run left with `save_model`, ready to predict; None where there is none.

    Args:
        model: name of the network, as in the run's record, "simple-width0.6".
        dataset: name of the data set there.
        recipe: name of the recipe there, "fast-epochs2".
        seed: of the run.
    """
    for folder in records.folders():
        path = records.path_of(dataset, model, recipe, seed, folder).with_suffix(".keras")
        if path.exists():
            return keras.saving.load_model(path, compile=False)
    return None


def learning_rate_schedule(recipe, steps):
    """Learning rate of `recipe` with `steps` steps an epoch: a number, or a Keras schedule (a function of the step)."""
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if recipe.schedule == "inverse_time":
        decay = recipe.learning_rate / recipe.epochs
        return keras.optimizers.schedules.InverseTimeDecay(recipe.learning_rate, decay_steps=1, decay_rate=decay)
    cycle = recipe.epochs_a_cycle * steps
    warmup = round(recipe.warmup * cycle)
    once = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, cycle - warmup), warmup_target=recipe.learning_rate, warmup_steps=warmup
    )
    return once if recipe.cycles == 1 else _Repeated(once, cycle)


def compile_model(model, recipe, steps):
    """Compile `model` in place: the optimizer of `recipe`, with its schedule for `steps` steps an epoch, cross-entropy,
    top-1 and top-5."""
    options = {"global_clipnorm": recipe.clip_norm or None, "weight_decay": recipe.weight_decay or None}
    if recipe.optimizer == "sgd":
        options |= {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
    kinds = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam, "rmsprop": keras.optimizers.RMSprop}
    optimizer = kinds[recipe.optimizer](learning_rate_schedule(recipe, steps), **options)
    if recipe.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=[
            keras.metrics.CategoricalCrossentropy(name="cross_entropy"),
            keras.metrics.CategoricalAccuracy(name="top1"),
            keras.metrics.TopKCategoricalAccuracy(5, name="top5"),
        ],
        # XLA pays on a GPU; on a CPU TensorFlow's own kernels are faster than its.
        jit_compile=keras.config.backend() == "jax"
        or (keras.config.backend() == "tensorflow" and environment.gpu() is not None),
    )


def progress_line(record, row):
    """One epoch of a run, in one line."""
    validation = f" · validation {row['validation']['top1']:.1%}" if "validation" in row else ""
    return (
        f"{record['model']} · {record['recipe']['name']} · epoch {row['epoch']}/{record['recipe']['epochs']}"
        f" · loss {row['loss']:.3f} · top-1 {row['top1']:.1%} · top-5 {row['top5']:.1%}{validation}"
        f" · {row['seconds']:.0f} s · {row['ms_per_step']:.0f} ms/step"
    )


def result_line(record):
    """A run's result in one line: what, how well, on how many images, where and when."""
    kind = "validation" if record["test"] is None else "test"
    result = record["test"] or record["epochs"][-1]["validation"]
    return (
        f"{record['model']} · {record['recipe']['name']} · seed {record['seed']}: top-1 {result['top1']:.1%}, "
        f"top-5 {result['top5']:.1%} on {result['images']:,} {kind} images of "
        f"{record['dataset']} (one seed; {environment.summary(record)}, {record['precision']})"
    )


class _Repeated(keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule, anew every `steps` steps."""

    def __init__(self, once, steps):
        self.once, self.steps = once, steps

    def __call__(self, step):
        return self.once(keras.ops.mod(step, self.steps))

    def get_config(self):
        return {"once": self.once, "steps": self.steps}


# --- one epoch ---------------------------------------------------------------------------------------------------


def _check_finite(loss, where):
    if not math.isfinite(loss):
        cure = "try a lower learning rate, a longer warm-up, or float32"
        raise Diverged(f"the loss is {loss} {where}: {cure}; the record up to there is kept")


def _taught(batches, teacher, share):
    """The batches with the teacher's probabilities as a share of the target."""
    for images, labels in batches:
        yield images, (1 - share) * labels + share * teacher.predict_on_batch(images)


# --- records -----------------------------------------------------------------------------------------------------


def _new_record(model, name, dataset, recipe, images):
    weighted = next(layer for layer in model.layers if layer.weights)
    counts = cost.total_costs(model)
    return {
        "status": "running",
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "stand_in": dataset.stand_in,
        "train_images": images,
        "model": name,
        "recipe": recipe.as_dict(),
        "seed": recipe.seed,
        "precision": weighted.dtype_policy.name,
        "params": counts["params"],
        "trainable": counts["trainable"],
        "macs": counts["macs"],
        **environment.describe(),
        "epochs": [],
        "test": None,
    }


def _wanted(name, dataset, recipe):
    """What makes two runs the same run, wherever they ran."""
    recipe = recipe.as_dict()
    return {
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "model": name,
        "recipe": recipe,
        "seed": recipe["seed"],
    }


def _stored(name, dataset, recipe, quiet):
    record, path = records.lookup(dataset.name, name, recipe.name, recipe.seed)
    if record is None:
        return None
    wanted = _wanted(name, dataset, recipe)
    given = {field.name: field.default for field in dataclasses.fields(recipe)} | record["recipe"]  # it may be older
    record = record | {"recipe": given}
    differs = [key for key, value in wanted.items() if record[key] != value]
    if "recipe" in differs:
        differs += [key for key, value in wanted["recipe"].items() if record["recipe"].get(key) != value]
    if differs:
        raise ValueError(
            f"{records.shown(path)} is a run with another {', '.join(differs)}; pass retrain=True to replace it"
        )
    if not quiet:
        print(f"{result_line(record)}; read from {records.shown(path)}", flush=True)
    return record
