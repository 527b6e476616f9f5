"""The README: it is short, its links lead somewhere, and its ten lines run."""

import re

import keras
import numpy as np
import pytest

from fcnn_utils import cost, deploy
from fcnn_utils.course import contents, networks, paths

README = (paths.root() / "README.md").read_text()
PAGES = [paths.root() / "README.md", *(paths.root() / "book").glob("*.md")]


def test_readme_has_at_most_800_words():
    assert len(README.split()) <= 800


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", page.read_text())
    assert all((page.parent / target).exists() for target in targets)


def test_table_has_the_parts_and_the_chapters_in_order():
    expected = []
    for chapter in contents.chapters():
        expected += [contents.PARTS[chapter.number]] if chapter.number in contents.PARTS else []
        expected += [f"[{chapter.number} {chapter.title}](notebooks/{chapter.file})"]
    _, table = README.split("\n---|---|---\n")
    rows = [line.split(" | ")[0].strip("*") for line in table.split("\n\n")[0].splitlines()]
    assert rows == expected


def test_ten_lines_for_a_model_run_as_they_stand(tmp_path, monkeypatch):
    """The first Python block of the README, in another folder, on a small model and random images."""
    if "onnxruntime" not in deploy.available():
        pytest.skip("ONNX Runtime or its exporter is not installed")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    model = networks.build("simple", (8, 8, 3), 10, width=0.1)
    model.save("model.keras")
    names = {"images": np.random.default_rng(0).standard_normal((40, 8, 8, 3)).astype("float32")}
    exec(code, names)
    assert cost.total_costs(names["small"])["macs"] <= cost.total_costs(model)["macs"] / 4
    expected = names["small"](names["images"], training=False)
    loaded = deploy.load("small.onnx")(names["images"])
    assert np.allclose(loaded, keras.ops.convert_to_numpy(expected), atol=1e-5)
