"""Factorize a network while it is trained: before the first step, or after some of the epochs.

Before the first step, the factors come from the random dense kernels (spectral initialization, Khodak et al. 2021,
arXiv 2105.01029). After some epochs, they come from kernels that are already partly trained (Pufferfish, Wang et al.
2021, arXiv 2103.03936). `decay_products` adds the Frobenius decay of Khodak et al. to the loss.
"""

import time

import keras
import numpy as np

from fcnn_utils import compress, cost
from fcnn_utils.course import training


def factorize(model, recipe, ranks=None):
    """Factorize a network by the recipe's `factorize_by`, `factorize_to` and `factors`.

    Args:
        model: built functional or Sequential keras.Model; it is not changed.
        recipe: `recipes.Recipe`.
        ranks: the "ranks" of an earlier result, to build the same network again. Default: choose them now. Every layer
            then keeps the same share of its parameters, the largest one within `factorize_to`.

    Returns:
        (keras.Model, dict of JSON types). The network is not compiled. The dict has "after" (epochs trained before),
        "seconds" (time of the factorization) and "ranks" (dict layer name -> [method, list of int]).

    Raises:
        ValueError: if even the smallest ranks need more MACs than `factorize_to` allows, or if no layer can be
            factorized.
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
    """Compile the factorized network and hand over learning-rate schedule and momentum, as the recipe's `carry` says.

    A weight gets the momentum of the weight with the same layer, name and shape. Adam's moving averages always restart
    at zero. Its bias correction has a single step count for all weights, so it cannot be right for kept and for new
    averages at once.

    Args:
        dense: compiled network from before the switch; None if the switch is before the first step.
        model: factorized network, built and not compiled.
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


def decay_products(dense, model, layers, rate):
    """Add Frobenius decay to the loss of a factorized network: it changes `model.compute_loss`.

    The added term is rate / 2 times the squared Frobenius norm of the dense kernel that each chain of factors stands
    for. Weight decay on each factor alone would instead penalize the nuclear norm of the product, which lowers its
    rank. A copy of the model, or one that is loaded, does not have this term.

    Args:
        dense: the network from before.
        model: the factorized network, before `fit`.
        layers: names of the layers that were factorized.
        rate: the factor; 0 adds nothing.
    """
    if rate == 0:
        return
    chains = chains_of(dense, model, layers).values()
    own = model.compute_loss

    def compute_loss(*arguments, **options):
        return own(*arguments, **options) + rate / 2 * sum(product_norm(chain) for chain in chains)

    model.compute_loss = compute_loss


def chains_of(dense, model, layers):
    """Return the chains of a factorized network: dict from the name of each factorized layer to its list of layers.

    The last layer of a chain has the name of the dense one, NAME. The others are new and are called `NAME_…`.
    """
    before, chains = {layer.name for layer in dense.layers}, {name: [] for name in layers}
    for layer in model.layers:
        if layer.name in chains or layer.name not in before:
            owners = [name for name in layers if layer.name == name or layer.name.startswith(f"{name}_")]
            chains[max(owners, key=len)].append(layer)
    return chains


def product_norm(chain):
    """Return the squared Frobenius norm of the dense kernel that a chain of convolutions is equivalent to.

    Each position of the dense kernel must come from one tap of each layer only, as in the chain 1×1, 3×1, 1×3. This
    holds for all chains of `factorizations`, and is not checked. Let G (channels, channels) be the Gram matrix of the
    kernels so far. The next kernel has one matrix T (in, out) for each tap. It changes G into the sum of TᵀGT over its
    taps.

    Args:
        chain: list of convolutions in their order, dense or depthwise, with no activation in between.

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
