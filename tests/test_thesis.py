"""The thesis's tables: `fcnn_utils.course.thesis`. They agree with each other, and a comparison finds what differs."""

import math

import pytest

from fcnn_utils.course import thesis

NETWORKS = ["simple", "wider_factorized", "wider_separable"]

# The kinds of our layers, as `cost.layer_costs` names them.
OURS = {
    "conv": "Conv2D",
    "sep": "SeparableConv2D",
    "bn": "BatchNormalization",
    "relu": "Activation",
    "pool": "GlobalAveragePooling2D",
    "softmax": "Activation",
}


def costs(name):
    """A cost table as of a network of ours that has the thesis's layers."""
    table = thesis.layers(name)
    table["kind"] = table["kind"].map(OURS)
    table.insert(0, "layer", [f"layer{number}" for number in range(len(table))])
    table.loc[len(table)] = ["total", "", (100,), table["params"].sum()]
    table.loc[-1] = ["image", "InputLayer", (32, 32, 3), 0]
    return table.sort_index(ignore_index=True)


def truncated(value, digits):
    return math.floor(value * 10**digits) / 10**digits


# --- basic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rows, convolutions", [("simple", 29, 9), ("wider_factorized", 22, 8), ("wider_separable", 20, 6)]
)
def test_tables_have_their_rows(name, rows, convolutions):
    table = thesis.layers(name)
    assert table.columns.tolist() == ["kind", "output_shape", "params"]
    assert len(table) == rows and table["kind"].isin(["conv", "sep"]).sum() == convolutions
    assert table["kind"].tolist()[-2:] == ["pool", "softmax"] and table["output_shape"].iloc[-1] == (100,)
    assert thesis.epochs(name)["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert thesis.test(name).keys() == {"top1", "top5", "loss"}


def test_every_table_has_the_three_networks():
    assert thesis.summary().index.tolist() == list(thesis.PARAMS) == list(thesis.TITLES) == NETWORKS


# --- correct -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_totals_are_the_sums_of_the_layers(name):
    table, (total, trainable, fixed) = thesis.layers(name), thesis.PARAMS[name]
    assert table["params"].sum() == total == trainable + fixed
    assert 2 * fixed == table.loc[table["kind"] == "bn", "params"].sum()  # two of four vectors are moving averages


@pytest.mark.parametrize("name", NETWORKS)
def test_a_normalisation_has_four_values_a_channel(name):
    table = thesis.layers(name)
    norms = table[table["kind"] == "bn"]
    assert norms["params"].tolist() == [4 * shape[-1] for shape in norms["output_shape"]]


@pytest.mark.parametrize("name", NETWORKS)
def test_summary_is_the_logs_and_the_test_cut_off(name):
    row, log, test = thesis.summary().loc[name], thesis.epochs(name), thesis.test(name)
    for key in ("top1", "top5", "loss"):
        assert row[key] == truncated(test[key], 3)
    assert row["seconds_per_epoch"] == truncated(log["seconds"].mean(), 0)
    assert row["ms_per_step"] == truncated(log["ms_per_step"].mean(), 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_logs_agree_with_themselves(name):
    log = thesis.epochs(name)
    assert log["loss"].is_monotonic_decreasing
    assert log["top1"].is_monotonic_increasing and log["top5"].is_monotonic_increasing
    assert (log["top1"] < log["top5"]).all() and log["top5"].max() < 1
    per_epoch = log["ms_per_step"] * 1562 / 1000  # the steps of an epoch
    assert (abs(per_epoch - log["seconds"]) <= 1562 / 1000 / 2 + 0.5).all()  # both are rounded


@pytest.mark.parametrize("name, images", [("simple", 9984), ("wider_factorized", 9968), ("wider_separable", 9968)])
def test_test_accuracies_are_whole_numbers_of_images(name, images):
    for key in ("top1", "top5"):
        count = thesis.test(name)[key] * images
        assert abs(count - round(count)) < 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_the_thesiss_own_layers_compare_equal(name):
    both = thesis.compare(name, costs(name))
    assert len(both) == len(thesis.layers(name)) and both["equal"].all()
    assert both["layer"].tolist() == [f"layer{number}" for number in range(len(both))]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("column, value", [("params", 1), ("output_shape", (32, 32, 1)), ("kind", "DepthwiseConv2D")])
def test_a_changed_row_is_found(name, column, value):
    table = costs(name)
    table.at[4, column] = value  # after the row of the input
    assert (~thesis.compare(name, table)["equal"]).to_numpy().nonzero()[0].tolist() == [3]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_that_we_lack_is_found(name):
    table = costs(name)
    last = thesis.compare(name, table.drop(index=len(table) - 2))  # the softmax, the last row before the total
    assert len(last) == len(thesis.layers(name))
    assert last["equal"].tolist() == [True] * (len(last) - 1) + [False]
    assert last["kind_thesis"].iloc[-1] == "softmax"
    first = thesis.compare(name, table.drop(index=1))
    assert len(first) == len(thesis.layers(name)) and not first["equal"].iloc[0] and not first["equal"].iloc[-1]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_that_the_thesis_lacks_is_found(name):
    table = costs(name)
    table.loc[len(table) - 1.5] = ["extra", "Activation", (100,), 0]  # before the total
    both = thesis.compare(name, table.sort_index(ignore_index=True))
    assert len(both) == len(thesis.layers(name)) + 1
    assert both["equal"].tolist() == [True] * (len(both) - 1) + [False]
    assert both["layer"].iloc[-1] == "extra"


def test_networks_are_not_mistaken_for_each_other():
    for name in NETWORKS:
        for other in NETWORKS:
            assert thesis.compare(name, costs(other))["equal"].all() == (name == other)
