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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from trtkern.ops import checks
from trtkern.ops._prepared import WANT_PACKED
from trtkern.ops.checks import Number


def part(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor, with autograd, the gradient being a DTensor laid out alike; an ordinary
    tensor is itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    own: Tensor = tensor.to_local()
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
    if not isinstance(weight, DTensor):
        return None, ()
    mesh, placements = weight.device_mesh, weight.placements
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


def gradient(weight: DTensor) -> Tensor:
    """What this process has of ``weight.grad``, to add to it in place; made, or laid out as the weight, where it is
    not."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    elif isinstance(weight.grad, DTensor) and weight.grad.placements != weight.placements:
        weight.grad = weight.grad.redistribute(weight.device_mesh, weight.placements)
    return part(weight.grad)


def neuron(
    op: str, x: DTensor, state: Tensor | None, values: dict[str, Number], states: int, channel_dim: int, want: int,
    lengths: Tensor | None, run: Callable[..., Any],
) -> Any:  # fmt: skip
    """Neurons over an x that is cut along an axis of theirs: each process runs those that it has, and what they give is
    cut as x is. A neuron needs no other one, so nobody is asked for anything.

    What is given as an ordinary tensor is the same in every process, and each takes its part of it. The gradient of a
    parameter is summed over the processes that have neurons of their own.

    Args:
        op: named by the errors.
        x: [T, ...]; whole along time, and cut or replicated along the other axes.
        state, values, channel_dim, want, lengths: as ``trtkern.ops.lif.neuron`` takes them.
        states: of the neuron.
        run: that op on ordinary tensors, run(x, state, values, lengths).

    Raises:
        ValueError: x is cut along time, or a sum that is still to be made; packed spikes are wanted.
    """
    mesh, placements = x.device_mesh, x.placements
    if any(not (p.is_replicate() or isinstance(p, Shard)) or p.is_shard(0) for p in placements):
        raise ValueError(
            f"{op}: expected x cut along an axis of its neurons, as ColwiseParallel(use_local_output=False) cuts what "
            f"a Linear gives, got {checks.describe(x)} with {placements}: a step needs the one before, and all of its "
            "input; x.redistribute(placements=[...]) lays it out otherwise"
        )
    if want & WANT_PACKED:
        raise ValueError(
            f"{op}: expected dense spikes of {checks.describe(x)}, got packed=True; the layers that take packed spikes "
            "take ordinary tensors: construct the neuron with packed=False"
        )
    axis = checks.channel_axis(op, values, channel_dim, x)
    shared = [_cut(placement, -1, 0) for placement in placements]
    by_channel = [_cut(placement, axis, 0) for placement in placements]
    own = {
        name: _own(value, mesh, by_channel if value.numel() > 1 else shared, placements)
        if isinstance(value, Tensor)
        else value
        for name, value in values.items()
    }
    dropped = 1 if states == 1 else 0  # the axis of time, in whose place several states have theirs
    one_step = [Shard(p.dim - dropped) if isinstance(p, Shard) else p for p in placements]
    if state is not None:
        state = _own(state, mesh, one_step, one_step)
    if lengths is not None:
        lengths = _own(lengths, mesh, [_cut(placement, 1, 0) for placement in placements], placements)
    out = run(part(x), state, own, lengths)

    def whole(name: str, tensor: Tensor) -> Tensor:
        shape, laid = x.shape, list(placements)
        if name == "state":
            shape, laid = torch.Size((states,) * (1 - dropped) + tuple(x.shape[1:])), one_step
        return DTensor.from_local(tensor, mesh, laid, run_check=False, shape=shape, stride=_strides(shape, tensor))

    return out._replace(**{name: whole(name, tensor) for name, tensor in out._asdict().items() if tensor is not None})


def _cut(placement: Placement, axis: int | None, place: int) -> Placement:
    """How a tensor lies whose axis ``place`` is the axis of x, where x lies so."""
    return Shard(place) if placement.is_shard(axis) and axis is not None else Replicate()


def _own(tensor: Tensor, mesh: Any, cut: Sequence[Placement], placements: Sequence[Placement]) -> Tensor:
    """The part of this process of a tensor that lies as ``cut`` says, with autograd; an ordinary one is whole so far.

    Its gradient is that of the neurons that are here. Over processes with other neurons, which x's placements tell, it
    is summed.
    """
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    grads = [
        Partial() if laid.is_replicate() and not placement.is_replicate() else laid
        for laid, placement in zip(cut, placements, strict=True)
    ]
    own: Tensor = tensor.redistribute(mesh, cut).to_local(grad_placements=grads)
    return own


def _strides(shape: torch.Size, own: Tensor) -> tuple[int, ...]:
    """Those of a dense tensor of that shape, with its axes in memory as they are in a part of it."""
    made, step = [0] * len(shape), 1
    for axis in sorted(range(len(shape)), key=lambda axis: (own.stride(axis), -axis)):
        made[axis] = step
        step *= shape[axis]
    return tuple(made)
