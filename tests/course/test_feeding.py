"""Feeding `model.fit`: `fcnn_utils.course.feeding`, compared with steps on the same batches one by one."""

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils.course import augmentation, feeding, training
from fcnn_utils.course.recipes import RECIPES

RECIPE = RECIPES["faster"].replace(epochs=3, batch_size=16, precision="float32", learning_rate=0.05, flip="alternating")


@pytest.fixture(scope="module")
def scale(dataset):
    return augmentation.channel_statistics(dataset)


def network(recipe, seed=0):
    """A small compiled network with a batch normalisation, whose averages training changes, too."""
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()]
    model = keras.Sequential([*stack, layers.Flatten(), layers.Dense(10, activation="softmax")])
    training.compile_model(model, recipe, 5)
    return model


def on_batches(model, split, recipe, scale, epochs):
    """Train on batch after batch; return the mean loss of each epoch."""
    losses = []
    for epoch in epochs:
        batches = augmentation.batches(split, recipe, epoch, scale, 10)
        losses.append(np.mean([model.train_on_batch(*batch, return_dict=True)["loss"] for batch in batches]))
    return losses


TOGETHER = [None, 1, 2, 5, 99] if keras.config.backend() == "jax" else [None]  # others take no notice


@pytest.mark.parametrize("eager", ["", "1"], ids=["compiled", "eager"])
@pytest.mark.parametrize("together", TOGETHER, ids="{} steps in a program".format)
def test_fit_makes_the_steps_of_the_same_batches(dataset, scale, monkeypatch, together, eager):
    """In float32 and to its rounding. The 80 images make 5 batches, which 2 does not divide."""
    monkeypatch.setenv("FCNN_EAGER", eager)
    model, expected = network(RECIPE), network(RECIPE)
    feed = feeding.Feed(model, dataset.train, RECIPE, scale, steps_per_program=together)
    losses = feed.fit(range(2)).history["loss"] + feed.fit(range(2, 3)).history["loss"]
    np.testing.assert_allclose(losses, on_batches(expected, dataset.train, RECIPE, scale, range(3)), rtol=1e-4)
    assert losses[0] != losses[1] and int(model.optimizer.iterations) == 15
    for weight, other in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-3, atol=1e-5)


def test_callbacks_see_every_step(dataset, scale):
    seen, feed = [], feeding.Feed(network(RECIPE), dataset.train, RECIPE, scale, steps_per_program=1)
    steps = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append((batch, logs["loss"])))
    history = feed.fit(range(1), [steps]).history
    assert [batch for batch, _ in seen] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(seen[-1][1], history["loss"][0], rtol=1e-6)  # the mean so far


def test_model_can_be_trained_by_keras_alone_afterwards(dataset, scale):
    """Nothing of ours stays on the model: `fit` on other batches, of another size, works."""
    model = network(RECIPE)
    feeding.Feed(model, dataset.train, RECIPE, scale).fit(range(1))
    x = augmentation.normalize(dataset.test.images[:10], scale)
    before = model.evaluate(x, np.eye(10)[dataset.test.fine[:10]], verbose=0)[0]
    history = model.fit(x, np.eye(10)[dataset.test.fine[:10]], batch_size=5, epochs=20, verbose=0).history
    assert len(history["loss"]) == 20 and history["loss"][-1] < before
    assert model.steps_per_execution == 1 and int(model.optimizer.iterations) == 5 + 20 * 2
