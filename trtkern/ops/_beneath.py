"""Beneath ``torch.func``: what a tensor is there, and how to look at it or write to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trtkern._torch import recording


def transformed() -> bool:
    """Whether a transform of ``torch.func``, or ``torch.vmap``, is active: tensors may then be more than they say."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_mapped(*tensors: Tensor | None) -> bool:
    """Whether ``torch.vmap`` maps over an axis of one of the tensors, which does not show in its shape."""
    return bool(_beneath_vmap(*tensors))


def requires_grad(tensor: Tensor) -> bool:
    """``tensor.requires_grad``, also where ``torch.vmap`` hides it."""
    return tensor.requires_grad or any(_beneath_vmap(tensor))


def _beneath_vmap(*tensors: Tensor | None) -> list[bool]:
    """For each ``torch.vmap`` over one of the tensors, whether any needs a gradient beneath it."""
    found: list[bool] = []
    if transformed():
        _Asked.apply(found.append, *(t for t in tensors if t is not None))
    return found


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of the tensors carries a tangent, also where ``torch.vmap`` hides it."""
    found: list[bool] = []
    _Pushed.apply(found.append, *tensors)
    return bool(found)


class _Pushed(torch.autograd.Function):
    @staticmethod
    def forward(tell: Callable[[bool], None], *tensors: Tensor) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.tell = inputs[0]
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, tell: Callable[[bool], None], *tensors: Tensor) -> tuple[Tensor, None]:
        return _Pushed.apply(tell, *tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        ctx.tell(True)


class _Asked(torch.autograd.Function):
    @staticmethod
    def forward(tell: Callable[[bool], None], *tensors: Tensor) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, tell: Callable[[bool], None], *tensors: Tensor) -> tuple[Tensor, None]:
        tell(any(t.requires_grad for t in tensors))
        return _Asked.apply(tell, *tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        return None


def look(run: Callable[..., object], *tensors: Tensor) -> None:
    """run(*tensors), which looks at values and raises where they are wrong: at those of every mapped sample."""
    if transformed():
        beneath(run, *tensors)
    else:
        run(*tensors)


def beneath(run: Callable[..., object], *tensors: Tensor) -> None:
    """run(*tensors) on what the tensors hold beneath autograd, tangents and ``torch.func``: bookkeeping in place.

    A buffer that is written to directly would take over a tangent, and ``torch.func`` forbids it altogether. Axes that
    ``torch.vmap`` maps over come first; a tensor that is not mapped has 1 there.
    """
    if torch.compiler.is_compiling() or recording():
        with torch.no_grad():
            run(*(t.detach() for t in tensors))
    else:
        _Beneath.apply(run, *tensors)


class _Beneath(torch.autograd.Function):
    @staticmethod
    def forward(run: Callable[..., object], *tensors: Tensor) -> Tensor:
        run(*tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, run: Callable[..., object], *tensors: Tensor) -> tuple[Tensor, None]:
        moved = (t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[1:], strict=True))
        return _Beneath.apply(run, *moved), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return (None,) * len(ctx.needs_input_grad)
