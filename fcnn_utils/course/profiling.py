"""Time of training: where a step's time goes, and how it grows with batch size, width and image size.

Everything is measured in turn, so that a change of the machine's speed affects all measurements alike. The shortest
round counts, because every disturbance lengthens a measurement. Nothing else should run meanwhile: `background_load`
is the share of the processor that other programs took.
"""

import keras
import numpy as np
import pandas as pd
from keras import layers

from fcnn_utils import benchmark, cost, keras_graph
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils.course import augmentation, environment, networks, training

PARTS = ["input", "forward", "backward", "normalisation", "loop"]


def bare(model):
    """Copy a model without its batch normalisations and ReLUs: what remains are the convolutions."""
    removed = [
        layer
        for layer in model.layers
        if isinstance(layer, (layers.BatchNormalization, layers.ReLU))
        or (isinstance(layer, layers.Activation) and layer.activation is keras.activations.relu)
    ]
    return keras_graph.rebuild(model, {id(layer): [] for layer in removed})


def step_parts(models, split, recipe, scale, rounds=3):
    """Split the time of a training into parts, for several networks in turn.

    All times are the shortest, in ms per image:

        images_per_second  of the whole training
        ms                 time of the whole training, the sum of the five parts:
        input              scaling, mirroring and shifting the images
        forward            the convolutions
        backward           the convolutions, and the update of all weights
        normalisation      batch normalisations and ReLUs, forward and backward
        loop               everything around the steps; noise can make it negative
        macs               per image, forward
        macs_per_second    of the training, counted as three times the forward MACs
        background_load    see the module

    The first layer passes no gradient on, so it needs less than three times its MACs; it is counted as if it did.

    Args:
        models: dict name -> built keras.Model, each with the dtype that it trains in. They are compiled and trained.
        split: `data.Split`, the images of some batches.
        recipe: `recipes.Recipe`, of which batch size, augmentation and optimizer matter.
        scale: from `augmentation.channel_statistics`.
        rounds: number of rounds that count, from 1 to 1000, after one that does not.

    Returns:
        DataFrame with these columns, indexed by network.

    Raises:
        ValueError: if there are fewer images than a batch, or `rounds` is out of range.
    """
    check_number("rounds", rounds, int, 1, 1000)
    if len(split) < recipe.batch_size:
        raise ValueError(f"batch_size must be at most {len(split)}, the number of images; got {recipe.batch_size}")
    works = _training_works(models, split, recipe, scale)
    load = benchmark.BackgroundLoad()
    ms = 1e3 / benchmark.alternate(works, rounds).max()
    load = round(load.share(), 3)
    rows = {}
    for name, model in models.items():
        macs = cost.total_costs(model)["macs"]
        rows[name] = {
            "images_per_second": 1e3 / ms["whole", name],
            "ms": ms["whole", name],
            "input": ms["input", ""],
            "forward": ms["forward", name],
            "backward": ms["bare", name] - ms["forward", name],
            "normalisation": ms["step", name] - ms["bare", name],
            "loop": ms["whole", name] - ms["step", name] - ms["input", ""],
            "macs": macs,
            "macs_per_second": 3e3 * macs / ms["whole", name],
            "background_load": load,
        }
    return pd.DataFrame(rows).T


def growth(points, recipe, rounds=3):
    """Measure the time of a training step at points that differ in batch size, width or image size.

    Args:
        points: list of (model, varied, value): a name for `networks.build`; "batch", "width" or "size" (pixels per
            side); and its value. What does not vary is the recipe's batch size, width 1, and 32 pixels.
        recipe: `recipes.Recipe`, of which optimizer, precision and batch size matter.
        rounds: number of rounds that count, after one that does not.

    Returns:
        DataFrame with model, varied, value, macs (per image, forward), ms (per image, the shortest) and
        background_load, one row per point.

    Raises:
        ValueError: if something else varies, or a point occurs twice.
    """
    dtype, works, rows = environment.precision(recipe.precision), {}, []
    for name, varied, value in points:
        check_choice("what varies", varied, ("batch", "width", "size"))
        if (name, varied, value) in works:
            raise ValueError(f"points must differ; {name}, {varied} {value} occurs twice")
        setting = {"batch": recipe.batch_size, "width": 1.0, "size": 32} | {varied: value}
        shape = (setting["size"], setting["size"], 3)
        model = networks.build(name, shape, width=setting["width"], dtype=dtype)
        training.compile_model(model, recipe, 1)
        works[name, varied, value] = _random_steps(model, setting["batch"], shape)
        rows.append((name, varied, value, cost.total_costs(model)["macs"]))
    load = benchmark.BackgroundLoad()
    ms = 1e3 / benchmark.alternate(works, rounds).max()
    table = pd.DataFrame(rows, columns=["model", "varied", "value", "macs"])
    return table.assign(ms=[ms[row[:3]] for row in rows], background_load=round(load.share(), 3))


def exponents(table):
    """Fit how the times and MACs of `growth` grow: the exponent p of value^p, by least squares on log–log axes.

    Returns:
        DataFrame indexed by (model, varied), with the columns time and macs.
    """
    rows = {}
    for key, points in table.groupby(["model", "varied"], sort=False):
        logs = np.log(points[["value", "ms", "macs"]].to_numpy(float))
        rows[key] = dict(zip(("time", "macs"), np.polyfit(logs[:, 0], logs[:, 1:], 1)[0], strict=True))
    return pd.DataFrame(rows).T.rename_axis(["model", "varied"])


def _training_works(models, split, recipe, scale):
    """Return what `step_parts` times, for `benchmark.alternate`: (part, network) -> function that does it."""
    steps = len(split) // recipe.batch_size
    classes = next(iter(models.values())).output_shape[-1]

    def batches():
        return augmentation.batches(split, recipe, 0, scale, classes)

    def whole(model):
        training.fit_epoch(model, batches(), steps)
        return steps * recipe.batch_size

    ready = list(batches())

    def on_ready(call):
        for images, labels in ready:
            call(images, labels)
        return steps * recipe.batch_size

    works = {("input", ""): lambda: sum(len(images) for images, _ in batches())}
    for name, model in models.items():
        stripped = bare(model)
        for each in (model, stripped):
            training.compile_model(each, recipe, steps)
        works["whole", name] = lambda model=model: whole(model)
        works["step", name] = lambda model=model: on_ready(model.train_on_batch)
        works["bare", name] = lambda model=stripped: on_ready(model.train_on_batch)
        works["forward", name] = lambda model=stripped: on_ready(lambda images, _: model.predict_on_batch(images))
    return works


def _random_steps(model, batch, shape):
    """Return a function that trains on random images, about 16 or one batch, and returns their number."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, *shape)).astype("float32")
    classes, steps = model.output_shape[-1], max(1, 16 // batch)
    labels = np.eye(classes, dtype="float32")[rng.integers(0, classes, batch)]

    def work():
        for _ in range(steps):
            model.train_on_batch(images, labels)
        return steps * batch

    return work
