"""The table of contents: `fcnn_utils.course.contents`."""

import re

import nbformat
import pytest

from fcnn_utils.course import contents, paths, runner

FIRST = "# {}. {}\n\n**{}**\n\nNext: [x](x.ipynb)\n\nRun time: {}\n\n**You will** read."


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Function that writes the first cell of a notebook of a course."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(paths, "root", lambda: tmp_path)

    def write(name, source):
        cells = [nbformat.v4.new_markdown_cell(source)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / f"{name}.ipynb")

    return write


def test_table_has_a_row_for_each_chapter_and_each_part(course):
    course(
        "08_net", FIRST.format("08", "A net", "Is it fast?", "three to five minutes on 2 CPU cores, mostly waiting.")
    )
    course("00_start", FIRST.format("00", "Start", "Where?", "about 9 seconds."))
    course("02_tensor", FIRST.format("02", "Tensors", "What is one?", "about 10 seconds. Nothing is trained."))
    course("01_matrix", FIRST.format("01", "Matrices", "You know one. What is it?", "about a minute, at most."))
    assert contents.table().splitlines() == [
        "| chapter | question | it runs for |",
        "|:---|:---|:---|",
        "| **I Low rank and tensors** | | |",
        "| [01 Matrices](01_matrix.ipynb) | You know one. What is it? | a minute |",
        "| [02 Tensors](02_tensor.ipynb) | What is one? | 10 seconds |",
        "| **II The thesis's networks** | | |",
        "| [08 A net](08_net.ipynb) | Is it fast? | three to five minutes |",
    ]


def test_notebook_without_a_question_is_named(course):
    course("01_matrix", FIRST.format("01", "Matrices", "No question.", "about 10 seconds."))
    with pytest.raises(ValueError, match="first cell of 01_matrix.ipynb needs a title, a question in bold and a line"):
        contents.table()


def test_every_notebook_of_this_course_is_a_chapter_and_parts_begin_with_one():
    numbers = [chapter.number for chapter in contents.chapters()]
    assert numbers == list(runner.notebooks()) and contents.PARTS.keys() < set(numbers)
    assert all(re.fullmatch(r"[\w ]*(second|minute)s?", chapter.run_time) for chapter in contents.chapters())


def test_contents_without_a_course_are_refused(monkeypatch):
    monkeypatch.setattr(paths, "root", lambda: None)
    with pytest.raises(ValueError, match="there is no course here"):
        contents.table()
