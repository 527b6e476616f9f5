"""Factorize a network while it is trained: before the first step, or after some of the epochs.

Before the first step, the factors of the random dense kernels are a start (spectral initialization, Khodak et al. 2021,
arXiv 2105.01029). After some epochs, the factors start from kernels that have learnt something (Pufferfish, Wang et al.
2021, arXiv 2103.03936). `decay_products` is the Frobenius decay of Khodak et al.
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

    Raises:
        ValueError: if no network has so few MACs, or no layer can be factorized.
    """
    started = time.perf_counter()
    if ranks is None:
        budget = recipe.factorize_to * cost.total_costs(model)["macs"]
        try:
            small, report = compress.factorize(model, recipe.factorize_by, macs=budget, seed=recipe.seed, verbose=0)
        except ValueError as error:
            share = f"{recipe.factorize_to:g} of the MACs of {model.name}"
            raise ValueError(f"{recipe.factorize_by} cannot make a network of {share}: {error}") from None
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

    Adam's averages start anew in any case: their correction for the start at 0 has one step count for all weights.

    Args:
        dense: the network from before, compiled; or None if there is no momentum yet.
        model: the factorized network.
        recipe: `recipes.Recipe`.
        steps: steps per epoch.
    """
    rate, done = training.learning_rate_schedule(recipe, steps), recipe.factorize_at
    if recipe.carry == "none":
        rate = training.learning_rate_schedule(recipe, steps, recipe.epochs - done)
    elif recipe.schedule != "constant":
        rate = training.From(rate, done * steps)
    training.compile_model(model, recipe, steps, rate)
    model.optimizer.build(model.trainable_variables)
    if recipe.carry == "both" and dense is not None:
        earlier = _momenta(dense)
        for place, momentum in _momenta(model).items():
            if place in earlier and earlier[place].shape == momentum.shape:
                momentum.assign(earlier[place])


def decay_products(model, layers, rate):
    """Add rate / 2 times the squared norms of the kernels that factors stand for to the loss of a network, in place.

    Decaying each factor by itself would shrink the product by its nuclear norm, which makes the rank smaller.

    Args:
        model: the factorized network.
        layers: names of the factorized layers.
        rate: the factor; 0 adds nothing.
    """
    if rate == 0:
        return
    chains = [
        [each for each in model.layers if (each.name == name or each.name.startswith(f"{name}_")) and each.weights]
        for name in layers
    ]
    own = model.compute_loss

    def compute_loss(*arguments, **options):
        return own(*arguments, **options) + rate / 2 * sum(product_norm(chain) for chain in chains)

    model.compute_loss = compute_loss


def product_norm(chain):
    """Return the squared norm of the kernel of one convolution that does what a chain of them does.

    No two products of taps may fall on the same place, as in 1×1, 3×1 and 1×3. Let G be the Gram matrix of the kernels
    so far, (channels, channels). With the next kernel it becomes the sum over its taps T of TᵀGT.

    Args:
        chain: list of convolutions, depthwise ones, too, in their order, with no activation in between.

    Returns:
        Tensor of shape ().
    """
    gram = None
    for layer in chain:
        kernel = layer.kernel
        taps = keras.ops.reshape(kernel, (-1, *kernel.shape[-2:]))  # (taps, in, out)
        count = taps.shape[1]
        if isinstance(layer, keras.layers.DepthwiseConv2D):  # (taps, channels, multiplier), as a dense kernel
            taps = keras.ops.reshape(taps[:, :, None, :] * keras.ops.eye(count)[:, :, None], (len(taps), count, -1))
        gram = keras.ops.eye(count) if gram is None else gram
        gram = keras.ops.sum(keras.ops.swapaxes(taps, 1, 2) @ gram @ taps, axis=0)
    return keras.ops.trace(gram)


def _momenta(model):
    """Return the momentum of each weight that has one and no other average: dict (layer, weight) -> variable."""
    found = {}
    for weight in model.trainable_variables:
        start = weight.path.replace("/", "_") + "_"
        own = {each.name.removeprefix(start): each for each in model.optimizer.variables if each.name.startswith(start)}
        if own.keys() == {"momentum"}:
            found[tuple(weight.path.split("/")[-2:])] = own["momentum"]  # without the name of the model
    return found
