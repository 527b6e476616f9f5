"""Networks that the thesis cites, at CIFAR's size: wide residual networks, and one each in the style of Inception,
of Xception, and of the layers of Wang et al.; and ResNet-18, which MedMNIST was published with.

Each is a function of images (N, H, W, C), and of a `Maker` of its layers, to features (N, h, w, filters);
`networks.build` puts global average pooling and a dense layer with a
softmax behind them. The residual networks are as published; the others are too large for images of 32×32, so their
blocks are the papers', and the numbers of them and of their filters are ours.
"""

import dataclasses
import re

from keras import layers

from fcnn_utils import blocks


@dataclasses.dataclass(frozen=True)
class Maker:
    """How the layers of a network are made: their dtype, what their kernels start from, a factor of their filters."""

    dtype: str
    kernel_initializer: object
    width: float = 1.0

    def filters(self, count):
        """`count` times the width, rounded, at least 1."""
        return max(1, round(self.width * count))

    def conv(self, x, filters, size, name, strides=1):
        """A size×size convolution (`size` may be a pair), `same`, without bias: a batch normalisation follows, or an
        addition."""
        options = {"use_bias": False, "kernel_initializer": self.kernel_initializer, "dtype": self.dtype}
        return layers.Conv2D(self.filters(filters), size, strides=strides, padding="same", name=name, **options)(x)

    def separable(self, x, filters, name):
        """A separable 3×3 convolution, `same`, without bias."""
        starts = {"depthwise_initializer": self.kernel_initializer, "pointwise_initializer": self.kernel_initializer}
        options = {"padding": "same", "use_bias": False, "dtype": self.dtype}
        return layers.SeparableConv2D(self.filters(filters), 3, name=name, **starts, **options)(x)

    def norm(self, x, name, relu=True):
        """A batch normalisation, NAME_bn, and a ReLU, NAME_relu, unless `relu` is False."""
        x = layers.BatchNormalization(name=f"{name}_bn", dtype=self.dtype)(x)
        return layers.Activation("relu", name=f"{name}_relu", dtype=self.dtype)(x) if relu else x

    def conv_norm(self, x, filters, size, name, strides=1):
        """`conv`, and `norm` with its ReLU."""
        return self.norm(self.conv(x, filters, size, name, strides), name)

    def pool(self, x, name, strides=2, average=False):
        """Pooling over 3×3, `same`: the maximum, or the mean."""
        kind = layers.AveragePooling2D if average else layers.MaxPooling2D
        return kind(3, strides, padding="same", name=name, dtype=self.dtype)(x)

    def add(self, x, y, name):
        """The sum of two tensors of one shape."""
        return layers.Add(name=name, dtype=self.dtype)([x, y])

    def join(self, parts, name):
        """The channels of all parts, one part after the other."""
        return layers.Concatenate(name=name, dtype=self.dtype)(parts)


def wide_resnet(x, make, depth, width):
    """WRN-depth-width of Zagoruyko & Komodakis 2016 (arXiv 1605.07146), without dropout.

    Three groups of (depth − 4) / 6 blocks BN, ReLU, 3×3, BN, ReLU, 3×3 with 16, 32 and 64 times `width` filters; where
    the size or the filters change the shortcut is a 1×1 convolution.
    """
    x = make.conv(x, 16, 3, "conv")
    for group, (base, stride) in enumerate(((16, 1), (32, 2), (64, 2)), 1):
        for block in range(1, (depth - 4) // 6 + 1):
            name, strides = f"group{group}_block{block}", stride if block == 1 else 1
            y = make.norm(x, f"{name}_1")
            if strides > 1 or x.shape[-1] != make.filters(width * base):
                x = make.conv(y, width * base, 1, f"{name}_shortcut", strides)
            y = make.conv(y, width * base, 3, f"{name}_conv1", strides)
            y = make.conv(make.norm(y, f"{name}_2"), width * base, 3, f"{name}_conv2")
            x = make.add(x, y, f"{name}_add")
    return make.norm(x, "last")


def resnet18(x, make):
    """ResNet-18 of He et al. 2015 (arXiv 1512.03385) as it is used on images of 28×28 and 32×32, in MedMNIST as well:
    its first convolution 3×3, of stride 1, and no pooling after it.

    Four groups of two blocks 3×3, BN, ReLU, 3×3, BN with 64 to 512 filters; where the size changes the shortcut is a
    1×1 convolution with BN.
    """
    x = make.conv_norm(x, 64, 3, "conv")
    for group, filters in enumerate((64, 128, 256, 512), 1):
        for block in (1, 2):
            name, strides = f"group{group}_block{block}", 2 if group > 1 and block == 1 else 1
            y = make.conv_norm(x, filters, 3, f"{name}_1", strides)
            y = make.norm(make.conv(y, filters, 3, f"{name}_2"), f"{name}_2", relu=False)
            if strides > 1:
                x = make.norm(make.conv(x, filters, 1, f"{name}_shortcut", 2), f"{name}_shortcut", relu=False)
            x = layers.Activation("relu", name=f"{name}_relu", dtype=make.dtype)(make.add(x, y, f"{name}_add"))
    return x


def inception(x, make):
    """Inception-style: n×n convolutions as pairs 1×n, n×1, in branches (Szegedy et al. 2015, arXiv 1512.00567).

    Two convolutions; then, at 16×16 with n = 7 and at 8×8 with n = 3, a reduction and two modules of their section 3.
    """
    x = make.conv_norm(x, 32, 3, "stem1")
    x = make.conv_norm(x, 48, 3, "stem2")
    for stage, (size, filters) in enumerate(((7, 48), (3, 96)), 1):
        name = f"reduction{stage}"
        one = make.conv_norm(make.conv_norm(x, filters, 1, f"{name}_a1"), filters, 3, f"{name}_a2", 2)
        two = make.conv_norm(make.conv_norm(x, filters, 1, f"{name}_b1"), filters, 3, f"{name}_b2")
        two = make.conv_norm(two, filters, 3, f"{name}_b3", 2)
        x = make.join([one, two, make.pool(x, f"{name}_pool")], f"{name}_join")
        for number in (1, 2):
            x = _inception_module(x, make, size, filters, f"module{stage}{number}")
    return x


def _inception_module(x, make, size, filters, name):
    """Four branches: 1×1; one n×n; two n×n; pooling; each n×n a pair."""
    parts = [make.conv_norm(x, filters, 1, f"{name}_a")]
    for branch, pairs in (("b", 1), ("c", 2)):
        y = make.conv_norm(x, filters, 1, f"{name}_{branch}")
        for pair in range(1, pairs + 1):
            y = make.conv_norm(y, filters, (1, size), f"{name}_{branch}{pair}_row")
            y = make.conv_norm(y, filters, (size, 1), f"{name}_{branch}{pair}_column")
        parts.append(y)
    pooled = make.pool(x, f"{name}_pool", 1, average=True)
    return make.join([*parts, make.conv_norm(pooled, filters, 1, f"{name}_d")], f"{name}_join")


def xception(x, make):
    """Xception-style: separable convolutions with shortcuts (Chollet 2017, arXiv 1610.02357).

    Two convolutions; two blocks of two separable ones that halve the image, with a 1×1 shortcut; four of three that
    keep it; a separable convolution with twice the filters.
    """
    x = make.conv_norm(x, 32, 3, "stem1")
    x = make.conv_norm(x, 64, 3, "stem2")
    for number, filters in enumerate((128, 256), 1):
        name = f"entry{number}"
        y = make.norm(make.separable(x, filters, f"{name}_sep1"), f"{name}_1")
        y = make.norm(make.separable(y, filters, f"{name}_sep2"), f"{name}_2", relu=False)
        shortcut = make.norm(make.conv(x, filters, 1, f"{name}_shortcut", 2), f"{name}_shortcut", relu=False)
        x = make.add(make.pool(y, f"{name}_pool"), shortcut, f"{name}_add")
    for block in range(1, 5):
        y = x
        for number in (1, 2, 3):
            name = f"middle{block}_{number}"
            y = layers.Activation("relu", name=f"{name}_relu", dtype=make.dtype)(y)
            y = make.norm(make.separable(y, 256, f"{name}_sep"), name, relu=False)
        x = make.add(x, y, f"middle{block}_add")
    return make.norm(make.separable(x, 512, "exit_sep"), "exit")


def wang(x, make):
    """Of the three layers of Wang, Liu & Foroosh 2017 (arXiv 1608.04337), each behind another.

    A convolution; at 32×32 and 16×16 a single intra-channel convolution and a spatial bottleneck (2×2); at 8×8 four
    single intra-channel convolutions, every other one with topological subdivisioning, its 256 channels on a 16×16 grid
    of which each reads 2×2. A shortcut wherever the shape stays.
    """
    options = {"kernel_initializer": make.kernel_initializer, "use_bias": False, "dtype": make.dtype}
    x = make.conv_norm(x, 32, 3, "stem")
    for stage, filters in enumerate((64, 128), 1):
        count = make.filters(filters)
        y = blocks.single_intra_channel(x, count, 3, name=f"intra{stage}", **options)
        x = make.norm(y, f"intra{stage}")
        y = blocks.spatial_bottleneck(x, count, 2, name=f"space{stage}", **options)
        x = make.pool(make.add(x, make.norm(y, f"space{stage}"), f"space{stage}_shortcut"), f"pool{stage}")
    side = max(2, round(make.width**0.5 * 16))
    x = make.norm(blocks.single_intra_channel(x, side**2, 3, name="intra3", **options), "intra3")
    for number in (4, 6):
        y = blocks.topological(x, side**2, 3, (side, side), (2, 2), name=f"grid{number}", **options)
        x = make.add(x, make.norm(y, f"grid{number}"), f"grid{number}_shortcut")
        y = blocks.single_intra_channel(x, side**2, 3, name=f"intra{number + 1}", **options)
        x = make.add(x, make.norm(y, f"intra{number + 1}"), f"intra{number + 1}_shortcut")
    return x


STYLES = {"inception": inception, "xception": xception, "wang": wang, "resnet18": resnet18}
EXAMPLES = ("wrn-16-4", *STYLES)


def known(name):
    """Whether `name` is a network of this module.

    These are "inception", "xception", "wang", "resnet18", and "wrn-DEPTH-WIDTH" ("wrn-16-4") of depth 10, 16, 22, …
    """
    return isinstance(name, str) and (name in STYLES or _wide(name) is not None)


def features(name, x, make):
    """The features (N, h, w, filters) that a network makes of images (N, H, W, C).

    Args:
        name: one that is `known`.
        x: Keras tensor of the images.
        make: `Maker`.
    """
    return STYLES[name](x, make) if name in STYLES else wide_resnet(x, make, *_wide(name))


def _wide(name):
    """(depth, width) of "wrn-DEPTH-WIDTH"; None where it is no such name."""
    match = re.fullmatch(r"wrn-([1-9]\d?\d?)-([1-9]\d?)", name)
    depth, width = (int(part) for part in match.groups()) if match else (0, 0)
    return (depth, width) if depth >= 10 and depth % 6 == 4 else None
