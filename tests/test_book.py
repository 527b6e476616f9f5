"""The teaching document: `book/build.py`, and what it needs of the notebooks."""

import importlib.util
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import pytest

from fcnn_utils.course import runner

pytest.importorskip("myst_nb", reason="MyST-NB is not installed (requirements-book.txt)")
_SPEC = importlib.util.spec_from_file_location("build", runner.ROOT / "book" / "build.py")
build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(build)

NOTEBOOKS = {path.stem: nbformat.read(path, 4) for path in runner.notebooks().values()}


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return NOTEBOOKS[request.param]


# --- what the notebooks say --------------------------------------------------------------------------------------


def test_figures_are_numbered_in_order_and_each_has_its_caption(notebook):
    number = build.title(notebook)[:2]
    numbers = [figure for figure, _ in build.captions(notebook)]
    assert numbers == [f"{number}.{count}" for count in range(1, 1 + len(numbers))] and numbers
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert code.count("plots.save(") == len(numbers)


def test_the_text_speaks_of_every_figure(notebook):
    mentioned = set(re.findall(build.MENTION, build.prose(notebook)))
    assert {number for number, _ in build.captions(notebook)} <= mentioned


def citations(notebook):
    """(name, year) of each: a citation is a year behind a name, "(Kruskal 1977)", "Kolda & Bader (2009)"."""
    text = build.prose(notebook).split("## References")[0]
    return set(re.findall(r"([A-Z][\w\-’]+)(?: et al\.| & [A-Z][\w\-]+)?,? \(?((?:19|20)\d\d)\)?", text))


def test_citations_are_found():
    assert {("Kruskal", "1977"), ("Leurgans", "1993")} & citations(NOTEBOOKS["01_low_rank_and_cp"])
    assert sum(len(citations(notebook)) for notebook in NOTEBOOKS.values()) > 30


def test_every_work_that_is_cited_is_listed(notebook):
    cited, works = citations(notebook), build.references(notebook)
    missing = {who for who in cited if not any(who[0] in work and who[1] in work for work in works)}
    assert not missing, (missing, works)


def test_a_work_is_listed_with_its_year_and_where_it_is_to_be_had(notebook):
    for work in build.references(notebook):
        assert re.search(r"\b(19|20)\d\d\b|https?://|thesis", work), work


def test_a_solution_is_folded_and_closed(notebook):
    text = build.prose(notebook)
    assert text.count("<details><summary>") == text.count("</details>") >= 2


SECTION = r"\]\((\d\d_\w+)\.ipynb\),? (?:sections?|section) ((?:\d+(?:\.\d+)?(?:, | and | to )?)+)"


def test_sections_of_other_notebooks_are_there(notebook):
    for name, numbers in re.findall(SECTION, build.prose(notebook)):
        sections = re.findall(r"^##+ (\d+(?:\.\d+)?)\.? ", build.prose(NOTEBOOKS[name]), re.M)
        assert set(re.findall(r"\d+(?:\.\d+)?", numbers)) <= set(sections), (name, numbers)


def test_references_to_sections_are_found():
    assert sum(len(re.findall(SECTION, build.prose(notebook))) for notebook in NOTEBOOKS.values()) > 25


def test_exercises_are_of_three_grades(notebook):
    exercises = build.prose(notebook).split("## Exercises")[1].split("## References")[0]
    grades = re.findall(r"^\*\*\d+\.\*\* \*\(([\w, ]+)\)\*", exercises, re.M)
    assert len(grades) == len(re.findall(r"^\*\*\d+\.\*\*", exercises, re.M)) >= 3
    assert {"paper", "code", "open"} <= set(re.findall(r"\w+", " ".join(grades))) and grades[-1] == "open", grades


def test_numbers_in_between_are_wanted_too():
    cell = nbformat.v4.new_markdown_cell("**Know first:** a ([01](01_a.ipynb)), b ([04](04_b.ipynb)–[07](07_c.ipynb)).")
    assert build.known_first(nbformat.v4.new_notebook(cells=[cell])) == [1, 4, 5, 6, 7]


# --- the pages ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built from the committed notebooks; a warning of Sphinx's fails it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("book")
        patch.setattr(build, "BUILD", folder)
        patch.setattr(build, "SOURCE", folder / "source")
        build.main(["html"])
        yield folder / "html"


class Page(HTMLParser):
    """What a page is made of: its links, ids, images without alternative text, and what it loads."""

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


def test_every_notebook_has_its_page_and_every_module_its_section(pages, site):
    assert {f"notebooks/{name}.html" for name in NOTEBOOKS} <= {str(path.relative_to(site)) for path in pages}
    assert {f"module-fcnn_utils.{name}" for name in build.fcnn_utils.__all__} <= pages[site / "interface.html"].ids


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


def test_nothing_is_loaded_from_elsewhere(pages, site):
    for path, page in pages.items():
        assert not [load for load in page.loads if re.match(r"(https?:)?//", load)], path.name
    for path in [*site.rglob("*.css"), *pages]:
        assert not re.search(r"@import[^;]*http|url\(['\"]?(https?:)?//", path.read_text()), path.name


def test_every_image_can_be_read_out(pages):
    assert not {path.name: page.mute for path, page in pages.items() if page.mute}


def test_every_figure_is_in_the_list_of_figures(pages, site):
    listed = pages[site / "figures.html"].links
    numbers = [number for notebook in NOTEBOOKS.values() for number, _ in build.captions(notebook)]
    assert len(numbers) > 40
    for number in numbers:
        assert any(link.endswith(f"#{build.anchor(number)}") for link in listed), number


def test_a_page_has_its_equations_and_figures(site):
    page = site / "notebooks" / "01_low_rank_and_cp.html"
    text = page.read_text()
    assert r"\tag{1.1}" in text and r"\begin{split}" not in text
    assert "../_static/mathjax/tex-chtml.js" in [load.split("?")[0] for load in Page(page).loads]
    assert (site / "_static" / "mathjax" / "tex-chtml.js").exists()
