"""Layers that NIR has a node for and ``trtkern.nn`` no other use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trtkern.nn import LIF
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._neuron import AnyState, NeuronLayer
from trtkern.nn.delay import Delay


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


class PerNeuron(Leaf):
    """Neurons, or delays, over images whose numbers differ from place to place, not only from channel to channel.

    [T, B, C, H, W] goes as [T, B, C * H * W] through a layer that has a channel for each neuron.

    Args:
        layer: a layer of neurons with ``channel_dim=2``, such as ``LIF``, or a ``Delay``.
    """

    takes_time = True

    def __init__(self, layer: NeuronLayer | Delay) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, v0: AnyState = None, *, return_state: bool = False) -> Any:
        """As the layer, in x's shape; the states that are returned and taken are those of [B, C * H * W]."""
        if is_proxy(x):
            return self(x, v0, return_state=return_state)
        made = self.layer(x.flatten(2), v0, return_state=return_state)
        y, *state = made if return_state else (made,)
        y = y.unflatten(2, x.shape[2:])
        return (y, *state) if return_state else y

    def step(self, x: Tensor, v: AnyState = None) -> tuple[Tensor, Any]:
        """One step, as the layer's."""
        layer: Any = self.layer
        y, state = layer.step(x.flatten(1), v)
        return y.unflatten(1, x.shape[1:]), state
