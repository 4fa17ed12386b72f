"""The ``torch.ops.trtkern`` namespace: private ops that the public functions call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trtkern.ops import _check

LIBRARY = torch.library.Library("trtkern", "DEF")


def define(schema: str, run: Callable, fake: Callable) -> None:
    """Register a private op: its schema, what runs it on every device, and what predicts its outputs."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"trtkern::{name}", fake, lib=LIBRARY)


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow: something is kept for it then, and a Function stands around the op.

    Never in a recorded program: it runs without Python, where no Function is.
    """
    if not torch.is_grad_enabled() or _check.recording():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def refuse_second_derivative(op: str) -> NoReturn:
    """The ``backward`` of a Function around a private backward op.

    ``torch.autograd.function.once_differentiable`` will not do: it stays silent, and returns zeros, when the incoming
    gradient itself needs no gradient.
    """
    raise RuntimeError(
        f"{op}: expected a first derivative, got a second one; fused kernels are differentiable once: "
        'pass backend="reference" to differentiate twice'
    )


def is_dual(*tensors: object) -> bool:
    """Whether one of the tensors carries a tangent, as inside ``torch.func.jvp`` or of ``forward_ad.make_dual``."""
    # What unpack_dual asks first, at a tenth of its price; should torch rename it, only the price changes.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def refuse_duals(op: str, *tensors: object) -> None:
    """Raise where one of the tensors carries a tangent: a fused op would drop it, and the derivative be 0.

    Dual tensors do not ``requires_grad``, so no Function need be around the op to refuse them.
    """
    if is_dual(*tensors):
        refuse_forward_mode(op)


def apply(function: type[torch.autograd.Function], op: str, *arguments: Any) -> Any:
    """``function.apply``, with a ``jvp`` that refuses by name: for tangents beneath a reverse mode, or of a gradient.

    torch.compile traces no Function that has a ``jvp``, and gets the bare one.
    """
    return (function if torch.compiler.is_compiling() else _refusing(function, op)).apply(*arguments)


@cache
def _refusing(function: type[torch.autograd.Function], op: str) -> Any:
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward_mode(op)

    return type(function.__name__, (function,), {"jvp": staticmethod(jvp), "__module__": function.__module__})


def refuse_forward_mode(op: str) -> NoReturn:
    """What a tangent meets at a fused op."""
    raise RuntimeError(
        f"{op}: expected no forward-mode derivative (jvp, jacfwd, dual tensors), got one; fused kernels have the "
        'reverse mode only: backend="reference" gives it'
    )


def beneath(run: Callable[..., object], *tensors: Tensor) -> None:
    """run(*tensors) on what the tensors hold beneath autograd, tangents and ``torch.func``: bookkeeping in place.

    A buffer that is written to directly would take over a tangent, and ``torch.func`` forbids it altogether.
    """
    if torch.compiler.is_compiling() or _check.recording():
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
        return _Beneath.apply(run, *tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return (None,) * len(ctx.needs_input_grad)
