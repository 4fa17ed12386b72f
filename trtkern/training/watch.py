"""What stops a run: a non-finite number in the network, or the user."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.parallel.parts import part

PARTS = {
    "cross_entropy": "the cross entropy of ", "mse": "the squared error of ", "regularizer": "the weight penalty of ",
}  # fmt: skip
"""The parts of a loss in the order in which they are computed."""


class NonFiniteError(RuntimeError):
    """A NaN or an infinity in the network, the loss or the weights; the message has the step and the layer."""


class Watch:
    """The LIF layers of a model in the order in which the forward pass meets them, and their non-finite flags.

    Spikes hide a NaN: a neuron whose potential is NaN does not fire, and the loss stays finite. So every LIF layer
    raises a flag (``layer.nonfinite``), and this looks at all of them and at the loss.

    Args:
        model: the model.
        forward: runs the model on some input; called once, in eval mode and without gradient.
    """

    def __init__(self, model: nn.Module, forward: Callable[[], object]) -> None:
        self.flags: dict[str, Tensor] = {}
        self.backends: dict[str, str] = {}
        self._model = model
        hooks = [
            module.register_forward_pre_hook(self._meet(name, flag))
            for name, module in model.named_modules()
            if isinstance(flag := getattr(module, "nonfinite", None), Tensor)
        ]
        training = model.training
        try:
            with torch.no_grad():
                model.eval()
                forward()
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
            self.clear()

    def _meet(self, name: str, flag: Tensor) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            if name not in self.flags:
                self.flags[name] = flag
                self.backends[name] = str(module.backend_for(inputs[0]))

        return hook

    def used(self) -> list[str]:
        """The names of the backends in use."""
        return sorted({reason.split(" ", 1)[0] for reason in self.backends.values()})

    def clear(self) -> None:
        """Lower all flags."""
        for flag in self.flags.values():
            flag.zero_()

    def check(self, loss: Tensor, when: str, parts: Mapping[str, Tensor | float] | None = None) -> None:
        """Raise if ``problem`` finds one.

        Raises:
            NonFiniteError: with ``when`` and the first layer whose flag is up, or the first part of the loss.
        """
        refuse([self.problem(loss, parts)], when)

    def problem(self, loss: Tensor, parts: Mapping[str, Tensor | float] | None = None) -> str | None:
        """Where the first number is that is not finite, in words; None where all are. On a GPU this waits for it.

        Args:
            loss: the total, 0-dim.
            parts: of the loss, by the names of ``LossParts``; they say which of them was the first. Floats are
                averages, which remember a batch that was not finite.
        """
        parts = parts or {}
        if loss.is_cuda:  # one look
            bad = (~torch.isfinite(loss.detach())).to(torch.int32).reshape(1)
            flags = torch.cat([*self.flags.values(), bad]).tolist()
        else:
            flags = [*(flag.item() for flag in self.flags.values()), not math.isfinite(loss.item())]
        if not any(flags) and all(math.isfinite(part) for part in parts.values() if isinstance(part, float)):
            return None
        layer = next((name for name, flag in zip(self.flags, flags, strict=False) if flag), None)
        if layer is not None:
            return f"the membrane potential of layer {layer}"
        broken = [of for name, of in PARTS.items() if name in parts and not math.isfinite(float(parts[name]))]
        return f"{broken[0] if broken else ''}the loss (every LIF layer stayed finite)"

    def broken_weight(self) -> str | None:
        """The first floating tensor of the model's state that is not finite: such a model is not worth saving."""
        for name, value in self._model.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(part(value)).all()):
                return name
        return None


def refuse(problems: Sequence[str | None], when: str) -> None:
    """Raise if there is a problem.

    Args:
        problems: where the first number is that is not finite, of each process by rank; None is nowhere.
        when: in words.

    Raises:
        NonFiniteError: naming step, layer, and of several processes the rank.
    """
    for rank, place in enumerate(problems):
        if place is not None:
            who = f" in rank {rank}" if len(problems) > 1 else ""
            raise NonFiniteError(f"train: expected finite numbers, got NaN or Inf {when}{who}, first in {place}")


class StopSignal:
    """While active, SIGINT and SIGTERM set ``requested`` instead of ending the process; a second one ends it.

    Args:
        patient: a second one does not: torchrun hands on what the terminal has sent to all of its processes already.
    """

    def __init__(self, patient: bool = False) -> None:
        self.requested, self._patient = False, patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._patient:
            self.__exit__()
