"""The floors of the house, docs/design.md: which room of the package imports which, read without running anything."""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trtkern"
WINGS = ("traffic", "scaling", "unchanged", "collectives", "memory", "firing", "inspect", "step", "profiling")
"""The rooms inside profiling, from the ground up; the package's own file comes last."""


class Import(NamedTuple):
    where: str
    """File and line."""
    module: str
    """The whole name of a module, or of what is taken from it."""
    for_types: bool
    """It stands under ``if TYPE_CHECKING``, and does not run."""


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, also within functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    conditions = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    typing = {id(node) for condition in conditions for part in condition.body for node in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: expected imports by whole names, got a relative one"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        where = f"{'/'.join(path.parts[-2:])}:{node.lineno}"
        yield from (Import(where, name, id(node) in typing) for name in found)


def rooms(folder: Path) -> dict[str, list[Path]]:
    """The files and folders of a package by their names, each with its Python files; the package's own by its name."""
    found = {folder.name: [folder / "__init__.py"]}
    for path in sorted(folder.iterdir()):
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path] * (path.suffix == ".py")
        if files and path.stem != "__init__":
            found[path.stem] = files
    return found


def arrows_up(found: dict[str, list[Path]], name: str, order: Sequence[str]) -> list[str]:
    """The imports that do not go down, a line each.

    Args:
        found: the rooms of a package.
        name: its dotted name.
        order: of the rooms, from the ground up.
    """
    own, up = name.rpartition(".")[2], []
    for room, files in found.items():
        for where, module, for_types in (each for path in files for each in imports(path)):
            if not f"{module}.".startswith(f"{name}."):
                continue
            first = module.removeprefix(name).lstrip(".").partition(".")[0]
            target = first if first in found else own
            # The kernels name the types of what a backend hands them; nothing of it runs.
            names_types = for_types and room == "kernels" and module.startswith("trtkern.backends.base.")
            if order.index(target) > order.index(room) and not names_types:
                up.append(f"{where} in {room} imports {module}, of {target} above it")
    return up


def house() -> dict[str, list[Path]]:
    return {**rooms(PACKAGE), "kernels": sorted((ROOT / "kernels").rglob("*.py"))}


def floors() -> list[str]:
    """The rooms from the ground up, as docs/design.md lists them."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.partition("\n## The floors\n")[2].partition("\n## ")[0]
    return [
        room for line in re.findall(r"^\d+\. (.*?):", section, re.MULTILINE) for room in re.findall(r"`(\w+)`", line)
    ]


def test_every_room_stands_on_a_floor():
    listed = floors()
    assert len(set(listed)) == len(listed), "a room stands twice"
    assert set(listed) == set(house()), "docs/design.md, The floors: a room is not listed there, or is gone"
    assert set(WINGS) == set(rooms(PACKAGE / "profiling"))


def test_no_import_goes_up():
    assert arrows_up(house(), "trtkern", floors()) == []
    assert arrows_up(rooms(PACKAGE / "profiling"), "trtkern.profiling", WINGS) == []


RUN = "trtkern.training.run"


@pytest.mark.parametrize(
    "text, above",
    [
        ("from trtkern.training.run import versions", f"{RUN}.versions, of training"),
        ("from trtkern import training", "trtkern.training, of training"),
        ("import trtkern.training.run", f"{RUN}, of training"),
        ("def f():\n    from trtkern.training import run", f"{RUN}, of training"),
        ("if TYPE_CHECKING:\n    from trtkern.training import run", f"{RUN}, of training"),
        ("from trtkern import __version__", "trtkern.__version__, of trtkern"),
        ("from trtkern.names import unknown\nfrom trtkern.ops.more import other\nimport torch", None),
    ],
)
def test_an_arrow_up_is_named(tmp_path, text, above):
    for room in ("names", "ops", "training"):
        (tmp_path / "trtkern" / room).mkdir(parents=True)
        (tmp_path / "trtkern" / room / "inside.py").write_text(text if room == "ops" else "")
    (tmp_path / "trtkern" / "__init__.py").write_text("")
    found = arrows_up(rooms(tmp_path / "trtkern"), "trtkern", ("names", "ops", "trtkern", "training"))
    line = text.count("\n") + 1
    assert found == ([] if above is None else [f"ops/inside.py:{line} in ops imports {above} above it"])
