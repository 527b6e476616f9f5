"""Fine-tuning on labels and on a teacher's outputs: `fcnn_utils.fine_tuning`, compared with formulas in NumPy."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

from fcnn_utils import _losses, calibration, compress, fine_tuning

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 6)).astype("float32")
CLASSES = RNG.integers(0, 5, 40)
PIXELS = np.full((40, 2, 3, 1), 255, "uint8")
ONE_HOT = np.eye(5, dtype="float32")[CLASSES]
QUIET = {"verbose": 0}


def linear(seed=0, activation="softmax", units=5):
    """A linear map with an activation, which can be computed by hand."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((6,)), layers.Dense(units, activation=activation)])


def flat():
    return keras.Sequential([keras.Input((2, 3, 1)), layers.Flatten(), layers.Dense(5, activation="softmax")])


def tuned_to_rows():
    """A student that is compiled for one-hot labels, with labels that are no classes."""
    student = linear()
    fine_tuning.fine_tune(student, (X, ONE_HOT), verbose=0)
    return student, (X, CLASSES + 3), {}


def scores(model):
    """The outputs of `linear` without its activation, in double precision."""
    kernel, bias = (weight.astype("float64") for weight in model.get_weights())
    return X @ kernel + bias


def softmax(z):
    powers = np.exp(z - z.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def loss_at_the_start(student, train=X, **options):
    """The loss of all images at rate 0, at which the student does not change."""
    options = QUIET | {"batch_size": 40, "learning_rate": 0.0} | options
    return fine_tuning.fine_tune(student, train, **options).history["loss"][0]


def assert_same(weights, others, **tolerance):
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(one, other, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))


# --- loss --------------------------------------------------------------------------------------------------------


def measured_distance(student, teacher, temperature, from_logits=None):
    """The distance of `_losses`, by what is found out about the two networks."""
    _, _, outputs, others = _losses.choose(student, teacher, [(None, 5)], None, None, from_logits)
    found, wanted = (model(X, training=False) for model in (student, teacher))
    return float(keras.ops.convert_to_numpy(_losses.distance(outputs, others, found, wanted, temperature)))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("ends", [("softmax", "softmax"), ("linear", "linear"), ("linear", "softmax")])
def test_distance_of_classifiers_is_the_divergence_of_softened_probabilities(ends, temperature):
    student, teacher = linear(1, ends[0]), linear(2, ends[1])
    p, q = (softmax(scores(model) / temperature) for model in (student, teacher))
    expected = temperature**2 * (q * np.log(q / p)).sum(axis=1).mean()
    from_logits = True if ends == ("linear", "linear") else None
    assert measured_distance(student, teacher, temperature, from_logits) == pytest.approx(expected, rel=1e-4)


def test_distance_of_sigmoids_is_that_of_two_classes_for_each_value():
    student, teacher, temperature = linear(1, "linear"), linear(2, "sigmoid"), 2.0
    p, q = (sigmoid(scores(model) / temperature) for model in (student, teacher))
    expected = temperature**2 * (q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))).mean()
    for end in ("linear", "sigmoid"):
        other = linear(1, end)
        assert measured_distance(other, teacher, temperature) == pytest.approx(expected, rel=1e-4)


def test_distance_of_values_is_the_mean_squared_error():
    student, teacher = linear(1, "linear"), linear(2, "linear")
    expected = ((scores(student) - scores(teacher)) ** 2).mean()
    assert measured_distance(student, teacher, 3.0) == pytest.approx(expected, rel=1e-4)


def test_loss_is_the_weighted_sum_of_labels_and_distance():
    student, teacher = linear(1), linear(2, "linear")
    p, q = (softmax(scores(model) / 3) for model in (student, teacher))
    divergence = 9 * (q * np.log(q / p)).sum(axis=1).mean()
    label_loss = -np.log(softmax(scores(student)))[np.arange(40), CLASSES].mean()
    options = {"teacher": teacher, "temperature": 3.0}
    found = loss_at_the_start(student, (X, CLASSES), distillation=0.3, **options)
    assert found == pytest.approx(0.7 * label_loss + 0.3 * divergence, rel=1e-4)
    assert loss_at_the_start(student, **options) == pytest.approx(divergence, rel=1e-4)  # it is compiled by now


def two_outputs(seed, regularizer=None):
    """A map of pixels to probabilities, and a mean."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4, 4, 3))
    maps = layers.Conv2D(5, 1, activation="softmax", kernel_regularizer=regularizer, name="maps")(inputs)
    mean = layers.Dense(2, name="mean")(layers.GlobalAveragePooling2D()(inputs))
    return keras.Model(inputs, {"maps": maps, "mean": mean})


def test_several_outputs_are_summed_and_regularization_keeps_its_weight():
    images = RNG.standard_normal((8, 4, 4, 3)).astype("float32")
    labels = {"maps": np.eye(5)[RNG.integers(0, 5, (8, 4, 4))], "mean": RNG.standard_normal((8, 2))}
    student, teacher = two_outputs(1, keras.regularizers.L2(0.1)), two_outputs(2)
    p, q = (model.predict(images, verbose=0) for model in (student, teacher))
    distance = (q["maps"] * np.log(q["maps"] / p["maps"])).sum(axis=-1).mean() + ((p["mean"] - q["mean"]) ** 2).mean()
    penalty = 0.1 * np.square(student.get_layer("maps").get_weights()[0]).sum()
    label_loss = (
        -(labels["maps"] * np.log(p["maps"])).sum(axis=-1).mean() + 2 * ((p["mean"] - labels["mean"]) ** 2).mean()
    )
    losses = {"maps": "categorical_crossentropy", "mean": "mse"}
    teacher.compile(loss=losses, loss_weights={"maps": 1.0, "mean": 2.0})
    found = loss_at_the_start(student, (images, labels), teacher=teacher, distillation=0.2)
    assert found == pytest.approx(0.8 * label_loss + 0.2 * distance + penalty, rel=1e-4)
    with pytest.raises(ValueError, match="2 outputs: give loss="):
        fine_tuning.fine_tune(two_outputs(1), (images, labels))


@pytest.mark.parametrize(
    ("end", "labels", "loss", "expected", "from_logits"),
    [
        ("softmax", CLASSES, None, keras.losses.SparseCategoricalCrossentropy, False),
        ("softmax", CLASSES[:, None].astype("float32"), None, keras.losses.SparseCategoricalCrossentropy, False),
        ("linear", CLASSES, None, keras.losses.SparseCategoricalCrossentropy, True),
        ("linear", ONE_HOT, None, keras.losses.CategoricalCrossentropy, True),
        ("softmax", 0.9 * ONE_HOT + 0.02, None, keras.losses.CategoricalCrossentropy, False),
        ("sigmoid", ONE_HOT, None, keras.losses.BinaryCrossentropy, False),
        ("linear", X[:, :5], None, keras.losses.MeanSquaredError, None),
        ("linear", ONE_HOT, "categorical_crossentropy", keras.losses.CategoricalCrossentropy, True),
        ("linear", ONE_HOT, "binary_crossentropy", keras.losses.BinaryCrossentropy, True),
        ("softmax", ONE_HOT, keras.losses.categorical_crossentropy, keras.losses.CategoricalCrossentropy, False),
    ],
)
def test_loss_fits_the_labels_and_the_end_of_the_network(end, labels, loss, expected, from_logits):
    found, _, (output,), _ = _losses.choose(linear(0, end), None, [(None, 5)], [labels], loss, None)
    assert type(found) is expected and found.get_config().get("from_logits") is from_logits
    assert from_logits is None or output.is_logits == from_logits


def test_loss_of_a_compiled_model_is_used_if_it_takes_the_labels():
    smooth = keras.losses.CategoricalCrossentropy(label_smoothing=0.3)
    teacher = linear(1)
    teacher.compile(loss=smooth)
    assert _losses.choose(linear(), teacher, [(None, 5)], [ONE_HOT], None, None)[0] is smooth
    found = _losses.choose(linear(), teacher, [(None, 5)], [CLASSES], None, None)[0]
    assert type(found) is keras.losses.SparseCategoricalCrossentropy
    student = linear()
    student.compile(loss="mae")
    assert _losses.choose(student, teacher, [(None, 5)], [ONE_HOT], None, None)[0] == "mae"


def test_end_of_a_network_is_found_behind_layers_that_keep_it_and_in_nested_models():
    inputs = keras.Input((6,))
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6), layers.Softmax()])
    first = layers.Activation("linear", dtype="float32")(layers.Dropout(0.1)(inner(inputs)))
    second = layers.Reshape((1, 6))(keras.ops.softmax(layers.Dense(6)(inputs)))
    third = layers.Reshape((3, 2))(layers.Activation("softmax")(inputs))  # its rows are no longer probabilities
    fourth = layers.Softmax(axis=1)(layers.Reshape((3, 2))(inputs))
    others = [layers.Dense(2, activation=end)(inputs) for end in ("sigmoid", "linear", "log_softmax", "relu")]
    model = keras.Model(inputs, [first, second, third, fourth, *others])
    expected = ["softmax", "softmax", None, None, "sigmoid", "linear", "linear", None]
    assert _losses.activations(model, 8) == expected


# --- steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [0.1, None])
def test_steps_are_those_of_clipped_descent_with_a_warm_up_and_a_cosine(clip_norm):
    """Two epochs of four steps on labels and a teacher, in double precision."""
    student, teacher, peak = linear(1), linear(2), 0.5
    weights, velocities = [w.astype("float64") for w in student.get_weights()], [0.0, 0.0]
    target = 0.5 * ONE_HOT + 0.5 * softmax(scores(teacher))
    for step in range(8):
        rate = peak * (step / 2 if step < 2 else (1 + np.cos(np.pi * (step - 2) / 6)) / 2)
        rows = slice(step % 4 * 10, step % 4 * 10 + 10)
        error = softmax(X[rows] @ weights[0] + weights[1]) - target[rows]
        gradients = [X[rows].T @ error / 10, error.mean(axis=0)]
        length = np.sqrt(sum((g**2).sum() for g in gradients))
        shorter = min(1.0, (clip_norm or np.inf) / length)
        velocities = [0.9 * v - rate * shorter * g for v, g in zip(velocities, gradients, strict=True)]
        weights = [w + 0.9 * v - rate * shorter * g for w, v, g in zip(weights, velocities, gradients, strict=True)]
    history = fine_tuning.fine_tune(
        student, (X, ONE_HOT), teacher=teacher, epochs=2, batch_size=10, learning_rate=peak, warmup=0.25,
        clip_norm=clip_norm, shuffle=False, **QUIET,
    )  # fmt: skip
    assert_same(student.get_weights(), weights)
    assert history.history.keys() == {"loss", "accuracy"} and history.epoch == [0, 1]


@pytest.mark.parametrize(("own", "momentum"), [(0.99, 1 - 3 / 8), (0.5, 0.5)])
def test_batch_norms_follow_a_short_training(own, momentum):
    """The same batch in eight steps: its mean is approached as by a moving average of this momentum."""
    norm = layers.BatchNormalization(momentum=own)
    student = keras.Sequential([keras.Input((6,)), norm, layers.Dense(5, activation="softmax")])
    fine_tuning.fine_tune(student, (X[:4] + 5, CLASSES[:4]), epochs=8, **QUIET)
    expected = (1 - momentum**8) * (X[:4] + 5).mean(axis=0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(norm.moving_mean), expected, rtol=1e-4)
    assert norm.momentum == own


class Batches(keras.utils.PyDataset):
    """The images in batches of ten, with labels or without."""

    def __init__(self, *arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return 4

    def __getitem__(self, number):
        part = tuple(array[10 * number : 10 * number + 10] for array in self.arrays)
        return part if len(part) > 1 else part[0]


def forever(*arrays):
    while True:
        yield from iter(Batches(*arrays))


def as_tf_dataset(*arrays):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0]).batch(10)


def as_loader(*arrays):
    torch = pytest.importorskip("torch")
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*map(torch.tensor, arrays)), batch_size=10)


@pytest.fixture(scope="module", params=["weighted", "unlabelled"])
def arrays_and_weights(request):
    """Arrays, and the weights of the student after two epochs on them."""
    arrays = (X, CLASSES, np.abs(X[:, 0])) if request.param == "weighted" else (X,)
    student = linear(1)
    train, options = arrays if len(arrays) > 1 else X, QUIET | {"teacher": linear(2), "shuffle": False}
    fine_tuning.fine_tune(student, train, epochs=2, batch_size=10, **options)
    return arrays, student.get_weights()


@pytest.mark.parametrize("make", [Batches, forever, as_tf_dataset, as_loader])
def test_every_form_of_the_data_trains_as_arrays_do(make, arrays_and_weights):
    arrays, weights = arrays_and_weights
    given, student = make(*arrays), linear(1)
    options = {forever: {"steps_per_epoch": 4}, Batches: {"shuffle": False}}.get(make, {})
    fine_tuning.fine_tune(student, given, teacher=linear(2), epochs=2, **options, **QUIET)
    assert_same(student.get_weights(), weights)
    assert np.abs(weights[0] - linear(1).get_weights()[0]).max() > 1e-4


# --- a factorized network ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.Dropout(0.2)(x)
    x = layers.Dense(5, activation="softmax")(layers.Flatten()(x))
    model = keras.Model(inputs, x)
    calibration.reestimate(model, IMAGES)
    model.get_layer("conv").trainable = False
    return model


IMAGES = RNG.standard_normal((64, 8, 8, 4)).astype("float32")


def factorized(dense):
    return compress.factorize(dense, "cp", ranks={"conv": 3}, verbose=0)[0]


def test_distillation_brings_the_student_nearer_and_leaves_the_teacher_alone(dense, tmp_path):
    """Unlabelled images; the teacher's batch norms and dropout are in inference mode. The saved student is plain."""
    student, before = factorized(dense), [np.array(weight) for weight in dense.get_weights()]
    trainable = [variable.trainable for variable in dense.variables]
    wanted = dense.predict(IMAGES, verbose=0)
    start = np.abs(student.predict(IMAGES, verbose=0) - wanted).mean()
    file = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    history = fine_tuning.fine_tune(
        student, IMAGES, teacher=dense, epochs=12, batch_size=16, learning_rate=0.1, callbacks=[file],
        validation_data=IMAGES, **QUIET,
    )  # fmt: skip
    end = student.predict(IMAGES, verbose=0)
    assert np.abs(end - wanted).mean() < 0.9 * start
    assert_same(dense.get_weights(), before, rtol=0, atol=0)
    assert [variable.trainable for variable in dense.variables] == trainable and not dense.compiled
    divergence = (wanted * np.log(wanted / end)).sum(axis=1).mean()
    assert history.history["val_loss"][-1] == pytest.approx(divergence, rel=1e-3)
    loaded = keras.saving.load_model(tmp_path / "12.keras")
    assert_same(loaded.get_weights(), student.get_weights(), rtol=0, atol=0)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in factorized(dense).layers]


def test_student_is_afterwards_an_ordinary_compiled_model(tmp_path):
    student = linear(1)
    fine_tuning.fine_tune(student, (X, CLASSES), teacher=linear(2), **QUIET)
    probabilities = softmax(scores(student))
    found = student.evaluate(X, CLASSES, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(-np.log(probabilities[np.arange(40), CLASSES]).mean(), rel=1e-4)
    assert found["accuracy"] == pytest.approx((probabilities.argmax(axis=1) == CLASSES).mean())
    student.save(tmp_path / "student.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = keras.saving.load_model(tmp_path / "student.keras")
    assert loaded.evaluate(X, CLASSES, verbose=0, return_dict=True) == pytest.approx(found, rel=1e-5)
    student.fit(X, CLASSES, epochs=2, verbose=0)  # its schedule starts anew
    assert np.abs(softmax(scores(student)) - probabilities).max() > 1e-4


def test_second_fine_tuning_learns_from_its_own_teacher():
    student, teachers = linear(0), [linear(1), linear(2)]
    for teacher in teachers:
        p, q = softmax(scores(student)), softmax(scores(teacher))
        assert loss_at_the_start(student, teacher=teacher) == pytest.approx(
            (q * np.log(q / p)).sum(axis=1).mean(), 1e-4
        )


def test_early_stopping_gives_the_student_its_best_weights_back():
    """The weights are ruined in the middle, and the rate is too small to repair them."""
    student, teacher = linear(1), linear(2)

    def ruin(epoch, logs):
        if epoch == 2:
            student.set_weights([3 * weight for weight in student.get_weights()])

    stop = keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    history = fine_tuning.fine_tune(
        student, X, teacher=teacher, epochs=9, learning_rate=1e-3, validation_data=X,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_begin=ruin), stop], **QUIET,
    )  # fmt: skip
    losses = history.history["val_loss"]
    p, q = softmax(scores(student)), softmax(scores(teacher))
    assert len(losses) == 4 and losses[2] > 1.1 * losses[1]
    assert (q * np.log(q / p)).sum(axis=1).mean() == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_trains(precision):
    """The first loss is that of float32 but for rounding, and it falls."""
    policy, teacher = keras.config.dtype_policy(), linear(2)
    keras.config.set_dtype_policy(precision)
    student = linear(1)
    keras.config.set_dtype_policy(policy)
    p, q = softmax(scores(student)), softmax(scores(teacher))
    expected = (0.5 * q * np.log(q / p) - 0.5 * ONE_HOT * np.log(p)).sum(axis=1).mean()
    options = {"teacher": teacher, "epochs": 12, "learning_rate": 0.1}
    losses = fine_tuning.fine_tune(student, (X, CLASSES), **options, **QUIET).history["loss"]
    assert losses[0] == pytest.approx(expected, rel=2e-2) and losses[-1] < 0.9 * losses[0]


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_divergence_is_reported_and_gives_the_student_its_weights_back():
    student, images = linear(1), X.copy()
    before = [np.array(weight) for weight in student.get_weights()]
    images[25] = np.nan  # in the third batch
    with pytest.raises(fine_tuning.Diverged, match="the loss is nan at epoch 1, step 3: try a lower .* from before"):
        fine_tuning.fine_tune(student, (images, CLASSES), teacher=linear(2), batch_size=10, shuffle=False, **QUIET)
    assert_same(student.get_weights(), before, rtol=0, atol=0)
    images[25], images[35] = X[25], 1e38  # the last step itself ruins the weights
    with pytest.raises(fine_tuning.Diverged, match="epoch 1.* from before"):
        fine_tuning.fine_tune(student, (images, CLASSES), learning_rate=100.0, clip_norm=None, batch_size=10,
                              shuffle=False, **QUIET)  # fmt: skip
    assert_same(student.get_weights(), before, rtol=0, atol=0)
    student.fit(X, CLASSES, verbose=0)
    assert np.isfinite(student.get_weights()[0]).all()


def shared():
    teacher = linear(1)
    return keras.Model(teacher.inputs, teacher.outputs), X, {"teacher": teacher}


def frozen():
    student = linear()
    student.trainable = False
    return student, (X, CLASSES), {}


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(5)

    def call(self, x):
        return self.dense(x)


def subclassed():
    model = Subclassed()
    model(X)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (linear(), X, {}), "nothing to learn from"),
        (lambda: (linear(), (X, CLASSES), {"distillation": 0.5}), "distillation is 0.5, and there is no teacher"),
        (lambda: (linear(), X, {"teacher": linear(1), "distillation": 0.5}), "without labels distillation must be 1"),
        (lambda: (linear(), X, {"teacher": linear(1), "metrics": ["mse"]}), "metrics need labels"),
        (lambda: (linear(), X, {"teacher": linear(1, units=4)}), "must have the same outputs; got .*5.* and .*4"),
        (lambda: (linear(), X[:, :4], {"teacher": linear(1)}), "the student does not take the training inputs"),
        (lambda: (linear(), forever(X, CLASSES), {}), "batches in this generator is not known.*steps_per_epoch="),
        (lambda: (linear(), iter(()), {"steps_per_epoch": 1}), "at least one batch"),
        (lambda: (linear(), 7, {"steps_per_epoch": 1}), "train must be arrays.*got a int"),
        (lambda: (linear(), Batches(X, CLASSES), {"batch_size": 8}), "batch_size is for arrays"),
        (lambda: (linear(), (X, list(CLASSES)), {}), "convert lists of numbers"),
        (lambda: (linear(), (X, CLASSES[:30]), {}), r"the same number of rows.*\[40, 30\]"),
        (lambda: (linear(), (X, CLASSES + 3), {}), "values from 3 to .*, do not fit .*, or labels from 0 to 4"),
        (lambda: (linear(), (X, CLASSES.astype(str)), {}), "labels must be numbers.*got text or objects .<U"),
        (lambda: (flat(), (PIXELS, CLASSES), {}), "images are whole numbers .uint8.*normalise them"),
        (lambda: (flat(), (PIXELS / 255, CLASSES), {"validation_data": (PIXELS, CLASSES)}),
         "validation images are whole numbers .uint8"),
        (lambda: (linear(), (X, CLASSES), {"validation_data": (X, CLASSES.astype(str))}), "labels must be numbers"),
        (lambda: (linear(), (X, CLASSES), {"validation_data": (X, CLASSES + 3)}),
         "the validation labels, .* with values from 3 to 7, do not fit .* sparse_categorical_crossentropy"),
        (lambda: (linear(), (X, CLASSES), {"validation_data": (X, ONE_HOT)}), "the validation labels.*do not fit"),
        (lambda: (linear(), (X, ONE_HOT), {"validation_data": (X, CLASSES)}), "the validation labels.*do not fit"),
        (lambda: (linear(), (X, CLASSES), {"validation_data": (X, CLASSES[:9])}), r"same number of rows.*\[40, 9\]"),
        (lambda: (linear(), (X, CLASSES), {"validation_data": X}), r"validation_data must be \(x, y\), "),
        (tuned_to_rows, "values from 3 to 7, do not fit .*, or labels from 0 to 4"),
        (lambda: (linear(0, "linear", 1), (X, CLASSES % 2), {}), "give loss=, such as 'mse' or"),
        (lambda: (linear(), (X, CLASSES), {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}),
         "from_logits=True, but the student ends in probabilities"),
        (lambda: (subclassed(), (X, CLASSES), {}), "graph does not show a last activation"),
        (lambda: (linear(), (X, CLASSES), {"epochs": 0}), "epochs must be a whole number"),
        (lambda: (linear(), (X, CLASSES), {"initial_epoch": 1}), "argument of fit must be one of class_weight"),
        (lambda: (Subclassed(), (X, CLASSES), {}), "is not built"),
        (lambda: ("model", (X, CLASSES), {}), "student must be a built keras.Model; got str"),
        (shared, "share weights"),
        (frozen, "no trainable weights"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make, message):
    student, train, options = make()
    with pytest.raises(ValueError, match=message):
        fine_tuning.fine_tune(student, train, **options)


def test_inputs_of_whole_numbers_are_matched_by_their_names():
    """A dict is flattened in the order of its names, which is not that of the model's inputs."""
    words, numbers = keras.Input((4,), name="words", dtype="int32"), keras.Input((2, 3, 1), name="a picture")
    x = layers.Concatenate()([layers.Flatten()(layers.Embedding(10, 2)(words)), layers.Flatten()(numbers)])
    model = keras.Model([words, numbers], layers.Dense(5, activation="softmax")(x))
    train = {"words": RNG.integers(0, 10, (40, 4)), "a picture": RNG.standard_normal((40, 2, 3, 1)).astype("float32")}
    assert len(fine_tuning.fine_tune(model, (train, CLASSES), verbose=0).epoch) == 1
    with pytest.raises(ValueError, match="images are whole numbers"):
        fine_tuning.fine_tune(model, (train | {"a picture": PIXELS}, CLASSES), verbose=0)


def test_a_class_that_the_loss_ignores_may_be_in_the_labels():
    student, labels = linear(), np.where(np.arange(40) % 3, CLASSES, 255)
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=255)
    for given in ({"loss": loss}, {}):  # the second time it is that of the compiled student
        fine_tuning.fine_tune(student, (X, labels), validation_data=(X, labels), metrics=[], verbose=0, **given)
        assert student.loss is loss


@pytest.mark.parametrize(("factor", "warned"), [(1, False), (255, True)])
def test_images_on_another_scale_than_in_training_are_told(factor, warned):
    x = RNG.uniform(0, 1, (200, 8, 8, 3)).astype("float32")
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(name="norm"), layers.Flatten(),
         layers.Dense(5, activation="softmax")]
    )  # fmt: skip
    calibration.reestimate(model, x)
    given = factor * x, RNG.integers(0, 5, 200)
    for options in ({}, {"validation_data": given}):
        train = given if not options else (x, given[1])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fine_tuning.fine_tune(model, train, verbose=0, learning_rate=0.0, **options)
        assert any("at 'norm' the standard deviation" in str(each.message) for each in told) == warned
        calibration.reestimate(model, x)


def test_subclassed_models_train_if_they_say_what_they_end_in():
    student, teacher = subclassed(), linear(2)
    p, q = softmax(scores(student)), softmax(scores(teacher))
    expected = (0.5 * q * np.log(q / p) - 0.5 * ONE_HOT * np.log(p)).sum(axis=1).mean()
    found = loss_at_the_start(student, (X, CLASSES), teacher=teacher, from_logits=True)
    assert found == pytest.approx(expected, rel=1e-4)
