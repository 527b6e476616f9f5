"""Run a training as an experiment: with a record, checkpoints, resume and kept predictions.

If the same run was made before, on any machine, `train` returns its record from disk. Therefore the
course shows the numbers of a fast machine even on a laptop. The record names that machine.

A record is a dict of JSON types:

    schema             1
    status             "complete", "running" or "diverged"
    model              name of the network, with its width if that is not 1: "simple-width0.6"
    params, trainable  number of weights, and number of those that are trained
    macs               multiply-adds for one image
    epochs             list of the dicts of `training.fit`
    test               dict of `training.evaluate` on all test images; None if the recipe trains on
                       "train", unless predictions are kept

and, as their names say, dataset, fingerprint, stand_in, train_images, recipe, seed, precision, and the
entries of `environment.describe`.
"""

import dataclasses

import keras

from fcnn_utils import _files, cost
from fcnn_utils.course import augmentation, checkpoints, environment, networks, paths, predictions, records, training
from fcnn_utils.course.recipes import get_recipe


# parameters: up to `teacher` they decide the run, the others what is kept, replaced and printed
# long: half of it documents these parameters
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
    """Train `model` on `dataset` by `recipe`; or read the record of the same run if there is one.

    If it is interrupted at any point and called again, it continues after the last whole epoch.

    Args:
        model: name for `networks.build`, built here from `seed`; or a built keras.Model, which is trained
            in place; or a function of the seed that makes one, called only if there is no record.
        dataset: `data.Dataset`.
        recipe: `recipes.Recipe`, or the name of one.
        seed: seed of weights, order and augmentation; default: the recipe's.
        width: factor of the numbers of filters, for a network that is built by its name.
        name: name of the network in the record; default: its own. A function needs it.
        teacher: keras.Model, needed if the recipe has `distillation`.
        retrain: train even if there is a record, and replace it.
        save_model: keep the trained network, as `seedN.keras` beside the record.
        save_predictions: keep the probabilities for all test images, and for the validation images if
            they are not trained on, after each of the recipe's cycles (see `predictions`).
        quiet: do not print that a record was read.

    Returns:
        the record, see the module.

    Raises:
        ValueError: if an argument is not allowed, a record has the same name but other settings, or a
            file cannot be written.
        training.Diverged: if the loss or a weight is not finite. The record of the epochs before is kept.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    recipe = recipe if seed is None else dataclasses.replace(recipe, seed=seed)
    name = _record_name(model, width, name)
    stored = None if retrain else _stored(name, dataset, recipe, save_predictions, quiet)
    if stored:
        return stored
    images = len(dataset.train) + (len(dataset.validation) if recipe.train_on == "all" else 0)
    steps = training.steps_per_epoch(images, recipe)
    _files.check_writable(records.path_of(dataset.name, name, recipe.name, recipe.seed).parent)
    model = _build(model, dataset, recipe, width)
    training.compile_model(model, recipe, steps)  # a checkpoint includes the optimizer
    record = _new_record(model, name, dataset, recipe, images)
    record["epochs"] = checkpoints.resume(model, record)
    try:
        _run(model, dataset, recipe, record, teacher, save_predictions)
    except training.Diverged as error:
        path = records.write(record | {"status": "diverged", "test": None})
        raise training.Diverged(f"{error}; the epochs before are kept in {paths.shown(path)}") from None
    _finish(model, record, save_model, save_predictions)
    return record


def load_trained(model, dataset, recipe, seed=0):
    """Load the network that a run kept with `save_model`.

    Args:
        model: name of the network in the record, such as "simple-width0.6".
        dataset: name of the data set there.
        recipe: name of the recipe there, such as "fast-epochs2".
        seed: seed of the run.

    Returns:
        keras.Model, not compiled; None if there is none.
    """
    for folder in records.folders():
        path = records.path_of(dataset, model, recipe, seed, folder).with_suffix(".keras")
        if path.exists():
            return keras.saving.load_model(path, compile=False)
    return None


def progress_line(record, row):
    """Format one epoch of a run as one line."""
    validation = f" · validation {row['validation']['top1']:.1%}" if "validation" in row else ""
    return (
        f"{record['model']} · {record['recipe']['name']} · epoch {row['epoch']}/{record['recipe']['epochs']}"
        f" · loss {row['loss']:.3f} · top-1 {row['top1']:.1%} · top-5 {row['top5']:.1%}{validation}"
        f" · {row['seconds']:.0f} s · {row['ms_per_step']:.0f} ms/step"
    )


def result_line(record):
    """Format the result of a run as one line: network, accuracy, number of images, machine and date."""
    kind = "validation" if record["test"] is None else "test"
    result = record["test"] or record["epochs"][-1]["validation"]
    return (
        f"{record['model']} · {record['recipe']['name']} · seed {record['seed']}: top-1 {result['top1']:.1%}, "
        f"top-5 {result['top5']:.1%} on {result['images']:,} {kind} images of "
        f"{record['dataset']} (one seed; {environment.summary(record)}, {record['precision']})"
    )


# --- before the training -----------------------------------------------------------------------------------------


def _record_name(model, width, name):
    """Name of the network in the record; checks the arguments `model`, `width` and `name` of `train`."""
    is_name, is_model = isinstance(model, str), isinstance(model, keras.Model)
    if not is_name and not is_model and (name is None or not callable(model)):
        raise ValueError(
            f"model must be a network's name, a built keras.Model, or a function and a name; got {model!r}"
        )
    if width != 1 and (name or not is_name):
        raise ValueError(f"width must be 1 unless model is a network's name, and no other is given; got {width!r}")
    if name:
        return name
    return networks.run_name(model, width) if is_name else model.name


def _stored(name, dataset, recipe, needs_predictions, quiet):
    """Record of the same run, wherever it was made; None if there is none."""
    record, path = records.lookup(dataset.name, name, recipe.name, recipe.seed)
    if record is None:
        return None
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    record = record | {"recipe": defaults | record["recipe"]}  # it may be older than a setting
    wanted = {
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "model": name,
        "recipe": recipe.as_dict(),
        "seed": recipe.seed,
    }
    differing = [key for key, value in wanted.items() if record[key] != value]
    if "recipe" in differing:
        differing += [key for key, value in wanted["recipe"].items() if record["recipe"].get(key) != value]
    if differing:
        raise ValueError(
            f"{paths.shown(path)} is a run with another {', '.join(differing)}; pass retrain=True to replace it"
        )
    if not quiet:
        print(f"{result_line(record)}; read from {paths.shown(path)}", flush=True)
    if needs_predictions and predictions.load(dataset.name, name, recipe.name, recipe.seed) is None:
        raise ValueError(f"{result_line(record)}; its predictions were not kept: pass retrain=True to replace it")
    return record


def _build(model, dataset, recipe, width):
    """Build the network to train, and leave all generators at the recipe's seed."""
    keras.utils.set_random_seed(recipe.seed)
    if isinstance(model, str):
        return networks.build(
            model,
            dataset.train.images.shape[1:],
            len(dataset.fine_names),
            width=width,
            dtype=environment.precision(recipe.precision),
            initialization=recipe.initialization,
            head_scale=recipe.head_scale,
        )
    if not isinstance(model, keras.Model):
        model = model(recipe.seed)
        keras.utils.set_random_seed(recipe.seed)  # whatever the function drew
    return model


def _new_record(model, name, dataset, recipe, images):
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
        "precision": next(layer for layer in model.layers if layer.weights).dtype_policy.name,
        "params": counts["params"],
        "trainable": counts["trainable"],
        "macs": counts["macs"],
        **environment.describe(),
        "epochs": [],
        "test": None,
    }


# --- the training, and what it leaves ----------------------------------------------------------------------------


def _run(model, dataset, recipe, record, teacher, save_predictions):
    """Train the epochs that `record` does not have yet, then test. After each epoch, write what resuming needs.

    The order of the writes makes it safe to stop at any point. Predictions come before the checkpoint:
    otherwise a run that is stopped between the two would continue after the cycle, without them. The
    record comes last: a resumed run takes its epochs from the checkpoint, so it may lack the last one.
    """
    scale, done = augmentation.channel_statistics(dataset), len(record["epochs"])
    for row in training.fit(model, dataset, recipe, first_epoch=done, teacher=teacher):
        record["epochs"].append(row)
        cycle, rest = divmod(len(record["epochs"]), recipe.epochs_a_cycle)
        if save_predictions and rest == 0:
            kept = ("test",) if recipe.train_on == "all" else ("validation", "test")  # not what is trained on
            found = {part: training.predict(model, getattr(dataset, part), scale) for part in kept}
            predictions.keep(record, cycle - 1, found)
        checkpoints.save(model, record)
        records.write(record)
        print(progress_line(record, row), flush=True)
    if recipe.train_on == "all" or save_predictions:
        record["test"] = training.evaluate(model, dataset.test, scale, dataset.coarse_names)
        training.check_finite(record["test"]["loss"], "on the test images after the last epoch")


def _finish(model, record, save_model, save_predictions):
    """Keep the network and its predictions, write the complete record, delete what only a resumed run needs."""
    record["status"] = "complete"
    if save_model:
        checkpoints.keep(model, record)
    if save_predictions:
        predictions.finish(record)
    path = records.write(record)
    for left_over in ("checkpoint.npz", "partial.json"):
        checkpoints.file_of(record, left_over).unlink(missing_ok=True)
    print(f"{result_line(record)}; record in {paths.shown(path)}", flush=True)
