"""Count what a network costs, layer by layer: parameters, MACs and activation bytes.

1 MAC is one multiply-add; FLOPs = 2 × MACs. A kernel position that overlaps the border counts in full,
as in TensorFlow's profiler. Operations that are not MACs are counted separately, in `other_ops`: one for
each bias addition, each activated value and each value that a merge layer adds or compares, two for each
normalised or rescaled value (scale and shift), one for each input value that a pooling window reads, and one
for each value of a function of `keras.ops` between layers. Other layers without weights count 0: most only
move values.

Attention, recurrent layers and matrix products count, too; of recurrent and multi-head attention layers only
the MACs. A user's own layer counts as the layers and functions that its `call` is made of. If that cannot be
seen, its MACs are NaN, and a warning names it.
"""

import math
import warnings

import keras
import numpy as np
import pandas as pd

from fcnn_utils import _operation_counts, keras_graph
from fcnn_utils._operation_counts import SizeNotFixed, convolution_macs  # noqa: F401  (part of the interface)

_SUMMED = ["params", "trainable", "macs", "other_ops", "activation_bytes"]
COLUMNS = ["layer", "kind", "output_shape", *_SUMMED]


def layer_costs(model):
    """Count the cost of one image's forward pass, with a row for each call of a layer and a row "total".

    Rows are in the order of the model. A layer that is called several times has its parameters in the
    first of its rows. The columns:

        layer             name of the layer
        kind              its class
        output_shape      of one image, without the batch axis
        params            number of weights, those of batch-norm statistics included
        trainable         number of trainable weights
        macs              multiply-adds
        other_ops         operations that are not multiply-adds (see the module)
        activation_bytes  size of the output in the compute dtype; its total is a sum, not a peak

    Functions of `keras.ops` between layers have a row if they compute something. The total is that of the
    MACs that are known.

    Args:
        model: built, functional or Sequential (see `keras_graph.check_graph`).

    Returns:
        DataFrame with these columns.

    Raises:
        ValueError: the model is not a graph of layers on images of a fixed size.
    """
    model, rows, seen = keras_graph.check_graph(model), [], set()
    for call, macs, other_ops in call_costs(model):
        operation = call.operation
        if isinstance(operation, keras.Layer) or macs != 0 or other_ops:
            rows.append(_row(operation, call.outputs[0], macs, other_ops, first=id(operation) not in seen))
        seen.add(id(operation))
    table = pd.DataFrame(rows, columns=COLUMNS)
    unknown = sorted(set(table["layer"][table["macs"].isna()]))
    if unknown:
        warnings.warn(f"the MACs of {', '.join(unknown)} are not known and are missing in the total", stacklevel=2)
    shape = keras.tree.flatten(model.outputs)[0].shape[1:]
    total = {"layer": "total", "kind": "", "output_shape": tuple(shape), **table[_SUMMED].sum().astype(int)}
    return pd.concat([table, pd.DataFrame([total])], ignore_index=True)


def total_costs(model):
    """Return the total row of `layer_costs` as a dict: params, trainable, macs, other_ops, activation_bytes."""
    row = layer_costs(model).iloc[-1]
    return {key: int(row[key]) for key in _SUMMED}


def call_costs(model, inputs=None):
    """Count every call of an operation in a model, for one image.

    Args:
        model: built, functional or Sequential.
        inputs: list of Keras tensors of the size of the images, for a model that takes any size.

    Returns:
        list of (`keras_graph.Call`, MACs, other operations); MACs are NaN if they are not known.

    Raises:
        ValueError: as `layer_costs`.
    """
    costs = []
    for call in keras_graph.operation_calls(model, inputs):
        try:
            macs, other_ops = _operation_counts.count(call.operation, call.args, call.kwargs, call.outputs)
        except SizeNotFixed as error:
            raise SizeNotFixed(f"layer {call.operation.name!r}: {error}") from None
        costs.append((call, macs, other_ops))
    return costs


def value_bytes(dtype):
    """Return the bytes of one value of a layer's `compute_dtype` or `variable_dtype`."""
    return np.dtype("uint16" if "float16" in dtype else dtype).itemsize  # NumPy has no bfloat16


def _row(operation, output, macs, other_ops, first):
    """Make the row of one call; only the `first` call has the layer's parameters."""
    shape = tuple(output.shape[1:])
    is_layer = isinstance(operation, keras.Layer)
    params = trainable = 0
    if is_layer and first:
        params, trainable = _count(operation.weights), _count(operation.trainable_weights)
    dtype = operation.compute_dtype if is_layer else output.dtype
    size = math.prod(shape) * value_bytes(dtype)
    return operation.name, type(operation).__name__, shape, params, trainable, macs, other_ops, size


def _count(weights):
    return sum(math.prod(weight.shape) for weight in weights)
