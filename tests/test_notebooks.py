"""The notebooks: each is the program beside it, without outputs. ``make docs`` executes them."""

from __future__ import annotations

import jupytext
import nbformat
import pytest
from pages import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} | {path.stem for path in FOLDER.glob("*.ipynb")})
HOW = "jupytext --sync examples/notebooks/*.py makes them alike"


def problems(program: str, notebook: str) -> list[str]:
    """What is wrong with a pair: cells that differ, outputs, numbers of executions."""
    made = jupytext.reads(program, fmt="py:percent")
    kept = nbformat.reads(notebook, as_version=4)
    found = []
    if [(each.cell_type, each.source) for each in made.cells] != [(each.cell_type, each.source) for each in kept.cells]:
        found.append(f"the cells differ; {HOW}")
    for number, each in enumerate(kept.cells):
        if each.get("outputs") or each.get("execution_count"):
            found.append(f"cell {number} has outputs; leave them out")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_the_program_beside_it(name):
    program, notebook = FOLDER / f"{name}.py", FOLDER / f"{name}.ipynb"
    assert program.exists() and notebook.exists(), f"{name}: expected a .py and an .ipynb; {HOW}"
    found = problems(program.read_text(), notebook.read_text())
    assert not found, f"{name}: " + "; ".join(found)
    assert nbformat.reads(notebook.read_text(), as_version=4).metadata.get("kernelspec", {}).get("name") == "python3"


def test_a_pair_that_differs_and_an_output_are_found():
    program = "# %% [markdown]\n# # A title\n\n# %%\nprint(1)\n"
    made = jupytext.reads(program, fmt="py:percent")
    assert not problems(program, nbformat.writes(made))
    assert len(problems(program.replace("1", "2"), nbformat.writes(made))) == 1
    made.cells[1].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    assert len(problems(program, nbformat.writes(made))) == 1
