"""What can be profiled: a step that can be repeated, its parts named."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trtkern.profiling.memory.ledger import LOSS
from trtkern.profiling.memory.measured import check_call, memory
from trtkern.profiling.memory.report import MemoryReport
from trtkern.profiling.step.ranges import LOADER, Ranges


class Subject(Protocol):
    """A step that can be repeated."""

    title: str
    device: torch.device
    dtype: torch.dtype
    """Of the matrix products."""
    backward: bool
    about: dict[str, str]

    @property
    def model(self) -> nn.Module:
        """Whose layers are named."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """What updates its weights."""

    def forward(self) -> Any:
        """The model on a batch as the steps have it."""

    def step(self, ranges: Ranges) -> None:
        """One step, its parts in ``ranges.phase``."""

    def kept(self) -> MemoryReport:
        """What is kept for the backward pass."""


class ModelStep:
    """Forward, loss, backward and update of any module: the subject of ``profile``."""

    def __init__(
        self,
        model: nn.Module,
        input: Any,
        loss: Callable[[Any], Tensor] | None,
        optimizer: torch.optim.Optimizer | None,
        backward: bool,
        amp: torch.dtype | None,
    ) -> None:
        self.model, self.optimizer, self.backward, self._amp = model, optimizer, backward, amp
        self.title, self._loss = type(model).__name__, loss or _mean_square
        self._load = input if callable(input) and not isinstance(input, Tensor) else None
        self._inputs = _arguments(self._load() if self._load else input)
        self.device = check_call(model, self._inputs)
        floats = (t for t in (*tree_leaves(self._inputs), *model.parameters()) if _floating(t))
        self.dtype = amp or next((tensor.dtype for tensor in floats), torch.float32)
        shapes = ", ".join("x".join(map(str, t.shape)) for t in tree_leaves(self._inputs) if isinstance(t, Tensor))
        self.about = {"input": shapes}
        if backward:
            self.about["loss"] = "mean square of the output, for want of another" if loss is None else _name(loss)
            self.about["optimizer"] = "none" if optimizer is None else type(optimizer).__name__

    def forward(self) -> Any:
        """The model on its input."""
        with torch.autocast(self.device.type, self._amp) if self._amp else nullcontext():
            return self.model(*self._inputs)

    def step(self, ranges: Ranges) -> None:
        """Load, forward, loss, backward, update."""
        if self._load is not None:
            with ranges.phase(LOADER):
                self._inputs = _arguments(self._load())
        if not self.backward:
            with torch.no_grad():
                self.forward()
            return
        out = self.forward()
        with ranges.phase(LOSS):
            total = self._loss(out)
        if self.optimizer is None:
            self.model.zero_grad(set_to_none=True)
        else:
            self.optimizer.zero_grad(set_to_none=True)
        ranges.follow(total)
        total.backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def kept(self) -> MemoryReport:
        """Of the forward pass and the loss."""
        with torch.autocast(self.device.type, self._amp) if self._amp else nullcontext():
            return memory(self.model, self._inputs, loss=self._loss)


def _arguments(input: Any) -> tuple:
    return input if isinstance(input, tuple) else (input,)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


def _mean_square(output: Any) -> Tensor:
    squares = [leaf.float().square().mean() for leaf in tree_leaves(output) if _floating(leaf)]
    if not squares:
        raise ValueError("profile: expected a model that returns tensors of real numbers, got none; pass a loss")
    return torch.stack(squares).sum()
