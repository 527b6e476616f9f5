"""Images on their way into a training: normalised, shuffled, augmented, batch by batch, in NumPy.

The order and the augmentation of an epoch depend on seed and epoch alone, so an interrupted run goes on as if it had
not been.
"""

import numpy as np


def batches(split, recipe, epoch, scale, classes):
    """Generator over one epoch's batches, shuffled and augmented by seed and epoch.

    Args:
        split: `data.Split`.
        recipe: `recipes.Recipe`, of which `seed`, `batch_size`, `balanced`, `flip` and `shift` count.
        epoch: number of the epoch, from 0.
        scale: from `channel_scale`.
        classes: length of a one-hot label.

    Yields:
        images (B, H, W, C) float32, normalised; one-hot labels (B, classes) float32. What does not fill a batch is
        left out.
    """
    rng = np.random.default_rng([recipe.seed, epoch])
    order = _balanced(split.fine, rng) if recipe.balanced else rng.permutation(len(split))
    mirrored = None
    if recipe.flip == "alternating":  # one half of the images, and in the next epoch the other
        mirrored = (np.random.default_rng([recipe.seed, 2**32]).permutation(len(split)) + epoch) % 2 == 0
    one_hot = np.eye(classes, dtype="float32")
    for start in range(0, len(split) - recipe.batch_size + 1, recipe.batch_size):
        chosen = order[start : start + recipe.batch_size]
        mirror = None if mirrored is None else mirrored[chosen]
        yield augment(normalize(split.images[chosen], scale), recipe, rng, mirror), one_hot[split.fine[chosen]]


def _balanced(labels, rng):
    """(N,) indices in random order, of every class (nearly) as many; each of a class once before any comes again."""
    present = np.unique(labels)
    shares = np.diff(len(labels) * np.arange(len(present) + 1) // len(present))
    chosen = []
    for label, share in zip(present, shares, strict=True):
        own = np.flatnonzero(labels == label)
        rounds = [rng.permutation(own) for _ in range(-(-share // len(own)))]
        chosen.append(np.concatenate(rounds)[:share])
    return rng.permutation(np.concatenate(chosen))


def augment(images, recipe, rng, mirror=None):
    """Normalised images, mirrored and moved by the recipe's `flip` and `shift`.

    Args:
        images: (B, H, W, C) float32, which are mirrored in place.
        recipe: `recipes.Recipe`.
        rng: `np.random.Generator` that draws which are mirrored, and how far each moves.
        mirror: (B,) bool, which are mirrored; default: half of them, drawn by `rng`.

    Returns:
        (B, H, W, C) float32.
    """
    if recipe.flip:
        mirror = rng.random(len(images)) < 0.5 if mirror is None else mirror
        images[mirror] = images[mirror, :, ::-1]
    if recipe.shift:
        size, border = images.shape[1:3], recipe.shift
        padded = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))  # 0 is the mean colour
        windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(1, 2))  # (B, dy, dx, C, H, W)
        dy, dx = rng.integers(0, 2 * border + 1, (2, len(images)))
        images = np.ascontiguousarray(windows[np.arange(len(images)), dy, dx].transpose(0, 2, 3, 1))
    return images


def channel_statistics(dataset):
    """(mean, standard deviation) of each channel over the training images, on the scale 0–255: two (C,) float32."""
    images = dataset.train.images
    counts = np.zeros((images.shape[-1], 256))  # how often each value occurs: exact, and small
    for part in np.array_split(images, 1 + len(images) // 1000):
        counts += [np.bincount(part[..., channel].ravel(), minlength=256) for channel in range(images.shape[-1])]
    values, total = np.arange(256), counts.sum(axis=1)
    mean = counts @ values / total
    variance = np.maximum(counts @ values**2 / total - mean**2, 1e-6)
    return mean.astype("float32"), np.sqrt(variance).astype("float32")


def normalize(images, scale):
    """Images (N, H, W, C) uint8 as float32, with mean 0 and standard deviation 1 in each channel.

    Args:
        images: (N, H, W, C) uint8.
        scale: (mean, standard deviation), from `channel_scale`.
    """
    mean, deviation = scale
    return (images.astype("float32") - mean) / deviation
