"""The notebooks as they are committed: their form and their outputs. No kernel is started."""

import os
import re
import subprocess
import sys

import nbformat
import pytest

from fcnn_utils.course import contents, parameters, paths, runner

PATHS = runner.notebooks().values()


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, 4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def tagged(notebook, tag):
    return [cell for cell in code_cells(notebook) if tag in cell.metadata.get("tags", [])]


# --- form --------------------------------------------------------------------------------------------------------


def test_every_file_has_its_own_number():
    files = sorted((paths.root() / "notebooks").glob("*.ipynb"))
    assert list(PATHS) == files and len(files) >= 5


def test_parameters_are_literals_and_later_cells_check_them(notebook):
    (cell,) = tagged(notebook, "parameters")
    given = {}
    exec(cell.source, given)
    given = {name: value for name, value in given.items() if name.isupper()}
    parameters.check(**given)
    checked = "".join(re.findall(r"check\((.*?)\)", "\n".join(cell.source for cell in code_cells(notebook))))
    assert all(f"{name}={name}" in checked for name in given)
    assert not tagged(notebook, "injected-parameters")


def test_code_cells_are_short_and_explained(notebook):
    lines = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in code_cells(notebook)]
    texts = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert max(lines) <= 25 and len(texts) >= 0.7 * len(lines)


def test_links_to_files_lead_somewhere(notebook):
    for target in re.findall(r"\]\(([^)#:\s]+)\)", prose(notebook)):
        assert (paths.root() / "notebooks" / target).exists(), target


# --- the cell for Colab ------------------------------------------------------------------------------------------

# Runs the cell as Colab would: there, `google.colab` exists and the course is not installed.
_ON_COLAB = """
import sys, types
from IPython.core.interactiveshell import InteractiveShell

sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
InteractiveShell.instance().run_cell(sys.argv[1]).raise_error()
from fcnn_utils.course import paths

print(paths.root())
"""


def last_line_on_colab(source, folder):
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", _ON_COLAB, source]
    run = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    return (run.stdout + run.stderr).strip().splitlines()[-1]


def test_all_notebooks_have_the_same_cell_for_colab():
    """All but 11, which runs without the course."""
    paths = [path for path in PATHS if path.name[:2] != "11"]
    sources = {tuple(cell.source for cell in tagged(nbformat.read(path, 4), "colab")) for path in paths}
    assert len(sources) == 1 and len(sources.pop()) == 1


def test_cell_for_colab_fetches_the_course(tmp_path):
    if not (paths.root() / ".git").exists():
        pytest.skip("this is no git repository to fetch the course from")
    (cell,) = tagged(nbformat.read(next(iter(PATHS)), 4), "colab")
    blank = re.sub(r'COURSE = ".*?"', 'COURSE = ""', cell.source)
    assert "COURSE must be the address" in last_line_on_colab(blank, tmp_path)
    given = blank.replace('COURSE = ""', f'COURSE = "{paths.root().as_uri()}"')
    assert last_line_on_colab(given, tmp_path) == str(tmp_path / "course")


def test_cell_for_colab_refuses_an_address_that_cannot_be_cloned(tmp_path):
    (cell,) = tagged(nbformat.read(next(iter(PATHS)), 4), "colab")
    given = re.sub(r'COURSE = ".*?"', f'COURSE = "{(tmp_path / "nothing").as_uri()}"', cell.source)
    assert "COURSE cannot be cloned: 'file://" in last_line_on_colab(given, tmp_path)


# --- committed outputs -------------------------------------------------------------------------------------------


def test_outputs_belong_to_the_code(notebook):
    """Fails if a notebook's code was changed and the notebook was not executed again with `make full`."""
    assert notebook.metadata.get("executed_source_sha256") == runner.source_hash(notebook)


def test_outputs_are_those_of_one_run_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_table_of_start_page_is_that_of_the_notebooks():
    """Fails if a title, a question or a run time was changed and 00 was not executed again."""
    outputs = [output for cell in code_cells(nbformat.read(runner.notebooks()["00"], 4)) for output in cell.outputs]
    shown = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    assert shown == [contents.table()]


def test_saved_figures_exist_and_their_cells_show_them(notebook):
    for cell in code_cells(notebook):
        for slug in re.findall(r'plots\.save\(.*?"(\d\d_\w+)"', cell.source):
            figure = paths.root() / "figures" / f"{slug}.png"
            assert figure.stat().st_size < 2**20
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), slug
