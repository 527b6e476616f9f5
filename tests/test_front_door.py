"""`import fcnn_utils`: lazy, with every name that it promises."""

import importlib
import pkgutil
import subprocess
import sys
import types

import pytest

import fcnn_utils
from fcnn_utils import factorizations

KERAS_AND_BACKENDS = {"keras", "tensorflow", "jax", "torch"}


def modules_after(statement):
    """Return the top-level modules that a fresh interpreter has imported after a statement."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_imports_nothing_else():
    loaded = modules_after("import fcnn_utils; dir(fcnn_utils)")
    assert "fcnn_utils" in loaded and not loaded & (KERAS_AND_BACKENDS | {"numpy", "scipy", "pandas", "tensorly"})


def test_factorizations_do_not_need_keras():
    loaded = modules_after("import fcnn_utils; fcnn_utils.decompose([[1.0, 2.0], [3.0, 4.0]], 'cp', 1)")
    assert "tensorly" in loaded and not loaded & KERAS_AND_BACKENDS


def test_every_name_is_found_and_documented():
    for name in fcnn_utils.__all__:
        assert callable(getattr(fcnn_utils, name)) and name in dir(fcnn_utils)
        assert name in fcnn_utils.__doc__ or isinstance(getattr(fcnn_utils, name), type)
    assert {cls.__name__ for cls in factorizations.FACTORIZATIONS.values()} <= set(fcnn_utils.__all__)
    assert fcnn_utils.decompose is factorizations.decompose and "__version__" in dir(fcnn_utils)
    with pytest.raises(AttributeError, match="'fcnn_utils' has no attribute 'factorise'"):
        fcnn_utils.factorise  # noqa: B018


def test_no_module_hides_a_name():
    """Importing a submodule sets an attribute of the package, which would take the place of a function."""
    names = {module.name for module in pkgutil.iter_modules(fcnn_utils.__path__)}
    for name in names - {"__main__"}:
        importlib.import_module(f"fcnn_utils.{name}")
    assert not names & set(fcnn_utils.__all__)
    assert not any(isinstance(getattr(fcnn_utils, name), types.ModuleType) for name in fcnn_utils.__all__)
