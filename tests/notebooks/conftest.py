"""Chapters executed in this process, so that tests can look at their variables and at their exercises."""

import re
import tomllib

import matplotlib
import nbformat
import pytest

from fcnn_utils.course import exercises, paths, runner

PROFILES = tomllib.loads((paths.root() / "notebooks" / "profiles.toml").read_text())
QUICK = {name: value for name, value in PROFILES["quick"].items() if name.isupper()}


class Chapter:
    """A notebook that has been executed.

    Attributes:
        number: such as "01".
        cells: its cells.
        variables: dict name -> value after the last cell.
    """

    def __init__(self, number, parameters):
        self.number, self.cells = number, nbformat.read(runner.notebooks()[number], 4).cells
        self.variables = {"__name__": "__main__"}
        for cell in self.cells:
            if cell.cell_type == "code" and "colab" not in cell.metadata.get("tags", []):
                exec(cell.source, self.variables)
            if "parameters" in cell.metadata.get("tags", []):
                self.variables |= parameters

    def __getitem__(self, name):
        return self.variables[name]

    @property
    def text(self):
        return "\n".join(cell.source for cell in self.cells if cell.cell_type == "markdown")

    @property
    def folded(self):
        """The code in the folded parts of the text."""
        folded = re.findall(r"<details>(.*?)</details>", self.text, re.DOTALL)
        return [code for fold in folded for code in re.findall(r"```python\n(.*?)```", fold, re.DOTALL)]

    def solutions(self):
        """Return dict number of an exercise -> code of its solution, which ends with a call of `check`."""
        return {re.search(r'check\("(\d\d\.\d)"', code)[1]: code for code in self.folded if 'check("' in code}


@pytest.fixture(scope="module")
def chapter(request, tmp_path_factory):
    """The notebook CHAPTER of the test module, executed as by `make run`, but with its PARAMETERS, if it has any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FCNN_OUTPUT", str(tmp_path_factory.mktemp("chapter")))
        matplotlib.use("agg")
        yield Chapter(request.module.CHAPTER, QUICK | getattr(request.module, "PARAMETERS", {}))
        matplotlib.pyplot.close("all")


@pytest.fixture
def check_exercises(chapter, capsys):
    """A function that checks the exercises of the chapter, given dict number -> wrong answers."""

    def check(wrong):
        solutions = chapter.solutions()
        assert sorted(wrong) == sorted(solutions) == exercises.numbers(chapter.number)
        for number, code in solutions.items():
            exec(code, dict(chapter.variables))
            assert capsys.readouterr().out.splitlines()[-1] == f"{number}: right"
        for number, answers in wrong.items():
            assert len(answers) >= 2
            if callable(answers[0]):
                assert exercises.verdict(number, lambda *arguments: None) == "no answer yet"
            for answer in answers:
                verdict = exercises.verdict(number, answer)
                assert verdict.startswith("not yet; ") and "stops with" not in verdict, (number, answer, verdict)
        for code in chapter.folded:
            if "check(" not in code:  # code to start the open exercise with: it must run
                exec(code, dict(chapter.variables))

    return check
