"""The memory of a training step for every way of running its blocks, and the cheapest ways that fit into a budget.

In memory at the peak of a step are the weights and buffers of the network, their gradients, the state of the optimiser,
the batch, what the layers keep for the backward pass, and the working set of one layer. The sizes of what is kept are
those of ``trtkern.profiling.memory``'s formulas. Not counted is what libraries and allocators hold beside the tensors:
workspaces, caches, the CUDA context.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from trtkern.output.text import aligned, size
from trtkern.profiling.memory import timeline
from trtkern.profiling.memory.tape import MEMORY, Given, Passed, Tape, tape
from trtkern.profiling.memory.timeline import Option, Segment
from trtkern.profiling.memory.ways import CHECKPOINT, KEEP, PACK, Block

BALANCE = 16.0
"""Floating-point operations that take as long as a byte that is moved: of float32 on CPUs and GPUs roughly. It weighs
convolutions that are made again against words that are unpacked."""
SPARSE = 0.2
"""What a kernel that adds up the weights of what fired computes, as a share of the dense operations."""


class Held(NamedTuple):
    """Bytes that are in memory throughout a step, or come with its backward pass."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Of all parameters that are trained."""
    state: int
    """Of the optimiser."""
    batch: int
    """Of the images and what is made of them before the network."""
    largest: int
    """Of the largest parameter, of whose gradient an optimiser may make a copy."""
    accumulates: bool = False
    """Whether the gradients of a batch before are there already."""


def held(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, batch: int = 0, accumulates: bool = False
) -> Held:
    """What a model and its optimiser take.

    Args:
        model: the network.
        optimizer: of its weights; None has no state.
        batch: bytes of the images.
        accumulates: whether several batches go into one update.
    """
    parameters = list(model.parameters())
    trained = [p.nbytes for p in parameters if p.requires_grad]
    weights = sum(t.nbytes for t in (*parameters, *model.buffers()))
    state = 0 if optimizer is None else state_bytes(optimizer)
    return Held(weights, sum(trained), state, batch, max(trained, default=0), accumulates)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state that an optimiser has after its first step, found by a step of the same optimiser over weights
    without memory; what it has now, where its ``step`` needs numbers."""
    now = _state(optimizer.state)
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    groups = []
    for group in optimizer.param_groups:
        weights = [torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        groups.append({**group, "params": weights, "fused": False, "foreach": False, "capturable": False, "lr": 1e-3})
    twin.param_groups, twin.state = groups, type(optimizer.state)(dict)
    try:
        twin.step()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return now
    return max(now, _state(twin.state))


def _state(state: Mapping[Any, Any]) -> int:
    values = [value for each in state.values() for value in each.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


class Row(NamedTuple):
    """A block in a plan."""

    name: str
    way: str
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
    held: Held
    kept: int
    """Bytes kept for the backward pass in all."""
    gradients: int
    """Bytes of the gradients that are there at the peak."""
    working: int
    """Bytes beside: of what is kept at the peak, and of the working set of the layer whose backward pass it is."""
    peak: int
    """Bytes at the peak of a step."""
    budget: int | None = None

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
            f"weights {size(h.weights)}, optimiser {size(h.state)}, batch {size(h.batch)}, gradients then "
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
        self._built = _Segments(self.tape, held)
        self.segments = self._built.all()

    @property
    def _fixed(self) -> int:
        return self.held.weights + self.held.state + self.held.batch

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
            f"expected at least {size(least.peak)}, what a step takes with as little kept as there is a way for "
            f"(weights {size(self.held.weights)}, gradients {size(self.held.gradients)}, optimiser "
            f"{size(self.held.state)}, the rest grows with the batch), got {size(budget)}"
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


@dataclass(frozen=True)
class _Moment:
    """The backward pass of a layer, in one way."""

    kept: int
    """Bytes kept by its segment up to it."""
    gradients: int
    working: int

    @property
    def needs(self) -> int:
        return self.kept + self.gradients + self.working


class _Segments:
    """The segments of a tape."""

    def __init__(self, found: Tape, held: Held) -> None:
        self._tape, self._held, self._calls = found, held, found.calls
        self._blocks = self._positions()
        self._owner = {self._calls[at].place: block.name for at, block in self._blocks.items()}
        self._owner.pop(MEMORY, None)
        self._moments: dict[tuple[str, str], list[_Moment]] = {}
        self._behind = self._gradients_behind()
        self._waiting = self._waits()
        self._whole = sum(3 * _seconds(call) for call in self._calls)

    def all(self) -> list[Segment]:
        """The layers before the first block, and a segment for each block."""
        starts = [*self._blocks, len(self._calls)]
        made = [Segment("", (self._option(None, KEEP, range(starts[0])),))]
        for at, end in itertools.pairwise(starts):
            block, inside = self._blocks[at], range(at, end)
            options = tuple(self._option(block, way, inside) for way in self._ways(at, block))
            made.append(Segment(block.name, options))
        return made

    def own(self, name: str, way: str) -> int:
        """Bytes that a block keeps of its own: what it normalises, and its spikes for the layers that read them."""
        (at,) = (at for at, block in self._blocks.items() if block.name == name)
        return self._before(at, way) + self._after(at, way)

    def gradients_at(self, options: Sequence[Option], top: int) -> int:
        """Bytes of gradients at the moment of the peak."""
        before = 0
        for name, option in zip(["", *(block.name for block in self._blocks.values())], options, strict=True):
            for moment in self._moments[name, option.way]:
                if before + moment.needs == top:
                    return moment.gradients
            before += option.keeps
        return 0

    def _positions(self) -> dict[int, Block]:
        """Where the layer of neurons of each block runs first."""
        layers = {block.layer_name: block for block in self._tape.blocks}
        found: dict[str, int] = {}
        for at, call in enumerate(self._calls):
            if call.name in layers:
                found.setdefault(call.name, at)
        return {at: layers[name] for name, at in sorted(found.items(), key=lambda each: each[1])}

    def _gradients_behind(self) -> list[int]:
        """At the backward pass of each call, the gradients of the weights of those behind it."""
        own = self._held.gradients
        if self._held.accumulates:
            return [own] * len(self._calls)
        left, found = self._tape.left, []
        for call in reversed(self._calls):
            found.append(left)
            left += call.weights
        return found[::-1]

    def _waits(self) -> list[int]:
        """At the backward pass of each call, gradients that wait for the layer that made what they are of."""
        made = {call.place: at for at, call in reversed(list(enumerate(self._calls)))}
        uses: dict[int, list[tuple[int, int]]] = {}
        for at, call in enumerate(self._calls):
            for each in call.given:
                if each.place != MEMORY and each.gradient:
                    uses.setdefault(each.place, []).append((at, each.gradient))
        waiting = [0] * len(self._calls)
        for place, found in uses.items():
            begin = made.get(place, found[0][0] - 1)
            for at in range(begin + 1, found[-1][0]):
                waiting[at] += max(gradient for _, gradient in found)
        return waiting

    def _ways(self, at: int, block: Block) -> list[str]:
        """The ways that a block has."""
        call = self._calls[at]
        packed = bool(block.layer.packed)
        ways = [PACK if packed else KEEP]
        if packed and self._after(at, PACK) and all(reader.exact for reader in self._readers(at)):
            ways.insert(0, KEEP)
        if block.layer_name != block.name and any(each.is_y for each in call.kept):
            ways.append(CHECKPOINT)
        return ways

    def _readers(self, at: int) -> list[Passed]:
        """The calls that are given what the block makes, packed."""
        place = self._calls[at].place
        return [c for c in self._calls if any(each.place == place and each.packed for each in c.given)]

    def _before(self, at: int, way: str) -> int:
        """Bytes of its own that a block keeps up to its own moment."""
        y = sum(each.bytes for each in self._calls[at].kept if each.is_y)
        return 0 if way == CHECKPOINT else y

    def _after(self, at: int, way: str) -> int:
        """Bytes of its spikes, that the layers behind it keep."""
        call = self._calls[at]
        kept = sum(each.bytes for c in self._calls for each in c.kept if each.place == call.place and not each.is_y)
        return call.gradient if kept and way == KEEP and self._blocks[at].layer.packed else kept

    def _option(self, block: Block | None, way: str, inside: range) -> Option:
        """A way of running the calls ``inside``, the first of which is the block's."""
        kept, moments = 0, []
        for at in inside:
            call, again = self._calls[at], 0
            kept += sum(each.bytes for each in call.kept if each.place not in self._owner and not each.is_y)
            if block is not None and at == inside[0]:
                kept += self._before(at, way)
                again = sum(each.gradient for each in call.given[:1]) if way == CHECKPOINT else 0
            elif self._held_y(call):
                kept += sum(each.bytes for each in call.kept if each.is_y)
            dense = block.name if block is not None and way == KEEP else None
            moments.append(_Moment(kept, self._behind[at], self._working(call, dense) + again + self._waiting[at]))
            if block is not None and at == inside[0]:
                kept += self._after(at, way)
        self._moments["" if block is None else block.name, way] = moments
        cost = 0.0 if block is None else self._cost(inside[0], block, way)
        return Option(way, kept, max((moment.needs for moment in moments), default=0), cost)

    def _held_y(self, call: Passed) -> bool:
        return call.name not in {block.layer_name for block in self._blocks.values()}

    def _working(self, call: Passed, dense: str | None) -> int:
        """Bytes of the gradients that come in and go out, of what is unpacked, and of what torch's convolutions on a
        CPU copy: the weight, and its gradient, in another order. Spikes of the block ``dense`` are there already."""
        made = call.gradient + sum(each.gradient for each in call.given) + call.weights
        unpacked = sum(each.gradient for each in call.given if self._is_unpacked(each, dense))
        copies = 0 if not call.convolves or self._tape.device.type != "cpu" else 1 if call.kernels[1] else 2
        return made + unpacked + copies * call.weights

    def _is_unpacked(self, given: Given, dense: str | None) -> bool:
        return given.packed and (dense is None or self._owner.get(given.place) != dense)

    def _cost(self, at: int, block: Block, way: str) -> float:
        """What a way takes longer, as a share of the step: words are written and unpacked, the layer before is run
        once more."""
        call = self._calls[at]
        seconds = 0.0
        if way != KEEP and block.layer.packed:
            words = self._after(at, PACK)
            seconds += words + sum(words + call.gradient for reader in self._readers(at) if not reader.kernels[1])
        if way == CHECKPOINT:
            seconds += sum(_seconds(c) for c in self._calls if c.name.startswith(f"{block.name}.conv"))
        return seconds / self._whole if self._whole else 0.0


def _seconds(call: Passed) -> float:
    """How long a call takes forward, in bytes that could be moved in that time: the longer of what its arithmetic and
    its memory take."""
    flops = call.flops * (SPARSE if call.kernels[0] else 1)
    return max(flops / BALANCE, call.gradient + sum(each.gradient for each in call.given))
