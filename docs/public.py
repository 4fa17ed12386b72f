"""The public modules: what has an entry in the API reference, and what tests/public_api.txt keeps an eye on.

A name is public when it stands in the ``__all__`` of one of these modules. Everything else may change without a word.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

from trtkern import surrogates

MODULES = (
    "trtkern",
    "trtkern.nn",
    "trtkern.models",
    "trtkern.data",
    "trtkern.data.augment",
    "trtkern.data.encode",
    "trtkern.data.neuromorphic",
    "trtkern.train",
    "trtkern.analysis",
    "trtkern.profiling",
    "trtkern.profiling.memory.budget",
    "trtkern.profiling.memory.held",
    "trtkern.profiling.memory.ways",
    "trtkern.profiling.traffic",
    "trtkern.profiling.scaling",
    "trtkern.profiling.collectives",
    "trtkern.profiling.inspect",
    "trtkern.interop",
    "trtkern.interop.nir",
    "trtkern.surrogates",
    "trtkern.neurons",
    "trtkern.ops.delay",
    "trtkern.ops.regularizer",
    "trtkern.ops.spikes",
    "trtkern.backends",
    "trtkern.backends.base",
    "trtkern.reference",
    "trtkern.selftest",
    "trtkern.parallel.job",
    "trtkern.parallel.sharding",
    "trtkern.malloc",
)


def module_of(name: str) -> ModuleType:
    """A public module; without ``__all__`` it is an error."""
    module = import_module(name)
    if not hasattr(module, "__all__"):
        raise ValueError(f"{name}: expected __all__ in a public module (docs/public.py), got none")
    return module


def names() -> dict[str, Any]:
    """Every public name with what it stands for, in the order of the modules; modules among them are left out."""
    found = {}
    for place in MODULES:
        module = module_of(place)
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                found[f"{place}.{name}"] = value
    return found


def own(value: type) -> dict[str, Any]:
    """The public methods and properties of a class that trtkern defines, inherited ones too."""
    found: dict[str, Any] = {}
    for base in reversed(value.__mro__):
        if base.__module__.startswith("trtkern"):
            found |= {name: each for name, each in vars(base).items() if not name.startswith("_")}
    kinds = (staticmethod, classmethod, property)
    return {name: each for name, each in found.items() if inspect.isfunction(each) or isinstance(each, kinds)}


def below(module: str, name: str) -> str:
    """The text below a value, in this module or in the one that it comes from."""
    value = getattr(import_module(module), name)
    for place in (module, *sorted(each for each in sys.modules if each.startswith("trtkern."))):
        alike = [key for key, each in vars(sys.modules[place]).items() if each is value]
        if name in alike or (alike and not isinstance(value, str)):
            tree = ast.parse(inspect.getsource(sys.modules[place]))
            for line, after in pairwise(tree.body):
                targets = getattr(line, "targets", [getattr(line, "target", None)])
                told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if told and any(getattr(target, "id", None) in alike for target in targets):
                    return inspect.cleandoc(str(after.value.value))
    return ""


def unexplained(value: Any) -> list[str]:
    """The arguments of a function, a constructor or the fields of a class that its docstrings do not explain."""
    from sphinx.pycode import ModuleAnalyzer

    if isinstance(value, type) and issubclass(value, BaseException):
        return []
    text, told = inspect.getdoc(value) or "", set()
    for base in value.__mro__ if isinstance(value, type) else ():
        if base.__module__.startswith("trtkern"):  # strings below the fields, and what the bases explain
            text += "\n\n" + inspect.cleandoc(base.__doc__ or "")
            told |= {name for (_, name) in ModuleAnalyzer.for_module(base.__module__).find_attr_docs()}
    if value in [row.function for row in surrogates.TABLE.values()]:  # the docstring is the formula, in u and alpha
        return []
    sections = re.findall(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", text, flags=re.MULTILINE)
    for names in re.findall(r"^ {4}([\w*][\w*, ]*):", "\n".join(sections), flags=re.MULTILINE):
        told |= {name.strip(" *") for name in names.split(",")}
    return [name for name in inspect.signature(value).parameters if name not in told]


def signature(value: Any) -> str:
    """The arguments with their defaults, without types: what a caller can rely on. Of a constant its kind."""
    if not callable(value) or (isinstance(value, type) and issubclass(value, BaseException)):
        return "exception" if callable(value) else type(value).__name__
    parts, mark = [], False
    for each in inspect.signature(value).parameters.values():
        if each.kind is each.VAR_POSITIONAL or (each.kind is each.KEYWORD_ONLY and not mark):
            mark = True
            if each.kind is each.KEYWORD_ONLY:
                parts.append("*")
        star = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        parts.append(f"{star}{each.name}{'' if each.default is each.empty else '=' + shown(each.default)}")
    return f"({', '.join(parts)})"


def shown(value: Any) -> str:
    """A default in words that are the same in every process and under every Python."""
    text = value.__name__ if isinstance(value, type) else repr(value)
    return "..." if "<" in text or len(text) > 40 else text


def snapshot() -> list[str]:
    """A line for every public name and every method of a public class, sorted."""
    lines = []
    for name, value in names().items():
        lines.append(f"{name} {signature(value)}")
        if isinstance(value, type):
            for method, each in own(value).items():
                function = getattr(value, method)
                kind = "property" if isinstance(each, property) else signature(function)
                lines.append(f"{name}.{method} {kind}")
    return sorted(lines)


if __name__ == "__main__":
    from pathlib import Path

    FILE = Path(__file__).resolve().parent.parent / "tests" / "public_api.txt"
    HEAD = [line for line in FILE.read_text().splitlines() if line.startswith("#")] if FILE.exists() else []
    FILE.write_text("\n".join([*HEAD, *snapshot()]) + "\n")
    print(f"{FILE}: {len(snapshot())} names")
