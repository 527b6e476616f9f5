"""Profile training: the time of each part of a step, and its growth with batch size, width and image size.

All quantities are measured in turn, so that a change of the machine's speed affects them alike. The
shortest round counts, because every disturbance lengthens a measurement. Nothing else should run
meanwhile: `background_load` is the share of the processor that other programs took.
"""

import keras
import numpy as np
import pandas as pd
from keras import layers

from fcnn_utils import benchmark, cost, keras_graph
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils.course import augmentation, environment, networks, training

PARTS = ["input", "forward", "backward", "normalisation"]


def bare(model):
    """Copy a model without its batch normalisations and ReLUs, to time the convolutions alone."""
    removed = [
        layer
        for layer in model.layers
        if isinstance(layer, (layers.BatchNormalization, layers.ReLU))
        or (isinstance(layer, layers.Activation) and layer.activation is keras.activations.relu)
    ]
    return keras_graph.rebuild(model, {id(layer): [] for layer in removed})


def step_parts(models, split, recipe, scale, rounds=3):
    """Split the training time of several networks into parts.

    Times are in ms per image. The columns:

        images_per_second  1000 / ms
        ms                 the sum of the next four columns: the preparation of a batch and a step on it
        input              normalising, mirroring and shifting the images
        forward            convolutions, forward pass
        backward           convolutions, backward pass, and the update of their weights
        normalisation      batch normalisations and ReLUs, both passes and the update
        macs               per image, forward pass
        macs_per_second    counted as three times the forward MACs
        background_load    see the module

    The factor of three slightly overcounts the first layer, which passes no gradient to the images. The start of
    `fit` is not measured: it is the same for every network, and small in a training of many steps.

    Args:
        models: dict name -> built keras.Model in the dtype of its training. They are compiled and trained.
        split: `data.Split` with the images of at least one batch.
        recipe: `recipes.Recipe`; its batch size, augmentation and optimizer matter.
        scale: (mean, standard deviation), from `augmentation.channel_statistics`.
        rounds: number of rounds that count, from 1 to 1000, after a warm-up round.

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
            "images_per_second": 1e3 / (ms["step", name] + ms["input", ""]),
            "ms": ms["step", name] + ms["input", ""],
            "input": ms["input", ""],
            "forward": ms["forward", name],
            "backward": ms["bare", name] - ms["forward", name],
            "normalisation": ms["step", name] - ms["bare", name],
            "macs": macs,
            "macs_per_second": 3e3 * macs / (ms["step", name] + ms["input", ""]),
            "background_load": load,
        }
    return pd.DataFrame(rows).T


def growth(points, recipe, rounds=3):
    """Measure the time of a training step for several batch sizes, widths or image sizes.

    Args:
        points: list of (model, varied, value): a name for `networks.build`; "batch", "width" or "size"
            (pixels per side); its value. The other two are the recipe's batch size, width 1 or 32 pixels.
        recipe: `recipes.Recipe`; its optimizer, precision and batch size matter.
        rounds: number of rounds that count, after a warm-up round.

    Returns:
        DataFrame with model, varied, value, macs (per image, forward pass), ms (per image, the shortest)
        and background_load, one row per point.

    Raises:
        ValueError: if a name or `varied` is unknown, or a point occurs twice.
    """
    dtype, works, rows = environment.precision(recipe.precision), {}, []
    for name, varied, value in points:
        check_choice("varied", varied, ("batch", "width", "size"))
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
    """Fit the exponent p of value^p to the times and MACs of a table of `growth`.

    Returns:
        DataFrame indexed by (model, varied), with the columns time and macs: slopes of least-squares lines
        on log–log axes.
    """
    rows = {}
    for key, points in table.groupby(["model", "varied"], sort=False):
        logs = np.log(points[["value", "ms", "macs"]].to_numpy(float))
        rows[key] = dict(zip(("time", "macs"), np.polyfit(logs[:, 0], logs[:, 1:], 1)[0], strict=True))
    return pd.DataFrame(rows).T.rename_axis(["model", "varied"])


def _training_works(models, split, recipe, scale):
    """Return the functions that `step_parts` times: dict (part, network) -> function for `benchmark.alternate`."""
    steps = len(split) // recipe.batch_size
    classes = next(iter(models.values())).output_shape[-1]

    def batches():
        return augmentation.batches(split, recipe, 0, scale, classes)

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
        works["step", name] = lambda model=model: on_ready(model.train_on_batch)
        works["bare", name] = lambda model=stripped: on_ready(model.train_on_batch)
        works["forward", name] = lambda model=stripped: on_ready(lambda images, _: model.predict_on_batch(images))
    return works


def _random_steps(model, batch, shape):
    """Return a function that trains on random images, about 16 but at least one batch, and returns their number."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, *shape)).astype("float32")
    classes, steps = model.output_shape[-1], max(1, 16 // batch)
    labels = np.eye(classes, dtype="float32")[rng.integers(0, classes, batch)]

    def work():
        for _ in range(steps):
            model.train_on_batch(images, labels)
        return steps * batch

    return work
