"""The progress of `run`: `fcnn_utils.course.run_progress`."""

import io
import re
import threading

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell

from fcnn_utils.course import run_progress
from fcnn_utils.course.run_progress import CellCounter, EpochLines, RunProgress


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self):
        return True

    def screen(self):
        """The lines that a user sees: the moves of the cursor are carried out."""
        lines, row = [""], 0
        for part in re.split(r"(\x1b\[\d*[AJ]|\r|\n)", self.getvalue()):
            if part == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif part.endswith("A") and part.startswith("\x1b"):
                row -= int(part[2:-1])
                assert row >= 0, "the cursor leaves the screen"
            elif part.endswith("J") and part.startswith("\x1b"):
                del lines[row + 1 :]
                lines[row] = ""
            elif part != "\r":
                assert not part or not lines[row], f"{part!r} is written over {lines[row]!r}"
                lines[row] += part
        return lines[:-1]


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time is 100 seconds, and no thread draws by itself; a terminal has 80 columns."""
    monkeypatch.setattr(run_progress.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(RunProgress, "_tick", lambda self: None)
    monkeypatch.setenv("COLUMNS", "80")


# --- in a terminal -----------------------------------------------------------------------------------------------


def test_terminal_shows_the_cell_the_time_and_what_it_does_of_each_running_notebook():
    file = Terminal()
    with RunProgress(file=file) as progress:
        progress.say("profile smoke")
        with progress.showing("16_step_by_step"), progress.showing("02_cp"):
            progress.at("16_step_by_step", "cell 7 of 19", "Fine-tune for one epoch, or two")
            progress.draw(141.0)
            assert file.screen() == [
                "profile smoke",
                f"  {'16_step_by_step':<30} cell 7 of 19 · 0:41 · Fine-tune for one epoch…",
                f"  {'02_cp':<30} starting · 0:41",
            ]
            progress.say("epoch 1")
            assert [line[:10] for line in file.screen()] == ["profile sm", "epoch 1", "  16_step_", "  02_cp   "]
        progress.say("02_cp done")
        assert file.screen() == ["profile smoke", "epoch 1", "02_cp done"]
    assert file.screen() == ["profile smoke", "epoch 1", "02_cp done"]


def test_time_has_hours_if_needed():
    file = Terminal()
    with RunProgress(file=file) as progress, progress.showing("11"):
        progress.draw(100 + 3600 + 62)
        assert file.screen()[-1].endswith("starting · 1:01:02")


def test_lines_of_notebooks_that_run_side_by_side_stay_whole():
    file, names = Terminal(), [f"{number:02}_notebook" for number in range(4)]

    def work(name):
        with progress.showing(name):
            for cell in range(50):
                progress.at(name, f"cell {cell} of 50", "")
                progress.draw(101.0)
                progress.say(f"{name} {cell}")

    with RunProgress(file=file) as progress:
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(file.screen()) == sorted(f"{name} {cell}" for name in names for cell in range(50))


def test_line_disappears_if_the_notebook_fails():
    file = Terminal()
    with pytest.raises(RuntimeError), RunProgress(file=file) as progress, progress.showing("01"):
        progress.draw(101.0)
        raise RuntimeError
    assert file.screen() == []


# --- in a file ---------------------------------------------------------------------------------------------------


def test_file_gets_a_line_every_half_minute_and_fewer_while_a_cell_lasts():
    file, printed = io.StringIO(), {}
    with RunProgress(file=file) as progress, progress.showing("01"):
        assert file.getvalue() == f"  {'01':<30} running\n"
        progress.at("01", "cell 1 of 2", "a")
        for second in range(1, 400):
            progress.at("01", f"cell {1 + (second >= 300)} of 2", "a")
            before = len(file.getvalue())
            progress.draw(100.0 + second)
            if len(file.getvalue()) > before:
                printed[second] = file.getvalue()[before:]
    assert list(printed) == [30, 90, 210, 300, 360]
    assert printed[90] == f"  {'01':<30} cell 1 of 2 · 1:30 · a\n" and "cell 2 of 2 · 5:00" in printed[300]
    assert "\x1b" not in file.getvalue()


def test_only_lines_on_epochs_are_passed_on():
    said = []
    EpochLines(said.append).write("simple · epoch 1/5 · loss 3\nother\nsimple · epoch 2/5 · loss 2\n")
    assert said == ["    simple · epoch 1/5 · loss 3", "    simple · epoch 2/5 · loss 2"]


# --- the cells ---------------------------------------------------------------------------------------------------


def code(source, tag=None):
    return new_code_cell(source, metadata={"tags": [tag]} if tag else {})


def test_cells_are_counted_and_named_by_their_first_comment_or_the_heading_above():
    cells = [
        new_markdown_cell("# 01. A notebook"),
        code("# For Colab only", "colab"),
        code("SEED = 0", "parameters"),
        code("SEED = 1", "injected-parameters"),
        code("import keras"),
        new_markdown_cell("## 1. Split *the* kernel of `conv1`\n\nText.\n\n### 1.1. By hand\n\nMore."),
        code("x = 1\n# not in the first line"),
        new_markdown_cell("Only text."),
        code("  "),
        code("# Fine-tune for one epoch.\ny = 2"),
        code("# Measure a step of each\n# network in turn"),
    ]
    told = []
    counter = CellCounter(cells[:3] + cells[4:], lambda *what: told.append(what))  # the fourth is papermill's
    for index, cell in enumerate(cells):
        counter(cell=cell, cell_index=index)
    assert told == [
        ("cell 1 of 6", "set-up"),
        ("cell 2 of 6", "set-up"),
        ("cell 3 of 6", "set-up"),
        ("cell 4 of 6", "1.1. By hand"),
        ("cell 5 of 6", "Fine-tune for one epoch"),
        ("cell 6 of 6", "Measure a step of each…"),
    ]
