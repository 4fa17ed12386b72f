"""What ``profile`` found: rows, totals and a verdict in words, as a table for people and as data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trtkern.output.text import aligned, size
from trtkern.profiling.step.rates import Rates
from trtkern.profiling.step.work import SIZES

LEGEND = (
    "moved, FLOP: of forward and backward together; ~: sizes of input, parameters, output and their gradients, "
    "otherwise the traffic model; FLOP: of matrix products, convolutions and attention, nothing else is counted; "
    "of limit: the time that the bytes take at the copy rate, or the FLOP at the matmul rate, whichever is longer, "
    "over the time taken; a layer around others has what it does itself; (model): the model's own forward"
)


class Part(NamedTuple):
    """A layer, or another part of the step, in one direction."""

    seconds: float
    bytes: float | None
    """At the least; None: not counted."""
    flops: int

    def limit(self, rates: Rates) -> tuple[float, float]:
        """Seconds at the copy rate, seconds at the matmul rate."""
        return (self.bytes or 0.0) / rates.copy, self.flops / rates.product


class PartTime(NamedTuple):
    """A layer, or another part of the step: means over the profiled steps."""

    name: str
    """Of the module; in brackets what is none: "(loss)", "(optimizer)", "(loader)"."""
    kind: str
    """The name of its class; empty for what is no module."""
    group: str
    """"convolutions", "neurons", ..."""
    forward: Part
    """Its seconds, bytes and FLOP in the forward pass."""
    backward: Part
    """The same in the backward pass."""
    how: str
    """How the bytes were counted: ``work.MODEL_BYTES``, ``work.SIZES`` or nothing."""
    kept: int | None
    """Bytes kept for the backward pass, measured."""
    rate: float | None
    """Spikes per neuron, sample and step."""

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward.seconds + self.backward.seconds

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward.flops + self.backward.flops

    @property
    def bytes(self) -> float | None:
        """Forward and backward; None: not counted."""
        if self.forward.bytes is None and self.backward.bytes is None:
            return None
        return (self.forward.bytes or 0.0) + (self.backward.bytes or 0.0)

    @property
    def intensity(self) -> float | None:
        """FLOP per byte moved; None where either is not counted."""
        return self.flops / self.bytes if self.flops and self.bytes else None


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes. Printed, it is a table with a verdict below."""

    title: str
    """What was profiled."""
    rows: tuple[PartTime, ...]
    """The layers in the order in which they first ran, then the other parts."""
    wall: float
    """Seconds a step, mean of the profiled ones."""
    plain: float
    """Seconds a step without the profiler, median of as many steps between them."""
    steps: int
    """How many steps."""
    rates: Rates
    """Copy and matmul rate in the same rounds."""
    gpu: bool
    """Whether they ran on a GPU."""
    about: dict[str, str]
    """What ran: device, dtype, threads, batch, loss."""
    kept: str | None = None
    """What is kept for the backward pass, in words."""
    trace: dict[str, Any] = field(default_factory=dict, repr=False)
    """The last profiled step for chrome://tracing or Perfetto."""

    @property
    def unattributed(self) -> float:
        """Seconds of the step that no row has; on a GPU it may have been idle."""
        return self.wall - sum(row.seconds for row in self.rows)

    @property
    def attributed(self) -> float:
        """Share of the step that the rows have."""
        return 1 - self.unattributed / self.wall

    def limit(self, parts: Iterable[PartTime]) -> tuple[float, str]:
        """Share of the roofline that these reach, and the rate that bounds most of it: "copy" or "matmul"."""
        halves = [part for row in parts for part in (row.forward, row.backward)]
        limits = [part.limit(self.rates) for part in halves]
        taken = sum(part.seconds for part in halves)
        least = sum(max(limit) for limit in limits)
        matmul = sum(max(limit) for limit in limits if limit[1] > limit[0])
        return (least / taken if taken else 0.0), "matmul" if 2 * matmul > least else "copy"

    def groups(self) -> dict[str, list[PartTime]]:
        """The rows by kind, the longest first."""
        found: dict[str, list[PartTime]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return dict(sorted(found.items(), key=lambda item: -_seconds(item[1])))

    def verdict(self) -> list[str]:
        """What bounds the step, in words."""
        said = []
        for name, rows in self.groups().items():
            share = _seconds(rows) / self.wall
            if share < 0.005:
                continue
            reached, which = self.limit(rows)
            rate = f" (at {reached:.0%} of the {which} rate)" if reached >= 0.005 else ""
            said.append(f"{share:.1%} in {name}{rate}")
        left = "idle or unattributed" if self.gpu else "unattributed"
        lines = [f"{'; '.join(said)}; {self.unattributed / self.wall:.1%} {left}."]
        return [*lines, self._bound()]

    def _bound(self) -> str:
        name, rows = next(iter(self.groups().items()))
        if self.unattributed > _seconds(rows):
            return "Most of the step is " + ("the GPU waiting for its host." if self.gpu else "in no layer.")
        reached, which = self.limit(rows)
        longest = max(rows, key=lambda row: row.seconds)
        where = f"{name}, most of all {longest.name}" if len(rows) > 1 else longest.name
        if reached >= 0.5:
            why = "arithmetic" if which == "matmul" else "memory traffic"
            return f"The step is bound by the {why} of {where}."
        if not reached:
            return f"The step is bound by {where}, whose least time is not known."
        return (
            f"The step is bound by {where}, at {reached:.1%} of the {which} rate: far from what memory and arithmetic "
            "allow; look at sizes, layout, dtype and the number of calls."
        )

    def as_rows(self) -> list[dict[str, Any]]:
        """A flat dictionary a row, for CSV or JSON: seconds, bytes, FLOP, the share of the limit."""
        return [
            {
                "layer": row.name, "type": row.kind, "group": row.group, "forward_s": row.forward.seconds,
                "backward_s": row.backward.seconds, "forward_bytes": row.forward.bytes,
                "backward_bytes": row.backward.bytes, "bytes_by": row.how, "forward_flop": row.forward.flops,
                "backward_flop": row.backward.flops, "kept_bytes": row.kept, "of_limit": self.limit([row])[0],
                "limit": self.limit([row])[1], "firing_rate": row.rate,
            }
            for row in self.rows
        ]  # fmt: skip

    HEAD = (
        "layer", "type", "forward ms", "backward ms", "ms", "of step", "moved", "kept", "MFLOP", "FLOP/B", "of limit",
        "rate",
    )  # fmt: skip

    def table(self) -> list[tuple[str, ...]]:
        """The rows as text, below ``HEAD``, with what is unattributed and the sum."""
        lines = [self._line(row) for row in self.rows]
        rest = ("",) * 6
        for name, seconds in (("unattributed", self.unattributed), ("step", self.wall)):
            lines.append((name, "", "", "", f"{1e3 * seconds:.2f}", f"{seconds / self.wall:.1%}", *rest))
        return lines

    def _line(self, row: PartTime) -> tuple[str, ...]:
        reached, _ = self.limit([row])
        mark = "~" if row.how == SIZES else ""
        return (
            row.name,
            row.kind,
            f"{1e3 * row.forward.seconds:.2f}",
            f"{1e3 * row.backward.seconds:.2f}",
            f"{1e3 * row.seconds:.2f}",
            f"{row.seconds / self.wall:.1%}",
            mark + size(round(row.bytes)) if row.bytes else "",
            "" if row.kept is None else size(row.kept),
            f"{1e-6 * row.flops:,.1f}" if row.flops else "",
            "" if row.intensity is None else f"{row.intensity:.1f}",
            f"{reached:.0%}" if row.bytes else "",
            "" if row.rate is None else f"{row.rate:.3f}",
        )

    def notes(self) -> list[str]:
        """What ran, and what the figures stand on."""
        what = ", ".join(f"{name} {value}" for name, value in self.about.items())
        cost = self.wall / self.plain - 1
        return [
            f"{self.title}: {what}",
            f"{1e3 * self.wall:.2f} ms a step (mean of {self.steps} under the profiler), {1e3 * self.plain:.2f} ms "
            f"without it (median of {self.steps} in between): {cost:+.1%}",
            f"copy rate {1e-9 * self.rates.copy:.1f} GB/s, matmul rate {1e-9 * self.rates.product:.1f} GFLOP/s, "
            "medians of the same rounds",
            *([] if self.kept is None else [self.kept]),
        ]

    def __str__(self) -> str:
        lines = [self.HEAD, *self.table()]
        shown = aligned(lines, right=range(2, len(self.HEAD)))
        return "\n".join(line.rstrip() for line in (*shown, "", *self.notes(), LEGEND, "", *self.verdict()))

    def write_trace(self, path: Path) -> None:
        """The last profiled step as JSON for chrome://tracing or ui.perfetto.dev.

        Raises:
            OSError: the file cannot be written.
        """
        path.write_text(json.dumps(self.trace), encoding="utf-8")


def _seconds(rows: Sequence[PartTime]) -> float:
    return sum(row.seconds for row in rows)
