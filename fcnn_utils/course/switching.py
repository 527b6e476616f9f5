"""Factorize a network while it is trained: before the first step, or after some of the epochs.

Before the first step, the factors of the random dense kernels are a start (spectral initialization, Khodak et al. 2021,
arXiv 2105.01029). After some epochs, the factors start from kernels that have learnt something (Pufferfish, Wang et al.
2021, arXiv 2103.03936).
"""

import time

import keras
import numpy as np

from fcnn_utils import compress, cost
from fcnn_utils.course import training


def factorize(model, recipe, ranks=None):
    """Factorize a network by the recipe's `factorize_by`, `factorize_to` and `factors`.

    Args:
        model: built keras.Model.
        recipe: `recipes.Recipe`.
        ranks: what an earlier call returned as "ranks", to build the same network again; default: chosen anew. All
            layers get the same share of their parameters, as large as the MACs allow.

    Returns:
        (keras.Model, dict of JSON types): the new network, not compiled, and how it was made: "after" (epochs),
        "seconds" (time that it took) and "ranks" (dict layer -> [method, ranks]).
    """
    started = time.perf_counter()
    if ranks is None:
        budget = recipe.factorize_to * cost.total_costs(model)["macs"]
        small, report = compress.factorize(model, recipe.factorize_by, macs=budget, seed=recipe.seed, verbose=0)
        made = report[report["method"].notna()]
        ranks = {row.layer: [row.method, np.ravel(row.ranks).tolist()] for row in made.itertuples()}
    else:
        given = {layer: (method, tuple(each) if len(each) > 1 else each[0]) for layer, (method, each) in ranks.items()}
        small, _ = compress.factorize(model, ranks=given, seed=recipe.seed, verbose=0)
    if recipe.factors == "fresh":
        small = keras.models.clone_model(small)  # with fresh weights, by the initializers of its layers
    seconds = round(time.perf_counter() - started, 3)
    return small, {"after": recipe.factorize_at, "seconds": seconds, "ranks": ranks}


def carry_over(dense, model, recipe, steps):
    """Compile the factorized network, and give it what the recipe's `carry` says of the training before.

    "both": the schedule of the learning rate goes on, and weights that are still there keep their momentum; "rate":
    the schedule goes on; "none": what is left of the epochs gets a schedule of its own.

    Args:
        dense: the network from before, compiled; or None before the first step.
        model: the factorized network.
        recipe: `recipes.Recipe`.
        steps: steps per epoch.
    """
    done = recipe.factorize_at * steps
    if recipe.carry == "none":
        training.compile_model(model, recipe, steps, recipe.epochs - recipe.factorize_at)
    else:
        training.compile_model(model, recipe, steps)
    model.optimizer.build(model.trainable_variables)
    if recipe.carry == "none":
        return
    model.optimizer.iterations.assign(done)
    if recipe.carry == "both" and dense is not None:
        earlier = _momenta(dense)
        for key, variable in _momenta(model).items():
            if key in earlier and earlier[key].shape == variable.shape:
                variable.assign(earlier[key])


def _momenta(model):
    """Return the optimizer's variables for each weight: dict (layer and weight, what it is) -> variable."""
    found = {}
    for weight in model.trainable_variables:
        start = weight.path.replace("/", "_") + "_"
        place = "/".join(weight.path.split("/")[-2:])  # without the name of the model
        own = [each for each in model.optimizer.variables if each.name.startswith(start)]
        found |= {(place, each.name.removeprefix(start)): each for each in own}
    return found
