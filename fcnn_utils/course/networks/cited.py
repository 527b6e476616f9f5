"""Networks that the thesis cites, at the image size of CIFAR-100, and ResNet-18, the baseline of MedMNIST.

Each network is a function from images (N, H, W, C) and a `Maker` of its layers to features (N, h, w, filters).
`networks.build` adds global average pooling and a dense layer with softmax. The residual networks are as published.
The others are too large for 32×32 images: their blocks are those of the papers, while the numbers of blocks and of
filters are ours.
"""

import dataclasses
import re

from keras import layers

from fcnn_utils import blocks


@dataclasses.dataclass(frozen=True)
class Maker:
    """Shared settings of a network's layers: dtype, kernel initializer, and factor on the number of filters.

    Every method applies one layer, or a layer with its batch normalisation. Convolutions use `same` padding and have
    no bias, because a batch normalisation or an addition follows.
    """

    dtype: str
    kernel_initializer: object
    width: float = 1.0

    def filters(self, count):
        """Return `count` times the width, rounded, at least 1."""
        return max(1, round(self.width * count))

    def conv(self, x, filters, size, name, strides=1):
        """Apply a convolution; `size` is a number or a pair."""
        options = {"use_bias": False, "kernel_initializer": self.kernel_initializer, "dtype": self.dtype}
        return layers.Conv2D(self.filters(filters), size, strides=strides, padding="same", name=name, **options)(x)

    def separable(self, x, filters, name):
        """Apply a separable 3×3 convolution."""
        starts = {"depthwise_initializer": self.kernel_initializer, "pointwise_initializer": self.kernel_initializer}
        options = {"padding": "same", "use_bias": False, "dtype": self.dtype}
        return layers.SeparableConv2D(self.filters(filters), 3, name=name, **starts, **options)(x)

    def relu(self, x, name):
        """Apply a ReLU, named NAME_relu."""
        return layers.Activation("relu", name=f"{name}_relu", dtype=self.dtype)(x)

    def norm(self, x, name, relu=True):
        """Apply a batch normalisation, named NAME_bn, and a ReLU unless `relu` is False."""
        x = layers.BatchNormalization(name=f"{name}_bn", dtype=self.dtype)(x)
        return self.relu(x, name) if relu else x

    def conv_norm(self, x, filters, size, name, strides=1, relu=True):
        """Apply `conv`, then `norm`."""
        return self.norm(self.conv(x, filters, size, name, strides), name, relu)

    def pool(self, x, name, strides=2, average=False):
        """Apply 3×3 max pooling, or average pooling."""
        kind = layers.AveragePooling2D if average else layers.MaxPooling2D
        return kind(3, strides, padding="same", name=name, dtype=self.dtype)(x)

    def add(self, x, y, name):
        """Add two tensors of the same shape."""
        return layers.Add(name=name, dtype=self.dtype)([x, y])

    def join(self, parts, name):
        """Concatenate tensors along their channels."""
        return layers.Concatenate(name=name, dtype=self.dtype)(parts)


def wide_resnet(x, make, depth, width):
    """Wide residual network WRN-depth-width, without dropout (Zagoruyko & Komodakis 2016, arXiv 1605.07146).

    Each of three groups has (depth − 4) / 6 blocks BN, ReLU, 3×3, BN, ReLU, 3×3, with `width` times 16, 32 or 64
    filters. Where the image size or the number of filters changes, the shortcut is a 1×1 convolution.
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
    """ResNet-18 for 28×28 and 32×32 images (He et al. 2015, arXiv 1512.03385), as in MedMNIST.

    As usual for such images, the first convolution is 3×3 with stride 1, and no pooling follows it. Four groups of two
    blocks 3×3, BN, ReLU, 3×3, BN have 64 to 512 filters. Where the image size changes, the shortcut is a 1×1
    convolution with BN.
    """
    x = make.conv_norm(x, 64, 3, "conv")
    for group, filters in enumerate((64, 128, 256, 512), 1):
        for block in (1, 2):
            name, strides = f"group{group}_block{block}", 2 if group > 1 and block == 1 else 1
            y = make.conv_norm(x, filters, 3, f"{name}_1", strides)
            y = make.conv_norm(y, filters, 3, f"{name}_2", relu=False)
            if strides > 1:
                x = make.conv_norm(x, filters, 1, f"{name}_shortcut", 2, relu=False)
            x = make.relu(make.add(x, y, f"{name}_add"), name)
    return x


def inception(x, make):
    """Inception-style network: parallel branches, with n×n convolutions split into pairs 1×n, n×1.

    Two convolutions; then, at 16×16 with n = 7 and at 8×8 with n = 3, a reduction and two modules of section 3 of
    Szegedy et al. 2015 (arXiv 1512.00567).
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
    """Four branches: 1×1; one n×n; two n×n; average pooling. Each n×n is a pair 1×n, n×1."""
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
    """Xception-style network: separable convolutions with shortcuts (Chollet 2017, arXiv 1610.02357).

    Two convolutions; two blocks of two separable convolutions that halve the image, with a 1×1 shortcut; four blocks
    of three that keep its size; a separable convolution with twice the filters.
    """
    x = make.conv_norm(x, 32, 3, "stem1")
    x = make.conv_norm(x, 64, 3, "stem2")
    for number, filters in enumerate((128, 256), 1):
        name = f"entry{number}"
        y = make.norm(make.separable(x, filters, f"{name}_sep1"), f"{name}_1")
        y = make.norm(make.separable(y, filters, f"{name}_sep2"), f"{name}_2", relu=False)
        shortcut = make.conv_norm(x, filters, 1, f"{name}_shortcut", 2, relu=False)
        x = make.add(make.pool(y, f"{name}_pool"), shortcut, f"{name}_add")
    for block in range(1, 5):
        y = x
        for number in (1, 2, 3):
            name = f"middle{block}_{number}"
            y = make.norm(make.separable(make.relu(y, name), 256, f"{name}_sep"), name, relu=False)
        x = make.add(x, y, f"middle{block}_add")
    return make.norm(make.separable(x, 512, "exit_sep"), "exit")


def wang(x, make):
    """Network of the three layer types of Wang, Liu & Foroosh 2017 (arXiv 1608.04337).

    A convolution; at 32×32 and at 16×16 a single intra-channel convolution and a 2×2 spatial bottleneck; at 8×8 three
    single intra-channel convolutions with two topological ones between them. A topological convolution places the 256
    channels on a 16×16 grid and reads 2×2 neighbourhoods. Every layer that keeps its input's shape has a shortcut.
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
    """Return whether `name` is a network of this module: a key of `STYLES`, or "wrn-DEPTH-WIDTH".

    The depth is 10, 16, 22, … (4 more than a multiple of 6): "wrn-16-4".
    """
    return isinstance(name, str) and (name in STYLES or _depth_and_width(name) is not None)


def features(name, x, make):
    """Return the features (N, h, w, filters) of the network `name`, which must be `known`, for images (N, H, W, C)."""
    return STYLES[name](x, make) if name in STYLES else wide_resnet(x, make, *_depth_and_width(name))


def _depth_and_width(name):
    """Return (depth, width) of "wrn-DEPTH-WIDTH", or None if the name is not of this form."""
    match = re.fullmatch(r"wrn-([1-9]\d?\d?)-([1-9]\d?)", name)
    depth, width = (int(part) for part in match.groups()) if match else (0, 0)
    return (depth, width) if depth >= 10 and depth % 6 == 4 else None
