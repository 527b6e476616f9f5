"""Input pipeline of a training, in NumPy: normalisation, shuffling, augmentation, batches.

The order of the images and their augmentation depend on the seed and the epoch alone. Therefore an
interrupted run continues exactly as if it had not been interrupted.
"""

import numpy as np


def batches(split, recipe, epoch, scale, classes):
    """Generate the shuffled, augmented batches of one epoch. The last, incomplete batch is dropped.

    Args:
        split: `data.Split`.
        recipe: `recipes.Recipe`; uses `seed`, `batch_size`, `balanced`, `flip` and `shift`.
        epoch: number of the epoch, from 0.
        scale: from `channel_statistics`.
        classes: number of classes, the length of a one-hot label.

    Yields:
        normalised images (B, H, W, C) and one-hot labels (B, classes), both float32.
    """
    rng = np.random.default_rng([recipe.seed, epoch])
    order = _balanced_order(split.fine, rng) if recipe.balanced else rng.permutation(len(split))
    mirrored = None
    if recipe.flip == "alternating":  # one half of the images in even epochs, the other half in odd ones
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
        rng: `np.random.Generator` that draws the mirrored images and the shifts.
        mirror: (B,) bool, the images to mirror; default: `rng` draws them, half on average.

    Returns:
        (B, H, W, C) float32. The border that a shift leaves is 0, the mean colour.
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
    """Mean and standard deviation of each channel over the training images, on the scale 0–255.

    Args:
        dataset: `data.Dataset`, or a `data.Split` of training images.

    Returns:
        (mean, standard deviation), each (C,) float32.
    """
    images = getattr(dataset, "train", dataset).images
    counts = np.zeros((images.shape[-1], 256))  # histogram of each channel: exact, and little memory
    for part in np.array_split(images, 1 + len(images) // 1000):
        counts += [np.bincount(part[..., channel].ravel(), minlength=256) for channel in range(images.shape[-1])]
    values, total = np.arange(256), counts.sum(axis=1)
    mean = counts @ values / total
    variance = np.maximum(counts @ values**2 / total - mean**2, 1e-6)
    return mean.astype("float32"), np.sqrt(variance).astype("float32")


def normalize(images, scale):
    """Scale images to mean 0 and standard deviation 1 in each channel.

    Args:
        images: (N, H, W, C) uint8.
        scale: (mean, standard deviation), from `channel_statistics`.

    Returns:
        (N, H, W, C) float32.
    """
    mean, deviation = scale
    return (images.astype("float32") - mean) / deviation


def _balanced_order(labels, rng):
    """(N,) indices in random order, equally many of each class, up to one.

    Within a class no image comes again before all others have come.
    """
    present = np.unique(labels)
    shares = np.diff(len(labels) * np.arange(len(present) + 1) // len(present))
    chosen = []
    for label, share in zip(present, shares, strict=True):
        own = np.flatnonzero(labels == label)
        rounds = [rng.permutation(own) for _ in range(-(-share // len(own)))]
        chosen.append(np.concatenate(rounds)[:share])
    return rng.permutation(np.concatenate(chosen))
