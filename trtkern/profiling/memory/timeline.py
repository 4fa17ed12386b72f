"""A training step as a line of moments, and the cheapest ways of running its blocks that fit into a budget.

A *moment* is the backward pass of one layer. In memory are then: what the layers up to it keep, the gradients of the
weights of those behind it, and its working set: the gradient that comes in, those that go out, what is unpacked or
made again for it, and gradients that wait for the layer that made what they are of. A *segment* is a block's moment
and those of the layers behind it, up to the next block. It is run in one of several ways, and what a way keeps stays
for the segments behind::

    peak = fixed + max over segments k of (sum over i < k of keeps_i + needs_k)

The cheapest ways whose peak is within a budget are found by dynamic programming: of two beginnings, one that keeps no
more and costs no more than the other is gone on with. That is exact; only beyond ``MOST`` beginnings, which networks of
repeated blocks do not come to, those that keep nearly the same are thinned out to the cheapest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

MOST = 4096
"""Beginnings that are gone on with."""


class Option(NamedTuple):
    """One way of running a segment."""

    way: str
    keeps: int
    """Bytes that stay for the segments behind it."""
    needs: int
    """The most bytes at a moment of it, beside what the segments before it keep."""
    cost: float
    """What it takes longer than the fastest way, as a share of a step."""


class Segment(NamedTuple):
    """A block and the layers behind it."""

    name: str
    """Of the block; empty for the layers before the first one."""
    options: tuple[Option, ...]


class Choice(NamedTuple):
    """A way for each segment."""

    options: tuple[Option, ...]
    peak: int
    """Bytes, without what is fixed."""
    cost: float


def peak(options: Sequence[Option]) -> int:
    """The most bytes at a moment, of segments that run in these ways."""
    held = most = 0
    for option in options:
        most = max(most, held + option.needs)
        held += option.keeps
    return most


def cheapest(segments: Sequence[Segment], budget: int) -> Choice | None:
    """The ways that cost least of those whose peak is within ``budget`` bytes; None: none is."""
    found = _best(segments, lambda cost, option, needs: cost + option.cost if needs <= budget else None)
    if found is None:
        return None
    return Choice(found, peak(found), sum(option.cost for option in found))


def least(segments: Sequence[Segment]) -> int:
    """The lowest peak that there is a way for."""
    found = _best(segments, lambda most, option, needs: max(most, needs))
    assert found is not None
    return peak(found)


Judge = Callable[[float, Option, int], float | None]
"""What the beginning and an option that needs so many bytes come to: the less the better; None: they are ruled out."""


def _best(segments: Sequence[Segment], judge: Judge) -> tuple[Option, ...] | None:
    """The options whose verdict is the lowest.

    A beginning is bytes kept, its verdict, and its options as a chain. It is left out where another one keeps no more
    and is judged no worse: whatever follows, that one ends no worse.
    """
    beginnings: list[tuple[int, float, tuple]] = [(0, 0.0, ())]
    for segment in segments:
        longer: list[tuple[int, float, tuple]] = []
        for kept, verdict, chain in beginnings:
            for option in segment.options:
                judged = judge(verdict, option, kept + option.needs)
                if judged is not None:
                    longer.append((kept + option.keeps, judged, (chain, option)))
        longer.sort(key=lambda each: each[:2])
        beginnings = []
        for each in longer:
            if not beginnings or each[1] < beginnings[-1][1]:
                beginnings.append(each)
        if len(beginnings) > MOST:
            first = beginnings[0]
            width = (beginnings[-1][0] - first[0]) // MOST + 1
            thinned = {(each[0] - first[0]) // width: each for each in beginnings}
            beginnings = [first, *(each for each in thinned.values() if each is not first)]
    if not beginnings:
        return None
    chain = min(beginnings, key=lambda each: each[1])[2]
    options: list[Option] = []
    while chain:
        chain, option = chain
        options.append(option)
    return tuple(reversed(options))
