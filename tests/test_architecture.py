"""The structure of the package: who imports whom, and how large files and functions are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fcnn_utils

PACKAGE = Path(fcnn_utils.__file__).parent
SOURCES = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
BACKENDS = {"tensorflow", "jax", "torch"}
# The only functions that may import a backend themselves: Keras has no function for what they need.
BACKEND_FUNCTIONS = {
    "benchmark": (),
    "deploy": (),
    "course.environment": (),
}


def module_name(path):
    """Name of a file's module below `fcnn_utils`: "cost", "course.networks", "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): ast.parse(source) for path, source in SOURCES.items()}


def absolute_imports(tree):
    """Yield the full name of everything that a module imports, also inside its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(name, tree):
    """Return the modules of this package that a module imports, each at its deepest: "course.data.medmnist"."""
    found = set()
    for imported in absolute_imports(tree):
        path = imported.removeprefix("fcnn_utils").lstrip(".")
        if imported.split(".")[0] == "fcnn_utils":
            found.add(path if path in MODULES else path.rpartition(".")[0])
    return found - {name}


GRAPH = {name: imported_modules(name, tree) for name, tree in MODULES.items()}
