"""What training costs on the clock: `fcnn_utils.course.profiling`. The clock is replaced: CI's is nobody's machine."""

import keras
import numpy as np
import pandas as pd
import pytest

from fcnn_utils.course import augmentation, data, environment, networks, profiling
from fcnn_utils.course.recipes import RECIPES

RECIPE = RECIPES["fast"].replace(batch_size=8, precision="float32")


@pytest.fixture(scope="module")
def split():
    return data.load("standin", 40, 10).everything


def small(name="wider_separable"):
    return networks.build(name, (32, 32, 3), 100, width=0.05)


def fixed(monkeypatch, ms):
    """Every kind of work takes its time in `ms`, for an image, however long it really takes; but for the last round it
    takes longer."""
    calls = []

    def alternate(works, rounds):
        for key, work in works.items():
            calls.append((key, work()))
        return pd.DataFrame([{key: 1e3 / ms(key) / longer for key in works} for longer in range(rounds, 0, -1)])

    monkeypatch.setattr(environment, "alternate", alternate)
    return calls


# --- basic -------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused(split):
    scale = np.zeros(3, "float32"), np.ones(3, "float32")
    with pytest.raises(ValueError, match="batch_size must be at most 7, the images; got 8"):
        profiling.step_parts({"a": small()}, split.first(7), RECIPE, scale)
    with pytest.raises(ValueError, match="rounds must be a whole number between 1"):
        profiling.step_parts({"a": small()}, split, RECIPE, scale, rounds=0)
    with pytest.raises(ValueError, match="what varies must be one of batch, width, size; got 'depth'"):
        profiling.growth([("simple", "depth", 2)], RECIPE)
    with pytest.raises(ValueError, match="each point must be there once; simple, width 0.05 is there twice"):
        profiling.growth([("simple", "width", 0.05)] * 2, RECIPE)


@pytest.mark.parametrize("name", [*networks.THESIS_PLANS, *networks.OUR_PLANS])
def test_the_bare_network_has_the_convolutions_and_nothing_else(name):
    model = networks.build(name, width=0.05)
    stripped = profiling.bare(model)
    kinds = {type(layer).__name__ for layer in stripped.layers}
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in stripped.layers)
    assert kinds <= {"InputLayer", "Conv2D", "SeparableConv2D", "MaxPooling2D", "Add", "GlobalAveragePooling2D"} | {
        "Activation"
    }
    assert [layer.name for layer in stripped.layers if isinstance(layer, keras.layers.Activation)] == ["softmax"]
    kept = [layer.name for layer in model.layers if "Conv2D" in type(layer).__name__]
    assert [layer.name for layer in stripped.layers if "Conv2D" in type(layer).__name__] == kept


# --- correct -----------------------------------------------------------------------------------------------------


def test_a_step_is_the_sum_of_its_parts(split, monkeypatch):
    times = {"input": 0.5, "whole": 10.0, "step": 9.0, "bare": 6.0, "forward": 2.0}
    calls = fixed(monkeypatch, lambda key: times[key[0]])
    scale = augmentation.channel_statistics(data.load("standin", 40, 10))
    table = profiling.step_parts({"a": small(), "b": small("simple")}, split.first(39), RECIPE, scale, rounds=2)
    assert list(table.index) == ["a", "b"] and all(images == 32 for _, images in calls), "four whole batches"
    row = table.loc["a"]
    expected = {"input": 0.5, "forward": 2.0, "backward": 4.0, "normalisation": 3.0, "loop": 0.5}
    np.testing.assert_allclose(row[list(expected)].astype(float), list(expected.values()), rtol=1e-12)
    np.testing.assert_allclose(row[profiling.PARTS].sum(), row["ms"], rtol=1e-12)
    np.testing.assert_allclose(row["images_per_second"], 100.0)
    np.testing.assert_allclose(row["macs_per_second"], 3 * row["macs"] * 100.0)


def test_growth_finds_the_power_that_is_there(monkeypatch):
    def ms(key):
        name, what, value = key
        return 3.0 * value ** {"batch": -0.25, "width": 1.5, "size": 2.0}[what]

    calls = fixed(monkeypatch, ms)
    values = {"batch": (1, 4), "width": (0.05, 0.1), "size": (8, 16)}
    points = [("simple", varied, value) for varied in values for value in values[varied]]
    table = profiling.growth(points, RECIPE, rounds=3)
    assert list(table.columns) == ["model", "varied", "value", "macs", "ms", "background_load"] and len(table) == 6
    assert {images for _, images in calls} == {16}, "each work is of 16 images, whatever the batch"
    np.testing.assert_allclose(table["ms"], [ms(point) for point in points], rtol=1e-12)
    found = profiling.exponents(table)
    np.testing.assert_allclose(found["time"], [-0.25, 1.5, 2.0], rtol=1e-9)
    np.testing.assert_allclose(found["macs"], [0.0, found["macs"].iloc[1], 2.0], atol=1e-9)
    assert 1.4 < found["macs"].iloc[1] < 2.0, "the first layer grows with the width, the others with its square"


def test_a_measured_time_is_a_time(split):
    scale = np.zeros(3, "float32"), np.full(3, 64, "float32")
    table = profiling.step_parts({"a": small()}, split.first(8), RECIPE, scale, rounds=1)
    assert (table[["ms", "input", "forward"]].astype(float) > 0).all(axis=None)
