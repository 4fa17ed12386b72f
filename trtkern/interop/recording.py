"""A model as a program that torch.export records, for inputs of other lengths and batch sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from trtkern.ops import checks

TIME, BATCH = "time", "batch"
"""The names of the sizes that may change."""


def record(
    model: nn.Module,
    example: Tensor,
    *,
    time_dim: int | None = 0,
    batch_dim: int | None = 1,
    dynamic_time: bool = True,
) -> ExportedProgram:
    """What ``torch.export.export`` records of a model, with axes of any size; for inference.

    Each fused operator is one node of it. Whoever loads it imports ``trtkern`` first; ``decompose`` makes operators of
    torch of those nodes.

    Args:
        model: in evaluation (``model.eval()``); it takes a tensor, and gives tensors.
        example: an input, such as [T, B, C, H, W]. Its values do not matter.
        time_dim: the axis of the example that is time; None: it has none, as an image [B, C, H, W] that the model
            shows T times.
        batch_dim: the axis of the batch, which may have any size of 1 and more; None: it has that of the example.
        dynamic_time: T may be any, too; else it is the example's.

    Raises:
        TypeError: no module, or no tensor.
        ValueError: a model in training, or axes that the example has not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"record: expected a torch.nn.Module, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("record: expected a model in evaluation, got one in training; call model.eval() first")
    if not isinstance(example, Tensor):
        raise TypeError(f"record: expected an example as a tensor, got {checks.describe(example)}")
    axes: dict[int, str] = {}
    for name, dim in ((TIME, time_dim), (BATCH, batch_dim)):
        if dim is None:
            continue
        axis = checks.axis("record", f"{name}_dim", dim, example)
        if axis in axes:
            raise ValueError(f"record: expected batch_dim to differ from time_dim, got {dim} for both")
        axes[axis] = name
    dynamic = {axis: Dim(name) for axis, name in axes.items() if name == BATCH or dynamic_time}
    for axis in dynamic:
        if example.shape[axis] == 1:  # torch would take it for a promise
            example = torch.cat([example, example], axis)
    with torch.no_grad():
        return export(model, (example,), dynamic_shapes=(dynamic,), strict=False)
