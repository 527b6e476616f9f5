"""Train a network once, and keep its record, checkpoints and predictions on disk.

If there is a record of the same run, from any machine, `train` returns it instead of training.
Therefore a laptop can show the numbers of a faster machine, which the record names.

A record is a dict of JSON types:

    schema             1
    status             "complete", "running" or "diverged"
    model              name of the network, with its width if that is not 1: "simple-width0.6"
    params, trainable  number of all weights, and of the trainable ones
    macs               multiply-accumulate operations (MACs) per image
    dense              with `factorize_at`: dict of params, trainable and macs before the factorization
    factorization      with `factorize_at`: the dict that `switching.factorize` returns
    epochs             list of the dicts that `training.fit` returns
    test               dict of `training.evaluate` on all test images; None if the recipe trains on
                       "train", unless predictions are kept

The names of the other entries say what they are: dataset, fingerprint, stand_in, train_images, recipe,
seed, precision, and the entries of `environment.describe`.
"""

import contextlib
import dataclasses

import keras

from fcnn_utils import _files, cost
from fcnn_utils.course import (
    augmentation,
    checkpoints,
    environment,
    networks,
    paths,
    predictions,
    records,
    switching,
    training,
)
from fcnn_utils.course.recipes import get_recipe

_RETRAIN = "pass retrain=True (on the command line `train --retrain`) to replace it"


# parameters: those up to `teacher` define the run; the others say what is kept, replaced and printed
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
    """Train `model` on `dataset` by `recipe`, or read the record of the same run if there is one.

    After an interruption, call it again: it continues after the last whole epoch.

    Args:
        model: name for `networks.build`; or a built keras.Model; or a function from the seed to a built keras.Model,
            called only if there is no record. A built model is trained in place. With `factorize_at`, training goes on
            with a new, factorized model: get that one by `save_model` and `load_trained`.
        dataset: `data.Dataset`.
        recipe: `recipes.Recipe`, or the name of one.
        seed: seed of weights, image order and augmentation; default: the recipe's.
        width: factor on the numbers of filters, if `model` is a name.
        name: name of the network in the record; default: its own. Required if `model` is a function.
        teacher: keras.Model, required if the recipe has `distillation`.
        retrain: train even if there is a record, and replace it.
        save_model: keep the network as `seedN.keras` beside the record, if it is trained now.
        save_predictions: after each of the recipe's cycles, keep the probabilities for all test images,
            and for the validation images if they are not trained on (see `predictions`).
        quiet: print nothing when a record is read.

    Returns:
        The record (see the module).

    Raises:
        ValueError: if an argument is not allowed, a record of the same name is damaged, has other settings
            or lacks the predictions, another process trains the same (`_files.Busy`), the network cannot be factorized
            as the recipe says, or a file cannot be written.
        training.Diverged: if the loss or a weight is not finite. The record of the epochs before is kept.
        KeyboardInterrupt: if the training was stopped; the message says what is kept.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    recipe = recipe if seed is None else dataclasses.replace(recipe, seed=seed)
    name = _record_name(model, width, name)
    earlier = None if retrain else stored(name, dataset, recipe, save_predictions, quiet)
    if earlier:
        return earlier
    images = len(dataset.train) + (len(dataset.validation) if recipe.train_on == "all" else 0)
    steps = training.steps_per_epoch(images, recipe)
    path = records.path_of(dataset.name, name, recipe.name, recipe.seed)
    with _alone(path):
        model = _build(model, dataset, recipe, width)
        _files.check_writable(path.parent, 8 * model.count_params())  # a checkpoint: weights and momenta
        training.compile_model(model, recipe, steps)  # a checkpoint includes the optimizer
        record = _new_record(model, name, dataset, recipe, images)
        try:
            dense, model = model, _as_checkpoint(model, record, recipe, steps, restart=retrain)
            record["epochs"] = checkpoints.resume(model, record, restart=retrain)
            if model is not dense and not record["epochs"]:  # the checkpoint was refused
                model, _ = dense, record.pop("factorization")
                record |= record.pop("dense")
            if recipe.factorize_at and not record["epochs"]:
                switching.factorize(model, recipe)  # raises now what it would raise after some epochs
            if save_predictions:
                predictions.check_kept(record, len(record["epochs"]) // recipe.epochs_a_cycle)
            model = _run(model, dataset, recipe, record, steps, teacher, save_predictions)
        except training.Diverged as error:
            path = records.write(record | {"status": "diverged", "test": None})
            raise training.Diverged(f"{error}; the epochs before are kept in {paths.shown(path)}") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_kept_line(record)) from None
        _finish(model, record, save_model, save_predictions)
    return record


def stored(name, dataset, recipe, needs_predictions=False, quiet=True):
    """Find the record of a run, from any machine.

    Args:
        name: name of the network in the record, such as "simple-width0.6".
        dataset: `data.Dataset`.
        recipe: `recipes.Recipe` with the seed of the run.
        needs_predictions: require that the predictions were kept.
        quiet: do not print a line about it.

    Returns:
        The record, with the defaults of settings that it lacks because it is older; None if there is none.

    Raises:
        ValueError: if it was made with other settings or data, is damaged, or lacks the predictions.
    """
    record, path = records.lookup(dataset.name, name, recipe.name, recipe.seed)
    if record is None:
        return None
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    record = record | {"recipe": defaults | record["recipe"]}  # an older record lacks new settings
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
        raise ValueError(f"{paths.shown(path)} was made with another {', '.join(differing)}; {_RETRAIN}")
    if not quiet:
        paths.say(f"{result_line(record)}; read from {paths.shown(path)}")
    if needs_predictions and predictions.load(dataset.name, name, recipe.name, recipe.seed) is None:
        raise ValueError(f"{result_line(record)}; its predictions were not kept: {_RETRAIN}")
    return record


def load_trained(model, dataset, recipe, seed=0):
    """Load the network that a run kept with `save_model`.

    Args:
        model: name of the network in the record, such as "simple-width0.6".
        dataset: name of the data set in the record.
        recipe: name of the recipe in the record, such as "fast-epochs2".
        seed: seed of the run.

    Returns:
        keras.Model, not compiled; None if no network was kept.

    Raises:
        ValueError: if the file cannot be loaded; the message names it.
    """
    path = records.kept_network(dataset, model, recipe, seed)
    if path is None:
        return None
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception:  # errors of many kinds; Keras's message about a Lambda layer tells how to run its code
        raise ValueError(
            f"{paths.shown(path)} cannot be loaded: it is damaged, needs a layer that is not registered, or "
            "contains code, which was not run; delete it and the record, and train again"
        ) from None


def network_to_compress(dataset, seed=0, converged=False):
    """Return the trained network that the chapters on compression start from.

    Args:
        dataset: `data.Dataset`. For CIFAR-100 the weights come with the course. For other data, or if these weights are
            missing, a simple network with a quarter of the filters is trained for two epochs, once.
        seed: of this training; the weights of the course are those of seed 0.
        converged: take the simple network with half of the filters after 30 epochs of the recipe "long", instead of
            the one with all filters after 5 epochs of "fast".

    Returns:
        keras.Model, not compiled.

    Raises:
        ValueError: see `train` and `load_trained`.
    """
    name, recipe = ("simple-width0.5", "long-epochs30") if converged else ("simple", "fast")
    kept = load_trained(name, dataset.name, recipe) if dataset.name == "cifar100" else None
    if kept is None:
        recipe = get_recipe("fast", epochs=2, batch_size=32)
        train("simple", dataset, recipe, seed, width=0.25, save_model=True)
        kept = load_trained(networks.run_name("simple", 0.25), dataset.name, recipe.name, seed)
    return kept


def progress_line(record, row):
    """Format one epoch, the entry `row` of `record["epochs"]`, as one line."""
    validation = f" · validation {row['validation']['top1']:.1%}" if "validation" in row else ""
    return (
        f"{record['model']} · {record['recipe']['name']} · epoch {row['epoch']}/{record['recipe']['epochs']}"
        f" · loss {row['loss']:.3f} · top-1 {row['top1']:.1%} · top-5 {row['top5']:.1%}{validation}"
        f" · {row['seconds']:.0f} s · {row['ms_per_step']:.0f} ms/step"
    )


def result_line(record):
    """Format the result of a run as one line: network, accuracy, number of images, machine and date."""
    kind, result = records.result(record)
    return (
        f"{record['model']} · {record['recipe']['name']} · seed {record['seed']}: top-1 {result['top1']:.1%}, "
        f"top-5 {result['top5']:.1%} on {result['images']:,} {kind} images of "
        f"{record['dataset']} (one seed; {environment.summary(record)}, {record['precision']})"
    )


# --- before the training -----------------------------------------------------------------------------------------


def _record_name(model, width, name):
    """Return the network's name in the record, after checking the arguments `model`, `width` and `name` of `train`."""
    is_name, is_model = isinstance(model, str), isinstance(model, keras.Model)
    if not is_name and not is_model and (name is None or not callable(model)):
        raise ValueError(
            f"model must be a network's name, a built keras.Model, or a function and a name; got {model!r}"
        )
    if width != 1 and (name is not None or not is_name):
        raise ValueError(f"width must be 1 unless model is a network's name and name is not given; got {width!r}")
    if name is not None:
        return name
    return networks.run_name(model, width) if is_name else model.name


@contextlib.contextmanager
def _alone(path):
    """Hold the lock of the run whose record is `path`; check that no folder is in the way, and tidy up."""
    with _files.locked(path.with_name(f".{path.stem}.lock"), f"the training of {paths.shown(path)}"):
        for suffix in (".json", ".partial.json", ".checkpoint.npz", ".keras", ".predictions.npz"):
            if path.with_suffix(suffix).is_dir():
                raise ValueError(f"{paths.shown(path.with_suffix(suffix))} is a folder where a file goes; delete it")
        for left_over in path.parent.glob(f".{path.stem}.*.tmp*"):  # of a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
        yield


def _build(model, dataset, recipe, width):
    """Return the network to train, with all random generators seeded by the recipe."""
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
        keras.utils.set_random_seed(recipe.seed)  # undo what the function drew
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


def _as_checkpoint(model, record, recipe, steps, restart):
    """Return the network that matches the run's checkpoint: `model`, or its factorized copy after the switch."""
    made = None if recipe.factorize_at is None else checkpoints.record_of(record, restart).get("factorization")
    if made is None:
        return model
    return _switch(model, record, recipe, steps, made)


def _switch(dense, record, recipe, steps, made=None):
    """Factorize and compile the network in the middle of a run; enter the change into the record. Return the network.

    `made`: entry "factorization" of the record, to rebuild a network that was factorized before.
    """
    model, now = switching.factorize(dense, recipe, made and made["ranks"])
    switching.carry_over(dense if recipe.factorize_at else None, model, recipe, steps)
    switching.decay_products(dense, model, now["ranks"], recipe.product_decay)
    record["dense"] = {key: record[key] for key in ("params", "trainable", "macs")}
    counts = cost.total_costs(model)
    record |= {key: counts[key] for key in record["dense"]} | {"factorization": made or now}
    return model


# parameters: what `train` has found out
def _run(model, dataset, recipe, record, steps, teacher, save_predictions):
    """Train the missing epochs of `record`, then test; return the network. After each epoch, write what resuming needs.

    The order of the writes makes it safe to stop at any point. Predictions are written before the
    checkpoint: a run that stops between the two then repeats the epoch and writes them again. The record
    is written last, because a resumed run takes its epochs from the checkpoint.
    """
    scale, at = augmentation.channel_statistics(dataset), recipe.factorize_at

    def on_epoch(row):
        record["epochs"].append(row)
        cycle, rest = divmod(len(record["epochs"]), recipe.epochs_a_cycle)
        if save_predictions and rest == 0:
            kept = ("test",) if recipe.train_on == "all" else ("validation", "test")  # no images that are trained on
            found = {part: training.predict(model, getattr(dataset, part), scale) for part in kept}
            predictions.keep(record, cycle - 1, found)
        checkpoints.save(model, record)
        records.write(record)
        paths.say(progress_line(record, row))

    if at is not None and "factorization" not in record:
        if at:
            options = {"first_epoch": len(record["epochs"]), "epochs": at, "teacher": teacher, "on_epoch": on_epoch}
            training.fit(model, dataset, recipe, **options)
        model = _switch(model, record, recipe, steps)
    training.fit(model, dataset, recipe, first_epoch=len(record["epochs"]), teacher=teacher, on_epoch=on_epoch)
    if recipe.train_on == "all" or save_predictions:
        record["test"] = training.evaluate(model, dataset.test, scale, dataset.coarse_names)
        training.check_finite(record["test"]["loss"], "on the test images after the last epoch")
    return model


def _finish(model, record, save_model, save_predictions):
    """Keep the network and its predictions, write the complete record, and delete the files for resuming."""
    record["status"] = "complete"
    if save_model:
        checkpoints.keep(model, record)
    if save_predictions:
        predictions.finish(record)
    path = records.write(record)
    for left_over in ("checkpoint.npz", "partial.json", "partial.predictions.npz"):
        checkpoints.file_of(record, left_over).unlink(missing_ok=True)
    paths.say(f"{result_line(record)}; record in {paths.shown(path)}")


def _kept_line(record):
    """Say what is kept of a run that was stopped, and how it goes on."""
    done, path = checkpoints.epochs_done(record), checkpoints.file_of(record, "checkpoint.npz")
    if done == 0:
        return f"no epoch of {record['model']} was done, so nothing is kept; the next call starts anew"
    return (
        f"epochs 1 to {done} of {record['recipe']['epochs']} of {record['model']} are kept in {paths.shown(path)}; "
        "the next call continues after them"
    )
