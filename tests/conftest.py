"""Fixtures of all tests."""

import pytest


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """Everything that a test writes goes to a folder of its own."""
    folder = tmp_path / "out"
    monkeypatch.setenv("FCNN_OUTPUT", str(folder))
    return folder


def pytest_collection_modifyitems(items):
    """The notebooks first: they take longest, and the other processors do the rest beside them."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
