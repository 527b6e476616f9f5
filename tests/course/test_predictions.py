"""Predictions kept beside the records: `fcnn_utils.course.predictions`."""

import numpy as np
import pytest

from fcnn_utils.course import metrics, predictions, records

pytestmark = pytest.mark.usefixtures("course_folder")
FIGURES = {"cross_entropy": 0.25, "top1": 0.5, "top5": 1, "seconds": 0.5, "ms_per_step": 2.0, "loss": 1.0}
RECORD = {
    **{"status": "complete", "dataset": "standin", "model": "tiny", "seed": 3, "fingerprint": "f", "stand_in": True},
    **{"device": "CPU", "cores": 2, "backend": "jax", "versions": {"keras": "3.15"}, "precision": "float32"},
    **{"date": "2026-01-02", "train_images": 9, "params": 10, "trainable": 10, "macs": 20},
    **{"recipe": {"name": "fast", "epochs": 1}, "epochs": [FIGURES | {"epoch": 1}], "test": None},
}


def drawn(seed=0, count=2000, classes=100, spread=3.0):
    """Random probabilities (count, classes), from nearly certain to nearly even."""
    scores = spread * np.random.default_rng(seed).standard_normal((count, classes))
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def rounded(probabilities):
    return predictions.decode(predictions.encode(probabilities))


def finish(cycles=1, test=10, validation=None, classes=100):
    """Complete the run with the results of so many images; return the path of its predictions."""
    result = {"loss": 1.0, "top1": 0.5, "top5": 0.5, "correct_by_class": [0] * classes}
    epoch = FIGURES | {"epoch": 1} | ({"validation": result | {"images": validation}} if validation else {})
    done = {
        "recipe": {"name": "fast", "epochs": 1, "cycles": cycles},
        "epochs": [epoch],
        "test": result | {"images": test},
    }
    predictions.finish(RECORD)
    return records.write(RECORD | done).with_suffix(".predictions.npz")


# --- files -------------------------------------------------------------------------------------------------------


def test_predictions_of_all_cycles_are_read_back():
    cycles = [{"validation": drawn(seed, 20), "test": drawn(seed + 10, 30)} for seed in (0, 1)]
    for number, said in enumerate(cycles):
        predictions.keep(RECORD, number, said)
    assert predictions.load("standin", "tiny", "fast", 3) is None  # the run is not complete
    finish(2, 30, 20)
    read = predictions.load("standin", "tiny", "fast", 3)
    assert {split: array.shape for split, array in read.items()} == {"validation": (2, 20, 100), "test": (2, 30, 100)}
    for number, said in enumerate(cycles):
        for split in said:
            np.testing.assert_array_equal(read[split][number], rounded(said[split]))


def test_cycle_that_is_repeated_replaces_its_predictions():
    for number, seed in ((0, 0), (1, 1), (1, 2)):  # stopped after the predictions, before the checkpoint
        predictions.keep(RECORD, number, {"test": drawn(seed, 10)})
    finish(2)
    read = predictions.load("standin", "tiny", "fast", 3)["test"]
    np.testing.assert_array_equal(read, [rounded(drawn(seed, 10)) for seed in (0, 2)])


def test_incomplete_run_keeps_the_predictions_of_an_earlier_one():
    predictions.keep(RECORD, 0, {"test": drawn(0, 10)})
    finish()
    finish()  # a run that was stopped in between finishes again
    earlier = predictions.load("standin", "tiny", "fast", 3)["test"]
    predictions.keep(RECORD, 0, {"test": drawn(1, 20)})
    np.testing.assert_array_equal(predictions.load("standin", "tiny", "fast", 3)["test"], earlier)
    finish(test=20)
    assert predictions.load("standin", "tiny", "fast", 3)["test"].shape == (1, 20, 100)


CODES = predictions.encode(drawn(0, 10))[None]
DAMAGED = {
    "no archive": b"PK no archive",
    "nothing": {},
    "no test": {"validation": CODES},
    "another split": {"test": CODES, "train": CODES},
    "one cycle": {"test": CODES[0]},
    "no images": {"test": CODES[:, :0]},
    "probabilities": {"test": np.full((1, 10, 100), 0.01)},
    "finer codes": {"test": CODES.astype("uint16")},
    "codes too large": {"test": CODES + 200},
    "objects": {"test": np.full((1, 10, 100), None)},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_named(content):
    predictions.keep(RECORD, 0, {"test": drawn(0, 10)})
    path = finish()
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    with pytest.raises(ValueError, match="seed3.predictions.npz is damaged .*; delete it and train again") as error:
        predictions.load("standin", "tiny", "fast", 3)
    assert "pickle" not in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "other", [{"cycles": 2}, {"test": 11}, {"classes": 99}, {"test": 10, "validation": 10}], ids=str
)
def test_predictions_that_do_not_agree_with_the_record_are_refused(other):
    predictions.keep(
        RECORD, 0, {"test": drawn(0, 10), **({"validation": drawn(1, 9)} if "validation" in other else {})}
    )
    finish(**other)
    with pytest.raises(ValueError, match=r"predictions, but the run's record has \(.*\); delete both and train again"):
        predictions.load("standin", "tiny", "fast", 3)


def test_run_goes_on_only_with_the_predictions_of_the_cycles_before():
    predictions.check_kept(RECORD, 0)
    with pytest.raises(ValueError, match="lacks predictions of earlier cycles; delete .*checkpoint.npz to train anew"):
        predictions.check_kept(RECORD, 1)
    predictions.keep(RECORD, 0, {"test": drawn(0, 10)})
    predictions.check_kept(RECORD, 1)
    with pytest.raises(ValueError, match="lacks predictions"):
        predictions.check_kept(RECORD, 2)
    for other in ({"test": drawn(0, 11)}, {"test": drawn(0, 10), "validation": drawn(0, 10)}):
        with pytest.raises(ValueError, match="is of other images or classes"):
            predictions.keep(RECORD, 1, other)


# --- codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 20.0])
def test_most_probable_class_is_kept(spread):
    said = drawn(spread=spread)
    np.testing.assert_array_equal(rounded(said).argmax(axis=1), said.argmax(axis=1))


def test_more_probable_of_two_nearly_equal_classes_is_kept():
    said = np.array([[0.3333, 0.3334, 0.3333], [0.4, 0.1999, 0.4001], [0.5, 0.5, 0.0]])
    assert rounded(said).argmax(axis=1).tolist() == [1, 2, 0]


@pytest.mark.parametrize("classes, finer", [(21, 1), (20, 256), (2, 256)])
def test_rounding_error_is_as_documented(classes, finer):
    """Before normalisation the relative error is (0.3 − ln p) / 24, half a step; with finer steps less."""
    for p, most in ((0.9, 0.02), (0.2, 0.08), (0.001, 0.3)):
        near = p * np.exp(np.linspace(-1.1, 1.1, 20_001) * most)  # more than one step
        codes = predictions.encode(np.stack([near, *np.zeros((classes - 1, len(near)))], axis=1))[:, 0]
        errors = np.abs(np.log(near) + 0.3 * np.expm1(codes / 12 / finer)) * finer
        assert 0.8 * most < errors.max() < 1.1 * most


def test_area_under_the_curve_of_few_classes_is_kept():
    said, labels = drawn(classes=2, spread=1.0), np.random.default_rng(1).integers(0, 2, 2000)
    assert abs(metrics.auc(rounded(said), labels) - metrics.auc(said, labels)) < 1e-5


def test_decoded_probabilities_sum_to_one_and_keep_certainty():
    said = rounded(np.array([[1.0, 0.0], [0.5, 0.5], [1e-30, 1.0]]))
    np.testing.assert_allclose(said.sum(axis=1), 1)
    assert said[0, 0] > 1 - 1e-6 and said[1].tolist() == [0.5, 0.5] and said[2, 1] > 1 - 1e-6
