"""Who is told while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtkern.training.loop import Final, Trainer


class Observer:
    """What a loop tells while it runs; this one is deaf. ``progress.py`` has the ones that show something."""

    interval = 0.25
    """Seconds between two calls of ``step``; each reads the running sums, which on a GPU waits for it."""

    def start(self, trainer: Trainer) -> None:
        """Before the first epoch."""

    def step(self, epoch: int, step: int, averages: dict[str, float]) -> None:
        """Within an epoch: the averages so far, as in a row's "train"."""

    def measured(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After an epoch, before its row and its checkpoint are written, with the model in evaluation mode: what is
        added to the row is in both. Model, random numbers and gradients stay as they are."""

    def epoch(self, row: dict[str, Any]) -> None:
        """After an epoch: the row of metrics.jsonl."""

    def note(self, line: str) -> None:
        """Something that the user should know."""

    def final(self, trainer: Trainer, final: Final) -> None:
        """The report at the end of a run that was not stopped."""

    def close(self) -> None:
        """At the end, however it comes."""


class Observers(Observer):
    """Several, each told all."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._all = tuple(observers)
        self.interval = min(observer.interval for observer in observers)

    def start(self, trainer: Trainer) -> None:
        """To each."""
        for observer in self._all:
            observer.start(trainer)

    def step(self, epoch: int, step: int, averages: dict[str, float]) -> None:
        """To each."""
        for observer in self._all:
            observer.step(epoch, step, averages)

    def measured(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """To each."""
        for observer in self._all:
            observer.measured(trainer, row)

    def epoch(self, row: dict[str, Any]) -> None:
        """To each."""
        for observer in self._all:
            observer.epoch(row)

    def note(self, line: str) -> None:
        """To each."""
        for observer in self._all:
            observer.note(line)

    def final(self, trainer: Trainer, final: Final) -> None:
        """To each."""
        for observer in self._all:
            observer.final(trainer, final)

    def close(self) -> None:
        """To each, the last one first."""
        with ExitStack() as stack:
            for observer in self._all:
                stack.callback(observer.close)
