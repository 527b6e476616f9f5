"""The networks of the course, from stock Keras layers, by name: the thesis's three, ours of the same kind, and those
of `zoo`, which the thesis cites.

The thesis's and ours are lists of convolutions; every convolution is followed by batch normalisation and ReLU, the last
has one filter a class, and a global average pooling and a softmax end the network (the all-convolutional design of
Springenberg et al. 2015, arXiv 1412.6806). Layers are numbered as the convolutions stand: `conv3`, `bn3`, `relu3`;
a convolution that is factorized in space is the pair `conv1a` (3×1), `conv1b` (1×3), a separable one is `sep1`.

The thesis prints no kernel shapes; they follow from its parameter counts. It does not say which of 3×1 and 1×3
comes first: we take 3×1 (the counts and costs of the two orders are equal). Biases are kept before the batch
normalisation, as its counts demand, though the normalisation cancels them.
"""

import keras
from keras import layers

from fcnn_utils import blocks
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils.course.networks import cited

# (kind, filters, kernel size, stride); filters None: one a class.
THESIS_PLANS = {  # the thesis's
    "simple": [
        ("conv", 96, 3, 1),
        ("conv", 96, 3, 1),
        ("conv", 96, 3, 2),
        ("conv", 192, 3, 1),
        ("conv", 192, 3, 1),
        ("conv", 192, 3, 2),
        ("conv", 192, 3, 1),
        ("conv", 192, 1, 1),
        ("conv", None, 1, 1),
    ],
    "wider_factorized": [
        ("factorized", 192, 3, 1),
        ("conv", 96, 3, 2),
        ("factorized", 384, 3, 1),
        ("conv", 128, 3, 2),
        ("conv", 256, 3, 1),
        ("conv", None, 1, 1),
    ],
    "wider_separable": [
        ("separable", 192, 3, 1),
        ("conv", 96, 3, 2),
        ("separable", 384, 3, 1),
        ("conv", 128, 3, 2),
        ("conv", 256, 3, 1),
        ("conv", None, 1, 1),
    ],
}


def _ours(middle, end):
    """The plan that ours share: it goes down in size sooner, by "pool", the maximum of 2×2, and is deep where images
    are small. "tucker" is a Tucker-2 chain with ranks of half its filters; "+" a shortcut around the layer. The dense
    one is the control: as many MACs, within 12%, as the two that are factorized."""
    start = [("conv", 48, 3, 1), ("conv", 96, 3, 1), ("pool", None, 2, 2), ("conv", 192, 3, 1)]
    return start + middle + [("pool", None, 2, 2)] + end + [("conv", None, 1, 1)]


OUR_PLANS = {
    "deeper_dense": _ours([], [("conv+", 192, 3, 1)] * 3),
    "deeper_tucker": _ours([("tucker+", 192, 3, 1)], [("tucker+", 192, 3, 1)] * 6),
    "deeper_separable": _ours(
        [("separable+", 192, 3, 1)] * 2, [("separable", 384, 3, 1)] + [("separable+", 384, 3, 1)] * 6
    ),
}

OTHERS = {  # the simple network, its 3×3 layers but the first as CP chains, each of a rank of as many as its filters
    "simple_cp": [
        ("cp" if number and size == 3 else kind, filters, size, stride)
        for number, (kind, filters, size, stride) in enumerate(THESIS_PLANS["simple"])
    ]
}

NAMES = (*THESIS_PLANS, *OUR_PLANS, *OTHERS, *cited.EXAMPLES)

# Widths at which the networks cost, within 12%, what the simple network with 0.6 of its filters costs: as many
# parameters, as many MACs, or as much time (a training step on 2 cores of an AMD EPYC in bfloat16).
EQUAL_WIDTHS = {
    "parameters": {"simple": 0.6, "wider_factorized": 0.54, "wider_separable": 0.735},
    "MACs": {"simple": 0.6, "wider_factorized": 0.54, "wider_separable": 1.0, "deeper_tucker": 0.79},
    "time": {"simple": 0.6, "wider_factorized": 0.54, "wider_separable": 0.735, "deeper_tucker": 0.79},
}

TITLES = {
    "simple": "simple",
    "wider_factorized": "wider, factorized",
    "wider_separable": "wider, separable",
    "deeper_dense": "deeper, dense",
    "deeper_tucker": "deeper, Tucker-2",
    "deeper_separable": "deeper, separable",
}


def build(
    name, input_shape=(32, 32, 3), classes=100, *, width=1.0, dtype="float32", initialization="glorot", head_scale=1.0
):
    """A network by its name, not compiled, with fresh weights.

    Args:
        name: "simple", "wider_factorized", "wider_separable", "deeper_dense", "deeper_tucker", "deeper_separable",
            "simple_cp"; or, of `zoo`, "inception", "xception", "wang", "resnet18", or "wrn-DEPTH-WIDTH" ("wrn-16-4").
        input_shape: (height, width, channels) of one image, each at least 1.
        classes: number of classes, at least 2.
        width: factor of the numbers of filters (rounded, at least 1), but for the last layer's, one a class.
        dtype: Keras dtype policy of the layers, e.g. "float32" or "mixed_bfloat16"; pooling and softmax stay float32.
        initialization: of the kernels: "glorot", Keras's default; or "he", which keeps the variance through each
            convolution with its ReLU (He et al. 2015, arXiv 1502.01852), a factorized or separable one taken as one.
        head_scale: what the last batch normalisation's scale starts at: the spread of the scores before the softmax.
            (Those of `zoo` end in a dense layer, which has none.)

    Returns:
        keras.Model from (N, height, width, channels) to class probabilities (N, classes).

    Raises:
        ValueError: an argument is not as above.
    """
    run_name(name, width)  # refuses what is none
    if not (
        isinstance(input_shape, (tuple, list)) and len(input_shape) == 3 and all(_is_count(n) for n in input_shape)
    ):
        raise ValueError(
            f"input_shape must be (height, width, channels), three whole numbers of at least 1; got {input_shape!r}"
        )
    if not _is_count(classes) or classes < 2:
        raise ValueError(f"classes must be a whole number of at least 2; got {classes!r}")

    check_choice("initialization", initialization, ("glorot", "he"))
    check_number("head_scale", head_scale, float, 1e-3, 1e3)
    x = inputs = keras.Input(tuple(input_shape), name="image")
    if cited.known(name):
        x = cited.features(name, x, cited.Maker(dtype, _starts(initialization, 2.0), width))
        x = layers.GlobalAveragePooling2D(name="pool", dtype="float32")(x)
        x = layers.Dense(classes, name="scores", dtype="float32")(x)
        return keras.Model(inputs, layers.Activation("softmax", name="softmax", dtype="float32")(x), name=name)
    plan = (THESIS_PLANS | OUR_PLANS | OTHERS)[name]
    number, last = 0, sum(kind != "pool" for kind, *_ in plan)
    for kind, filters, size, strides in plan:
        if kind == "pool":
            x = layers.MaxPooling2D(size, strides, name=f"pool{number}", dtype=dtype)(x)
            continue
        number += 1
        filters = max(1, round(width * filters)) if filters else classes
        kind, shortcut = kind.removesuffix("+"), kind.endswith("+")
        scale = keras.initializers.Constant(head_scale if number == last else 1.0)
        y = _convolution(x, number, kind, filters, size, strides, dtype, initialization)
        y = layers.BatchNormalization(name=f"bn{number}", gamma_initializer=scale, dtype=dtype)(y)
        y = layers.Activation("relu", name=f"relu{number}", dtype=dtype)(y)
        x = layers.Add(name=f"add{number}", dtype=dtype)([x, y]) if shortcut else y
    x = layers.GlobalAveragePooling2D(name="pool", dtype="float32")(x)  # (N, h, w, classes) -> (N, classes)
    x = layers.Activation("softmax", name="softmax", dtype="float32")(x)
    return keras.Model(inputs, x, name=name)


def run_name(name, width=1.0):
    """What a record calls the network `build(name, width=width)`: its name, with a width that is not 1 behind it.

        "simple", "simple-width0.6"

    Raises:
        ValueError: no such network, or no such width.
    """
    if not cited.known(name):
        check_choice("model", name, NAMES)
    check_number("width", width, float, 1e-3, 1e3)
    return name if width == 1 else f"{name}-width{width:.10g}"


def _convolution(x, number, kind, filters, size, strides, dtype, initialization):
    def kernel(gain):
        return _starts(initialization, gain)

    options = {"padding": "same", "dtype": dtype}
    if kind == "factorized":
        x = layers.Conv2D(filters, (size, 1), kernel_initializer=kernel(1.0), name=f"conv{number}a", **options)(x)
        return layers.Conv2D(filters, (1, size), kernel_initializer=kernel(2.0), name=f"conv{number}b", **options)(x)
    if kind == "separable":  # Keras counts all channels as a depthwise kernel's inputs; it has one
        starts = {"depthwise_initializer": kernel(float(x.shape[-1])), "pointwise_initializer": kernel(2.0)}
        return layers.SeparableConv2D(filters, size, strides=strides, name=f"sep{number}", **starts, **options)(x)
    if kind == "cp":
        starts = kernel(2 ** (1 / 3))
        return blocks.cp(
            x,
            filters,
            size,
            filters,
            strides=strides,
            kernel_initializer=starts,
            name=f"conv{number}",
            dtype=dtype,
        )
    if kind == "tucker":  # three kernels, and one ReLU after them
        ranks, starts = (max(1, filters // 2),) * 2, kernel(2 ** (1 / 3))
        return blocks.tucker2(x, filters, size, ranks, kernel_initializer=starts, name=f"conv{number}", dtype=dtype)
    return layers.Conv2D(
        filters, size, strides=strides, kernel_initializer=kernel(2.0), name=f"conv{number}", **options
    )(x)


def _starts(initialization, gain):
    """Initializer of a kernel whose outputs have `gain` times its inputs' mean square; or Glorot's, for any."""
    if initialization == "glorot":
        return "glorot_uniform"
    return keras.initializers.VarianceScaling(gain, "fan_in", "truncated_normal")


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
