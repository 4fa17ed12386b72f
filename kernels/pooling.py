"""Where the neurons that are averaged 2 x 2 lie, so that the kernels pool without exchanging anything between threads.

Rows of an image are ``row`` neurons, rows 2k and 2k + 1 are pooled; ``side`` neurons lie side by side at each place of
a row. A lane owns the neurons that end in one average, or the half of them in its column, one position after the other:

    POOL     lanes   positions                     neuron of lane l at position q
    none     N       1                             l
    rows     N / 2   2: one row and the next       l + (l // row) * row + q * row
    places   N / 4   4: two neighbours in each     l + (l // side) * side + (l // (row / 2)) * row
                                                     + (q % 2) * side + (q // 2) * row

``rows`` is for side = 1: then neighbours are neighbouring lanes of a thread, and lane l ends in average l // 2, else l.
In these lanes the channel is (l // inner) % C with a half or a quarter of the neurons' inner, unless the channels lie
side by side: then inner stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from trtkern.kernels.numerics import inline

if TYPE_CHECKING:
    from trtkern.backends.base import Pool

POSITIONS = {"none": 1, "rows": 2, "places": 4}


class Geometry(NamedTuple):
    """POOL, and what the kernels need beside it."""

    kind: str = "none"
    half: int = 1
    """Lanes from which a row, or two of them, comes: row for "rows", row / 2 for "places"."""
    side: int = 1

    def suits(self, N: int, lanes: int) -> bool:
        """Whether each thread's ``lanes`` are neighbours in memory, and averages start at multiples of 16 elements."""
        return self.kind == "none" or (N % 64 == 0 and (self.half if self.side == 1 else self.side) % lanes == 0)

    def numbers(self, N: int, lanes: int, wide: bool) -> tuple[int, int, int]:
        """N, half and side as the kernels are given them: divided, so that their products are provably aligned."""
        if not wide:
            return N, self.half, self.side
        return N // (16 if self.kind == "none" else 64), self.half // lanes, self.side // lanes


_FLAT = Geometry()


def geometry(op: str, pool: Pool | None) -> Geometry:
    """Where the neurons of an average lie."""
    if pool is None:
        return _FLAT
    row, side = pool
    if row >= 1 << 30:
        raise ValueError(f"{op}: expected rows of fewer than 2**30 neurons to pool, got {row}; use fewer")
    return Geometry("rows", row) if side == 1 else Geometry("places", row // 2, side)


@triton.constexpr_function
def positions(POOL) -> int:
    """Neurons that a lane owns, one after the other."""
    return POSITIONS[POOL]


@inline
def neurons(n, POOL: tl.constexpr, ALIGNED: tl.constexpr):
    """N."""
    N = tl.cast(n, tl.int64)
    if ALIGNED:  # the factor is what makes rows provably aligned
        N = N * 16 if POOL == "none" else N * 64
    return N


@inline
def _which(base, size, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """lane // (size * UNIT) of the BLOCK lanes at base: one 64-bit division a program, 32-bit ones for the lanes."""
    base = base // UNIT
    lane = (base % size).to(tl.int32) * UNIT + tl.arange(0, BLOCK)
    return base // size + (lane // (size.to(tl.int32) * UNIT)).to(tl.int64)


@inline
def first_neuron(base, half, side, POOL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """The neurons of the BLOCK lanes at base, at their first position; half and side as given."""
    lane = base + tl.arange(0, BLOCK)
    if POOL != "none":
        # A factor of LANES everywhere, or it is not provable that the lanes of a thread stay neighbours.
        UNIT: tl.constexpr = LANES if ALIGNED else 1
        if POOL == "places":
            lane += _which(base, side, UNIT, BLOCK) * (side * UNIT)
            lane += _which(base, half, UNIT, BLOCK) * (half * (2 * UNIT))
        else:
            lane += _which(base, half, UNIT, BLOCK) * (half * UNIT)
    elif ALIGNED:
        # So it is, but Triton forgets it on the way.
        lane = tl.max_contiguous(tl.multiple_of(lane, LANES), LANES)
    return lane


@inline
def place(first, half, side, q, POOL: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr):
    """The neurons at position q; half and side as given."""
    UNIT: tl.constexpr = LANES if ALIGNED else 1
    if POOL == "places":
        first = first + ((q % 2) * side + (q // 2) * (half * 2)) * UNIT
    elif POOL == "rows":
        first = first + q * half * UNIT
    return first


@inline
def pooled_lanes(base, POOL: tl.constexpr, BLOCK: tl.constexpr):
    """The averages that the BLOCK lanes at base end in."""
    if POOL == "rows":
        lanes = base // 2 + tl.arange(0, BLOCK // 2)
    else:
        lanes = base + tl.arange(0, BLOCK)
    return lanes


@inline
def pooled(numbers, POOL: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of lanes, added up to numbers of averages; a thread adds its own lanes."""
    if POOL == "rows":
        numbers = tl.sum(tl.reshape(numbers, [BLOCK // 2, 2]), 1)
    return numbers


@inline
def spread(numbers, POOL: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of averages, given to each of their lanes."""
    if POOL == "rows":
        numbers = tl.reshape(tl.join(numbers, numbers), [BLOCK])
    return numbers
