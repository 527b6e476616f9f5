"""Run a network on calibration images: part by part, as rows of outputs, and the change of these outputs."""

import functools
import math

import keras
import numpy as np

from fcnn_utils import _graph_cut, cost, keras_graph, layer_kinds
from fcnn_utils._calibration_inputs import batches

BATCH = 128  # images at a time, at most
_ACTIVE_BYTES = 2**30  # limit for the values of a batch: Keras keeps those of all layers until the last one has run
_KEPT_BYTES = 2**30  # limit for the stored inputs of a layer, so that the layers before it need not run again
_COMPILED_MACS = 3e10  # from here on a network runs so long that compiling it takes less time than it saves


class Runner:
    """A network in inference mode, in batches that fit into memory.

    TensorFlow compiles it if it has much to do. The other backends compile too slowly for networks that run only a
    few times.

    Args:
        model: functional or Sequential.
        count: number of images that it is expected to run on in all.

    Attributes:
        size: images of a batch.
    """

    def __init__(self, model, count):
        self.size, self._model, self._call = BATCH, model, functools.partial(model, training=False)
        try:
            costs = cost.total_costs(model)
        except ValueError:  # the size of the images is not fixed
            return
        fitting = _ACTIVE_BYTES / max(costs["activation_bytes"], 1)
        self.size = int(2 ** np.clip(math.floor(math.log2(fitting)), 3, int(math.log2(BATCH))))
        if keras.backend.backend() == "tensorflow" and costs["macs"] * count > _COMPILED_MACS:
            import tensorflow as tf

            self._call = tf.function(self._call, reduce_retracing=True)

    def __call__(self, images, most=BATCH):
        """Yield the flat list of outputs of each batch of at most `most` images; `images` has an array per input."""
        for batch in batches(self._model, images, min(self.size, most)):
            yield keras.tree.flatten(self._call(batch))


class Rest:
    """The part of a model that is still to be run on images that have gone through the part before.

    It is used for layers in the order of the model.

    Attributes:
        model: the part; it shares its layers with the whole model.
        images: list of arrays, what it reads.
        size: images of a batch that fits into memory.
    """

    def __init__(self, model, images):
        self.model, self.images, self._is_own = model, images, False  # not to be overwritten
        self._runner = Runner(model, len(images[0]))
        self.size = self._runner.size

    def start_before(self, layer):
        """Run what comes before the layer and leave it out from now on, unless the result would be too large."""
        head, tail = _graph_cut.split_before(self.model, layer)
        shape = () if head is None else head.output_shape[1:]
        if head is None or None in shape or 4 * len(self.images[0]) * math.prod(shape) > _KEPT_BYTES:
            return
        results, start = None, 0
        for (part,) in Runner(head, len(self.images[0]))(self.images):
            part = keras.ops.convert_to_numpy(part)
            if results is None:
                results = self._room_for(part)
            results[start : start + len(part)] = part
            start += len(part)
        self.model, self.images, self._runner, self._is_own = tail, [results], None, True

    def _room_for(self, part):
        """Return an array for the results of all images; that of the last results if the shape is the same."""
        old = self.images[0]
        if self._is_own and old.shape[1:] == part.shape[1:] and old.dtype == part.dtype:
            return old  # a batch is read before its results are written
        return np.empty((len(old), *part.shape[1:]), part.dtype)

    def read(self, node, most=BATCH):
        """Yield, for each batch of at most `most` images, what a layer reads at each of its calls, in float32."""
        reader = Runner(keras_graph.input_model(self.model, node.path), len(self.images[0]))
        for part in reader(self.images, most):
            yield [keras.ops.cast(x, "float32") for x in part]

    def outputs(self, count):
        """Return all outputs of the model for the first `count` images as rows (N, D); meant for many calls."""
        self._runner = self._runner or Runner(self.model, 4 * count)
        return _rows(self._runner([x[:count] for x in self.images]))


def outputs_of(model, images):
    """Return all outputs of the model as rows (N, D)."""
    return _rows(Runner(model, len(images[0]))(images))


def _rows(parts):
    parts = [[keras.ops.convert_to_numpy(y) for y in part] for part in parts]
    rows = [np.concatenate([np.reshape(y, (len(y), -1)) for y in part], axis=1) for part in parts]
    return np.concatenate(rows).astype(np.float64)


def affordable_images(model, macs, least, most):
    """Return how many images the model can run on with this number of multiply-adds, from `least` to `most`."""
    try:
        each = cost.total_costs(model)["macs"]
    except ValueError:  # the size of the images is not fixed
        return min(least, most)
    return int(min(max(macs / max(each, 1), least), most))


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
