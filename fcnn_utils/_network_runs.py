"""Run a network on calibration images: part by part, as rows of outputs, and the change of these outputs."""

import math

import keras
import numpy as np

from fcnn_utils import _graph_cut, keras_graph, layer_kinds
from fcnn_utils._calibration_inputs import batches

BATCH = 128  # images at a time
_KEPT_BYTES = 2**30  # limit for the stored inputs of a layer, so that the layers before it need not run again


class Rest:
    """The part of a model that is still to be run on images that have gone through the part before.

    It is used for layers in the order of the model.

    Attributes:
        model: the part; it shares its layers with the whole model.
        images: list of arrays, what it reads.
    """

    def __init__(self, model, images):
        self.model, self.images = model, images

    def start_before(self, layer):
        """Run what comes before the layer and leave it out from now on, unless the result would be too large."""
        head, tail = _graph_cut.split_before(self.model, layer)
        shape = () if head is None else head.output_shape[1:]
        if head is None or None in shape or 4 * len(self.images[0]) * math.prod(shape) > _KEPT_BYTES:
            return
        parts = [head(batch, training=False) for batch in batches(self.model, self.images, BATCH)]
        parts = [keras.ops.convert_to_numpy(part) for part in parts]
        self.model, self.images = tail, [np.concatenate(parts)]

    def read(self, node, size):
        """Yield, for each batch, what a layer reads at each of its calls, in float32."""
        reader = keras_graph.input_model(self.model, node.path)
        for batch in batches(self.model, self.images, size):
            yield [keras.ops.cast(x, "float32") for x in keras.tree.flatten(reader(batch, training=False))]


def outputs_of(model, images):
    """Return all outputs of the model as rows (N, D)."""
    # called, not by `predict_on_batch`: most models are run once, and compiling them would take longer
    parts = [keras.tree.flatten(model(batch, training=False)) for batch in batches(model, images, BATCH)]
    parts = [[keras.ops.convert_to_numpy(y) for y in part] for part in parts]
    rows = [np.concatenate([np.reshape(y, (len(y), -1)) for y in part], axis=1) for part in parts]
    return np.concatenate(rows).astype(np.float64)


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
