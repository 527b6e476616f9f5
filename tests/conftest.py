"""Fixtures of all tests, and their order."""

import os

import pytest

# Workers share the processors: threads of several programs slow each other down.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """Let everything that a test writes go to a folder of its own; returns the folder."""
    folder = tmp_path / "out"
    monkeypatch.setenv("FCNN_OUTPUT", str(folder))
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Start with the notebooks, which take longest, and keep the tests of a file together.

    With `--dist=loadgroup` the tests of a group share a worker: those of one file, so that its fixtures are made once.
    The groups of notebooks are independent and say so themselves.
    """
    items.sort(key=lambda item: item.path.name != "test_smoke.py")
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.stem}"))
