"""Spelling: no slip that codespell knows in any text, and British prose ("factorize" is from the thesis's title)."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from fcnn_utils.course import runner

NOTEBOOKS = {path.stem: nbformat.read(path, 4) for path in runner.notebooks().values()}
PAGES = [*runner.ROOT.glob("*.md"), *runner.ROOT.glob("book/*.md")]
PROGRAMS = [path for folder in ("fcnn_utils", "book", "tests") for path in runner.ROOT.glob(f"{folder}/*.py")]
PROGRAMS.remove(Path(__file__))  # it makes slips

AMERICAN = "|".join(
    [
        r"\w*(?<!factor)(?<!s)(?:ize[ds]?|izing|ization)|\w*yz(?:e[ds]?|ing)",
        r"\w*(?:avior|avor|eighbor|olor)\w*|gray\w*|center(?:s|ed|ing)?|(?:mod|lab|trav)el(?:ed|ing)|defense|catalogs?",
    ]
)


def prose(name):
    if name in NOTEBOOKS:
        return "\n\n".join(cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "markdown")
    return (runner.ROOT / name).read_text()


def american(text):
    """American spellings in `text`, code, formulas, links and titles of works aside."""
    text = text.split("## References")[0]
    text = re.sub(
        r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|(?<!\*)\*[A-Z][^*]*\*(?!\*)", "", text, flags=re.S
    )
    return re.findall(rf"\b(?:{AMERICAN})\b", text, re.I)


def test_words_that_codespell_knows(tmp_path):
    pytest.importorskip("codespell_lib", reason="codespell is not installed (requirements.txt)")
    for name, notebook in NOTEBOOKS.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(cell.source for cell in notebook.cells))
    (tmp_path / "slip.txt").write_text("It has to recieve this.")
    command = [sys.executable, "-m", "codespell_lib", tmp_path, *PAGES, *PROGRAMS]
    found = subprocess.run(command, cwd=runner.ROOT, capture_output=True, text=True)
    assert [line.split(": ", 1)[1] for line in found.stdout.splitlines()] == ["recieve ==> receive"], found.stdout


def test_american_words_are_found():
    text = "The *Normalized* color of `color` is factorized; its size, 3 parameters, centers on behavior and analyzes."
    assert american(text) == ["color", "centers", "behavior", "analyzes"]


@pytest.mark.parametrize("name", [*NOTEBOOKS, *(str(path.relative_to(runner.ROOT)) for path in PAGES)])
def test_prose_is_british(name):
    assert not american(prose(name))
