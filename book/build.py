"""Render the course: `make book` -> build/book/html, a site that needs no network, and build/book/course.pdf.

The notebooks are rendered as they are committed; nothing is executed. The front page is the README. Some contents are
collected on separate pages: prerequisites as a map of the course, symbols as a page of notation, captions as a list of
figures (and as alternative texts of the images), references as one bibliography, settings as a table of recipes. The
interface comes from the docstrings of `fcnn_utils`.
"""

import base64
import fnmatch
import importlib.util
import io
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
from PIL import Image

import fcnn_utils
from fcnn_utils.course import contents, paths, records, runner
from fcnn_utils.course.recipes import RECIPES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "book"
SOURCE = BUILD / "source"
MENTION = r"(?<!\*\*)Figure (\d\d\.\d+)"  # of a figure in the text; in its caption the number is bold
# A formula in a line of text, with the punctuation after it. Code and displayed formulas match without groups.
FORMULA = r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|(\$[^$\n]+\$)([.,;:)]*)"
REFERENCE = ["library", "commands", "results", "recipe_table", "record_table", "interface", "notation", "figures"]
REFERENCE += ["bibliography"]
PROJECT = ["CONTRIBUTING", "CHANGELOG"]
USES = {  # of the modules of the library, in the order of the page; those of the course follow
    "Compress a model": "compress rank_selection sensitivity calibration fine_tuning",
    "Count, measure and deploy": "cost benchmark batch_norm quantization deploy",
    "Factorizations of a kernel": "factorizations factorizations.*",
    "Layers and graphs of Keras": "blocks layer_kinds keras_graph",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SPEC = importlib.util.spec_from_file_location("browser_pages", HERE / "browser" / "pages.py")
browser_pages = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(browser_pages)


def main(formats=("html", "pdf")):
    shutil.rmtree(BUILD, ignore_errors=True)
    (SOURCE / "notebooks").mkdir(parents=True)
    shutil.copytree(HERE / "static", SOURCE / "static")
    shutil.copytree(ROOT / "figures", SOURCE / "figures")
    shutil.copy(HERE / "conf.py", SOURCE)
    for name in ("LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, SOURCE)
    for path in (*HERE.glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        (SOURCE / path.name).write_text(from_root(path.read_text()))
    notebooks = {path.stem: nbformat.read(path, 4) for path in runner.notebooks().values()}
    draw_map(notebooks, SOURCE / "map.svg")
    (SOURCE / "index.md").write_text(front_page())
    for page in (notation, figures, bibliography, recipe_table, record_table):
        (SOURCE / f"{page.__name__}.md").write_text(page(notebooks))
    (SOURCE / "interface.rst").write_text(interface())
    runtime = browser_pages.fetch_runtime()
    (SOURCE / f"{browser_pages.NAME}.md").write_text(from_root(browser_pages.page(runtime)))
    for name, notebook in notebooks.items():
        nbformat.write(for_sphinx(notebook), SOURCE / "notebooks" / f"{name}.ipynb")
    if "html" in formats:
        sphinx("html")
        browser_pages.add_files(BUILD / "html", runtime)
    if "pdf" in formats:
        sphinx("singlehtml")
        print_pdf(BUILD / "singlehtml" / "index.html", BUILD / "course.pdf")


def sphinx(builder):
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-b", builder]
    command += ["--warning-file", BUILD / "warnings.txt", "-d", BUILD / "doctrees", SOURCE, BUILD / builder]
    run = subprocess.run(command, stderr=subprocess.DEVNULL)  # TensorFlow, which the modules import, is noisy
    if run.returncode:
        sys.exit((BUILD / "warnings.txt").read_text())
    print(f"{builder}: {paths.shown(BUILD / builder / 'index.html')}", flush=True)


def print_pdf(page, target):
    """Print the page that contains everything, with all solutions and hidden cells unfolded."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no PDF: install one of {', '.join(BROWSERS)}, and run this again")
        return
    page.write_text(page.read_text().replace("<details", "<details open"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=100000"]
    options += ["--no-pdf-header-footer", "--generate-pdf-document-outline"]
    command = [browser, *options, f"--print-to-pdf={target}", page.as_uri()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"pdf: {paths.shown(target)}")


# --- contents of a notebook ---------------------------------------------------------------------------------------


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def title(notebook):
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def known_first(notebook):
    """Numbers of its prerequisites: the notebooks that it links to, and those between "[04](…)–[06](…)"."""
    line = re.search(r"^\*\*(?:Know first|Prerequisites):\*\*(.*)$", prose(notebook), re.M)[1]
    numbers = {int(number) for number in re.findall(r"\]\((\d\d)_", line)}
    for first, last in re.findall(r"\[(\d\d)\]\([^)]*\)–\[(\d\d)\]", line):
        numbers |= set(range(int(first), int(last)))
    return sorted(numbers)


def captions(notebook):
    """Yield the number ("01.1") of each figure and the first sentence of its caption."""
    for number, paragraph in re.findall(r"^\*\*Figure (\d\d\.\d+)\.\*\* (.+)$", prose(notebook), re.M):
        yield number, re.split(r"(?<=[.!?)]) +(?=\*Notice|[A-Z(*])", paragraph)[0]


def symbols(notebook):
    """(symbol, meaning) for each row of its table of symbols."""
    table = re.search(r"^\| symbol \| meaning \|\n\|[-|]+\|\n((?:\|.*\n?)+)", prose(notebook), re.M)
    return [re.fullmatch(r"\| (.*?) \| (.*) \|", line).groups() for line in table[1].splitlines()] if table else []


def references(notebook):
    """Its references, one text per work; 00 has none."""
    return re.findall(r"^- (.+)$", prose(notebook).partition("## References")[2], re.M)


# --- pages -------------------------------------------------------------------------------------------------------


def draw_map(notebooks, target):
    """Draw the notebooks as boxes, with an arrow from each to those that build on it."""
    columns = (range(1, 8), range(8, 15), range(15, 22))
    names = {int(name[:2]): title(notebook) for name, notebook in notebooks.items()}
    places = {number: (x, -y) for x, column in enumerate(columns) for y, number in enumerate(column) if number in names}
    before = {int(name[:2]): known_first(notebook) for name, notebook in notebooks.items()}
    figure, ax = plt.subplots(figsize=(9, 8))
    boxes = {}
    for number, place in places.items():
        color = "#dbe9f6" if number < 15 else "#fdebd3"
        box = {"boxstyle": "round,pad=0.5", "facecolor": color, "edgecolor": "0.4"}
        words = textwrap.fill(names[number], 24)
        boxes[number] = ax.text(*place, words, ha="center", va="center", bbox=box, fontsize=10)
    for number, place in places.items():
        for first in before[number]:
            if any(first in before[between] for between in before[number]):
                continue  # another path leads there
            patches = {"patchA": boxes[first].get_bbox_patch(), "patchB": boxes[number].get_bbox_patch()}
            bend = {"connectionstyle": f"arc3,rad={-0.25 if place[0] > places[first][0] else 0}"}
            style = {"arrowstyle": "-|>", "color": "0.4", "shrinkA": 2, "shrinkB": 2, **bend, **patches}
            ax.annotate("", place, places[first], arrowprops=style)
    ax.set(xlim=(-0.6, 2.6), ylim=(-6.5, 0.5))
    ax.axis("off")
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})


def front_page():
    """The README, the map, and the tables of contents: the parts of the course and the reference."""
    readme = (ROOT / "README.md").read_text()
    part, parts = "Start", defaultdict(list)
    for chapter in contents.chapters():
        part = contents.PARTS.get(chapter.number, part)
        parts[part].append(f"notebooks/{chapter.file.removesuffix('.ipynb')}")
    parts |= {"Try it": [browser_pages.NAME], "Reference": REFERENCE, "Project": PROJECT}
    trees = [_tree(name, pages) for name, pages in parts.items()]
    return from_root("\n".join([readme, (HERE / "index.md").read_text(), *trees]))


def _tree(caption, pages):
    return "\n".join(["```{toctree}", f":caption: {caption}", ":hidden:", ":maxdepth: 1", *pages, "```", ""])


def from_root(text):
    """Let the links of a page of the repository, or of its folder `book`, lead to the pages of the book."""
    text = re.sub(r"\]\((?:book/|\.\./)", "](", text)
    return re.sub(r"^!\[(.*)\]\((.*)\)$", r"```{image} \2\n:alt: \1\n:class: drawing\n```", text, flags=re.M)


def link(name):
    return f"[{name[:2]}](notebooks/{name}.ipynb)"


def by_text(notebooks, found):
    """Map everything that `found` finds in the notebooks to links to where it is."""
    where = defaultdict(list)
    for name, notebook in notebooks.items():
        for thing in found(notebook):
            where[thing].append(link(name))
    return {thing: ", ".join(links) for thing, links in where.items()}


def notation(notebooks):
    rows = by_text(notebooks, symbols)
    order = sorted(rows, key=lambda row: (_spelled(row[0]), row[0]))
    lines = [f"| {symbol} | {meaning} *({rows[symbol, meaning]})* |" for symbol, meaning in order]
    lines = [re.sub(r"\]\((?=\d\d_)", "](notebooks/", line) for line in lines]  # relative to this page
    return "\n".join(["# Notation\n", "| symbol | meaning |", "|---|---|", *lines, ""])


def _spelled(symbol):
    """Sort key of a symbol: its letters, Greek ones by name; symbols without letters come last."""
    greek = re.sub(r"\\(?:var)?(epsilon|gamma|mu|pi|rho|sigma|beta)", r"\1", symbol, flags=re.I)
    return re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", greek).lower() or "~"


def figures(notebooks):
    lines = ["# Figures\n"]
    for notebook in notebooks.values():
        drawn = list(captions(notebook))
        if drawn:
            lines += [f"## {title(notebook)}\n"]
            lines += [f"- [{number}](#{anchor(number)}) {sentence}" for number, sentence in drawn] + [""]
    return "\n".join(lines)


def bibliography(notebooks):
    works = by_text(notebooks, references)
    lines = [f"- {linked(work)} *In {works[work]}.*" for work in sorted(works, key=_family_name)]
    return "\n".join(["# Bibliography\n", *lines, ""])


def linked(work):
    """Turn the identifiers in a reference into links."""
    work = re.sub(r"\barXiv:((?:math/)?[\d.]*\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", work)
    return re.sub(r"\bdoi:(10\.\S+?)(?=[.,;]*(?:\s|$))", _doi, work)


def _doi(match):
    address = match[1].replace("<", "%3C").replace(">", "%3E")
    return f"[doi:{match[1]}](https://doi.org/{address})"


def _family_name(work):
    """Sort key of a work: "R. A. Harshman (1970). …" by Harshman, "J. Håstad …" as Hastad."""
    first = re.split(r",| \(|\. \*| et al\.", work.lstrip("["))[0]
    first = unicodedata.normalize("NFKD", re.sub(r"^(\w\.[ -]?)+", "", first))
    return first.encode("ascii", "ignore").decode().lower(), work


def modules():
    """Names of the public modules of the package: "blocks", "course.data"."""
    found = pkgutil.walk_packages(fcnn_utils.__path__, "fcnn_utils.")
    names = (module.name.removeprefix("fcnn_utils.") for module in found)
    return sorted(name for name in names if not any(part.startswith("_") for part in name.split(".")))


def interface():
    """The modules by what they are used for."""
    lines, left = ["Interface", "=========\n", ".. automodule:: fcnn_utils\n"], modules()
    for use, patterns in (*USES.items(), ("The course", "*")):
        chosen = [name for pattern in patterns.split() for name in fnmatch.filter(left, pattern)]
        left = [name for name in left if name not in chosen]
        lines += [use, "-" * len(use) + "\n"]
        lines += [f"{name}\n{'~' * len(name)}\n\n.. automodule:: fcnn_utils.{name}\n   :members:\n" for name in chosen]
    return "\n".join(lines)


def recipe_table(notebooks):
    """What each recipe sets, one column per recipe."""
    settings = [name for name in next(iter(RECIPES.values())).as_dict() if name not in ("name", "assumed", "seed")]
    lines = ["# Recipes\n", "The settings are explained in `recipes` of the [interface](interface.rst).\n"]
    lines += ["| setting | " + " | ".join(f"`{name}`" for name in RECIPES) + " |", "|---|" + "---|" * len(RECIPES)]
    for name in settings:
        values = [getattr(recipe, name) for recipe in RECIPES.values()]
        if len(set(values)) > 1:
            lines.append(
                f"| `{name}` | "
                + " | ".join(f"{value:g}" if _is_number(value) else str(value) for value in values)
                + " |"
            )
    return "\n".join([*lines, ""])


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def record_table(notebooks):
    """The committed records of trainings, one row per network and recipe."""
    found = records.find()
    lines = [
        "# Records\n",
        "Trainings whose records are in `results/`, with the number of seeds. *Validation*: the run was",
    ]
    lines += ["for choosing settings, and its result is that on validation images.\n"]
    lines += [
        "| images | network | recipe | seeds | top-1 (%) | million MACs | trained on |",
        "|---|---|---|---|---|---|---|",
    ]
    for (dataset, model, recipe), runs in found.groupby(["dataset", "model", "recipe"]):
        results = [records.result(record) for record in runs["record"]]
        top1 = f"{100 * np.mean([result['top1'] for _, result in results]):.1f}"
        top1 += ", validation" * ("validation" in dict(results))
        machines = {re.sub(r"\(R\)|^CPU | Processor| 80GB.*", "", each["device"]) for each in runs["record"]}
        macs = f"{runs['macs'].iloc[0] / 1e6:.1f}"
        cells = [dataset, model, recipe, str(len(runs)), top1, macs, ", ".join(sorted(machines))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def anchor(number):
    return f"figure-{number.replace('.', '-')}"


# --- notebooks for Sphinx ----------------------------------------------------------------------------------------


def for_sphinx(notebook):
    """Prepare a notebook for a page: no cell for Colab, and an anchor and an alternative text for each figure."""
    drawn = None
    sentences = dict(captions(notebook))
    notebook.cells = [cell for cell in notebook.cells if "colab" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            drawn = cell if any("image/png" in output.get("data", {}) for output in cell.outputs) else drawn
            continue
        for number in re.findall(r"^\*\*Figure (\d\d\.\d+)\.\*\* ", cell.source, re.M):
            image = {"alt": plain(sentences[number])} | ({"classes": "drawing"} if is_drawing(drawn) else {})
            drawn.metadata["mystnb"] = {"image": image}
            label = f"**Figure {number}.**"
            cell.source = cell.source.replace(label, f"({anchor(number)})=\n{label}")
        cell.source = for_page(cell.source)
    return notebook


def is_drawing(cell):
    """Tell whether most of its last figure is white: a dark page shows it inverted, but not a picture."""
    (*_, png) = (output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    gray = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L"))
    return bool((gray > 250).mean() > 0.5)


def for_page(text):
    """Convert Markdown of a notebook for a page.

    Mentions of figures and identifiers of works become links. A displayed formula with line breaks becomes an equation,
    because Sphinx would change it. A formula and the punctuation after it are kept on one line.
    """
    text = re.sub(MENTION, lambda found: f"[{found[0]}](#{anchor(found[1])})", text)
    text = re.sub(r"\$\$(.+?)\$\$", _display, text, flags=re.S)
    text = re.sub(FORMULA, _unbroken, text, flags=re.S)
    before, heading, works = text.partition("## References")
    return before + heading + "\n".join(map(linked, works.split("\n")))


def _unbroken(match):
    return f'<span class="unbroken">{match[1]}{match[2]}</span>' if match[2] else match[0]


def _display(match):
    equation = match[1].strip()
    return f"\n\\begin{{equation*}}\n{equation}\n\\end{{equation*}}\n" if r"\\" in equation else match[0]


def plain(text):
    return re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text).replace("*", "").replace("`", "").replace("$", "")


if __name__ == "__main__":
    main()
