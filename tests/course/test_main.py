"""The command line: `python -m fcnn_utils`. Most tests call it in this process, and stop before the work begins."""

import io
import os
import platform
import signal
import subprocess
import sys
import tomllib

import nbformat
import pytest

from fcnn_utils.__main__ import main
from fcnn_utils.course import data, experiments, networks, parameters, paths, records, runner, training
from fcnn_utils.course.data.download import Unavailable
from fcnn_utils.course.recipes import RECIPES, get_recipe


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of two notebooks, which must not be executed."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "profiles.toml").write_text('[smoke]\nDATASET = "standin"\n[quick]\n[full]\n[reads]\n')
    for name, source in (("01_one", "EPOCHS = 1\nSEED = 0"), ("02_two", "DATASET = 'auto'\nEPOCHS = 1")):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / f"{name}.ipynb")
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    monkeypatch.setattr(runner, "execute", lambda *arguments: pytest.fail("a notebook was executed"))


@pytest.fixture
def calls(monkeypatch):
    """The calls of `data.load` and `experiments.train`, which do nothing."""
    noted = []
    monkeypatch.setattr(data, "load", lambda *arguments: noted.append(arguments) or "a data set")
    monkeypatch.setattr(experiments, "train", lambda *arguments, **options: noted.append((arguments, options)))
    return noted


# --- bad arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("run --profile nope", "profile must be one of smoke, quick, full; got 'nope'"),
        ("run --profile reads", "profile must be one of smoke, quick, full; got 'reads'"),
        ("run --only 99", "notebook must be one of 01, 02; got '99'"),
        ("run --only 01 3", "notebook must be one of 01, 02; got '03'"),
        ("run --only 1 --from 2", "--only 01 and --from 02 leave no notebook to run; give one of them"),
        ("run --from 07", "notebook must be one of 01, 02; got '07'"),
        ("run --dataset mnist", "dataset must be one of auto, cifar100, standin; got 'mnist'"),
        ("run --set NOPE=1", "got 'NOPE'"),
        ("run --set EPOCHS=0", "EPOCHS must be a whole number between 1 and 1000; got 0"),
        ("run --set EPOCHS=", "EPOCHS must be a whole number between 1 and 1000; got ''"),
        ("run --set EPOCHS", "--set takes NAME=VALUE; got 'EPOCHS'"),
        ("run --set EPOCHS=1 --set SEED=-1", "SEED must be a whole number between 0 and 2147483647; got -1"),
        ("run --set BATCH_SIZE=8", "parameter must be one of DATASET, EPOCHS, SEED; got 'BATCH_SIZE'"),
        ("run --profile full --set EPOCHS=2", "profile full"),
        ("run --profile full --dataset standin", "profile full"),
        ("train nope", f"model must be one of {', '.join(networks.NAMES)}; got 'nope'"),
        ("train simple --width 0", "width must be a number between 0.001 and 1000.0; got 0.0"),
        ("train simple --recipe nope", f"recipe must be one of {', '.join(RECIPES)}; got 'nope'"),
        (
            "train wrn-15-4",
            "model must be wrn-DEPTH-WIDTH with a depth of 6n + 4 (10, 16, 22, to 994) and a width from 1",
        ),
        ("train simple --seed -1", "seed must be a whole number between 0 and 2147483647; got -1"),
        ("train simple --dataset nope", "dataset must be one of cifar100, pathmnist, "),
        ("train simple --epochs 0", "epochs must be a whole number between 1 and 1000; got 0"),
        ("train simple --train-images -5", "number of training images must be a whole number between 10 and"),
        ("train simple --test-images -5", "number of test images must be a whole number between 1 and"),
        ("train simple --dataset greystandin --test-images 999", "got 999"),
    ],
)
def test_bad_value_is_one_sentence_and_exit_code_2_before_data_is_read(course, monkeypatch, capsys, arguments, message):
    if "999" not in arguments:
        monkeypatch.setattr(data.cifar100, "find", lambda: pytest.fail("the data set was looked for"))
    monkeypatch.setattr(experiments, "train", lambda *args, **options: pytest.fail("a training was started"))
    assert main(arguments.split()) == 2
    out, error = capsys.readouterr()
    assert error.startswith("fcnn_utils: ") and message in error and out == "" and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "run | train"),
        ("walk", "'walk'"),
        ("run --nope", "--nope"),
        ("run --only", "--only"),
        ("train", "model"),
        ("train simple --epochs five", "invalid int value: 'five'"),
    ],
)
def test_bad_syntax_prints_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("usage: python -m fcnn_utils")
    assert message in error.splitlines()[-1] and "Traceback" not in error


# --- good arguments ----------------------------------------------------------------------------------------------


def test_train_passes_all_options_on(calls, capsys):
    options = ["--dataset", "standin", "--train-images", "500", "--test-images", "100", "--epochs", "2", "--seed", "3"]
    options += ["--width", "0.5", "--retrain", "--save-model", "--save-predictions"]
    assert main(["train", "wider_separable", "--recipe", "thesis", *options]) == 0
    recipe = get_recipe("thesis").replace(epochs=2, seed=3)
    how = {"width": 0.5, "retrain": True, "save_model": True, "save_predictions": True}
    assert calls == [("standin", 500, 100), (("wider_separable", "a data set", recipe), how)]
    assert capsys.readouterr().out == "a data set\n"


def test_train_uses_recipe_faster_and_all_images_by_default(calls):
    assert main(["train", "simple"]) == 0
    how = {"width": 1.0, "retrain": False, "save_model": False, "save_predictions": False}
    assert calls == [("auto", 0, 0), (("simple", "a data set", get_recipe("faster")), how)]


def test_run_passes_all_options_on(monkeypatch):
    noted = []
    monkeypatch.setattr(runner, "run", lambda *arguments: noted.append(arguments))
    assert main(["run"]) == 0
    words = "--profile smoke --only 07 08 --dataset standin --set EPOCHS=2 --set RETRAIN=true --fresh --from 7 --jobs 1"
    assert main(["run", *words.split()]) == 0
    assert noted == [
        ("quick", [], None, None, {}, False, 2),
        ("smoke", ["07", "08"], "7", "standin", {"EPOCHS": 2, "RETRAIN": True}, True, 1),
    ]


def test_help_lists_all_choices(capsys):
    profiles = set(tomllib.loads((paths.root() / "notebooks" / "profiles.toml").read_text())) - {"order", "reads"}
    choices = {
        "train": {*networks.NAMES, *RECIPES, *data.NAMES},
        "run": {*profiles, *parameters.PARAMETERS["DATASET"]},
    }
    for command, names in choices.items():
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and len(names) > 5 and not [name for name in names if name not in text]


# --- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code, message",
    [
        (training.Diverged("the loss is nan at epoch 1, step 2"), 1, "stopped: the loss is nan at epoch 1, step 2"),
        (ValueError("the disk is full"), 2, "fcnn_utils: the disk is full"),
        (Unavailable("no network"), 2, "fcnn_utils: no network"),
        (KeyboardInterrupt(), 130, "stopped; run the same command to continue from here"),
        (KeyboardInterrupt("epoch 1 is kept"), 130, "stopped: epoch 1 is kept"),
        (BrokenPipeError(32, "Broken pipe"), 2, "fcnn_utils: [Errno 32] Broken pipe"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_stopped_training_is_one_line_and_an_exit_code(calls, monkeypatch, capsys, error, code, message):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(experiments, "train", fail)
    assert main(["train", "simple"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(message)


@pytest.mark.parametrize("bad_value, code", [(True, 2), (False, 1)])
def test_failed_notebook_is_reported(monkeypatch, capsys, bad_value, code):
    def fail(*arguments):
        raise runner.NotebookFailed("07 stopped at code cell 3", bad_value)

    monkeypatch.setattr(runner, "run", fail)
    assert main(["run"]) == code
    assert capsys.readouterr().err == "07 stopped at code cell 3\n"


# --- real trainings ----------------------------------------------------------------------------------------------


SMALL = ["wider_separable", "--width", "0.05", "--epochs", "2", "--train-images", "100", "--test-images", "50"]


def path_of_small(output):
    run = ("greystandin-100", "wider_separable-width0.05", "faster-epochs2", 0)
    return records.path_of(*run, output / "results")


def start(output, *options):
    """Start a training in a process of its own, which writes to the folder `output`."""
    command = [sys.executable, "-m", "fcnn_utils", "train", "--dataset", "greystandin", *options]
    environment = os.environ | {"FCNN_OUTPUT": str(output)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_train_prints_every_epoch_even_on_an_ascii_terminal_and_writes_a_record(output, monkeypatch, capsys):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert main(["train", "--dataset", "greystandin", *SMALL]) == 0
    record, printed = records.read(path_of_small(output)), terminal.buffer.getvalue().decode()
    assert [row["epoch"] for row in record["epochs"]] == [1, 2] and record["status"] == "complete"
    assert "epoch 1/2" in printed and f"{record['epochs'][1]['loss']:.3f}" in printed
    assert main(["train", "--dataset", "greystandin", *SMALL]) == 0
    assert "epoch 1/2" not in capsys.readouterr().out  # the record was read


def test_second_training_is_refused_and_sigterm_keeps_the_epochs(output, monkeypatch, capsys):
    """After the first epoch the same command is given again; after the second one, SIGTERM comes."""
    command, say, codes = ["train", "--dataset", "greystandin", *SMALL, "--epochs", "3"], paths.say, []

    def disturb(line):
        say(line)
        if "epoch 1/3" in line:
            codes.append(main(command))
        if "epoch 2/3" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("FCNN_EAGER", "1")  # faster for so few steps
    monkeypatch.setattr(paths, "say", disturb)
    assert main(command) == 130 and codes == [2]
    second, stopped = capsys.readouterr().err.splitlines()
    assert f"seed0.json is under way in process {os.getpid()} on {platform.node()}; wait until it ends" in second
    assert stopped.startswith("stopped: epochs 1 to 2 of 3 of wider_separable-width0.05 are kept in ")
    assert stopped.endswith("seed0.checkpoint.npz; the next call continues after them")
    monkeypatch.setattr(paths, "say", say)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "going on after epoch 2" in printed and "epoch 3/3" in printed and "epoch 2/3" not in printed
    assert [path.name for path in output.rglob("*") if path.is_file()] == ["seed0.json"]


@pytest.mark.full
def test_killed_training_continues_and_its_record_is_complete(tmp_path):
    process, path = start(tmp_path, *SMALL), path_of_small(tmp_path)
    first = next(line for line in process.stdout if "epoch 1/2" in line)
    process.kill()
    process.wait()
    assert not path.exists()
    again, _ = start(tmp_path, *SMALL).communicate(timeout=300)
    assert "epoch 2/2" in again and "epoch 1/2" not in again
    record = records.read(path)
    assert [row["epoch"] for row in record["epochs"]] == [1, 2] and record["status"] == "complete"
    assert f"{record['epochs'][0]['loss']:.3f}" in first
    assert [file.name for file in path.parent.iterdir()] == ["seed0.json"]


@pytest.mark.full
def test_deterministic_trainings_agree_to_the_last_digit(tmp_path):
    """Without the option, weights of the separable network at full width differ from run to run on two cores."""
    runs = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        process = start(folder, "wider_separable", "--epochs", "1", "--train-images", "300", "--deterministic")
        assert process.wait(timeout=300) == 0
        (path,) = folder.glob("results/*/wider_separable/faster-epochs1/seed0.json")
        record = records.read(path)
        epoch = {key: record["epochs"][0][key] for key in ("loss", "cross_entropy", "top1", "top5")}
        runs.append((epoch, record["test"], record["deterministic"]))
    assert runs[0] == runs[1] and runs[0][2] is True
