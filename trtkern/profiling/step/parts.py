"""The rows of a profile: a layer or another part of the step, forward and backward, a time for each profiled step."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from trtkern.profiling.step.rates import Rates
from trtkern.profiling.step.spread import Spread, spread


class Operator(NamedTuple):
    """An operator that a layer ran on a CPU, without those inside it; or a kernel that it launched on a GPU."""

    name: str
    """ "aten::mm", "trtkern::lif_forward", ..."""
    times: tuple[float, ...]
    """Seconds of all its calls in each profiled step."""
    calls: int
    """In a step; the median where steps differ."""

    @property
    def seconds(self) -> float:
        """Of all its calls in a step, median of the steps."""
        return median(self.times)


class Part(NamedTuple):
    """A layer, or another part of the step, in one direction."""

    times: tuple[float, ...]
    """Seconds in each profiled step."""
    bytes: float | None
    """At the least; None: not counted."""
    flops: int
    """Of matrix products, convolutions and attention; nothing else is counted."""
    operators: tuple[Operator, ...] = ()
    """What ran for it, the longest first."""

    @property
    def seconds(self) -> float:
        """Median of the profiled steps."""
        return median(self.times)

    def limit(self, rates: Rates) -> tuple[float, float]:
        """Seconds at the copy rate, seconds at the matmul rate."""
        return (self.bytes or 0.0) / rates.copy, self.flops / rates.product


class PartTime(NamedTuple):
    """A layer, or another part of the step."""

    name: str
    """Of the module; in brackets what is none: "(loss)", "(optimizer)", "(loader)"."""
    kind: str
    """The name of its class; empty for what is no module."""
    group: str
    """"convolutions", "neurons", ..."""
    forward: Part
    """Its times, bytes and FLOP in the forward pass."""
    backward: Part
    """The same in the backward pass."""
    how: str
    """How the bytes were counted: ``work.MODEL_BYTES``, ``work.SIZES`` or nothing."""
    kept: int | None
    """Bytes kept for the backward pass, measured."""
    rate: float | None
    """Spikes per neuron, sample and step."""

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds of forward and backward in each profiled step."""
        return tuple(map(sum, zip(self.forward.times, self.backward.times, strict=True)))

    @property
    def seconds(self) -> float:
        """Forward and backward, median of the profiled steps."""
        return median(self.times)

    @property
    def spread(self) -> Spread:
        """p20, p50 and p80 of ``times``."""
        return spread(self.times)

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


def together(rows: Iterable[PartTime], steps: int) -> tuple[float, ...]:
    """Seconds of these rows in each of so many profiled steps."""
    taken = [row.times for row in rows]
    return tuple(sum(times[step] for times in taken) for step in range(steps))
