"""What is in memory throughout a training step: the weights, their gradients, the state of the optimiser, the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Held", "held", "in_parts", "state_bytes"]


class Held(NamedTuple):
    """Bytes that are in memory throughout a step, or come with its backward pass."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Of all parameters that are trained."""
    state: int
    """Of the optimiser."""
    batch: int = 0
    """Of the images, as they come from the loader."""
    gathered: int = 0
    """Of weights that lie in parts, those that are whole for a while."""
    largest: int = 0
    """Of the largest parameter, of whose gradient an optimiser may make a copy."""
    stay: bool = False
    """Whether all gradients are there throughout: those of a batch before, or the buckets that processes share."""


def held(model: nn.Module, state: int = 0, batch: int = 0, *, stay: bool = False) -> Held:
    """What a model takes whose weights are whole on one process, beside ``state`` and ``batch`` bytes.

    Args:
        model: the network.
        state: bytes of the optimiser's state (``state_bytes``).
        batch: bytes of a batch, as it comes from the loader.
        stay: whether all gradients are there throughout.
    """
    parameters = list(model.parameters())
    trained = [p.nbytes for p in parameters if p.requires_grad]
    weights = sum(t.nbytes for t in (*parameters, *model.buffers()))
    return Held(weights, sum(trained), state, batch, largest=max(trained, default=0), stay=stay)


def in_parts(whole: Held, ranks: int, gathered: int, buffers: int) -> Held:
    """The same where each of so many processes has a part of the weights, of their gradients and of the optimiser's
    state.

    Args:
        whole: of one process.
        ranks: processes.
        gathered: bytes of weights that are whole at a time.
        buffers: bytes of what is not cut.
    """
    weights = buffers + _part(whole.weights - buffers, ranks)
    return whole._replace(
        weights=weights, gradients=_part(whole.gradients, ranks), state=_part(whole.state, ranks), gathered=gathered,
        largest=_part(whole.largest, ranks), stay=True,
    )  # fmt: skip


def _part(count: int, ranks: int) -> int:
    return -(-count // ranks)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state that an optimiser has after its first step, found by a step of the same optimiser over weights
    without memory; what it has now, where its ``step`` needs numbers.

    Args:
        optimizer: that of torch; it need not have made a step.
    """
    now = _state(optimizer.state)
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    groups = []
    for group in optimizer.param_groups:
        weights = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        groups.append({**group, "params": weights, "fused": False, "foreach": False, "capturable": False, "lr": 1e-3})
    twin.param_groups, twin.state = groups, type(optimizer.state)(dict)
    try:
        twin.step()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return now
    return max(now, _state(twin.state))


def _state(state: Mapping[Any, Any]) -> int:
    values = [value for each in state.values() for value in each.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
