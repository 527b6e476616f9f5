"""Chapters executed in this process, so that tests can look at their variables and at their exercises."""

import re

import matplotlib
import nbformat
import pytest

from fcnn_utils.course import runner


class Chapter:
    """A notebook that has been executed.

    Attributes:
        number: such as "01".
        cells: its cells.
        variables: dict name -> value after the last cell.
    """

    def __init__(self, number):
        self.number, self.cells = number, nbformat.read(runner.notebooks()[number], 4).cells
        self.variables = {"__name__": "__main__"}
        for cell in self.cells:
            if cell.cell_type == "code" and "colab" not in cell.metadata.get("tags", []):
                exec(cell.source, self.variables)

    def __getitem__(self, name):
        return self.variables[name]

    @property
    def text(self):
        return "\n".join(cell.source for cell in self.cells if cell.cell_type == "markdown")

    def solutions(self):
        """Return dict number of an exercise -> code of its solution, which ends with a call of `check`."""
        folded = re.findall(r"<details>(.*?)</details>", self.text, re.DOTALL)
        codes = [code for fold in folded for code in re.findall(r"```python\n(.*?)```", fold, re.DOTALL)]
        return {re.search(r'check\("(\d\d\.\d)"', code)[1]: code for code in codes if 'check("' in code}


@pytest.fixture(scope="module")
def chapter(request, tmp_path_factory):
    """The executed notebook whose number the test module gives as CHAPTER."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FCNN_OUTPUT", str(tmp_path_factory.mktemp("chapter")))
        matplotlib.use("agg")
        yield Chapter(request.module.CHAPTER)
        matplotlib.pyplot.close("all")
