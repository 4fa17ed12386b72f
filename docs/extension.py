"""What the site has that Sphinx does not: entries of the API reference, the page of commands, the notebooks."""

from __future__ import annotations

import builtins
import collections.abc
import inspect
import re
import shutil
import sys
import typing
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib.axes
import matplotlib.figure
from docutils import nodes
from public import MODULES, below
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NOTEBOOKS = "<!-- the notebooks of examples/notebooks stand here on the site -->"
TOCTREE = (
    "```{toctree}\n:caption: Notebooks\n:maxdepth: 1\n:hidden:\n:glob:\n\nnotebooks/first_network\nnotebooks/*\n```"
)
COMMANDS = "<!-- every command stands here on the site -->"


def entry(module: str, name: str, inherited: bool) -> list[str]:
    """The lines of reStructuredText for one public name."""
    found = getattr(import_module(module), name)
    if isinstance(found, type):
        kind = "autoexception" if issubclass(found, BaseException) else "autoclass"
        lines = [f".. {kind}:: {module}.{name}", "   :members:", "   :member-order: bysource"]
        if inherited:
            lines.append("   :inherited-members: Module, tuple, BaseException, ABC, Generic, object")
        return [*lines, ""]
    if inspect.isfunction(found):
        return [f".. autofunction:: {module}.{name}", ""]
    return [f".. py:data:: {name}", "", *(f"   {line}" for line in below(module, name).splitlines()), ""]


def summary(module: str, name: str) -> str:
    """The first sentence about it."""
    found = getattr(import_module(module), name)
    text = inspect.getdoc(found) if callable(found) else below(module, name)
    first = " ".join((text or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.\s][.:])\s+(?=[A-Z`])", first + " ")[0].strip().rstrip(":.")
    return f"{sentence}." if sentence else ""


class Api(SphinxDirective):
    """Public names of a module, first in a table and then one after the other; ``Name+`` with what it inherits."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """As its base."""
        module, words = self.arguments[0], " ".join(self.content).split()
        names = [word.rstrip("+") for word in words]
        lines = [f".. currentmodule:: {module}", ""]
        if len(names) > 1:
            lines += [".. list-table::", "   :class: summary", "   :widths: 30 70", ""]
            for name in names:
                lines += [f"   * - :py:obj:`{name} <{module}.{name}>`", f"     - {summary(module, name)}"]
            lines.append("")
        for name, word in zip(names, words, strict=True):
            lines += entry(module, name, word != name)
        return self.parse_text_to_nodes("\n".join(["```{eval-rst}", *lines, "```"]))


def filled(app: Sphinx, page: str, source: list[str]) -> None:
    """The commands and the notebooks in place of the lines that stand for them, and the places that GitHub knows by
    ``<a id="name"></a>`` as MyST has them."""
    source[0] = re.sub(r'^<a id="([\w-]+)"></a>$', r"(\1)=", source[0], flags=re.MULTILINE)
    if page == "index" and any((HERE / "notebooks").glob("*.ipynb")):
        source[0] = source[0].replace(NOTEBOOKS, TOCTREE)
    if page == "cli":
        from command_page import page as made

        source[0] = source[0].replace(COMMANDS, made())


def notebooks(app: Sphinx, *_: Any) -> None:
    """The notebooks of examples/ beside the pages, where Sphinx finds them."""
    target = HERE / "notebooks"
    target.mkdir(exist_ok=True)
    found = {path.name: path for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    for path in target.glob("*.ipynb"):
        if path.name not in found:
            path.unlink()
    for name, path in found.items():
        if not (target / name).exists() or (target / name).read_bytes() != path.read_bytes():
            shutil.copyfile(path, target / name)


def plain(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keeps napoleon from reading "The shape: [T, B]" below an attribute as a type and its description."""
    if what in ("attribute", "property", "data") and lines:
        lines.insert(0, "\\")  # an escaped end of line, of which nothing is seen


def readable(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: Any) -> Any:
    """Short defaults: ``...`` for <factory> of a dataclass, of which Sphinx could not read the types either, and for
    what a default object is made of."""
    signature = re.sub(r"<[^<>]*>", "...", signature or "")
    return re.sub(r"\b([A-Z]\w+)\([^()]{40,}\)", r"\1(...)", signature) or None, returned


@cache
def exists(target: str) -> bool:
    """Whether that is the name of something: a full one, or one that a module of trtkern, torch or Python knows."""
    if "." in target:
        place, _, name = target.rpartition(".")
        try:
            return hasattr(import_module(place), name)
        except ImportError:
            return False
    places: list[Any] = [builtins, typing, collections.abc, matplotlib.axes, matplotlib.figure]
    places += [module for name, module in list(sys.modules.items()) if name.split(".")[0] in ("trtkern", "torch")]
    return any(target in vars(place) for place in places)


def elsewhere(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """A type that has no entry here stays as it is written, if there is such a thing; a public one is found."""
    if node.get("refdomain") != "py" or node.get("reftype") not in ("class", "exc", "obj", "data"):
        return None
    target, domain = node["reftarget"], env.get_domain("py")
    for module in MODULES:
        if "." not in target and target in getattr(sys.modules.get(module), "__all__", ()):
            full, kind = f"{module}.{target}", node["reftype"]
            return domain.resolve_xref(env, node["refdoc"], app.builder, kind, full, node, contnode)
    return contnode if exists(target) else None


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_directive("api", Api)
    app.connect("config-inited", notebooks)
    app.connect("source-read", filled)
    app.connect("autodoc-process-docstring", plain, priority=400)
    app.connect("autodoc-process-signature", readable)
    app.connect("missing-reference", elsewhere)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
