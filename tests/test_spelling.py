"""Spelling: no slip that codespell knows, and British prose (but "factorize", as in the thesis's title)."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from fcnn_utils.course import paths, runner

ROOT = paths.root()
NOTEBOOKS = {path.stem: nbformat.read(path, 4) for path in runner.notebooks().values()}
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("book/*.md")]
PROGRAMS = [path for folder in ("fcnn_utils", "book", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
PROGRAMS.remove(Path(__file__))  # it contains slips

AMERICAN = "|".join(
    [
        r"\w*(?<!factor)(?<!s)(?:ize[ds]?|izing|ization)|\w*yz(?:e[ds]?|ing)",
        r"\w*(?:avior|avor|eighbor|olor)\w*|(?<!& )gray\w*|center(?:s|ed|ing)?|defense|catalogs?",
        r"(?:mod|lab|trav)el(?:ed|ing)",
    ]
)


def american_words(text):
    """American spellings in `text`, except in code, formulas, links and titles of works."""
    text = text.split("## References")[0]
    text = re.sub(
        r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|(?<!\*)\*[A-Z][^*]*\*(?!\*)", "", text, flags=re.S
    )
    return re.findall(rf"\b(?:{AMERICAN})\b", text, re.I)


def test_texts_have_no_slips_that_codespell_knows(tmp_path):
    pytest.importorskip("codespell_lib", reason="codespell is not installed")
    for name, notebook in NOTEBOOKS.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(cell.source for cell in notebook.cells))
    (tmp_path / "slip.txt").write_text("It has to recieve this.")
    command = [sys.executable, "-m", "codespell_lib", tmp_path, *PAGES, *PROGRAMS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert [line.split(": ", 1)[1] for line in found.stdout.splitlines()] == ["recieve ==> receive"], found.stdout


def test_american_words_are_found():
    text = "The *Normalized* color of `color` is factorized; its size, 3 parameters, centers on behavior and analyzes."
    assert american_words(text) == ["color", "centers", "behavior", "analyzes"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_prose_of_notebook_is_british(name):
    cells = [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "markdown"]
    assert not american_words("\n\n".join(cells))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_prose_of_page_is_british(path):
    assert not american_words(path.read_text())
