"""Fine-tune a factorized model with `fit`, on labels, on the outputs of the dense model, or on both.

    fine_tune(small, (images, labels), teacher=model)    # one epoch of small steps
    fine_tune(small, images, teacher=model)              # without labels

Factorized networks diverge easily: their gradients can be large, because a small step of one factor is multiplied by
the others. Hence the rate rises slowly from 0 to a small peak, and the norm of the gradient is bounded.
"""

import contextlib
import math

import keras
import numpy as np

from fcnn_utils import _losses, _training_data
from fcnn_utils._checks import check_choice, check_number

_FIT_OPTIONS = ("class_weight", "shuffle", "validation_batch_size", "validation_freq", "validation_steps")


class Diverged(ArithmeticError):
    """The loss or a weight is not finite."""


def check_finite(loss, where):
    """Raise `Diverged` if `loss` is not finite; `where` says at which point of the training."""
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} {where}: try a lower learning rate, a longer warm-up, or float32")


def one_cycle(learning_rate, steps, warmup=0.2):
    """Return a schedule: a linear warm-up from 0 to `learning_rate`, then a cosine decay to 0.

    After Smith & Topin 2018, arXiv 1708.07120.

    Args:
        learning_rate: largest rate.
        steps: number of steps of the whole cycle.
        warmup: share of the steps in the warm-up.

    Returns:
        keras.optimizers.schedules.CosineDecay.
    """
    rising = round(warmup * steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - rising), warmup_target=learning_rate, warmup_steps=rising
    )


# parameters: those of `fit`, and the settings of the training, which all have a default
# long: most of it is the docstring
def fine_tune(
    student,
    train,
    *,
    teacher=None,
    distillation=None,
    temperature=1.0,
    loss=None,
    from_logits=None,
    metrics=None,
    epochs=1,
    batch_size=None,
    steps_per_epoch=None,
    learning_rate=0.01,
    warmup=0.2,
    clip_norm=1.0,
    validation_data=None,
    callbacks=None,
    verbose="auto",
    **options,
):
    """Train a factorized model in place, by SGD with Nesterov momentum 0.9, a one-cycle schedule and clipping.

    The loss is  (1 − d) · loss of the labels + d · distance from the teacher's outputs + the student's own losses
    (such as regularization), with d = `distillation`. The same is computed on the validation data. The distance is the
    Kullback-Leibler divergence of Hinton et al. 2015 (arXiv 1503.02531) for probabilities and logits, and the mean
    squared error for other outputs; several outputs are summed (`_losses.distance`). The teacher runs in inference
    mode and does not change. Sample and class weights act on the loss of the labels alone.

    The student's graph shows whether its outputs are probabilities or logits: a softmax or a sigmoid at the end gives
    probabilities. A linear end counts as logits in three cases: the loss is a cross-entropy, the labels are classes
    (whole numbers or one-hot), or the teacher ends in a softmax or a sigmoid. Otherwise it counts as plain values. Give
    `from_logits` if the graph does not show it, as in a subclassed model.

    In a short training, the moving averages of batch norms would remain those of the old weights. Therefore the
    momentum of batch norms is lowered during the training, if necessary, to 1 − 3 / steps. At most 5% of the old
    average then remain.

    Afterwards the student is compiled with the loss of the labels, the metrics, and a new optimizer with the same
    settings. Therefore `evaluate` works, and another `fit` starts the schedule anew.

    Args:
        student: built keras.Model, such as the result of `compress.factorize`. It is changed.
        train: any input of `fit`: arrays, as (x, y), (x, y, sample weights) or x alone; a tf.data.Dataset, a
            keras.utils.PyDataset or a PyTorch DataLoader of such batches; or a generator of them.
        teacher: keras.Model with the same inputs and outputs, such as the dense model; required without labels.
        distillation: weight of the distance from the teacher, between 0 and 1. Default: 0.5, or 1 without labels.
        temperature: T of the distillation, for probabilities and logits.
        loss: of the labels, as in `compile`. Default: that with which the student, or else the teacher, is compiled; or
            one that fits the labels: cross-entropy for classes, mean squared error for other numbers.
        from_logits: whether the outputs are logits, if the graph does not show it.
        metrics: as in `compile`; default: the accuracy if the loss is a cross-entropy.
        epochs: passes over the data.
        batch_size: of arrays; default 128.
        steps_per_epoch: batches per epoch, as in `fit`; required for a generator and for a dataset of unknown length.
            Both must have enough batches for all epochs.
        learning_rate: largest rate; or a `keras.optimizers.schedules.LearningRateSchedule`, which is used as it is.
        warmup: share of all steps in which the rate rises from 0.
        clip_norm: largest norm of the gradient of all weights together; None for no limit.
        validation_data, callbacks, verbose: as in `fit`. The callbacks see the student.
        options: class_weight, shuffle, validation_batch_size, validation_freq and validation_steps of `fit`.

    Returns:
        keras.callbacks.History.

    Raises:
        ValueError: there are neither labels nor a teacher; the data, the loss, the student and the teacher do not fit;
            the inputs are pixels in whole numbers, and the student does not rescale them; the labels are not numbers;
            the number of steps is not known; or an argument is not allowed.
        Diverged: the loss or a weight is not finite. The student then has its weights from before.

    Warns:
        UserWarning: the inputs are unlike those of the training, by the batch norms of the teacher, or of the student
            if there is no teacher.
    """
    for name in options:
        check_choice("argument of fit", name, _FIT_OPTIONS)
    _check_models(student, teacher)
    check_choice("from_logits", from_logits, (None, True, False))
    epochs = check_number("epochs", epochs, int, 1, 10**6)
    check_number("temperature", temperature, float, 1e-3, 1e3)
    check_number("warmup", warmup, float, 0, 1)
    if clip_norm is not None:
        check_number("clip_norm", clip_norm, float, 1e-9, 1e9)
    data, first, steps = _training_data.read(student, train, batch_size, steps_per_epoch)
    x, labels = first
    _training_data.check_images(student, teacher, x, "images")
    share = _share(distillation, teacher, labels)
    shapes = _output_shapes(student, teacher, x)
    loss, loss_weights, outputs, teacher_outputs = _losses.choose(student, teacher, shapes, labels, loss, from_logits)
    _training_data.check_validation(student, teacher, validation_data, loss, labels, shapes)
    if labels is None and metrics:
        raise ValueError("metrics need labels, and train has none: leave out metrics=")
    if metrics is None:
        metrics = [] if labels is None else _losses.default_metrics(outputs, loss)
    if not isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        check_number("learning_rate", learning_rate, float, 0, 100)
        learning_rate = one_cycle(learning_rate, steps * epochs, warmup)

    def compile_student():
        optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True, global_clipnorm=clip_norm)
        optimizer.build(student.trainable_variables)  # Keras warns when it loads one that was not
        # Without metrics an empty list, because None would keep those of an earlier `compile`.
        student.compile(optimizer, loss, loss_weights=loss_weights, metrics=metrics)

    def distance(x, found):
        wanted = keras.tree.map_structure(keras.ops.stop_gradient, teacher(x, training=False))
        return _losses.distance(outputs, teacher_outputs, found, wanted, temperature)

    before = [np.array(weight) for weight in student.get_weights()]  # copies: PyTorch shares the memory
    compile_student()
    try:
        mixed = _mixed_loss(student, distance, share, labels is not None)
        with mixed, _frozen(teacher), _quick_batch_norms(student, steps * epochs):
            return student.fit(
                **(data | options),
                steps_per_epoch=steps_per_epoch,
                epochs=epochs,
                validation_data=validation_data,
                callbacks=[_StopIfNotFinite(), *keras.tree.flatten(callbacks or [])],
                verbose=verbose,
            )
    except Diverged as error:
        student.set_weights(before)
        raise Diverged(f"{error}; the student has its weights from before") from None
    finally:
        compile_student()  # the functions compiled for `fit` contain the teacher, and the schedule has ended at 0


@contextlib.contextmanager
def _mixed_loss(student, distance, share, has_labels):
    """Let `fit` add the distance from the teacher to the student's loss.

    The method is replaced on the student itself, and not in a model around it, so that callbacks see the student: they
    save it, stop it and give it its best weights back. A function that is an attribute is not saved.
    """
    own = student.compute_loss

    def compute_loss(x=None, y=None, y_pred=None, sample_weight=None, **training):
        extra = [keras.ops.sum(keras.ops.cast(each, "float32")) for each in student.losses]
        extra = sum(extra) if extra else 0.0
        if not has_labels:
            return distance(x, y_pred) + extra
        whole = own(x, y, y_pred, sample_weight, **training)  # includes `extra`
        return (1 - share) * whole + share * (distance(x, y_pred) + extra)

    if share:
        student.compute_loss = compute_loss
    try:
        yield
    finally:
        if share:
            del student.compute_loss


@contextlib.contextmanager
def _frozen(teacher):
    """Freeze the teacher's weights, one by one, so that no backend keeps what its gradients would need."""
    variables = [] if teacher is None else teacher.trainable_variables
    try:
        for variable in variables:
            variable.trainable = False
        yield
    finally:
        for variable in variables:
            variable.trainable = True


@contextlib.contextmanager
def _quick_batch_norms(student, steps):
    """Lower the momentum of batch norms, so that little of the old statistics is left after this number of steps."""
    norms = [each for each in student._flatten_layers() if isinstance(each, keras.layers.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = min(norm.momentum, max(0.0, 1 - 3 / steps))
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class _StopIfNotFinite(keras.callbacks.Callback):
    """Raise `Diverged` when a loss is not finite, or when a weight is not finite at the end of an epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch + 1

    def on_train_batch_end(self, batch, logs=None):
        check_finite((logs or {}).get("loss", 0.0), f"at epoch {self.epoch}, step {batch + 1}")

    def on_epoch_end(self, epoch, logs=None):
        if not all(np.isfinite(weight).all() for weight in self.model.get_weights()):  # the last step may have diverged
            check_finite(math.nan, f"or soon will be, because weights are not finite after epoch {self.epoch}")


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_models(student, teacher):
    """Raise ValueError unless both are built models without common weights, and the student can be trained."""
    for name, model in (("student", student), ("teacher", teacher)):
        if model is None and name == "teacher":
            continue
        if not isinstance(model, keras.Model):
            raise ValueError(f"{name} must be a built keras.Model; got {type(model).__name__}")
        if not model.built:
            raise ValueError(f"{name} {model.name!r} is not built: call it on images once, or give it an Input")
    if not student.trainable_variables:
        raise ValueError(f"student {student.name!r} has no trainable weights: unfreeze some layers")
    if teacher is not None and {id(each) for each in student.variables} & {id(each) for each in teacher.variables}:
        raise ValueError(
            "student and teacher share weights, so training would change the teacher, too: give a copy of the model as "
            "teacher="
        )


def _share(distillation, teacher, labels):
    """Return the weight of the distance from the teacher."""
    if teacher is None:
        if labels is None:
            raise ValueError("there is nothing to learn from: give labels, as train=(x, y), or a teacher=")
        if distillation:
            raise ValueError(f"distillation is {distillation}, and there is no teacher: give teacher=, the dense model")
        return 0.0
    if distillation is None:
        return 0.5 if labels is not None else 1.0
    check_number("distillation", distillation, float, 0, 1)
    if labels is None and distillation != 1:
        raise ValueError(f"without labels distillation must be 1; got {distillation}")
    return float(distillation)


def _output_shapes(student, teacher, x):
    """Return the shapes of the student's outputs on inputs of this form; the teacher's must be the same."""
    found = []
    for name, model in (("student", student), ("teacher", teacher)):
        if model is None:
            continue
        try:
            specs = keras.tree.map_structure(lambda each: keras.KerasTensor((None, *each.shape[1:]), each.dtype), x)
            found.append(model.compute_output_spec(specs))
        except Exception as error:  # layers raise anything
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the {name} does not take the training inputs ({first_line})") from error
    shapes = [keras.tree.map_structure(lambda each: tuple(each.shape), outputs) for outputs in found]
    if shapes[0] != shapes[-1]:
        raise ValueError(f"student and teacher must have the same outputs; got {shapes[0]} and {shapes[1]}")
    return [tuple(each.shape) for each in keras.tree.flatten(found[0])]
