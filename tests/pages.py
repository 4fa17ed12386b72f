"""The pages of the project as the tests read them: their fences, headings and links."""

from __future__ import annotations

import re
import tomllib
import unicodedata
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    *sorted(
        str(path.relative_to(ROOT))
        for path in ROOT.glob("docs/**/*.md")
        if not {"_build", "notebooks"} & set(path.parts)
    ),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Fence(NamedTuple):
    """A block of a page."""

    kind: str
    """What stands behind the backticks; empty where nothing does."""
    text: str
    line: int


@cache
def fences(page: str) -> list[Fence]:
    """The blocks of a page, in their order; those of a list are indented."""
    found, opened = [], None
    lines = (ROOT / page).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        mark = re.match(r"( *)(`{3,}|:{3,})(.*)$", line)
        if opened is None and mark:
            opened = (mark[1], mark[2], mark[3].strip(), number)
        elif opened is not None and mark and mark[2] == opened[1] and not mark[3].strip():
            body = [each.removeprefix(opened[0]) for each in lines[opened[3] : number - 1]]
            if opened[1].startswith("`"):
                found.append(Fence(opened[2], "\n".join([*body, ""]), opened[3]))
            opened = None
    assert opened is None, f"{page}, line {opened[3]}: a fence without an end"
    return found


@cache
def prose(page: str) -> str:
    """The page without its blocks and its code in the line."""
    text = re.sub(r"^( *)(`{3,}).*?^ *\2 *$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`{1,2})(?!`).*?\1", "", text, flags=re.DOTALL)


def links(page: str) -> list[str]:
    """Where the links and the pictures of a page lead."""
    text = prose(page)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    return found + re.findall(r"(?:href|src|srcset)=\"([^\"]+)\"", text)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
    text = unicodedata.normalize("NFC", text.replace("`", "").replace("*", "").lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(page: str) -> set[str]:
    """Where a link to a part of a page can lead."""
    text = re.sub(r"^( *)(`{3,}).*?^ *\2 *$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    if page == "docs/cli.md":
        text += commands()
    found: dict[str, int] = {}
    made = set(re.findall(r"(?:id|name)=\"([^\"]+)\"", text)) | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", text, flags=re.MULTILINE):
        name = slug(heading)
        made.add(name if not (before := found.get(name, 0)) else f"{name}-{before}")
        found[name] = before + 1
    return made


@cache
def commands() -> str:
    """What stands in docs/cli.md on the site."""
    import sys

    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from command_page import page

        return page()
    finally:
        sys.path.remove(str(ROOT / "docs"))
