"""Read and check the data of a fine-tuning: arrays, or any stream of batches that `fit` takes."""

import itertools
import math
import types

import keras
import numpy as np

from fcnn_utils import _calibration_inputs, _losses, keras_graph
from fcnn_utils._checks import check_number

_BATCH = 128  # the default learning rate of `fine_tune` was measured with it


def read(student, train, batch_size, steps_per_epoch):
    """Return the data as arguments of `fit`, the first batch as (inputs, list of labels or None), and the steps."""
    if steps_per_epoch is not None:
        check_number("steps_per_epoch", steps_per_epoch, int, 1, 10**9)
    if hasattr(train, "shape") or isinstance(train, (tuple, list, dict)):
        return _read_arrays(student, train, batch_size, steps_per_epoch)
    if batch_size is not None:
        raise ValueError(f"batch_size is for arrays; the batches of a {type(train).__name__} have a size already")
    steps = steps_per_epoch or _count(train)
    if not steps:
        raise ValueError(
            f"the number of batches in this {type(train).__name__} is not known, or 0: give steps_per_epoch="
        )
    try:
        iterator = iter([train[0]] if isinstance(train, keras.utils.PyDataset) else train)
        first = next(iterator)
    except TypeError:
        raise ValueError(
            "train must be arrays, a tf.data.Dataset, a keras.utils.PyDataset, a PyTorch DataLoader or a generator; "
            f"got a {type(train).__name__}"
        ) from None
    except StopIteration:
        raise ValueError("train must have at least one batch; got none") from None
    if isinstance(train, types.GeneratorType):
        train = _chain(first, iterator)
    x, y, _ = keras.utils.unpack_x_y_sample_weight(first)
    shuffle = isinstance(train, keras.utils.PyDataset)  # `fit` warns if it shall shuffle what shuffles itself
    return {"x": train, "shuffle": shuffle}, _as_first_batch(x, y), steps


def _read_arrays(student, train, batch_size, steps_per_epoch):
    is_pair = isinstance(train, tuple) or isinstance(train, list) and len(getattr(student, "inputs", None) or [0]) == 1
    x, y, weight = keras.utils.unpack_x_y_sample_weight(tuple(train) if is_pair else (train,))
    arrays = keras.tree.flatten((x, y, weight))
    if not all(each is None or getattr(each, "shape", ()) for each in arrays):
        raise ValueError("train must hold arrays, such as NumPy's: convert lists of numbers by np.array")
    sizes = [int(each.shape[0]) for each in arrays if each is not None]
    if len(set(sizes)) > 1 or sizes[0] == 0:
        raise ValueError(f"the arrays of train must have the same number of rows, at least one; got {sizes}")
    batch_size = check_number("batch_size", _BATCH if batch_size is None else batch_size, int, 1, 10**9)
    first = keras.tree.map_structure(lambda each: None if each is None else each[:batch_size], (x, y))
    data = {"x": x, "y": y, "sample_weight": weight, "batch_size": batch_size}
    return data, _as_first_batch(*first), steps_per_epoch or math.ceil(sizes[0] / batch_size)


def _count(stream):
    """Return the number of batches; None if it is not known or has no end."""
    if isinstance(stream, keras.utils.PyDataset):
        return stream.num_batches
    try:
        return len(stream)
    except TypeError:
        return None


def _chain(first, rest):
    """Yield the first batch and the rest as tuples: `fit` takes generators of tuples, but no other iterators."""
    for batch in itertools.chain([first], rest):
        yield tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def _as_first_batch(x, y):
    x, y = keras.tree.map_structure(_as_array, (x, y))
    labels = [each for each in keras.tree.flatten(y) if each is not None]
    for each in labels:
        if each.dtype.kind in "OSU":
            raise ValueError(
                f"labels must be numbers, such as 0, 1, 2 for the classes; got text or objects ({each.dtype})"
            )
    return x, labels or None


def _as_array(value):
    if value is None:
        return None
    value = value.detach().cpu() if hasattr(value, "detach") else value  # a tensor of PyTorch
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def check_images(student, teacher, x, name):
    """Raise ValueError if the inputs are pixels in whole numbers; warn if they are unlike those of the training.

    The batch norms of the teacher tell what these were like, or those of the student if there is no teacher.
    """
    for model, check in (
        (student, _calibration_inputs.refuse_pixels),
        (student if teacher is None else teacher, _calibration_inputs.warn_if_unlike_training),
    ):
        inputs = _calibration_inputs.by_input(model, x) if keras_graph.is_graph(model) else None
        if inputs is not None:
            check(model, inputs, name)


# parameters: the data, and what they must fit
def check_validation(student, teacher, validation_data, loss, labels, shapes):
    """Raise ValueError if arrays for the validation do not fit; a stream of batches is not read."""
    if not (hasattr(validation_data, "shape") or isinstance(validation_data, (tuple, list))):
        return
    given = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
    x, y, _ = keras.utils.unpack_x_y_sample_weight(tuple(given))
    if y is None and labels is not None:
        raise ValueError("validation_data must be (x, y), (x, y, sample weights), or a stream of such batches")
    sizes = [len(each) for each in keras.tree.flatten((x, y)) if each is not None]
    if len(set(sizes)) > 1 or not sizes[0]:
        raise ValueError(f"the arrays of validation_data must have the same number of rows, at least one; got {sizes}")
    x, found = _as_first_batch(x, y)
    check_images(student, teacher, x, "validation images")
    if labels is not None:
        _losses.check_labels(loss, found, shapes, "the validation labels")
