"""All that stands against a conversion, found before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import NoReturn

LEAST = (1, 0, 8)
"""The oldest version of the package ``nir`` that is known to work."""


class Problems:
    """What stands against a conversion, a line each; ``settle`` raises them together.

    Args:
        op: the function that converts, for the message.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.lines: list[str] = []

    def add(self, path: str, kind: str, expected: str, got: str, do: str) -> None:
        """One of them.

        Args:
            path: the name of the layer or node in its model or graph.
            kind: its class.
            expected, got, do: what it should have been, what it is, and what to do.
        """
        line = f"{path!r} ({kind}): expected {expected}, got {got}; {do}"
        if line not in self.lines:
            self.lines.append(line)

    def settle(self) -> None:
        """Nothing if there is none.

        Raises:
            ValueError: all of them, a line each.
        """
        if self.lines:
            count = "1 problem" if len(self.lines) == 1 else f"{len(self.lines)} problems"
            lines = "".join(f"\n  {line}" for line in self.lines)
            raise ValueError(f"{self.op}: {count}, and nothing was converted:{lines}")


def package(op: str) -> ModuleType:
    """The package ``nir``.

    Raises:
        ImportError: it is missing, or older than ``LEAST``.
    """
    wanted = ".".join(map(str, LEAST))
    try:
        import nir
    except ImportError as error:
        raise ImportError(
            f"{op}: expected the package nir >= {wanted}, got none ({error}); pip install 'trtkern[interop]'"
        ) from None
    found = str(getattr(nir, "version", "0"))
    if numbers(found) < LEAST:
        raise ImportError(f"{op}: expected nir >= {wanted}, got {found}; pip install -U 'trtkern[interop]'")
    return nir


def numbers(version: str) -> tuple[int, ...]:
    """(1, 0, 8) of "1.0.8", of "1.0.8.dev3" and of "1.0.8rc1"."""
    found = []
    for part in version.split(".")[:3]:
        digits = part[: next((i for i, c in enumerate(part) if not c.isdigit()), len(part))]
        found.append(int(digits or 0))
    return tuple(found)


def refuse(op: str, expected: str, got: object, do: str, kind: type[Exception] = ValueError) -> NoReturn:
    """An error about an argument."""
    raise kind(f"{op}: expected {expected}, got {got}; {do}")


def one_of(names: Iterable[str]) -> str:
    """The names in a sentence."""
    return "one of " + ", ".join(repr(name) for name in names)
