"""Factorizing while training: `fcnn_utils.course.switching`, and how `experiments` resumes such a run."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import cost
from fcnn_utils.course import augmentation, checkpoints, experiments, records, switching, training
from fcnn_utils.course.recipes import RECIPES

RECIPE = RECIPES["faster"].replace(
    epochs=3, batch_size=20, precision="float32", learning_rate=0.05, factorize_at=1, factorize_to=0.5
)


def network(seed=0):
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((8, 8, 3))]
    for number in (1, 2, 3):
        stack += [
            layers.Conv2D(16, 3, padding="same", name=f"conv{number}"),
            layers.BatchNormalization(name=f"bn{number}"),
        ]
        stack.append(layers.ReLU())
    stack += [layers.GlobalAveragePooling2D(), layers.Dense(10, activation="softmax", name="scores")]
    return keras.Sequential(stack, name="tiny")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Record of a run that was not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FCNN_OUTPUT", str(tmp_path_factory.mktemp("whole")))
        return experiments.train(network(), dataset, RECIPE, quiet=True)


def same(found, expected):
    return all(np.array_equal(*each) for each in zip(found.get_weights(), expected.get_weights(), strict=True))


@pytest.mark.parametrize("method", ["spatial", "tucker", "cp", "auto"])
def test_network_is_factorized_to_the_share_of_its_macs_and_again_by_the_ranks(method):
    model, other = network(), network(seed=1)
    recipe = RECIPE.replace(factorize_by=method)
    small, made = switching.factorize(model, recipe)
    macs = [cost.total_costs(each)["macs"] for each in (model, small)]
    assert 0.4 * macs[0] < macs[1] <= 0.5 * macs[0]
    assert made["after"] == 1 and {"conv2", "conv3"} <= set(made["ranks"])
    assert method in ("auto", *(name for name, _ in made["ranks"].values()))
    again, repeated = switching.factorize(other, recipe, made["ranks"])
    assert [each.shape for each in again.weights] == [each.shape for each in small.weights]
    assert repeated["ranks"] == made["ranks"] and not same(again, small)


def test_fresh_factors_have_nothing_of_the_dense_kernels():
    model = network()
    recipes = [RECIPE.replace(factorize_at=0, factors=factors) for factors in ("decomposed", "fresh")]
    decomposed, fresh = (switching.factorize(model, recipe)[0] for recipe in recipes)
    assert [each.shape for each in fresh.weights] == [each.shape for each in decomposed.weights]
    np.testing.assert_array_equal(decomposed.get_layer("conv1").kernel, model.get_layer("conv1").kernel)
    assert not np.array_equal(fresh.get_layer("conv1").kernel, model.get_layer("conv1").kernel)
    with pytest.raises(ValueError, match="factors can be fresh only if factorize_at is 0; it is 1"):
        RECIPE.replace(factors="fresh")
    with pytest.raises(ValueError, match="carry needs factorize_at; it is None"):
        RECIPES["faster"].replace(carry="none")


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("carry", ["both", "rate", "none"])
def test_rate_and_momentum_carry_over_as_the_recipe_says(dataset, carry, optimizer):
    """Muon steps batch norms by Adam, whose averages start anew."""
    recipe, model = RECIPE.replace(carry=carry, optimizer=optimizer), network()
    training.fit(model, dataset, recipe, epochs=1)
    small, _ = switching.factorize(model, recipe)
    switching.carry_over(model, small, recipe, 5)
    rate, expected = (float(each.optimizer.learning_rate) for each in (small, model))
    assert (rate == expected) == (carry != "none") and (rate == 0) == (carry == "none")  # 0: a warm-up begins
    assert int(small.optimizer.iterations) == 0

    def momentum(network, layer, weight):
        place = [each.path.split("/")[-2:] for each in network.trainable_variables].index([layer, weight])
        return np.array(network.optimizer.momentums[place])

    for place, carries in ((("conv1", "kernel"), True), (("bn3", "gamma"), optimizer == "sgd")):
        assert momentum(model, *place).any()
        expected = momentum(model, *place) if carries and carry == "both" else 0
        np.testing.assert_array_equal(momentum(small, *place), expected)
    assert momentum(small, "conv2", "kernel").shape != momentum(model, "conv2", "kernel").shape
    assert not momentum(small, "conv2", "kernel").any()


@pytest.mark.parametrize("method", ["spatial", "tucker", "cp", "cp4", "tt", "svd", "separable"])
def test_norm_of_a_product_is_that_of_its_response_to_single_pixels(method):
    """A chain without biases, applied to one pixel of one channel, gives the kernel of that channel."""
    dense = network()
    small, made = switching.factorize(dense, RECIPE.replace(factorize_by=method))
    chain = switching.chains_of(dense, small, made["ranks"])["conv2"]
    pixels = np.zeros((16, 9, 9, 16), "float32")
    pixels[np.arange(16), 4, 4, np.arange(16)] = 1
    response = pixels
    for layer in chain:
        response = layer(response)  # their biases are 0
    expected = float(keras.ops.sum(response**2))
    assert len(chain) > 1 and expected > 0.1
    assert float(switching.product_norm(chain)) == pytest.approx(expected, rel=1e-4)


def test_decay_of_products_adds_to_the_loss(dataset):
    dense = network()
    small, made = switching.factorize(dense, RECIPE)
    training.compile_model(small, RECIPE, 5)
    x, y = np.ones((2, 8, 8, 3), "float32"), np.eye(10, dtype="float32")[:2]
    before = float(small.compute_loss(x, y, small(x)))
    switching.decay_products(dense, small, made["ranks"], 0.02)
    pairs = [[small.get_layer(f"{name}{end}") for end in ("_column", "")] for name in ("conv2", "conv3")]
    norms = sum(float(switching.product_norm(pair)) for pair in pairs)
    assert float(small.compute_loss(x, y, small(x))) == pytest.approx(before + 0.01 * norms, rel=1e-4) and norms > 1
    changed = experiments.train(network(), dataset, RECIPE.replace(product_decay=0.5), quiet=True)
    assert changed["epochs"][1]["loss"] > changed["epochs"][1]["cross_entropy"] + 1


def test_chains_are_found_whatever_the_names_of_the_other_layers():
    """NAME_bn is a batch norm of the dense network, and NAME_1 another convolution of it."""
    stack = [keras.Input((8, 8, 16))]
    for name in ("conv", "conv_1", "conv_1_2"):
        stack += [layers.Conv2D(16, 3, padding="same", name=name), layers.BatchNormalization(name=f"{name}_bn")]
    dense = keras.Sequential([*stack, layers.Flatten(), layers.Dense(10, name="scores")])
    small, made = switching.factorize(dense, RECIPE)
    found = {
        name: [each.name for each in chain] for name, chain in switching.chains_of(dense, small, made["ranks"]).items()
    }
    assert found == {name: [f"{name}_column", name] for name in ("conv", "conv_1", "conv_1_2")}


@pytest.mark.parametrize("at", [0, 1])
def test_run_is_factorized_once_and_says_so(dataset, output, at):
    recipe = RECIPE.replace(factorize_at=at)
    record = experiments.train(network(), dataset, recipe, save_model=True)
    dense = cost.total_costs(network())
    assert record["dense"] == {key: dense[key] for key in ("params", "trainable", "macs")}
    assert record["macs"] <= 0.5 * dense["macs"] and [row["epoch"] for row in record["epochs"]] == [1, 2, 3]
    assert record["factorization"].keys() == {"after", "seconds", "ranks"} and record["factorization"]["after"] == at
    kept = experiments.load_trained("tiny", dataset.name, recipe.name)
    assert kept.count_params() == record["params"] < dense["params"]
    scale = augmentation.channel_statistics(dataset)
    assert training.evaluate(kept, dataset.test, scale)["correct_by_class"] == record["test"]["correct_by_class"]


@pytest.mark.parametrize(
    "where, name, call, kept",
    [
        (checkpoints, "save", 1, 0),
        (records, "write", 1, 1),
        (switching, "carry_over", 1, 1),
        (checkpoints, "save", 2, 1),
        (records, "write", 2, 2),
        (checkpoints, "save", 3, 2),
    ],
)
def test_interrupted_run_continues_on_either_side_of_the_switch(dataset, whole, monkeypatch, where, name, call, kept):
    calls, original = [], getattr(where, name)

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, interrupted)
        with pytest.raises(
            KeyboardInterrupt, match=f"epochs 1 to {kept} of 3" if kept else "no epoch of tiny was done"
        ):
            experiments.train(network(), dataset, RECIPE)
    again = experiments.train(network() if kept == 0 else network(seed=5), dataset, RECIPE)
    assert again["factorization"]["ranks"] == whole["factorization"]["ranks"]
    for row, other in zip(again["epochs"], whole["epochs"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert again["test"]["loss"] == pytest.approx(whole["test"]["loss"], rel=1e-3)
