"""The tables of the thesis that this course implements, as data.

S. Kirtaniya, "Implementation of factorized convolutional neural networks and analysis of the computation with
different models", B.Tech thesis, Indian Institute of Technology Kharagpur.

The networks are "simple", "wider_factorized" and "wider_separable"; any other name raises KeyError.

The thesis's layer tables contain only layer classes, output shapes and numbers of parameters; we infer
kernel shapes and strides from them. Its test accuracies are shares of 9,984 images (simple) and of 9,968
(the other two), not of 10,000.
"""

import pandas as pd

_LAYERS = {
    "simple": """
        conv 32x32x96 2688, bn 384, relu 0
        conv 32x32x96 83040, bn 384, relu 0
        conv 16x16x96 83040, bn 384, relu 0
        conv 16x16x192 166080, bn 768, relu 0
        conv 16x16x192 331968, bn 768, relu 0
        conv 8x8x192 331968, bn 768, relu 0
        conv 8x8x192 331968, bn 768, relu 0
        conv 8x8x192 37056, bn 768, relu 0
        conv 8x8x100 19300, bn 400, relu 0
        pool 100 0, softmax 0""",
    "wider_factorized": """
        conv 32x32x192 1920, conv 110784, bn 768, relu 0
        conv 16x16x96 165984, bn 384, relu 0
        conv 16x16x384 110976, conv 442752, bn 1536, relu 0
        conv 8x8x128 442496, bn 512, relu 0
        conv 8x8x256 295168, bn 1024, relu 0
        conv 8x8x100 25700, bn 400, relu 0
        pool 100 0, softmax 0""",
    "wider_separable": """
        sep 32x32x192 795, bn 768, relu 0
        conv 16x16x96 165984, bn 384, relu 0
        sep 16x16x384 38112, bn 1536, relu 0
        conv 8x8x128 442496, bn 512, relu 0
        conv 8x8x256 295168, bn 1024, relu 0
        conv 8x8x100 25700, bn 400, relu 0
        pool 100 0, softmax 0""",
}

# Numbers of parameters: total, trainable, non-trainable.
PARAMS = {
    "simple": (1_392_500, 1_389_804, 2_696),
    "wider_factorized": (1_600_404, 1_598_092, 2_312),
    "wider_separable": (972_879, 970_567, 2_312),
}

# After each of 5 epochs of 1,562 steps, on the training images: seconds, ms per step, loss, top-1, top-5.
_EPOCHS = {
    "simple": [
        (36, 23, 3.9801, 0.1236, 0.3421),
        (32, 20, 3.5620, 0.2003, 0.4800),
        (33, 21, 3.3145, 0.2480, 0.5488),
        (32, 21, 3.1350, 0.2808, 0.5931),
        (32, 20, 2.9940, 0.3082, 0.6263),
    ],
    "wider_factorized": [
        (52, 33, 3.9616, 0.1298, 0.3542),
        (49, 31, 3.5735, 0.2049, 0.4832),
        (49, 31, 3.3399, 0.2505, 0.5497),
        (49, 31, 3.1804, 0.2816, 0.5894),
        (49, 31, 3.0554, 0.3078, 0.6207),
    ],
    "wider_separable": [
        (30, 19, 4.0293, 0.1147, 0.3230),
        (28, 18, 3.7112, 0.1781, 0.4411),
        (28, 18, 3.5124, 0.2183, 0.5028),
        (29, 18, 3.3756, 0.2446, 0.5386),
        (28, 18, 3.2749, 0.2637, 0.5626),
    ],
}

# Test results printed after the training logs: top-1, top-5, loss.
_TEST = {
    "simple": (0.31860977564102566, 0.6302083333333334, 2.879887064297994),
    "wider_factorized": (0.29253611556982345, 0.5900882825040128, 3.0202260208742193),
    "wider_separable": (0.27879213483146065, 0.5764446227929374, 3.1429175584312428),
}

# The summary table: seconds per epoch, ms per step, top-1, top-5, loss.
_SUMMARY = {
    "simple": (33, 21, 0.318, 0.630, 2.879),
    "wider_factorized": (49, 31, 0.292, 0.590, 3.020),
    "wider_separable": (28, 18, 0.278, 0.576, 3.142),
}

# The kinds of layers in the thesis's tables, and the Keras classes of the same layers in our networks.
_KERAS_CLASSES = {
    "conv": "Conv2D",
    "sep": "SeparableConv2D",
    "bn": "BatchNormalization",
    "relu": "Activation",
    "pool": "GlobalAveragePooling2D",
    "softmax": "Activation",
}


def layers(name):
    """Return a network's layer table: DataFrame with kind, output_shape (without batch axis) and params."""
    rows, shape = [], None
    for line in _LAYERS[name].strip().splitlines():
        for entry in line.split(","):  # an entry without a shape has that of the entry before
            kind, *shapes, params = entry.split()
            shape = tuple(map(int, shapes[0].split("x"))) if shapes else shape
            rows.append((kind, shape, int(params)))
    return pd.DataFrame(rows, columns=["kind", "output_shape", "params"])


def compare(name, costs):
    """Compare our layer table with the thesis's, row by row.

    Args:
        name: name of the network.
        costs: table of `cost.layer_costs` for our model.

    Returns:
        DataFrame with layer, kind, output_shape and params of ours; kind_thesis, output_shape_thesis and
        params_thesis; and the bool `equal`, which is False for a row that exists on one side only.
    """
    ours = costs[~costs["kind"].isin(["", "InputLayer"])].reset_index(drop=True)
    both = ours[["layer", "kind", "output_shape", "params"]].join(layers(name), rsuffix="_thesis", how="outer")
    both["equal"] = (
        (both["kind"] == both["kind_thesis"].map(_KERAS_CLASSES))
        & (both["output_shape"] == both["output_shape_thesis"])
        & (both["params"] == both["params_thesis"])
    )
    return both


def epochs(name):
    """Return the training log: DataFrame with epoch, seconds, ms_per_step, loss, top1 and top5 (shares)."""
    table = pd.DataFrame(_EPOCHS[name], columns=["seconds", "ms_per_step", "loss", "top1", "top5"])
    table.insert(0, "epoch", range(1, len(table) + 1))
    return table


def test(name):
    """Return the test results to full precision: dict of top1, top5 (shares) and loss."""
    return dict(zip(("top1", "top5", "loss"), _TEST[name], strict=True))


def summary():
    """Return the summary table: DataFrame indexed by network, with seconds_per_epoch, ms_per_step, top1, top5, loss."""
    columns = ["seconds_per_epoch", "ms_per_step", "top1", "top5", "loss"]
    return pd.DataFrame.from_dict(_SUMMARY, orient="index", columns=columns)
