"""The ``torch.ops.trtkern`` namespace: private ops that the public functions call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trtkern._torch import recording
from trtkern.ops._beneath import is_mapped

LIBRARY = torch.library.Library("trtkern", "DEF")


def define(schema: str, run: Callable, fake: Callable, mapped: Callable | None) -> None:
    """Register a private op: its schema, what runs it on every device, what predicts its outputs, and the op of all
    samples that ``torch.vmap`` maps over (``torch.library.register_vmap``); None: its caller refuses those."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"trtkern::{name}", fake, lib=LIBRARY)
    if mapped is not None:
        torch.library.register_vmap(f"trtkern::{name}", mapped, lib=LIBRARY)


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow: something is kept for it then, and a Function stands around the op.

    Never in a recorded program: it runs without Python, where no Function is.
    """
    if not torch.is_grad_enabled() or recording():
        return False
    if any(t is not None and t.requires_grad for t in tensors):
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        # Dynamo takes every tensor in there for one that needs no gradient, and the gradient for 0.
        raise RuntimeError(
            "a fused op: expected torch.func outside of what torch.compile compiles, got one of its transforms inside; "
            "call torch.func.grad, torch.vmap and the like without torch.compile around them"
        )
    # Beneath torch.vmap a tensor may need a gradient and not say so.
    return True


def refuse_mapped(op: str, what: str, instead: str, *tensors: Tensor | None) -> None:
    """Raise where ``torch.vmap`` maps over one of the tensors."""
    if is_mapped(*tensors):
        raise RuntimeError(f"{op}: expected no torch.vmap over {what}, got one; {instead}")


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
    """``function.apply``, also beneath ``torch.vmap``, and with a ``jvp`` that refuses by name: for tangents beneath a
    reverse mode, or of a gradient.

    torch.compile traces no Function that has a ``jvp``, and gets the bare one.
    """
    return (function if torch.compiler.is_compiling() else _refusing(function, op)).apply(*arguments)


@cache
def _refusing(function: type[torch.autograd.Function], op: str) -> Any:
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_forward_mode(op)

    # torch.vmap runs the methods of the Function on what it maps; the private ops know what that means.
    names = {"jvp": staticmethod(jvp), "generate_vmap_rule": True, "__module__": function.__module__}
    return type(function.__name__, (function,), names)


def refuse_forward_mode(op: str) -> NoReturn:
    """What a tangent meets at a fused op."""
    raise RuntimeError(
        f"{op}: expected no forward-mode derivative (jvp, jacfwd, dual tensors), got one; fused kernels have the "
        'reverse mode only: backend="reference" gives it'
    )
