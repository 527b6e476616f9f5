"""Run a network on calibration images: part by part, as rows of outputs, and the change of these outputs."""

import functools
import math

import keras
import numpy as np

from fcnn_utils import _graph_cut, cost, keras_graph, layer_kinds

_ACTIVATION_BYTES = 2**30  # limit for the activations of a batch: Keras keeps all of them until the last layer has run
_KEPT_BYTES = 2**30  # limit for the stored inputs of a layer, so that the layers before it need not run again
_COMPILED_MACS = 3e10  # compile above this number for all passes together: then it saves more time than it costs
_EAGER_PASSES = 2  # of a cheaper network before it is compiled
_SMALL_PART = 0.3  # share of the MACs that may be run again for every output, so that fewer networks are compiled


class Runner:
    """Run a network in inference mode on batches.

    With TensorFlow, a network is compiled if it is expensive, or when it is run for the third time. With JAX and
    PyTorch, compilation takes longer than a few runs.

    Args:
        model: functional or Sequential.
        parts: list of batches, each a list of arrays or tensors, one for each input.
        times: expected number of passes over all batches.

    Attributes:
        macs: of the network for one image; 0 if they are not known.
    """

    def __init__(self, model, parts, times=1):
        self._model, self._parts, self._call = model, parts, functools.partial(model, training=False)
        self.macs = _work(model, parts[0])[0]
        self._passes_left = 0 if self.macs * times * sum(map(_length, parts)) > _COMPILED_MACS else _EAGER_PASSES

    def __call__(self):
        """Yield the flat list of outputs of each batch."""
        if self._passes_left == 0 and keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            self._call = tf.function(self._call, reduce_retracing=True)
        self._passes_left -= 1
        for part in self._parts:
            result = keras.tree.flatten(self._call(keras_graph.pack_inputs(self._model, part)))
            yield [keras.ops.stop_gradient(y) for y in result]  # PyTorch's results would keep their whole history


class Rest:
    """The part of a model that is still to be run on images that have gone through the part before.

    It is used for layers in the order of the model.

    Args:
        model: functional or Sequential.
        images: list of arrays, one for each input; they are not changed.
        size: images of a batch; default: `batch_size`.

    Attributes:
        model: the part; it shares its layers with the whole model.
        count: number of images.
    """

    def __init__(self, model, images, size=None):
        self.model, self.count, self._runners = model, len(images[0]), {}
        self._parts = _split(images, size or batch_size(model, images))  # what the model reads

    def start_before(self, layer):
        """Run what comes before the layer and leave it out from now on, unless the result would be too large."""
        head, tail = _graph_cut.split_before(self.model, layer)
        shape = () if head is None else head.output_shape[1:]
        if head is None or None in shape or 4 * self.count * math.prod(shape) > _KEPT_BYTES:
            return
        for number, result in enumerate(Runner(head, self._parts)()):
            self._parts[number] = result  # at once, so that the memory of the batch before can be used again
        self.model = tail
        if self._runners:
            least = (1 - _SMALL_PART) * max(runner.macs for runner in self._runners.values())
            if keras.backend.backend() != "tensorflow" or _work(tail, self._parts[0])[0] < least:
                self._runners = {}

    def read(self, node, count=None):
        """Yield what a layer reads at each of its calls, in float32, batch by batch.

        Args:
            node: `keras_graph.LayerNode` of the layer.
            count: number of images, the first ones; default: all.
        """
        reader = keras_graph.input_model(self.model, node.path)
        for result in Runner(reader, self._first(count))():
            yield [keras.ops.cast(x, "float32") for x in result]

    def outputs(self, count):
        """Return all outputs of the model for the first `count` images as rows (N, D); meant for many calls.

        They may be computed from a point before that of `start_before`, with the layers' present weights.
        """
        if count not in self._runners:
            self._runners[count] = Runner(self.model, self._first(count), times=4)
        return _rows(self._runners[count]())

    def _first(self, count):
        """Return the batches of the first images, in all `count`."""
        parts, left = [], math.inf if count is None else count
        for part in self._parts:
            if left > 0:
                parts.append([x[:left] for x in part] if _length(part) > left else part)
                left -= _length(part)
        return parts


def batch_size(model, images):
    """Return a power of two from 8 to 128, at which the activations stay below 1 GiB where possible.

    If their number is not known, it is 8.
    """
    values = _work(model, images)[1]
    if not values:
        return 8
    fitting = math.floor(math.log2(_ACTIVATION_BYTES / (4 * values)))
    return 2 ** min(max(fitting, 3), 7)


def outputs_of(model, images):
    """Return all outputs of the model as rows (N, D)."""
    return _rows(Runner(model, _split(images, batch_size(model, images)))())


def _split(images, size):
    return [[x[start : start + size] for x in images] for start in range(0, len(images[0]), size)]


def _length(part):
    return len(part[0])


def _rows(results):
    results = [[keras.ops.convert_to_numpy(y) for y in result] for result in results]
    rows = [np.concatenate([np.reshape(y, (len(y), -1)) for y in result], axis=1) for result in results]
    return np.concatenate(rows).astype(np.float64)


def images_within(model, images, macs):
    """Return how many images of the shape of `images` the model can run on within a budget of MACs.

    If its MACs are not known, this is 0.
    """
    known = _work(model, images)[0]
    return int(macs / known) if known else 0


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
