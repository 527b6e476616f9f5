"""Chapter 05, convolution and its cost: the numbers in its text, and its exercises."""

import numpy as np

from fcnn_utils.course import exercises

CHAPTER = "05"
WRONG = {
    "05.1": [[73728, 57802752], [73856, 231211008], [73856, 115605504], [73856, 57802753], 73856],
    "05.2": [
        lambda size, k, stride, padding: (size - k) // stride + 1,
        lambda size, k, stride, padding: -(-size // stride),
        lambda size, k, stride, padding: size // stride if padding == "same" else (size - k) // stride + 1,
    ],
    "05.3": [
        lambda image, k: np.stack([image[y : y + k, :k].reshape(-1) for y in range(len(image) - k + 1)]),
        lambda image, k: np.lib.stride_tricks.sliding_window_view(image, (k, k), (0, 1)).reshape(
            -1, k * k * image.shape[2]
        ),
        lambda image, k: np.zeros(((image.shape[0] - k + 1) * (image.shape[1] - k + 1), k * k * image.shape[2])),
    ],
    "05.4": [[25 / 4, 64], [3.125, 64], [25 / 2, 128], [12.5, 32], 3.125],
    "05.5": [
        lambda macs, moved, peak, bandwidth: (macs / peak + moved / bandwidth, "memory"),
        lambda macs, moved, peak, bandwidth: (min(macs / peak, moved / bandwidth), "memory"),
        lambda macs, moved, peak, bandwidth: (max(macs / peak, moved / bandwidth), "memory"),
        lambda macs, moved, peak, bandwidth: max(macs / peak, moved / bandwidth),
    ],
}


def test_sobel_by_hand():
    window = np.array([[1, 2, 0], [0, 1, 3], [2, 1, 0]])
    sobel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    assert np.sum(window * sobel) == -3


def test_both_convolutions_agree(chapter):
    np.testing.assert_allclose(chapter["output"], chapter["by_keras"], atol=1e-4)
    np.testing.assert_allclose(chapter["output"][2, 1], chapter["one_pixel"])


def test_output_sizes(chapter):
    for row in chapter["output_sizes"].itertuples(index=False):
        assert row[4] == (row[2] if row[0] == "valid" else row[3])


def test_counts(chapter):
    counted = chapter["counted"]
    assert counted["macs"]["dense 3×3"] / counted["macs"]["depthwise 3×3"] == 96
    assert counted["macs"].to_dict() == chapter["by_formula"]
    pixels = {"dense 3×3, late": 64}
    for name, row in counted.iterrows():
        assert row["macs"] == row["params"] * pixels.get(name, 1024)


def test_intensities(chapter):
    one, many = (chapter["per_byte"][f"MACs per byte, batch {batch}"] for batch in (1, 64))
    assert (many >= one).all()
    assert 1 <= one["depthwise 3×3"] <= many["depthwise 3×3"] < 1.2  # "about one MAC for each byte"
    assert one["dense 3×3"] > 10 * one["depthwise 3×3"]  # "many times more"
    assert one["depthwise 3×3"] < one["1×1"] < one["dense 3×3"]  # summary: 1×1 lies between
    assert (many / one).idxmax() == "dense 3×3, late"


def test_roofline(chapter):
    assert chapter["ridge"] == chapter["peak"] / chapter["bandwidth"]
    measured = chapter["measured"].set_index(["name", "batch"])
    per_byte = chapter["per_byte"]
    for name, batch in measured.index:  # the library counts bytes as the notebook does
        assert np.isclose(measured["intensity"][name, batch], per_byte[f"MACs per byte, batch {batch}"][name])
    speed = measured["billion MACs/s"]
    assert speed["depthwise 3×3", 64] < speed["dense 3×3", 64]  # a factor of ten on the author's machine


def test_answers_in_other_types_are_accepted():
    assert exercises.verdict("05.1", (73856.0, np.int64(57802752))) == "right"
    assert exercises.verdict("05.4", np.array([3.125, 32])) == "right"


def test_exercises(check_exercises):
    check_exercises(WRONG)
