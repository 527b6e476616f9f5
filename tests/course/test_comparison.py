"""Comparisons over seeds, against numbers from a table of Student's t and by hand."""

import math

import pytest

from fcnn_utils.course import comparison

T_2 = 4.302653  # 97.5% quantile of Student's t with 2 degrees of freedom, from a printed table


def a_record(network, seed, top1, recipe="muon", validation=False, fingerprint="a", device="CPU"):
    result = {"top1": top1}
    row = {"validation": result} if validation else {}
    return {
        "model": network,
        "recipe": {"name": recipe},
        "seed": seed,
        "dataset": "cifar100",
        "fingerprint": fingerprint,
        "device": device,
        "backend": "tensorflow",
        "precision": "float32",
        "epochs": [row],
        "test": None if validation else result,
    }


RECORDS = [
    *(a_record("dense", seed, top1) for seed, top1 in enumerate((0.60, 0.62, 0.64))),
    *(a_record("cheap", seed, top1) for seed, top1 in ((2, 0.61), (0, 0.58), (1, 0.62))),  # differences -2, 0, -3
]


def test_mean_and_deviation_over_the_seeds():
    table = comparison.over_seeds(RECORDS)
    assert table.index.tolist() == [("dense", "muon"), ("cheap", "muon")]
    assert table["n"].tolist() == [3, 3] and table["images"].tolist() == ["test", "test"]
    assert table["top1"].tolist() == pytest.approx([62, 60.3333333])
    of_cheap = math.sqrt((2.3333333**2 + 1.6666667**2 + 0.6666667**2) / 2)
    assert table["deviation"].tolist() == pytest.approx([2, of_cheap])
    assert "difference" not in table


def test_difference_is_paired_by_seed_and_its_interval_is_students():
    row = comparison.over_seeds(RECORDS, ("dense", "muon")).loc[("cheap", "muon")]
    half = T_2 * math.sqrt(((1 / 3) ** 2 + (5 / 3) ** 2 + (4 / 3) ** 2) / 2 / 3)  # differences minus their mean, -5/3
    assert row["pairs"] == row["alike"] == 3 and row["difference"] == pytest.approx(-5 / 3)
    assert (row["low"], row["high"]) == pytest.approx((-5 / 3 - half, -5 / 3 + half), rel=1e-5)


def test_only_common_seeds_of_the_same_images_are_paired():
    other = [a_record("cheap", 7, 0.9), a_record("valid", 0, 0.9, validation=True)]
    table = comparison.over_seeds(RECORDS + other, ("dense", "muon"))
    assert table["pairs"].tolist() == [3, 3, 0] and table["n"].tolist() == [3, 4, 1]
    assert math.isnan(table["difference"].iloc[2]) and table["images"].iloc[2] == "validation"


def test_one_pair_has_a_difference_but_no_interval():
    row = comparison.over_seeds([RECORDS[0], RECORDS[4]], ("dense", "muon")).iloc[1]
    assert row["difference"] == pytest.approx(-2) and math.isnan(row["low"]) and math.isnan(row["deviation"])


def test_records_of_different_devices_are_counted():
    assert comparison.over_seeds([*RECORDS, a_record("dense", 3, 0.6, device="GPU")])["kinds"].tolist() == [2, 1]


def test_pairs_of_one_kind_of_machine_are_counted():
    """The baseline ran on the CPU: of three pairs, one has its other run on a GPU, and one in another precision."""
    runs = [a_record("cheap", 0, 0.5), a_record("cheap", 1, 0.6, device="GPU"), a_record("cheap", 2, 0.7)]
    runs[2]["precision"] = "mixed_bfloat16"
    table = comparison.over_seeds([*RECORDS[:3], *runs], ("dense", "muon"))
    assert table["pairs"].tolist() == [3, 3] and table["alike"].tolist() == [3, 1]


@pytest.mark.parametrize(
    "added, baseline, level, message",
    [
        ([], ("dense", "faster"), 0.95, "baseline must be one of .*'dense', 'muon'"),
        ([], None, 1, "level must be"),
        ([RECORDS[0]], None, 0.95, "each seed of a network and recipe must occur once"),
        ([a_record("dense", 3, 0.5, fingerprint="b")], None, 0.95, "records must be of the same data"),
    ],
)
def test_wrong_arguments_are_refused(added, baseline, level, message):
    with pytest.raises(ValueError, match=message):
        comparison.over_seeds(RECORDS + added, baseline, level)
