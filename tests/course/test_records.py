"""Run records and kept measurements: `fcnn_utils.course.records`."""

import errno
import json
from unittest.mock import Mock

import pandas as pd
import pytest

from fcnn_utils import _files
from fcnn_utils.course import paths, records


def record(dataset="cifar100", model="simple", recipe="fast", seed=0, status="complete", top1=0.5):
    """A record with the entries that readers rely on."""
    figures = {"cross_entropy": 0.25, "top1": 0.5, "top5": 1, "seconds": 0.5, "ms_per_step": 2.0}
    result = {"top1": top1, "top5": 0.8, "loss": 2.5, "images": 4, "correct_by_class": [2, 0]}
    return {
        **{"status": status, "dataset": dataset, "model": model, "seed": seed, "fingerprint": "f", "stand_in": False},
        **{"device": "CPU", "cores": 2, "backend": "jax", "versions": {"keras": "3.15"}, "precision": "float32"},
        **{"date": "2026-01-02", "train_images": 9, "params": 10, "trainable": 10, "macs": 20},
        "recipe": {"name": recipe, "epochs": 2},
        "epochs": [{"epoch": 1, "loss": 0.1 + 0.2, **figures}, {"epoch": 2, "loss": 1e-17, **figures}],
        "test": result if status == "complete" else None,
    }


def without(key):
    return {name: value for name, value in (record() | {"schema": 1}).items() if name != key}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- runs --------------------------------------------------------------------------------------------------------


def test_folders_are_the_output_then_the_course_each_once(course_folder, output, monkeypatch):
    assert records.folders() == [output / "results", course_folder / "results"]
    monkeypatch.setenv("FCNN_OUTPUT", str(course_folder))
    assert records.folders() == [course_folder / "results"]
    monkeypatch.setattr(paths, "root", lambda: None)  # an installed package
    assert records.folders() == [course_folder / "results"]


def test_nothing_is_found_in_empty_folders(course_folder):
    with pytest.raises(ValueError, match="nowhere.json"):
        records.read("nowhere.json")
    assert records.lookup("cifar100", "simple", "fast", 0) == (None, None)
    assert records.load("speed") == (None, None)
    frame = records.find(model="simple")
    assert len(frame) == 0 and {"dataset", "model", "recipe", "seed", "status", "top1", "record"} <= set(frame)


def test_record_is_read_back_from_the_path_that_names_the_run(output, course_folder, tmp_path):
    path = records.write(record(seed=3))
    assert path == output / "results" / "cifar100" / "simple" / "fast" / "seed3.json"
    assert files(output) == ["results/cifar100/simple/fast/seed3.json"]
    assert records.read(path) == record(seed=3) | {"schema": 1}
    assert records.lookup("cifar100", "simple", "fast", 3) == (records.read(path), path)
    assert records.write(record(), tmp_path / "other") == tmp_path / "other/cifar100/simple/fast/seed0.json"


@pytest.mark.parametrize("status", ["running", "diverged"])
def test_partial_record_does_not_replace_the_complete_one(course_folder, status):
    partial = records.write(record(status=status))
    assert records.lookup("cifar100", "simple", "fast", 0) == (None, None)
    complete = records.write(record(top1=0.25))
    assert records.write(record(status=status)) == partial == complete.with_name("seed0.partial.json")
    assert records.read(complete)["test"]["top1"] == 0.25 and records.read(partial)["status"] == status
    assert records.lookup("cifar100", "simple", "fast", 0)[1] == complete
    partial.rename(complete)  # the entry counts, not the name of the file
    assert records.lookup("cifar100", "simple", "fast", 0) == (None, None)


def test_write_rejects_numbers_that_are_not_finite(output):
    with pytest.raises(ValueError, match="JSON"):
        records.write(record(top1=float("nan")))
    assert files(output.parent) == []


def test_failed_write_keeps_the_complete_record(course_folder, monkeypatch):
    path = records.write(record(top1=0.25))
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(ValueError, match="disk is full"):
        records.write(record(top1=0.75))
    assert records.read(path)["test"]["top1"] == 0.25


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"dataset": "cifar100"}, [0, 1, 2, 3]),
        ({"model": "wider_separable"}, [3]),
        ({"recipe": "thesis"}, [2]),
        ({"seed": 0}, [0, 2, 3, 4]),
        ({"status": "running"}, [5]),
        ({"status": None}, [0, 1, 2, 3, 4, 5]),
        ({"dataset": "cifar100", "model": "simple", "recipe": "fast"}, [0, 1]),
        ({"dataset": "mnist"}, []),
    ],
    ids=str,
)
def test_find_filters_by_each_column_and_sorts(course_folder, wanted, expected):
    runs = [
        record("cifar100", "simple", "fast", 0),
        record("cifar100", "simple", "fast", 1),
        record("cifar100", "simple", "thesis", 0),
        record("cifar100", "wider_separable", "fast", 0),
        record("standin", "simple", "fast", 0),
        record("standin", "simple", "fast", 1, "running"),
    ]
    for run in reversed(runs):
        records.write(run)
    assert records.find(**wanted)["record"].tolist() == [runs[number] | {"schema": 1} for number in expected]


def test_find_has_the_entries_of_a_record_as_columns(course_folder):
    path = records.write(record(seed=4, top1=0.25))
    row = records.find().iloc[0].to_dict()
    assert row.pop("record") == records.read(path)
    named = ("dataset", "model", "seed", "status", "params", "macs")
    expected = {key: record(seed=4)[key] for key in named}
    results = {"top1": 0.25, "top5": 0.8, "loss": 2.5}
    assert row == expected | results | {"recipe": "fast", "epochs": 2, "path": str(path)}


def test_nearest_folder_wins(course_folder, output):
    far = records.write(record(top1=0.9), course_folder / "results")
    records.write(record(seed=1, top1=0.7), course_folder / "results")
    assert records.lookup("cifar100", "simple", "fast", 0)[1] == far
    near = records.write(record(top1=0.1))
    assert records.lookup("cifar100", "simple", "fast", 0)[1] == near
    assert records.find()["top1"].tolist() == [0.1, 0.7]
    assert records.find(where=[course_folder / "results", output / "results"])["top1"].tolist() == [0.9, 0.7]
    assert records.find(where=[output / "results"])["top1"].tolist() == [0.1]


EPOCH, RESULT = record()["epochs"][0], record()["test"]
DAMAGED = {
    "truncated": json.dumps(record() | {"schema": 1}).encode()[:100],
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "nested": b"[" * 100_000,
    "another object": {"schema": 1, "status": "complete"},
    "another schema": record() | {"schema": 2},
    **{f"no {key}": without(key) for key in without("schema")},
    "name as recipe": record() | {"recipe": "fast"},
    "nameless recipe": record() | {"recipe": {"epochs": 2}},
    "text as seed": record() | {"seed": "0"},
    "true as seed": record() | {"seed": True},
    "no version of Keras": record() | {"versions": {}},
    "unknown status": record() | {"status": "done"},
    "no epochs": record() | {"epochs": []},
    "number as epoch": record() | {"epochs": [1, 2]},
    "text as loss": record() | {"epochs": [EPOCH, EPOCH | {"epoch": 2, "loss": "low"}]},
    "infinite loss": record() | {"epochs": [EPOCH, EPOCH | {"epoch": 2, "loss": 10**400}]},
    "NaN": json.dumps(record() | {"test": RESULT | {"top1": float("nan")}}).encode(),
    "an epoch twice": record() | {"epochs": [EPOCH, EPOCH]},
    "an epoch short": record() | {"epochs": [EPOCH]},
    "more epochs than planned": record() | {"epochs": [EPOCH | {"epoch": n} for n in range(1, 10)]},
    "no result": record() | {"test": None},
    "result without accuracy": record() | {"test": {"images": 4, "loss": 0.1}},
    "no classes in validation": record() | {"test": None, "epochs": [EPOCH, EPOCH | {"epoch": 2, "validation": {}}]},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_record_is_named_and_skipped_but_not_trained_over(course_folder, capsys, content):
    far = records.write(record(top1=0.9), course_folder / "results")
    good = records.write(record(seed=1, top1=0.2))
    damaged = records.path_of("cifar100", "simple", "fast", 0)
    damaged.write_bytes(content if isinstance(content, bytes) else json.dumps({"schema": 1} | content).encode())
    for read in (lambda: records.read(damaged), lambda: records.lookup("cifar100", "simple", "fast", 0)):
        with pytest.raises(ValueError, match="delete it and train again") as error:
            read()
        assert str(damaged) in str(error.value) and len(str(error.value).splitlines()) == 1
    assert records.find()["path"].tolist() == [str(far), str(good)]  # the farther record is not hidden
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"skipped: {error.value}"


NOT_FOLDERS = ["", ".", "..", ".x", "x.", "../x", "/x", "x/y", "x\\y", "..\\x", "C:x", "x\ny", "x\0", "x*", None, 7]


@pytest.mark.parametrize("name", NOT_FOLDERS, ids=repr)
def test_name_that_is_no_plain_folder_is_refused(course_folder, output, name):
    for run in ((name, "m", "r", 0), ("d", name, "r", 0), ("d", "m", name, 0)):
        with pytest.raises(ValueError, match="becomes a folder, so it must not"):
            records.path_of(*run)
    if isinstance(name, str) and name != "x/y":  # folders below results/ are allowed
        with pytest.raises(ValueError, match="name of the measurement becomes a folder"):
            records.save(name, {})
    assert not output.exists()
    path = records.path_of("d-1", "simple-cp-4.5x", "faster-learningrate1e-05", 0)
    assert path.parts[-4:-1] == ("d-1", "simple-cp-4.5x", "faster-learningrate1e-05")


# --- other measurements, and files of the first edition ----------------------------------------------------------


def test_measurements_are_loaded_from_the_nearest_file_that_is_not_damaged(course_folder, output, capsys):
    far, near = course_folder / "results" / "speed.json", output / "results" / "speed.json"
    _files.write_atomic(far, '{"of": "course"}')
    assert records.load("speed") == ({"of": "course"}, far)
    assert records.save("speed", {"images_per_second": [1.5, 2]}) == near
    assert records.load("speed") == ({"images_per_second": [1.5, 2]}, near)
    for damaged in ('{"of": "out', "[1]", '{"settings": [1]}', '{"ms": NaN}'):
        near.write_text(damaged)
        assert records.load("speed") == ({"of": "course"}, far)
        assert str(near) in capsys.readouterr().out
    near.unlink()
    near.mkdir()
    assert records.load("speed") == ({"of": "course"}, far)


def test_measurement_that_cannot_be_kept_is_not_computed(course_folder, output):
    output.write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="cannot write"):
        records.cached("speed", lambda: pytest.fail("it was computed"))


def test_cached_computes_once_and_checks_the_settings(course_folder):
    calls = []

    def compute():
        calls.append(1)
        return {"pair": (len(calls), 2), "by": {3: "three"}}

    assert records.cached("some/where", compute) == {"pair": [1, 2], "by": {"3": "three"}, "settings": {}}
    assert records.cached("some/where", compute)["pair"] == [1, 2] and len(calls) == 1
    assert records.cached("some/where", compute, recompute=True)["pair"] == [2, 2]
    assert records.load("some/where")[0]["pair"] == [2, 2]
    with pytest.raises(ValueError, match="where.json was computed with another IMAGES"):
        records.cached("some/where", compute, {"IMAGES": 5})
    assert records.cached("some/where", compute, {"IMAGES": 5}, recompute=True)["settings"] == {"IMAGES": 5}
    assert records.cached("some/where", compute, {"IMAGES": 5})["pair"] == [3, 2]


def test_old_record_is_read_with_the_current_names(course_folder):
    epochs = [EPOCH | {"epoch": number, "others_cpu": number / 100} for number in (1, 2)]
    old = record() | {"schema": 1, "epochs": epochs}
    path = records.path_of("cifar100", "simple", "fast", 0)
    _files.write_atomic(path, json.dumps(old))
    expected = [EPOCH | {"epoch": number, "background_load": number / 100} for number in (1, 2)]
    assert records.read(path)["epochs"] == records.find()["record"][0]["epochs"] == expected
    assert json.loads(path.read_text()) == old  # reading does not rewrite


@pytest.mark.parametrize("orient", ["columns", "index", "records", "split", "list"])
def test_old_table_is_loaded_with_the_current_names(course_folder, orient):
    table = pd.DataFrame({"ms": [1.0, 2.0], "others_cpu": [0.01, 0.02]}, index=["simple", "wider"])
    old = table.to_dict(orient) if orient == "list" else json.loads(table.to_json(orient=orient))
    records.save("speed", {"rows": old})
    loaded = records.load("speed")[0]["rows"]
    new = table.rename(columns={"others_cpu": "background_load"})
    assert loaded == (new.to_dict(orient) if orient == "list" else json.loads(new.to_json(orient=orient)))


def test_published_records_have_the_current_names():
    """Some of the course's own files were written by the first edition; they are never rewritten."""
    loads = [row["background_load"] for run in records.find()["record"] for row in run["epochs"]]
    assert len(loads) > 500 and max(loads) <= 1
    parts = pd.DataFrame(records.load("step-parts")[0]["parts"]).T
    rows = pd.DataFrame(records.load("cifar100/networks-latency")[0]["rows"])
    assert "background_load" in parts and "background_load" in rows
