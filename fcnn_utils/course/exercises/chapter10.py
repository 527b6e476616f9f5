"""Checks of the exercises of chapter 10, the wider separable network."""

import numpy as np

from fcnn_utils import cost
from fcnn_utils.course import networks
from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("10.1")
def filters_of_a_gain(answer):
    """1/f + 1/9 <= 1/8 from 72 filters on, 1/f + 1/25 <= 1/20 from 100 on."""
    return compare_numbers(answer, [72, 100], "solve 1/f + 1/k² = 1/gain for f")


@exercise("10.2")
def all_layers_separable(answer):
    """22,612,992 MACs and 176,399 parameters, counted by the library."""
    found = cost.total_costs(networks.build(answer))
    truth = {"macs": 22_612_992, "params": 176_399}
    if all(found[key] == value for key, value in truth.items()):
        return ""
    if any(kind == "separable" and size == 1 for kind, _, size, _ in answer):
        return "leave the 1×1 convolution as it is"
    return f"this network has {found['macs']:,} MACs; only the kind of three rows must change"


@exercise("10.3")
def nearest_separable_layer(function):
    """The error that the singular values of each channel promise."""
    rng = np.random.default_rng(4)
    for c, f in ((5, 8), (2, 20)):
        kernel = rng.normal(size=(3, 3, c, f))
        depthwise, pointwise = (np.asarray(each, float) for each in function(kernel.copy()))
        if depthwise.shape != (3, 3, c) or pointwise.shape != (c, f):
            return f"the shapes must be (3, 3, {c}) and ({c}, {f}); they are {depthwise.shape} and {pointwise.shape}"
        error = np.sum((kernel - depthwise[..., None] * pointwise) ** 2)
        squares = np.linalg.svd(kernel.transpose(2, 0, 1, 3).reshape(c, 9, f), compute_uv=False) ** 2
        if not np.isclose(error, squares[:, 1:].sum()):
            return f"the squared error can be {squares[:, 1:].sum():.2f}; yours is {error:.2f}"
    return ""


@exercise("10.4")
def intensities_at_batch_64(answer):
    """MACs over bytes of input, output and weights, each moved once."""
    pixels = 64 * 16**2
    counts = {"dense": (9 * 96 * 384, 96 + 384), "depthwise": (9 * 96, 2 * 96), "pointwise": (96 * 384, 96 + 384)}
    truth = [pixels * weights / (4 * (pixels * values + weights)) for weights, values in counts.values()]
    if np.shape(answer) == (3,) and np.allclose(answer, 4 * np.array(truth), rtol=1e-2):
        return "a number in float32 has 4 bytes"
    return compare_numbers(answer, truth, "MACs of the batch, over the bytes of input, output and weights", rtol=1e-2)
