"""Fixtures of the tests of the course."""

import importlib.util
import shutil

import numpy as np
import pytest

from fcnn_utils.course import data, paths


@pytest.fixture
def course_folder(tmp_path, monkeypatch):
    """An empty folder that counts as the course's, so that no test reads the real records."""
    folder = tmp_path / "course"
    monkeypatch.setattr(paths, "root", lambda: folder)
    return folder


@pytest.fixture
def installed_paths(tmp_path):
    """The module `paths`, as if the package were installed in an environment below `tmp_path`."""
    copy = tmp_path / "environment" / "site-packages" / "fcnn_utils" / "course" / "paths.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(paths.__file__, copy)
    spec = importlib.util.spec_from_file_location("installed_paths", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def dataset():
    """80 training, 20 validation and 50 test images of 8×8 pixels, 10 classes in 2 superclasses."""
    rng = np.random.default_rng(0)

    def split(count):
        fine = np.arange(count) % 10
        return data.Split(rng.integers(0, 256, (count, 8, 8, 3), dtype="uint8"), fine, fine // 5)

    fine_names = tuple(f"class {label}" for label in range(10))
    return data.Dataset("standin-100", "a test", split(80), split(20), split(50), fine_names, ("low", "high"))
