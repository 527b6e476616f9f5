"""Checks of the exercises of chapter 05, convolution and its cost."""

import keras
import numpy as np

from fcnn_utils import cost
from fcnn_utils.course.exercises import compare_arrays, exercise


@exercise("05.1")
def parameters_and_macs_of_a_layer(answer):
    """73,856 parameters, of which 128 are biases, and 57,802,752 MACs, counted by the library."""
    given = np.asarray(answer, float).ravel()
    if given.shape != (2,):
        return "give two numbers: the parameters and the MACs"
    layer = keras.layers.Conv2D(128, 3, strides=2, padding="same")
    truth = cost.total_costs(keras.Sequential([keras.Input((56, 56, 64)), layer]))
    if given[0] == truth["params"] - 128:
        return "the biases are parameters, too"
    if given[0] != truth["params"]:
        return "count the numbers of one filter, then those of all filters, then the biases"
    if given[1] == 4 * truth["macs"]:
        return "the parameters are right; for the MACs use the pixels of the output"
    if given[1] == 2 * truth["macs"]:
        return "these are the FLOPs: a MAC is a multiplication together with its addition"
    return "" if given[1] == truth["macs"] else "the parameters are right; each weight is used once per output pixel"


@exercise("05.2")
def size_of_an_output(function):
    """The number of positions of the window, counted one by one."""
    for size, kernel_size, stride in ((32, 3, 1), (32, 3, 2), (11, 5, 2), (7, 1, 3), (9, 9, 4), (10, 2, 3), (6, 3, 5)):
        for padding in ("valid", "same"):
            got = function(size, kernel_size, stride, padding)
            last = size if padding == "same" else size - kernel_size + 1
            if got != len(range(0, last, stride)):
                return f"for {size} pixels, kernel size {kernel_size}, stride {stride}, {padding!r} it is not {got}"
    return ""


@exercise("05.3")
def matrix_of_all_windows(function):
    """One row for each output pixel, its window flattened in the order of row, column, channel."""
    rng = np.random.default_rng(0)
    for (h, w, c), k in (((6, 7, 4), 3), ((5, 8, 1), 2), ((4, 4, 3), 1)):
        image = rng.normal(size=(h, w, c))
        got = function(image.copy(), k)
        windows = np.lib.stride_tricks.sliding_window_view(image, (k, k), (0, 1))  # (h', w', c, k, k)
        true = windows.transpose(0, 1, 3, 4, 2).reshape(-1, k * k * c)
        hint = "the rows are not the windows in the order of the output pixels, row by row through the image"
        if np.shape(got) == true.shape and np.allclose(np.sort(got, axis=1), np.sort(true, axis=1)):
            hint = "each row must be in the order row, column, channel of `kernel.reshape(-1, f)`"
        fault = compare_arrays(got, true, f"a {h}×{w}×{c} image and k = {k}", hint)
        if fault:
            return fault
    return ""


@exercise("05.4")
def intensities_without_weights(answer):
    """25 / 8 and 256 / 8 MACs per byte, for any number of pixels."""
    given = np.asarray(answer, float).ravel()
    if given.shape != (2,):
        return "give two numbers: depthwise and 1×1"
    truth = np.array([5 * 5 / (4 * 2), 256 * 256 / (4 * (256 + 256))])
    if np.allclose(given, truth, rtol=1e-3):
        return ""
    if np.allclose(given, 2 * truth, rtol=1e-3):
        return "count the bytes of the input and of the output"
    if np.allclose(given, 4 * truth, rtol=1e-3):
        return "a number in float32 has 4 bytes"
    right = np.isclose(given, truth, rtol=1e-3)
    part = "the 1×1 layer" if right[0] else "the depthwise layer" if right[1] else "both"
    return f"look again at {part}: the MACs of one pixel, over the bytes of its input and output channels"


@exercise("05.5")
def time_of_the_roofline(function):
    """The longer of the two times, and its name."""
    cases = [
        (8e9, 1e9, 4e9, 2e9, 2.0, "arithmetic"),
        (1e9, 6e9, 4e9, 2e9, 3.0, "memory"),
        (3, 1, 6, 8, 0.5, "arithmetic"),
    ]
    for macs, moved, peak, bandwidth, seconds, bound in cases:
        got = function(macs, moved, peak, bandwidth)
        if not (isinstance(got, (tuple, list)) and len(got) == 2):
            return 'it must return two values: the seconds, and "arithmetic" or "memory"'
        if not np.isclose(got[0], seconds):
            return f"for {macs:g} MACs, {moved:g} bytes and the rates {peak:g} and {bandwidth:g} it is not {got[0]:g} s"
        if got[1] != bound:
            return f"the seconds are right, but what takes longer there is not {got[1]!r}"
    return ""
