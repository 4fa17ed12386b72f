"""What a program wants to do while a run goes on: told at its start, after a step, after an epoch, at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trtkern import own

if TYPE_CHECKING:
    from trtkern.training.loop import Trainer
    from trtkern.training.measure import Result

EVENTS = ("start", "step", "epoch", "end")


class Callback:
    """What is called while a run goes on; each of these methods does nothing here. A class of yours overrides what it
    needs, or is another class that has some of them.

    Whatever it raises ends the run with an error that names it; the checkpoints stay, and the run can go on from them.
    ``trainer.stop()`` ends the run after the step that is under way, with a checkpoint, as Ctrl-C does.
    """

    def start(self, trainer: Trainer) -> None:
        """Before the first step, also of a run that goes on."""

    def step(self, trainer: Trainer, epoch: int, step: int, loss: Tensor) -> None:
        """After each update of the weights.

        Args:
            trainer: of the run; ``trainer.model`` has the new weights.
            epoch: from 1.
            step: within the epoch, from 1.
            loss: of the step, 0-dim, on the device; the next step of a CUDA graph overwrites it.
        """

    def epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After each epoch and its evaluation, with the network in evaluation mode, before its row and its checkpoint
        are written.

        Args:
            trainer: of the run.
            row: of metrics.jsonl; what is added to it, of JSON's types, is written with it.
        """

    def end(self, trainer: Trainer, result: Result) -> None:
        """After the last epoch, with the chosen weights in the network, or where the run was stopped."""


class CallbackError(RuntimeError):
    """A callback that raised; the message has its name, its line and what it raised."""


class Callbacks:
    """Several, told in turn.

    Raises:
        TypeError: one that has none of the methods.
    """

    def __init__(self, callbacks: Sequence[object]) -> None:
        self._calls: dict[str, list[tuple[str, Callable[..., None]]]] = {event: [] for event in EVENTS}
        for callback in callbacks:
            kind = type(callback).__qualname__
            if isinstance(callback, type) or not any(callable(getattr(callback, event, None)) for event in EVENTS):
                got = f"the class {callback.__qualname__}" if isinstance(callback, type) else kind
                raise TypeError(
                    f"callbacks: expected objects with some of the methods {', '.join(EVENTS)}, got {got}"
                    f"{'; make an object of it' if isinstance(callback, type) else ''}"
                )
            if isinstance(callback, Callback) and all(_deaf(callback, event) for event in EVENTS):
                named = [name for name in vars(type(callback)) if not name.startswith("_")]
                raise TypeError(
                    f"callbacks: expected {kind} to have some of the methods {', '.join(EVENTS)}, got "
                    f"{', '.join(named) or 'none'}, which nobody calls"
                )
            for event in EVENTS:
                if (call := getattr(callback, event, None)) is not None and not _deaf(callback, event):
                    self._calls[event].append((f"{kind}.{event}", call))
        self.steps = bool(self._calls["step"])
        """Whether one is told of steps."""

    def tell(self, event: str, *arguments: Any) -> None:
        """Call those that want to know.

        Raises:
            CallbackError: one raised.
        """
        for name, call in self._calls[event]:
            try:
                call(*arguments)
            except Exception as error:
                raise CallbackError(str(own.failed(error, f"callback: expected {name} to return"))) from error


def _deaf(callback: object, event: str) -> bool:
    """Whether the method is that of ``Callback``, which does nothing."""
    return getattr(type(callback), event, None) is getattr(Callback, event)
