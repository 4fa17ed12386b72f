"""Layers of SpikingJelly that keep something from step to step and are no spiking neurons: dropout, readouts, loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtkern.interop.adapters import CannotConvert, unlike
from trtkern.interop.stepping import FoldedSequential, folded, uncountable, unfold
from trtkern.nn import LI


class SequenceDropout(nn.Module):
    """Dropout with one mask for all steps of a sequence, as SpikingJelly's has it.

    Args:
        p: the share that is dropped; the rest is divided by 1 - p.
        channels: drop whole channels of [B, C, ...].
        sequences: whether it takes [T, B, ...]. Each call then draws a mask. Else it takes one step [B, ...] and keeps
            its mask until ``reset()``; within ``over_time`` each sequence has one.
    """

    def __init__(self, p: float, channels: bool, sequences: bool) -> None:
        super().__init__()
        self.p, self.channels, self.takes_time = float(p), channels, sequences
        self.mask: Tensor | None = None

    @property
    def folds(self) -> bool:
        """Whether it takes one step a call."""
        return not self.takes_time

    def forward(self, x: Tensor) -> Tensor:
        """x, in training with the mask on it."""
        if not self.training:
            return x
        if self.takes_time:
            return x * self._drawn(x[0])
        if steps := folded():
            sequence = unfold(x, steps)
            return (sequence * self._drawn(sequence[0])).flatten(0, 1)
        if self.mask is None:
            self.mask = self._drawn(x)
        return x * self.mask

    def _drawn(self, x: Tensor) -> Tensor:
        drop = functional.dropout2d if self.channels else functional.dropout
        return drop(torch.ones_like(x), self.p, training=True)

    def reset(self) -> None:
        """Forget the mask."""
        self.mask = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mask": None}

    def extra_repr(self) -> str:
        """The settings."""
        return f"p={self.p:g}, channels={self.channels}, sequences={self.takes_time}"


class Decoded(nn.Module):
    """A readout over sequences, [T, B, ...] -> what ``decode`` makes of its potentials.

    Args:
        neuron: the readout.
        decode: None is the list of the potentials of every step. Else [B, ...]: "max-mem" their largest,
            "max-abs-mem" the one that is farthest from 0, "mean-mem" their mean, "last_mem" the last one.
    """

    takes_time = True

    def __init__(self, neuron: LI, decode: str | None) -> None:
        super().__init__()
        if decode not in (None, "max-mem", "max-abs-mem", "mean-mem", "last_mem"):
            raise CannotConvert(f"expected decode to be max-mem, max-abs-mem, mean-mem or last_mem, got {decode!r}")
        self.neuron, self.decode = neuron, decode

    def forward(self, x: Tensor) -> Any:
        """The decoded potentials."""
        v = self.neuron(x)
        if self.decode is None:
            return list(v)
        if self.decode == "mean-mem":
            return v.mean(0)
        if self.decode == "last_mem":
            return v[-1]
        high = v.max(0).values
        if self.decode == "max-mem":
            return high
        low = v.min(0).values
        return torch.where(high.abs() > low.abs(), high, low)

    def extra_repr(self) -> str:
        """decode."""
        return f"decode={self.decode!r}"


def dropout(layer: Any) -> SequenceDropout:
    """Of Dropout and Dropout2d, and of their MultiStep names."""
    name = type(layer).__name__
    sequences = getattr(layer, "step_mode", "m" if name.startswith("MultiStep") else "s") == "m"
    return SequenceDropout(layer.p, "2d" in name, sequences)


def readout(node: Any) -> Decoded:
    """Of NonSpikingIFNode and NonSpikingLIFNode."""
    tau = getattr(node, "tau", None)
    return Decoded(LI(1.0, 1.0) if tau is None else LI(1 - 1 / tau, 1 / tau), node.decode)


def stepwise(container: Any) -> FoldedSequential:
    """Of MultiStepContainer and a StepModeContainer that loops: the same layers, whose steps run at once."""
    if not isinstance(container, nn.Sequential):
        raise CannotConvert(f"expected a {type(container).__name__} that is an nn.Sequential, got one that is none")
    if type(container).__name__ == "StepModeContainer":
        unlike(container, "a StepModeContainer", stateful=True, step_mode="m")
    for path, layer in container.named_modules():
        if objection := uncountable(path, layer):
            raise CannotConvert(objection)
    made = FoldedSequential()
    made._modules.update(container._modules)
    return made
