"""Several networks that answer together: how their probabilities are put together, and how much they differ.

Members are (M, N, classes): the probabilities of M networks for the same N images. Where they have another number of
axes, or are empty, it is a ValueError.
"""

import numpy as np
import pandas as pd
from scipy import optimize, special


def mean_probability(members, weights=None):
    """The mean of the probabilities, (N, classes); `weights` (M,), default: all alike."""
    return np.average(_checked(members), axis=0, weights=weights)


def mean_logit(members, weights=None):
    """softmax of the mean of the log-probabilities: their geometric mean, made to sum to one.

    Args:
        members: (M, N, classes).
        weights: (M,); default: all alike.

    Returns:
        (N, classes).
    """
    logs = np.log(np.maximum(_checked(members), 1e-12))
    return special.softmax(np.average(logs, axis=0, weights=weights), axis=1)


def stacked(members, labels):
    """The combiner that fits labels best: a function of members, softmax(Σ w log p) with a weight w ≥ 0 a network.

    Fitted by the cross-entropy, on images that no member was trained on (stacking: Wolpert 1992). It has M numbers to
    learn, not classes times as many, since such images are few; their sum is an inverse temperature.

    Returns:
        (combine, weights), the function from (M', N', classes) to (N', classes) and its weights (M,).
    """
    logs = np.log(np.maximum(_checked(members), 1e-12))
    labels = np.asarray(labels)

    def loss_and_slope(weights):
        scores = special.log_softmax(np.tensordot(weights, logs, 1), axis=1)
        left = np.exp(scores)
        left[np.arange(len(labels)), labels] -= 1
        slope = (left[None] * logs).sum(axis=(1, 2)) / len(labels)
        return -scores[np.arange(len(labels)), labels].mean(), slope

    start = np.full(len(logs), 1 / len(logs))
    fitted = optimize.minimize(loss_and_slope, start, jac=True, bounds=[(0, None)] * len(logs), method="L-BFGS-B").x

    def combine(others):
        return special.softmax(np.tensordot(fitted, np.log(np.maximum(_checked(others), 1e-12)), 1), axis=1)

    return combine, fitted


def diversity(members, labels, names=None):
    """How much each two networks differ. The columns:

        first, second      their names
        disagreement       share of the images to which they give different classes
        error_correlation  of being wrong (Pearson's, of two 0/1 values); NaN where one is always or never wrong
        both_wrong         share of the images

    Args:
        members: (M, N, classes).
        labels: (N,) the right classes.
        names: M names for the table; default: 0, 1, 2, …

    Returns:
        DataFrame with these columns, a row a pair.
    """
    members = _checked(members)
    classes, rows = members.argmax(axis=2), []
    wrong = classes != np.asarray(labels)
    names = list(range(len(members))) if names is None else list(names)
    for first in range(len(members)):
        for second in range(first + 1, len(members)):
            spread = wrong[first].std() * wrong[second].std()
            both = (wrong[first] & wrong[second]).mean()
            joint = both - wrong[first].mean() * wrong[second].mean()
            rows.append(
                {
                    "first": names[first],
                    "second": names[second],
                    "disagreement": (classes[first] != classes[second]).mean(),
                    "error_correlation": joint / spread if spread else np.nan,
                    "both_wrong": both,
                }
            )
    return pd.DataFrame(rows)


def _checked(members):
    members = np.asarray(members, float)
    if members.ndim != 3 or not members.size:
        raise ValueError(f"members must be (networks, images, classes), at least one of each; got {members.shape}")
    return members
