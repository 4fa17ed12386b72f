"""The memory of a training step for every way of running its blocks, and the cheapest ways that fit into a budget.

In memory at the peak of a step are the weights and buffers of the network, their gradients, the state of the optimiser,
the batch, what the layers keep for the backward pass, and the working set of one layer. The sizes of what is kept are
those of ``trtkern.profiling.memory``'s formulas. Not counted is what libraries and allocators hold beside the tensors:
workspaces, caches, the CUDA context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from trtkern.output.text import aligned, size
from trtkern.profiling.memory import timeline
from trtkern.profiling.memory.held import Held
from trtkern.profiling.memory.segments import Segments
from trtkern.profiling.memory.tape import tape
from trtkern.profiling.memory.timeline import Option

__all__ = ["BudgetError", "Plan", "Row", "StepMemory"]


class Row(NamedTuple):
    """A block in a plan."""

    name: str
    """Of the block."""
    way: str
    """How it runs: one of ``trtkern.profiling.memory.ways.WAYS``."""
    kept: int
    """Bytes that it keeps."""
    saved: int
    """Bytes that it would keep more in the fastest way."""
    cost: float
    """What that takes longer, as a share of the step, by the traffic model."""


@dataclass(frozen=True)
class Plan:
    """How the blocks of a network run, and the memory of a step then. Printed, it is a table."""

    rows: tuple[Row, ...]
    """The blocks, in their order."""
    held: Held
    """What is in memory beside what the layers keep."""
    kept: int
    """Bytes kept for the backward pass in all."""
    gradients: int
    """Bytes of the gradients that are there at the peak."""
    working: int
    """Bytes beside: of what is kept at the peak, and of the working set of the layer whose backward pass it is."""
    peak: int
    """Bytes at the peak of a step."""
    budget: int | None = None
    """Bytes that the peak had to fit into; None: there was no limit."""

    @property
    def ways(self) -> dict[str, str]:
        """The way of each block."""
        return {row.name: row.way for row in self.rows}

    @property
    def cost(self) -> float:
        """What the step takes longer than in the fastest ways, as a share."""
        return sum(row.cost for row in self.rows)

    def __str__(self) -> str:
        lines: list[Sequence[str]] = [("block", "way", "kept", "saved", "longer")]
        lines += [(r.name, r.way, size(r.kept), size(r.saved), _percent(r.cost)) for r in self.rows]
        lines.append(("all layers", "", size(self.kept), size(sum(r.saved for r in self.rows)), _percent(self.cost)))
        table = "\n".join(line.rstrip() for line in aligned(lines, right=(2, 3, 4)))
        h = self.held
        parts = (
            f"weights {size(h.weights + h.gathered)}, optimiser {size(h.state)}, batch {size(h.batch)}, gradients then "
            f"{size(self.gradients)}, kept then and the working set {size(self.working)}"
        )
        within = "" if self.budget is None else f", within {size(self.budget)}"
        return f"{table}\n\npredicted peak of a step: {size(self.peak)}{within}: {parts}"


def _percent(share: float) -> str:
    return "" if not share else f"{100 * share:.1f} %"


class BudgetError(ValueError):
    """No ways of running the blocks fit into the budget."""


class StepMemory:
    """The memory of a training step, for every way of running its blocks.

    Args:
        model: in the ways that it was made with: a block that was made to keep its spikes dense is not made to pack.
        inputs: what the network is called with for so many samples: a tensor, or a tuple of arguments.
        batch: samples of a step.
        held: what is in memory beside what the layers keep.

    Raises:
        TypeError, ValueError: as ``memory``; a network whose layers depend on the size of the batch.
    """

    def __init__(self, model: nn.Module, inputs: Callable[[int], Any], batch: int, held: Held) -> None:
        self.held, self.tape = held, tape(model, inputs, batch)
        self._built = Segments(self.tape, held)
        self.segments = self._built.all()

    @property
    def made(self) -> dict[str, str]:
        """The ways that the blocks were made with."""
        there = {segment.name for segment in self.segments}
        return {block.name: block.way for block in self.tape.blocks if block.name in there}

    @property
    def _fixed(self) -> int:
        return self.held.weights + self.held.gathered + self.held.state + self.held.batch

    def within(self, budget: int) -> Plan:
        """The ways that take least time of those whose predicted peak is within ``budget`` bytes.

        Raises:
            BudgetError: there are none; the message says what the least is.
        """
        chosen = None
        if self._fixed + self._update <= budget:
            chosen = timeline.cheapest(self.segments, budget - self._fixed)
        if chosen is not None:
            return self._plan(chosen.options, budget)
        least = self.least()
        raise BudgetError(
            f"expected at least {size(least.peak, up=True)}, which a step takes with as little kept as there is a way "
            f"for (weights {size(self.held.weights)}, gradients {size(self.held.gradients)}, optimiser "
            f"{size(self.held.state)}; the rest grows with the batch), got {size(budget)}"
        )

    def least(self) -> Plan:
        """The cheapest ways with the lowest peak."""
        lowest = max(timeline.least(self.segments), self._update)
        chosen = timeline.cheapest(self.segments, lowest)
        assert chosen is not None
        return self._plan(chosen.options)

    def plan(self, ways: Mapping[str, str]) -> Plan:
        """The blocks in these ways; one that is not named in the fastest one that it has.

        Raises:
            ValueError: a way that a block does not have.
        """
        options = []
        for segment in self.segments:
            named = [o for o in segment.options if o.way == ways.get(segment.name, o.way)]
            if not named:
                there = ", ".join(option.way for option in segment.options)
                raise ValueError(f"memory: expected {segment.name} in one of {there}, got {ways[segment.name]!r}")
            options.append(min(named, key=lambda option: option.cost))
        return self._plan(options)

    @property
    def _update(self) -> int:
        """Bytes at the update of the weights, when nothing is kept any more."""
        return self.held.gradients + self.held.largest

    def _plan(self, options: Sequence[Option], budget: int | None = None) -> Plan:
        rows = []
        for segment, option in zip(self.segments, options, strict=True):
            if segment.name:
                fastest = min(segment.options, key=lambda each: each.cost)
                own = self._built.own(segment.name, option.way)
                rows.append(
                    Row(segment.name, option.way, own, fastest.keeps - option.keeps, option.cost - fastest.cost)
                )
        top = timeline.peak(options)
        gradients = self._built.gradients_at(options, top) if top >= self._update else self.held.gradients
        top = max(top, self._update)
        kept = sum(option.keeps for option in options)
        return Plan(tuple(rows), self.held, kept, gradients, top - gradients, self._fixed + top, budget)
