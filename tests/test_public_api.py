"""The public names: those of tests/public_api.txt, each documented, and none that vanishes without a word."""

from __future__ import annotations

import inspect
import re
import sys
import types
import warnings
from importlib import import_module
from pathlib import Path

import pytest
from pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import public

sys.path.remove(str(ROOT / "docs"))

FILE = Path(__file__).with_name("public_api.txt")
RENAMED: dict[str, str] = {}
"""Names of yesterday and what is written today: {"trtkern.nn.Old": "trtkern.nn.New"}. The old one still imports, by
the module's ``__getattr__``, with a DeprecationWarning that names the new one."""
HOW = "after a change that is meant: python docs/public.py writes tests/public_api.txt anew"


def kept() -> list[str]:
    return [line for line in FILE.read_text().splitlines() if not line.startswith("#")]


def gone(then: list[str], now: list[str], renamed: dict[str, str]) -> list[str]:
    """What is wrong with the names that were there and are not any more; the others are left alone."""
    problems = []
    for name in sorted({line.split()[0] for line in then} - {line.split()[0] for line in now}):
        if name not in renamed and not any(name.startswith(f"{old}.") for old in renamed):
            problems.append(f"{name} is gone: give RENAMED its new name, and keep it importable with a warning")
    for old, new in renamed.items():
        place, _, name = old.rpartition(".")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = getattr(import_module(place), name, None)
        if found is None:
            problems.append(f"{old} is in RENAMED and does not import any more")
        elif not any(each.category is DeprecationWarning and new in str(each.message) for each in said):
            problems.append(f"{old} imports without a DeprecationWarning that names {new}")
    return problems


def test_the_public_names_are_those_of_the_file():
    now, then = public.snapshot(), kept()
    new, lost = sorted(set(now) - set(then)), sorted(set(then) - set(now))
    assert now == then, f"{HOW}\nnew: {new}\nnot any more: {lost}"


def test_no_name_of_yesterday_is_gone_without_a_word():
    assert not (problems := gone(kept(), public.snapshot(), RENAMED)), "\n".join(problems)


@pytest.mark.parametrize(
    ("there", "warned", "renamed", "expected"),
    [
        (False, False, {}, "old_mod.Old is gone"),
        (False, False, {"old_mod.Old": "old_mod.New"}, "does not import"),
        (True, False, {"old_mod.Old": "old_mod.New"}, "without a DeprecationWarning"),
        (True, True, {"old_mod.Old": "old_mod.New"}, None),
    ],
)
def test_a_name_that_vanishes_is_found(monkeypatch, there, warned, renamed, expected):
    """A module in which Old has become New."""
    module = types.ModuleType("old_mod")
    module.New = int

    def answer(name):
        if name != "Old" or not there:
            raise AttributeError(name)
        if warned:
            warnings.warn("old_mod.Old is now old_mod.New", DeprecationWarning, stacklevel=2)
        return module.New

    module.__getattr__ = answer
    monkeypatch.setitem(sys.modules, "old_mod", module)
    problems = gone(["old_mod.Old (x)", "old_mod.Other (x)"], ["old_mod.New (x)", "old_mod.Other (x)"], renamed)
    assert (not problems) if expected is None else (len(problems) == 1 and expected in problems[0])


def undocumented() -> list[str]:
    """Public names without a docstring, and arguments that a docstring does not explain."""
    found = []
    for name, value in public.names().items():
        if not callable(value):
            found += [] if public.below(*name.rsplit(".", 1)) else [f"{name}: no text below it"]
            continue
        text = value.__dict__.get("__doc__") if isinstance(value, type) else value.__doc__
        if not text:
            found.append(f"{name}: no docstring")
        found += [f"{name}: {each} is not explained" for each in public.unexplained(value)]
        for method, each in public.own(value).items() if isinstance(value, type) else ():
            text = inspect.getdoc(each if isinstance(each, property) else getattr(value, method)) or ""
            if not text:
                found.append(f"{name}.{method}: no docstring")
    return found


def test_every_public_name_is_documented():
    assert not (found := undocumented()), "\n".join(found)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Adds.", ["first", "second"]),
        ("Adds.\n\n    Args:\n        first: a number.\n    ", ["second"]),
        ("Adds.\n\n    Args:\n        first, second: numbers.\n    ", []),
    ],
)
def test_an_argument_that_is_not_explained_is_found(docstring, expected):
    def add(first, second):
        return first + second

    add.__doc__ = docstring
    assert public.unexplained(add) == expected


def test_every_public_name_has_its_place_on_a_page():
    """In exactly one block of a page of docs/api, where Sphinx makes its entry and the table above."""
    placed: dict[str, list[str]] = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for module, text in re.findall(r"^```\{api\} (\S+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for name in text.split():
                placed.setdefault(f"{module}.{name.rstrip('+')}", []).append(page.name)
    names = public.names()
    assert set(placed) <= set(names), f"not public: {sorted(set(placed) - set(names))}"
    assert not (twice := {name: at for name, at in placed.items() if len(at) > 1}), twice
    shown = {id(names[name]) for name in placed}
    missing = [name for name, value in names.items() if name not in placed and id(value) not in shown]
    assert not missing, f"give them a place on a page of docs/api: {missing}"
