"""Generate stand-in images that a network can learn, for use without the real data sets.

`generate` replaces CIFAR-100: 100 classes in 20 superclasses, 32×32×3. A superclass is a texture,
and a class is one of five glyphs on that texture. The texture fills the image from a random
position, light on dark or dark on light. Three copies of the glyph lie on it at random positions.
Noise and a faint tint of the superclass are added. A single pixel therefore says little about the
class: a linear classifier finds only the tint. A network must detect small patterns anywhere in the
image and combine them.

`grey` replaces PneumoniaMNIST: two classes in the ratio 1 to 3, 28×28×1. Each image has bands, like
ribs, at a random height. The first class has at most one spot on them, the second class two to
four. The spots of an image are all brighter or all darker than the bands, and the mean brightness
is random.

All values are integers from a generator with a fixed algorithm, so the bytes are the same on every
machine.
"""

import numpy as np

SEED = 2009
FINE_NAMES = tuple(f"texture {number // 5 + 1}{'abcde'[number % 5]}" for number in range(100))
GREY_NAMES = ("few spots", "many spots")
COARSE_NAMES = tuple(f"texture {number + 1}" for number in range(20))
_GLYPHS = (0b010111010, 0b101010101, 0b111101111, 0b111010010, 0b100110111)  # 3×3 cells, row by row


def generate(per_class, test_per_class):
    """Generate the stand-in for CIFAR-100.

    Args:
        per_class, test_per_class: numbers of training and test images of each class.

    Returns:
        [(images, fine, coarse) for training, the same for testing]: images (N, 32, 32, 3) uint8,
        labels (N,).
    """
    random = np.random.RandomState(SEED)
    textures = _blocks(random.permutation(2**9 - 2)[:20] + 1, 3)  # (20, 9, 9) of 0 and 1
    glyphs = _blocks(_GLYPHS, 3)  # (5, 9, 9)
    tints = random.randint(-12, 13, (20, 3))
    splits = []
    for count in (per_class, test_per_class):
        fine = np.repeat(np.arange(100), count)
        splits.append((_draw(fine, textures, glyphs, tints, random), fine, fine // 5))
    return splits


def grey(counts=((300, 900), (40, 120), (100, 300))):
    """Generate the stand-in for PneumoniaMNIST.

    Args:
        counts: numbers of images of the first and the second class, for training, validation and
            testing.

    Returns:
        [(images, labels) for each of `counts`]: images (N, 28, 28, 1) uint8, labels (N,).
    """
    random = np.random.RandomState(SEED)
    splits = []
    for each in counts:
        labels = np.repeat((0, 1), each)
        splits.append((_draw_grey(labels, random), labels))
    return splits


def _draw_grey(labels, random):
    """Draw an image for each label: (N,) -> (N, 28, 28, 1) uint8."""
    count, side = len(labels), np.arange(28)
    height, brightness = random.randint(0, 7, (count, 1)), random.randint(80, 160, (count, 1, 1))
    bands = ((side + height) % 7 < 3)[:, :, None]  # (N, 28, 1)
    images = brightness + 24 * bands + np.zeros((count, 28, 28), int)
    sign = random.choice([-30, 30], (count, 1, 1))
    spots = np.where(labels == 0, random.randint(0, 2, count), random.randint(2, 5, count))
    for number in range(4):
        row, column, radius = random.randint((4, 4, 2), (24, 24, 5), (count, 3)).T[..., None, None]
        inside = (side[:, None] - row) ** 2 + (side - column) ** 2 <= radius**2
        images += sign * (inside & (number < spots)[:, None, None])
    images += random.randint(-20, 21, images.shape)
    return np.clip(images, 0, 255).astype("uint8")[..., None]


def _draw(fine, textures, glyphs, tints, random):
    """Draw an image for each label: (N,) -> (N, 32, 32, 3) uint8."""
    count = len(fine)
    offset = random.randint(0, 9, (2, count, 1))  # (row, column): textures have period 9
    sign = random.choice([-1, 1], (count, 1, 1))
    corners = [random.randint(0, 32 - 9, (2, count, 1, 1)) for _ in range(3)]  # (top, left) of each glyph
    images = np.empty((count, 32, 32, 3), "uint8")
    for start in range(0, count, 100):  # all at once would take 900 MB and be several times slower
        part = slice(start, start + 100)
        at = [corner[:, part] for corner in corners]
        noiseless = _draw_part(fine[part], textures, glyphs, tints, offset[:, part], sign[part], at)
        images[part] = np.clip(noiseless + random.randint(-24, 25, noiseless.shape), 0, 255)
    return images


def _draw_part(fine, textures, glyphs, tints, offset, sign, corners):
    side = np.arange(32)
    row, column = offset + side
    pattern = textures[fine[:, None, None] // 5, row[:, :, None] % 9, column[:, None, :] % 9]  # (N, 32, 32)
    images = 128 + (sign * (2 * pattern - 1) * 36)[..., None] + tints[fine // 5][:, None, None, :]
    for top, left in corners:
        inside = np.stack(np.broadcast_arrays(side[:, None] - top, side - left))  # (2, N, 32, 32)
        on = ((inside >= 0) & (inside < 9)).all(axis=0)
        stamp = glyphs[fine[:, None, None] % 5, *np.clip(inside, 0, 8)]
        images[on] = 128 + (2 * stamp[on] - 1)[:, None] * np.array([90, 70, -80])
    return images


def _blocks(codes, scale):
    """Draw the 9 bits of each code as 3×3 cells: (N, 3·scale, 3·scale) of 0 and 1."""
    bits = (np.asarray(codes)[:, None] >> np.arange(8, -1, -1)) & 1
    return bits.reshape(-1, 3, 3).repeat(scale, axis=1).repeat(scale, axis=2)
