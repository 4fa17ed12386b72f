"""A model in parts of several processes."""

from __future__ import annotations

import sys

from torch import Tensor, nn


def full(tensor: Tensor) -> Tensor:
    """The whole tensor of one whose parts lie on several processes, all of which ask for it; any other is itself."""
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, laid out over the processes as the parameter is."""
    if not sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    held = value.to(parameter.device)
    return distribute_tensor(held, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def sharded(tensor: object) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard(model: nn.Module, mesh=None, *, policy=None) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    scalars = {p for p in model.parameters() if p.dim() == 0}
    for child in model.modules():
        if isinstance(child, nn.ModuleList):
            for block in child:
                if any(True for _ in block.parameters()):
                    fully_shard(block, ignored_params=scalars)
    return fully_shard(model, ignored_params=scalars)
