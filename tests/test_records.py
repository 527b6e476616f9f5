"""Records and files: `fcnn_utils.course.records`."""

import errno
import json
import os

import pytest

from fcnn_utils import _files
from fcnn_utils.course import records


def record(dataset="cifar100", model="simple", recipe="fast", seed=0, status="complete", top1=0.5):
    """A record as a training writes it, less what no function of the module looks at."""
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


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The project's folder, an empty one: the records of the real one are none of these tests' business."""
    monkeypatch.setattr(records, "ROOT", tmp_path / "project")
    return tmp_path / "project"


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- basic -------------------------------------------------------------------------------------------------------


def test_output_is_the_environments_folder_else_the_projects(project, output, monkeypatch):
    assert records.output() == output
    monkeypatch.setenv("FCNN_OUTPUT", "")
    assert records.output() == project / "build" / "explore"
    monkeypatch.delenv("FCNN_OUTPUT")
    assert records.output() == project / "build" / "explore"


def test_folders_are_the_nearest_first_and_each_once(project, output, monkeypatch):
    assert records.folders() == [output / "results", project / "results"]
    monkeypatch.setenv("FCNN_OUTPUT", str(project))
    assert records.folders() == [project / "results"]


def test_a_path_inside_the_project_is_shown_relative(project, tmp_path):
    assert records.shown(project / "results" / "a.json") == "results/a.json"
    assert records.shown(tmp_path / "else" / "a.json") == str(tmp_path / "else" / "a.json")


@pytest.mark.parametrize("content", [b"\x00bytes\n", "text · äöü\n"])
def test_write_atomic_writes_bytes_and_text_into_new_folders(tmp_path, content):
    path = tmp_path / "new" / "folder" / "file"
    _files.write_atomic(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode("utf-8"))
    assert files(tmp_path) == ["new/folder/file"]


def test_check_writable_leaves_nothing(tmp_path):
    _files.check_writable(tmp_path / "new")
    assert (tmp_path / "new").is_dir() and files(tmp_path) == []


def test_nothing_to_find(project):
    assert records.lookup("cifar100", "simple", "fast", 0) == (None, None)
    assert records.load("speed") == (None, None)
    assert len(records.find()) == 0
    assert {"dataset", "model", "recipe", "seed", "status", "top1", "record"} <= set(records.find(model="simple"))


# --- correct: round trips ----------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written_from_the_documented_path(output, project):
    path = records.write(record(seed=3))
    assert path == output / "results" / "cifar100" / "simple" / "fast" / "seed3.json"
    assert files(output) == ["results/cifar100/simple/fast/seed3.json"]
    assert records.read(path) == record(seed=3) | {"schema": records.SCHEMA}
    assert records.lookup("cifar100", "simple", "fast", 3) == (records.read(path), path)


def test_a_record_goes_to_the_folder_it_is_given(tmp_path, output):
    path = records.write(record(), tmp_path / "other")
    assert path == tmp_path / "other" / "cifar100" / "simple" / "fast" / "seed0.json"
    assert not output.exists()


@pytest.mark.parametrize("status", ["running", "diverged"])
def test_a_partial_record_lies_beside_the_complete_one(output, project, status):
    complete = records.write(record(top1=0.25))
    partial = records.write(record(status=status))
    assert partial.name == "seed0.partial.json" and partial.parent == complete.parent
    assert records.read(complete)["test"]["top1"] == 0.25
    assert records.read(partial)["status"] == status
    assert records.lookup("cifar100", "simple", "fast", 0)[1] == complete


def test_lookup_finds_complete_runs_only(project):
    partial = records.write(record(status="running"))
    assert records.lookup("cifar100", "simple", "fast", 0) == (None, None)
    partial.rename(partial.with_name("seed0.json"))  # its name does not make it complete
    assert records.lookup("cifar100", "simple", "fast", 0) == (None, None)


def test_what_is_no_number_in_json_is_not_written(output):
    with pytest.raises(ValueError):
        records.write(record(top1=float("nan")))
    assert files(output.parent) == []


def test_saved_measurements_are_loaded_from_the_nearest_folder(output, project):
    _files.write_atomic(project / "results" / "speed.json", '{"of": "project"}')
    assert records.load("speed") == ({"of": "project"}, project / "results" / "speed.json")
    path = records.save("speed", {"images_per_second": [1.5, 2]})
    assert path == output / "results" / "speed.json"
    assert records.load("speed") == ({"images_per_second": [1.5, 2]}, path)


# --- correct: find -----------------------------------------------------------------------------------------------

RUNS = [
    record("cifar100", "simple", "fast", 0, top1=0.1),
    record("cifar100", "simple", "fast", 1, top1=0.2),
    record("cifar100", "simple", "thesis", 0, top1=0.3),
    record("cifar100", "wider_separable", "fast", 0, top1=0.4),
    record("standin", "simple", "fast", 0, top1=0.5),
    record("standin", "simple", "fast", 1, "running"),
    record("standin", "simple", "fast", 2, "diverged"),
]


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"dataset": "cifar100"},
        {"model": "wider_separable"},
        {"recipe": "thesis"},
        {"seed": 0},
        {"seed": 1},
        {"status": "running"},
        {"status": "diverged", "dataset": "standin"},
        {"status": None},
        {"dataset": "cifar100", "model": "simple", "recipe": "fast"},
        {"dataset": "mnist"},
    ],
    ids=str,
)
def test_find_filters_by_each_column(project, wanted):
    for run in reversed(RUNS):
        records.write(run)
    status = wanted.get("status", "complete")
    expected = [
        run
        for run in RUNS  # in the order of dataset, model, recipe, seed
        if status in (None, run["status"])
        and all(wanted.get(key, run[key]) == run[key] for key in ("dataset", "model", "seed"))
        and wanted.get("recipe", run["recipe"]["name"]) == run["recipe"]["name"]
    ]
    found = records.find(**wanted)
    assert found["record"].tolist() == [run | {"schema": records.SCHEMA} for run in expected]


def test_the_columns_of_find_are_the_records_entries(project):
    path = records.write(record(seed=4, top1=0.25))
    row = records.find().iloc[0].to_dict()
    assert row.pop("record") == records.read(path)
    assert row == {
        "dataset": "cifar100",
        "model": "simple",
        "recipe": "fast",
        "seed": 4,
        "status": "complete",
        "epochs": 2,
        "top1": 0.25,
        "top5": 0.8,
        "loss": 2.5,
        "params": 10,
        "macs": 20,
        "path": str(path),
    }


def test_the_nearer_folder_wins(tmp_path, project):
    near, far = tmp_path / "near", tmp_path / "far"
    for folder, top1 in ((near, 0.1), (far, 0.9)):
        records.write(record(top1=top1), folder)
    records.write(record(seed=1, top1=0.7), far)
    assert records.find(where=[near, far])["top1"].tolist() == [0.1, 0.7]
    assert records.find(where=[far, near])["top1"].tolist() == [0.9, 0.7]
    assert records.find(where=[near])["top1"].tolist() == [0.1]


def test_the_output_is_nearer_than_the_project(project):
    far = records.write(record(top1=0.9), project / "results")
    assert records.lookup("cifar100", "simple", "fast", 0)[1] == far
    assert records.find()["top1"].tolist() == [0.9]
    near = records.write(record(top1=0.1))
    assert records.lookup("cifar100", "simple", "fast", 0)[1] == near
    assert records.find()["top1"].tolist() == [0.1]


# --- correct: damaged files --------------------------------------------------------------------------------------

WHOLE = json.dumps(record() | {"schema": records.SCHEMA}).encode()
DAMAGED = {
    "truncated": WHOLE[: len(WHOLE) // 2],
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "a number": b"3",
    "another object": b'{"schema": 1, "status": "complete"}',
    "another schema": json.dumps(record() | {"schema": records.SCHEMA + 1}).encode(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_named_and_skipped(project, output, capsys, content):
    far = records.write(record(top1=0.9), project / "results")
    good = records.write(record(seed=1, top1=0.2))
    damaged = records.path_of("cifar100", "simple", "fast", 0)
    damaged.write_bytes(content)

    with pytest.raises(ValueError, match="delete it and train again") as error:
        records.read(damaged)
    assert str(damaged) in str(error.value)

    assert records.find()["path"].tolist() == [str(far), str(good)]  # the damaged one does not hide the farther one
    assert records.lookup("cifar100", "simple", "fast", 0) == (records.read(far), far)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("skipped: ") and str(damaged) in line for line in lines)


def test_damaged_measurements_are_named_and_skipped(project, output, capsys):
    far = project / "results" / "speed.json"
    _files.write_atomic(far, '{"of": "project"}')
    near = output / "results" / "speed.json"
    _files.write_atomic(near, '{"of": "out')
    assert records.load("speed") == ({"of": "project"}, far)
    assert str(near) in capsys.readouterr().out


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json"):
        records.read(tmp_path / "nowhere.json")


# --- correct: writing that fails ---------------------------------------------------------------------------------

CURES = {
    errno.ENOSPC: "disk is full; free some space",
    errno.EDQUOT: "quota is used up; free some space",
    errno.EROFS: "read-only; set FCNN_OUTPUT to a folder that can be written",
    errno.EACCES: "permission denied; set FCNN_OUTPUT to a folder that can be written",
    errno.EPERM: "permission denied; set FCNN_OUTPUT to a folder that can be written",
    errno.EIO: "Input/output error",
}


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("number", CURES, ids=errno.errorcode.get)
def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path, monkeypatch, call, number):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(OSError(number, "Input/output error")))
        with pytest.raises(ValueError, match=CURES[number]) as error:
            _files.write_atomic(path, b"new")
    assert f"cannot write {path}: " in str(error.value)
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_write_that_is_interrupted_leaves_the_file_as_it_was(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            _files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(ValueError, match="cannot write .*file/below"):
        _files.write_atomic(tmp_path / "file" / "below", b"x")
    with pytest.raises(ValueError, match="cannot write .*file/folder"):
        _files.check_writable(tmp_path / "file" / "folder")


def test_a_failing_write_keeps_the_complete_record(output, project, monkeypatch):
    path = records.write(record(top1=0.25))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "full")))
        with pytest.raises(ValueError, match="disk is full"):
            records.write(record(top1=0.75))
    assert records.read(path)["test"]["top1"] == 0.25


def test_what_was_computed_once_is_remembered():
    calls = []

    def compute():
        calls.append(1)
        return {"pair": (len(calls), 2), "by": {3: "three"}}

    assert records.cached("some/where", compute) == {"pair": [1, 2], "by": {"3": "three"}, "settings": {}}
    assert records.cached("some/where", compute)["pair"] == [1, 2] and len(calls) == 1
    assert records.cached("some/where", compute, recompute=True)["pair"] == [2, 2]
    assert records.load("some/where")[0]["pair"] == [2, 2]
    with pytest.raises(ValueError, match="where.json was computed with another IMAGES; compute it anew"):
        records.cached("some/where", compute, {"IMAGES": 5})
    assert records.cached("some/where", compute, {"IMAGES": 5}, recompute=True)["settings"] == {"IMAGES": 5}
    assert records.cached("some/where", compute, {"IMAGES": 5})["pair"] == [3, 2]
