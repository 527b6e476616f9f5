"""Ensembles: combine the probabilities of several networks.

`members` are (M, N, classes): the probabilities of M networks for the same N images. Every function
raises ValueError if `members` is empty or does not have three axes.
"""

import numpy as np
from scipy import optimize, special


def mean_probability(members, weights=None):
    """Return the mean probabilities (N, classes), weighted by `weights` (M,); default: equal weights."""
    return np.average(_checked(members), axis=0, weights=weights)


def mean_logit(members, weights=None):
    """Return the softmax of the mean log-probabilities: their geometric mean, normalised to sum to one.

    Args:
        members: (M, N, classes).
        weights: (M,); default: equal weights.

    Returns:
        (N, classes).
    """
    return special.softmax(np.average(_logs(members), axis=0, weights=weights), axis=1)


def stacked(members, labels):
    """Fit the weights of a combination, softmax(Σ_m w_m log p_m) with w_m ≥ 0 (stacking: Wolpert 1992).

    The weights minimise the cross-entropy. Fit them on images that no member was trained on. Such images
    are few, so each network has only one weight, not one per class. The sum of the weights acts as an
    inverse temperature.

    Args:
        members: (M, N, classes).
        labels: (N,) correct classes.

    Returns:
        (combine, weights): a function from members (M, N', classes) to (N', classes), and its weights (M,).
    """
    logs, labels = _logs(members), np.asarray(labels)
    rows = np.arange(len(labels))

    def loss_and_gradient(weights):
        scores = special.log_softmax(np.tensordot(weights, logs, 1), axis=1)
        residual = np.exp(scores)
        residual[rows, labels] -= 1
        return -scores[rows, labels].mean(), (residual * logs).sum(axis=(1, 2)) / len(labels)

    start = np.full(len(logs), 1 / len(logs))
    fitted = optimize.minimize(loss_and_gradient, start, jac=True, bounds=[(0, None)] * len(logs), method="L-BFGS-B").x

    def combine(others):
        return special.softmax(np.tensordot(fitted, _logs(others), 1), axis=1)

    return combine, fitted


def _logs(members):
    return np.log(np.maximum(_checked(members), 1e-12))


def _checked(members):
    members = np.asarray(members, float)
    if members.ndim != 3 or not members.size:
        raise ValueError(f"members must be (networks, images, classes), at least one of each; got {members.shape}")
    return members
