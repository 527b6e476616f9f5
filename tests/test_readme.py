"""The README's numbers are those of the records."""

import re

import pytest

from fcnn_utils import models, records, thesis

README = (records.ROOT / "README.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", models.NETWORKS)
def test_results_table(name):
    """Parameters, MACs, accuracies of the thesis and of the committed record, to the digits shown."""
    (row,) = [row for row in ROWS if row[0] == models.TITLES[name]]
    record = records.read(records.path_of("cifar100", name, "fast", 0, records.ROOT / "results"))
    theirs, ours = thesis.summary().loc[name], record["test"]
    assert not record["stand_in"] and ours["images"] == 10_000 and len(record["epochs"]) == 5
    expected = [f"{record['params']:,}", f"{record['macs'] / 1e6:.1f}"]
    expected += [f"{100 * share:.1f}" for share in (theirs["top1"], ours["top1"], theirs["top5"], ours["top5"])]
    assert row[1:] == expected


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#:\s]+)\)", README)
    assert targets and all((records.ROOT / target).exists() for target in targets)


def test_every_notebook_is_in_the_contents():
    notebooks = [path.name for path in (records.ROOT / "notebooks").glob("*.ipynb")]
    assert notebooks and all(f"(notebooks/{name})" in README for name in notebooks)
