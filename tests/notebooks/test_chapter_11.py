"""Chapter 11, train it yourself: its pipeline and schedule, its exercises, and that it runs without the course."""

import sys

import keras
import nbformat
import numpy as np
import pytest

from fcnn_utils.course import networks, runner

CHAPTER = "11"
PARAMETERS = {"DATASET": "standin", "LIVE_IMAGES": 640, "EPOCHS": 2}
WRONG = {
    "11.1": [[391, 48], [390, 0], 390],
    "11.2": [
        lambda step, peak, warmup, total: peak * min(step / warmup, 1 - step / total),
        lambda step, peak, warmup, total: peak * (1 + np.cos(np.pi * step / total)) / 2,
    ],
    "11.3": [
        lambda image, y, x, size: np.zeros_like(image),
        lambda image, y, x, size: image[y : y + size, x : x + size] * 0,
    ],
    "11.4": [[6], 59.6, 32, 2**24],
}


def test_batches_are_augmented_images_with_their_labels(chapter):
    batches, mean, deviation = chapter["batches"], chapter["mean"], chapter["deviation"]
    x, y = batches[0]
    assert len(batches) == 10 and x.shape == (64, 32, 32, 3)
    for image, label, source in zip(x, y, batches.order[:64], strict=True):
        assert label == chapter["y_train"][source]
        padded = np.pad((chapter["x_train"][source] - mean) / deviation, ((2, 2), (2, 2), (0, 0)))
        moved = [padded[dy : dy + 32, dx : dx + 32] for dy in range(5) for dx in range(5)]
        assert any(np.array_equal(image, each) or np.array_equal(image, each[:, ::-1]) for each in moved)
    assert len({image.tobytes() for image in chapter["augment"](np.repeat(x[:1], 50, axis=0), chapter["rng"])}) > 20
    assert sorted(batches.order) == list(range(640))


def test_network_is_the_simple_one_with_a_quarter_of_the_filters(chapter):
    narrow = networks.build("simple", width=0.25)
    assert [each.shape for each in chapter["build"]().weights] == [each.shape for each in narrow.weights]


def test_training_uses_the_schedule_of_the_text(chapter):
    rates = [chapter["rate_at"](step) for step in range(chapter["total"])]
    assert max(rates) == pytest.approx(chapter["PEAK"]) and np.argmax(rates) == chapter["warmup"] == 4
    model = chapter["model"]
    assert int(model.optimizer.iterations) == chapter["total"] == 20
    assert float(model.optimizer.learning_rate) == pytest.approx(0, abs=1e-6)  # the schedule is at its end
    assert chapter["live"].accuracies == [100 * each for each in chapter["history"].history["accuracy"]]
    assert len(chapter["losses"]) == 40 and abs(chapter["losses"][0] - np.log(100)) < 1


def test_result_is_that_of_the_test_images(chapter):
    right = chapter["probabilities"].argmax(axis=1) == chapter["y_test"]
    assert chapter["accuracy"] == pytest.approx(100 * right.mean()) and len(right) == len(chapter["x_test"])
    assert "(epochs: 2, images: 640)" in chapter["rows"][0] and "3 seeds, standard deviation 0.1" in chapter["rows"][1]


def test_notebook_runs_without_the_course_and_without_a_network(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcnn_utils.course", None)
    monkeypatch.setattr(keras.datasets.cifar100, "load_data", lambda: (_ for _ in ()).throw(OSError("no network")))
    variables = {"__name__": "__main__"}
    for cell in nbformat.read(runner.notebooks()["11"], 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, variables)
            if "parameters" in cell.metadata.get("tags", []):
                variables.update(LIVE_IMAGES=320, EPOCHS=1)
    printed = capsys.readouterr().out
    assert "GENERATED images instead" in printed and "% of 1,000 test images are right" in printed
    assert "answers are checked only if the course is installed" in printed
    assert variables["rows"] == [f"yours: {variables['accuracy']:.1f}% (epochs: 1, images: 320)"]


def test_exercises(check_exercises):
    check_exercises(WRONG)
