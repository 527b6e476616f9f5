"""Thirteen small networks in the styles that people use, for `test_examples.py`: widths and images are small.

They follow the vision examples of keras.io, with layers and functions of `keras.ops` as those use them. The last
function gives them random weights.
"""

import keras
import numpy as np
from keras import layers, ops


class Positions(layers.Layer):
    """Add a learned vector to each token."""

    def __init__(self, count, **options):
        super().__init__(**options)
        self.count = count

    def build(self, shape):
        self.embedding = layers.Embedding(self.count, shape[-1])
        self.embedding.build(shape[:-1])

    def call(self, x):
        return x + self.embedding(ops.arange(self.count))

    def get_config(self):
        return super().get_config() | {"count": self.count}


class StochasticDepth(layers.Layer):
    """Drop a whole branch in training."""

    def call(self, x, training=None):
        if not training:
            return x
        return x * ops.cast(keras.random.uniform((ops.shape(x)[0], 1, 1)) < 0.9, x.dtype) / 0.9


class TimeEmbedding(layers.Layer):
    """Sines and cosines of a diffusion step."""

    def __init__(self, size, **options):
        super().__init__(**options)
        self.size = size

    def call(self, steps):
        angles = ops.exp(ops.arange(self.size // 2, dtype="float32") * (-9.2 / (self.size // 2 - 1)))
        angles = ops.cast(steps, "float32")[:, None] * angles[None, :]
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)

    def get_config(self):
        return super().get_config() | {"size": self.size}


class PixelAttention(layers.Layer):
    """Attention between all pixels of a feature map, with layers inside."""

    def build(self, shape):
        self.norm = layers.GroupNormalization(4)
        self.denses = [layers.Dense(shape[-1], name=name) for name in ("query", "key", "value", "project")]
        for layer in (self.norm, *self.denses):
            layer.build(shape)

    def call(self, inputs):
        x = self.norm(inputs)
        query, key, value = (dense(x) for dense in self.denses[:3])
        _, height, width, size = inputs.shape
        scores = ops.einsum("bhwc,bHWc->bhwHW", query, key) * size**-0.5
        scores = ops.softmax(ops.reshape(scores, (-1, height, width, height * width)), axis=-1)
        scores = ops.reshape(scores, (-1, height, width, height, width))
        return inputs + self.denses[3](ops.einsum("bhwHW,bHWc->bhwc", scores, value))


def unet():
    """Segmentation: two sizes, transposed convolutions up, concatenated skips."""

    def double(x, filters):
        for _ in range(2):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        return x

    inputs = keras.Input((16, 16, 3))
    first = double(inputs, 8)
    second = double(layers.Dropout(0.3)(layers.MaxPooling2D(2)(first)), 12)
    x = double(layers.MaxPooling2D(2)(second), 16)
    for filters, skip in ((12, second), (8, first)):
        x = layers.Conv2DTranspose(filters, 3, 2, padding="same")(x)
        x = double(layers.Dropout(0.3)(layers.concatenate([x, skip])), filters)
    return keras.Model(inputs, layers.Conv2D(4, 1, padding="same", activation="softmax")(x), name="unet")


def deeplab():
    """DeepLabV3+: dilated branches and one that pools the whole image, bilinear upsampling."""

    def block(x, filters, size=3, dilation=1, strides=1):
        x = layers.Conv2D(filters, size, strides, padding="same", dilation_rate=dilation, use_bias=False)(x)
        return ops.nn.relu(layers.BatchNormalization()(x))

    inputs = keras.Input((24, 24, 3))
    low = block(inputs, 8, strides=2)
    deep = block(block(low, 12, strides=2), 12)
    pooled = block(layers.AveragePooling2D((6, 6))(deep), 8, 1)
    branches = [layers.UpSampling2D((6, 6), interpolation="bilinear")(pooled), block(deep, 8, 1)]
    x = layers.Concatenate()(branches + [block(deep, 8, dilation=d) for d in (2, 3)])
    x = layers.UpSampling2D(2, interpolation="bilinear")(block(x, 8, 1))
    x = block(layers.Concatenate()([x, block(low, 6, 1)]), 8)
    x = layers.UpSampling2D(2, interpolation="bilinear")(x)
    return keras.Model(inputs, layers.Conv2D(4, 1, padding="same")(x), name="deeplab")


def edsr():
    """Super-resolution: a linear head, scaled residual blocks, a long skip, pixels from channels."""
    inputs = keras.Input((10, 10, 3), dtype="uint8")
    x = head = layers.Conv2D(8, 3, padding="same")(layers.Rescaling(1 / 255)(inputs))
    for _ in range(2):
        y = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
        x = layers.Add()([x, layers.Rescaling(0.1)(layers.Conv2D(8, 3, padding="same")(y))])
    x = layers.Add()([head, layers.Conv2D(8, 3, padding="same")(x)])
    x = ops.nn.depth_to_space(layers.Conv2D(8 * 4, 3, padding="same")(x), 2)
    x = layers.Rescaling(255)(layers.Conv2D(3, 3, padding="same")(x))
    return keras.Model(inputs, x, name="edsr")


def srgan():
    """The generator of SRGAN: PReLU with one slope for each channel, batch normalisation, upsampling."""
    inputs = keras.Input((10, 10, 3))
    x = head = layers.PReLU(shared_axes=[1, 2])(layers.Conv2D(8, 9, padding="same")(inputs))
    for _ in range(2):
        y = layers.BatchNormalization(momentum=0.8)(layers.Conv2D(8, 3, padding="same")(x))
        y = layers.Conv2D(8, 3, padding="same")(layers.PReLU(shared_axes=[1, 2])(y))
        x = layers.add([layers.BatchNormalization(momentum=0.8)(y), x])
    x = layers.add([layers.BatchNormalization(momentum=0.8)(layers.Conv2D(8, 3, padding="same")(x)), head])
    x = layers.UpSampling2D(2)(layers.Conv2D(12, 3, padding="same")(x))
    x = layers.PReLU(shared_axes=[1, 2])(x)
    return keras.Model(inputs, layers.Conv2D(3, 9, padding="same", activation="tanh")(x), name="srgan")


def captcha():
    """Text recognition: the columns of a feature map are the steps of a recurrent network."""
    inputs = keras.Input((24, 12, 1))
    x = layers.Conv2D(6, 3, activation="relu", kernel_initializer="he_normal", padding="same")(inputs)
    x = layers.Conv2D(8, 3, activation="relu", padding="same")(layers.MaxPooling2D(2)(x))
    x = layers.Reshape((6, 3 * 8))(layers.MaxPooling2D(2)(x))
    x = layers.Dropout(0.2)(layers.Dense(8, activation="relu")(x))
    x = layers.Bidirectional(layers.LSTM(6, return_sequences=True, dropout=0.25))(x)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True, dropout=0.25))(x)
    return keras.Model(inputs, layers.Dense(11, activation="softmax")(x), name="captcha")


def transformer():
    """A compact convolutional transformer: patches by convolutions, learned positions, pooling by weights."""
    inputs = keras.Input((16, 16, 3), dtype="uint8")
    x = layers.Rescaling(1 / 255)(inputs)
    for filters in (8, 12):
        x = layers.Conv2D(filters, 3, padding="valid", use_bias=False, activation="relu")(layers.ZeroPadding2D(1)(x))
        x = layers.MaxPooling2D(3, 2, "same")(x)
    x = Positions(16)(layers.Reshape((16, 12))(x))
    for _ in range(2):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = layers.Add()([StochasticDepth()(layers.MultiHeadAttention(2, 6, dropout=0.1)(y, y)), x])
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        for units in (16, 12):
            y = layers.Dropout(0.1)(layers.Dense(units, activation=keras.activations.gelu)(y))
        x = layers.Add()([StochasticDepth()(y), x])
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    weights = ops.transpose(ops.softmax(layers.Dense(1)(x), axis=1), (0, 2, 1))
    return keras.Model(inputs, layers.Dense(5)(ops.squeeze(ops.matmul(weights, x), -2)), name="transformer")


def convmixer():
    """Patches, then depthwise and 1×1 convolutions with residuals; each is followed by gelu and normalised."""

    def activate(x):
        return layers.BatchNormalization()(layers.Activation("gelu")(x))

    inputs = keras.Input((16, 16, 3), dtype="uint8")
    x = activate(layers.Conv2D(12, 2, 2, name="stem")(layers.Rescaling(1 / 255)(inputs)))
    for _ in range(3):
        x = layers.Add()([activate(layers.DepthwiseConv2D(5, padding="same")(x)), x])
        x = activate(layers.Conv2D(12, 1)(x))
    x = layers.Dense(5, activation="softmax")(layers.GlobalAvgPool2D()(x))
    return keras.Model(inputs, x, name="convmixer")


def mobilenet():
    """Inverted residuals as in MobileNetV2; the first expands by a 3×3 convolution."""
    inputs = keras.Input((16, 16, 3))
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(inputs)
    x = layers.Conv2D(8, 3, 2, padding="valid", use_bias=False)(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization(epsilon=1e-3, momentum=0.999)(x))
    for size, strides in ((3, 1), (1, 1), (1, 2)):
        y = layers.Conv2D(24, size, padding="same", use_bias=False)(x)
        y = layers.ReLU(6.0)(layers.BatchNormalization(epsilon=1e-3)(y))
        y = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)(y)
        y = layers.ReLU(6.0)(layers.BatchNormalization(epsilon=1e-3)(y))
        y = layers.BatchNormalization(epsilon=1e-3)(layers.Conv2D(8, 1, padding="same", use_bias=False)(y))
        x = layers.Add()([x, y]) if strides == 1 else y
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name="mobilenet")


def video(encoder=None):
    """A video classifier: an encoder for each frame, then a recurrent layer."""
    inputs = keras.Input((3, 16, 16, 3))
    x = layers.TimeDistributed(encoder or mobilenet(), name="frames")(inputs)
    x = layers.Dropout(0.4)(layers.GRU(6)(x))
    return keras.Model(inputs, layers.Dense(5, activation="softmax")(x), name="video")


def siamese():
    """Two images are embedded by the same network; their distance decides."""
    x = inputs = keras.Input((20, 20, 1))
    x = layers.BatchNormalization()(x)
    for filters in (4, 8):
        x = layers.AveragePooling2D(2)(layers.Conv2D(filters, 5, activation="tanh")(x))
    x = layers.Dense(6, activation="tanh")(layers.BatchNormalization()(layers.Flatten()(x)))
    tower = keras.Model(inputs, x, name="tower")
    left, right = keras.Input((20, 20, 1), name="left"), keras.Input((20, 20, 1), name="right")
    squares = ops.sum(ops.square(tower(left) - tower(right)), axis=1, keepdims=True)
    x = layers.BatchNormalization()(ops.sqrt(ops.maximum(squares, keras.config.epsilon())))
    return keras.Model([left, right], layers.Dense(1, activation="sigmoid")(x), name="siamese")


def multimodal():
    """An image and a table of numbers, in a dict; a class and a number come out, in a dict."""
    image = keras.Input((16, 16, 3), name="image", dtype="uint8")
    table = keras.Input((5,), name="table")
    x = layers.RandomFlip()(layers.Rescaling(1 / 127.5, offset=-1)(image))
    for filters in (8, 12):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.MaxPooling2D(2)(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.GlobalAveragePooling2D()(layers.SpatialDropout2D(0.1)(x))
    y = layers.Dense(8)(layers.Normalization(mean=[0.5] * 5, variance=[2.0] * 5)(table))
    y = layers.Activation("relu")(layers.BatchNormalization()(y))
    x = layers.Concatenate()([x, y])
    outputs = {"kind": layers.Dense(4, activation="softmax")(x), "price": layers.Dense(1)(x)}
    return keras.Model({"image": image, "table": table}, outputs, name="multimodal")


def pix2pix():
    """A generator from images to images: 4×4 convolutions with stride 2 down, transposed ones up."""
    x = inputs = keras.Input((16, 16, 3))
    skips = []
    for filters in (8, 12, 16):
        x = layers.Conv2D(filters, 4, 2, padding="same", use_bias=False)(x)
        x = layers.LeakyReLU()(layers.BatchNormalization()(x) if skips else x)
        skips.append(x)
    for filters, skip in zip((12, 8), skips[-2::-1], strict=True):
        x = layers.Conv2DTranspose(filters, 4, 2, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.Dropout(0.5)(layers.BatchNormalization()(x)))
        x = layers.Concatenate()([x, skip])
    x = layers.Conv2DTranspose(3, 4, 2, padding="same", activation="tanh")(x)
    return keras.Model(inputs, x, name="pix2pix")


def ddpm():
    """The noise predictor of a diffusion model: group norms, swish, attention, the step as a second input."""

    def residual(x, filters, step):
        skip = x if x.shape[-1] == filters else layers.Conv2D(filters, 1)(x)
        step = layers.Dense(filters)(keras.activations.swish(step))[:, None, None, :]
        x = keras.activations.swish(layers.GroupNormalization(4)(x))
        x = layers.Add()([layers.Conv2D(filters, 3, padding="same")(x), step])
        x = keras.activations.swish(layers.GroupNormalization(4)(x))
        return layers.Add()([layers.Conv2D(filters, 3, padding="same")(x), skip])

    inputs, time = keras.Input((8, 8, 3), name="image"), keras.Input((), dtype="int64", name="time")
    step = layers.Dense(16)(layers.Dense(16, activation="swish")(TimeEmbedding(8)(time)))
    first = residual(layers.Conv2D(8, 3, padding="same")(inputs), 8, step)
    x = layers.Conv2D(12, 3, strides=2, padding="same")(first)
    x = PixelAttention()(residual(x, 12, step))
    x = layers.Conv2D(8, 3, padding="same")(layers.UpSampling2D(2, interpolation="nearest")(x))
    x = residual(layers.Concatenate()([x, first]), 8, step)
    x = keras.activations.swish(layers.GroupNormalization(4)(x))
    return keras.Model([inputs, time], layers.Conv2D(3, 3, padding="same")(x), name="ddpm")


def retinanet():
    """Detection: a feature pyramid, and two heads that all its levels share."""

    def head(filters, name):
        stack = [layers.Conv2D(8, 3, padding="same", activation="relu") for _ in range(2)]
        stack += [layers.Conv2D(filters, 3, padding="same")]
        return keras.Sequential([keras.Input((None, None, 8)), *stack], name=name)

    x = inputs = keras.Input((24, 24, 3))
    levels = []
    for filters in (8, 12, 16):
        x = layers.Conv2D(filters, 3, 2, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        levels.append(x)
    small, middle, large = (layers.Conv2D(8, 1)(x) for x in levels)
    middle = middle + layers.UpSampling2D(2)(large)
    small = small + layers.UpSampling2D(2)(middle)
    pyramid = [layers.Conv2D(8, 3, padding="same")(x) for x in (small, middle, large)]
    pyramid.append(layers.Conv2D(8, 3, 2, padding="same")(ops.relu(pyramid[-1])))
    kinds, boxes = head(2 * 3, "kinds"), head(2 * 4, "boxes")
    kinds = layers.Concatenate(axis=1)([layers.Reshape((-1, 3))(kinds(x)) for x in pyramid])
    boxes = layers.Concatenate(axis=1)([layers.Reshape((-1, 4))(boxes(x)) for x in pyramid])
    return keras.Model(inputs, layers.Concatenate()([boxes, kinds]), name="retinanet")


# --- weights -------------------------------------------------------------------------------------------------------


def with_random_weights(model, seed=0):
    """Give a model weights of the sizes that a trained network has: variances and scales around 1, small biases."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        shape = tuple(weight.shape)
        if weight.dtype in ("uint32", "int64", "int32"):  # the state of a random generator
            continue
        if weight.name in ("moving_variance", "gamma", "variance"):
            weight.assign(rng.uniform(0.5, 1.5, shape))
        elif len(shape) > 1:
            reads = shape[:2] if shape[-1] == 1 else shape[:-1]  # a depthwise kernel reads one channel
            weight.assign(rng.normal(0, (1.5 / np.prod(reads)) ** 0.5, shape))
        else:
            weight.assign(rng.normal(0, 0.2, shape))
    return model
