"""Train a network by a recipe: fit, time, evaluate. Nothing here reads or writes files.

    for row in training.fit(model, dataset, recipe):
        print(row["epoch"], row["loss"], row["top1"])

`experiments` adds records, checkpoints and predictions on disk.
"""

import math
import os
import time

import keras
import numpy as np

from fcnn_utils import benchmark
from fcnn_utils.course import augmentation, environment, optimizers
from fcnn_utils.fine_tuning import Diverged, check_finite, one_cycle  # noqa: F401, `experiments` names training.Diverged

_EVALUATION_BATCH = 500
_PROBABILITY_FLOOR = 1e-12  # keeps the logarithm of a probability of 0 finite


def fit(model, data, recipe, *, first_epoch=0, teacher=None):
    """Train `model` in place by `recipe`: a generator that trains one epoch per item.

    Image order, augmentation and learning rate depend only on the seed and the epoch. Therefore you can
    stop after any epoch and continue with `first_epoch`.

    Args:
        model: built keras.Model from images to class probabilities. It is compiled here if `first_epoch`
            is 0. Otherwise it must have the weights and the optimizer state of the epochs before.
        data: `data.Dataset`; or a pair of `data.Split` for training and validation, used whatever
            `recipe.train_on` is. The second may be None.
        recipe: `recipes.Recipe`.
        first_epoch: number of the epoch to start with, from 0.
        teacher: keras.Model from images to class probabilities, for `recipe.distillation`.

    Yields:
        dict of `fit_epoch` for each epoch; with "validation", the dict of `evaluate`, unless there are no
        validation images or they are trained on.

    Raises:
        ValueError: if there are fewer images than one batch, the recipe needs a teacher, or the outputs of the
            model or the teacher are not probabilities of the data's classes.
        Diverged: if the loss or a weight is not finite.
    """
    if recipe.distillation and teacher is None:
        raise ValueError(f"recipe {recipe.name} has a share of distillation, {recipe.distillation}: give a teacher")
    if isinstance(data, (tuple, list)):
        (train, validation), classes, coarse_names = data, model.output_shape[-1], ()
        scale = augmentation.channel_statistics(train)
    else:
        train, validation = (data.everything, None) if recipe.train_on == "all" else (data.train, data.validation)
        classes, coarse_names = len(data.fine_names), data.coarse_names
        scale = augmentation.channel_statistics(data)
    steps = steps_per_epoch(len(train), recipe)
    for name, each in (("model", model), ("teacher", teacher if recipe.distillation else None)):
        if each is not None:
            _check_probabilities(name, each, augmentation.normalize(train.images[:2], scale), classes)
    if first_epoch == 0:
        compile_model(model, recipe, steps)
    for epoch in range(first_epoch, recipe.epochs):
        batches = augmentation.batches(train, recipe, epoch, scale, classes)
        if recipe.distillation:
            batches = _mix_in_teacher(batches, teacher, recipe.distillation)
        row = fit_epoch(model, batches, steps, epoch)
        if not all(np.isfinite(weight).all() for weight in model.get_weights()):  # the last step may have diverged
            check_finite(math.nan, f"or soon will be, because weights are not finite after epoch {epoch + 1}")
        if validation is not None:
            row["validation"] = evaluate(model, validation, scale, coarse_names)
            check_finite(row["validation"]["loss"], f"on the validation images after epoch {epoch + 1}")
        yield row


def steps_per_epoch(images, recipe):
    """Return the number of whole batches in `images` training images; raise ValueError if it is 0."""
    if images < recipe.batch_size:
        raise ValueError(
            f"recipe {recipe.name} needs at least {recipe.batch_size} training images, one batch; got {images}: "
            "take more images, or a recipe with smaller batches"
        )
    return images // recipe.batch_size


def _check_probabilities(name, model, images, classes):
    """Raise ValueError unless `model` gives each image a probability for each class; NaN is left to `Diverged`."""
    outputs = keras.ops.convert_to_numpy(model(images, training=False)).astype("float64")
    if outputs.shape != (len(images), classes):
        raise ValueError(
            f"{name} must give {classes} class probabilities for each image; its output is {outputs.shape}"
        )
    if np.isfinite(outputs).all() and (outputs.min() < 0 or abs(outputs.sum(axis=1) - 1).max() > 0.02):
        raise ValueError(
            f"{name} must give class probabilities, which are not negative and sum to 1; got {outputs[0].min():.3g} to "
            f"{outputs[0].max():.3g}, sum {outputs[0].sum():.3g}: end it in a softmax"
        )


def fit_epoch(model, batches, steps, epoch=0):
    """Fit a compiled model to one epoch of batches, and time it.

    It calls `train_on_batch`, because on TensorFlow 2.21 each `keras.Model.fit` ends with a wait for
    tf.data's autotuner, which can double the time of a short epoch.

    Args:
        model: compiled (`compile_model`).
        batches: iterable of (images, one-hot labels), as from `augmentation.batches`.
        steps: number of batches.
        epoch: number of the epoch, from 0.

    Returns:
        dict of

            epoch            its number, from 1
            loss             mean training loss over the augmented images
            cross_entropy    the same without label smoothing
            top1, top5       shares of correct predictions on these images
            seconds          time of the whole epoch
            ms_per_step      median time of a step, without the first
            first_step_ms    time of the first step, which compiles
            background_load  share of the processor that other programs took

    Raises:
        Diverged: if the loss is not finite.
    """
    load, times, rows = benchmark.BackgroundLoad(), [time.perf_counter()], []
    for step, (images, labels) in zip(range(1, steps + 1), batches, strict=False):
        rows.append(model.train_on_batch(images, labels, return_dict=True))
        times.append(time.perf_counter())
        check_finite(rows[-1]["loss"], f"at epoch {epoch + 1}, step {step}")
    step_times = np.diff(times) * 1e3
    return {
        "epoch": epoch + 1,
        **{key: float(np.mean([row[key] for row in rows])) for key in rows[0]},  # all batches have the same size
        "seconds": round(times[-1] - times[0], 3),
        "ms_per_step": round(float(np.median(step_times[1:] if steps > 1 else step_times)), 3),
        "first_step_ms": round(float(step_times[0]), 3),
        "background_load": round(load.share(), 4),
    }


def predict(model, split, scale):
    """Predict class probabilities (N, classes) float64 for the images of `split`; arguments as in `evaluate`."""
    images = augmentation.normalize(split.images, scale)
    parts = [images[start : start + _EVALUATION_BATCH] for start in range(0, len(images), _EVALUATION_BATCH)]
    return np.concatenate([model.predict_on_batch(part) for part in parts]).astype("float64")


def evaluate(model, split, scale, coarse_names=()):
    """Evaluate `model` on all images of `split`.

    Among equally probable classes, the one with the lowest label is the prediction. Therefore a network
    that gives all classes the same probability has the accuracy of chance.

    Args:
        model: keras.Model.
        split: `data.Split`.
        scale: (mean, standard deviation), from `augmentation.channel_statistics`.
        coarse_names: names of the superclasses.

    Returns:
        dict of `images` (their number), `loss` (cross-entropy), `top1` and `top5` (shares),
        `correct_by_class` (list of the numbers of correct predictions) and `top1_by_superclass` (dict
        name -> share, of the superclasses that have images).
    """
    probabilities = predict(model, split, scale)
    own = probabilities[np.arange(len(split)), split.fine]
    ties = (probabilities == own[:, None]) & (np.arange(probabilities.shape[1]) < split.fine[:, None])
    rank = ((probabilities > own[:, None]) | ties).sum(axis=1)  # (N,) classes before the right one
    rank[~np.isfinite(own)] = probabilities.shape[1]  # NaN is never correct
    shares = {name: rank[split.coarse == label] < 1 for label, name in enumerate(coarse_names)}
    return {
        "images": len(split),
        "loss": float(-np.log(np.maximum(own, _PROBABILITY_FLOOR)).mean()),
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "correct_by_class": np.bincount(split.fine[rank < 1], minlength=probabilities.shape[1]).tolist(),
        "top1_by_superclass": {name: float(right.mean()) for name, right in shares.items() if len(right)},
    }


def compile_model(model, recipe, steps):
    """Compile `model` in place by `recipe`: optimizer, loss (cross-entropy), top-1 and top-5.

    Args:
        model: built keras.Model.
        recipe: `recipes.Recipe`.
        steps: steps per epoch, for the learning-rate schedule.
    """
    options = {"global_clipnorm": recipe.clip_norm or None, "weight_decay": recipe.weight_decay or None}
    if recipe.optimizer == "sgd":
        options |= {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
    if recipe.optimizer == "muon":
        options |= {"momentum": recipe.momentum, "adam_lr_ratio": 0.05}
        options["adam_weight_decay"] = options["weight_decay"]
    kinds = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam, "rmsprop": keras.optimizers.RMSprop}
    kinds["muon"] = optimizers.Muon
    optimizer = kinds[recipe.optimizer](learning_rate_schedule(recipe, steps), **options)
    if recipe.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    backend, eager = keras.config.backend(), bool(os.environ.get("FCNN_EAGER"))  # eager: see `runner`
    on_gpu = backend == "tensorflow" and environment.gpu() is not None
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=[
            keras.metrics.CategoricalCrossentropy(name="cross_entropy"),
            keras.metrics.CategoricalAccuracy(name="top1"),
            keras.metrics.TopKCategoricalAccuracy(5, name="top5"),
        ],
        # On a CPU TensorFlow's own kernels are faster than XLA's.
        jit_compile=not eager and (backend == "jax" or on_gpu),
        run_eagerly=eager,
    )


def learning_rate_schedule(recipe, steps):
    """Return the learning rate of `recipe` for `steps` steps per epoch: a number or a Keras schedule."""
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if recipe.schedule == "inverse_time":
        decay = recipe.learning_rate / recipe.epochs
        return keras.optimizers.schedules.InverseTimeDecay(recipe.learning_rate, decay_steps=1, decay_rate=decay)
    cycle = recipe.epochs_a_cycle * steps
    once = one_cycle(recipe.learning_rate, cycle, recipe.warmup)
    return once if recipe.cycles == 1 else _Repeated(once, cycle)


class _Repeated(keras.optimizers.schedules.LearningRateSchedule):
    """Repeat another schedule every `steps` steps. Keras's CosineDecayRestarts has no warm-up."""

    def __init__(self, once, steps):
        self.once, self.steps = once, steps

    def __call__(self, step):
        return self.once(keras.ops.mod(step, self.steps))

    def get_config(self):
        return {"once": self.once, "steps": self.steps}


def _mix_in_teacher(batches, teacher, share):
    for images, labels in batches:
        yield images, (1 - share) * labels + share * teacher.predict_on_batch(images)
