"""Quality of predicted probabilities: accuracy, AUC, calibration, bootstrap intervals.

Probabilities are (N, classes); labels are (N,) integers from 0 to classes − 1. A function of both raises
ValueError if their shapes disagree, a label is out of range, or there are no images.

scikit-learn has two of these functions, but its `log_loss` warns if a row does not sum to 1 within 1e-8,
and rows of a float32 softmax do not. Its `calibration_curve` does not return the number of images per
bin, which the calibration error needs.
"""

import warnings

import numpy as np
import pandas as pd
from scipy import optimize, special, stats
from sklearn.metrics import roc_auc_score

from fcnn_utils._checks import check_number


def accuracy(probabilities, labels):
    """Return the share of images whose most probable class is the correct one."""
    probabilities, labels = _checked(probabilities, labels)
    return float((probabilities.argmax(axis=1) == labels).mean())


def auc(probabilities, labels):
    """Return the area under the ROC curve, as MedMNIST's evaluator does.

    It is the probability that a random image of a class scores higher for that class than a random other
    image; ties count half. With two classes it is that of the second class; with more, the mean over the
    classes, each against the rest.

    Raises:
        ValueError: if there is only one class, or a class has no images.
    """
    probabilities, labels = _checked(probabilities, labels)
    classes = probabilities.shape[1]
    counts = np.bincount(labels, minlength=classes)
    if classes < 2 or (counts == 0).any():
        raise ValueError(f"the AUC needs images of each of the {classes} classes; got {counts.tolist()} images")
    chosen = [1] if classes == 2 else range(classes)
    return float(np.mean([roc_auc_score(labels == label, probabilities[:, label]) for label in chosen]))


def bootstrap_interval(statistic, *arrays, level=0.95, rounds=2000, seed=0):
    """Return a confidence interval (low, high) of a statistic, by the percentile bootstrap over images.

    Each draw takes N images with replacement, the same ones from all arrays (Efron & Tibshirani 1993,
    chapter 13). A draw does not count if the statistic raises ValueError for it, for example because a
    rare class is missing.

    Args:
        statistic: function of the arrays that returns a number.
        arrays: one or more arrays whose first axis is the N images.
        level: confidence level, from 0.01 to 0.999.
        rounds: number of draws, from 10 to 10⁶.
        seed: seed of the draws.

    Raises:
        ValueError: if a number is out of range, or more than half of the draws do not count.
    """
    check_number("level", level, float, 0.01, 0.999)
    check_number("rounds", rounds, int, 10, 10**6)
    failures = []

    def on_draw(images):
        try:
            return statistic(*(array[images] for array in arrays))
        except ValueError as error:
            failures.append(error)
            return np.nan

    images = np.arange(len(arrays[0]))  # drawing indices resamples all arrays together, whatever their shapes
    options = {"n_resamples": rounds, "batch": 100, "vectorized": False, "method": "percentile", "rng": seed}
    with warnings.catch_warnings():  # SciPy's own interval, unused here, is NaN if a draw does not count
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        draws = stats.bootstrap((images,), on_draw, **options).bootstrap_distribution
    if len(failures) > rounds / 2:
        raise ValueError(f"the statistic failed for {len(failures)} of {rounds} draws: {failures[-1]}")
    low, high = np.nanquantile(draws, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def reliability(probabilities, labels, bins=15):
    """Compare accuracy with confidence, the largest probability, in bins of equal width (reliability diagram).

    Args:
        probabilities: (N, classes).
        labels: (N,).
        bins: number of bins, from 1 to 1000.

    Returns:
        DataFrame with the columns images (count), confidence (mean) and accuracy, one row per non-empty bin.

    Raises:
        ValueError: if an argument is not as above.
    """
    check_number("bins", bins, int, 1, 1000)
    probabilities, labels = _checked(probabilities, labels)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    table = pd.DataFrame({"confidence": confidence, "accuracy": correct})
    groups = table.groupby(np.minimum((confidence * bins).astype(int), bins - 1))
    return groups.mean().assign(images=groups.size()).reset_index(drop=True)[["images", "confidence", "accuracy"]]


def calibration_error(probabilities, labels, bins=15):
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599).

    It is the mean of `|accuracy − confidence|` over the bins of `reliability`, weighted by their images.
    """
    table = reliability(probabilities, labels, bins)
    return float(np.average((table["accuracy"] - table["confidence"]).abs(), weights=table["images"]))


def cross_entropy(probabilities, labels):
    """Return the mean of −log p, where p is the probability of the correct class, at least 1e-12."""
    probabilities, labels = _checked(probabilities, labels)
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12)).mean())


def apply_temperature(probabilities, temperature):
    """Return the probabilities (N, classes) at temperature T: softmax(log p / T).

    Raises:
        ValueError: if the temperature is not between 0.001 and 1000.
    """
    check_number("temperature", temperature, float, 1e-3, 1e3)
    return special.softmax(np.log(np.maximum(probabilities, 1e-12)) / temperature, axis=1)


def fit_temperature(probabilities, labels):
    """Return the temperature, between e⁻³ and e³, with the lowest cross-entropy (Guo et al. 2017, arXiv 1706.04599).

    Fit it on images that the network was not trained on.
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
            f"probabilities must be (images, classes) and labels (images,), with at least one image; got "
            f"{probabilities.shape} and {labels.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"labels must be integers from 0 to {probabilities.shape[1] - 1}")
    return probabilities, labels
