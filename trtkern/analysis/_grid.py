"""The loss at many points of a plane through the weights, in this process or in several."""

from __future__ import annotations

import io
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import torch
from torch import nn

from trtkern.analysis._directions import Directions
from trtkern.analysis._network import Samples
from trtkern.analysis._objective import Loss, opened
from trtkern.ops import checks
from trtkern.output.signals import waiting

Place = tuple[int, ...]
"""Which point of a grid."""


class Point(NamedTuple):
    """What is known of a point."""

    loss: float
    correct: int


@dataclass(frozen=True)
class Grid:
    """All that a point's loss depends on but where it is."""

    who: str
    model: nn.Module
    samples: Samples
    loss: Loss
    directions: Directions

    def looking(self, stack: ExitStack, dims: int) -> Callable[[Sequence[float]], Point]:
        """A function of the coordinates; until the stack is closed the model is not as it was.

        The samples stay in memory and the weights in their place: a point costs one pass over the samples.
        """
        objective = stack.enter_context(opened(self.who, self.model, self.samples, self.loss))
        directions = self.directions.of_filters(self.model, dims)

        def at(coordinates: Sequence[float]) -> Point:
            objective.move(*zip(coordinates, directions, strict=False))
            value = objective.value()
            return Point(objective.mean(value.losses), value.correct)

        return at

    def points(self, wanted: Mapping[Place, Sequence[float]], processes: int) -> Iterator[tuple[Place, Point]]:
        """Each of the points, as it is done; in several processes in whatever order.

        Raises:
            TypeError: several processes, and a model or a loss that cannot be sent to them.
            RuntimeError: a process ended.
        """
        dims = max(map(len, wanted.values()), default=1)
        if processes > 1 and len(wanted) > 1:
            yield from self._spread(wanted, min(processes, len(wanted)), dims)
            return
        with ExitStack() as stack:
            at = self.looking(stack, dims)
            for place, coordinates in wanted.items():
                yield place, at(coordinates)

    def _spread(
        self, wanted: Mapping[Place, Sequence[float]], processes: int, dims: int
    ) -> Iterator[tuple[Place, Point]]:
        threads = max(1, torch.get_num_threads() // processes)
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (self._packed(), dims, threads))
        try:
            with waiting():  # workers are born with Ctrl-C blocked: it is this process that it ends
                tasks = {pool.submit(_at, tuple(coordinates)): place for place, coordinates in wanted.items()}
            for task in as_completed(tasks):
                yield tasks[task], task.result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"{self.who}: expected {processes} processes that compute points, got one that ended, killed or out of "
                "memory; what is done is kept where a file was named: run it again, with fewer processes"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _packed(self) -> bytes:
        """As bytes: torch's own way of sending tensors takes files of /dev/shm, which is small in a container."""
        stream = io.BytesIO()
        try:
            torch.save(self, stream)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise TypeError(
                f"{self.who}: expected a model and a loss that can be pickled, to send them to several processes, got "
                f"{type(self.model).__name__} and {checks.describe(self.loss)} ({error}); pass processes=1"
            ) from None
        return stream.getvalue()


_stack = ExitStack()
_look: list[Callable[[Sequence[float]], Point]] = []


def _begin(packed: bytes, dims: int, threads: int) -> None:
    """In a worker, once."""
    threading.Thread(target=_follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    torch.set_num_threads(threads)
    grid: Grid = torch.load(io.BytesIO(packed), weights_only=False)
    _look.append(grid.looking(_stack, dims))


def _follow() -> None:
    """In a worker: end when the process that asks ends, also where it was stopped while this one was being born."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _at(coordinates: Sequence[float]) -> Point:
    """In a worker, for each point."""
    return _look[0](coordinates)
