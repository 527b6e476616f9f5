"""How good probabilities are, from them and the labels: area under the ROC curve, calibration, intervals.

Probabilities are (N, classes), labels (N,) whole numbers from 0 to classes − 1. The functions of both raise ValueError
where they are not, or where there is no image.
"""

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from fcnn_utils._checks import check_number


def accuracy(probabilities, labels):
    """Share of the images whose likeliest class is theirs."""
    probabilities, labels = _checked(probabilities, labels)
    return float((probabilities.argmax(axis=1) == labels).mean())


def auc(probabilities, labels):
    """Area under the ROC curve: how often an image of a class is given more of it than one of another class.

    Of two classes, that of the second; of more, the mean over all, each against the rest (as MedMNIST's evaluator has
    it). Ties count half.

    Raises:
        ValueError: a class without images, or without others.
    """
    probabilities, labels = _checked(probabilities, labels)
    classes = probabilities.shape[1]
    counts = np.bincount(labels, minlength=classes)
    if (counts == 0).any() or (counts == len(labels)).any():
        raise ValueError(f"the AUC needs images of each of the {classes} classes; got {counts.tolist()} of them")
    areas = []
    for label in range(1 if classes == 2 else 0, classes):
        ranks, own = stats.rankdata(probabilities[:, label]), labels == label
        positives = counts[label]
        wins = ranks[own].sum() - positives * (positives + 1) / 2  # Mann and Whitney's U
        areas.append(wins / (positives * (len(labels) - positives)))
    return float(np.mean(areas))


def bootstrap_interval(statistic, *arrays, level=0.95, rounds=2000, seed=0):
    """(low, high), an interval of confidence for what the statistic is on all such images.

    The percentile bootstrap over the images, the first axis of every array (Efron & Tibshirani 1993, chapter 13).

    A draw for which the statistic raises ValueError (no image of a class) is drawn again.

    Args:
        statistic: function of such arrays that returns a number.
        arrays: each (N, …).
        level: of confidence, from 0.01 to 0.999.
        rounds: draws, from 10 to 10⁶.
        seed: of the draws.

    Raises:
        ValueError: a number is out of its range, or the statistic failed for more draws than `rounds`.
    """
    check_number("level", level, float, 0.01, 0.999)
    check_number("rounds", rounds, int, 10, 10**6)
    random, count = np.random.default_rng(seed), len(arrays[0])
    values, failures = [], 0
    while len(values) < rounds:
        chosen = random.integers(0, count, count)
        try:
            values.append(statistic(*(array[chosen] for array in arrays)))
        except ValueError:
            failures += 1
            if failures > rounds:
                raise
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def reliability(probabilities, labels, bins=15):
    """How right the network is by how sure it is: a row a bin of its largest probability, equally wide.

    Args:
        probabilities: (N, classes).
        labels: (N,).
        bins: how many, from 1 to 1000.

    Returns:
        DataFrame with the columns images, confidence (mean) and accuracy; bins without images are left out.

    Raises:
        ValueError: an argument is not as above.
    """
    check_number("bins", bins, int, 1, 1000)
    probabilities, labels = _checked(probabilities, labels)
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((sure * bins).astype(int), bins - 1)
    table = pd.DataFrame({"bin": place, "confidence": sure, "accuracy": right})
    table = table.groupby("bin").agg(
        images=("accuracy", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
    )
    return table.reset_index(drop=True)


def calibration_error(probabilities, labels, bins=15):
    """Expected calibration error: mean distance of accuracy and confidence over the bins of `reliability`, weighted by
    their images (Guo et al. 2017, arXiv 1706.04599)."""
    table = reliability(probabilities, labels, bins)
    return float(((table["accuracy"] - table["confidence"]).abs() * table["images"]).sum() / table["images"].sum())


def cross_entropy(probabilities, labels):
    """Mean −log of the probability of the right class."""
    probabilities, labels = _checked(probabilities, labels)
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12)).mean())


def apply_temperature(probabilities, temperature):
    """Probabilities (N, classes) at another temperature T: softmax(log p / T).

    Raises:
        ValueError: the temperature is not from 0.001 to 1000.
    """
    check_number("temperature", temperature, float, 1e-3, 1e3)
    return special.softmax(np.log(np.maximum(probabilities, 1e-12)) / temperature, axis=1)


def fit_temperature(probabilities, labels):
    """The temperature at which the cross-entropy is least, to be found on images that nothing was trained on.

    Sought from e⁻³ to e³ (Guo et al. 2017, arXiv 1706.04599).
    """
    probabilities, labels = _checked(probabilities, labels)
    found = optimize.minimize_scalar(
        lambda log: cross_entropy(apply_temperature(probabilities, float(np.exp(log))), labels),
        bounds=(-3, 3),
        method="bounded",
    )
    return float(np.exp(found.x))


def _checked(probabilities, labels):
    probabilities, labels = np.asarray(probabilities, float), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"probabilities must be (images, classes) and labels (images,), at least one image; got "
            f"{probabilities.shape} and {labels.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"labels must be whole numbers from 0 to {probabilities.shape[1] - 1}")
    return probabilities, labels
