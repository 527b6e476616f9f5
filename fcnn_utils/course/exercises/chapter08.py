"""Checks of the exercises of chapter 08, the simple network."""

import numpy as np

from fcnn_utils import cost
from fcnn_utils.course import networks
from fcnn_utils.course.exercises import compare_numbers, exercise


@exercise("08.1")
def macs_of_two_layers(answer):
    """2,654,208 and 42,467,328 MACs, counted by the library."""
    given = np.asarray(answer, float).ravel()
    if given.shape != (2,):
        return "give two numbers: the MACs of conv1 and of conv4"
    table = cost.layer_costs(networks.build("simple")).set_index("layer")["macs"]
    truth = np.array([table["conv1"], table["conv4"]], float)
    if np.array_equal(given, 2 * truth):
        return "these are the FLOPs: a MAC is a multiplication together with its addition"
    if np.array_equal(given, truth / [32 * 32, 16 * 16]):
        return "these are the weights: each is used once per output pixel"
    right = given == truth
    if right.all():
        return ""
    part = "conv4" if right[0] else "conv1" if right[1] else "both"
    return f"look again at {part}: output pixels × 9 × input channels × filters"


@exercise("08.2")
def macs_of_a_list(function):
    """Those that the library counts in the network of the list."""
    lists = [
        (networks.plan("simple"), 32, 3),
        ([("conv", 5, 3, 2), ("conv", 7, 5, 2), ("conv", 10, 1, 1)], 11, 4),
    ]
    for rows, side, channels in lists:
        model = networks.build(rows, (side, side, channels), classes=rows[-1][1])
        truth, got = cost.total_costs(model)["macs"], function(list(rows), side, channels)
        if got == _macs_before_strides(rows, side, channels):
            return "use the side after the stride: formula (8.1) counts the output pixels"
        if got != truth:
            return f"for {len(rows)} layers and {side}×{side} pixels with {channels} channels it is not {got:,}"
    return ""


@exercise("08.3")
def share_of_padded_products(answer):
    """1 - ((3n - 2) / 3n)², about 0.04 and 0.16."""
    if np.shape(answer) == (2,) and np.allclose(answer, [4.1233, 15.9722], rtol=0.05):
        return "the shares are right in percent; give them as numbers between 0 and 1"
    truth = [1 - ((3 * n - 2) / (3 * n)) ** 2 for n in (32, 8)]
    return compare_numbers(answer, truth, "in one dimension 2 of 3n products are outside", rtol=0.05)


def _macs_before_strides(rows, side, channels):
    """Return the MACs that a usual mistake gives: with the pixels before each stride."""
    total = 0
    for _, filters, size, stride in rows:
        total += side**2 * size**2 * channels * filters
        side, channels = -(-side // stride), filters
    return total
