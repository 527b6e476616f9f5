"""The numbers and exercises of chapter 03."""

import re

import numpy as np
import pytest

CHAPTER = "03"

WRONG = {
    "03.1": [[3, 9, 81], [3 / 4, 3 / 4, 3 / 4], [3 / 4, 9 / 8, 9 / 4], [4 / 3, 8 / 9, 32 / 81], 0.75],
    "03.2": [[8_294_400, 2_010_000], [24_883_200, 20_100], [24_883_200, 6_030_000], 24_883_200],
    "03.3": [
        lambda tensor, factors, mode: np.zeros((tensor.shape[mode], 3)),
        lambda tensor, factors, mode: factors[mode],
    ],
    "03.4": [
        lambda matrix, rank: 0.0,
        lambda matrix, rank: 0.9,
        lambda matrix, rank: [1, 2],
    ],
    "03.5": [
        lambda tensor, rank, starts, sweeps: [np.ones((size, rank)) for size in tensor.shape],
        lambda tensor, rank, starts, sweeps: [np.ones((size, rank)) for size in tensor.shape[:2]],
    ],
}


def table_in_text(chapter):
    """Return dict layer -> (rank, SVD, lowest random, highest random) of the table in the text."""
    pattern = r"\| `(conv\d)` \| [^|]* \| (\d+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|"
    return {layer: (int(rank), *map(float, rest)) for layer, rank, *rest in re.findall(pattern, chapter.text)}


def test_numbers_in_the_text(chapter):
    ends = chapter["ends"]
    assert np.isclose(ends[1], 1 / np.sqrt(10)) and np.isclose(ends[4], 0.95, atol=0.005)
    assert np.isclose(ends[3], 0.9539, atol=1e-3)  # it stays at the start (1, 3)
    assert all(np.all(np.diff(errors) < 1e-12) for errors in chapter["curves"].values())  # the error never rises
    reached = chapter["reached"]
    slow = [sweeps[1] for sweeps in reached.values()]
    assert all(isinstance(sweeps, int) for sweeps in slow) and reached["SVD"][1] > np.median(slow)
    flat = max(np.sum(np.abs(np.array(e) - e[29]) < 0.15 * e[29]) for e in chapter["curves"].values())
    assert flat > 24  # dozens of sweeps that gain almost nothing
    choice = chapter["choice"].set_index("rank")
    assert choice["error"].is_monotonic_decreasing and choice["error"][3] < 0.06 < choice["error"][2] / 2
    assert choice["CORCONDIA (%)"][:3].min() > 90 > 0 > choice["CORCONDIA (%)"][4]
    falling = chapter["falling"]
    assert (falling[0] - falling[8]) / (falling[0] - falling[-1]) > 0.7
    assert np.isclose(chapter["project_errors"][-1], 0.526, atol=0.002) and chapter["rank"] == 103
    assert np.isclose(chapter["summary"]["share"].iloc[1], 0.25, atol=0.002)


def test_the_first_layers_of_the_table(chapter):
    printed = table_in_text(chapter)
    assert len(printed) == 7
    for layer, rank, svd, low, high in printed_rows(printed):
        assert svd < low < high
        kernel = chapter["merge_pixels"](chapter["kernels"][layer])
        assert rank == chapter["rank_for"](kernel, 1 / 4)
    for row in chapter["comparison"].itertuples():
        _, svd, low, high = printed[row.layer]
        assert np.isclose(row.SVD, svd, atol=2e-4)
        assert low - 2e-4 < min(row[4:]) and max(row[4:]) < high + 2e-4


def printed_rows(printed):
    return [(layer, *row) for layer, row in printed.items()]


@pytest.mark.full
def test_all_layers_of_the_table(chapter):
    for layer, _, svd, low, high in printed_rows(table_in_text(chapter)):
        tensor = chapter["merge_pixels"](chapter["kernels"][layer])
        errors = [chapter["error_from_start"](tensor, number) for number in range(6)]
        assert np.allclose([errors[0], min(errors[1:]), max(errors[1:])], [svd, low, high], atol=3e-4)


def test_exercises(check_exercises):
    check_exercises(WRONG)
