"""The thesis's tables: `fcnn_utils.course.thesis`. They agree with each other, and `compare` finds every difference."""

import math

import pytest

from fcnn_utils.course import thesis

NETWORKS = ["simple", "wider_factorized", "wider_separable"]
KINDS = {
    "conv": "Conv2D",
    "sep": "SeparableConv2D",
    "bn": "BatchNormalization",
    "relu": "Activation",
    "pool": "GlobalAveragePooling2D",
    "softmax": "Activation",
}


def cost_table(name):
    """A table as of `cost.layer_costs`, for a network of ours with exactly the thesis's layers."""
    table = thesis.layers(name)
    table["kind"] = table["kind"].map(KINDS)
    table.insert(0, "layer", [f"layer{number}" for number in range(len(table))])
    table.loc[len(table)] = ["total", "", (100,), table["params"].sum()]
    table.loc[-1] = ["image", "InputLayer", (32, 32, 3), 0]
    return table.sort_index(ignore_index=True)


def truncated(value, digits):
    return math.floor(value * 10**digits) / 10**digits


# --- the tables agree --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rows, convolutions", [("simple", 29, 9), ("wider_factorized", 22, 8), ("wider_separable", 20, 6)]
)
def test_layer_tables_have_their_rows(name, rows, convolutions):
    table = thesis.layers(name)
    assert table.columns.tolist() == ["kind", "output_shape", "params"]
    assert len(table) == rows and table["kind"].isin(["conv", "sep"]).sum() == convolutions
    assert table["kind"].tolist()[-2:] == ["pool", "softmax"] and table["output_shape"].iloc[-1] == (100,)


@pytest.mark.parametrize("name", NETWORKS)
def test_totals_are_sums_of_layers(name):
    table, (total, trainable, fixed) = thesis.layers(name), thesis.PARAMS[name]
    norms = table[table["kind"] == "bn"]
    assert table["params"].sum() == total == trainable + fixed
    assert norms["params"].tolist() == [4 * shape[-1] for shape in norms["output_shape"]]
    assert norms["params"].sum() == 2 * fixed  # two of its four vectors are moving averages


@pytest.mark.parametrize("name", NETWORKS)
def test_summary_is_truncated_log_and_test(name):
    row, log, test = thesis.summary().loc[name], thesis.epochs(name), thesis.test(name)
    assert thesis.summary().index.tolist() == list(thesis.PARAMS) == NETWORKS
    for key in ("top1", "top5", "loss"):
        assert row[key] == truncated(test[key], 3)
    assert row["seconds_per_epoch"] == truncated(log["seconds"].mean(), 0)
    assert row["ms_per_step"] == truncated(log["ms_per_step"].mean(), 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_training_logs_are_consistent(name):
    log = thesis.epochs(name)
    assert log["epoch"].tolist() == [1, 2, 3, 4, 5] and log["loss"].is_monotonic_decreasing
    assert log["top1"].is_monotonic_increasing and log["top5"].is_monotonic_increasing
    assert (log["top1"] < log["top5"]).all() and log["top5"].max() < 1
    steps = 1562
    rounding = steps / 1000 / 2 + 0.5  # of the ms and of the seconds
    assert (abs(log["ms_per_step"] * steps / 1000 - log["seconds"]) <= rounding).all()


@pytest.mark.parametrize("name, images", [("simple", 9984), ("wider_factorized", 9968), ("wider_separable", 9968)])
def test_test_accuracies_are_whole_numbers_of_images(name, images):
    for key in ("top1", "top5"):
        count = thesis.test(name)[key] * images
        assert abs(count - round(count)) < 1e-9


# --- the comparison ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_compare_accepts_a_network_only_as_itself(name):
    both = thesis.compare(name, cost_table(name))
    assert len(both) == len(thesis.layers(name)) and both["equal"].all()
    assert both["layer"].tolist() == [f"layer{number}" for number in range(len(both))]
    assert not any(thesis.compare(name, cost_table(other))["equal"].all() for other in NETWORKS if other != name)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("column, value", [("params", 1), ("output_shape", (32, 32, 1)), ("kind", "DepthwiseConv2D")])
def test_compare_finds_changed_row(name, column, value):
    table = cost_table(name)
    table.at[4, column] = value  # row 0 is the input
    assert (~thesis.compare(name, table)["equal"]).to_numpy().nonzero()[0].tolist() == [3]


@pytest.mark.parametrize("name", NETWORKS)
def test_compare_finds_row_that_we_lack(name):
    table, rows = cost_table(name), len(thesis.layers(name))
    without_last = thesis.compare(name, table.drop(index=len(table) - 2))  # the softmax
    assert without_last["equal"].tolist() == [True] * (rows - 1) + [False]
    assert without_last["kind_thesis"].iloc[-1] == "softmax"
    without_first = thesis.compare(name, table.drop(index=1))
    assert len(without_first) == rows and not without_first["equal"].iloc[[0, -1]].any()


@pytest.mark.parametrize("name", NETWORKS)
def test_compare_finds_row_that_the_thesis_lacks(name):
    table, rows = cost_table(name), len(thesis.layers(name))
    table.loc[len(table) - 1.5] = ["extra", "Activation", (100,), 0]  # before the total
    both = thesis.compare(name, table.sort_index(ignore_index=True))
    assert both["equal"].tolist() == [True] * rows + [False] and both["layer"].iloc[-1] == "extra"
