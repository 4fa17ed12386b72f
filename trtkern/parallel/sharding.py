"""A model in parts: FSDP2 (``torch.distributed.fsdp.fully_shard``) on a spiking network, and tensors whole again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trtkern.nn._leaf import Leaf

__all__ = ["blocks_of", "shard"]

OP = "shard"
"""What the errors name."""


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    policy: MixedPrecisionPolicy | None = None,
    blocks: Iterable[nn.Module] | None = None,
    reshard: bool = True,
) -> nn.Module:
    """FSDP2 on a model: each process keeps a part of every parameter, of its gradient and of what the optimiser keeps.

    A block's parameters are gathered before it runs, forward and backward, and its gradients are averaged and scattered
    behind it. All processes start with the model of the first one of the mesh. Parameters of no axis, as ``PLIF`` and
    every learned number of a neuron has one, cannot be cut: each process has them whole, and one all-reduce at the end
    of each backward pass averages the gradients of all of them. Buffers, such as running statistics, stay those of the
    process.

    Args:
        model: changed, and returned; on the device of this process.
        mesh: of one dimension (None: all processes), or of two, over the first of which the parts are the same (HSDP).
        policy: the dtypes to compute and to reduce in; None: those of the parameters.
        blocks: the modules of the model whose parameters are gathered together; None: ``blocks_of(model)``. What is in
            none of them is gathered with the model itself, and so is a block that has a weight in common with modules
            that are not in it: one weight has one place.
        reshard: let go of a block's parameters behind its forward pass, and gather them again for its backward pass.
            With False they stay from then on: the links carry a third less, and the memory of all weights is taken.
            A penalty on the weights is then computed on them whole, by each process, and in the dtype of the policy.

    Raises:
        RuntimeError: no process group, or a process that is not in the mesh.
        TypeError, ValueError: a mesh of another kind, a model that is parallel already, a block that is not in it, a
            parameter on another device.
    """
    mesh = _mesh(model, mesh)
    _expect_fit(model, mesh)
    chosen = list(_apart(model, blocks_of(model) if blocks is None else _within(model, blocks)))
    scalars = [parameter for parameter in model.parameters() if parameter.dim() == 0]
    _equal(model, mesh)
    told: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy() if policy is None else policy,
        "reshard_after_forward": reshard,
        "ignored_params": set(scalars),
    }
    order = {id(module): number for number, module in enumerate(model.modules())}
    # From the inside out: a module takes what those in it have left.
    for module in sorted(chosen, key=lambda module: -order[id(module)]):
        if module is not model:
            fully_shard(module, **told)
    fully_shard(model, **told)
    if learned := [parameter for parameter in scalars if parameter.requires_grad]:
        _Averaged(learned, mesh)
    return model


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters ``shard`` gathers together: of each outermost ``Sequential`` or ``ModuleList``, the
    children that hold a weight of two axes or more. Norms and neurons that stand alone go with the model itself: a
    collective of their own would be all latency. So does what is in no such container.

    Args:
        model: any module.
    """
    if isinstance(model, (nn.Sequential, nn.ModuleList)):
        yield from (child for child in model if any(parameter.dim() > 1 for parameter in child.parameters()))
    elif not isinstance(model, Leaf):  # which reads the parameters of what is in it
        for child in model.children():
            yield from blocks_of(child)


def _mesh(model: nn.Module, mesh: DeviceMesh | None) -> DeviceMesh:
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            f"{OP}: expected a process group, got none; start the processes with torchrun, and call "
            "torch.distributed.init_process_group first"
        )
    if mesh is None:
        first = next(model.parameters(), None)
        if first is None:
            raise ValueError(f"{OP}: expected a model with parameters, got {type(model).__name__} without any")
        return init_device_mesh(first.device.type, (distributed.get_world_size(),))
    if not isinstance(mesh, DeviceMesh) or mesh.ndim not in (1, 2):
        raise TypeError(f"{OP}: expected a DeviceMesh of one or two dimensions, or None, got {mesh!r}")
    return mesh


def _expect_fit(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise where the mesh and the model do not go together; of the mesh, in every process at once."""
    outside = torch.tensor(float(mesh.get_coordinate() is None), device=mesh.device_type)
    distributed.all_reduce(outside)
    if outside.item():
        raise RuntimeError(
            f"{OP}: expected a mesh with all {distributed.get_world_size()} processes, got one of {mesh.size()} that "
            f"{int(outside.item())} are not in; make it with torch.distributed.device_mesh.init_device_mesh"
        )
    if any(isinstance(module, (FSDPModule, DistributedDataParallel)) for module in model.modules()):
        raise ValueError(
            f"{OP}: expected a model that is not parallel yet, got {type(model).__name__} with FSDP or DDP in it; "
            "shard it once, and without DDP"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type != mesh.device_type:
            raise ValueError(
                f"{OP}: expected parameters on {mesh.device_type}, as the mesh says, got {name!r} on "
                f"{parameter.device}; move the model first, with model.to({mesh.device_type!r}), or to_empty() from "
                "meta and its values"
            )


def _within(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The blocks, when each was looked at."""
    leaves = [layer for layer in model.modules() if isinstance(layer, Leaf)]
    around = {part: layer for layer in leaves for part in layer.modules() if part is not layer}
    own = set(model.modules())
    for block in blocks:
        if block not in own:
            raise ValueError(
                f"{OP}: expected blocks to be modules of the model, got {block!r} that is not in it; take them from "
                "model.modules()"
            )
        if block in around:
            layer = type(around[block]).__name__
            raise ValueError(
                f"{OP}: expected blocks that are whole layers, got {type(block).__name__} inside of a {layer}, which "
                f"reads the parameters of its parts itself; take the {layer}"
            )
        yield block


def _apart(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The blocks that have their parameters for themselves."""
    holders: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, set()).add(module)
    for block in blocks:
        inside = set(block.modules())
        if all(holders[parameter] <= inside for parameter in block.parameters()):
            yield block


@torch.no_grad()
def _equal(model: nn.Module, mesh: DeviceMesh) -> None:
    """The parameters and buffers of the first process of the mesh, in all of it and laid out as FSDP2 takes them: one
    broadcast for each dimension of the mesh."""
    held = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in _tensors(model)]
    sent = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in held]).to(mesh.device_type)
    for group in mesh.get_all_groups():
        distributed.broadcast(sent, group=group, group_src=0)
    for tensor, values in zip(held, sent.split([tensor.nbytes for tensor in held]), strict=True):
        tensor.copy_(values.clone().view(tensor.dtype).view(tensor.shape))
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            # FSDP2 takes no weights in channels last. What a convolution gives has its input's layout all the same.
            parameter.data = parameter.data.contiguous()


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from (parameter.detach() for parameter in model.parameters())
    yield from model.buffers()


class _Averaged:
    """Parameters that every process has whole: one all-reduce at the end of each backward pass, of as many numbers as
    there are parameters, makes the gradients of all of them their averages over the processes.

    It averages what ``.grad`` holds, gradients of earlier passes too: those are averages already, and stay what they
    are. So it makes no difference whether a pass is one of several that are accumulated.
    """

    def __init__(self, parameters: list[nn.Parameter], mesh: DeviceMesh) -> None:
        self.parameters, self.mesh, self.asked = parameters, mesh, -1
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._came)

    def _came(self, parameter: Tensor) -> None:
        """A gradient: with the first one of a backward pass, ask to be called behind it."""
        backward = torch._C._current_graph_task_id()
        if self.asked != backward:
            self.asked = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        total = torch.stack(
            [grad.to(self.mesh.device_type, torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
        )
        for group in self.mesh.get_all_groups():
            distributed.all_reduce(total, group=group)
        for grad, mean in zip(grads, (total / self.mesh.size()).unbind(), strict=True):
            grad.copy_(mean)
