"""What networks said, kept beside their records: `fcnn_utils.course.predictions`."""

import numpy as np
import pytest

from fcnn_utils.course import metrics, predictions, records

RECORD = {"dataset": "standin", "model": "tiny", "recipe": {"name": "fast"}, "seed": 3}


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The project's folder, an empty one."""
    monkeypatch.setattr(records, "ROOT", tmp_path / "project")
    return tmp_path / "project"


def drawn(seed=0, count=2000, classes=100, spread=3.0):
    """Probabilities (count, classes), from nearly certain to nearly even."""
    scores = spread * np.random.default_rng(seed).standard_normal((count, classes))
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


# --- basic -------------------------------------------------------------------------------------------------------


def test_what_was_kept_is_read_as_members_of_an_ensemble():
    first, second = ({"validation": drawn(seed, 20), "test": drawn(seed + 10, 30)} for seed in (0, 1))
    predictions.keep(RECORD, 0, first)
    predictions.keep(RECORD, 1, second)
    predictions.finish(RECORD)
    read = predictions.load("standin", "tiny", "fast", 3)
    assert {split: members.shape for split, members in read.items()} == {
        "validation": (2, 20, 100),
        "test": (2, 30, 100),
    }
    for number, said in enumerate((first, second)):
        for split in said:
            np.testing.assert_array_equal(read[split][number], predictions.decoded(predictions.coded(said[split])))


def test_a_cycle_that_is_gone_through_again_takes_its_place():
    for number, seed in ((0, 0), (1, 1), (1, 2)):  # stopped after the predictions, before the checkpoint
        predictions.keep(RECORD, number, {"test": drawn(seed, 10)})
    predictions.finish(RECORD)
    read = predictions.load("standin", "tiny", "fast", 3)["test"]
    np.testing.assert_array_equal(read, predictions.decoded([predictions.coded(drawn(seed, 10)) for seed in (0, 2)]))


def test_a_run_that_is_not_complete_leaves_what_an_earlier_one_said():
    predictions.keep(RECORD, 0, {"test": drawn(0, 10)})
    assert predictions.load("standin", "tiny", "fast", 3) is None
    predictions.finish(RECORD)
    predictions.finish(RECORD)  # a run that was stopped in between finishes again
    earlier = predictions.load("standin", "tiny", "fast", 3)["test"]
    predictions.keep(RECORD, 0, {"test": drawn(1, 20)})
    np.testing.assert_array_equal(predictions.load("standin", "tiny", "fast", 3)["test"], earlier)
    predictions.finish(RECORD)
    assert predictions.load("standin", "tiny", "fast", 3)["test"].shape == (1, 20, 100)


def test_what_was_not_kept_is_none():
    assert predictions.load("standin", "tiny", "fast", 4) is None


def test_a_damaged_file_is_named(output):
    path = records.path_of("standin", "tiny", "fast", 3).with_suffix(".predictions.npz")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="seed3.predictions.npz is damaged .*; delete it and train again"):
        predictions.load("standin", "tiny", "fast", 3)


# --- correct -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 20.0])
def test_the_likeliest_class_stays_the_likeliest(spread):
    said = drawn(spread=spread)
    np.testing.assert_array_equal(predictions.decoded(predictions.coded(said)).argmax(axis=1), said.argmax(axis=1))


def test_of_two_nearly_equal_classes_the_likelier_stays_ahead():
    said = np.array([[0.3333, 0.3334, 0.3333], [0.4, 0.1999, 0.4001], [0.5, 0.5, 0.0]])
    assert predictions.decoded(predictions.coded(said)).argmax(axis=1).tolist() == [1, 2, 0]


@pytest.mark.parametrize("classes, finer", [(21, 1), (20, 256), (2, 256)])
def test_the_error_is_as_small_as_it_is_said_to_be(classes, finer):
    """Before they are made to sum to one: (0.3 − ln p) / 24 of p; with more levels so many times less."""
    for p, most in ((0.9, 0.02), (0.2, 0.08), (0.001, 0.3)):
        near = p * np.exp(np.linspace(-1.1, 1.1, 20_001) * most)  # a step and more
        codes = predictions.coded(np.stack([near, *np.zeros((classes - 1, len(near)))], axis=1))[:, 0]
        errors = np.abs(np.log(near) + 0.3 * np.expm1(codes / 12 / finer)) * finer
        assert 0.8 * most < errors.max() < 1.1 * most


def test_of_few_classes_the_area_under_the_curve_is_that_of_the_network():
    said, labels = drawn(classes=2, spread=1.0), np.random.default_rng(1).integers(0, 2, 2000)
    assert abs(metrics.auc(predictions.decoded(predictions.coded(said)), labels) - metrics.auc(said, labels)) < 1e-5


def test_they_sum_to_one_and_certainty_is_kept():
    said = predictions.decoded(predictions.coded(np.array([[1.0, 0.0], [0.5, 0.5], [1e-30, 1.0]])))
    np.testing.assert_allclose(said.sum(axis=1), 1)
    assert said[0, 0] > 1 - 1e-6 and said[1].tolist() == [0.5, 0.5] and said[2, 1] > 1 - 1e-6
