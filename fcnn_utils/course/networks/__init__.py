"""The networks of the course, built by name from stock Keras layers.

The thesis's networks and ours are plans: lists of convolutions. Every convolution is followed by batch normalisation
and ReLU. The last convolution has one filter per class; global average pooling and a softmax end the network (the
all-convolutional design of Springenberg et al. 2015, arXiv 1412.6806). The networks of `cited`, from papers that the
thesis cites, are built by functions instead.

The number in a layer's name counts the convolutions: `conv3`, `bn3`, `relu3`. A spatially factorized convolution is
the pair `conv1a` (3×1) and `conv1b` (1×3); a separable convolution is `sep1`. Saved weights depend on these names.

The thesis does not print kernel shapes; we infer them from its parameter counts. It does not say which of 3×1 and 1×3
comes first: we take 3×1, since both orders have the same counts. Its counts include biases, so we keep them, although
the batch normalisation after each convolution cancels them.
"""

import keras
from keras import layers

from fcnn_utils import blocks
from fcnn_utils._checks import check_choice, check_number
from fcnn_utils.course.networks import cited
from fcnn_utils.course.titles import TITLES as TITLES


def _wider_plan(kind):
    return [
        (kind, 192, 3, 1),
        ("conv", 96, 3, 2),
        (kind, 384, 3, 1),
        ("conv", 128, 3, 2),
        ("conv", 256, 3, 1),
        ("conv", None, 1, 1),
    ]


# One row per convolution: (kind, filters, kernel size, stride). Filters None: one filter per class.
THESIS_PLANS = {
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
    "wider_factorized": _wider_plan("factorized"),
    "wider_separable": _wider_plan("separable"),
}


def _our_plan(middle, end):
    """Plan of a network of ours: `middle` at half the image size, `end` at a quarter, where most layers are.

    "pool" is 2×2 max pooling, "tucker" a Tucker-2 chain whose ranks are half its filters, and "+" adds a
    shortcut around the layer. The dense network is the control: its MACs differ from those of the two
    factorized ones by at most 12%.
    """
    start = [("conv", 48, 3, 1), ("conv", 96, 3, 1), ("pool", None, 2, 2), ("conv", 192, 3, 1)]
    return start + middle + [("pool", None, 2, 2)] + end + [("conv", None, 1, 1)]


OUR_PLANS = {
    "deeper_dense": _our_plan([], [("conv+", 192, 3, 1)] * 3),
    "deeper_tucker": _our_plan([("tucker+", 192, 3, 1)], [("tucker+", 192, 3, 1)] * 6),
    "deeper_separable": _our_plan(
        [("separable+", 192, 3, 1)] * 2, [("separable", 384, 3, 1)] + [("separable+", 384, 3, 1)] * 6
    ),
}

_PLANS = {
    **THESIS_PLANS,
    **OUR_PLANS,
    "wider_dense": _wider_plan("conv"),  # the control of the thesis's two wider networks, which factorize two layers
    # The simple network with CP chains for all 3×3 layers but the first; the rank is the number of filters.
    "simple_cp": [
        ("cp" if number and size == 3 else kind, filters, size, strides)
        for number, (kind, filters, size, strides) in enumerate(THESIS_PLANS["simple"])
    ],
}

NAMES = (*_PLANS, *cited.EXAMPLES)
# Kinds of layers in a plan; "pool" is 2×2 max pooling, and "+" adds a shortcut around the layer.
KINDS = (
    "conv",
    "factorized",
    "separable",
    "cp",
    "tucker",
    "conv+",
    "factorized+",
    "separable+",
    "cp+",
    "tucker+",
    "pool",
)

# Widths at which the networks cost the same as "simple" at width 0.6, within 12%.
# "time" is that of a training step on 2 cores of an AMD EPYC in bfloat16.
EQUAL_WIDTHS = {
    "parameters": {"simple": 0.6, "wider_factorized": 0.54, "wider_separable": 0.735},
    "MACs": {"simple": 0.6, "wider_factorized": 0.54, "wider_separable": 1.0, "deeper_tucker": 0.79},
    "time": {"simple": 0.6, "wider_factorized": 0.54, "wider_separable": 0.735, "deeper_tucker": 0.79},
}


def build(
    network,
    input_shape=(32, 32, 3),
    classes=100,
    *,
    width=1.0,
    dtype="float32",
    initialization="glorot",
    head_scale=1.0,
):
    """Build a network by name or from a list of layers, with fresh weights and not compiled.

        build("simple")
        build([("conv", 64, 3, 1), ("separable", 128, 3, 2), ("conv", 100, 1, 1)])

    Args:
        network: "simple", "wider_dense", "wider_factorized", "wider_separable", "deeper_dense", "deeper_tucker",
            "deeper_separable" or "simple_cp"; or a network of `cited`: "inception", "xception", "wang", "resnet18" or
            "wrn-DEPTH-WIDTH", for example "wrn-16-4"; or a list of (kind, filters, kernel size, stride), one for each
            layer, as `plan` returns it. The kinds are those of `KINDS`. The last row must be a convolution with as many
            filters as there are classes.
        input_shape: (height, width, channels) of one image.
        classes: number of classes, at least 2.
        width: factor on the number of filters of every layer but the last (rounded, at least 1).
        dtype: Keras dtype policy of the layers, "float32" or "mixed_bfloat16". The final pooling and the softmax
            always compute in float32.
        initialization: of the kernels: "glorot", the default of Keras, or "he", which keeps the variance through a
            convolution and its ReLU (He et al. 2015, arXiv 1502.01852). "he" treats a factorized or separable
            convolution as one.
        head_scale: initial scale of the last batch normalisation; it sets the spread of the logits. The networks of
            `cited` end in a dense layer and ignore it.

    Returns:
        keras.Model from images (N, height, width, channels) to class probabilities (N, classes).

    Raises:
        ValueError: if an argument is not one of the above.
    """
    _check_shape(input_shape)
    check_number("classes", classes, int, 2, 1_000_000)
    if isinstance(network, str):
        run_name(network, width)  # checks both
    else:
        check_number("width", width, float, 1e-3, 1e3)
        _check_plan(network, input_shape[-1], classes)
    check_choice("initialization", initialization, ("glorot", "he"))
    check_number("head_scale", head_scale, float, 1e-3, 1e3)
    x = inputs = keras.Input(tuple(input_shape), name="image")
    if cited.known(network):
        x = cited.features(network, x, cited.Maker(dtype, _initializer(initialization, 2.0), width))
        x = layers.GlobalAveragePooling2D(name="pool", dtype="float32")(x)
        x = layers.Dense(classes, name="scores", dtype="float32")(x)
    else:
        *rows, (kind, _, *last) = plan(network) if isinstance(network, str) else network
        rows = [(kind, max(1, round(width * (filters or 1))), *more) for kind, filters, *more in rows]
        x = _plan_features(x, [*rows, (kind, classes, *last)], dtype, initialization, head_scale)
        x = layers.GlobalAveragePooling2D(name="pool", dtype="float32")(x)  # (N, h, w, classes) -> (N, classes)
    outputs = layers.Activation("softmax", name="softmax", dtype="float32")(x)
    return keras.Model(inputs, outputs, name=network if isinstance(network, str) else "network")


def plan(name, classes=100):
    """Return the layers of a network that is a plan: a list of (kind, filters, kernel size, stride).

    Raises:
        ValueError: if there is no such plan.
    """
    rows = _PLANS[check_choice("network", name, _PLANS)]
    return [(kind, filters or classes, size, strides) for kind, filters, size, strides in rows]


def run_name(name, width=1.0):
    """Return the name of the network `build(name, width=width)` in records.

        "simple", "simple-width0.6"

    Raises:
        ValueError: if there is no such network, or the width is out of range.
    """
    if not cited.known(name):
        if isinstance(name, str) and name.startswith("wrn-"):
            raise ValueError(
                "model must be wrn-DEPTH-WIDTH with a depth of 6n + 4 (10, 16, 22, to 994) and a width from 1 to 99, "
                f"for example wrn-16-4; got {name!r}"
            )
        check_choice("model", name, NAMES)
    check_number("width", width, float, 1e-3, 1e3)
    return name if width == 1 else f"{name}-width{width:.10g}"


def _check_plan(rows, channels, classes):
    """Raise ValueError unless `rows` is a list that `build` takes."""
    if not isinstance(rows, (list, tuple)) or not rows:
        raise ValueError(f"network must be a name or a list of layers; got {rows!r}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, (list, tuple)) or len(row) != 4:
            raise ValueError(f"layer {number} must be (kind, filters, kernel size, stride); got {row!r}")
        check_choice(f"kind of layer {number}", row[0], KINDS)
        for name, value in zip(("filters", "kernel size", "stride"), row[1:], strict=True):
            if (row[0], name) != ("pool", "filters"):
                check_number(f"{name} of layer {number}", value, int, 1, 10_000)
        if row[0].endswith("+") and (row[1], row[3]) != (channels, 1):
            raise ValueError(
                f"layer {number}, {row!r}, has a shortcut: it must have {channels} filters, as many as it reads "
                f"channels, and stride 1"
            )
        channels = channels if row[0] == "pool" else row[1]
    if rows[-1][0] == "pool" or rows[-1][1] != classes:
        raise ValueError(f"the last layer must be a convolution with {classes} filters, the classes; got {rows[-1]!r}")


def _check_shape(shape):
    axes = ("height", "width", "channels")
    if not isinstance(shape, (tuple, list)) or len(shape) != len(axes):
        raise ValueError(f"input_shape must be (height, width, channels); got {shape!r}")
    for axis, size in zip(axes, shape, strict=True):
        check_number(f"{axis} in input_shape", size, int, 1, 1_000_000)


def _plan_features(x, plan, dtype, initialization, head_scale):
    """Apply a plan, whose filters are already scaled by the width, to images (N, H, W, C)."""
    number, last = 0, sum(kind != "pool" for kind, *_ in plan)
    for kind, filters, size, strides in plan:
        if kind == "pool":
            x = layers.MaxPooling2D(size, strides, name=f"pool{number}", dtype=dtype)(x)
            continue
        number += 1
        scale = keras.initializers.Constant(head_scale if number == last else 1.0)
        y = _convolution(x, number, kind.removesuffix("+"), filters, size, strides, dtype, initialization)
        y = layers.BatchNormalization(name=f"bn{number}", gamma_initializer=scale, dtype=dtype)(y)
        y = layers.Activation("relu", name=f"relu{number}", dtype=dtype)(y)
        x = layers.Add(name=f"add{number}", dtype=dtype)([x, y]) if kind.endswith("+") else y
    return x


def _convolution(x, number, kind, filters, size, strides, dtype, initialization):
    """Apply one convolution of a plan, dense or factorized, without batch normalisation and activation."""

    def start(gain):
        return _initializer(initialization, gain)

    name, options = f"conv{number}", {"padding": "same", "dtype": dtype}
    if kind == "conv":
        options |= {"strides": strides, "kernel_initializer": start(2.0)}
        return layers.Conv2D(filters, size, name=name, **options)(x)
    if kind == "factorized":  # no ReLU in between, so the first layer has gain 1
        ends = {"a": ((size, 1), (strides, 1), start(1.0)), "b": ((1, size), (1, strides), start(2.0))}
        for end, (kernel_size, stride, kernel) in ends.items():
            own = {"strides": stride, "kernel_initializer": kernel, "name": f"{name}{end}"}
            x = layers.Conv2D(filters, kernel_size, **own, **options)(x)
        return x
    if kind == "separable":  # Keras's fan-in of a depthwise kernel counts all channels, not the one it reads
        options |= {"depthwise_initializer": start(float(x.shape[-1])), "pointwise_initializer": start(2.0)}
        return layers.SeparableConv2D(filters, size, strides=strides, name=f"sep{number}", **options)(x)
    method, ranks = ("cp", filters) if kind == "cp" else ("tucker", (max(1, filters // 2),) * 2)
    options |= {"strides": strides, "kernel_initializer": start(2 ** (1 / 3)), "name": name}  # three kernels, one ReLU
    return blocks.factorized_conv(x, method, filters, size, ranks, **options)


def _initializer(initialization, gain):
    """Return Glorot's initializer, or one whose kernel multiplies the mean square of its inputs by `gain`."""
    if initialization == "glorot":
        return "glorot_uniform"
    return keras.initializers.VarianceScaling(gain, "fan_in", "truncated_normal")
