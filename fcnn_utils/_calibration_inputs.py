"""Take calibration images in the forms that users have, and compare them with what the network was trained on."""

import math
import warnings

import keras
import numpy as np
from keras import layers

from fcnn_utils import keras_graph

LIMIT = 2000  # inputs that are taken from a stream of batches
_CHECKED = 256  # inputs whose statistics are compared
_REARRANGING = tuple(
    getattr(layers, f"{kind}{axes}D") for kind in ("ZeroPadding", "Cropping", "UpSampling") for axes in (1, 2, 3)
) + (layers.Flatten, layers.Reshape, layers.Permute, layers.Identity, layers.Dropout, layers.Concatenate)
_FAR = 2.5  # factor between the standard deviations from which on images are taken for wrong


def take(model, images):
    """Return images as a list of arrays, one for each input: `calibration.check_images` without its warning."""
    if isinstance(images, (tuple, list, dict)) or hasattr(images, "shape"):
        arrays = _fitting(model, images)
    else:
        arrays = _from_batches(model, images)
    refuse_pixels(model, arrays, "calibration images")
    arrays = [array.astype(x.dtype, copy=False) for array, x in zip(arrays, model.inputs, strict=True)]
    if not all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f"):
        raise ValueError("calibration images must be finite numbers; some are NaN or infinite")
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"all inputs must have the same number of images; got {[len(array) for array in arrays]}")
    return arrays


def refuse_pixels(model, arrays, name):
    """Raise ValueError if a convolution or a dense layer of the model would read whole numbers as they are.

    Arrays of at most two axes, and arrays without a number above 1, are allowed. So is a model with an input of
    integers, and one that rescales, embeds or normalises first.
    """
    for array, x in zip(arrays, model.inputs, strict=True):
        are_pixels = array.dtype.kind in "iu" and array.ndim > 2 and array.max(initial=0) > 1
        if are_pixels and "float" in x.dtype and _is_read_as_it_is(model, x):
            raise ValueError(
                f"{name} are whole numbers ({array.dtype}), and model {model.name!r} does not rescale them: normalise "
                "them as in training, and give floats"
            )


def batches(model, inputs, size):
    """Return the inputs in batches of `size`, each in the structure that the model takes."""
    parts = range(0, len(inputs[0]), size)
    return [keras_graph.pack_inputs(model, [x[start : start + size] for x in inputs]) for start in parts]


def warn_if_unlike_training(model, inputs, name="calibration images"):
    """Compare the inputs with the statistics that the first batch normalisation has from the training.

    Warn if the standard deviations differ by a factor of more than 2.5, or the means by more than 2.5 standard
    deviations. Nothing is compared without a batch normalisation, or if its moving averages are the initial ones.

    Raises:
        ValueError: the normalisation reads values that are not finite.
    """
    nodes = keras_graph.layer_nodes(model)
    norm = next((node for node in nodes if node.is_channel_norm and not any(node.training)), None)
    if norm is None:
        return
    mean, variance = (
        np.asarray(keras.ops.convert_to_numpy(x), np.float64)
        for x in (norm.layer.moving_mean, norm.layer.moving_variance)
    )
    if not mean.any() and (variance == 1).all():
        return
    reader = keras_graph.input_model(model, norm.path)
    sums = []  # of each batch: count, sum and sum of squares for each channel
    for part in batches(reader, [x[:_CHECKED] for x in inputs], 16):
        x = keras.ops.convert_to_numpy(keras.ops.cast(reader(part, training=False), "float32")).astype(np.float64)
        axes = tuple(range(x.ndim - 1))
        sums.append((math.prod(x.shape[:-1]), x.sum(axes), np.square(x).sum(axes)))
    count, total, squares = (sum(each) for each in zip(*sums, strict=True))
    if not np.isfinite(squares).all():
        raise ValueError(
            f"layer {norm.path!r} reads values that are not finite on the {name}: check their normalisation"
        )
    found_mean = total / count
    trained, found = np.sqrt(variance.mean()), np.sqrt(max(np.mean(squares / count - found_mean**2), 0))
    distance = np.sqrt(np.mean((found_mean - mean) ** 2 / (variance + norm.layer.epsilon)))
    if not trained / _FAR < found < trained * _FAR or distance > _FAR:
        warnings.warn(
            f"the {name} do not look like those of the training: at {norm.path!r} the standard deviation "
            f"is {found:.3g}, in training it was {trained:.3g}, and the means differ by {distance:.1f} standard "
            "deviations. Normalise the images as in training. If they are, the moving averages of the batch norms may "
            "be inaccurate, as after a short training: `fcnn.reestimate(model, images)` computes them anew",
            stacklevel=3,
        )


# --- the forms -------------------------------------------------------------------------------------------------------


def _from_batches(model, stream):
    """Concatenate the first batches of an iterable, or of an indexable such as a PyDataset."""
    is_indexed = hasattr(stream, "__getitem__") and hasattr(stream, "__len__") and not hasattr(stream, "__iter__")
    found, count = [], 0
    try:
        items = (stream[number] for number in range(len(stream))) if is_indexed else iter(stream)
    except TypeError:
        raise ValueError(
            "calibration images must be an array, a list or dict of arrays, or an iterable of batches; got a "
            f"{type(stream).__name__}"
        ) from None
    for batch in items:
        found.append(_fitting(model, batch))
        count += len(found[-1][0])
        if count >= LIMIT:
            break
    if not found:
        raise ValueError("calibration images must be at least one batch; got none")
    return [np.concatenate(parts)[:LIMIT] for parts in zip(*found, strict=True)]


def _fitting(model, value):
    """Return a list of arrays that fit the model's inputs, from arrays or from a pair of them and labels."""
    candidates = [value]
    if isinstance(value, (tuple, list)) and value:
        candidates.append(value[0])  # (inputs, labels)
    for candidate in candidates:
        arrays = by_input(model, candidate)
        if arrays is not None and all(map(_fits, arrays, model.inputs)):
            return arrays
    if isinstance(value, dict) and set(value) != {x.name for x in model.inputs}:
        raise ValueError(
            f"the keys must be the names of the inputs, {', '.join(x.name for x in model.inputs)}; got "
            f"{', '.join(map(str, value))}"
        )
    wanted = " and ".join(f"(N, {', '.join(map(str, x.shape[1:]))})" for x in model.inputs)
    found = [f"{_as_array(x).shape} {_as_array(x).dtype}" for x in keras.tree.flatten(value)[:4]]
    raise ValueError(
        f"calibration images must have the shape {wanted}, at least one, of floats or integers; got "
        f"{' and '.join(found)}"
    )


def by_input(model, value):
    """Return one array for each input of the model; None if there are more or fewer, or other names.

    Args:
        model: functional or Sequential.
        value: an array, a list of arrays, or a dict of arrays by the names of the inputs.
    """
    if isinstance(value, dict):
        names = [x.name for x in model.inputs]
        if set(names) != set(value):
            return None
        return [_as_array(value[name]) for name in names]
    is_several = isinstance(value, (tuple, list)) and (len(model.inputs) > 1 or len(value) == 1)
    arrays = [_as_array(x) for x in (value if is_several else [value])]
    return arrays if len(arrays) == len(model.inputs) else None


def _as_array(value):
    is_ragged = isinstance(value, list) and len({np.shape(x) for x in value}) != 1
    if isinstance(value, (dict, tuple)) or is_ragged:
        return np.empty(0)  # fits no input
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def _fits(array, x):
    wanted = x.shape[1:]
    return (
        array.ndim == 1 + len(wanted)
        and len(array) > 0
        and array.dtype.kind in "fiub"
        and all(size in (None, given) for size, given in zip(wanted, array.shape[1:], strict=True))
    )


def _is_read_as_it_is(model, tensor):
    """Return whether a layer with a kernel reads this tensor of a model, or the same values in another arrangement."""
    for node in keras_graph.keras_nodes(keras_graph.graph_of(model)):
        operation = node.operation
        for position, x in enumerate(node.input_tensors):
            if x is not tensor:
                continue
            if keras_graph.is_graph(operation):
                if _is_read_as_it_is(operation, keras_graph.graph_of(operation).inputs[position]):
                    return True
            elif isinstance(operation, _REARRANGING):
                if _is_read_as_it_is(model, node.outputs[0]):
                    return True
            elif hasattr(operation, "kernel_size") or isinstance(operation, (layers.Dense, layers.EinsumDense)):
                return True
    return False
