"""Whether each measured number of the pages comes from a row: ``python docs/measured.py`` names those that do not.

``docs/measured.toml`` has the sentences of README.md and docs/*.md that say a measured number, each with the rows that
its numbers are taken from. A sentence is filled in from the rows, and must then stand in its page word for word. What
is left of a page, without code and without these sentences, must have no number with a unit in it, unless the list of
what is not measured (sizes of a definition, shares that are a rule) has the words around it. Pages and parts of pages
that a script makes of rows are not looked at here: tests/test_docs.py compares them with what the script makes.
"""

from __future__ import annotations

import csv
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "measured.toml"
MADE = re.compile(r"docs/(performance.*|scale|results|controls|exact|backends)\.md")
"""Pages that a script makes of rows."""
PART = re.compile(r"<!-- bench/\w+\.py --page writes from here -->.*?<!-- to here -->", re.DOTALL)
"""What a script makes of a page."""

NUMBER = re.compile(
    r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?\s?(?:(?:ms|us|µs|s|seconds?|minutes?|hours?|[KMGT]i?B|GB/s)(?![\w/])|%)"
    r"|\d+\.\d+ times(?!\w)|(?<!\w)\*\*\d[\d,.]*"
)
"""What may be a measurement: a number with a unit, a factor, or in bold type."""
_CODE = re.compile(r"^(`{3,}|~~~).*?^\1|^>[^\n]*$|`[^`\n]+`|<!--.*?-->", re.DOTALL | re.MULTILINE)
"""What is no prose: code, and what a program printed, which is quoted."""


class Said(NamedTuple):
    """A sentence with measured numbers."""

    pages: tuple[str, ...]
    text: str
    """With {names} where its numbers go."""
    numbers: Mapping[str, Mapping[str, Any]]
    """By name: where it comes from (``value``), and ``as``, how it is written."""

    def filled(self) -> str:
        """The sentence with its numbers."""
        return self.text.format(
            **{name: format(value(query), query.get("as", ".3g")) for name, query in self.numbers.items()}
        )


def value(query: Mapping[str, Any]) -> float:
    """The number of a query.

    ``rows`` is a CSV file, ``take`` a column or several that are multiplied; every other key names a column and what
    stands in it. Of several rows that fit, the last one is taken: rows are only ever added. With ``count`` the number
    of rows is meant, and with ``reduce`` ("min", "max", "mean") one number of all that fit. ``of`` is a query with
    whose number it is divided where it has other keys than this one; ``scale`` multiplies, ``inverse`` turns it over.

    Raises:
        ValueError: no row fits, or the cell is no number.
    """
    known = {"rows", "take", "as", "of", "scale", "inverse", "reduce", "count"}
    wanted = {column: str(cell) for column, cell in query.items() if column not in known}
    found = [row for row in rows(query["rows"]) if all(row.get(name) == cell for name, cell in wanted.items())]
    if query.get("count"):
        return float(len(found))
    if not found:
        raise ValueError(f"{TABLE.name}: expected a row of {query['rows']} with {wanted}, got none")
    try:
        values = [float(row[query["take"]]) for row in found]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{TABLE.name}: expected numbers in {query['take']} of {query['rows']}, got {error}") from None
    number = {"min": min, "max": max, "mean": _mean}[query["reduce"]](values) if "reduce" in query else values[-1]
    number *= query.get("scale", 1)
    if "of" in query:
        number /= value({**{k: v for k, v in query.items() if k not in ("scale", "inverse", "of")}, **query["of"]})
    return 1 / number if query.get("inverse") else number


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@cache
def rows(path: str) -> list[dict[str, str]]:
    """The rows of a file of the project that were measured: those without another status than "ok"."""
    with (ROOT / path).open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("status", "ok") == "ok"]


def table() -> tuple[list[Said], dict[str, list[str]]]:
    """The sentences, and by page the words around numbers that nobody measured."""
    read = tomllib.loads(TABLE.read_text())
    short = read.get("files", {})

    def query(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {**entry, "rows": short.get(entry["rows"], entry["rows"])}

    said = []
    for entry in read.get("said", []):
        numbers = {name: query({**entry.get("with", {}), **part}) for name, part in entry["numbers"].items()}
        pages = entry["page"] if isinstance(entry["page"], list) else [entry["page"]]
        said.append(Said(tuple(pages), entry["text"], numbers))
    return said, read.get("not_measured", {})


def pages() -> list[str]:
    """README.md and the pages of docs/ that nobody's script makes."""
    found = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    return [page for page in found if not MADE.fullmatch(page)]


def problems(page: str, text: str, said: list[Said], unmeasured: list[str]) -> Iterator[str]:
    """What is wrong with the numbers of a page that has this text."""
    left = _flat(_CODE.sub(" ", PART.sub(" ", text)))
    for each in said:
        if page not in each.pages:
            continue
        sentence = _flat(_CODE.sub(" ", each.filled()))
        if sentence not in left:
            yield f"{page}: the rows say {sentence!r}, which does not stand there"
        left = left.replace(sentence, " | ")
    for words in unmeasured:
        if _flat(words) not in left:
            yield f"{page}: {TABLE.name} has {words!r} among what is not measured, which does not stand there"
        left = left.replace(_flat(words), " ")
    for found in NUMBER.finditer(left):
        around = left[max(0, found.start() - 60) : found.end() + 40]
        yield f"{page}: no row for {found[0]!r} in {around!r}"


def _flat(text: str) -> str:
    """On one line, with one space between words."""
    return " ".join(text.split())


def main() -> int:
    """Name what is wrong; 1 where there is something."""
    said, unmeasured = table()
    wrong = [
        problem
        for page in pages()
        for problem in problems(page, (ROOT / page).read_text(), said, unmeasured.get(page, []))
    ]
    for problem in wrong:
        print(problem)
    print(f"numbers: {sum(len(each.numbers) for each in said)} from rows, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
