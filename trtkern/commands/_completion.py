"""What the shell completes behind an option; nothing here loads torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

RUNS = "runs"
"""Where runs lie unless --run-dir says otherwise."""


def among(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Completes one of these names."""
    every = tuple(names)

    def complete(incomplete: str) -> list[str]:
        return [name for name in every if name.startswith(incomplete)]

    return complete


def runs(incomplete: str) -> list[str]:
    """Run folders, in runs/ or in the folder that is being typed."""
    from trtkern.training.folder import begun

    typed = Path(incomplete)
    places = [Path(RUNS), typed if incomplete.endswith("/") else typed.parent]
    found = []
    for folder in sorted({each for place in places if place.is_dir() for each in place.iterdir() if each.is_dir()}):
        try:
            begun(folder)
        except (ValueError, OSError):
            continue
        found.append(str(folder))
    return [folder for folder in found if folder.startswith(incomplete)]


def recipe(incomplete: str) -> list[str]:
    """A recipe; behind a + one of the controls."""
    from trtkern.training import recipes

    name, plus, control = incomplete.partition("+")
    if plus:
        return [f"{name}+{each}" for each in recipes.controls() if each.startswith(control)]
    return [each for each in recipes.names() if each.startswith(name)]
