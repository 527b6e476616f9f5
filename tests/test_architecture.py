"""Structure of the package: which module imports which, and how long files and functions are."""

import ast
import itertools
import subprocess
import sys
import time
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fcnn_utils

PACKAGE = Path(fcnn_utils.__file__).parent
SOURCES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
# Functions that may import a backend, because Keras has no function for what they need.
MAY_IMPORT_A_BACKEND = {
    "_engines.ready_for_tf2onnx",  # grouped convolutions are functions, which the exporter to ONNX lacks
    "_network_runs.__call__",  # TensorFlow compiles networks that are expensive or run often
    "benchmark.wait_for",  # computations are asynchronous on a GPU
    "course.environment.deterministic",
    "course.environment.gpu",
    "course.environment.has_bfloat16",
    "course.environment.use_devices",  # JAX can divide a CPU into devices
    "course.feeding._dataset",  # tf.data
    "course.feeding._train_function",  # an epoch in one program, by JAX
    "quantization._quantize_litert",  # an enumeration that TensorFlow's converter takes
    "course.environment.setup",  # no function is compiled in the smoke profile
}


def module_name(path):
    """Name of a module without "fcnn_utils.": "cost", "course.networks", and "" for the package itself."""
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


TREES = {module_name(path): ast.parse(source) for path, source in SOURCES.items()}


def imported_names(node):
    """Full names of what an import statement imports; nothing for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "write imports of this package in full"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imported_modules(tree):
    """Modules of this package that are imported, also in functions: `fcnn_utils.cost.layer_costs` counts as "cost"."""
    names = {name for node in ast.walk(tree) for name in imported_names(node) if name.split(".")[0] == "fcnn_utils"}
    names = {name.removeprefix("fcnn_utils").strip(".") for name in names}
    return {name if name in TREES else name.rpartition(".")[0] for name in names}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


IMPORTS = {name: imported_modules(tree) - {name} for name, tree in TREES.items()}


def is_of_the_course(name):
    return name.split(".")[0] in ("course", "__main__")


def test_library_does_not_import_the_course():
    library = [name for name in IMPORTS if not is_of_the_course(name)]
    assert len(library) > 10
    assert not [(name, found) for name in library for found in IMPORTS[name] if is_of_the_course(found)]
    modules = {getattr(fcnn_utils, name).__module__ for name in fcnn_utils.__all__}
    assert not [name for name in modules if name.startswith("fcnn_utils.course")]


def test_imports_have_no_cycle():
    """Imports of the package itself do not count: it imports its modules only when they are used."""
    order = list(TopologicalSorter({name: found - {""} for name, found in IMPORTS.items()}).static_order())
    assert order.index("_checks") < order.index("cost") < order.index("compress")


def test_backends_are_imported_only_where_keras_is_not_enough():
    found = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if {"tensorflow", "jax", "torch"} & {each.split(".")[0] for each in imported_names(node)}:
                around = [function.name for function in functions(tree) if node in ast.walk(function)]
                found.add(".".join([name, *around]))
    assert found == MAY_IMPORT_A_BACKEND


def test_files_have_at_most_400_lines():
    assert not {path.name: lines for path, text in SOURCES.items() if (lines := len(text.splitlines())) > 400}


def parameters(function):
    arguments = function.args
    several = [each for each in (arguments.vararg, arguments.kwarg) if each]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *several]


def test_functions_have_at_most_60_lines_and_8_parameters_or_give_a_reason():
    offenders = []
    for path, text in SOURCES.items():
        source = text.splitlines()
        for function in functions(TREES[module_name(path)]):
            first = min(node.lineno for node in [function, *function.decorator_list])
            before = itertools.takewhile(lambda line: line.lstrip().startswith("#"), source[first - 2 :: -1])
            reasons = " ".join(before)
            lines, count = function.end_lineno - function.lineno + 1, len(parameters(function))
            if lines > 60 and "# long: " not in reasons or count > 8 and "# parameters: " not in reasons:
                offenders.append(f"{path.name}: {function.name} has {lines} lines and {count} parameters")
    assert not offenders


def loaded_after(program):
    """Modules of a process that ran a small program."""
    run = [sys.executable, "-c", f"import sys\n{program}\nprint(*sys.modules, file=sys.stderr)"]
    return set(subprocess.run(run, check=True, capture_output=True, text=True).stderr.split())


@pytest.mark.parametrize(
    "program, absent",
    [
        ("import fcnn_utils", {"numpy", "keras"}),
        ("import fcnn_utils.factorizations", {"keras", "tensorflow"}),
        (
            "from fcnn_utils.course import data, parameters, plots\nfrom fcnn_utils.course.exercises import check\n"
            "plots.setup(0)\ndata.load('standin')\nparameters.check(SEED=0)",
            {"keras", "tensorflow"},
        ),
        (
            "from fcnn_utils.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass",
            {"numpy", "pandas", "keras", "papermill", "tensorflow"},
        ),
    ],
    ids=["package", "factorizations", "theory chapters", "help"],
)
def test_imports_stay_light(program, absent):
    loaded = loaded_after(program)
    assert "fcnn_utils" in loaded and not absent & loaded


def test_front_door_documents_its_names_and_imports_their_modules_on_use():
    assert set(fcnn_utils.__all__) <= set(dir(fcnn_utils))
    assert all(name in fcnn_utils.__doc__ for name in fcnn_utils.__all__ if name.islower())
    loaded = loaded_after("import fcnn_utils as fcnn\nfcnn.CP, fcnn.decompose")
    assert "fcnn_utils.factorizations" in loaded and "keras" not in loaded
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fcnn_utils.nonsense


@pytest.mark.bench
def test_help_answers_in_half_a_second():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fcnn_utils", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 0.5
