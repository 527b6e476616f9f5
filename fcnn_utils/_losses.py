"""Losses of a fine-tuning: what a model ends in, the loss of the labels, and the distance from a teacher."""

import dataclasses

import keras
import numpy as np
from keras import layers

from fcnn_utils import keras_graph

_CROSS_ENTROPIES = {  # name of the function -> class, kind of the outputs
    "sparse_categorical_crossentropy": (keras.losses.SparseCategoricalCrossentropy, "softmax"),
    "categorical_crossentropy": (keras.losses.CategoricalCrossentropy, "softmax"),
    "categorical_focal_crossentropy": (keras.losses.CategoricalFocalCrossentropy, "softmax"),
    "binary_crossentropy": (keras.losses.BinaryCrossentropy, "sigmoid"),
    "binary_focal_crossentropy": (keras.losses.BinaryFocalCrossentropy, "sigmoid"),
}
_ACTIVATIONS = {
    keras.activations.softmax: "softmax",
    keras.activations.sigmoid: "sigmoid",
    keras.activations.linear: "linear",
    keras.activations.log_softmax: "linear",  # logarithms of probabilities are logits
}
_OPERATIONS = {"Softmax": "softmax", "Sigmoid": "sigmoid", "LogSoftmax": "linear"}  # of keras.layers and keras.ops
_TRANSPARENT = (layers.Identity, layers.Dropout)  # what they read are probabilities if what they give are
_SMALLEST = 1e-7  # probability, as in Keras: keeps its logarithm finite


@dataclasses.dataclass(frozen=True)
class Output:
    """What one output of a model is.

    Attributes:
        kind: "softmax" (classes on the last axis, one of which is right), "sigmoid" (each value is the answer to a
            yes-no question), or "values" (anything else).
        is_logits: whether the softmax or the sigmoid is still to be applied.
    """

    kind: str
    is_logits: bool = False


def activations(model, count):
    """Return the end of each of `count` outputs of a model: "softmax", "sigmoid", "linear" or None (not known)."""
    if not keras_graph.is_graph(model):
        return [None] * count
    return [_activation(x) for x in keras_graph.graph_of(model).outputs]


def choose(student, teacher, shapes, labels, loss, from_logits):
    """Find out what the outputs of a student are, and choose the loss of the labels.

    Args:
        student: keras.Model.
        teacher: keras.Model or None.
        shapes: list of the shapes of the student's outputs, with the batch axis.
        labels: list of arrays, the labels of one batch; None if there are none.
        loss: of the labels, as in `keras.Model.compile`; None for that of the compiled student or teacher, or else one
            that fits the labels.
        from_logits: overrides what the graph says; or None.

    Returns:
        (loss or None, its weights or None, list of `Output` of the student, the same of the teacher).

    Raises:
        ValueError: the loss, the labels and the outputs do not fit, or the loss can't be chosen.
    """
    ends = activations(student, len(shapes))
    teacher_ends = [None] * len(ends) if teacher is None else activations(teacher, len(shapes))
    weights = None
    if loss is None:
        loss, weights = _compiled_loss(student, teacher)
        if len(shapes) == 1 and labels is not None and not _suits(loss, labels, shapes[0]):
            loss = weights = None
    if len(shapes) > 1:
        if loss is None and labels is not None:
            raise ValueError(f"the student has {len(shapes)} outputs: give loss=, one for each")
        outputs = [
            _output(end, other, None, None, from_logits, shape)
            for end, other, shape in zip(ends, teacher_ends, shapes, strict=True)
        ]
    else:
        (end,), (other,), (shape,) = ends, teacher_ends, shapes
        kind, stated = _kind_of_loss(loss)
        if kind is None and loss is None and labels is not None and _are_classes(labels, shape, end):
            kind = "softmax"
        outputs = [_output(end, other, kind, stated, from_logits, shape)]
        if loss is None and labels is not None:
            loss = _loss_by_form(outputs[0], labels, shape)
        elif _name(loss) in _CROSS_ENTROPIES and not isinstance(loss, keras.losses.Loss):
            loss = _CROSS_ENTROPIES[_name(loss)][0](from_logits=outputs[0].is_logits)
    return loss, weights, outputs, [_of_teacher(*pair) for pair in zip(outputs, teacher_ends, strict=True)]


def check_labels(loss, labels, shapes, name):
    """Raise ValueError if a loss of one output does not take labels; `name` says which these are."""
    if len(shapes) == 1 and not _suits(loss, labels, shapes[0]):
        found = " and ".join(f"{y.shape} {_range(y)}" for y in labels)
        raise ValueError(
            f"{name}, {found}, do not fit the student's output, {shapes[0]}, and the loss "
            f"{_name(loss)}: give them in the form of the training labels"
        )


def default_metrics(outputs, loss):
    """Return the accuracy for a classifier with one output and a cross-entropy; [] for any other model."""
    if len(outputs) > 1 or _kind_of_loss(loss)[0] is None:
        return []
    if outputs[0].kind == "sigmoid":
        return [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0 if outputs[0].is_logits else 0.5)]
    return ["accuracy"]


def distance(outputs, teacher_outputs, found, wanted, temperature):
    """Return how far a student's outputs are from its teacher's: a scalar, the sum over the outputs.

    For probabilities it is the Kullback-Leibler divergence at temperature T, times T² (Hinton, Vinyals & Dean 2015,
    arXiv 1503.02531; their cross-entropy is this plus the teacher's entropy, a constant):

        T² · mean Σ_c  q_c · (log q_c − log p_c),    q = softmax(teacher's logits / T), p = softmax(student's / T)

    For sigmoids it is the same with two classes, averaged over the values; for other outputs the mean squared error.

    Args:
        outputs: list of `Output` of the student.
        teacher_outputs: the same of the teacher.
        found: the student's outputs, any structure of tensors (N, ..., classes).
        wanted: the teacher's outputs, in the same structure and shapes.
        temperature: T.

    Returns:
        scalar float32 tensor.
    """
    total = 0.0
    pairs = zip(keras.tree.flatten(found), keras.tree.flatten(wanted), strict=True)
    for output, other, (y, target) in zip(outputs, teacher_outputs, pairs, strict=True):
        y, target = (keras.ops.cast(x, "float32") for x in (y, target))
        if output.kind == "values":
            total += keras.ops.mean(keras.ops.square(y - target))
        else:
            log_p, log_q = _logs(output, y, temperature), _logs(other, target, temperature)
            divergence = sum(keras.ops.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True))
            if output.kind == "softmax":
                divergence = keras.ops.sum(divergence, axis=-1)
            total += temperature**2 * keras.ops.mean(divergence)
    return total


def _logs(output, y, temperature):
    """Return the logarithms of the softened probabilities: of all classes, or of yes and of no."""
    if output.kind == "softmax":
        logits = y if output.is_logits else keras.ops.log(keras.ops.maximum(y, _SMALLEST))
        return [keras.ops.log_softmax(logits / temperature, axis=-1)]
    if not output.is_logits:
        y = keras.ops.clip(y, _SMALLEST, 1 - _SMALLEST)
        y = keras.ops.log(y) - keras.ops.log(1 - y)
    return [-keras.ops.softplus(-y / temperature), -keras.ops.softplus(y / temperature)]


# --- outputs ---------------------------------------------------------------------------------------------------------


def _activation(tensor):
    """Return the last activation before an output; `activations` says which."""
    operation, node, index = tensor._keras_history
    if keras_graph.is_graph(operation):
        return _activation(keras_graph.graph_of(operation).outputs[index])
    read = operation._inbound_nodes[node].input_tensors
    keeps_classes = isinstance(operation, layers.Reshape) and read[0].shape[-1] == tensor.shape[-1]
    is_linear = isinstance(operation, layers.Activation) and keras_graph.has_linear_activation(operation)
    if keeps_classes or is_linear or isinstance(operation, _TRANSPARENT):
        return _activation(read[0])
    function = getattr(operation, "activation", operation)
    if not isinstance(function, keras.Operation):
        return _ACTIVATIONS.get(function)
    is_last = getattr(function, "axis", -1) in (-1, len(tensor.shape) - 1)
    return _OPERATIONS.get(type(function).__name__) if is_last else None


# parameters: what is known of an output, from five sources
def _output(end, teacher_end, kind, stated, from_logits, shape):
    """Return the `Output` of a student.

    Args:
        end, teacher_end: last activation of the student, and of the teacher (`activations`).
        kind: "softmax" or "sigmoid" by the loss or the labels; or None.
        stated: `from_logits` of the loss; or None.
        from_logits: what the user says; or None.
        shape: of the output.
    """
    kind = kind or next((one for one in (end, teacher_end) if one in ("softmax", "sigmoid")), None)
    if from_logits is not None:
        kind, is_logits = kind or ("sigmoid" if shape[-1] == 1 else "softmax"), bool(from_logits)
    elif kind is None:
        return Output("values")
    elif end is None:
        if stated is None:
            raise ValueError("the student's graph does not show a last activation: give from_logits=True or False")
        is_logits = stated
    else:
        is_logits = end == "linear"
    if stated not in (None, is_logits):
        ends = "logits" if is_logits else "probabilities"
        raise ValueError(f"the loss has from_logits={stated}, but the student ends in {ends}: change one of them")
    return Output(kind, is_logits)


def _of_teacher(output, end):
    """Return the `Output` of the teacher; if its graph does not say, it is as the student's."""
    if output.kind == "values" or end is None:
        return output
    return Output(output.kind, end == "linear")


# --- losses ----------------------------------------------------------------------------------------------------------


def _compiled_loss(*models):
    """Return the loss and its weights of the first model that is compiled with one; (None, None) if none is."""
    for model in models:
        if getattr(model, "compiled", False) and model.loss is not None:
            return model.loss, (model.get_compile_config() or {}).get("loss_weights")
    return None, None


def _name(loss):
    """Return the name of Keras's function for a loss that is a name, a function or an object; else None."""
    for name, (cls, _) in _CROSS_ENTROPIES.items():
        if loss in (name, cls.__name__, getattr(keras.losses, name)) or type(loss) is cls:
            return name
    return None


def _kind_of_loss(loss):
    """Return the kind of outputs that a cross-entropy takes, and its `from_logits`; None for what is not known."""
    if _name(loss) is None:
        return None, None
    stated = bool(loss.get_config()["from_logits"]) if isinstance(loss, keras.losses.Loss) else None
    return _CROSS_ENTROPIES[_name(loss)][1], stated


def _suits(loss, labels, shape):
    """Return whether the loss of a single output takes labels of this form; a loss that is not known takes any."""
    if _name(loss) is None or getattr(loss, "ignore_class", None) is not None:
        return True
    if _name(loss) == "sparse_categorical_crossentropy":
        return _are_numbers(labels, shape)
    return len(labels) == 1 and (labels[0].shape[1:] == shape[1:] or (*labels[0].shape[1:], 1) == shape[1:])


def _are_numbers(labels, shape):
    """Return whether labels are numbers of classes: one whole number where the outputs have a row of several."""
    (y,) = labels if len(labels) == 1 else (np.empty(0),)
    is_one = y.shape[1:] in (shape[1:-1], (*shape[1:-1], 1)) and len(shape) > 1 and shape[-1] != 1
    return is_one and y.size > 0 and bool(np.all((y >= 0) & (y < shape[-1]) & (y == np.floor(y))))


def _are_one_hot(labels, shape):
    (y,) = labels if len(labels) == 1 else (np.empty(0),)
    is_row = y.shape[1:] == shape[1:] and y.ndim > 1 and y.shape[-1] > 1
    return is_row and bool(np.all((y == 0) | (y == 1)) and np.all(y.sum(axis=-1) == 1))


def _are_classes(labels, shape, end):
    return end != "sigmoid" and (_are_numbers(labels, shape) or _are_one_hot(labels, shape))


def _range(y):
    return f"with values from {y.min():g} to {y.max():g}" if y.size and y.dtype.kind in "fiub" else "without numbers"


def _loss_by_form(output, labels, shape):
    """Return a loss that fits the labels of one output.

    Raises:
        ValueError: none does, or several do.
    """
    (y,) = labels if len(labels) == 1 else (np.empty(0),)
    if output.kind == "softmax" and _are_numbers(labels, shape):
        return keras.losses.SparseCategoricalCrossentropy(from_logits=output.is_logits)
    if y.shape[1:] != shape[1:] and not (shape[-1] == 1 and y.shape[1:] == shape[1:-1]):
        raise ValueError(
            f"the labels, {' and '.join(str(x.shape) for x in labels)} {_range(y)}, do not fit the student's output, "
            f"{shape}: give loss=" + (f", or labels from 0 to {shape[-1] - 1}" if output.kind == "softmax" else "")
        )
    if output.kind == "softmax":
        return keras.losses.CategoricalCrossentropy(from_logits=output.is_logits)
    if output.kind == "sigmoid":
        return keras.losses.BinaryCrossentropy(from_logits=output.is_logits)
    if y.dtype.kind in "iub" or np.all((y == 0) | (y == 1)):
        raise ValueError(
            "the labels may be numbers or the answers to yes-no questions: give loss=, such as 'mse' or "
            "'binary_crossentropy'"
        )
    return keras.losses.MeanSquaredError()
