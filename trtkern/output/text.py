"""Words for people: printable, short, in columns; bytes; a line on stderr."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Container, Iterable, Sequence
from importlib.util import find_spec


def short(text: str, length: int) -> str:
    """The text, printable, without its middle where it is longer."""
    text = printable(text)
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - half]}…{text[-half:]}"


def printable(text: object) -> str:
    """As a string, with a replacement for what no document may hold: control characters, single surrogates."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def aligned(lines: Sequence[Sequence[str]], right: Container[int]) -> list[str]:
    """Lines of cells in columns as wide as their widest cell; those of the numbers ``right`` end together, the others
    begin together."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def size(count: int, *, up: bool = False) -> str:
    """Bytes for people: "512 B", "12.0 KiB", "3.1 MiB"; with ``up`` never fewer than there are."""
    if count < 1024:
        return f"{count} B"
    value, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB"):
        if value >= 1024:
            value, unit = value / 1024, larger
    return f"{math.ceil(10 * value) / 10 if up else value:.1f} {unit}"


def parsed_size(text: str, option: str) -> int:
    """The bytes that a person means: 268435456 of "256MiB", "256 MiB" or "268435456".

    Raises:
        ValueError: it says none; the message names the option.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B?", text.strip())
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{option}: expected a size such as 256MiB or 1GiB, got {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def say(message: str, status: int = 0) -> int:
    """The message on stderr, if there is one; returns the status."""
    if message:
        print(f"trtkern: {message}", file=sys.stderr)
    return status


def missing(extra: str, modules: Iterable[str]) -> str:
    """Which of the modules are not installed, with the extra to install, or without one the package; empty if none."""
    lacking = [module for module in modules if find_spec(module) is None]
    line = f"pip install 'trtkern[{extra}]'" if extra else "pip install trtkern"
    return f"{' and '.join(lacking)} not installed; type: {line}" if lacking else ""
