"""The report of ``memory``: rows and totals, as a table for people and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from trtkern.output.text import aligned, size

LEGEND = (
    "e: bytes of an element; n/T: n bytes a neuron for all its T steps; (in brackets): kept by a layer above already"
)


class LayerMemory(NamedTuple):
    """What one layer keeps for the backward pass, over all its calls in one forward pass."""

    name: str
    """Of the module."""
    kind: str
    """The name of its class."""
    shape: tuple[int, ...]
    """Of its output."""
    predicted: int | None
    """Bytes by the formula of its kind; None: it has none."""
    measured: int
    """Bytes in memory."""
    kept: str
    """What, with its size in letters: "y e, words 1/T"."""


@dataclass(frozen=True)
class MemoryReport:
    """What a forward pass keeps for its backward pass. Printed, it is a table."""

    rows: tuple[LayerMemory, ...]
    """The layers, in the order in which they first ran."""
    neuron_steps: int
    """Timesteps times neurons, of all neuron layers and ``BatchNormLIF``."""
    device: str
    """"cpu", "cuda", ..."""
    grown: int | None = None
    """On a GPU: bytes kept by the account of the allocator."""
    peak: int | None = None
    """On a GPU: the most that was allocated during the forward pass, above what was there before it."""

    def allocated(self, grown: int, peak: int) -> MemoryReport:
        """The same with what the allocator of a GPU says."""
        return replace(self, grown=grown, peak=peak)

    @property
    def predicted(self) -> int:
        """Bytes that the layers with a formula are predicted to keep."""
        return sum(row.predicted or 0 for row in self.rows)

    @property
    def measured(self) -> int:
        """Bytes kept: by the allocator of a GPU, elsewhere the sum of the rows."""
        return sum(row.measured for row in self.rows) if self.grown is None else self.grown

    @property
    def unknown(self) -> int:
        """Measured bytes of the layers without a formula."""
        return sum(row.measured for row in self.rows if row.predicted is None)

    @property
    def agreement(self) -> float:
        """Predicted over measured, of the layers with a formula; 1 where both are nothing."""
        known = self.measured - self.unknown
        return self.predicted / known if known else 1.0 if self.predicted == 0 else float("inf")

    @property
    def bytes_per_neuron_step(self) -> float | None:
        """Measured bytes over neuron-steps; None for a model without neurons."""
        return self.measured / self.neuron_steps if self.neuron_steps else None

    def as_rows(self) -> list[dict[str, Any]]:
        """A flat dictionary a layer, for CSV or JSON; bytes as integers, the shape as "4x8x128"."""
        names = ("layer", "type", "output", "predicted_bytes", "measured_bytes", "kept")
        flat = ((row.name, row.kind, _shape(row), row.predicted, row.measured, row.kept) for row in self.rows)
        return [dict(zip(names, row, strict=True)) for row in flat]

    def summary(self, per: str = "") -> str:
        """One line: "kept for backward: 3.1 MiB a step of 64 images, 5.2 bytes a neuron-step (predicted 3.1 MiB)"."""
        each = self.bytes_per_neuron_step
        density = "" if each is None else f", {each:.1f} bytes a neuron-step"
        unknown = f" + {size(self.unknown)} unknown" if self.unknown else ""
        return f"kept for backward: {size(self.measured)}{per}{density} (predicted {size(self.predicted)}{unknown})"

    def __str__(self) -> str:
        head = ("layer", "type", "output", "predicted", "measured", "kept")
        lines: list[Sequence[str]] = [head]
        for row in self.rows:
            predicted = "unknown" if row.predicted is None else size(row.predicted)
            lines.append((row.name, row.kind, _shape(row), predicted, size(row.measured), row.kept))
        lines.append(("total", "", "", size(self.predicted), size(self.measured), ""))
        table = aligned(lines, right=(3, 4))
        return "\n".join(line.rstrip() for line in (*table, "", *self._notes()))

    def _notes(self) -> list[str]:
        notes = [f"{self.summary()}, agreement {self.agreement:.3f}"]
        if self.neuron_steps:
            notes.append(f"{self.neuron_steps:,} neuron-steps")
        unknown = {row.kind: 0 for row in self.rows if row.predicted is None}
        for row in self.rows:
            if row.predicted is None:
                unknown[row.kind] += row.measured
        if unknown:
            listed = ", ".join(f"{kind} {size(count)}" for kind, count in unknown.items())
            notes.append(f"no formula, not predicted: {listed}")
        if self.peak is not None:
            notes.append(f"peak of the forward pass on {self.device}: {size(self.peak)}")
        return [*notes, LEGEND]


def _shape(row: LayerMemory) -> str:
    return "x".join(map(str, row.shape))
