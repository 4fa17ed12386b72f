"""Tensors that lie on several processes in parts (DTensor): here they are taken apart, and what is made of the parts is
put together.

The parts go through the ops as ordinary tensors, so that no kernel and no private op knows of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trtkern.ops import checks


def part(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor, with autograd, the gradient being a DTensor laid out alike; an ordinary
    tensor is itself."""
    if not checks.is_distributed(tensor):
        return tensor
    own = tensor.to_local()  # type: ignore[attr-defined]
    # One that a collective is still writing to; an operation waits for it, and makes an ordinary tensor of it.
    return own.clone() if hasattr(own, "wait") else own


def total(op: str, weights: Sequence[Tensor], run: Callable[[list[int]], Tensor]) -> Tensor:
    """The value of a sum over weights of which each process has a part: one all-reduce of one number for each dimension
    of a mesh that they are sharded on.

    Its gradient with respect to a weight is that of the sum over the weight's own part: the same number goes into every
    process, and comes back from each to its part, without another process in between.

    Args:
        op: named by the errors.
        weights: DTensors, sharded or replicated, and ordinary tensors, which every process has whole.
        run: the sum over the parts of the weights with these indices, a 0-dim tensor.

    Raises:
        ValueError: a DTensor that is a sum still to be made (Partial).
    """
    found: dict[Any, dict[tuple[int, ...], list[int]]] = {}
    for index, weight in enumerate(weights):
        mesh, sharded = _place(op, weight)
        found.setdefault(mesh, {}).setdefault(sharded, []).append(index)
    value: Tensor | None = None
    for mesh, members in found.items():
        dims = sorted({dim for sharded in members for dim in sharded})
        copies = [math.prod(mesh.size(dim) for dim in dims if dim not in sharded) for sharded in members]
        own = [run(indices) for indices in members.values()]
        if dims:
            groups = [mesh.get_group(dim) for dim in dims]
            own = [_Total.apply(mesh.device_type, groups, copies, *own)]
        for each in own:
            value = each if value is None else value + each
    assert value is not None
    return value


def _place(op: str, weight: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a weight and the dimensions of the mesh that it is sharded on; None and () of an ordinary tensor."""
    if not checks.is_distributed(weight):
        return None, ()
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{op}: expected weights that are sharded or replicated, got {checks.describe(weight)} with {placements}, "
            "a sum that is still to be made; redistribute it to Replicate() first"
        )
    return mesh, tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())


class _Total(torch.autograd.Function):
    """The sum over processes of numbers of which each has a part; of what several processes have in common (``copies``)
    each counts its share. Every process gets the same gradient for the sum, and keeps it for what it has of it: added
    up again it would count once a process.
    """

    @staticmethod
    def forward(device_type: str, groups: list[Any], copies: list[int], *own: Tensor) -> Tensor:
        made = sum(each.detach() / count for each, count in zip(own, copies, strict=True))
        total = made.to(device_type, copy=True)  # type: ignore[union-attr]
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        return total.to(own[0].device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.told = inputs[:3]

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple:
        return None, None, None, *[incoming[0]] * len(ctx.told[2])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Total.apply(*ctx.told, *tangents[3:])


def gradient(weight: Tensor) -> Tensor:
    """What this process has of ``weight.grad``, to add to it in place; made, or laid out as the weight, where it is
    not."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    elif weight.grad.placements != weight.placements:  # type: ignore[attr-defined]
        weight.grad = weight.grad.redistribute(weight.device_mesh, weight.placements)  # type: ignore[attr-defined]
    return part(weight.grad)
