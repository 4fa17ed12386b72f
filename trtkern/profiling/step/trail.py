"""Which layers ran in a step, and what they gave: steps whose trails differ are not the same step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from trtkern.output.text import short


class Trail:
    """Of one step: give ``leave`` to ``Ranges.layers``."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        """Of each layer."""
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        """Of what each layer gave, call after call, where that is one tensor or one ``Spikes``."""

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A layer ends."""
        self.calls[name] += 1
        shape = getattr(output, "shape", None)
        if shape is not None:
            self.shapes.setdefault(name, []).append(tuple(shape))


def changes(trails: Sequence[Trail]) -> list[str]:
    """What differs among the steps, in words; empty where they are alike."""
    names = dict.fromkeys(name for trail in trails for name in trail.calls)
    said = []
    counts = {name: [trail.calls[name] for trail in trails] for name in names}
    absent = [name for name in names if 0 in counts[name]]
    for name in absent[:3]:
        said.append(f"{short(name, 40)} runs in {sum(map(bool, counts[name]))} of {len(trails)}")
    often = [name for name in names if name not in absent and len(set(counts[name])) > 1]
    for name in often[:3]:
        said.append(f"{short(name, 40)} is called {min(counts[name])} to {max(counts[name])} times")
    if said:
        return said + _more(len(absent) + len(often) - len(said))
    other = [name for name in names if len({str(trail.shapes.get(name)) for trail in trails}) > 1]
    for name in other[:1]:
        seen = dict.fromkeys("x".join(map(str, shape)) for trail in trails for shape in trail.shapes.get(name, ()))
        said.append(f"{short(name, 40)} gives {' and '.join(list(seen)[:3])}")
    return said + _more(len(other) - len(said))


def _more(count: int) -> list[str]:
    return [f"and so do {count} layers more"] if count > 0 else []
