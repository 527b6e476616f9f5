"""Sweeps: `fcnn_utils.course.sweeps`. Most tests put a fake in place of the processes that train."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import time
from unittest.mock import Mock

import psutil
import pytest

from fcnn_utils import _files
from fcnn_utils.__main__ import main
from fcnn_utils.course import data, environment, experiments, grids, records, sweeps
from fcnn_utils.course.recipes import get_recipe

GRID = """
networks = ["simple", "wider_dense"]
widths = [0.05]
seeds = [0, 1]
dataset = "standin"
train_images = 100
test_images = 10
cpus = 1

[settings]
epochs = 2
batch_size = [30, 40]
"""


SMALL = """
networks = ["wider_dense"]
widths = [0.05]
dataset = "standin"
train_images = 100
test_images = 10
cpus = 1
deterministic = true
settings = {epochs = 1}
"""


@pytest.fixture
def grid(tmp_path):
    """A function that writes a grid, by default with a part of it replaced, and returns its path."""

    def write(text=GRID, old="", new=""):
        assert old in text
        path = tmp_path / "grid.toml"
        path.write_text(text.replace(old, new))
        return path

    return write


def a_record(run, top1=0.5):
    """A complete record of this run, as `experiments.train` would make it."""
    dataset = data.load("standin", 100, 10)
    row = dict.fromkeys(("loss", "cross_entropy", "top1", "top5", "seconds", "ms_per_step"), 1.0)
    result = {"images": 10, "loss": 1.0, "top1": top1, "top5": 0.9, "correct_by_class": [1]}
    return {
        "status": "complete",
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "stand_in": True,
        "train_images": 100,
        "model": f"{run.network}-width0.05",
        "recipe": run.recipe.as_dict(),
        "seed": run.recipe.seed,
        "precision": "float32",
        "params": 1,
        "trainable": 1,
        "macs": 1,
        **environment.describe(),
        "epochs": [{"epoch": epoch, **row} for epoch in (1, 2)],
        "test": result,
    }


@pytest.fixture
def trained(monkeypatch):
    """List of the runs that a fake trains: seed 1 of the simple network fails, the others give a record."""
    runs = []

    def execute(waiting, how, address):
        for run in waiting:
            yield None, None
            runs.append(run)
            record = a_record(run, 0.5 + 0.1 * run.recipe.seed)
            is_bad = (run.network, run.recipe.seed) == ("simple", 1)
            yield run, "the loss is nan" if is_bad else (record, b"network" if run.recipe.seed else None)

    monkeypatch.setattr(sweeps, "_one_by_one", execute)
    monkeypatch.setattr(sweeps, "_has_ray", lambda: False)
    return runs


# --- the grid ----------------------------------------------------------------------------------------------------


def test_grid_has_a_run_for_each_value_of_each_list(grid):
    runs = grids.read(grid())
    assert len({str(run) for run in runs}) == len(runs) == 2 * 2 * 2
    assert str(runs[0]) == "simple-width0.05 · faster-batchsize30-epochs2 · seed 0"
    assert [run.recipe.seed for run in runs] == [0] * 4 + [1] * 4  # so that all settings of a seed can be compared
    assert runs[1].recipe == get_recipe("faster").replace(epochs=2, batch_size=40)
    (run,) = grids.read(grid('networks = ["simple"]'))
    assert (run.width, run.recipe) == (1.0, get_recipe("faster"))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('networks = ["simple", "wider_dense"]', "", "networks is missing; give a list"),
        ('"wider_dense"', '"narrow"', "model must be one of simple, .*'narrow'"),
        ("[0, 1]", "0", "seeds must be a list with at least one value; got 0"),
        ("[0, 1]", "[]", "seeds must be a list"),
        ("[0, 1]", "[0, 0]", "a run occurs twice: simple-width0.05 .* seed 0; give each value once"),
        ("[0, 1]", "[0.5]", "each of seeds must be a whole number"),
        ("[0.05]", "[0]", "each of widths must be a number between"),
        ("cpus", "processors", "each key of a grid must be one of networks, widths, .*'processors'"),
        ("cpus = 1", "cpus = 0", "cpus must be a whole number between 1"),
        ("epochs = 2", "epochs = []", r"settings has epochs = \[\]: give it at least one value"),
        ("epochs = 2", "seed = 2", "settings has seed = 2: put seeds into the list"),
        ("epochs = 2", "distillation = 0.2", "settings has distillation = 0.2: a grid cannot change it"),
        ('"standin"', '"cifar"', "dataset must be one of cifar100"),
        ("cpus = 1", "gpus = -1", "gpus must be a number between 0"),
        ("cpus = 1", "deterministic = 1", "deterministic must be true or false; got 1"),
        ("epochs = 2", "epochs = 0", "epochs must be a whole number between 1 and 1000"),
        ("epochs = 2", "rate = 2", "recipe has no setting 'rate'"),
        ("[settings]", "[settings", "is not a TOML file"),
    ],
)
def test_bad_grid_is_refused_in_one_sentence_that_names_the_file(grid, old, new, message):
    with pytest.raises(ValueError, match=f"grid.toml:? .*{message}") as refused:
        grids.read(grid(old=old, new=new))
    assert "\n" not in str(refused.value)


def test_grid_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no.toml cannot be read: No such file"):
        grids.read(tmp_path / "no.toml")


# --- the runs ----------------------------------------------------------------------------------------------------


def test_sweep_trains_what_has_no_record_and_writes_what_comes_from_another_machine(grid, output, trained):
    runs, file = grids.read(grid(old="[30, 40]", new="30")), io.StringIO()
    records.write(a_record(runs[0], 0.125))
    results = sweeps.train(runs, file=file)
    assert trained == runs[1:] and list(results) == runs
    assert results[runs[0]]["test"]["top1"] == 0.125 and results[runs[2]] == "the loss is nan"
    written = sorted(path.relative_to(output / "results").as_posix() for path in output.rglob("seed*"))
    folders = [f"standin-100/{name}-width0.05/faster-batchsize30-epochs2" for name in ("simple", "wider_dense")]
    assert written == [f"{folders[0]}/seed0.json", *(f"{folders[1]}/seed{n}" for n in ("0.json", "1.json", "1.keras"))]
    lines = [re.sub(" +", " ", line) for line in file.getvalue().splitlines()]
    assert lines[0] == "4 runs, 1 of them have a record"
    assert lines[1:4] == [f"done, test top-1 50.0% {runs[1]}", f"FAILED {runs[2]}", f"done, test top-1 60.0% {runs[3]}"]
    assert lines[4] == f"{runs[2]} failed: the loss is nan" and len(lines) == 6
    trained.clear()
    again = sweeps.train(runs, file=file)
    assert trained == [runs[2]] and again[runs[3]]["test"]["top1"] == 0.6


def test_command_ends_with_a_table_over_the_seeds_and_differences_from_a_baseline(grid, trained, capsys):
    path, recipe = str(grid(old="[30, 40]", new="30")), "faster-batchsize30-epochs2"
    assert main(["sweep", path, "--baseline", f"wider_dense-width0.05/{recipe}"]) == 1  # one run failed
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if f"{recipe}  " in line]
    assert rows[0][:5] == ["simple-width0.05", recipe, "test", "1", "50.00"]  # seed 1 failed
    assert rows[1][:6] == ["wider_dense-width0.05", recipe, "test", "2", "55.00", "7.07"]
    assert rows[0][7:9] == ["1", "0.00"]  # of seed 0 alone; unpaired it would be -5
    del trained[:]
    assert main(["sweep", path, "--baseline", "simple"]) == 2 and not trained
    assert f"--baseline must be one of simple-width0.05/{recipe}, " in capsys.readouterr().err


def test_record_of_other_settings_stops_the_sweep_before_it_starts(grid, output, trained):
    runs = grids.read(grid())
    records.write(a_record(runs[0]) | {"fingerprint": "another"})
    with pytest.raises(ValueError, match="was made with another fingerprint"):
        sweeps.train(runs)
    assert not trained


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_table_shows_the_epochs_and_a_terminal_shows_all_runs_always(grid, output, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    first, second = grids.read(grid(old="[30, 40]", new="30"))[:2]
    path = records.write(a_record(first) | {"status": "running"}).with_name("seed0.json")
    for file in (io.StringIO(), Terminal()):
        table = sweeps._Table({first: path, second: path.with_name("seed1.json")}, file)
        for _ in range(2):
            table.draw()
        lines = [re.sub(" +", " ", line) for line in file.getvalue().splitlines()]
        shown = f"epoch 2/2, training top-1 100.0% {first}"
        if file.isatty():  # two lines, then up by two and the same two
            assert lines == [
                f"\x1b[2K{shown}",
                f"\x1b[2Kwaits {second}",
                f"\x1b[2A\x1b[2K{shown}",
                f"\x1b[2Kwaits {second}",
            ]
        else:
            assert lines == [shown]


def test_table_of_more_runs_than_lines_redraws_those_that_are_seen(grid, output, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "2")
    runs, file = grids.read(grid(old="[30, 40]", new="30")), Terminal()
    table = sweeps._Table({run: output / "none.json" for run in runs}, file)
    table.draw()
    before = len(file.getvalue())
    table.draw()
    assert re.sub(" +", " ", file.getvalue()[before:]) == f"\x1b[1A\x1b[2Kwaits {runs[-1]}\n"


def test_cluster_without_ray_says_what_to_install(grid, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'a cluster needs Ray: pip install "\.\[ray\]"'):
        sweeps.train(grids.read(grid()), address="auto", file=io.StringIO())


@pytest.mark.parametrize(
    "wanted, gpus, message",
    [
        ({"cpus": 4, "gpus": None}, 1, None),
        ({"cpus": 8, "gpus": 0}, 0, None),
        (
            {"cpus": 9, "gpus": 0},
            None,
            "9 cpus and 0 gpus for one run: lower cpus or gpus in the grid; they have 4 cpus, 2 gpus; 8 cpus, 0 gpus",
        ),
        ({"cpus": 8, "gpus": None}, None, "no machine has 8 cpus and 1 gpus"),
    ],
)
def test_run_needs_a_machine_that_has_its_processors_and_gpus(wanted, gpus, message):
    machines = [{"CPU": 4, "GPU": 2}, {"CPU": 8}]
    if message is None:
        assert sweeps._fitting_gpus(wanted, machines) == gpus
    else:
        with pytest.raises(ValueError, match=message):
            sweeps._fitting_gpus(wanted, machines)
    assert sweeps._fitting_gpus({"cpus": 1, "gpus": None}, [{"CPU": 2}]) == 0


def test_error_of_a_run_and_other_images_are_a_reason_and_not_the_end_of_the_sweep(grid, output, monkeypatch):
    monkeypatch.setattr(sweeps.os, "environ", dict(sweeps.os.environ))
    monkeypatch.setattr(sweeps, "_end_with", lambda parent: None)  # it would end the tests with their parent
    environment.commit()  # keeps its answer, so that no later test gets that of this sweep
    run, fingerprint = grids.read(grid())[0], data.load("standin", 100, 10).fingerprint
    how = {"output": str(output), "commit": "a", "fingerprint": fingerprint}
    assert "has other images than the sweep: STAND-IN" in sweeps._train(run, how | {"fingerprint": "another"})
    for error, reason in ((MemoryError(), "MemoryError"), (OSError("disk\nfull"), "disk")):
        monkeypatch.setattr(experiments, "train", Mock(side_effect=error))
        assert sweeps._train(run, how) == reason
    busy = Mock(side_effect=[_files.Busy("in process 1"), _files.Busy("in process 1"), {"model": "simple-width0.05"}])
    monkeypatch.setattr(experiments, "train", busy)
    monkeypatch.setattr(sweeps, "_PAUSE", 0)
    assert sweeps._train(run, how) == ({"model": "simple-width0.05"}, None)  # another process has just ended
    monkeypatch.setattr(experiments, "train", Mock(side_effect=_files.Busy("in process 1")))
    monkeypatch.setattr(sweeps, "_PATIENCE", -1)
    assert sweeps._train(run, how) == "in process 1"


# --- real trainings ----------------------------------------------------------------------------------------------


def figures(record):
    """What must not depend on where and how often a run was started."""
    names = ("epoch", "loss", "cross_entropy", "top1", "top5")
    return [[row[name] for name in names] for row in record["epochs"]], record["test"]


def test_run_in_a_process_of_its_own_has_the_record_of_the_same_training(grid, output, monkeypatch):
    monkeypatch.setattr(sweeps, "_has_ray", lambda: False)
    (run,) = grids.read(grid(SMALL))
    (record,) = sweeps.train([run], file=io.StringIO()).values()
    assert json.loads(next(output.rglob("seed0.json")).read_text()) == {"schema": 1} | record
    monkeypatch.setenv("FCNN_OUTPUT", str(output / "direct"))
    direct = experiments.train("wider_dense", data.load("standin", 100, 10), run.recipe, width=0.05)
    assert direct["epochs"][-1]["loss"] == pytest.approx(record["epochs"][-1]["loss"], rel=1e-3)
    assert direct["params"] == record["params"]


@pytest.mark.full
@pytest.mark.parametrize("with_ray", [False, True], ids=["one by one", "Ray"])
def test_killed_run_and_killed_sweep_resume_with_the_same_metrics(grid, tmp_path, with_ray):
    """Metrics are equal to the last digit, because the runs are deterministic. No record is lost or doubled."""
    if with_ray and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    path = grid(SMALL.replace("100", "2000").replace("epochs = 1", "epochs = 3") + "\n")
    block = "" if with_ray else "import sys; sys.modules['ray'] = None; "
    command = f"{block}from fcnn_utils.__main__ import main; raise SystemExit(main(['sweep', {str(path)!r}]))"

    def start(name):
        folder = tmp_path / name
        environ = {**os.environ, "FCNN_OUTPUT": str(folder)}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return folder, subprocess.Popen([sys.executable, "-c", command], env=environ, **quiet)

    def wait_for_an_epoch(folder, sweep):
        while not list(folder.rglob("seed0.partial.json")):
            assert sweep.poll() is None
            time.sleep(0.1)
        return json.loads(next(folder.rglob("seed0.partial.json")).read_text())["epochs"][0]

    def record_of(folder, sweep):
        assert sweep.wait(300) == 0
        (found,) = (file for file in folder.rglob("*") if file.is_file())
        return json.loads(found.read_text())

    expected = figures(record_of(*start("whole")))
    folder, sweep = start("killed run")
    first = wait_for_an_epoch(folder, sweep)
    names = ("ray::_train", "spawn_main")
    (worker,) = (
        each
        for each in psutil.process_iter(["cmdline"])
        if any(name in " ".join(each.info["cmdline"] or []) for name in names) and folder.name in str(each.environ())
    )
    worker.kill()
    record = record_of(folder, sweep)
    assert figures(record) == expected and record["epochs"][0] == first  # with its times: it was not trained again
    folder, sweep = start("killed sweep")
    first = wait_for_an_epoch(folder, sweep)
    sweep.kill()
    record = record_of(*start("killed sweep"))
    assert figures(record) == expected and record["epochs"][0] == first
