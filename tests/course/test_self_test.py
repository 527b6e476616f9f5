"""The test of a machine: `fcnn_utils.course.self_test`."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import keras
import pytest

from fcnn_utils import deploy
from fcnn_utils.course import environment, paths, self_test
from fcnn_utils.course.data import cifar100, download, medmnist


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    for module in (cifar100, medmnist, download):
        monkeypatch.setattr(module, "fetch", lambda *arguments: pytest.fail("a download was started"))


@pytest.fixture
def hidden_data(tmp_path, monkeypatch):
    """No data set is on this machine; returns the folder in which one is looked for."""
    for name in ("HOME", "USERPROFILE", "KERAS_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("FCNN_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def line(name):
    return self_test.line(name, self_test.tests()[name])


def test_every_test_prints_one_line_that_says_ok_or_what_is_missing(capsys):
    self_test.run()
    lines = capsys.readouterr().out.splitlines()
    names = [each[9:].split(":")[0] for each in lines]
    assert names == list(self_test.tests()) and len(names) == 11
    assert all(each.startswith(("ok       ", "missing  ")) for each in lines)
    found = dict(zip(names, lines, strict=True))
    for name in ("Python", "Keras", "device", "precision", "training step", "output folder"):
        assert found[name].startswith("ok"), found[name]
    assert environment.precision("auto") in found["precision"] and "images per second" in found["training step"]
    installed = {self_test.ENGINES[engine] for engine in deploy.available() if engine != "keras"}
    assert {name for name in self_test.ENGINES.values() if found[name].startswith("ok")} == installed


def test_engines_are_those_of_the_library():
    titles = {engine: deploy.TITLES[engine] for engine in deploy.ENGINES}
    assert titles == {"keras": "Keras"} | self_test.ENGINES


@pytest.mark.parametrize("package, name", [("openvino", "OpenVINO"), ("ai_edge_litert", "LiteRT")])
def test_missing_engine_is_named_with_the_command_that_installs_it(monkeypatch, package, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else find(module))
    wanted = package.replace("_", "-")
    assert line(name) == f"missing  {name}: {name} needs {wanted}: pip install {wanted}"


@pytest.mark.parametrize(
    "name, key, size", [("CIFAR-100", "cifar100", "169 MB"), ("PneumoniaMNIST", "pneumoniamnist", "4 MB")]
)
def test_missing_images_are_announced_and_not_downloaded(hidden_data, name, key, size):
    told = line(name)
    assert told.startswith(f"missing  {name}: it is not on this machine. ") and size in told
    assert "uses generated images" in told and told.endswith(f'data.load("{key}")')


def test_chosen_data_folder_without_images_is_named(hidden_data, monkeypatch):
    monkeypatch.setenv("FCNN_DATA_DIR", str(hidden_data / "mistyped"))
    assert f"FCNN_DATA_DIR is '{hidden_data / 'mistyped'}', where no data set is" in line("CIFAR-100")


def test_damaged_images_are_named_and_whole_ones_are_counted(hidden_data):
    folder = hidden_data / "datasets" / "cifar-100-python"
    folder.mkdir(parents=True)
    for part in ("train", "test", "meta"):
        (folder / part).write_bytes(b"half a file")
    assert f"{folder / 'meta'} is damaged" in line("CIFAR-100") and line("CIFAR-100").startswith("missing")


@pytest.mark.skipif(cifar100.find() is None, reason="CIFAR-100 is not on this machine")
def test_images_are_counted():
    assert line("CIFAR-100").startswith("ok       CIFAR-100: 50,000 training and 10,000 test images in ")


def test_output_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FCNN_OUTPUT", str(tmp_path / "file" / "out"))
    told = line("output folder")
    assert told.startswith(f"missing  output folder: cannot write {tmp_path / 'file' / 'out'}")


def test_python_versions_are_those_of_the_package(monkeypatch):
    project = tomllib.loads((paths.root() / "pyproject.toml").read_text())["project"]
    (_, lowest), (_, too_new) = self_test.PYTHONS
    assert project["requires-python"] == f">=3.{lowest},<3.{too_new}"
    assert line("Python").startswith("ok")
    monkeypatch.setattr(self_test, "PYTHONS", ((3, 97), (3, 99)))
    assert "the course needs 3.97 to 3.98. Install one of them, and run: make lab PYTHON=python3.98" in line("Python")


def test_gpu_that_the_backend_does_not_use_is_named_with_the_command_that_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "gpu", lambda: None)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA H100\necho NVIDIA H100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "does not use the GPU of this machine, NVIDIA H100. Run: pip install " in line("device")
    program.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert line("device").startswith("ok") and "no GPU" in line("device")


def test_error_of_an_installed_package_is_one_line():
    def stop():
        raise RuntimeError("library not found\nand ten more lines")

    told = self_test.line("Keras", stop)
    assert told.startswith(
        "missing  Keras: it stops with RuntimeError: library not found. In the folder of the course, "
    )


@pytest.mark.parametrize("absent", ["tensorflow", "keras", "tqdm"])
def test_self_test_ends_well_without_a_package(absent, hidden_data):
    program = f"import sys; sys.modules[{absent!r}] = None; from fcnn_utils.course import self_test; self_test.run()"
    checkout = str(Path(__file__).resolve().parents[2])
    environ = os.environ | {"PYTHONPATH": checkout, "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, "-c", program]
    lines = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(self_test.tests()) and lines[0].startswith("ok")
    told = next(each for each in lines if each.startswith("missing"))
    assert absent in told and ("pip install -r requirements.txt" in told or f"pip install {absent}" in told)


def test_training_step_is_timed_as_often_as_asked(monkeypatch):
    done = []
    monkeypatch.setattr(keras.Model, "train_on_batch", lambda *arguments: done.append(1))
    assert "images per second" in self_test.tests(timed_steps=4)["training step"]()
    assert len(done) == 1 + 4  # the first one compiles
