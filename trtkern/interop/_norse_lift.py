"""Norse's ``Lift``, which calls a layer of one step for each step of a sequence, without its loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from trtkern.interop.adapters import CannotConvert, adapter_for, package_of
from trtkern.interop.stepping import Stepping, at_once, uncountable
from trtkern.nn.convert import hooks_of

BY_ROW = ("conv", "pooling", "batchnorm", "dropout", "padding", "upsampling", "channelshuffle", "pixelshuffle")
"""Files of torch.nn.modules all of whose layers treat each row of a batch by itself, or step by step in ``at_once``."""
ALONE = (
    nn.Identity, nn.Linear, nn.Flatten, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.ReLU, nn.ReLU6, nn.ELU,
    nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
)  # fmt: skip
"""Other layers of torch that do."""
CONTAINERS = ("SequentialState", "Sequential")


class FoldedLift(nn.Module):
    """What ``Lift`` computes, with all steps in one call of each layer.

    A state goes in beside the sequence as with ``Lift``: ``y, state = layer((x, state))``. A sequence without a batch
    takes the loop, since a layer would take its time for the batch.

    Args:
        lifted: the library's object.
    """

    takes_time = True
    without_neurons = True
    """It may stand around layers that are no neurons."""

    def __init__(self, lifted: Any) -> None:
        super().__init__()
        self.lifted_module, self.is_stateful = lifted.lifted_module, lifted.is_stateful

    def forward(self, x: Tensor | tuple[Tensor, Any]) -> Any:
        """What the lifted layer gives at each step, [T, ...]; of one with a state also the last state."""
        x, state = x if isinstance(x, tuple) else (x, None)
        if x.dim() < _least_axes(self.lifted_module):
            y, state = self._looped(x, state)
        else:
            y, state = _run(self.lifted_module, x, state, self.is_stateful)
        return (y, state) if self.is_stateful else y

    def _looped(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        made = []
        for step in x:
            if self.is_stateful:
                y, state = self.lifted_module(step, state)
            else:
                y = self.lifted_module(step)
            made.append(y)
        return torch.stack(made), state


def lift(node: Any) -> nn.Module:
    """``Lift`` around layers that treat each row by themselves, and around neurons of one step."""
    for layer in _leaves(node.lifted_module):
        row = adapter_for(layer)
        if row is not None and row.neuron:
            continue
        if objection := _objection(layer):
            raise CannotConvert(f"expected layers that treat each row of a batch by itself, got {objection}")
    return FoldedLift(node)


def _leaves(layer: nn.Module) -> Iterator[nn.Module]:
    """The layers of containers that call one after the other."""
    if type(layer).__name__ in CONTAINERS and package_of(layer) in ("norse", "torch") and not hooks_of(layer):
        if getattr(layer, "return_hidden", False):
            raise CannotConvert("expected SequentialState with return_hidden=False, got True")
        for child in layer.children():
            yield from _leaves(child)
    else:
        yield layer


def _objection(layer: nn.Module) -> str | None:
    """What speaks against running a layer on T * B rows, or None."""
    kind = type(layer)
    known = kind.__module__.startswith("torch.nn.modules.") and kind.__module__.rpartition(".")[2] in BY_ROW
    known = known and "Unpool" not in kind.__name__ and not getattr(layer, "return_indices", False)
    if not known and kind not in ALONE:
        return f"{kind.__name__}, of which that is not known"
    if isinstance(layer, nn.Flatten) and layer.start_dim < 1:
        return f"Flatten with start_dim={layer.start_dim}"
    return hooks_of(layer) or uncountable(kind.__name__, layer)


def _least_axes(layer: nn.Module) -> int:
    """The least number of axes of [T, B, ...]: the first layer that says it would take fewer for one row."""
    for leaf in layer.modules():
        if isinstance(leaf, _ConvNd):
            return len(leaf.kernel_size) + 3
        if isinstance(leaf, (nn.Linear, _BatchNorm)):
            return 3
    return 2


def _run(layer: Any, x: Tensor, state: Any, stateful: bool) -> tuple[Tensor, Any]:
    """All steps of x [T, B, ...] through a layer, and its state after them, as the library hands it out."""
    if not stateful:
        return at_once(layer, layer, x), None
    if isinstance(layer, Stepping):
        return layer.dynamics(x, state)  # type: ignore[operator]
    state = [None] * len(layer) if state is None else state
    for index, (inner, kept) in enumerate(zip(layer, layer.stateful_layers, strict=True)):
        x, last = _run(inner, x, state[index], kept)
        if kept:
            state[index] = last
    return x, state
