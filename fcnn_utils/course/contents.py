"""The contents of the course, as its notebooks give them: titles, questions, run times.

The first cell of each notebook has its title, its question in bold, and a line "Run time: …".
"""

import dataclasses
import json
import re

from fcnn_utils.course import paths

PARTS = {  # first chapter of each part -> title of the part, as in the README
    "01": "I Low rank and tensors",
    "08": "II The thesis's networks",
    "11": "III Training and results",
    "15": "IV Compressing a trained network",
    "19": "V Beyond",
}


@dataclasses.dataclass(frozen=True)
class Chapter:
    """A notebook: name of its file, number ("07"), title, question and run time ("30 seconds"), all as text."""

    file: str
    number: str
    title: str
    question: str
    run_time: str


def files(folder):
    """Return the paths of the notebooks of the course in `folder`, in order."""
    return sorted((folder / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def chapters():
    """Return a `Chapter` for each notebook of the course, in order.

    Raises:
        ValueError: if there is no course here, or a notebook has no title, question or run time.
    """
    if paths.root() is None:
        raise ValueError("there is no course here, no folder with notebooks/profiles.toml")
    return [_chapter(path) for path in files(paths.root())]


def table():
    """Return the chapters from 01 on as a table in Markdown, with a row for the title of each part."""
    lines = ["| chapter | question | it runs for |", "|:---|:---|:---|"]
    for chapter in chapters():
        if chapter.number in PARTS:
            lines.append(f"| **{PARTS[chapter.number]}** | | |")
        if chapter.number != "00":
            lines.append(
                f"| [{chapter.number} {chapter.title}]({chapter.file}) | {chapter.question} | {chapter.run_time} |"
            )
    return "\n".join(lines)


def _chapter(path):
    source = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    title = re.match(r"# (\d\d)\. (.+)\n", source)
    question = re.search(r"^\*\*(.+\?)\*\*$", source, re.MULTILINE)
    run_time = re.search(r"^Run time: (?:about )?(.+?)(?: on \d+ CPU cores|[.,;])", source, re.MULTILINE)
    if not (title and question and run_time):
        raise ValueError(f"the first cell of {path.name} needs a title, a question in bold and a line 'Run time: …'")
    return Chapter(path.name, *title.groups(), question[1], run_time[1])
