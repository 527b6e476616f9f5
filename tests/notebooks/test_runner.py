"""The runner: `fcnn_utils.course.runner`, on small notebooks without Keras. Most tests start no kernel."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import nbformat
import papermill
import psutil
import pytest
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import fcnn_utils
from fcnn_utils import _files
from fcnn_utils.__main__ import main
from fcnn_utils._processors import available_cores
from fcnn_utils.course import paths, run_progress, runner

PROFILES = """
[smoke]
EAGER = true
DATASET = "standin"
EPOCHS = 1
[full]
[order]
alone = ["02"]
[reads]
03_third = ["*/*/*/seed*.json"]
"""
NAMES = ["01_first", "02_second", "03_third"]


def write_notebook(folder, name, *code, parameters="EPOCHS = 5\nDATASET = 'auto'"):
    cells = [new_markdown_cell("# A notebook"), new_code_cell(parameters), *map(new_code_cell, code)]
    cells[1].metadata["tags"] = ["parameters"]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of three small notebooks; returns their folder."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "profiles.toml").write_text(PROFILES)
    for name in NAMES:
        write_notebook(folder, name, f"print('{name}')")
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    return folder


@pytest.fixture
def executed(monkeypatch):
    """Do not execute notebooks; note the name, the parameters and the environment of each that would be."""
    calls = []

    def execute(path, given, folder, progress):
        calls.append((path.stem, given, [os.environ[name] for name in ("FCNN_OUTPUT", "FCNN_EAGER")]))
        return nbformat.read(path, 4)

    monkeypatch.setattr(runner, "execute", execute)
    return calls


def printed(path):
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


# --- what runs ---------------------------------------------------------------------------------------------------


def test_notebooks_run_in_order_with_parameters_of_the_profile(course, executed, capsys):
    folder = runner.run("smoke")
    given = {"DATASET": "standin", "EPOCHS": 1}
    assert executed == [(name, given, [str(folder), "1"]) for name in NAMES]
    assert sorted(path.stem for path in folder.glob("*.ipynb")) == NAMES
    lines = capsys.readouterr().out.splitlines()
    assert "STAND-IN" in lines[0] and "STAND-IN" in lines[-1]


def test_only_from_and_settings_choose_notebooks_and_parameters(course, executed):
    write_notebook(course, "02_second", parameters="SEED = 0")
    runner.run("smoke", only=["01", "2"], settings={"EPOCHS": 7})
    runner.run("smoke", start="03", settings={"DATASET": "standin"})
    with pytest.raises(ValueError, match="jobs must be at least 1; got 0"):
        runner.run("smoke", jobs=0)
    assert [(name, given.get("EPOCHS")) for name, given, _ in executed] == [
        ("01_first", 7),
        ("02_second", None),
        ("03_third", 1),
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("nothing", []),
        ("code", ["02_second"]),
        ("prose", ["02_second"]),
        ("parameter", NAMES),
        ("package", NAMES),
        ("record", ["03_third"]),
        ("lost output", ["01_first"]),
        ("fresh", NAMES),
    ],
)
def test_only_notebooks_with_a_change_run_again(course, executed, monkeypatch, tmp_path, change, expected):
    module = tmp_path / "package" / "folder" / "module.py"
    _files.write_atomic(module, "x = 1")
    monkeypatch.setattr(fcnn_utils, "__file__", str(tmp_path / "package" / "__init__.py"))
    folder = runner.run("smoke")
    executed.clear()
    if change in ("code", "prose"):
        notebook = nbformat.read(course / "02_second.ipynb", 4)
        notebook.cells[2 if change == "code" else 0].source += "\n# changed"
        nbformat.write(notebook, course / "02_second.ipynb")
    elif change == "package":
        module.write_text("x = 2")
    elif change == "record":
        _files.write_atomic(folder / "results" / "d" / "m" / "r" / "seed0.json", json.dumps({"any": "thing"}))
    elif change == "lost output":
        (folder / "01_first.ipynb").unlink()
    monkeypatch.setenv("FCNN_OUTPUT", str(folder))  # where the record was written
    runner.run("smoke", settings={"EPOCHS": 2} if change == "parameter" else None, fresh=change == "fresh")
    assert [name for name, *_ in executed] == expected


def test_run_continues_at_the_notebook_that_failed(course, executed, monkeypatch, capsys):
    execute = runner.execute

    def fail_at_second(path, given, folder, progress):
        if path.stem == "02_second":
            raise runner.NotebookFailed("02_second stopped", False)
        return execute(path, given, folder, progress)

    monkeypatch.setattr(runner, "execute", fail_at_second)
    assert main(["run", "--profile", "smoke", "--jobs", "1"]) == 1
    assert "02_second stopped" in capsys.readouterr().err
    monkeypatch.setattr(runner, "execute", execute)
    assert main(["run", "--profile", "smoke", "--jobs", "1"]) == 0
    assert [name for name, *_ in executed] == NAMES


@pytest.mark.parametrize(
    "here, options, expected",
    [
        (True, {"dataset": "cifar100"}, "pneumoniamnist"),
        (False, {"dataset": "cifar100"}, "greystandin"),
        (True, {"dataset": "standin"}, "greystandin"),  # stand-ins are asked for: nothing is looked for
        (False, {"dataset": "standin", "settings": {"MEDICAL_DATASET": "bloodmnist"}}, "bloodmnist"),
    ],
)
def test_medical_images_are_the_real_ones_if_available(course, executed, monkeypatch, here, options, expected):
    def load(name, or_stand_in):
        assert name == "pneumoniamnist" and or_stand_in
        return Mock(stand_in=not here)  # not only where it is missing, but also where it is damaged

    monkeypatch.setattr(runner.data, "locate", {"cifar100": "somewhere", "standin": None}.get)
    monkeypatch.setattr(runner.data, "load", load)
    write_notebook(course, "01_first", parameters="MEDICAL_DATASET = 'pneumoniamnist'")
    runner.run("smoke", **options)
    assert [given.get("MEDICAL_DATASET") for _, given, _ in executed] == [expected, None, None]


# --- the full profile --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"settings": {"EPOCHS": 2}}, {"dataset": "standin"}])
def test_full_profile_rejects_other_settings(course, executed, options):
    with pytest.raises(ValueError, match="profile full"):
        runner.run("full", **options)
    assert not executed


def test_full_profile_rewrites_notebooks_and_signs_their_code(course, executed, monkeypatch, tmp_path):
    monkeypatch.setattr(runner.data, "locate", lambda name: "somewhere")
    execute = runner.execute

    def with_marks(path, given, folder, progress):
        notebook = execute(path, given, folder, progress)
        notebook.metadata["papermill"] = notebook.cells[2].metadata["papermill"] = {"duration": 1}
        return notebook

    monkeypatch.setattr(runner, "execute", with_marks)
    runner.run("full", only=["02"])
    assert executed == [("02_second", {}, [str(tmp_path), ""])]
    notebook = nbformat.read(course / "02_second.ipynb", 4)
    assert notebook.metadata["executed_source_sha256"] == runner.source_hash(notebook)
    assert "papermill" not in json.dumps(notebook) and notebook.cells[1].metadata == {"tags": ["parameters"]}
    runner.run("full", only=["02"])
    assert len(executed) == 1  # unchanged


def test_source_hash_depends_on_code_alone(course):
    notebook = nbformat.read(course / "01_first.ipynb", 4)
    before = runner.source_hash(notebook)
    notebook.cells[0].source += "prose"
    notebook.cells.append(new_code_cell("import colab", metadata={"tags": ["colab"]}))
    assert runner.source_hash(notebook) == before
    notebook.cells[2].source += "\n1"
    assert runner.source_hash(notebook) != before


def test_notebooks_that_do_not_measure_time_run_side_by_side(course, executed, monkeypatch):
    execute, both, threads = runner.execute, threading.Barrier(2, timeout=20), {}
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "given")

    def wait_for_the_other(path, given, folder, progress):
        if path.stem != "02_second":
            both.wait()
        threads[path.stem] = os.environ["TF_NUM_INTRAOP_THREADS"]
        return execute(path, given, folder, progress)

    monkeypatch.setattr(runner, "execute", wait_for_the_other)
    assert main(["run", "--profile", "smoke", "--jobs", "2"]) == 0
    assert sorted(name for name, *_ in executed[:2]) == ["01_first", "03_third"]
    assert [name for name, *_ in executed[2:]] == ["02_second"]
    assert threads["01_first"] == threads["03_third"] == str(max(1, available_cores() // 2))
    assert threads["02_second"] == "given"


@pytest.mark.parametrize("error", [runner.NotebookFailed("03_third stopped", False), ValueError("03_third is locked")])
def test_a_notebook_that_fails_does_not_stop_the_one_beside_it(course, executed, monkeypatch, capsys, error):
    execute, kernels = runner.execute, []
    monkeypatch.setattr(runner.psutil, "Process", Mock(side_effect=kernels.append))

    def fail_at_third(path, given, folder, progress):
        if path.stem == "03_third":
            raise error
        time.sleep(0.5)
        return execute(path, given, folder, progress)

    monkeypatch.setattr(runner, "execute", fail_at_third)
    assert main(["run", "--profile", "smoke", "--jobs", "2"]) in (1, 2)
    assert str(error) in capsys.readouterr().err and not kernels
    assert [name for name, *_ in executed] == ["01_first"]


# --- what fails --------------------------------------------------------------------------------------------------


def test_run_without_a_course_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(paths, "root", lambda: None)
    assert main(["run"]) == 2
    assert "there is no course here" in capsys.readouterr().err


def test_second_run_of_a_notebook_is_refused_and_of_another_one_is_not(course, executed, monkeypatch, capsys):
    execute, codes = runner.execute, []

    def start_others(path, given, folder, progress):
        monkeypatch.setattr(runner, "execute", execute)
        codes.extend(main(["run", "--profile", "smoke", "--only", number]) for number in ("01", "02"))
        return execute(path, given, folder, progress)

    monkeypatch.setattr(runner, "execute", start_others)
    assert main(["run", "--profile", "smoke", "--only", "01"]) == 0 and codes == [2, 0]
    assert f"the notebook 01_first is under way in process {os.getpid()}" in capsys.readouterr().err
    assert [name for name, *_ in executed] == ["02_second", "01_first"]


def test_folder_that_cannot_be_written_is_found_before_the_notebook_runs(course, executed, tmp_path, capsys):
    _files.write_atomic(tmp_path / "build" / "smoke", "a file where a folder should be")
    assert main(["run", "--profile", "smoke"]) == 2
    assert "cannot write" in capsys.readouterr().err and not executed


def test_failing_notebook_is_kept_and_reported(course, tmp_path, monkeypatch, capsys):
    """With a real kernel: its cells, its prints, its errors, and what is kept of it."""
    code = [
        "import sys\nprint('noise', file=sys.stderr)\nprint('a · epoch 1/2')\nprint('other', EPOCHS)",
        "x = 0\n1 / x",
    ]
    write_notebook(course, "02_second", *code, "print('never')")
    cells = []
    monkeypatch.setattr(run_progress.RunProgress, "at", lambda self, *what: cells.append(what))
    assert main(["run", "--profile", "smoke", "--only", "02"]) == 1
    assert cells == [("02_second", f"cell {number} of 4", "set-up") for number in (1, 2, 3)]
    out, report = capsys.readouterr()
    assert "a · epoch 1/2" in out and "other" not in out
    for part in ("02_second stopped at code cell 4", "    1 / x", "ZeroDivisionError: division by zero", "kept: "):
        assert part in report
    assert len(report.splitlines()) <= 40
    folder = tmp_path / "build" / "smoke"
    assert printed(folder / "02_second.ipynb") == "a · epoch 1/2\nother 1\n"
    assert not list(folder.rglob(".running/*")) and not list(folder.rglob(".stamps/*"))
    assert not (folder / "03_third.ipynb").exists()


@pytest.mark.parametrize(
    "name, value, code", [("ValueError", "EPOCHS must be at most 3; got 5", 2), ("TypeError", "no", 1), (None, "", 1)]
)
def test_exit_code_tells_refused_values_from_other_errors(course, monkeypatch, capsys, name, value, code):
    def fail(source, target, *args, **options):
        nbformat.write(nbformat.read(source, 4), target)
        if name is None:
            raise DeadKernelError("Kernel died")
        raise papermill.PapermillExecutionError(1, 2, "check(EPOCHS=EPOCHS)", name, value, ["Traceback", "line", "end"])

    monkeypatch.setattr(papermill, "execute_notebook", fail)
    assert main(["run", "--profile", "smoke", "--only", "02"]) == code
    report = capsys.readouterr().err
    assert "02_second stopped" in report and ("Kernel died" if name is None else f"{name}: {value}") in report
    assert ("line" in report) == (name == "TypeError")  # a refused value needs no traceback


# --- what is stopped ---------------------------------------------------------------------------------------------


def is_gone(pid, seconds=20):
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    "signal_sent, jobs",
    [
        (signal.SIGTERM, 1),
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.full),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.full),
        pytest.param(signal.SIGKILL, 2, marks=pytest.mark.full),
    ],
)
def test_stopped_run_ends_its_kernel_and_leaves_whole_files(course, tmp_path, signal_sent, jobs):
    (course / "profiles.toml").write_text(PROFILES.replace('alone = ["02"]', "alone = []"))
    write_notebook(course, "02_second", "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)")
    program = (
        f"import pathlib, sys; from fcnn_utils import __main__; from fcnn_utils.course import paths;"
        f"paths.root = lambda: pathlib.Path({str(tmp_path)!r});"
        f"sys.exit(__main__.main(['run', '--profile', 'smoke', '--jobs', '{jobs}']))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    folder, pid, deadline = tmp_path / "build" / "smoke", course / "pid", time.monotonic() + 120
    complete = ["01_first", "03_third"] if jobs == 2 else ["01_first"]
    stamps = [folder / ".stamps" / f"{name}.json" for name in complete]
    while not pid.exists() or not pid.read_text() or not all(stamp.exists() for stamp in stamps):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal_sent)
    code = process.wait(timeout=60)
    assert is_gone(int(pid.read_text()))
    if signal_sent != signal.SIGKILL:
        assert code == 130 and not list(folder.rglob(".running/*"))
    assert sorted(folder.glob(".stamps/*")) == stamps
    for name in complete:
        assert printed(folder / f"{name}.ipynb") == f"{name}\n"
