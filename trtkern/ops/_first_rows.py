"""Backward passes of the first steps of a sequence, without the work for the zeros behind them.

The gradient of what a network gives in its first t steps is zero at every later one. Time is outermost in memory, so
the steps that matter are the first rows of each gradient: a view. What stands behind them stays as it is, zero, from
one pass to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from trtkern.ops.layout import is_dense

recording: FirstRows | None = None
"""Whom the Functions of the neurons ask in their backward pass, where they are called meanwhile; None: nobody."""


class FirstRows:
    """How many rows of a gradient hold all that is not zero in it.

    Nothing is taken on trust: rows are looked at, but where a backward pass made them zero itself (``Room``).
    """

    share = 1.0
    """t / T: where, in backward passes from now on, the zeros are expected to begin."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: WeakValueDictionary[int, Room] = WeakValueDictionary()

    def few(self, g: Tensor) -> int:
        """How many of the first rows of a gradient [T * n, ...] hold all that is not zero in it: t * n or T * n."""
        count = math.ceil(len(g) * self.share - 1e-6)
        if count == len(g) or not g.numel():
            return len(g)
        dense = is_dense(g)
        room = self._rooms.get(g.untyped_storage().data_ptr())
        if room is not None and dense and g.numel() == room.whole.numel():
            return -(-len(g) * room.filled // len(room.whole))
        rest = g[count:]
        if dense or is_dense(rest):  # in any layout: no copy
            rest = rest.as_strided((rest.numel(),), (1,))
        low, high = rest.aminmax()
        return count if float(low) == 0 == float(high) else len(g)

    def steps(self, count: int, gs: Tensor | None, gv: Tensor | None, final: Tensor | None) -> int:
        """The first steps, of ``count``, to which the gradients of a neuron's outputs come; ``final``: of its state
        behind the last one."""
        found = [self.few(g) for g in (gs, gv) if g is not None]
        return max(found) if found and final is None else count

    def room(self, owner: Any, make: Callable[[], Tensor]) -> Room:
        """For the gradient that a Function's backward pass gives: ``owner``, its context, keeps it for the next pass;
        ``make``: a tensor of that gradient's layout."""
        found: Room | None = getattr(owner, "room", None)
        if found is None:
            found = owner.room = Room(make())
            self._rooms[found.whole.untyped_storage().data_ptr()] = found
        return found


class Room:
    """A gradient [count, ...], of which the rows behind the first ``filled`` are zero.

    It is the same memory in each backward pass over a graph: what one pass gave, the next one writes over.
    """

    def __init__(self, whole: Tensor) -> None:
        self.whole, self.filled = whole.zero_(), 0

    def rows(self, count: int) -> Tensor:
        """The first rows, to be written to; those behind them are zero."""
        if count < self.filled:
            self.whole[count : self.filled] = 0
        self.filled = count
        return self.whole[:count]
