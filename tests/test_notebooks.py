"""The notebooks of examples/notebooks: each is a script and its .ipynb, which say the same and hold no outputs."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def test_there_are_notebooks():
    assert {path.stem for path in SCRIPTS} == {path.stem for path in FOLDER.glob("*.ipynb")} != set()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_pair_says_the_same(script):
    jupytext = pytest.importorskip("jupytext")
    text, notebook = jupytext.read(script), jupytext.read(script.with_suffix(".ipynb"))
    said = [[(cell.cell_type, cell.source) for cell in found.cells] for found in (text, notebook)]
    assert said[0] == said[1], f"jupytext --sync {script.name}"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
