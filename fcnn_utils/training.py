"""Training by recipe: fit, time, checkpoint, resume, evaluate; the result is a run record.

A recipe is data: everything that decides a run but the network, the images and the seed it is given. `train`
returns the record of that run from disk where it was made before (see `records`), so a course that is read on a
laptop shows the numbers of a machine that had the time; the record tells which machine that was.
"""

import dataclasses
import io
import json
import math
import statistics
import time

import keras
import numpy as np
import psutil

from fcnn_utils import cost, machine, models, records
from fcnn_utils.parameters import check_choice, check_number

_EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    optimizer: "sgd" (with Nesterov momentum if `momentum` > 0) or "adam".
    schedule: "constant", or "one_cycle": linear from 0 to `learning_rate` over the first `warmup` of all steps,
        then down to 0 along half a cosine (after Smith & Topin 2018, arXiv 1708.07120).
    label_smoothing: share of the target spread evenly over all classes.
    flip, shift: augmentation: mirror half of the images; move each by up to `shift` pixels, the border filled
        with the mean colour.
    precision: "float32", "mixed_bfloat16", or "auto": mixed_bfloat16 where the hardware computes in it.
    train_on: "train" (validated after each epoch on the validation images), or "all": both together, for
        settings that are chosen already.
    seed: used where none is given to `train`.
    assumed: what the source of the recipe does not state and we chose.
    """

    name: str
    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    momentum: float = 0.9
    schedule: str = "constant"
    warmup: float = 0.2
    label_smoothing: float = 0.0
    flip: bool = True
    shift: int = 0
    precision: str = "float32"
    train_on: str = "all"
    seed: int = 0
    assumed: tuple = ()

    def __post_init__(self):
        check_number("epochs", self.epochs, int, 1, 1000)
        check_number("batch_size", self.batch_size, int, 1, 65536)
        check_number("learning_rate", self.learning_rate, float, 0, 100)
        check_number("momentum", self.momentum, float, 0, 0.9999)
        check_number("warmup", self.warmup, float, 0, 1)
        check_number("label_smoothing", self.label_smoothing, float, 0, 0.9999)
        check_number("shift", self.shift, int, 0, 8)
        check_number("seed", self.seed, int, 0, 2**31 - 1)
        check_choice("optimizer", self.optimizer, ("sgd", "adam"))
        check_choice("schedule", self.schedule, ("constant", "one_cycle"))
        check_choice("precision", self.precision, ("float32", "mixed_bfloat16", "auto"))
        check_choice("train_on", self.train_on, ("train", "all"))

    def but(self, **changes):
        """This recipe with some settings changed, and a name that tells: `FAST.but(epochs=2)` is "fast-epochs2"."""
        unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise ValueError(f"recipe has no setting {unknown[0]!r}; it has {', '.join(self.as_dict())}")
        changes = {key: value for key, value in changes.items() if getattr(self, key) != value}
        suffix = "".join(f"-{key.replace('_', '')}{value}" for key, value in sorted(changes.items()) if key != "seed")
        return dataclasses.replace(self, **changes, name=self.name + suffix)

    def as_dict(self):
        """The settings as they stand in a record (JSON types)."""
        return dataclasses.asdict(self) | {"assumed": list(self.assumed)}


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="thesis",
            epochs=5,
            batch_size=32,
            optimizer="sgd",
            learning_rate=0.01,
            momentum=0.9,
            shift=3,
            assumed=(
                "The thesis states 5 epochs; batch 32 follows from its 1562 steps an epoch (50,000 / 32, the rest dropped).",
                "Optimizer and learning rate are not stated: SGD with Nesterov momentum 0.9 and rate 0.01, constant.",
                "Augmentation is not stated: mirroring and shifts of up to 3 pixels (a tenth of the width).",
                "Scaling of the images is not stated: mean 0 and standard deviation 1 for each channel.",
            ),
        ),
        Recipe(
            name="fast",
            epochs=5,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.2,
            momentum=0.9,
            schedule="one_cycle",
            label_smoothing=0.1,
            shift=2,
            precision="auto",
        ),
    )
}


class Diverged(ArithmeticError):
    """The loss was not finite; the record up to there is kept, with status "diverged"."""


def recipe_named(name):
    """The recipe called `name`.

    Raises:
        ValueError: there is none.
    """
    return RECIPES[check_choice("recipe", name, RECIPES)]


def train(model, dataset, recipe, seed=None, *, retrain=False, save_model=False):
    """Train `model` on `dataset` by `recipe`, or read the record of the same run where there is one.

    Interrupted at any point and called again, it goes on after the last whole epoch: the order of the images, the
    augmentation and the learning rate of an epoch depend on seed and epoch alone.

    Args:
        model: a name of `models.NETWORKS`, built here from `seed`; or a built keras.Model, which is trained in
            place and recorded under its own name (and precision).
        dataset: `data.Dataset`.
        recipe: `Recipe`, or the name of one.
        seed: starts weights, order and augmentation; default: the recipe's.
        retrain: train anew though there is a record, and replace it.
        save_model: also keep the trained network, as `seedN.keras` beside the record.

    Returns:
        The record, a dict: `epochs` (one dict each: loss as trained, cross_entropy without smoothing, top1, top5 on
        the augmented training images; seconds; ms_per_step, the median without the first step; first_step_ms;
        others_cpu, the share of the processor that other programs took), `test` (cross-entropy, top1 and top5, and
        the number correct by class, on all test images), params, trainable, macs, and where it ran.

    Raises:
        ValueError: bad arguments; a record of the same name but other settings; a file that cannot be written.
        Diverged: the loss was not finite.
    """
    recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
    recipe = recipe if seed is None else dataclasses.replace(recipe, seed=seed)
    name = model if isinstance(model, str) else model.name
    if not retrain:
        stored = _stored(name, dataset, recipe)
        if stored:
            return stored
    split = dataset.everything if recipe.train_on == "all" else dataset.train
    if len(split) < recipe.batch_size:
        raise ValueError(f"batch_size must be at most the number of training images, {len(split)}; got {recipe.batch_size}")
    records.check_writable(records.path_of(dataset.name, name, recipe.name, recipe.seed).parent)

    keras.utils.set_random_seed(recipe.seed)
    if isinstance(model, str):
        model = models.build(model, dataset.train.images.shape[1:], len(dataset.fine_names), dtype=precision_here(recipe))
    steps = len(split) // recipe.batch_size  # the rest of the images waits for another epoch's order
    compile_model(model, recipe, steps)
    record = _new_record(model, name, dataset, recipe, len(split))
    record["epochs"] = [] if retrain else _resume(model, record)

    scale = channel_scale(dataset)
    for epoch in range(len(record["epochs"]), recipe.epochs):
        row = _train_epoch(model, batches(split, recipe, epoch, scale, len(dataset.fine_names)), steps, epoch, record)
        if recipe.train_on == "train":
            row["validation"] = evaluate(model, dataset.validation, scale)
        record["epochs"].append(row)
        print(progress_line(record, row), flush=True)
        _save_checkpoint(model, record)
        records.write(record)

    record["test"] = evaluate(model, dataset.test, scale)
    record["status"] = "complete"
    if save_model:
        _save_model(model, _file(record, "keras"))
    path = records.write(record)
    _file(record, "checkpoint.npz").unlink(missing_ok=True)
    print(f"{result_line(record)}; record in {records.shown(path)}", flush=True)
    return record


def evaluate(model, split, scale):
    """Dict of cross-entropy `loss`, `top1`, `top5` (shares) on all images of `split`, and `correct_by_class`."""
    probabilities = model.predict(normalised(split.images, scale), batch_size=_EVALUATION_BATCH, verbose=0).astype("float64")
    own = probabilities[np.arange(len(split)), split.fine]
    rank = (probabilities > own[:, None]).sum(axis=1)  # classes that were thought likelier than the right one
    correct = np.bincount(split.fine[rank == 0], minlength=probabilities.shape[1])
    return {
        "images": len(split),
        "loss": float(-np.log(np.maximum(own, 1e-12)).mean()),
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "correct_by_class": correct.tolist(),
    }


def compile_model(model, recipe, steps):
    """Compile `model` for `steps` steps an epoch of `recipe`."""
    rate = recipe.learning_rate
    if recipe.schedule == "one_cycle":
        warmup = round(recipe.warmup * recipe.epochs * steps)
        rate = keras.optimizers.schedules.CosineDecay(
            0.0, recipe.epochs * steps - warmup, warmup_target=recipe.learning_rate, warmup_steps=warmup
        )
    if recipe.optimizer == "adam":
        optimizer = keras.optimizers.Adam(rate)
    else:
        optimizer = keras.optimizers.SGD(rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=[
            keras.metrics.CategoricalCrossentropy(name="cross_entropy"),
            keras.metrics.CategoricalAccuracy(name="top1"),
            keras.metrics.TopKCategoricalAccuracy(5, name="top5"),
        ],
        # XLA pays on a GPU; on a CPU TensorFlow's own kernels are faster than its.
        jit_compile=keras.config.backend() == "jax" or (keras.config.backend() == "tensorflow" and machine.gpu() is not None),
    )


def batches(split, recipe, epoch, scale, classes):
    """Generator over one epoch's batches, shuffled and augmented by seed and epoch.

    Yields:
        images (B, H, W, C) float32, normalised; one-hot labels (B, classes) float32. What does not fill a batch is
        left out.
    """
    rng = np.random.default_rng([recipe.seed, epoch])
    order = rng.permutation(len(split))
    one_hot = np.eye(classes, dtype="float32")
    for start in range(0, len(split) - recipe.batch_size + 1, recipe.batch_size):
        chosen = order[start : start + recipe.batch_size]
        yield augmented(normalised(split.images[chosen], scale), recipe, rng), one_hot[split.fine[chosen]]


def augmented(images, recipe, rng):
    """Normalised images (B, H, W, C), mirrored and moved as `recipe` says."""
    if recipe.flip:
        mirror = rng.random(len(images)) < 0.5
        images[mirror] = images[mirror, :, ::-1]
    if recipe.shift:
        size, border = images.shape[1:3], recipe.shift
        padded = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))  # 0 is the mean colour
        windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(1, 2))  # (B, dy, dx, C, H, W)
        dy, dx = rng.integers(0, 2 * border + 1, (2, len(images)))
        images = np.ascontiguousarray(windows[np.arange(len(images)), dy, dx].transpose(0, 2, 3, 1))
    return images


def channel_scale(dataset):
    """(mean, standard deviation) of each channel over the training images, on the scale 0–255: two (C,) float32."""
    pixels = dataset.train.images.reshape(-1, dataset.train.images.shape[-1])
    mean = pixels.mean(axis=0, dtype="float64")
    square = np.mean([np.square(part, dtype="float32").mean(axis=0) for part in np.array_split(pixels, 64)], axis=0)
    return mean.astype("float32"), np.sqrt(np.maximum(square - mean**2, 1e-6)).astype("float32")


def normalised(images, scale):
    """uint8 images as float32 with mean 0 and standard deviation 1 in each channel."""
    mean, deviation = scale
    return (images.astype("float32") - mean) / deviation


def precision_here(recipe):
    """The dtype policy that `recipe` means on this machine."""
    if recipe.precision == "auto":
        return "mixed_bfloat16" if machine.has_bfloat16() else "float32"
    return recipe.precision


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
    test = record["test"]
    return (
        f"{record['model']} · {record['recipe']['name']} · seed {record['seed']}: top-1 {test['top1']:.1%}, top-5 {test['top5']:.1%}"
        f" on {test['images']:,} test images of {record['dataset']} (one seed; {machine.line(record)}, {record['precision']})"
    )


# --- one epoch ---------------------------------------------------------------------------------------------------


class _Watch(keras.callbacks.Callback):
    """Times every step and stops at a loss that is not finite."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch, self.ends, self.logs = epoch, [], {}

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())
        self.logs = {key: float(value) for key, value in logs.items()}
        if not math.isfinite(self.logs["loss"]):
            raise Diverged(
                f"the loss is {self.logs['loss']} at epoch {self.epoch + 1}, step {batch + 1}: "
                "try a lower learning rate, a longer warm-up, or float32; the record up to this epoch is kept"
            )


def _train_epoch(model, feed, steps, epoch, record):
    watch, load = _Watch(epoch), _Load()
    start = time.perf_counter()
    try:
        model.fit(feed, steps_per_epoch=steps, epochs=epoch + 1, initial_epoch=epoch, callbacks=[watch], verbose=0, shuffle=False)
    except Diverged:
        records.write(record | {"status": "diverged"})
        raise
    seconds = time.perf_counter() - start
    times = np.diff([start, *watch.ends]) * 1e3
    return {
        "epoch": epoch + 1,
        **watch.logs,
        "seconds": round(seconds, 3),
        "ms_per_step": round(float(statistics.median(times[1:] if len(times) > 1 else times)), 3),
        "first_step_ms": round(float(times[0]), 3),
        "others_cpu": round(load.others(), 4),
    }


class _Load:
    """How much of the processor other programs took, from its making to `others()`."""

    def __init__(self):
        self.start = self._now()

    def others(self):
        """Share of all cores' time, 0 to 1. A timing with more than a few percent here was not taken in quiet."""
        wall, busy, own = (after - before for after, before in zip(self._now(), self.start, strict=True))
        return min(1.0, max(0.0, busy - own) / (wall * psutil.cpu_count()))

    @staticmethod
    def _now():
        machine_times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = machine_times.idle + getattr(machine_times, "iowait", 0.0)
        return time.monotonic(), sum(machine_times[:8]) - idle, own.user + own.system


# --- records, checkpoints ----------------------------------------------------------------------------------------


def _new_record(model, name, dataset, recipe, images):
    weighted = next(layer for layer in model.layers if layer.weights)
    counts = cost.totals(model)
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
        **machine.describe(),
        "epochs": [],
        "test": None,
    }


def _wanted(name, dataset, recipe):
    """What makes two runs the same run, wherever they ran."""
    recipe = recipe.as_dict()
    return {"dataset": dataset.name, "fingerprint": dataset.fingerprint, "model": name, "recipe": recipe, "seed": recipe["seed"]}


def _stored(name, dataset, recipe):
    record, path = records.lookup(dataset.name, name, recipe.name, recipe.seed)
    if record is None:
        return None
    wanted = _wanted(name, dataset, recipe)
    differs = [key for key, value in wanted.items() if record[key] != value]
    if "recipe" in differs:
        differs += [key for key, value in wanted["recipe"].items() if record["recipe"].get(key) != value]
    if differs:
        raise ValueError(f"{records.shown(path)} is a run with another {', '.join(differs)}; pass retrain=True to replace it")
    print(f"{result_line(record)}; read from {records.shown(path)}", flush=True)
    return record


def _file(record, suffix):
    return records.path_of(record["dataset"], record["model"], record["recipe"]["name"], record["seed"]).with_suffix(f".{suffix}")


def _state(model):
    return [*model.weights, *model.optimizer.variables]


def _save_checkpoint(model, record):
    """Weights, optimizer and record in one file, so that they belong together whatever happens."""
    arrays = {f"v{number}": keras.ops.convert_to_numpy(variable.value) for number, variable in enumerate(_state(model))}
    content = io.BytesIO()
    np.savez(content, record=json.dumps(record), **arrays)
    records.write_atomic(_file(record, "checkpoint.npz"), content.getvalue())


def _resume(model, record):
    """Epochs that the checkpoint of the same run has behind it, its state loaded into `model`; [] without one."""
    path = _file(record, "checkpoint.npz")
    if not path.exists():
        return []
    model.optimizer.build(model.trainable_variables)
    try:
        with np.load(path) as checkpoint:
            earlier = json.loads(str(checkpoint["record"]))
            arrays = [checkpoint[f"v{number}"] for number in range(len(checkpoint.files) - 1)]
        same = all(earlier[key] == record[key] for key in ("fingerprint", "model", "recipe", "seed", "precision", "params"))
        if not same or [array.shape for array in arrays] != [tuple(variable.shape) for variable in _state(model)]:
            print(f"{records.shown(path)} belongs to other settings: starting anew", flush=True)
            return []
    except Exception as error:  # a damaged file raises nearly anything
        print(f"{records.shown(path)} is damaged ({error}): starting anew", flush=True)
        return []
    for variable, array in zip(_state(model), arrays, strict=True):
        variable.assign(array)
    print(f"{record['model']} · {record['recipe']['name']} · going on after epoch {len(earlier['epochs'])}", flush=True)
    return earlier["epochs"]


def _save_model(model, path):
    """Keep the trained network, without its optimizer; written whole."""
    temporary = path.with_name(f".{path.stem}.tmp.keras")
    try:
        model.save(temporary, include_optimizer=False)
        records.write_atomic(path, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)

