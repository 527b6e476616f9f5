"""Input pipeline: normalisation, shuffling, augmentation, batches.

`plan` decides in NumPy which images each batch has and how each is mirrored and shifted. It depends only on the seed
and the epoch. Therefore an interrupted run continues exactly as if it had not been interrupted. `make_batch` then
makes the batch with Keras operations. It works in a tf.data pipeline, in a compiled program, or called directly.
"""

import numpy as np
from keras import ops


def plan(split, recipe, epoch):
    """Draw the images of one epoch and their augmentation. The last, incomplete batch is dropped.

    Args:
        split: `data.Split`.
        recipe: `recipes.Recipe`; uses `seed`, `batch_size`, `balanced`, `flip` and `shift`.
        epoch: number of the epoch, from 0.

    Returns:
        (steps, B, 4) int32. Column 0: number of the image in `split`. Columns 1 to 3: its moves, as in `move`.
    """
    rng, size = np.random.default_rng([recipe.seed, epoch]), recipe.batch_size
    order = _balanced_order(split.fine, rng) if recipe.balanced else rng.permutation(len(split))
    mirrored = None
    if recipe.flip == "alternating":  # mirror one half of the images in even epochs, the other in odd
        mirrored = (np.random.default_rng([recipe.seed, 2**32]).permutation(len(split)) + epoch) % 2 == 0
    batches = order[: len(order) // size * size].reshape(-1, size)
    moves = [_draw_moves(size, recipe, rng, None if mirrored is None else mirrored[batch]) for batch in batches]
    return np.concatenate([batches[..., None], np.reshape(moves, (*batches.shape, 3))], axis=-1).astype("int32")


def make_batch(images, labels, rows, scale, classes):
    """Make one batch of augmented images.

    Args:
        images: (N, H, W, C) uint8, all images.
        labels: (N,) int.
        rows: (B, 4) int32, one batch of `plan`.
        scale: (mean, standard deviation), from `channel_statistics`.
        classes: number of classes.

    Returns:
        (images, labels): normalised (B, H, W, C) and one-hot (B, classes), both float32 tensors.
    """
    mean, deviation = scale
    chosen = ops.cast(ops.take(images, rows[:, 0], axis=0), "float32")
    return move((chosen - mean) / deviation, rows[:, 1:]), ops.one_hot(ops.take(labels, rows[:, 0], axis=0), classes)


def move(images, moves):
    """Mirror and shift normalised images.

    Args:
        images: (B, H, W, C) float32.
        moves: (B, 3) int. Column 0: 1 to mirror the image, else 0. Columns 1 and 2: how many pixels the window then
            moves down and right over the image, so that the picture itself moves up and left.

    Returns:
        (B, H, W, C) float32 tensor. Pixels from outside the image are 0, the mean colour.
    """
    count, height, width, channels = images.shape
    moves = ops.cast(moves, "int32")
    y = ops.arange(height, dtype="int32") + moves[:, 1, None]  # (B, H), the row that each pixel comes from
    x = ops.arange(width, dtype="int32") + moves[:, 2, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    x = ops.where(moves[:, :1] > 0, width - 1 - x, x)
    y, x = ops.clip(y, 0, height - 1), ops.clip(x, 0, width - 1)
    start = ops.arange(count, dtype="int32")[:, None, None] * (height * width)
    pixels = ops.take(ops.reshape(images, (-1, channels)), start + y[:, :, None] * width + x[:, None, :], axis=0)
    return ops.where(inside[..., None], pixels, ops.zeros_like(pixels))


def batches(split, recipe, epoch, scale, classes):
    """Generate the batches of one epoch as NumPy arrays; arguments as in `plan` and `make_batch`.

    Yields:
        (images, labels): normalised (B, H, W, C) and one-hot (B, classes), both float32.
    """
    images, labels = ops.convert_to_tensor(split.images), ops.convert_to_tensor(split.fine)
    for rows in plan(split, recipe, epoch):
        batch = make_batch(images, labels, rows, scale, classes)
        yield tuple(ops.convert_to_numpy(each) for each in batch)


def augment(images, recipe, rng):
    """Mirror and shift normalised images at random, by the recipe's `flip` and `shift`.

    Args:
        images: (B, H, W, C) float32.
        recipe: `recipes.Recipe`.
        rng: `np.random.Generator`.

    Returns:
        (B, H, W, C) float32 array, a new one. Pixels from outside the image are 0, the mean colour.
    """
    return ops.convert_to_numpy(move(images, _draw_moves(len(images), recipe, rng)))


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


def _draw_moves(count, recipe, rng, mirrored=None):
    """Draw (count, 3) moves as in `move`; by default each image is mirrored with probability 1/2."""
    moves = np.zeros((count, 3), int)
    if recipe.flip:
        moves[:, 0] = rng.random(count) < 0.5 if mirrored is None else mirrored
    if recipe.shift:
        moves[:, 1:] = rng.integers(-recipe.shift, recipe.shift + 1, (2, count)).T
    return moves


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
