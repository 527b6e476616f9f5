import keras
import numpy as np
import pytest

from fcnn_utils.course import optimizers


def step(shape, **options):
    """One step on a variable of zeros; returns (gradient, change)."""
    gradient = np.random.default_rng(0).normal(size=shape).astype("float32")
    variable = keras.Variable(np.zeros(shape, "float32"))
    optimizer = optimizers.Muon(0.5, weight_decay=None, adam_weight_decay=None, **options)
    optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    return gradient, keras.ops.convert_to_numpy(variable)


@pytest.mark.parametrize(("shape", "further"), [((3, 3, 4, 8), 1), ((1, 1, 4, 16), 2), ((5, 20), 2), ((3, 4, 6), 1)])
def test_kernel_steps_along_the_nearest_orthogonal_matrix(shape, further):
    gradient, change = step(shape)
    left, _, right = np.linalg.svd(gradient.reshape(-1, shape[-1]), full_matrices=False)
    change = -change.reshape(-1, shape[-1]) / (0.5 * further)
    singular_values = np.linalg.svd(change, compute_uv=False)
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3  # five iterations come only near to 1
    assert np.vdot(change, left @ right) > 0.95 * np.linalg.norm(change) * np.linalg.norm(left @ right)


@pytest.mark.parametrize("shape", [(8,), (3, 3, 8, 1)])
def test_adam_steps_what_is_no_matrix(shape):
    gradient, change = step(shape, adam_lr_ratio=0.1)
    np.testing.assert_allclose(change, -0.05 * np.sign(gradient), rtol=1e-3)


def test_momentum_averages_gradients():
    changes = [step((6, 4), momentum=momentum)[1] for momentum in (0.0, 0.9)]
    np.testing.assert_allclose(*changes, atol=1e-5)  # the first direction is the gradient's


def test_optimizer_is_saved_and_loaded():
    optimizer = optimizers.Muon(0.1, momentum=0.6)
    loaded = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(loaded) is optimizers.Muon and loaded.get_config() == optimizer.get_config()
