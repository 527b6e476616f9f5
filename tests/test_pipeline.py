"""The pipeline on notebooks made for the purpose: a few cells each and no Keras, so that a run takes seconds."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fcnn_utils import _files
from fcnn_utils.__main__ import main
from fcnn_utils.course import parameters, recipes, records, runner

PROFILES = '[smoke]\nDATASET = "standin"\nEPOCHS = 1\n[full]\n[reads]\n03_third = ["*/*/*/seed*.json"]\n'


def write_notebook(folder, name, *code):
    given = new_code_cell("EPOCHS = 5\nDATASET = 'auto'")
    given.metadata["tags"] = ["parameters"]
    cells = [new_markdown_cell("# A notebook"), given, *map(new_code_cell, code)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Three small notebooks; the second divides by what is in the file `divisor` of the folder."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "profiles.toml").write_text(PROFILES)
    (folder / "divisor").write_text("1")
    write_notebook(folder, "01_first", "print('epochs', EPOCHS)")
    write_notebook(folder, "02_second", "x = 1", "result = x / int(open('divisor').read())", "print('after', result)")
    write_notebook(folder, "03_third", "print('third')")
    monkeypatch.setattr(runner, "NOTEBOOKS", folder)
    monkeypatch.setattr(runner, "BUILD", tmp_path / "build")
    return folder


def printed(path):
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


# --- what runs ---------------------------------------------------------------------------------------------------


def test_runs_in_order_with_the_profiles_parameters(course, capsys):
    folder = runner.run("smoke")
    assert sorted(path.name for path in folder.glob("*.ipynb")) == [
        "01_first.ipynb",
        "02_second.ipynb",
        "03_third.ipynb",
    ]
    assert printed(folder / "01_first.ipynb") == "epochs 1\n"
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " done in " in line]
    assert lines[:3] == ["01_first", "02_second", "03_third"]


def test_only_from_and_set(course):
    folder = runner.run("smoke", only=["01"], settings={"EPOCHS": 7})
    assert printed(folder / "01_first.ipynb") == "epochs 7\n" and not (folder / "02_second.ipynb").exists()
    runner.run("smoke", start="03")
    assert (folder / "03_third.ipynb").exists() and not (folder / "02_second.ipynb").exists()


def test_stand_in_is_announced_at_the_start_and_at_the_end(course, capsys):
    runner.run("smoke", only=["01"])
    lines = capsys.readouterr().out.splitlines()
    assert "STAND-IN" in lines[0] and "STAND-IN" in lines[-1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("nothing", []),
        ("code", ["02_second"]),
        ("prose", ["02_second"]),
        ("parameter", ["01_first", "02_second", "03_third"]),
        ("record", ["03_third"]),
        ("lost output", ["01_first"]),
        ("fresh", ["01_first", "02_second", "03_third"]),
    ],
)
def test_only_what_changed_runs_again(course, capsys, monkeypatch, change, expected):
    folder = runner.run("smoke")
    settings, fresh = None, change == "fresh"
    if change in ("code", "prose"):
        notebook = nbformat.read(course / "02_second.ipynb", 4)
        notebook.cells[2 if change == "code" else 0].source += "\n# changed"
        nbformat.write(notebook, course / "02_second.ipynb")
    elif change == "parameter":
        settings = {"EPOCHS": 2}
    elif change == "record":
        path = folder / "results" / "d" / "m" / "r" / "seed0.json"
        _files.write_atomic(path, json.dumps({"any": "thing"}))
    elif change == "lost output":
        (folder / "01_first.ipynb").unlink()
    monkeypatch.setenv("FCNN_OUTPUT", str(folder))  # where the record was written
    capsys.readouterr()
    runner.run("smoke", settings=settings, fresh=fresh)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("running")] == expected


# --- what fails --------------------------------------------------------------------------------------------------


def test_failure_names_notebook_cell_and_error_and_the_next_run_resumes_there(course, capsys):
    (course / "divisor").write_text("0")
    assert main(["run", "--profile", "smoke"]) == 1
    report = capsys.readouterr().err
    assert "02_second" in report and "x / int(" in report and "ZeroDivisionError: division by zero" in report
    assert len(report.splitlines()) <= 40
    partial = nbformat.read(runner.BUILD / "smoke" / "02_second.ipynb", 4)
    assert any(cell.source == "x = 1" and cell.execution_count for cell in partial.cells if cell.cell_type == "code")
    assert not (runner.BUILD / "smoke" / "03_third.ipynb").exists()

    (course / "divisor").write_text("2")
    assert main(["run", "--profile", "smoke"]) == 0
    lines = capsys.readouterr().out
    assert "01_first" in lines and "unchanged" in lines.split("02_second")[0]
    assert printed(runner.BUILD / "smoke" / "02_second.ipynb") == "after 0.5\n"


def test_value_refused_by_a_notebook_is_one_sentence_and_exit_code_2(course, capsys):
    write_notebook(course, "02_second", "raise ValueError('EPOCHS must be at most 3; got 5')")
    assert main(["run", "--profile", "smoke", "--only", "02"]) == 2
    error = capsys.readouterr().err
    assert "ValueError: EPOCHS must be at most 3; got 5" in error and "Traceback" not in error


def test_dead_kernel_is_reported(course, capsys):
    write_notebook(course, "02_second", "import os\nos._exit(3)")
    assert main(["run", "--profile", "smoke", "--only", "02"]) == 1
    assert "02_second stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "here, options, expected",
    [
        (True, {"dataset": "cifar100"}, "pneumoniamnist"),
        (False, {"dataset": "cifar100"}, "greystandin"),
        (True, {"dataset": "standin"}, "greystandin"),  # asked for stand-ins: nothing is looked for
        (False, {"dataset": "standin", "settings": {"MEDICAL_DATASET": "bloodmnist"}}, "bloodmnist"),
    ],
)
def test_the_notebook_on_medical_images_gets_those_that_can_be_had(course, monkeypatch, here, options, expected):
    def locate(name, or_stand_in=False):
        assert or_stand_in or name in ("cifar100", "standin")
        return "somewhere" if name == "cifar100" or here and name == "pneumoniamnist" else None

    monkeypatch.setattr(runner.data, "locate", locate)
    notebook = nbformat.read(course / "01_first.ipynb", 4)
    notebook.cells[1].source += "\nMEDICAL_DATASET = 'pneumoniamnist'"
    notebook.cells[-1].source = "print(MEDICAL_DATASET)"
    nbformat.write(notebook, course / "01_first.ipynb")
    folder = runner.run("smoke", **options)
    assert printed(folder / "01_first.ipynb") == f"{expected}\n"
    assert "MEDICAL_DATASET" not in json.dumps(nbformat.read(folder / "02_second.ipynb", 4))


def test_full_profile_takes_no_settings(course):
    with pytest.raises(ValueError, match="full profile"):
        runner.run("full", settings={"EPOCHS": 2})
    with pytest.raises(ValueError, match="full profile"):
        runner.run("full", dataset="standin")


def test_recipes_that_notebooks_may_name_are_those_that_exist():
    others = {"tune", "medical"}  # from trained weights; for other images
    assert set(parameters.PARAMETERS["RECIPE"]) == set(recipes.RECIPES) - others


# --- what is stopped ---------------------------------------------------------------------------------------------

SLOW = (
    "import os, time\nprint(os.getpid(), flush=True)\nopen('kernel', 'w').write(str(os.getpid()))\ntime.sleep(SECONDS)"
)


def start(course, tmp_path):
    code = (
        "import pathlib, sys; from fcnn_utils import pipeline, __main__;"
        f"runner.NOTEBOOKS = pathlib.Path({str(course)!r});"
        f"runner.BUILD = pathlib.Path({str(tmp_path / 'build')!r});"
        "sys.exit(__main__.main(['run', '--profile', 'smoke']))"
    )
    environment = os.environ | {"PYTHONPATH": str(records.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (course / "kernel").exists() or not (course / "kernel").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    return process, int((course / "kernel").read_text())


def gone(pid, seconds=20):
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_leaves_nothing_half_written_and_goes_on(course, tmp_path, capsys, signal_sent):
    write_notebook(course, "02_second", SLOW.replace("SECONDS", "600"))
    process, kernel = start(course, tmp_path)
    process.send_signal(signal_sent)
    code = process.wait(timeout=60)
    assert gone(kernel), "the kernel outlived the run"
    if signal_sent != signal.SIGKILL:
        assert code == 130
        assert not list((tmp_path / "build" / "smoke").rglob(".running/*"))
    for path in (tmp_path / "build" / "smoke").glob("*.ipynb"):
        nbformat.validate(nbformat.read(path, 4))

    write_notebook(course, "02_second", SLOW.replace("SECONDS", "0"))
    folder = runner.run("smoke")
    assert "01_first                     unchanged" in capsys.readouterr().out
    assert printed(folder / "03_third.ipynb") == "third\n"


def test_killed_training_goes_on_and_its_record_is_complete(tmp_path):
    """kill -9 of a real training: 256 images and 3 epochs, so that it takes seconds."""
    command = [sys.executable, "-m", "fcnn_utils", "train", "wider_separable", "--dataset", "standin", "--epochs", "3"]
    command += ["--train-images", "256", "--test-images", "100"]
    environment = os.environ | {"FCNN_OUTPUT": str(tmp_path), "PYTHONPATH": str(records.ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    first = next(line for line in process.stdout if "epoch 1/3" in line)
    process.kill()
    process.wait()
    path = records.path_of("standin-256", "wider_separable", "faster-epochs3", 0, tmp_path / "results")
    assert not path.exists()

    again = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on after epoch" in again.stdout and "epoch 1/3" not in again.stdout
    record = records.read(path)
    assert [row["epoch"] for row in record["epochs"]] == [1, 2, 3] and record["status"] == "complete"
    assert f"{record['epochs'][0]['loss']:.3f}" in first
    assert [file.name for file in path.parent.iterdir()] == ["seed0.json"]
