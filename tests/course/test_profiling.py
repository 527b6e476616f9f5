"""Time of training: `fcnn_utils.course.profiling`. A fake clock replaces the real one, which no test can predict."""

import keras
import numpy as np
import pandas as pd
import pytest

from fcnn_utils import benchmark
from fcnn_utils.course import data, networks, profiling
from fcnn_utils.course.recipes import RECIPES

RECIPE = RECIPES["fast"].replace(batch_size=8, precision="float32")
NO_SCALE = np.zeros(3, "float32"), np.ones(3, "float32")


@pytest.fixture(scope="module")
def split():
    labels = np.arange(40)
    return data.Split(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype="uint8"), labels, labels // 5)


@pytest.fixture
def fake_clock(monkeypatch):
    """Set the time in ms per image of each work by a function of its name; return the works that were done."""
    done = []

    def set_times(ms, does_work):
        def alternate(works, rounds):
            for name, work in works.items():
                done.append((name, work() if does_work else None))
            slower = range(rounds, 0, -1)  # the last round is the fastest
            return pd.DataFrame([{name: 1e3 / ms(name) / factor for name in works} for factor in slower])

        monkeypatch.setattr(benchmark, "alternate", alternate)
        return done

    return set_times


def small(name="wider_separable"):
    return networks.build(name, width=0.05)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda split: profiling.step_parts({}, split.first(7), RECIPE, NO_SCALE), "at most 7, .*; got 8"),
        (lambda split: profiling.step_parts({}, split, RECIPE, NO_SCALE, rounds=0), "rounds must be a whole number"),
        (lambda split: profiling.growth([("simple", "depth", 2)], RECIPE), "batch, width, size; got 'depth'"),
        (lambda split: profiling.growth([("simple", "width", 0.05)] * 2, RECIPE), "simple, width 0.05 occurs twice"),
    ],
)
def test_invalid_arguments_are_rejected(split, call, message):
    with pytest.raises(ValueError, match=message):
        call(split)


@pytest.mark.parametrize("name", [*networks.THESIS_PLANS, *networks.OUR_PLANS])
def test_bare_network_keeps_convolutions_and_removes_batch_norms_and_relus(name):
    model = small(name)
    stripped = profiling.bare(model)
    removed = [layer.name for layer in model.layers if layer.name.startswith(("bn", "relu"))]
    assert removed and [layer.name for layer in stripped.layers] == [
        layer.name for layer in model.layers if layer.name not in removed
    ]
    for kept in stripped.layers:
        for ours, theirs in zip(kept.get_weights(), model.get_layer(kept.name).get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def tiny():
    """A network of a few layers for images of the stand-in."""
    x = inputs = keras.Input((32, 32, 3))
    for layer in (keras.layers.Conv2D(100, 1, strides=8), keras.layers.BatchNormalization(), keras.layers.ReLU()):
        x = layer(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Softmax()(x))


def test_parts_of_a_step_add_up_to_the_whole(split, fake_clock):
    times = {"input": 1.0, "step": 9.0, "bare": 6.0, "forward": 2.0}
    done = fake_clock(lambda name: times[name[0]], does_work=True)
    table = profiling.step_parts({"a": tiny(), "b": tiny()}, split.first(39), RECIPE, NO_SCALE, rounds=2)
    assert list(table.index) == ["a", "b"]
    assert len(done) == 7 and {images for _, images in done} == {32}  # four whole batches
    row = table.loc["a"].astype(float)
    expected = {"input": 1.0, "forward": 2.0, "backward": 4.0, "normalisation": 3.0}
    np.testing.assert_allclose(row[list(expected)], list(expected.values()), rtol=1e-12)
    np.testing.assert_allclose(row[profiling.PARTS].sum(), row["ms"], rtol=1e-12)
    np.testing.assert_allclose(row["images_per_second"], 100.0)
    np.testing.assert_allclose(row["macs_per_second"], 3 * row["macs"] * 100.0)


def test_growth_measures_every_point_and_exponents_finds_their_power(fake_clock):
    def ms(point):
        _, varied, value = point
        return 3.0 * value ** {"batch": -0.25, "width": 1.5, "size": 2.0}[varied]

    fake_clock(ms, does_work=False)
    values = {"batch": (1, 4), "width": (0.05, 0.1), "size": (8, 16)}
    points = [("simple", varied, value) for varied in values for value in values[varied]]
    table = profiling.growth(points, RECIPE, rounds=3)
    assert list(table.columns) == ["model", "varied", "value", "macs", "ms", "background_load"] and len(table) == 6
    np.testing.assert_allclose(table["ms"], [ms(point) for point in points], rtol=1e-12)
    found = profiling.exponents(table)
    np.testing.assert_allclose(found["time"], [-0.25, 1.5, 2.0], rtol=1e-9)
    batch, width, size = found["macs"]
    np.testing.assert_allclose([batch, size], [0.0, 2.0], atol=1e-9)
    assert 1.4 < width < 2.0  # the first layer's MACs grow with the width, those of the others with its square


@pytest.mark.parametrize("batch, images", [(5, 15), (32, 32)])
def test_growth_trains_on_about_16_images_and_at_least_one_batch(fake_clock, batch, images):
    done = fake_clock(lambda point: 1.0, does_work=True)
    profiling.growth([("wider_separable", "width", 0.05)], RECIPE.replace(batch_size=batch))
    assert [count for _, count in done] == [images]


@pytest.mark.bench
def test_measured_times_are_positive(split):
    table = profiling.step_parts({"a": small()}, split.first(8), RECIPE, NO_SCALE, rounds=1)
    assert (table[["ms", "input", "forward"]].astype(float) > 0).all(axis=None)
