"""The notebooks: their form, their committed outputs, and the whole smoke series with every folded solution."""

import re
import subprocess
import sys

import nbformat
import pytest

from fcnn_utils.course import networks, parameters, runner

PATHS = list(runner.notebooks().values())
NAMES = [path.stem for path in PATHS]


@pytest.fixture(params=PATHS, ids=NAMES)
def notebook(request):
    return nbformat.read(request.param, 4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in code_of(notebook) if tag in cell.metadata.get("tags", [])]


# --- form --------------------------------------------------------------------------------------------------------


def test_numbers_are_unique():
    assert len({name[:2] for name in NAMES}) == len(NAMES) >= 5


def test_parameters_cell_is_literals_that_the_next_cells_check(notebook):
    (cell,) = tagged(notebook, "parameters")
    given = {}
    exec(cell.source, given)
    given = {name: value for name, value in given.items() if name.isupper()}
    parameters.check(**given)
    checked = "".join(re.findall(r"check\((.*?)\)", "\n".join(cell.source for cell in code_of(notebook))))
    assert all(f"{name}={name}" in checked for name in given)
    assert not tagged(notebook, "injected-parameters")


def test_cells_are_short_and_explained(notebook):
    lines = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in code_of(notebook)]
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert max(lines) <= 25 and len(prose) >= 0.7 * len(lines)


def test_links_lead_somewhere(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#:\s]+)\)", prose):
        assert (runner.NOTEBOOKS / target).exists(), target


_COLAB = """
import sys, types
from IPython.core.interactiveshell import InteractiveShell

sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]  # the course is not here
InteractiveShell.instance().run_cell(sys.argv[1]).raise_error()
import fcnn_utils.course.paths

print(fcnn_utils.course.paths.root())
"""


def colab(source, folder):
    """What the cell for Colab leads to in an empty folder of that place: where the package is, or the error."""
    run = subprocess.run([sys.executable, "-c", _COLAB, source], cwd=folder, capture_output=True, text=True)
    return (run.stdout + run.stderr).strip().splitlines()[-1]


def test_the_cell_for_colab_is_the_same_everywhere(notebook):
    (cell,), (first,) = (tagged(one, "colab") for one in (notebook, nbformat.read(PATHS[0], 4)))
    assert cell.source == first.source


def test_on_colab_the_course_is_fetched(tmp_path):
    if not (runner.ROOT / ".git").exists():
        pytest.skip("this is no repository to fetch the course from")
    (cell,) = tagged(nbformat.read(PATHS[0], 4), "colab")
    blank = re.sub(r'COURSE = ".*?"', 'COURSE = ""', cell.source)
    assert "COURSE must be the address of the course's repository" in colab(blank, tmp_path)
    given = blank.replace('COURSE = ""', f'COURSE = "{runner.ROOT.as_uri()}"')
    assert colab(given, tmp_path) == str(tmp_path / "course")
    assert colab(given, tmp_path) == str(tmp_path / "course")  # where it is already


# --- committed outputs -------------------------------------------------------------------------------------------


def test_outputs_belong_to_the_code(notebook):
    """Fails when a notebook's code was changed and the notebook not run again: `make full` runs and signs it."""
    assert notebook.metadata.get("executed_source_sha256") == runner.source_hash(notebook)


def test_outputs_are_those_of_one_clean_run(notebook):
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_figures_are_there_and_shown_by_the_cell_that_saves_them(notebook):
    for cell in code_of(notebook):
        for slug in re.findall(r'plots\.save\(.*?"(\d\d_\w+)"', cell.source):
            assert (runner.ROOT / "figures" / f"{slug}.png").exists(), slug
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), slug


def test_changed_code_is_noticed(notebook):
    before = runner.source_hash(notebook)
    notebook.cells[0].source += "prose"
    assert runner.source_hash(notebook) == before
    code_of(notebook)[-1].source += "\n1"
    assert runner.source_hash(notebook) != before


# --- the smoke series --------------------------------------------------------------------------------------------


def solutions(notebook):
    """The code of the folded solutions, one source each."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    folded = re.findall(r"<details>(.*?)</details>", prose, re.DOTALL)
    return [code for fold in folded for code in re.findall(r"```python\n(.*?)```", fold, re.DOTALL)]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """The whole course in the smoke profile, every notebook with its solutions at its end."""
    folder = tmp_path_factory.mktemp("course")
    source = folder / "notebooks"
    source.mkdir()
    (source / "profiles.toml").write_text((runner.NOTEBOOKS / "profiles.toml").read_text())
    for path in PATHS:
        notebook = nbformat.read(path, 4)
        notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
        nbformat.write(notebook, source / path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "NOTEBOOKS", source)
        patch.setattr(runner, "BUILD", folder / "build")
        yield runner.run("smoke")


@pytest.mark.parametrize("name", NAMES)
def test_smoke_series_runs_and_says_that_its_data_are_a_stand_in(series, name):
    notebook = nbformat.read(series / f"{name}.ipynb", 4)
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    said = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    assert ("STAND-IN" in said) == (name[:2] not in ("02", "03"))  # these take kernels apart and see no image
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_smoke_series_leaves_records_and_figures(series):
    trained = {path.parts[-3] for path in series.glob("results/standin-100/*/faster-batchsize32-epochs1/seed1.json")}
    assert trained == {*networks.THESIS_PLANS, *networks.OUR_PLANS}
    assert (series / "results" / "standin-100" / "simple-narrow" / "fast-batchsize32-epochs1" / "seed0.json").exists()
    assert (series / "results" / "standin-100" / "simple-narrow-cp-4.5x" / "tune-batchsize32" / "seed0.json").exists()
    assert len(list(series.glob("results/standin-100/deeper_*/faster-*trainontrain/seed*.predictions.npz"))) >= 7
    assert len(list(series.glob("results/greystandin/*/medical-epochs1*/seed0.predictions.npz"))) == 2
    cited = ("simple_cp", "wrn-16-2", "inception", "xception", "wang")
    assert all(
        (series / f"results/standin-100/{name}/faster-batchsize32-epochs1/seed0.json").exists() for name in cited
    )
    assert len(list(series.glob("results/standin-100/deeper_*/long-batchsize32-epochs*/seed0.json"))) == 3
    assert (series / "results" / "speed.json").exists()
    assert len(list(series.glob("figures/*.png"))) >= 15


def test_solutions_are_there():
    assert all(len(solutions(nbformat.read(path, 4))) >= 2 for path in PATHS)
