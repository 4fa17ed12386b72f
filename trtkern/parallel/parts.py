"""Tensors that may lie in parts on several processes, without importing what makes them so: that takes seconds."""

from __future__ import annotations

from torch import Tensor

from trtkern.ops.checks import is_distributed


def part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process, without autograd."""
    return tensor.detach().to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that lies in parts, in every process: all of its mesh call this together. An ordinary one
    is itself."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in every process, laid out as the parameter: a DTensor with the part of this process, or
    itself where the parameter is an ordinary one.

    Raises:
        ValueError: it has another shape.
    """
    if not is_distributed(parameter):
        return tensor
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"like: expected a tensor of the shape {tuple(parameter.shape)} of the parameter, got {tuple(tensor.shape)}"
        )
    from torch.distributed.tensor import distribute_tensor

    # Each process cuts its part out of what it has; the first one's need not be sent to the others.
    held = tensor.to(parameter.device)
    return distribute_tensor(held, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]
