"""Run a network on calibration images: part by part, as rows of outputs, and the change of these outputs."""

import functools
import math

import keras
import numpy as np

from fcnn_utils import _graph_cut, cost, keras_graph, layer_kinds

_ACTIVATION_BYTES = 2**30  # limit for the activations of a batch: Keras keeps all of them until the last layer has run
_KEPT_BYTES = 2**30  # limit for the stored inputs of a layer, so that the layers before it need not run again
_COMPILED_MACS = 3e9  # compile above this number for all passes together: then it saves more time than it costs
_EAGER_PASSES = 2  # of a cheaper network before it is compiled
_SUPERFLUOUS = 0.3  # if more of a runner's MACs repeat what is known already, a new runner is made


class Runner:
    """Run a network in inference mode on batches.

    With TensorFlow, a network is compiled if it is expensive, or when it is run for the third time. With JAX and
    PyTorch, compilation takes longer than a few runs.

    Args:
        model: functional or Sequential.
        batches: list of batches, each a list of arrays or tensors, one for each input.
        times: expected number of passes over all batches.

    Attributes:
        macs: of the network for one image, as from `_work`.
    """

    def __init__(self, model, batches, times=1):
        self._model, self._batches, self._call = model, batches, functools.partial(model, training=False)
        self.macs = _work(model, batches[0])[0]
        is_expensive = self.macs * times * sum(map(_length, batches)) > _COMPILED_MACS
        self._eager_passes_left = 0 if is_expensive else _EAGER_PASSES

    def __call__(self):
        """Yield the flat list of outputs of each batch."""
        if self._eager_passes_left == 0 and keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            self._call = tf.function(self._call, reduce_retracing=True, autograph=False)
        self._eager_passes_left -= 1
        for batch in self._batches:
            result = keras.tree.flatten(self._call(keras_graph.pack_inputs(self._model, batch)))
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
        self._batches = _split(images, size or batch_size(model, images))  # what the model reads

    def start_before(self, layer):
        """Run what comes before the layer and leave it out from now on, unless the result would be too large."""
        head, tail = _graph_cut.split_before(self.model, layer)
        shape = () if head is None else head.output_shape[1:]
        if head is None or None in shape or 4 * self.count * math.prod(shape) > _KEPT_BYTES:
            return
        for number, result in enumerate(Runner(head, self._batches)()):
            self._batches[number] = result  # at once, so that the memory of the batch before can be used again
        self.model = tail
        if self._runners and not self._may_reuse_runners():
            self._runners = {}

    def _may_reuse_runners(self):
        """Return whether the runners that were made for earlier layers repeat few of their MACs."""
        left, known = _work(self.model, self._batches[0])[0], [runner.macs for runner in self._runners.values()]
        return keras.backend.backend() == "tensorflow" and left > 0 and left >= (1 - _SUPERFLUOUS) * max(known)

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

        A runner that was made for an earlier layer may be used again. It repeats some layers, but with their present
        weights, and it keeps its own batches.
        """
        if count not in self._runners:
            self._runners[count] = Runner(self.model, self._first(count), times=4)
        return _rows(self._runners[count]())

    def _first(self, count):
        """Return the batches of the first images, in all `count`."""
        batches, left = [], math.inf if count is None else count
        for batch in self._batches:
            if left > 0:
                batches.append([x[:left] for x in batch] if _length(batch) > left else batch)
                left -= _length(batch)
        return batches


def batch_size(model, images):
    """Return the size of a batch: the largest power of two from 8 to 128 that keeps the activations within 1 GiB.

    It is 8 if the activations of 8 images need more, or if they are not known.
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


def _length(batch):
    return len(batch[0])


def _rows(results):
    results = [[keras.ops.convert_to_numpy(y) for y in result] for result in results]
    rows = [np.concatenate([np.reshape(y, (len(y), -1)) for y in result], axis=1) for result in results]
    return np.concatenate(rows).astype(np.float64)


def images_within(model, images, macs):
    """Return how many images of the shape of `images` the model can run on within a budget of MACs.

    The result is 0 if no MACs are known (`_work`).
    """
    known = _work(model, images)[0]
    return int(macs / known) if known else 0


def _work(model, images):
    """Return the MACs and the number of activations of a model for one image.

    Layers whose MACs are not known count as 0. If the size of any layer is not fixed, both are 0.
    """
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
