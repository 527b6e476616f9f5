"""Run a network on calibration images: part by part, as rows of outputs, and the change of these outputs."""

import functools
import math

import keras
import numpy as np

from fcnn_utils import _graph_cut, cost, keras_graph, layer_kinds
from fcnn_utils._calibration_inputs import batches

BATCH = 128  # images at a time
_ACTIVATION_BYTES = 2**30  # limit for the activations of a batch: Keras keeps all of them until the last layer has run
_KEPT_BYTES = 2**30  # limit for the stored inputs of a layer, so that the layers before it need not run again
_COMPILED_MACS = 3e10  # compile above this number for all runs together: then it saves more time than it costs


class Runner:
    """Run a network in inference mode on images, batch by batch.

    With TensorFlow, expensive networks are compiled. With JAX and PyTorch, compilation takes longer than a few runs.

    Args:
        model: functional or Sequential.
        images: list of arrays, one for each input.
        times: expected number of passes over all images.

    Attributes:
        size: images of a batch, a power of two from 8 to 128; it keeps the activations below 1 GiB where possible.
    """

    def __init__(self, model, images, times=1):
        self._model, self._images, self._call = model, images, functools.partial(model, training=False)
        macs, values = _work(model, images)
        fitting = math.floor(math.log2(_ACTIVATION_BYTES / (4 * max(values, 1))))
        self.size = 2 ** min(max(fitting, 3), 7)  # 8 to 128
        if keras.backend.backend() == "tensorflow" and macs * len(images[0]) * times > _COMPILED_MACS:
            import tensorflow as tf

            self._call = tf.function(self._call, reduce_retracing=True)

    def __call__(self, most=math.inf):
        """Yield the flat list of outputs of each batch of at most `most` images."""
        for batch in batches(self._model, self._images, min(self.size, most)):
            yield keras.tree.flatten(self._call(batch))


class Rest:
    """The part of a model that is still to be run on images that have gone through the part before.

    It is used for layers in the order of the model.

    Attributes:
        model: the part; it shares its layers with the whole model.
        images: list of arrays, what it reads.
        size: images of a batch, as in `Runner`.
    """

    def __init__(self, model, images):
        self.model, self.images, self._owns_images = model, images, False
        self.size, self._runners = Runner(model, images).size, {}

    def start_before(self, layer):
        """Run what comes before the layer and leave it out from now on, unless the result would be too large."""
        head, tail = _graph_cut.split_before(self.model, layer)
        shape = () if head is None else head.output_shape[1:]
        if head is None or None in shape or 4 * len(self.images[0]) * math.prod(shape) > _KEPT_BYTES:
            return
        results, start = None, 0
        for (part,) in Runner(head, self.images)():
            part = keras.ops.convert_to_numpy(part)
            if results is None:
                results = self._room_for(part)
            results[start : start + len(part)] = part
            start += len(part)
        self.model, self.images, self._runners, self._owns_images = tail, [results], {}, True

    def _room_for(self, part):
        """Return an array for the results of all images: that of the part before if shape and type match.

        The images of the user are never overwritten.
        """
        old = self.images[0]
        if self._owns_images and old.shape[1:] == part.shape[1:] and old.dtype == part.dtype:
            return old  # safe: each batch is read before its rows are overwritten
        return np.empty((len(old), *part.shape[1:]), part.dtype)

    def read(self, node, *, count=None, most=math.inf):
        """Yield what a layer reads at each of its calls, in float32, batch by batch.

        Args:
            node: `keras_graph.LayerNode` of the layer.
            count: number of images, the first ones; default: all.
            most: largest number of images of a batch.
        """
        reader = keras_graph.input_model(self.model, node.path)
        for part in Runner(reader, [x[:count] for x in self.images])(most):
            yield [keras.ops.cast(x, "float32") for x in part]

    def outputs(self, count):
        """Return all outputs of the model for the first `count` images as rows (N, D); meant for many calls."""
        if count not in self._runners:
            self._runners[count] = Runner(self.model, [x[:count] for x in self.images], times=4)
        return _rows(self._runners[count]())


def outputs_of(model, images):
    """Return all outputs of the model as rows (N, D)."""
    return _rows(Runner(model, images)())


def _rows(parts):
    parts = [[keras.ops.convert_to_numpy(y) for y in part] for part in parts]
    rows = [np.concatenate([np.reshape(y, (len(y), -1)) for y in part], axis=1) for part in parts]
    return np.concatenate(rows).astype(np.float64)


def images_within(model, images, macs):
    """Return how many images of the shape of `images` the model can run on within a budget of MACs.

    If its MACs are not known, this is `macs`: in effect no limit.
    """
    return int(macs / max(_work(model, images)[0], 1))


def _work(model, images):
    """Return the MACs and the number of activations of a model for one of the images; 0 if they are not known."""
    inputs = None
    if any(None in x.shape[1:] for x in model.inputs):  # it takes images of any size
        inputs = [keras.KerasTensor((None, *x.shape[1:]), y.dtype) for x, y in zip(images, model.inputs, strict=True)]
    try:
        calls = cost.call_costs(model, inputs)
    except ValueError:
        return 0, 0
    shapes = [x.shape[1:] for call, _, _ in calls for x in call.outputs]
    return np.nansum([macs for _, macs, _ in calls]), sum(math.prod(shape) for shape in shapes if None not in shape)


def output_change(before, after):
    """Return the mean KL divergence in nats if the rows are probabilities, else the relative squared change."""
    if before.min() >= 0 and np.allclose(before.sum(axis=1), 1, atol=1e-2):
        return float(np.mean(np.sum(before * (np.log(before + 1e-9) - np.log(after + 1e-9)), axis=1)))
    return float(np.mean((after - before) ** 2) / max(np.var(before), 1e-30))


def following_norms(node, nodes):
    """Return the batch norms whose means can take a shift of a convolution without a bias.

    They must read the convolution directly, and nothing else may read it.
    """
    count, kind = len(node.calls[0][1]), layer_kinds.KernelLayer(node.layer)
    if node.layer.bias is not None or not keras_graph.has_linear_activation(node.layer):
        return []
    if kind.output_axes(count) != {count - 1}:
        return []
    norms = {id(other.layer): other.layer for other in nodes.values() if other.is_channel_norm}
    found = [norms.get(id(consumer)) for consumer in node.consumers]
    return [] if None in found else found
