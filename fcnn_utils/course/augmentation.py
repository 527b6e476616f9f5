"""Input pipeline in NumPy: normalisation, shuffling, augmentation, batches.

The order and the augmentation of the images depend only on the seed and the epoch. Therefore an
interrupted run continues exactly as if it had not been interrupted.
"""

import numpy as np


def batches(split, recipe, epoch, scale, classes):
    """Generate the shuffled, augmented batches of one epoch. The last, incomplete batch is dropped.

    Args:
        split: `data.Split`.
        recipe: `recipes.Recipe`; uses `seed`, `batch_size`, `balanced`, `flip` and `shift`.
        epoch: number of the epoch, from 0.
        scale: (mean, standard deviation), from `channel_statistics`.
        classes: number of classes, the length of a one-hot label.

    Yields:
        (images, labels): normalised (B, H, W, C) and one-hot (B, classes), both float32.
    """
    rng = np.random.default_rng([recipe.seed, epoch])
    order = _balanced_order(split.fine, rng) if recipe.balanced else rng.permutation(len(split))
    mirrored = None
    if recipe.flip == "alternating":  # mirror one half of the images in even epochs, the other in odd
        mirrored = (np.random.default_rng([recipe.seed, 2**32]).permutation(len(split)) + epoch) % 2 == 0
    one_hot = np.eye(classes, dtype="float32")
    for start in range(0, len(split) - recipe.batch_size + 1, recipe.batch_size):
        chosen = order[start : start + recipe.batch_size]
        mirror = None if mirrored is None else mirrored[chosen]
        yield augment(normalize(split.images[chosen], scale), recipe, rng, mirror), one_hot[split.fine[chosen]]


def augment(images, recipe, rng, mirror=None):
    """Mirror and shift normalised images by the recipe's `flip` and `shift`.

    Args:
        images: (B, H, W, C) float32; mirrored in place.
        recipe: `recipes.Recipe`.
        rng: `np.random.Generator` that draws the shifts, and by default the images to mirror.
        mirror: (B,) bool, the images to mirror; default: each with probability 1/2.

    Returns:
        (B, H, W, C) float32. A shift fills the border with 0, the mean colour.
    """
    if recipe.flip:
        mirror = rng.random(len(images)) < 0.5 if mirror is None else mirror
        images[mirror] = images[mirror, :, ::-1]
    if recipe.shift:
        size, border = images.shape[1:3], recipe.shift
        padded = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(1, 2))  # (B, dy, dx, C, H, W)
        dy, dx = rng.integers(0, 2 * border + 1, (2, len(images)))
        images = np.ascontiguousarray(windows[np.arange(len(images)), dy, dx].transpose(0, 2, 3, 1))
    return images


def channel_statistics(dataset):
    """Compute the mean and standard deviation of each channel over the training images (0–255).

    Args:
        dataset: `data.Dataset`, or a `data.Split` of training images; both have uint8 images.

    Returns:
        (mean, standard deviation), each (C,) float32.
    """
    images = getattr(dataset, "train", dataset).images
    counts = np.zeros((images.shape[-1], 256))  # a histogram per channel: exact, and needs little memory
    for part in np.array_split(images, 1 + len(images) // 1000):
        counts += [np.bincount(part[..., channel].ravel(), minlength=256) for channel in range(images.shape[-1])]
    values, total = np.arange(256), counts.sum(axis=1)
    mean = counts @ values / total
    variance = np.maximum(counts @ values**2 / total - mean**2, 1e-6)
    return mean.astype("float32"), np.sqrt(variance).astype("float32")


def normalize(images, scale):
    """Subtract the mean of each channel and divide by its standard deviation.

    Args:
        images: (N, H, W, C) uint8.
        scale: (mean, standard deviation), from `channel_statistics`.

    Returns:
        (N, H, W, C) float32.
    """
    mean, deviation = scale
    return (images.astype("float32") - mean) / deviation


def _balanced_order(labels, rng):
    """Draw (N,) indices in random order, equally many of each class.

    The counts of the classes differ by at most one; so do the counts of the images within a class.
    """
    present = np.unique(labels)
    shares = np.diff(len(labels) * np.arange(len(present) + 1) // len(present))
    chosen = []
    for label, share in zip(present, shares, strict=True):
        own = np.flatnonzero(labels == label)
        rounds = [rng.permutation(own) for _ in range(-(-share // len(own)))]
        chosen.append(np.concatenate(rounds)[:share])
    return rng.permutation(np.concatenate(chosen))
