"""The book: `book/build.py`, and what it needs from the notebooks."""

import base64
import importlib.util
import io
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import pytest
from PIL import Image

from fcnn_utils.course import paths, runner
from fcnn_utils.course.recipes import RECIPES

pytest.importorskip("myst_nb", reason="MyST-NB is not installed")
_SPEC = importlib.util.spec_from_file_location("build", paths.root() / "book" / "build.py")
build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(build)

NOTEBOOKS = {path.stem: nbformat.read(path, 4) for path in runner.notebooks().values()}


@pytest.fixture(params=[name for name in NOTEBOOKS if name[:2] != "00"])  # 00 is no chapter: it has only links
def notebook(request):
    return NOTEBOOKS[request.param]


# --- contents of the notebooks -----------------------------------------------------------------------------------


def test_figures_are_numbered_in_order(notebook):
    number = build.title(notebook)[:2]
    numbers = [figure for figure, _ in build.captions(notebook)]
    assert numbers == [f"{number}.{count}" for count in range(1, 1 + len(numbers))] and numbers
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert len(re.findall(r'save\([^"]*?, "\d\d_\w+"', code)) == len(numbers)


def citations(notebook):
    """(name, year) of every citation: "(Kruskal 1977)", "Kolda & Bader (2009)"."""
    text = build.prose(notebook).split("## References")[0]
    return set(re.findall(r"([A-Z][\w\-’]+)(?: et al\.| & [A-Z][\w\-]+)?,? \(?((?:19|20)\d\d)\)?", text))


def test_cited_works_are_listed_with_year_or_address(notebook):
    works = build.references(notebook)
    missing = {who for who in citations(notebook) if not any(who[0] in work and who[1] in work for work in works)}
    assert not missing
    assert all(re.search(r"\b(19|20)\d\d\b|https?://|thesis", work) for work in works)


SECTION = r"\]\((\d\d_\w+)\.ipynb\),? (?:sections?|section) ((?:\d+(?:\.\d+)?(?:, | and | to )?)+)"


def test_sections_that_other_notebooks_mention_exist(notebook):
    for name, numbers in re.findall(SECTION, build.prose(notebook)):
        sections = re.findall(r"^##+ (\d+(?:\.\d+)?)\.? ", build.prose(NOTEBOOKS[name]), re.M)
        assert set(re.findall(r"\d+(?:\.\d+)?", numbers)) <= set(sections), (name, numbers)


def test_citations_and_mentions_of_sections_are_found():
    assert sum(len(citations(notebook)) for notebook in NOTEBOOKS.values()) > 30
    assert sum(len(re.findall(SECTION, build.prose(notebook))) for notebook in NOTEBOOKS.values()) > 5


def test_exercises_have_three_grades_and_folded_solutions(notebook):
    text = build.prose(notebook)
    assert text.count("<details><summary>") == text.count("</details>") >= 2
    exercises = text.split("## Exercises")[1].split("## References")[0]
    grades = re.findall(r"^\*\*[\d.]+\*\* (?:\*\(([\w, ]+)\)\*|(★+))", exercises, re.M)
    grades = [words or {"★": "paper", "★★": "code", "★★★": "open"}[stars] for words, stars in grades]
    assert len(grades) == len(re.findall(r"^\*\*\d[\d.]+\*\*", exercises, re.M)) >= 3
    assert {"paper", "code", "open"} <= set(re.findall(r"\w+", " ".join(grades))) and grades[-1] == "open"


def test_prerequisites_include_notebooks_in_a_range():
    cell = nbformat.v4.new_markdown_cell(
        "**Prerequisites:** a ([01](01_a.ipynb)), b ([04](04_b.ipynb)–[07](07_c.ipynb))."
    )
    assert build.known_first(nbformat.v4.new_notebook(cells=[cell])) == [1, 4, 5, 6, 7]


def test_interface_contains_public_modules_of_library_and_course():
    modules = build.modules()
    assert {"cost", "factorizations", "course.networks.cited", "course.runner"} <= set(modules)
    assert not [name for name in modules if "_checks" in name or "__" in name]
    text = build.interface()
    assert all(text.count(f".. automodule:: fcnn_utils.{name}\n") == 1 for name in modules)


def test_front_page_lists_every_chapter_below_its_part():
    trees = dict(re.findall(r"```\{toctree\}\n:caption: (.*)\n(?::.*\n)*((?:.+\n)*?)```", build.front_page()))
    assert [name.split()[0] for name in trees] == ["Start", "I", "II", "III", "IV", "V", "Try", "Reference", "Project"]
    listed = [page for pages in list(trees.values())[:6] for page in pages.split()]
    assert listed == [f"notebooks/{name}" for name in sorted(NOTEBOOKS)]


def test_links_of_a_page_lead_to_the_pages_of_the_book():
    text = "[a](book/library.md#x) and [b](../notebooks/01.ipynb)\n![c](figures/d.png)\n"
    expected = (
        "[a](library.md#x) and [b](notebooks/01.ipynb)\n```{image} figures/d.png\n:alt: c\n:class: drawing\n```\n"
    )
    assert build.from_root(text) == expected


def test_only_figures_on_white_are_inverted_on_a_dark_page():
    def cell(level):
        image = io.BytesIO()
        Image.new("RGB", (4, 4), (level, level, level)).save(image, "png")
        data = {"image/png": base64.b64encode(image.getvalue()).decode()}
        return nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data=data)])

    assert build.is_drawing(cell(255)) and not build.is_drawing(cell(120))


def test_tables_of_recipes_and_records_have_all():
    assert all(f"`{name}`" in build.recipe_table({}) for name in RECIPES)
    rows = [line for line in build.record_table({}).splitlines() if line.startswith("| cifar100 | simple | ")]
    assert any("| fast | 1 | 56.9 |" in row for row in rows) and "nan" not in build.record_table({})


def test_start_page_is_the_first_and_leaves_no_mark_on_the_pages_about_chapters():
    assert next(iter(NOTEBOOKS)) == "00_start_here"
    only = {"00_start_here": NOTEBOOKS["00_start_here"]}
    assert build.figures(only).strip() == "# Figures" and build.bibliography(only).strip() == "# Bibliography"


# --- the site ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built from the committed notebooks; a warning of Sphinx stops it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("book")
        patch.setattr(build, "BUILD", folder)
        patch.setattr(build, "SOURCE", folder / "source")
        build.main(["html"])
        yield folder / "html"


class Page(HTMLParser):
    """Contents of a page: its links, its ids, the images without alternative text, and the files that it loads."""

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.loads, self.mute = [], set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a":
            self.links.append(values.get("href") or "")
        if tag in ("script", "img", "link", "iframe", "source"):
            self.loads += [values[key] for key in ("src", "href") if values.get(key)]
        if tag == "img" and not values.get("alt"):
            self.mute.append(values.get("src"))


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.mark.full
def test_site_has_a_page_per_notebook_and_a_section_per_module(pages, site):
    assert {f"notebooks/{name}.html" for name in NOTEBOOKS} <= {str(path.relative_to(site)) for path in pages}
    assert {f"module-fcnn_utils.{name}" for name in build.modules()} <= pages[site / "interface.html"].ids


@pytest.mark.full
def test_links_within_the_site_lead_somewhere(pages):
    followed = 0
    for path, page in pages.items():
        for link in page.links:
            target, _, place = unquote(link).partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            goal = (path.parent / target).resolve() if target else path
            assert goal.exists(), (path.name, link)
            assert not place or goal.suffix != ".html" or place in pages[goal].ids, (path.name, link)
            followed += 1
    assert followed > 500


@pytest.mark.full
def test_site_loads_nothing_from_the_network_and_all_images_have_alternative_texts(pages, site):
    for path, page in pages.items():
        assert not [load for load in page.loads if re.match(r"(https?:)?//", load)], path.name
        assert not page.mute, path.name
    for path in [*site.rglob("*.css"), *pages]:
        assert not re.search(r"@import[^;]*http|url\(['\"]?(https?:)?//", path.read_text()), path.name


@pytest.mark.full
def test_all_figures_are_in_the_list_of_figures(pages, site):
    listed = {link.rpartition("#")[2] for link in pages[site / "figures.html"].links}
    numbers = [number for notebook in NOTEBOOKS.values() for number, _ in build.captions(notebook)]
    assert len(numbers) > 40 and {build.anchor(number) for number in numbers} <= listed


@pytest.mark.full
def test_page_has_numbered_equations_and_the_offline_mathjax(site):
    page = site / "notebooks" / "01_low_rank_matrices.html"
    text = page.read_text()
    assert r"\tag{1.1}" in text and r"\begin{split}" not in text
    assert "../_static/mathjax/tex-chtml.js" in [load.split("?")[0] for load in Page(page).loads]
    assert (site / "_static" / "mathjax" / "tex-chtml.js").exists()
