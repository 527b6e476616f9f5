"""Networks that the thesis cites: `fcnn_utils.course.networks.cited`, built by `fcnn_utils.course.networks`."""

import keras
import numpy as np
import pytest

from fcnn_utils import cost
from fcnn_utils.course import networks
from fcnn_utils.course.networks import cited

NAMES = ["wrn-10-1", *cited.STYLES, "simple_cp"]


# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wrn-16-4", "wrn-10-1", "wrn-100-12", *cited.STYLES])
def test_a_network_is_known_by_its_name(name):
    assert cited.known(name) and networks.run_name(name) == name


@pytest.mark.parametrize("name", ["wrn", "wrn-4-1", "wrn-17-4", "wrn-16-0", "wrn-16", "wrn-16-4 ", "WRN-16-4", None, 5])
def test_a_name_that_is_none_is_refused_with_the_choices(name):
    assert not cited.known(name)
    with pytest.raises(
        ValueError, match="model must be one of simple, .*, wrn-16-4, inception, xception, wang, resnet18; got"
    ):
        networks.build(name)


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_images_of_another_shape_and_ends_in_probabilities(name):
    model = networks.build(name, (28, 28, 1), 2, width=0.25, dtype="mixed_bfloat16", initialization="he")
    probabilities = model.predict(np.random.default_rng(0).normal(size=(3, 28, 28, 1)).astype("float32"), verbose=0)
    assert probabilities.shape == (3, 2) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    policies = {layer.name: layer.dtype_policy.name for layer in model.layers if layer.weights}
    assert policies.pop("scores", "float32") == "float32" and set(policies.values()) == {"mixed_bfloat16"}


# --- correct -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, millions", [("wrn-40-4", "8.9"), ("wrn-16-8", "11.0"), ("wrn-28-10", "36.5")], ids=lambda value: value
)
def test_wide_residual_networks_have_the_published_number_of_parameters(name, millions):
    """Table 4 of Zagoruyko & Komodakis, for 10 classes, in millions."""
    count = cost.total_costs(networks.build(name, classes=10))["trainable"]
    assert f"{count / 1e6:.1f}" == millions


def test_resnet18_has_the_parameters_it_is_known_for():
    """11,173,962 for images of three channels and 10 classes, as its PyTorch original for CIFAR-10 counts them."""
    assert cost.total_costs(networks.build("resnet18", classes=10))["trainable"] == 11_173_962


def test_the_macs_of_resnet18_by_hand():
    """At 28×28×1, as in MedMNIST: four 3×3 layers a group, and a 1×1 shortcut where the image is halved."""
    macs, channels = 28**2 * 9 * 64 + 512 * 2, 64
    for side, filters in ((28, 64), (14, 128), (7, 256), (4, 512)):
        macs += side**2 * (
            9 * channels * filters + 3 * 9 * filters * filters + (channels < filters) * channels * filters
        )
        channels = filters
    assert cost.total_costs(networks.build("resnet18", (28, 28, 1), 2))["macs"] == macs


def test_the_parameters_of_a_wide_residual_network_by_hand():
    """WRN-10-1: one block a group; kernels 3×3, two or more batch norms of four values a channel; shortcuts 1×1, but in
    the first group, whose filters are as many as the first convolution's."""
    kernels = 9 * 3 * 16 + 2 * 9 * 16 * 16  # first convolution, first group
    kernels += 16 * 32 + 9 * 16 * 32 + 9 * 32 * 32 + 32 * 64 + 9 * 32 * 64 + 9 * 64 * 64
    norms = 4 * (16 + 16 + 16 + 32 + 32 + 64 + 64)
    assert networks.build("wrn-10-1").count_params() == kernels + norms + 64 * 100 + 100


def test_the_macs_of_a_wide_residual_network_by_hand():
    """WRN-16-4: each of a group's 3×3 layers, and its 1×1 shortcut, at all of the group's positions."""
    macs, channels = 9 * 3 * 16 * 32**2 + 256 * 100, 16
    for side, filters in ((32, 64), (16, 128), (8, 256)):
        macs += side**2 * (channels * filters + 9 * channels * filters + 3 * 9 * filters * filters)
        channels = filters
    assert cost.total_costs(networks.build("wrn-16-4"))["macs"] == macs


@pytest.mark.parametrize(
    "name, params, macs",
    [("inception", 1_305_156, 199_104_000), ("xception", 1_206_404, 137_627_648), ("wang", 242_724, 19_121_152)],
)
def test_counts_of_our_sizes(name, params, macs):
    """What the course says of them: a change of a plan is meant, or it is a mistake."""
    totals = cost.total_costs(networks.build(name))
    assert (totals["params"], totals["macs"]) == (params, macs)


def test_the_simple_network_by_cp_has_its_layers_cheaper():
    """Each 3×3 layer but the first, of S inputs and T outputs, costs S T + 9 T + T T instead of 9 S T."""
    simple, chains = (networks.build(name) for name in ("simple", "simple_cp"))
    for number in range(2, 8):
        inputs, outputs = simple.get_layer(f"conv{number}").kernel.shape[-2:]
        parts = [chains.get_layer(f"conv{number}_{part}") for part in ("in", "depthwise", "out")]
        counts = [int(np.prod(part.kernel.shape)) for part in parts]
        assert counts == [inputs * outputs, 9 * outputs, outputs * outputs]
        assert parts[-1].output.shape == simple.get_layer(f"conv{number}").output.shape


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_a_step_is_saved_and_loads_without_custom_objects(name, tmp_path):
    keras.utils.set_random_seed(0)
    model = networks.build(name, (16, 16, 3), 5, width=0.25)
    before = [weight.copy() for weight in model.get_weights()]
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype("float32")
    model.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy")
    loss = model.train_on_batch(images, np.eye(5, dtype="float32")[np.arange(8) % 5])
    assert np.isfinite(loss)
    kernels = [
        not np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True) if old.ndim > 1
    ]
    assert all(kernels)  # every kernel is reached
    model.save(tmp_path / "saved.keras")
    loaded = keras.saving.load_model(tmp_path / "saved.keras", safe_mode=True)
    np.testing.assert_allclose(loaded.predict(images, verbose=0), model.predict(images, verbose=0), rtol=1e-5)


def test_a_width_makes_it_thinner():
    for name in NAMES:
        whole, half = (networks.build(name, width=width).count_params() for width in (1, 0.5))
        assert 0.2 < half / whole < 0.6
