"""Backward passes of the first t outputs over a graph of all T steps, without the work for the steps after t.

The gradient of what a network gives in its first t steps is zero at every later one. Autograd does not know, and takes
those zeros through every layer. Layers that are recorded here look for them first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trtkern.ops import _first_rows
from trtkern.ops._first_rows import FirstRows
from trtkern.ops.layout import is_dense

Back = Callable[[Tensor], Tensor]
"""The gradient of the first rows of what a layer reads, from that of what it gives."""


class FirstSteps(FirstRows, TorchFunctionMode):
    """Inside, convolutions, linear layers and evaluating BatchNorms whose weights ask for no gradient are recorded as
    functions whose backward pass takes no zeros through them, and so are the neurons. Forward they are as ever.

    Nothing is taken on trust: rows are left out where their gradient is zero, so results are those of autograd whatever
    the rows of a network stand for. A gradient that a backward pass gives is written over by the next one.
    """

    def __enter__(self) -> Self:
        super().__enter__()
        self._before, _first_rows.recording = _first_rows.recording, self
        return self

    def __exit__(self, *error: object) -> None:
        _first_rows.recording = self._before
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        make = _BACK.get(func)
        if make is None or not torch.is_grad_enabled() or "input" in kwargs or not args[0].requires_grad:
            return func(*args, **kwargs)
        others = (value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor))
        if any(other.requires_grad for other in others) or (back := make(*args, **kwargs)) is None:
            return func(*args, **kwargs)
        return _Linear.apply(args[0], lambda x: func(x, *args[1:], **kwargs), back, self)


class _Linear(torch.autograd.Function):
    """``run``, a function whose gradient ``back`` finds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], back: Back, first: FirstSteps) -> Tensor:
        ctx.back, ctx.first = back, first
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        few = ctx.first.few(g)
        found = ctx.back(g[:few])
        if few < len(g):
            room = ctx.first.room(ctx, lambda: _longer(found, len(g)))
            room.rows(few).copy_(found)
            found = room.whole
        return found, None, None, None


def _longer(rows: Tensor, count: int) -> Tensor:
    """Room for ``count`` rows like these."""
    rows = rows if is_dense(rows) else rows.contiguous()
    # Of one row the stride says nothing.
    return rows.new_empty_strided((count, *rows.shape[1:]), (rows[0].numel(), *rows.stride()[1:]))


def _convolution(axes: int) -> Callable[..., Back | None]:
    def make(
        input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Back | None:  # fmt: skip
        if isinstance(padding, str) or input.dim() != axes + 2:
            return None
        shape, strides = input.shape[1:], input.stride()
        told = [[each] * axes if isinstance(each, int) else list(each) for each in (stride, padding, dilation)]

        def back(g: Tensor) -> Tensor:
            # In the layout of what was convolved, which is not read: torch chooses by it how to compute.
            like = g.new_empty_strided((len(g), *shape), strides)
            needs = (True, False, False)
            return torch.ops.aten.convolution_backward(
                g, like, weight, None, *told, False, [0] * axes, groups, needs
            )[0]  # fmt: skip

        return back

    return make


def _product(input: Tensor, weight: Tensor, bias: Any = None) -> Back | None:
    return (lambda g: g.matmul(weight)) if input.dim() > 1 else None


def _norm(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Back | None:  # fmt: skip
    if training or running_var is None:
        return None
    scale = (running_var + eps).rsqrt() if weight is None else (running_var + eps).rsqrt() * weight
    scale = scale.view(-1, *[1] * (input.dim() - 2))
    return lambda g: g * scale


_BACK: dict[Any, Callable[..., Back | None]] = {
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
    F.linear: _product,
    F.batch_norm: _norm,
}
