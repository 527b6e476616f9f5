"""Packaging: pyproject.toml, the requirements files, requirements.lock and the imports agree."""

import ast
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIBRARY = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKED_EXTRAS = ("export", "course", "jupyter", "book", "test")
PLATFORMS = {
    "linux-x86_64": {"sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix"},
    "linux-aarch64": {"sys_platform": "linux", "platform_machine": "aarch64", "os_name": "posix"},
    "macos-arm64": {"sys_platform": "darwin", "platform_machine": "arm64", "os_name": "posix"},
    "windows-x86_64": {"sys_platform": "win32", "platform_machine": "AMD64", "os_name": "nt"},
}
PYTHONS = ("3.11", "3.12", "3.13")


def requirements(lines):
    """The requirements in lines of text as {canonical name: [Requirement, ...]}."""
    found = {}
    for line in lines:
        line = line.split("#")[0].strip()
        if line:
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def read_requirements(name):
    return requirements((ROOT / name).read_text().splitlines())


def as_text(found):
    return sorted(str(requirement) for of_one_name in found.values() for requirement in of_one_name)


def active(found, environment):
    """Those whose marker holds in an environment, as {name: [Requirement, ...]}."""
    chosen = {
        name: [one for one in of_one_name if one.marker is None or one.marker.evaluate(environment)]
        for name, of_one_name in found.items()
    }
    return {name: of_one_name for name, of_one_name in chosen.items() if of_one_name}


def test_requirements_list_what_a_student_needs_and_those_for_colab_no_jupyter():
    for_colab = [*LIBRARY, *EXTRAS["course"], *EXTRAS["export"]]
    assert as_text(read_requirements("requirements-colab.txt")) == as_text(requirements(for_colab))
    expected = requirements([*for_colab, *EXTRAS["jupyter"]])
    assert as_text(read_requirements("requirements.txt")) == as_text(expected)


def test_binder_installs_what_a_student_needs_in_the_locked_versions():
    folder, included = ROOT / "binder", {}
    for line in (folder / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            option, name = line.split()
            included[option] = (folder / name).resolve()
    assert included == {"-c": ROOT / "requirements.lock", "-r": ROOT / "requirements.txt"}


def test_requirements_jax_has_jax_in_place_of_tensorflow():
    groups = [LIBRARY, *(EXTRAS[extra] for extra in ("course", "jupyter", "test", "jax"))]
    expected = requirements([line for group in groups for line in group])
    del expected["tensorflow"]
    assert as_text(read_requirements("requirements-jax.txt")) == as_text(expected)


def test_every_requirement_has_a_lower_bound_and_is_listed_once():
    for group in (LIBRARY, *EXTRAS.values()):
        for name, of_one_name in requirements(group).items():
            assert len(of_one_name) == 1, name
            assert any(bound.operator == ">=" for bound in of_one_name[0].specifier), name
    names = [name for group in (LIBRARY, *EXTRAS.values()) for name in requirements(group)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("platform, python", itertools.product(PLATFORMS, PYTHONS))
def test_lock_satisfies_all_bounds_with_one_version_each(platform, python):
    environment = PLATFORMS[platform] | {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    assert PROJECT["requires-python"] == ">=3.11,<3.14"  # as in PYTHONS
    locked = active(read_requirements("requirements.lock"), environment)
    assert {name: len(pins) for name, pins in locked.items() if len(pins) != 1} == {}
    pins = {name: Version(str(found[0].specifier).removeprefix("==")) for name, found in locked.items()}
    wanted = requirements([*LIBRARY, *(line for extra in LOCKED_EXTRAS for line in EXTRAS[extra])])
    for name, (requirement,) in active(wanted, environment).items():
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is not {requirement}"
    left_out = wanted.keys() - active(wanted, environment).keys()
    assert not left_out & pins.keys(), "the lock pins what pyproject.toml leaves out here"
    assert left_out == ({"openvino"} if platform == "linux-aarch64" else set())


def test_lock_holds_pins_only():
    """No address of a package index, no options, no local files."""
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            (pin,) = Requirement(line).specifier
            assert pin.operator == "==" and Requirement(line).url is None, line
        assert "://" not in line


distributions = functools.cache(packages_distributions)  # {module: [distribution, ...]} of what is installed


def imported(paths, top_level_only=False):
    """{distribution: file} of what Python files import from outside the project."""
    found = {}
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in tree.body if top_level_only else ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in {module.split(".")[0] for module in modules} - {"fcnn_utils", *sys.stdlib_module_names}:
                found[canonicalize_name(distributions().get(module, [module])[0])] = path
    return found


def names(*groups):
    return {name for group in groups for name in requirements(group)}


PACKAGE = set((ROOT / "fcnn_utils").rglob("*.py"))
COURSE = set((ROOT / "fcnn_utils/course").rglob("*.py"))
OPTIONAL = names(*(EXTRAS[extra] for extra in ("export", "int8", "jax", "ray", "torch")))  # of the library


@pytest.mark.parametrize(
    "paths, extras",
    [
        (PACKAGE - COURSE, []),
        (COURSE, ["course", "jupyter"]),
        ((ROOT / "book").rglob("*.py"), ["course", "book"]),
        ((ROOT / "tests").rglob("*.py"), ["course", "jupyter", "book", "test"]),
    ],
    ids=["library", "course", "book", "tests"],
)
def test_imports_are_declared_as_dependencies(paths, extras):
    declared = names(LIBRARY, *(EXTRAS[extra] for extra in extras)) | OPTIONAL
    undeclared = {name: path for name, path in imported(paths).items() if name not in declared}
    assert not undeclared


def test_notebooks_import_only_what_colab_has_or_installs(tmp_path):
    """Jupyter, which Colab has, comes with IPython."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        code = [cell.source for cell in cells if "colab" not in cell.metadata.get("tags", [])]
        (tmp_path / f"{path.stem}.py").write_text("\n".join(code))
    found = imported(tmp_path.glob("*.py"))
    assert {"keras", "matplotlib", "scipy"} <= found.keys()
    assert not found.keys() - read_requirements("requirements-colab.txt").keys() - {"ipython"}


def test_no_module_imports_a_backend_or_an_optional_package_at_its_top():
    found = imported(PACKAGE, top_level_only=True)
    assert not found.keys() & (OPTIONAL | {"tensorflow"}), found


def test_installed_package_holds_every_module_and_works_without_the_checkout(tmp_path):
    if Version(version("setuptools")) < Version("77"):
        pytest.skip("setuptools 77 or newer is needed to build the package without a network")
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(ROOT / "fcnn_utils", source / "fcnn_utils", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", site, source], check=True)

    def modules(folder):
        return {path.relative_to(folder) for path in (folder / "fcnn_utils").rglob("*") if path.suffix != ".pyc"}

    missing = {path for path in modules(source) ^ modules(site) if path.name != "__pycache__"}
    assert not missing
    told = subprocess.run(
        [sys.executable, "-c", "import fcnn_utils; print(fcnn_utils.__version__, fcnn_utils.__file__)"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert told == [PROJECT["version"], str(site / "fcnn_utils/__init__.py")]
    assert list(elsewhere.iterdir()) == []


def test_version_is_the_same_everywhere():
    found = {"pyproject.toml": PROJECT["version"]}
    for name, pattern in (
        ("fcnn_utils/__init__.py", r'^__version__ = "(.+)"'),
        ("CITATION.cff", r"^version: (.+)"),
        ("CHANGELOG.md", r"^## (\S+)"),  # the newest comes first
    ):
        found[name] = re.search(pattern, (ROOT / name).read_text(), re.M)[1]
    assert len(set(found.values())) == 1, found
