"""The structure of the package: who imports whom, and how large files and functions are."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import fcnn_utils

PACKAGE = Path(fcnn_utils.__file__).parent
SOURCES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
# The modules that import a backend, inside functions: Keras has no function for what they need.
USE_A_BACKEND = {"benchmark", "course.environment"}


def module_name(path):
    """Name of a file's module below `fcnn_utils`: "cost", "course.networks", "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): ast.parse(source) for path, source in SOURCES.items()}


def imports(tree):
    """Yield the full name of everything that the code below a node imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def imported_modules(name):
    """Modules of this package that a module imports, each at its deepest: "course.data.medmnist"."""
    found = set()
    for imported in imports(MODULES[name]):
        if imported.split(".")[0] == "fcnn_utils":
            path = imported.removeprefix("fcnn_utils").lstrip(".")
            found.add(path if path in MODULES else path.rpartition(".")[0])
    return found - {name, ""}


def test_the_library_does_not_import_the_course():
    library = [name for name in MODULES if name.split(".")[0] not in ("course", "__main__")]
    assert len(library) >= 15
    assert not {name: found for name in library if (found := [m for m in imported_modules(name) if "course" in m])}


def test_imports_are_absolute_and_have_no_cycle():
    assert not [name for tree in MODULES.values() for name in imports(tree) if name.startswith(".")]
    order = graphlib.TopologicalSorter({name: imported_modules(name) for name in MODULES})
    assert len(list(order.static_order())) >= len(MODULES) - 1  # raises CycleError


def test_backends_are_imported_inside_the_functions_that_need_one():
    backends = {"tensorflow", "jax", "torch"}
    users = {name for name, tree in MODULES.items() if backends & {one.split(".")[0] for one in imports(tree)}}
    assert users == USE_A_BACKEND
    for name in users:
        top = ast.Module([node for node in MODULES[name].body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        assert not backends & {one.split(".")[0] for one in imports(top)}, name


def test_no_file_is_over_400_lines():
    assert not {path.name: count for path, source in SOURCES.items() if (count := len(source.splitlines())) > 400}


@pytest.mark.parametrize(("what", "limit"), [("long", 60), ("parameters", 8)])
def test_functions_over_a_limit_give_a_reason(what, limit):
    """The line before such a function is a comment, `# long: …` or `# parameters: …`."""
    unexplained = []
    for path, source in SOURCES.items():
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                count = len(given.posonlyargs + given.args + given.kwonlyargs) + bool(given.vararg) + bool(given.kwarg)
                size = node.end_lineno - node.lineno + 1 if what == "long" else count
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                before = "\n".join(lines[max(0, first - 4) : first - 1])
                if size > limit and f"# {what}:" not in before:
                    unexplained.append((path.name, node.name, size))
    assert not unexplained


@pytest.mark.parametrize("module", ["fcnn_utils", "fcnn_utils.factorizations", "fcnn_utils.rank_selection"])
def test_what_needs_no_keras_imports_none(module):
    code = f"import sys, {module}; print(*sorted({{'keras', 'tensorflow', 'jax', 'torch'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
