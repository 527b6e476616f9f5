"""Fixtures of all tests."""

import pytest


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """Everything that a test writes goes to a folder of its own."""
    folder = tmp_path / "out"
    monkeypatch.setenv("FCNN_OUTPUT", str(folder))
    return folder
