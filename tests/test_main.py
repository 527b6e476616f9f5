"""The command line: `python -m fcnn_utils`, called in process."""

import os
import subprocess
import sys
import tomllib

import nbformat
import pytest

from fcnn_utils.__main__ import main
from fcnn_utils.course import data, networks, records, runner, training
from fcnn_utils.course.data.download import Unavailable
from fcnn_utils.course.parameters import PARAMETERS
from fcnn_utils.course.recipes import RECIPES


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of two notebooks, which are not run: what is tested here is what is refused before."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "profiles.toml").write_text('[smoke]\nDATASET = "standin"\n[quick]\n[full]\n[reads]\n')
    for name, source in (("01_one", "EPOCHS = 1\nSEED = 0"), ("02_two", "DATASET = 'auto'\nEPOCHS = 1")):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / f"{name}.ipynb")
    monkeypatch.setattr(runner, "NOTEBOOKS", folder)
    monkeypatch.setattr(runner, "_run_one", lambda *args, **kwargs: pytest.fail("a notebook was run"))


@pytest.fixture
def trained(monkeypatch):
    """The calls of `training.train` and `data.load`, which do nothing."""
    calls = {"load": [], "train": []}

    class Nothing:
        def describe(self):
            return "a data set"

    def load(*arguments):
        calls["load"].append(arguments)
        return calls.setdefault("dataset", Nothing())

    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: calls["train"].append((args, kwargs)))
    return calls


def refused(capsys, arguments):
    """What the command line says to `arguments`, which it refuses: one sentence on standard error."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fcnn_utils: "), printed.err
    assert "Traceback" not in printed.err and printed.out == ""
    return lines[0]


def usage(capsys, arguments):
    """As `refused`, where the words themselves are wrong: argparse ends the program with the usage."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: python -m fcnn_utils") and "Traceback" not in error
    return error.splitlines()[-1]


# --- bad arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--profile", "nope"], "profile must be one of smoke, quick, full; got 'nope'"),
        (["--profile", "reads"], "profile must be one of smoke, quick, full; got 'reads'"),
        (["--only", "99"], "notebook must be one of 01, 02; got '99'"),
        (["--only", "01", "3"], "notebook must be one of 01, 02; got '3'"),
        (["--from", "07"], "notebook must be one of 01, 02; got '07'"),
        (["--dataset", "mnist"], "dataset must be one of auto, cifar100, standin; got 'mnist'"),
        (["--set", "NOPE=1"], "got 'NOPE'"),
        (["--set", "EPOCHS=0"], "EPOCHS must be a whole number between 1 and 1000; got 0"),
        (["--set", "EPOCHS=five"], "EPOCHS must be a whole number between 1 and 1000; got 'five'"),
        (["--set", "EPOCHS="], "EPOCHS must be a whole number between 1 and 1000; got ''"),
        (["--set", "EPOCHS"], "--set takes NAME=VALUE; got 'EPOCHS'"),
        (["--set", "EPOCHS=1", "--set", "SEED=-1"], "SEED must be a whole number between 0 and 2147483647; got -1"),
        (["--set", "BATCH_SIZE=8"], "parameter must be one of DATASET, EPOCHS, SEED; got 'BATCH_SIZE'"),
        (["--profile", "full", "--set", "EPOCHS=1"], "the full profile runs the notebooks as they stand"),
        (["--profile", "full", "--dataset", "standin"], "the full profile runs the notebooks as they stand"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_run_refuses(course, capsys, arguments, message):
    assert message in refused(capsys, ["run", *arguments])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["nope"],
            f"model must be one of {', '.join(networks.NAMES)}; got 'nope'",
        ),
        (["simple", "--width", "0"], "width must be a number between 0.001 and 1000.0; got 0.0"),
        (["simple", "--recipe", "nope"], "recipe must be one of thesis, fast, faster, long, medical, tune; got 'nope'"),
        (
            ["simple", "--dataset", "nope"],
            "dataset must be one of cifar100, pathmnist, dermamnist, octmnist, pneumoniamnist",
        ),
        (["simple", "--epochs", "0"], "epochs must be a whole number between 1 and 1000; got 0"),
        (["simple", "--epochs", "-1"], "epochs must be a whole number between 1 and 1000; got -1"),
        (["simple", "--dataset", "standin", "--train-images", "-5"], "between 10 and 2000; got -5"),
        (["simple", "--dataset", "standin", "--train-images", "9"], "between 10 and 2000; got 9"),
        (["simple", "--dataset", "standin", "--test-images", "-5"], "between 1 and 200; got -5"),
        (["simple", "--dataset", "standin", "--test-images", "999"], "between 1 and 200; got 999"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses(monkeypatch, capsys, arguments, message):
    """With a stand-in of 20 images a class, for the sake of time."""
    generate = data.standin.generate
    monkeypatch.setattr(data.standin, "generate", lambda per_class, test_per_class: generate(20, 2))
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: pytest.fail("a training was started"))
    assert message in refused(capsys, ["train", *arguments])


def test_train_refuses_a_bad_seed(monkeypatch, capsys):
    monkeypatch.setattr(training, "fit_epoch", lambda *args: pytest.fail("a training was started"))
    generate = data.standin.generate
    monkeypatch.setattr(data.standin, "generate", lambda per_class, test_per_class: generate(20, 2))
    assert main(["train", "simple", "--dataset", "standin", "--seed", "-1"]) == 2
    assert "seed must be a whole number between 0 and 2147483647; got -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "run | train"),
        (["walk"], "'walk'"),
        (["run", "--nope"], "--nope"),
        (["run", "--only"], "--only"),
        (["train"], "model"),
        (["train", "simple", "--epochs", "five"], "invalid int value: 'five'"),
        (["train", "simple", "--train-images", "1.5"], "invalid int value: '1.5'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_are_none_bring_the_usage(capsys, arguments, message):
    assert message in usage(capsys, arguments)


# --- good arguments ----------------------------------------------------------------------------------------------


def test_train_hands_everything_on(trained, capsys):
    options = ["--dataset", "standin", "--train-images", "500", "--test-images", "100", "--epochs", "2", "--seed", "3"]
    options += ["--width", "0.5", "--retrain", "--save-model", "--save-predictions"]
    assert main(["train", "wider_separable", "--recipe", "thesis", *options]) == 0
    recipe = training.get_recipe("thesis").replace(epochs=2)
    assert trained["load"] == [("standin", 500, 100)]
    kept = {"save_model": True, "save_predictions": True}
    assert trained["train"] == [
        (("wider_separable", trained["dataset"], recipe, 3), {"width": 0.5, "retrain": True, **kept})
    ]
    assert capsys.readouterr().out == "a data set\n"


def test_train_without_options_is_the_faster_recipe_on_all_images(trained):
    assert main(["train", "simple"]) == 0
    assert trained["load"] == [("auto", 0, 0)]
    arguments, options = trained["train"][0]
    assert arguments == ("simple", trained["dataset"], training.get_recipe("faster"), None)
    assert options == {"width": 1.0, "retrain": False, "save_model": False, "save_predictions": False}


def test_run_hands_everything_on(monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "run", lambda *arguments: calls.append(arguments))
    assert main(["run"]) == 0
    words = "run --profile smoke --only 07 08 --dataset standin --set EPOCHS=2 --set RETRAIN=true --fresh --from 07"
    assert main(words.split()) == 0
    assert calls == [
        ("quick", [], None, None, {}, False),
        ("smoke", ["07", "08"], "07", "standin", {"EPOCHS": 2, "RETRAIN": True}, True),
    ]


def test_deterministic_trainings_are_the_same_to_the_last_digit(tmp_path):
    """In two processes; without it the separable network's weights differ from run to run on two cores."""
    words = "train wider_separable --recipe fast --dataset standin --train-images 300 --test-images 100 --epochs 1"
    runs = []
    for folder in ("one", "two"):
        environment = os.environ | {"FCNN_OUTPUT": str(tmp_path / folder)}
        command = [sys.executable, "-m", "fcnn_utils", *words.split(), "--deterministic"]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        (path,) = (tmp_path / folder).glob("results/*/wider_separable/fast-epochs1/seed0.json")
        record = records.read(path)
        timeless = [{key: row[key] for key in ("loss", "cross_entropy", "top1", "top5")} for row in record["epochs"]]
        runs.append((timeless, record["test"], record["deterministic"]))
    assert runs[0] == runs[1] and runs[0][2] is True


# --- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code, message",
    [
        (training.Diverged("the loss is nan at epoch 1, step 2"), 1, "stopped: the loss is nan at epoch 1, step 2\n"),
        (ValueError("the disk is full"), 2, "fcnn_utils: the disk is full\n"),
        (Unavailable("no network"), 2, "fcnn_utils: no network\n"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from here\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_stops_a_training_is_one_line_and_a_code(trained, monkeypatch, capsys, error, code, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(training, "train", fail)
    assert main(["train", "simple"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("bad_value, code", [(True, 2), (False, 1)])
def test_a_notebook_that_failed_is_reported(monkeypatch, capsys, bad_value, code):
    def fail(*args):
        raise runner.NotebookFailed("07 stopped at code cell 3", bad_value)

    monkeypatch.setattr(runner, "run", fail)
    assert main(["run"]) == code
    assert capsys.readouterr().err == "07 stopped at code cell 3\n"


def test_help_names_what_there_is_to_choose(capsys):
    profiles = set(tomllib.loads((runner.NOTEBOOKS / "profiles.toml").read_text())) - {"reads"}
    for command, names in (
        ("train", {*networks.NAMES, *RECIPES, *data.NAMES}),
        ("run", {*profiles, *PARAMETERS["DATASET"]}),
    ):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert len(names) > 5 and not [name for name in names if name not in text]
