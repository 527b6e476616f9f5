"""The library's commands, called in this process: files in, files out, and what is refused before the work begins."""

import errno
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image

from fcnn_utils import _commands, _files, batch_norm, benchmark, compress, cost, deploy, factorizations
from fcnn_utils.__main__ import main


def save(folder, name="model.keras"):
    """Save a small network, and return its path."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((12, 12, 3))
    for number, filters in enumerate((8, 12, 12)):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv{number}")(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    model = keras.Model(inputs, layers.Dense(5, name="classes")(layers.GlobalAveragePooling2D()(x)), name="tiny")
    model.save(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models")).read_bytes()


@pytest.fixture
def here(tmp_path, monkeypatch, original):
    """The current folder, with model.keras, photos/ and images.npy."""
    monkeypatch.chdir(tmp_path)
    Path("model.keras").write_bytes(original)
    images = np.random.default_rng(0).random((30, 12, 12, 3)).astype("float32")
    np.save("images.npy", images)
    Path("photos").mkdir()
    for number in range(4):
        Image.fromarray((255 * images[number]).astype("uint8")).save(f"photos/{number}.png")
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """The calls of `compress.factorize`, which does nothing but return the model and a report."""
    noted, real = [], compress.factorize

    def factorize(model, **arguments):
        noted.append(arguments)
        return real(model, "spatial", ratio=0.9, verbose=0)

    monkeypatch.setattr(compress, "factorize", factorize)
    return noted


def run(command):
    return main(command.split())


def load(path):
    return keras.saving.load_model(path, compile=False)


def files():
    return sorted(path.name for path in Path().iterdir())


def error_of(arguments, capfd):
    """The sentence of a refused command."""
    assert run(arguments) == 2
    out, error = capfd.readouterr()
    lines = [line for line in error.splitlines() if not line.startswith("loading ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("fcnn_utils: ")
    return lines[0]


# --- factorize ---------------------------------------------------------------------------------------------------


def test_factorize_writes_the_model_its_export_and_a_report(here, capfd):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    budget = 0.6 * cost.total_costs(load("model.keras"))["macs"]
    Path("small.keras").write_text("of an earlier run")
    results = "--output small.keras --export small.onnx --report report.html"
    assert run(f"factorize model.keras --method spatial --macs {budget} {results} --quiet") == 0
    small, (out, error) = load("small.keras"), capfd.readouterr()
    assert cost.total_costs(small)["macs"] <= budget
    x = np.load("images.npy")[:3]
    assert np.allclose(deploy.load("small.onnx")(x), small.predict_on_batch(x), atol=1e-4)
    assert "2 converted" in out and out.splitlines()[-3].startswith("wrote small.keras (0.0")
    assert error.splitlines() == ["loading model.keras"]
    page = Path("report.html").read_text()
    assert "model.keras, factorized" in page and "conv2" in page
    assert f"with --macs {budget:.12g} --method spatial" in page and "and without images." in page
    assert files() == ["images.npy", "model.keras", "photos", "report.html", "small.keras", "small.onnx"]


def test_factorize_fits_to_images(here, capfd):
    options = "--method spatial --ratio 0.5 --quiet --output"
    assert run(f"factorize model.keras {options} plain.keras") == 0
    assert run(f"factorize model.keras {options} fitted.keras --images images.npy") == 0
    assert "images: 30 in images.npy" in capfd.readouterr().err
    x = np.load("images.npy")
    wanted, *found = (load(f"{name}.keras").predict_on_batch(x) for name in ("model", "plain", "fitted"))
    plain, fitted = (np.mean((y - wanted) ** 2) for y in found)
    assert fitted < 0.9 * plain


def test_factorize_passes_on_only_what_was_given(here, calls):
    targets = {"ratio": ("0.5", 0.5), "macs": ("1.5k", 1500), "params": ("2M", 2e6), "size_mb": ("3", 3)}
    for name, (text, value) in targets.items():
        assert run(f"factorize model.keras --report a.html --{name.replace('_', '-')} {text}") == 0
        assert calls.pop() == {name: value}
    words = "--method cp,tucker --speedup 2 --batch 8 --engine openvino --threads 2 --layers conv1,conv2 "
    words += "--exclude classes --uniform --multiple 4 --seed 1 --quiet --images images.npy"
    assert run(f"factorize model.keras --report a.html {words}") == 0
    given = calls.pop()
    assert np.array_equal(given.pop("images"), np.load("images.npy"))
    expected = {"method": ["cp", "tucker"], "speedup": 2, "batch": 8, "engine": "openvino", "threads": 2}
    expected |= {"layers": ["conv1", "conv2"], "exclude": ["classes"], "uniform": True, "multiple": 4, "seed": 1}
    assert given == expected | {"verbose": 0}
    (listed,) = re.findall(r"Made from model.keras on [0-9-]+ with ([^<]*)\.", Path("a.html").read_text())
    assert run(f"factorize model.keras --report b.html {listed}") == 0  # the page lists what makes the same call
    again = calls.pop()
    assert np.array_equal(again.pop("images"), np.load("images.npy")) and again == expected
    assert run("factorize model.keras --report a.html --method svd --max-loss 0.1 --images images.npy") == 0
    assert calls.pop().items() >= {"method": "svd", "max_loss": 0.1}.items()


def test_factorize_passes_scaled_pictures_on(here, calls):
    assert run("factorize model.keras --ratio 0.5 --report a.html --images photos --range -1 1 --max-images 2") == 0
    expected = 2 * np.load("images.npy")[[0, 3]] - 1  # the pictures are of the model's size
    assert np.allclose(calls[0]["images"], expected, atol=2 / 255)
    assert "with --ratio 0.5 --range -1 1 --max-images 2 --images photos." in Path("a.html").read_text()
    mean = "factorize model.keras --ratio 0.5 --report a.html --images photos --range 0 1 --mean 0.5,0.25,0 --std 2"
    assert run(mean) == 0
    assert "--range 0 1 --mean 0.5,0.25,0 --std 2 --images photos." in Path("a.html").read_text()


def test_the_report_page_has_the_warnings(here):
    given = "--images images.npy --report report.html --output small.keras --quiet"
    assert run(f"factorize model.keras --method spatial --ratio 0.5 {given}") == 0
    assert "<p>warning: calibration images: 30 are few. The layers are" in Path("report.html").read_text()


def test_warnings_are_lines_without_a_place_in_the_code(here, monkeypatch, capfd):
    def factorize(model, **arguments):
        warnings.warn("the images look odd", stacklevel=2)
        raise ValueError("stop here")

    monkeypatch.setattr(compress, "factorize", factorize)
    assert run("factorize model.keras --ratio 0.5 --report a.html") == 2
    assert capfd.readouterr().err.splitlines()[1:] == ["warning: the images look odd", "fcnn_utils: stop here"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "say where the result goes: --output small.keras"),
        ("--output small.h5", "--output takes a file .keras; got small.h5"),
        ("--export small.pb", "--export takes a file .onnx, .xml, .tflite; got small.pb"),
        ("--report report.pdf", "--report takes a file .html, .htm; got report.pdf"),
        ("--output model.keras", "--output is the model itself, model.keras"),
        ("--output photos/../model.keras", "--output is the model itself"),
        ("--output none/small.keras", "there is no folder none for --output"),
        ("--output folder.keras", "--output is a folder, folder.keras"),
        ("--output s.keras --images none", "there is no file or folder none"),
        ("--output s.keras --images model.keras", "images must be a folder of pictures, or a file .npy or .npz"),
        ("--output s.keras --range 0 1", "are for pictures: give --images as well"),
        ("--output s.keras --images images.npy --range 0 1", "images.npy is used as it is"),
        ("--output s.keras --images photos --mean 0.5", "--mean and --std go together"),
    ],
)
def test_bad_option_is_one_sentence_before_keras_is_needed(here, monkeypatch, capfd, arguments, message):
    monkeypatch.setattr(_commands, "_load", lambda path: pytest.fail("the model was loaded"))
    Path("folder.keras").mkdir()
    before = files()
    assert message in error_of(f"factorize model.keras --ratio 0.5 {arguments}", capfd) and files() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--ratio 0", "ratio must be a number between"),
        ("", "give exactly one of --ratio, --macs, --params, --size-mb, --speedup or --max-loss"),
        ("--ratio 0.5 --macs 1k", "give exactly one of --ratio, --macs, --params, --size-mb, --speedup or --max-loss"),
        ("--speedup 2", "--speedup and --max-loss need --images"),
        ("--ratio 0.5 --images photos", "say how its training images were scaled: --range 0 1"),
        ("--ratio 0.5 --images photos --preprocess nope", "--preprocess must be one of convnext, "),
        ("--ratio 0.5 --images images.npy --max-images 0", "number of images must be a whole number between 1"),
    ],
)
def test_bad_value_is_one_sentence_before_the_work(here, monkeypatch, capfd, arguments, message):
    monkeypatch.setattr(factorizations, "decompose_many", lambda *args: pytest.fail("layers were converted"))
    assert message in error_of(f"factorize model.keras --output s.keras {arguments}", capfd)
    assert "s.keras" not in files()


def test_missing_engine_is_one_sentence_before_the_work(here, calls, monkeypatch, capfd):
    monkeypatch.setattr(deploy.importlib.util, "find_spec", lambda name: None)
    message = error_of("factorize model.keras --ratio 0.5 --output s.keras --export s.onnx", capfd)
    assert "ONNX Runtime needs onnx, " in message and "pip install" in message
    assert "LiteRT needs" in error_of("factorize model.keras --ratio 0.5 --output s.keras --engine litert", capfd)
    assert "OpenVINO needs" in error_of("latency model.keras --engine openvino", capfd) and not calls


def test_folder_that_cannot_be_written_is_refused_at_once(here, calls, monkeypatch, capfd):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(_files.os, "replace", refuse)
    error = error_of("factorize model.keras --ratio 0.5 --output photos/s.keras", capfd)
    assert "cannot write photos/" in error and "permission denied" in error and not calls


@pytest.mark.parametrize(
    "command, module, extra",
    [("factorize", "onnxruntime", ".[export]"), ("factorize", "jax", ".[jax]"), ("factorize", "PIL", "."),
     ("train", "seaborn", ".[course]")],
)  # fmt: skip
def test_missing_package_is_named_with_the_extra_that_has_it(here, monkeypatch, capsys, command, module, extra):
    def fail(*arguments, **options):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    from fcnn_utils.course import recipes

    monkeypatch.setattr(compress, "factorize", fail)
    monkeypatch.setattr(recipes, "get_recipe", fail)
    arguments = "factorize model.keras --ratio 0.5 --report a.html" if command == "factorize" else "train simple"
    assert run(arguments) == 2
    expected = f'fcnn_utils: this command needs {module}: pip install "{extra}" in a clone'
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_stopped_factorization_promises_no_continuation(here, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "factorize", stop)
    assert run("factorize model.keras --ratio 0.5 --report a.html") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"


# --- model files -------------------------------------------------------------------------------------------------


class Own(layers.Layer):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    "name, message",
    [
        ("none.keras", "there is no file none.keras"),
        ("photos", "photos is a folder, not a model file"),
        ("images.npy", "a model file must be one of .keras, .h5; got images.npy"),
        ("empty.keras", "empty.keras cannot be loaded: the file is damaged, or not a Keras model"),
        ("half.keras", "half.keras cannot be loaded: the file is damaged, or not a Keras model"),
        ("text.h5", "text.h5 cannot be loaded: "),
        ("lambda.keras", "it carries Python code, such as that of a Lambda layer, which is not run"),
        ("lambda.h5", "it carries Python code, such as that of a Lambda layer, which is not run"),
        ("own.keras", "it needs a class or function that is not Keras's own"),
    ],
)
def test_file_that_cannot_be_loaded_is_one_sentence(here, capfd, name, message):
    stem, suffix = name.split(".") if "." in name else (name, "")
    first = {"lambda": layers.Lambda(lambda x: x + 1), "own": Own()}.get(stem)
    if first is not None:
        keras.Sequential([keras.Input((4,)), first]).save(name)
    contents = {"empty": b"", "half": Path("model.keras").read_bytes()[:3000], "text": b"no model"}
    if stem in contents:
        Path(name).write_bytes(contents[stem])
    capfd.readouterr()
    assert message in error_of(f"cost {name}", capfd)


# --- cost and latency --------------------------------------------------------------------------------------------


def test_cost_prints_every_layer_and_the_total(here, capfd):
    assert main(["cost", "model.keras"]) == 0
    out, error = capfd.readouterr()
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    macs = 144 * 9 * (3 * 8 + 8 * 12 + 12 * 12) + 12 * 5
    assert lines["conv1"] == ["conv1", "Conv2D", "12×12×12", "864", "124,416", "0", "6,912"]
    assert lines["total"][-3] == f"{macs:,}" and lines["total"][1] == "5" and error == "loading model.keras\n"
    assert len({len(line) for line in out.splitlines()}) == 1


@pytest.mark.parametrize("engine", ["keras", "onnxruntime"])
def test_latency_measures_models_with_folded_batch_norms(here, monkeypatch, capfd, engine):
    if engine not in deploy.available():
        pytest.skip(f"{engine} is not installed")
    Path("copy.keras").write_bytes(Path("model.keras").read_bytes())
    real, given = benchmark.latency, []
    monkeypatch.setattr(
        benchmark, "latency", lambda models, *rest, **more: given.append(models) or real(models, *rest, **more)
    )
    command = f"latency model.keras copy.keras --engine {engine} --batch 1,2 --rounds 2 --threads 1"
    assert run(command) == 0
    header, *rows = [line.split() for line in capfd.readouterr().out.splitlines() if "Other programs" not in line]
    assert [row[:3] for row in rows] == [[f"{name}.keras", engine, n] for n in "12" for name in ("model", "copy")]
    assert [row[7] for row in rows][::2] == ["1.00", "1.00"]
    names = [layer.name for layer in given[0]["model.keras"].layers]
    assert not [name for name in names if "batch_normalization" in name]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("model.keras", {"keras": "model.keras"}),
        ("model.keras b.onnx", {"onnxruntime": "model.keras b.onnx"}),
        ("model.keras b.onnx c.xml", {"onnxruntime": "model.keras b.onnx", "openvino": "model.keras c.xml"}),
        ("b.onnx sub/b.onnx", {"onnxruntime": "b.onnx sub/b.onnx"}),
        (
            "b.onnx model.keras --engine keras,onnxruntime",
            {"keras": "model.keras", "onnxruntime": "b.onnx model.keras"},
        ),
    ],
)
def test_latency_measures_exported_files_in_their_engine(here, monkeypatch, capfd, arguments, expected):
    """Exported files are passed on by their paths; the measuring is replaced."""
    Path("sub").mkdir()
    for name in ("b.onnx", "sub/b.onnx", "c.xml"):
        Path(name).write_text("")
    given = {}

    def latency(models, batch, engine, **options):
        given[engine] = " ".join(models)
        kinds = {name: str if name != "model.keras" else keras.Model for name in models}
        assert all(isinstance(model, kinds[name]) for name, model in models.items())
        row = dict.fromkeys(benchmark.COLUMNS, 1.0) | {"model": "x", "engine": engine, "background_load": 0.5}
        return benchmark.pd.DataFrame([row])

    monkeypatch.setattr(benchmark, "latency", latency)
    monkeypatch.setattr(deploy, "_check_installed", lambda *args, **options: None)
    assert main(["latency", *arguments.split()]) == 0 and given == expected
    out = capfd.readouterr().out
    assert ("measured one after another" in out) == (len(expected) > 1) and "Other programs took 50%" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("model.keras none.onnx", "there is no file none.onnx"),
        ("model.keras images.npy", "a model file must be one of .keras, .h5, .onnx, .xml, .tflite; got images.npy"),
        ("model.keras --engine tensorrt", "engine must be one of keras, onnxruntime, openvino, litert; got 'tensorrt'"),
        ("model.keras b.onnx --engine litert", "b.onnx is for the engine onnxruntime; --engine leaves it out"),
    ],
)
def test_latency_refuses_bad_arguments_before_a_model_is_loaded(here, monkeypatch, capfd, arguments, message):
    monkeypatch.setattr(_commands, "_load", lambda path: pytest.fail("a model was loaded"))
    Path("b.onnx").write_text("")
    assert message in error_of(f"latency {arguments}", capfd)


def test_latency_compares_a_model_with_an_exported_file(here, capfd):
    deploy.export(batch_norm.fold_batch_norm(load("model.keras")), "b.onnx")
    assert run("latency model.keras b.onnx --rounds 2") == 0
    assert "b.onnx" in capfd.readouterr().out


# --- the command line --------------------------------------------------------------------------------------------


def test_engines_of_the_options_are_those_of_the_library():
    assert _commands.ENGINES == deploy.ENGINES
    assert _commands._ENGINE_OF == deploy._ENGINE_OF


@pytest.mark.parametrize("text, value", [("60M", 6e7), ("1.5k", 1500), ("2e6", 2e6), ("1G", 1e9)])
def test_counts_may_have_a_unit(text, value):
    assert _commands._count(text) == value


@pytest.mark.parametrize("text", ["", "M", "60Mi", "sixty"])
def test_bad_count_prints_usage(capsys, text):
    with pytest.raises(SystemExit) as stop:
        main(["factorize", "model.keras", "--macs", text])
    assert stop.value.code == 2 and "not a number such as 60e6, 60M or 500k" in capsys.readouterr().err


def test_program_names_itself_as_it_was_started(monkeypatch, capsys):
    for program, name in (("/bin/fcnn", "fcnn"), ("fcnn.exe", "fcnn"), ("x/__main__.py", "python -m fcnn_utils")):
        monkeypatch.setattr(sys, "argv", [program])
        with pytest.raises(SystemExit):
            main(["cost", "--help"])
        assert capsys.readouterr().out.startswith(f"usage: {name} cost ")


def test_process_shows_progress_first_and_nothing_of_the_backend(here):
    """In a process of its own, without the course and its packages."""
    absent = ["fcnn_utils.course", "matplotlib", "seaborn", "sklearn", "pooch", "tqdm", "papermill", "IPython"]
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n"
        "from fcnn_utils.__main__ import main\n"
        "sys.exit(main('factorize model.keras --method spatial --ratio 0.5 --output s.keras --quiet'.split()))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.stderr == "loading model.keras\n" and found.returncode == 0
    assert found.stdout.splitlines()[-1].startswith("wrote s.keras") and load("s.keras").count_params() > 0
