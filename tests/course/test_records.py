"""Run records and kept measurements: `fcnn_utils.course.records`."""

import errno
import json
from unittest.mock import Mock

import pandas as pd
import pytest

from fcnn_utils import _files
from fcnn_utils.course import paths, records


def record(dataset="cifar100", model="simple", recipe="fast", seed=0, status="complete", top1=0.5):
    """A record with the entries that the module uses."""
    return {
        "status": status,
        "dataset": dataset,
        "model": model,
        "recipe": {"name": recipe, "epochs": 2},
        "seed": seed,
        "params": 10,
        "macs": 20,
        "epochs": [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-17}],
        "test": {"top1": top1, "top5": 0.8, "loss": 2.5} if status == "complete" else None,
    }


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
    expected = {key: value for key, value in record(seed=4).items() if key != "test"}
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


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(record() | {"schema": 1}).encode()[:100],
        b"",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"schema": 1, "status": "complete"}',
        json.dumps(record() | {"schema": 2}).encode(),
    ],
    ids=["truncated", "empty", "no text", "a list", "another object", "another schema"],
)
def test_damaged_record_is_named_and_skipped(course_folder, capsys, content):
    far = records.write(record(top1=0.9), course_folder / "results")
    good = records.write(record(seed=1, top1=0.2))
    damaged = records.path_of("cifar100", "simple", "fast", 0)
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match="delete it and train again") as error:
        records.read(damaged)
    assert str(damaged) in str(error.value)
    assert records.find()["path"].tolist() == [str(far), str(good)]  # the farther record is not hidden
    assert records.lookup("cifar100", "simple", "fast", 0) == (records.read(far), far)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("skipped: ") and str(damaged) in line for line in lines)


# --- other measurements, and files of the first edition ----------------------------------------------------------


def test_measurements_are_loaded_from_the_nearest_file_that_is_not_damaged(course_folder, output, capsys):
    far, near = course_folder / "results" / "speed.json", output / "results" / "speed.json"
    _files.write_atomic(far, '{"of": "course"}')
    assert records.load("speed") == ({"of": "course"}, far)
    assert records.save("speed", {"images_per_second": [1.5, 2]}) == near
    assert records.load("speed") == ({"images_per_second": [1.5, 2]}, near)
    near.write_text('{"of": "out')
    assert records.load("speed") == ({"of": "course"}, far)
    assert str(near) in capsys.readouterr().out


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
    old = record() | {"schema": 1, "epochs": [{"epoch": 1, "others_cpu": 0.01}, {"epoch": 2, "others_cpu": 0.02}]}
    path = records.path_of("cifar100", "simple", "fast", 0)
    _files.write_atomic(path, json.dumps(old))
    expected = [{"epoch": 1, "background_load": 0.01}, {"epoch": 2, "background_load": 0.02}]
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
    parts = pd.DataFrame(records.load("speed")[0]["parts"]).T
    rows = pd.DataFrame(records.load("cifar100/networks-latency")[0]["rows"])
    assert "background_load" in parts and "background_load" in rows
