"""Compare the accuracies of networks or recipes over several seeds.

    runs = records.find("cifar100", recipe="muon")
    print(comparison.over_seeds(runs["record"], baseline=("wider_dense-width0.5", "muon")))

Two networks that are trained with the same seed see the same images in the same order, with the same augmentation.
Therefore the difference is formed for each seed, and the interval is that of the mean of these differences.
"""

import pandas as pd
from scipy import stats

from fcnn_utils._checks import check_choice, check_number
from fcnn_utils.course import records as _records

_KEYS = ["network", "recipe", "images"]
_COLUMNS = [*_KEYS, "seed", "top1", "kind", "data"]


def over_seeds(records, baseline=None, level=0.95):
    """Average the accuracies of all seeds, and compare them with a baseline seed by seed.

    The columns of the table are:

        images       "test" or "validation": what the accuracy was measured on
        n            number of seeds
        top1         mean accuracy in %
        deviation    standard deviation over the seeds in percentage points, n − 1 in the denominator; NaN for one
        kinds        number of different (device, backend, precision) among the records; above 1, differences may
                     come from the machine
        pairs        number of seeds that the baseline has, too
        alike        number of these pairs in which both runs have the same device, backend and precision
        difference   mean of accuracy − accuracy of the baseline over these seeds, in percentage points
        low, high    confidence interval of that mean by Student's t, which takes the differences as normally
                     distributed; NaN for fewer than two pairs

    Args:
        records: complete records of one data set.
        baseline: (network, recipe) to compare with.
        level: confidence level of the intervals, from 0.01 to 0.999.

    Returns:
        DataFrame indexed by network and recipe, in the order of the records. The last five columns exist only with a
        baseline.

    Raises:
        ValueError: if a number is out of range, the records are of different data or have a seed twice, or none is of
            the baseline.
    """
    check_number("level", level, float, 0.01, 0.999)
    rows = pd.DataFrame([_row(record) for record in records], columns=_COLUMNS)
    if rows["data"].nunique() > 1:
        raise ValueError("records must be of the same data; got records with different data sets or numbers of images")
    if rows.duplicated([*_KEYS, "seed"]).any():
        raise ValueError("each seed of a network and recipe must occur once; got one twice")
    groups = rows.groupby(_KEYS, sort=False)
    table = groups["top1"].agg(n="count", top1="mean", deviation="std").assign(kinds=groups["kind"].nunique())
    if baseline is not None:
        names = sorted(set(zip(rows["network"], rows["recipe"], strict=True)))
        network, recipe = check_choice("baseline", tuple(baseline), names)
        own = rows[(rows["network"] == network) & (rows["recipe"] == recipe)]
        pairs = rows.merge(
            own[["images", "seed", "top1", "kind"]], on=["images", "seed"], suffixes=("", "_of_baseline")
        )
        pairs["difference"] = pairs["top1"] - pairs["top1_of_baseline"]
        pairs["same"] = pairs["kind"] == pairs["kind_of_baseline"]
        groups = pairs.groupby(_KEYS)
        columns = {"pairs": "count", "difference": "mean", "error": "sem"}
        differences = groups["difference"].agg(**columns).assign(alike=groups["same"].sum())
        half = differences.pop("error") * stats.t.ppf((1 + level) / 2, differences["pairs"] - 1)  # NaN for one pair
        differences["low"], differences["high"] = differences["difference"] - half, differences["difference"] + half
        table = table.join(differences)
        counts = ["pairs", "alike"]
        table[counts] = table[counts].fillna(0).astype(int)
    return table.reset_index("images")


def _row(record):
    images, result = _records.result(record)
    return {
        "network": record["model"],
        "recipe": record["recipe"]["name"],
        "images": images,
        "seed": record["seed"],
        "top1": 100 * result["top1"],
        "kind": (record["device"], record["backend"], record["precision"]),
        "data": (record["dataset"], record["fingerprint"]),
    }
