"""Execute all notebooks in the smoke profile; the full suite adds the solutions of their exercises."""

import re
import shutil

import nbformat
import pytest

from fcnn_utils.course import paths, runner

# Notebooks that run one after the other, because the later ones read what the earlier ones leave. The groups are
# independent, so each may have its own worker. The longest comes first.
GROUPS = [("19",), ("16",), ("17",), ("18",), ("21",), ("20",), ("00",)]
CHAPTERS = [
    ("01", "02", "03", "04"),
    ("05", "06", "07"),
    ("08", "09", "10"),
    ("11", "12", "13", "14"),
    ("15",),
]  # the usual tests execute them in `test_chapter_NN.py`
WITHOUT_IMAGES = ("00", "02", "03", "04", "05", "07", "09", "10", "12", "13", "14")

# What the notebooks must leave in the output folder: pattern -> number of files.
LEFT = {
    "16": {"results/standin-40/simple-width0.25/fast-batchsize32-epochs2/seed0.json": 1},
    "17": {"results/standin-40/simple-*.json": 4},
    "18": {"results/standin-40/simple-*.json": 3},
    "19": {
        **{
            f"results/standin-40/{name}/faster-batchsize36-epochs1/seed0.json": 1
            for name in ("simple_cp", "wrn-16-2", "inception", "xception", "wang")
        },
        "results/standin-40/deeper_*/long-batchsize36-epochs*/seed0.json": 3,
    },
    "20": {"results/standin-40/deeper_*/faster-*trainontrain/seed*.predictions.npz": 7},
    "21": {"results/greystandin-320/*/medical-*epochs1*/seed0.predictions.npz": 3},
}


def solutions(notebook):
    """The code of the solutions that are folded into the notebook's text."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    folded = re.findall(r"<details>(.*?)</details>", prose, re.DOTALL)
    return [code for fold in folded for code in re.findall(r"```python\n(.*?)```", fold, re.DOTALL)]


def in_groups(groups):
    return pytest.mark.parametrize("group", groups, ids=["-".join(group) for group in groups])


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A copy of the notebooks, so that they are executed in a folder of their own; returns their folder."""
    shutil.copytree(paths.root() / "notebooks", tmp_path / "notebooks")
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    return tmp_path / "notebooks"


def check_executed(folder, number):
    (path,) = folder.glob(f"{number}_*.ipynb")
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(cell.execution_count for cell in cells)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    printed = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    assert ("STAND-IN" in printed) == (number not in WITHOUT_IMAGES)
    slugs = set(re.findall(r'save\(.*?"(\d\d_\w+)"', "\n".join(cell.source for cell in cells)))
    assert bool(slugs) == (number != "00") and all((folder / "figures" / f"{slug}.png").exists() for slug in slugs)
    for pattern, count in LEFT.get(number, {}).items():
        assert len(list(folder.glob(pattern))) == count, pattern


def test_groups_contain_every_notebook_once():
    assert sorted(sum(GROUPS + CHAPTERS, ())) == list(runner.notebooks())


@in_groups(GROUPS)
def test_notebooks_run(course, group):
    folder = runner.run("smoke", only=group)
    for number in group:
        check_executed(folder, number)


@pytest.mark.full
@in_groups(GROUPS + CHAPTERS)
def test_notebooks_run_compiled_without_records_and_with_all_solutions(course, group):
    profiles = course / "profiles.toml"
    profiles.write_text(profiles.read_text().replace("EAGER = true", "RETRAIN = true"))
    for number in group:
        path = runner.notebooks()[number]
        notebook = nbformat.read(path, 4)
        assert len(solutions(notebook)) >= 2 or number == "00"
        notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
        nbformat.write(notebook, path)
    folder = runner.run("smoke", only=group)
    for number in group:
        check_executed(folder, number)


@pytest.mark.full
@in_groups(CHAPTERS)
def test_chapters_run_with_another_seed(course, group):
    folder = runner.run("quick", only=group, dataset="standin", settings={"SEED": 3})
    for number in group:
        check_executed(folder, number)
