"""Folders of the course and of its output: `fcnn_utils.course.paths`."""

import io
import sys
from pathlib import Path

import pytest

from fcnn_utils.course import paths


@pytest.fixture
def other_course(tmp_path):
    """A folder with the file that marks the course."""
    folder = tmp_path / "other"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "notebooks" / "profiles.toml").touch()
    return folder


def test_root_is_the_checkout_of_the_package(other_course, monkeypatch):
    monkeypatch.chdir(other_course)
    assert paths.root() == Path(__file__).resolve().parents[2]


def test_root_of_an_installed_package_is_the_nearest_course_upwards(
    installed_paths, other_course, tmp_path, monkeypatch
):
    for folder in (other_course, other_course / "notebooks"):
        monkeypatch.chdir(folder)
        assert installed_paths.root() == other_course
    monkeypatch.chdir(tmp_path)
    assert installed_paths.root() is None


def test_output_is_chosen_by_the_environment_then_the_course_then_the_current_folder(
    installed_paths, other_course, output, tmp_path, monkeypatch
):
    monkeypatch.chdir(other_course / "notebooks")
    assert installed_paths.output() == output
    monkeypatch.setenv("FCNN_OUTPUT", "")
    assert installed_paths.output() == other_course / "build" / "explore"
    monkeypatch.delenv("FCNN_OUTPUT")
    assert installed_paths.output() == other_course / "build" / "explore"
    monkeypatch.chdir(tmp_path)
    assert installed_paths.output() == tmp_path / "fcnn_output"
    assert not any(tmp_path.rglob("fcnn_output"))  # asking makes no folder


def test_paths_are_shown_relative_to_the_current_folder_and_in_notebooks_to_the_course(
    installed_paths, other_course, tmp_path, monkeypatch
):
    inside, outside = other_course / "results" / "a.json", tmp_path / "a.json"
    monkeypatch.chdir(other_course)
    assert installed_paths.shown(inside) == installed_paths.shown("results/a.json") == "results/a.json"
    assert installed_paths.shown(outside) == str(outside)
    monkeypatch.chdir(other_course / "notebooks")
    assert installed_paths.shown(inside) == "results/a.json"
    monkeypatch.chdir(tmp_path)
    assert installed_paths.shown(inside) == "other/results/a.json"
    (other_course / "results").mkdir()
    monkeypatch.chdir(other_course / "results")
    assert installed_paths.shown(inside) == "a.json"
    assert installed_paths.shown(other_course / "b") == str(other_course / "b")


@pytest.mark.parametrize("encoding, shown", [("utf-8", "a · b"), ("ascii", "a ? b"), ("latin-1", "a · b")])
def test_line_is_printed_by_a_terminal_that_cannot_show_it(monkeypatch, encoding, shown):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    paths.say("a · b")
    assert terminal.buffer.getvalue().decode(encoding) == f"{shown}\n"
