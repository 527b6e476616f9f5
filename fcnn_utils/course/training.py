"""Train a network by a recipe: fit, time, evaluate. Nothing here reads or writes files.

    training.fit(model, dataset, recipe, on_epoch=lambda row: print(row["epoch"], row["loss"], row["top1"]))

`experiments` adds records, checkpoints and predictions on disk.
"""

import math
import os
import time

import keras
import numpy as np

from fcnn_utils import benchmark
from fcnn_utils.course import augmentation, environment, feeding, optimizers
from fcnn_utils.fine_tuning import Diverged, check_finite, one_cycle  # noqa: F401, `experiments` names training.Diverged

_EVALUATION_BATCH = 500
_PROBABILITY_FLOOR = 1e-12  # keeps the logarithm of a probability of 0 finite


# parameters: those up to `recipe` say what is trained, the others how `fit` runs
def fit(model, data, recipe, *, first_epoch=0, epochs=None, teacher=None, on_epoch=None, callbacks=(), verbose=0):
    """Train `model` in place by `recipe`, with `model.compile` and `model.fit`.

    Image order, augmentation and learning rate depend only on the seed and the epoch. Therefore you can
    stop after any epoch and continue with `first_epoch`.

    Args:
        model: built keras.Model from images to class probabilities. It is compiled here if `first_epoch`
            is 0. Otherwise it must have the weights and the optimizer state of the epochs before.
        data: `data.Dataset`; or a pair of `data.Split` for training and validation, used whatever
            `recipe.train_on` is. The second may be None.
        recipe: `recipes.Recipe`.
        first_epoch: number of the epoch to start with, from 0.
        epochs: train up to this epoch number, not including it; default: all epochs of the recipe.
        teacher: keras.Model from images to class probabilities, for `recipe.distillation`.
        on_epoch: function called after each epoch with its dict (see Returns).
        callbacks, verbose: as in `keras.Model.fit`. With validation images, the `logs` at the end of an epoch also have
            val_loss, val_top1 and val_top5.

    Returns:
        list with one dict per epoch trained now (see `Epochs`). Its entry "validation" is the dict of `evaluate`. It is
        missing if there are no validation images or they are trained on.

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
    validate = None if validation is None else lambda: evaluate(model, validation, scale, coarse_names)
    chosen, rows = range(first_epoch, recipe.epochs if epochs is None else epochs), Epochs(validate, on_epoch)
    if chosen:
        feeding.Feed(model, train, recipe, scale, teacher).fit(chosen, [rows, *callbacks], verbose)
    return rows.rows


def steps_per_epoch(images, recipe):
    """Return the number of whole batches in `images` training images.

    Raises:
        ValueError: if it is 0, or the devices (`environment.use_devices`) cannot divide a batch.
    """
    devices = environment.devices()
    if recipe.batch_size % devices:
        raise ValueError(f"devices must divide the batch size, {recipe.batch_size}; got {devices} devices")
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


class Epochs(keras.callbacks.Callback):
    """Callback of `fit` that times each epoch, checks that it did not diverge, and validates.

    Each epoch becomes a dict of

        epoch            its number, from 1
        loss             mean training loss over the augmented images
        cross_entropy    the same without label smoothing
        top1, top5       shares of correct predictions on these images
        seconds          time of the whole epoch, without the validation
        ms_per_step      median time of a step, without the first program run if there are more
        first_step_ms    time of the first program run of the epoch. In the first epoch this includes the compilation.
                         The program is one step, except with JAX on a GPU, where it is a whole epoch. Then
                         `ms_per_step` of the first epoch includes the compilation, too.
        background_load  share of the processor that other programs took
        validation       what `validate` returns, if it is given

    Args:
        validate: function without arguments, called after each epoch; or None.
        on_epoch: function of the dict, called after each epoch; or None.

    Attributes:
        rows: list of these dicts.

    Raises:
        Diverged: if a loss is not finite, or a weight at the end of an epoch.
    """

    def __init__(self, validate=None, on_epoch=None):
        super().__init__()
        self.validate, self.on_epoch, self.rows = validate, on_epoch, []

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._load = epoch + 1, benchmark.BackgroundLoad()
        self._times, self._steps = [time.perf_counter()], [0]

    def on_train_batch_end(self, batch, logs=None):
        step = min(batch + 1, self.params["steps"])  # the last program of an epoch may be shorter
        check_finite(logs["loss"], f"at epoch {self._epoch}, step {step}")
        self._times.append(time.perf_counter())
        self._steps.append(step)

    def on_epoch_end(self, epoch, logs=None):
        each = 1e3 * np.diff(self._times) / np.diff(self._steps)
        row = {
            "epoch": epoch + 1,
            **{key: float(logs[key]) for key in ("loss", "cross_entropy", "top1", "top5")},
            "seconds": round(self._times[-1] - self._times[0], 3),
            "ms_per_step": round(float(np.median(each[1:] if len(each) > 1 else each)), 3),
            "first_step_ms": round(1e3 * (self._times[1] - self._times[0]), 3),
            "background_load": round(self._load.share(), 4),
        }
        if not all(np.isfinite(weight).all() for weight in self.model.get_weights()):  # the last step may have diverged
            check_finite(math.nan, f"or soon will be, because weights are not finite after epoch {epoch + 1}")
        if self.validate is not None:
            row["validation"] = self.validate()
            check_finite(row["validation"]["loss"], f"on the validation images after epoch {epoch + 1}")
            logs |= {f"val_{key}": row["validation"][key] for key in ("loss", "top1", "top5")}
        self.rows.append(row)
        if self.on_epoch is not None:
            self.on_epoch(row)


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


def compile_model(model, recipe, steps, rate=None):
    """Compile `model` in place by `recipe`: optimizer, loss (cross-entropy), top-1 and top-5.

    Args:
        model: built keras.Model.
        recipe: `recipes.Recipe`.
        steps: steps per epoch, for the learning-rate schedule.
        rate: learning rate or schedule; default: `learning_rate_schedule`.
    """
    rate = learning_rate_schedule(recipe, steps) if rate is None else rate
    options = {"global_clipnorm": recipe.clip_norm or None, "weight_decay": recipe.weight_decay or None}
    if recipe.optimizer == "sgd":
        options |= {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
    if recipe.optimizer == "muon":
        options |= {"momentum": recipe.momentum, "adam_lr_ratio": 0.05}
        options["adam_weight_decay"] = options["weight_decay"]
    kinds = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam, "rmsprop": keras.optimizers.RMSprop}
    kinds["muon"] = optimizers.Muon
    optimizer = kinds[recipe.optimizer](rate, **options)
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


def learning_rate_schedule(recipe, steps, epochs=None):
    """Return the learning rate of `recipe` for `steps` steps per epoch: a number or a Keras schedule.

    Give `epochs` for another number of epochs than the recipe's.
    """
    epochs = recipe.epochs if epochs is None else epochs
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if recipe.schedule == "inverse_time":
        decay = recipe.learning_rate / epochs
        return keras.optimizers.schedules.InverseTimeDecay(recipe.learning_rate, decay_steps=1, decay_rate=decay)
    cycle = epochs // recipe.cycles * steps
    once = one_cycle(recipe.learning_rate, cycle, recipe.warmup)
    return once if recipe.cycles == 1 else _Repeated(once, cycle)


class From(keras.optimizers.schedules.LearningRateSchedule):
    """Learning-rate schedule that starts at step `start` of another schedule, `whole`."""

    def __init__(self, whole, start):
        self.whole, self.start = whole, start

    def __call__(self, step):
        return self.whole(step + self.start)

    def get_config(self):
        return {"whole": self.whole, "start": self.start}


class _Repeated(keras.optimizers.schedules.LearningRateSchedule):
    """Repeat another schedule every `steps` steps. Keras's CosineDecayRestarts has no warm-up."""

    def __init__(self, once, steps):
        self.once, self.steps = once, steps

    def __call__(self, step):
        return self.once(keras.ops.mod(step, self.steps))

    def get_config(self):
        return {"once": self.once, "steps": self.steps}
