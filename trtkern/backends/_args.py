"""Fills the struct of ``csrc/lif_args.h``, for the CPU and the CUDA extension alike."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trtkern import surrogates
from trtkern.backends.base import Case, LIFBackward, LIFForward, LIFGrads, LIFInputs
from trtkern.spec import RESETS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RESETS = {name: number for number, name in enumerate(RESETS)}


def address(t: Tensor | None) -> int:
    """Where the tensor's first element is; 0 for None."""
    return 0 if t is None else t.data_ptr()


def _common(extension: ModuleType, inp: LIFInputs) -> Any:
    args, spec = extension.LifArgs(), inp.spec
    args.x, args.v0, args.params = inp.x.data_ptr(), address(inp.v0), address(inp.params)
    args.T = inp.x.shape[0]
    args.N = inp.x.numel() // args.T
    if inp.params is None:
        args.scalars = inp.scalars
    else:
        args.C, args.inner = inp.params.shape[1], inp.inner
    args.dtype, args.reset = DTYPES[inp.x.dtype], _RESETS[spec.reset]
    args.alpha, args.detach = spec.alpha, spec.detach_reset
    return args


def forward(extension: ModuleType, inp: LIFInputs, out: LIFForward) -> Any:
    """The arguments of a forward launch."""
    args = _common(extension, inp)
    args.s, args.v, args.v_final = address(out.s), address(out.v), address(out.v_final)
    args.edges, args.flag = address(out.edges), address(out.flag)
    return args


def backward(extension: ModuleType, inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward) -> Any:
    """The arguments of a backward launch."""
    args = _common(extension, inp)
    args.surrogate = surrogates.BUILTIN.index(inp.spec.surrogate)
    args.edges, args.gs, args.gv, args.gv_final = address(edges), *map(address, grads)
    args.gx, args.gv0, args.gparams = out.x.data_ptr(), address(out.v0), address(out.params)
    return args


def refuses(case: Case, device: str) -> str | None:
    """What both extensions refuse: another device, a dtype that they do not hold, a surrogate that is not built in."""
    if case.device != device:
        return f"it runs on {device} tensors, not on {case.device}"
    if case.dtype not in DTYPES:
        return f"it holds float32, bfloat16 and float16, not {str(case.dtype).removeprefix('torch.')}"
    if case.spec is not None and case.spec.surrogate not in surrogates.BUILTIN:
        return f"it holds the built-in surrogates, not {case.spec.surrogate}; use triton or reference"
    return None
