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
    monkeypatch.setenv("FCNN_CACHE", str(tmp_path / "cache"))
    return folder


def pytest_collection_modifyitems(items):
    """Start with the notebooks, which take longest."""
    items.sort(key=lambda item: item.path.name != "test_smoke.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let the tests of a file share a worker, so that its fixtures are made once. Notebooks may have one each.

    The groups of xdist (`--dist=loadgroup`) do not work with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith("test_smoke.py") else file

    return ByFile(config, log)
