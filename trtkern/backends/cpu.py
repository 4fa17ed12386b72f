"""The CPU backend: ``trtkern._cpu``, C++ with OpenMP; AVX-512, AVX2 or plain vectors, chosen at run time."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from trtkern.backends import _args
from trtkern.backends.base import Backend, Case, LIFBackward, LIFForward, LIFGrads, LIFInputs, RegularizerSpec


@cache
def _extension() -> ModuleType:
    """The extension, using the instruction set that TRTKERN_CPU_ISA names (default: the best).

    Raises:
        ImportError: it was not built.
        ValueError: TRTKERN_CPU_ISA names no set that this processor runs.
    """
    extension = import_module("trtkern._cpu")  # after torch, whose OpenMP threads it then shares
    extension.use_isa(os.environ.get("TRTKERN_CPU_ISA", ""))
    return extension


@cache
def missing() -> str | None:
    """Why the extension cannot be used, or None; a ValueError if TRTKERN_CPU_ISA asks for what is not there."""
    try:
        _extension()
    except ImportError as error:
        return f"trtkern._cpu was not built or does not load ({error}); install g++ and install trtkern again"
    return None


def refuses(case: Case) -> str | None:
    """Why this backend does not take the case, or None."""
    if case.op == "regularizer" and case.device == "cpu":
        return None if case.dtype == torch.float32 else f"it takes float32 parameters, not {case.dtype}"
    return _args.refuses(case, "cpu")


def lif_forward(inp: LIFInputs, out: LIFForward) -> None:
    """Fill what ``out`` asks for."""
    extension = _extension()
    args = _args.forward(extension, inp, out)
    args.threads = torch.get_num_threads()
    extension.lif_forward(args)


def lif_backward(inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward) -> None:
    """Fill ``out``: the gradients of x and, where wanted, of v0 and of the parameters (repeatable bitwise)."""
    extension = _extension()
    args = _args.backward(extension, inp, edges, grads, out)
    args.threads = torch.get_num_threads()
    extension.lif_backward(args)


def regularizer(
    weights: list[Tensor],
    spec: RegularizerSpec,
    value: Tensor,
    grads: list[Tensor] | None,
    accumulate: bool,
    scale: float,
) -> None:
    """R(w) into ``value``; its gradient times ``scale`` written, or added, to ``grads`` in the same pass."""
    total = _extension().regularizer(
        weights=[weight.data_ptr() for weight in weights],
        sizes=[weight.numel() for weight in weights],
        grads=[] if grads is None else [grad.data_ptr() for grad in grads],
        timesteps=spec.timesteps,
        lam=spec.lam,
        delta=spec.delta,
        eps=spec.eps,
        accumulate=accumulate,
        scale=scale,
        threads=torch.get_num_threads(),
    )
    value.fill_(total)


BACKEND = Backend(
    name="cpu",
    missing=missing,
    refuses=refuses,
    ops={"lif_forward": lif_forward, "lif_backward": lif_backward, "regularizer": regularizer},
)
