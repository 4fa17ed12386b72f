"""The ``torch.ops.trtkern`` namespace: private ops that the public functions call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

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
