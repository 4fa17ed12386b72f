"""The segments of a network's step (``timeline``), with the bytes that each way of its blocks keeps and needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from trtkern.profiling.memory.held import Held
from trtkern.profiling.memory.tape import MEMORY, Given, Passed, Tape
from trtkern.profiling.memory.timeline import Option, Segment
from trtkern.profiling.memory.ways import AGAIN, CHECKPOINT, DENSE, KEEP, PACK, Block

BALANCE = 16.0
"""Floating-point operations that take as long as a byte that is moved: of float32 on CPUs and GPUs roughly. It weighs
convolutions that are made again against words that are unpacked."""
SPARSE = 0.2
"""What a kernel that adds up the weights of what fired computes, as a share of the dense operations."""


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


class Segments:
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
        if self._held.stay:
            return [own] * len(self._calls)
        left, found = self._tape.left, []
        for call in reversed(self._calls):
            found.append(left)
            left += call.weights
        return found[::-1]

    def _waits(self) -> list[int]:
        """At the backward pass of each call, gradients that wait for the layer that made what they are of."""
        made = {call.place: at for at, call in reversed(list(enumerate(self._calls)))}
        sizes = {call.place: call.gradient for call in self._calls}
        last: dict[int, int] = {}
        for at, call in enumerate(self._calls):
            for each in call.given:
                made.setdefault(each.place, at - 1)
                sizes[each.place] = max(each.gradient, sizes.get(each.place, 0))
                last[each.place] = at
                # Between the layers one gradient may be that of all that were added up.
                last.update((place, max(at - 1, last.get(place, 0))) for place in each.made_of)
        waiting = [0] * len(self._calls)
        for place in last.keys() - {MEMORY}:
            for at in range(made[place] + 1, last[place]):
                waiting[at] += sizes[place]
        return waiting

    def _ways(self, at: int, block: Block) -> list[str]:
        """The ways that a block has."""
        call = self._calls[at]
        packed = bool(block.layer.packed)
        ways = [PACK if packed else KEEP]
        if packed and self._after(at, PACK) and all(reader.exact for reader in self._readers(at)):
            ways.insert(0, KEEP)
        if block.layer_name != block.name and any(each.is_y for each in call.kept):
            ways.append(CHECKPOINT if packed else DENSE)
        return ways

    def _readers(self, at: int) -> list[Passed]:
        """The calls that are given what the block makes, packed."""
        place = self._calls[at].place
        return [c for c in self._calls if any(each.place == place and each.packed for each in c.given)]

    def _before(self, at: int, way: str) -> int:
        """Bytes of its own that a block keeps up to its own moment."""
        y = sum(each.bytes for each in self._calls[at].kept if each.is_y)
        return 0 if way in AGAIN else y

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
                again = sum(each.gradient for each in call.given[:1]) if way in AGAIN else 0
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
        if way in (PACK, CHECKPOINT):
            words = self._after(at, PACK)
            seconds += words + sum(words + call.gradient for reader in self._readers(at) if not reader.kernels[1])
        if way in AGAIN:
            seconds += sum(_seconds(c) for c in self._calls if c.name.startswith(f"{block.name}.conv"))
        return seconds / self._whole if self._whole else 0.0


def _seconds(call: Passed) -> float:
    """How long a call takes forward, in bytes that could be moved in that time: the longer of what its arithmetic and
    its memory take."""
    flops = call.flops * (SPARSE if call.kernels[0] else 1)
    return max(flops / BALANCE, call.gradient + sum(each.gradient for each in call.given))
