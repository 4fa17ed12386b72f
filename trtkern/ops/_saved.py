"""What a Function keeps for its backward pass, and how it gets it back: in the memory layout that it had.

A hook for saved tensors may return another one: ``torch.autograd.graph.save_on_cpu(pin_memory=True)`` and most wrappers
that offload return a contiguous copy. Kernels index memory, so the strides belong to what is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern.ops import checks
from trtkern.ops.layout import aligned


class Layout(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def restore(self, tensor: Tensor) -> Tensor:
        """``tensor`` in this layout: itself where it has it already, else a copy."""
        if tensor.shape != self.shape or tensor.device != self.device:
            raise RuntimeError(
                f"expected a hook for saved tensors to return a tensor of shape {tuple(self.shape)} on {self.device}, "
                f"got {checks.describe(tensor)}"
            )
        # What is expanded (a static input) is laid out once and expanded again.
        once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in self.stride)]
        return aligned(once, once.shape, self.stride, self.dtype, once).expand(self.shape)


def keep(ctx: Any, *tensors: Tensor | None, held: dict[str, Any] | None = None) -> None:
    """``ctx.save_for_backward``, and with it the layout of each tensor.

    ``held``: what calls share whose tensors have the same layouts, which are then asked for once.
    """
    if not torch.compiler.is_compiling():  # which would hold T and the batch to those of the first call
        ctx.layouts = layouts(tensors) if held is None else held.get("layouts")
        if ctx.layouts is None and held is not None:
            ctx.layouts = held["layouts"] = layouts(tensors)
    ctx.save_for_backward(*tensors)


def layouts(tensors: Iterable[Tensor | None]) -> list[Any]:
    """How they lie in memory, as ``kept`` compares it with what comes back."""
    return [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def kept(ctx: Any) -> tuple[Any, ...]:
    """``ctx.saved_tensors`` as they were; in compiled code, whose layouts the compiler settles, as they come."""
    return ctx.saved_tensors if torch.compiler.is_compiling() else restored(ctx.saved_tensors, ctx.layouts)


def restored(found: tuple[Any, ...], before: list[Any]) -> tuple[Any, ...]:
    """Tensors that were saved, in the layouts that they had (``layouts``)."""
    now = layouts(found)
    if now == before:
        return found
    return tuple(
        Layout(*then).restore(t) if then is not None and then != other else t
        for t, then, other in zip(found, before, now, strict=True)
    )
