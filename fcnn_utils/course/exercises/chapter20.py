"""Checks of the exercises of chapter 20, ensembles."""

import numpy as np

from fcnn_utils.course.ensembles import mean_logit
from fcnn_utils.course.exercises import compare_arrays, compare_numbers, exercise


@exercise("20.1")
def both_wrong(answer):
    """(1 - a)² + ρ a (1 - a)."""
    return compare_numbers(answer, [0.2025 + 0.65 * 0.2475, 0.2025], "wrong is 1 - a, not a", rtol=5e-3)


@exercise("20.2")
def oracle(function):
    """Random answers; the accuracy of the oracle by a loop over the images."""
    rng = np.random.default_rng(1)
    for networks, images, classes in ((3, 40, 5), (2, 60, 3), (1, 50, 4)):
        p, labels = rng.dirichlet(np.ones(classes), (networks, images)), rng.integers(0, classes, images)
        truth = np.mean([any(p[m, n].argmax() == labels[n] for m in range(networks)) for n in range(images)])
        found = function(p.copy(), labels.copy())
        if np.size(found) != 1:
            return f"return one number; you return {np.size(found)}"
        if not np.isclose(float(np.ravel(found)[0]), truth):
            return f"for {networks} networks and {images} images it is {truth:.3f}; yours is {found}"
    return ""


@exercise("20.3")
def cascade(function):
    """Random answers, with thresholds that ask for some, none and all; image by image."""
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.ones(4), (2, 50))
    for threshold in (0.5, 0.0, 1.01):
        asked = p.max(axis=1) < threshold
        vote = mean_logit(np.stack([p, q])).argmax(axis=1)
        truth = np.array([vote[n] if asked[n] else p[n].argmax() for n in range(len(p))])
        found = function(p.copy(), q.copy(), threshold)
        if not isinstance(found, tuple | list) or len(found) != 2:
            return "return two things: the classes, and the share of images for which the second is asked"
        case = f"the threshold {threshold}"
        wrong = compare_arrays(np.asarray(found[0]), truth, case, "some classes are wrong")
        if wrong:
            return wrong
        if not np.isclose(float(found[1]), asked.mean()):
            return f"for {case} the share is {asked.mean():.2f}; yours is {found[1]}"
    return ""
