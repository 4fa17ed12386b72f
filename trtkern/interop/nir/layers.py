"""Layers that NIR has a node for and ``trtkern.nn`` no other use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trtkern.nn import LIF
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._neuron import AnyState, NeuronLayer, carrier, one_step
from trtkern.ops import checks


def alone(kind: str) -> None:
    """A RuntimeError within a ``trtkern.nn.Stream``, which carries the states of neurons and of nothing else."""
    if carrier() is not None:
        raise RuntimeError(
            f"stream: expected states of neurons only, got a {kind}, which has one that a stream does not carry; make "
            "the model a NodeGraph, and pass its state: y, state = model(x, state, return_state=True)"
        )


class Scale(Leaf):
    """y = scale * x at every step: NIR's Scale.

    Args:
        scale: a number or a tensor in the shape of a sample, without time and batch; it is learned.
    """

    def __init__(self, scale: float | Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.as_tensor(scale).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x scaled; [T, B, ...] or [B, ...]."""
        return self(x) if is_proxy(x) else x * self.scale

    def extra_repr(self) -> str:
        """The shape."""
        return f"shape={list(self.scale.shape)}"


class Threshold(LIF):
    """1 where x > v_threshold, else 0, at every step: NIR's Threshold, with a surrogate gradient.

    It is a ``LIF`` that keeps nothing from step to step: its decay is 0 and its gain 1.

    Args:
        v_threshold, spiking: what ``LIF`` takes, but decay and gain.
    """

    def __init__(self, v_threshold: Any = 1.0, **spiking: Any) -> None:
        super().__init__(0.0, 1.0, v_threshold=v_threshold, **spiking)


class Delay(Leaf):
    """y[t] = x[t - steps], 0 before the first step: NIR's Delay.

    Args:
        steps: an int >= 0, or an integer tensor in the shape of a sample, without time and batch.

    Raises:
        TypeError, ValueError: no integers, or one below 0.
    """

    takes_time = True
    carried = False
    """A ``Stream`` does not carry what it holds."""
    steps: Tensor

    def __init__(self, steps: int | Tensor) -> None:
        super().__init__()
        held = torch.as_tensor(steps)
        if held.dtype.is_floating_point or held.dtype.is_complex or held.dtype == torch.bool:
            raise TypeError(f"Delay: expected steps to be integers, got {checks.describe(steps)}; round them first")
        if held.numel() == 0 or int(held.min()) < 0:
            raise ValueError(f"Delay: expected steps >= 0, got {checks.describe(steps)}; a delay reads the past only")
        # Like the size of a kernel it is no part of a state dict.
        self.register_buffer("steps", held.to(torch.int64).clone(), persistent=False)
        self.longest, self.shortest = int(held.max()), int(held.min())
        self._different = sorted({int(n) for n in held.flatten().tolist()})

    def forward(self, x: Tensor, v0: Tensor | None = None, *, return_state: bool = False) -> Any:
        """[T, B, ...] of x [T, B, ...]; with ``return_state`` also the last ``longest`` inputs, which go back in as
        ``v0``, [longest, B, ...]."""
        if is_proxy(x):
            return self(x, v0, return_state=return_state)
        if not isinstance(x, Tensor) or x.dim() < 2:
            raise ValueError(f"Delay: expected x [T, B, ...], got {checks.describe(x)}; give it a sequence")
        if self.longest:
            alone("Delay")
        past = (self.longest, *x.shape[1:])
        if v0 is None:
            v0 = x.new_zeros(past)
        elif tuple(v0.shape) != past:
            raise ValueError(f"Delay: expected v0 of shape {past}, got {checks.describe(v0)}; pass the state returned")
        line, length = torch.cat([v0.to(x.dtype), x]), x.shape[0]

        def late(steps: int) -> Tensor:
            return line[self.longest - steps : self.longest - steps + length]

        y = late(self._different[0])
        for steps in self._different[1:]:
            y = torch.where(self.steps == steps, late(steps), y)
        return (y, line[length:]) if return_state else y

    def step(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step: y [B, ...] of x [B, ...], and the state for the next one."""
        y, state = self(one_step("Delay", x, 0), v, return_state=True)
        return y.squeeze(0), state

    def extra_repr(self) -> str:
        """The steps: one number, or the least and the greatest."""
        first, last = self.shortest, self.longest
        return f"steps={first}" if first == last else f"steps={first} to {last}, shape={list(self.steps.shape)}"


class PerNeuron(Leaf):
    """Neurons over images whose numbers differ from place to place, not only from channel to channel.

    [T, B, C, H, W] goes as [T, B, C * H * W] through a layer that has a channel for each neuron.

    Args:
        layer: a layer of neurons with ``channel_dim=2``, such as ``LIF``.
    """

    takes_time = True

    def __init__(self, layer: NeuronLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, v0: AnyState = None, *, return_state: bool = False) -> Any:
        """As the layer, in x's shape; the states that are returned and taken are [B, C * H * W]."""
        if is_proxy(x):
            return self(x, v0, return_state=return_state)
        made = self.layer(x.flatten(2), v0, return_state=return_state)
        y, *state = made if return_state else (made,)
        y = y.unflatten(2, x.shape[2:])
        return (y, *state) if return_state else y

    def step(self, x: Tensor, v: AnyState = None) -> tuple[Tensor, Any]:
        """One step, as the layer's."""
        y, state = self.layer.step(x.flatten(1), v)
        return y.unflatten(1, x.shape[1:]), state
