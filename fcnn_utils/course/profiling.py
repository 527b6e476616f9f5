"""What training costs on the clock: a step taken apart, and how its time grows with batch, width and image size.

All of it is measured in turn, so that a change of the machine's pace meets all alike, on a machine that should be doing
nothing else: `background_load` is the share of the processor that other programs took meanwhile. Of the rounds the shortest
counts, as for the peaks of `speed`: whatever disturbs a measurement, also from outside a virtual machine, lengthens it.
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
    """A copy of `model` without its batch normalisations and ReLUs: what its convolutions cost alone."""
    left_out = [
        layer
        for layer in model.layers
        if isinstance(layer, (layers.BatchNormalization, layers.ReLU))
        or (isinstance(layer, layers.Activation) and layer.activation is keras.activations.relu)
    ]
    return keras_graph.rebuild(model, {id(layer): [] for layer in left_out})


def step_parts(networks, split, recipe, scale, rounds=3):
    """Where the time of a training goes, for several networks in turn, each in the precision that it has.

    Five things are timed on the same images: the training as `training.train` does it; its steps on batches that lie
    ready; the steps of the bare network (`bare`); the forward pass of that; and the preparation of the batches. The
    columns, all times the shortest, in ms an image:

        images_per_second  of the whole training
        ms                 of the whole training, of which
        input              images scaled, mirrored and moved
        forward            the convolutions
        backward           the convolutions, with the update of all weights
        normalisation      batch normalisations and ReLUs, forward and backward
        loop               the rest, everything around the steps (by noise it may come out below 0)
        macs               of an image, forward
        macs_per_second    in training, counted as three times those
        background_load         see the module

    The first layer passes no gradient on, and takes less than three times its MACs: it is counted as if it did.

    Args:
        networks: dict name -> built keras.Model. They are compiled and trained here.
        split: `data.Split`, some batches' worth of images.
        recipe: `recipes.Recipe`, whose batches, augmentation and optimizer count.
        scale: from `augmentation.channel_statistics`.
        rounds: how often everything is measured; a round before these does not count.

    Returns:
        DataFrame with these columns, indexed by network.

    Raises:
        ValueError: fewer images than a batch, or `rounds` is not from 1 to 1000.
    """
    check_number("rounds", rounds, int, 1, 1000)
    steps = len(split) // recipe.batch_size
    if not steps:
        raise ValueError(f"batch_size must be at most {len(split)}, the images; got {recipe.batch_size}")
    classes = next(iter(networks.values())).output_shape[-1]
    ready = list(augmentation.batches(split, recipe, 0, scale, classes))

    def on_ready(call):
        def work():
            for batch in ready:
                call(*batch)
            return steps * recipe.batch_size

        return work

    def whole(model):
        training.fit_epoch(model, augmentation.batches(split, recipe, 0, scale, classes), steps)
        return steps * recipe.batch_size

    def input_alone():
        return sum(len(images) for images, _ in augmentation.batches(split, recipe, 0, scale, classes))

    works = {("input", ""): input_alone}
    for name, model in networks.items():
        stripped = bare(model)
        for one in (model, stripped):
            training.compile_model(one, recipe, steps)
        works["whole", name] = lambda model=model: whole(model)
        works["step", name] = on_ready(model.train_on_batch)
        works["bare", name] = on_ready(stripped.train_on_batch)
        works["forward", name] = on_ready(lambda images, _, stripped=stripped: stripped.predict_on_batch(images))
    load = benchmark.BackgroundLoad()
    ms = 1e3 / benchmark.alternate(works, rounds).max()  # an image
    others = round(load.share(), 3)
    rows = {}
    for name, model in networks.items():
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
            "background_load": others,
        }
    return pd.DataFrame(rows).T


def growth(points, recipe, rounds=3):
    """Time of a training step for an image, at points where one of batch, width and image size varies.

    Args:
        points: list of (model, varied, value): a name that `networks.build` knows; "batch", "width" or "size"
            (pixels of a side); and its value. The others stay: the recipe's batch, width 1, 32 pixels.
        recipe: its optimizer and precision count, and its batch size where another thing varies.
        rounds: how often each point is measured; a round before these does not count.

    Returns:
        DataFrame, a row a point, with model, varied, value, macs (an image, forward), ms (an image, the shortest) and
        background_load.

    Raises:
        ValueError: another thing is said to vary, or a point is there twice.
    """
    dtype, works, rows = environment.precision(recipe.precision), {}, []
    for name, varied, value in points:
        check_choice("what varies", varied, ("batch", "width", "size"))
        if (name, varied, value) in works:
            raise ValueError(f"each point must be there once; {name}, {varied} {value} is there twice")
        setting = {"batch": recipe.batch_size, "width": 1.0, "size": 32} | {varied: value}
        shape = (setting["size"], setting["size"], 3)
        model = networks.build(name, shape, width=setting["width"], dtype=dtype)
        training.compile_model(model, recipe, 1)
        works[name, varied, value] = _steps(model, setting["batch"], shape)
        rows.append((name, varied, value, cost.total_costs(model)["macs"]))
    load = benchmark.BackgroundLoad()
    ms = 1e3 / benchmark.alternate(works, rounds).max()
    table = pd.DataFrame(rows, columns=["model", "varied", "value", "macs"])
    return table.assign(ms=[ms[row[:3]] for row in rows], background_load=round(load.share(), 3))


def exponents(table):
    """How `growth`'s times and MACs grow: the exponent p of value^p, fitted over all points, both axes logarithmic.

    Returns:
        DataFrame indexed by (model, varied), with the exponents of time and macs.
    """
    rows = {}
    for key, points in table.groupby(["model", "varied"], sort=False):
        values = np.log(points["value"].to_numpy(float))
        rows[key] = {
            column: np.polyfit(values, np.log(points[name].to_numpy(float)), 1)[0]
            for column, name in (("time", "ms"), ("macs", "macs"))
        }
    return pd.DataFrame(rows).T.rename_axis(["model", "varied"])


def _steps(model, batch, shape):
    """Work for `benchmark.alternate`: training steps on random images, at least 16 images' worth."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, *shape)).astype("float32")
    classes = model.output_shape[-1]
    labels = np.eye(classes, dtype="float32")[rng.integers(0, classes, batch)]

    def work():
        for _ in range(count := max(1, 16 // batch)):
            model.train_on_batch(images, labels)
        return count * batch

    return work
