"""Predictions kept beside the records: `fcnn_utils.course.predictions`."""

import numpy as np
import pytest

from fcnn_utils.course import metrics, predictions, records

pytestmark = pytest.mark.usefixtures("course_folder")
RECORD = {"dataset": "standin", "model": "tiny", "recipe": {"name": "fast"}, "seed": 3}


def drawn(seed=0, count=2000, classes=100, spread=3.0):
    """Random probabilities (count, classes), from nearly certain to nearly even."""
    scores = spread * np.random.default_rng(seed).standard_normal((count, classes))
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def rounded(probabilities):
    return predictions.decode(predictions.encode(probabilities))


# --- files -------------------------------------------------------------------------------------------------------


def test_predictions_of_all_cycles_are_read_back():
    cycles = [{"validation": drawn(seed, 20), "test": drawn(seed + 10, 30)} for seed in (0, 1)]
    for number, said in enumerate(cycles):
        predictions.keep(RECORD, number, said)
    assert predictions.load("standin", "tiny", "fast", 3) is None  # the run is not complete
    predictions.finish(RECORD)
    read = predictions.load("standin", "tiny", "fast", 3)
    assert {split: array.shape for split, array in read.items()} == {"validation": (2, 20, 100), "test": (2, 30, 100)}
    for number, said in enumerate(cycles):
        for split in said:
            np.testing.assert_array_equal(read[split][number], rounded(said[split]))


def test_cycle_that_is_repeated_replaces_its_predictions():
    for number, seed in ((0, 0), (1, 1), (1, 2)):  # stopped after the predictions, before the checkpoint
        predictions.keep(RECORD, number, {"test": drawn(seed, 10)})
    predictions.finish(RECORD)
    read = predictions.load("standin", "tiny", "fast", 3)["test"]
    np.testing.assert_array_equal(read, [rounded(drawn(seed, 10)) for seed in (0, 2)])


def test_incomplete_run_keeps_the_predictions_of_an_earlier_one():
    predictions.keep(RECORD, 0, {"test": drawn(0, 10)})
    predictions.finish(RECORD)
    predictions.finish(RECORD)  # a run that was stopped in between finishes again
    earlier = predictions.load("standin", "tiny", "fast", 3)["test"]
    predictions.keep(RECORD, 0, {"test": drawn(1, 20)})
    np.testing.assert_array_equal(predictions.load("standin", "tiny", "fast", 3)["test"], earlier)
    predictions.finish(RECORD)
    assert predictions.load("standin", "tiny", "fast", 3)["test"].shape == (1, 20, 100)


def test_damaged_file_is_named():
    path = records.path_of("standin", "tiny", "fast", 3).with_suffix(".predictions.npz")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="seed3.predictions.npz is damaged .*; delete it and train again"):
        predictions.load("standin", "tiny", "fast", 3)


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
