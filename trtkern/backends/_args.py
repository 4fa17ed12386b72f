"""Fills the struct of ``csrc/lif/fields.h`` by name, for the CPU and the CUDA extension alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trtkern import dialect, neurons, surrogates
from trtkern.backends.base import (
    Case,
    Finish,
    Finished,
    LIFBackward,
    LIFForward,
    LIFGrads,
    LIFInputs,
    NormGrads,
    RecurrentInputs,
)
from trtkern.spec import RESETS, LIFSpec

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NUMBERS = {**DTYPES, torch.float64: 3}
"""The types that the parameters of a norm may be of."""
MOST_PARAMS = max(len(row.params) for row in neurons.TABLE.values())
"""Of any neuron; ``csrc/lif/args.h`` has the same number (a test compares them)."""
_NEURONS = {name: number for number, name in enumerate(neurons.TABLE)}
_RESETS = {name: number for number, name in enumerate(RESETS)}


def stale(extension: ModuleType) -> str | None:
    """Why an extension may not be used that was built from other tables of neurons and surrogates, or None: it would
    compute what stood there then, or nothing for what it does not know."""
    mark = getattr(extension, "TABLES", None)
    if mark is not None and f'"{mark}"' in dialect.headers()["tables"]:
        return None
    return (
        f"{extension.__name__} was built from other neurons and surrogates than trtkern/neurons.py and "
        "trtkern/surrogates.py have; install trtkern again (in a checkout: python setup.py build_ext --inplace)"
    )


def _sizes(extension: ModuleType, inp: LIFInputs) -> Any:
    """The arguments that are no addresses."""
    x, _, params, scalars, spec, inner, norm, pool, *_ = inp
    args, T, vector = extension.LifArgs(), x.shape[0], params if norm is None else norm.affine
    args.T, args.N = T, x.numel() // T
    args.C, args.inner = (1, 1) if vector is None else (vector.shape[1], inner)
    args.x_stride = x.stride(0) if T > 1 else args.N
    if params is None:
        args.scalars = (*scalars, *[0.0] * (MOST_PARAMS - len(scalars)))
    if pool is not None:
        args.pool_row, args.pool_side = pool
    args.dtype, args.reset = DTYPES[x.dtype], _RESETS[spec.reset]
    args.alpha, args.detach = spec.alpha, spec.detach_reset
    args.neuron, args.surrogate = _numbers(extension, spec)
    args.P = len(spec.row.params)
    return args


def _numbers(extension: ModuleType, spec: LIFSpec) -> tuple[int, int]:
    """How the extension calls neuron and surrogate."""
    if not spec.builtin:
        return import_module("trtkern.backends._compiled").numbers(extension, spec)
    return _NEURONS[spec.neuron], surrogates.BUILTIN.index(str(spec.surrogate))


def fixed(extension: ModuleType, inp: LIFInputs) -> Any:
    """The arguments of launches in both directions that are no addresses, for one that takes those itself."""
    args = _sizes(extension, inp)
    args.before = inp.before
    return args


def _at(extension: ModuleType, inp: LIFInputs, before: bool, *others: Tensor | None) -> Any:
    """The arguments of a launch with the addresses of its tensors, ``others`` being those that one direction alone has,
    in the order of ``csrc/lif/fields.h``. What is no address is made once for all calls of the kind."""
    x, v0, params, _, _, _, norm, _, _, held, lengths = inp
    fixed = None if held is None else held.get("args")
    if fixed is None:
        fixed = _sizes(extension, inp)
        if held is not None:
            held["args"] = fixed
    affine, residual = (None, None) if norm is None else norm
    args = fixed.at((x, v0, params, affine, residual, *others))
    if before:
        args.before = True
    if lengths is not None:
        args.lengths, args.sample = lengths.data_ptr(), args.N // lengths.numel()
    return args


def forward(extension: ModuleType, inp: LIFInputs, out: LIFForward) -> Any:
    """The arguments of a forward launch."""
    s, v, v_final, edges, flag, packed = out
    return _at(extension, inp, inp.before and v is not None, s, v, v_final, edges, packed, flag)


def backward(extension: ModuleType, inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward) -> Any:
    """The arguments of a backward launch."""
    before = inp.before and grads.v is not None
    return _at(extension, inp, before, None, None, None, edges, None, None, *grads, *out)


def recurrent(
    extension: ModuleType, inp: RecurrentInputs, current: Tensor | None, fill: Callable[..., Any], *others: Any
) -> Any:
    """What ``fill`` (``forward``, ``backward``) makes for neurons that feed each other: the current is their x."""
    x = inp.x if current is None else current
    given = LIFInputs(x, inp.v0, inp.params, inp.scalars, inp.spec, 1, before=inp.before)
    args = fill(extension, given, *others)
    if current is None:
        args.x = 0
    return args


def sequence(extension: ModuleType, x: Tensor, channels: int = 1, inner: int = 1) -> Any:
    """The arguments of a launch that runs no neuron: those of x [T, ...] and its channels."""
    T = x.shape[0]
    return _sequence(extension, x.dtype, T, x.numel() // T, x.stride(0), channels, inner).at((x,))


@lru_cache(maxsize=1024)
def _sequence(extension: ModuleType, dtype: torch.dtype, T: int, N: int, stride: int, C: int, inner: int) -> Any:
    args = extension.LifArgs()
    args.T, args.N, args.C, args.inner, args.dtype = T, N, C, inner, DTYPES[dtype]
    args.x_stride = stride if T > 1 else N
    return args


@lru_cache(maxsize=1024)
def _norm(
    extension: ModuleType, C: int, count: int, kind: torch.dtype, running: torch.dtype = torch.float32,
    source: torch.dtype = torch.float64, eps: float = 0.0, momentum: float | None = 0.0,
) -> Any:  # fmt: skip
    """The arguments of what stands between the passes of a norm that are no addresses."""
    args = extension.NormArgs()
    args.C, args.count, args.eps, args.momentum = C, count, eps, -1.0 if momentum is None else momentum
    args.type, args.running, args.source = NUMBERS[kind], NUMBERS[running], NUMBERS[source]
    return args


def _of(weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    """The type of both; one of them alone may be there."""
    there = bias if weight is None else weight
    return torch.float32 if there is None else there.dtype


def finish(
    extension: ModuleType, norm: Finish, out: Finished, mean: Tensor | None = None, spread: Tensor | None = None
) -> Any:
    """The arguments of what finishes statistics; ``mean``, ``spread``: where they are known, the spread a variance."""
    source = torch.float64 if mean is None else mean.dtype
    tensors = (mean, spread, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.batches, *out)
    return fixed_finish(extension, norm, out.affine.shape[1], source).at(tensors)


def fixed_finish(extension: ModuleType, norm: Finish, channels: int, source: torch.dtype) -> Any:
    """Those of them that are no addresses; ``source``: in what the statistics come."""
    running = torch.float32 if norm.running_mean is None else norm.running_mean.dtype
    kind = _of(norm.weight, norm.bias)
    return _norm(extension, channels, norm.samples, kind, running, source, norm.eps, norm.momentum)


def fixed_norm_grads(extension: ModuleType, norm: Finish, channels: int) -> Any:
    """Those of ``norm_grads`` that are no addresses."""
    return _norm(extension, channels, norm.samples, _of(norm.weight, norm.bias))


def norm_grads(extension: ModuleType, out: NormGrads, sums: Tensor, own: Tensor | None = None) -> Any:
    """The arguments of what finishes the sums of a norm; ``own``: those of this process, where others have theirs."""
    fixed = _norm(extension, out.affine.shape[1], out.samples, _of(out.weight, out.bias))
    nothing = (None,) * 7  # which finishes statistics
    return fixed.at((*nothing, out.affine, out.moments, out.coef, sums, own, out.weight, out.bias))


def refuses(case: Case, device: str) -> str | None:
    """What both extensions refuse: another device, a dtype that they do not hold."""
    if case.device != device:
        return f"it runs on {device} tensors, not on {case.device}"
    if case.dtype not in DTYPES:
        return f"it holds float32, bfloat16 and float16, not {str(case.dtype).removeprefix('torch.')}"
    return None
