"""Fills the struct of ``csrc/lif/fields.h`` by name, for the CPU and the CUDA extension alike."""

from __future__ import annotations

from array import array
from functools import lru_cache
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
    Pool,
)
from trtkern.spec import RESETS, LIFSpec

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NUMBERS = {**DTYPES, torch.float64: 3}
"""The types that the parameters of a norm may be of."""
MOST_PARAMS = max(len(row.params) for row in neurons.TABLE.values())
"""Of any neuron; ``csrc/lif/args.h`` has the same number (a test compares them)."""
_NEURONS = {name: number for number, name in enumerate(neurons.TABLE)}
_RESETS = {name: number for number, name in enumerate(RESETS)}


def address(t: Tensor | None) -> int:
    """Where the tensor's first element is; 0 for None."""
    return 0 if t is None else t.data_ptr()


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


@lru_cache(maxsize=4096)
def _fixed(
    extension: ModuleType, token: str, numbers: bytes | None, dtype: torch.dtype,
    T: int, N: int, stride: int, C: int, inner: int, pool: Pool | None,
) -> Any:  # fmt: skip
    """The arguments that are no addresses.

    Args:
        numbers: the parameters as bytes, in which 0.0 and -0.0 are two.
        stride: of x along time.
    """
    args, spec = extension.LifArgs(), LIFSpec.from_token(token)
    args.T, args.N, args.C, args.inner = T, N, C, inner
    args.x_stride = stride if T > 1 else N
    if numbers is not None:
        scalars = array("d", numbers)
        args.scalars = (*scalars, *[0.0] * (MOST_PARAMS - len(scalars)))
    if pool is not None:
        args.pool_row, args.pool_side = pool
    args.dtype, args.reset = DTYPES[dtype], _RESETS[spec.reset]
    args.alpha, args.detach = spec.alpha, spec.detach_reset
    args.neuron, args.P = _NEURONS[spec.neuron], len(spec.row.params)
    args.surrogate = surrogates.BUILTIN.index(spec.surrogate)
    return args


def _common(extension: ModuleType, inp: LIFInputs) -> Any:
    x, v0, params, scalars, spec, inner, norm, pool, _ = inp
    C, vector = 1, params if norm is None else norm.affine
    if vector is None:
        inner = 1
    else:
        C = vector.shape[1]
    numbers = None if params is not None else array("d", scalars).tobytes()
    T = x.shape[0]
    fixed = _fixed(extension, spec.token, numbers, x.dtype, T, x.numel() // T, x.stride(0), C, inner, pool)
    args = fixed.copy()
    args.x = x.data_ptr()
    if v0 is not None:
        args.v0 = v0.data_ptr()
    if params is not None:
        args.params = params.data_ptr()
    if norm is not None:
        args.affine = norm.affine.data_ptr()
        if norm.residual is not None:
            args.residual = norm.residual.data_ptr()
    return args


def _addresses(args: Any, names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> None:
    """Set those that are there."""
    for name, tensor in zip(names, tensors, strict=False):
        if tensor is not None:
            setattr(args, name, tensor.data_ptr())


_WRITTEN = ("s", "v", "v_final", "edges", "flag", "packed")
_GRADIENTS = ("gs", "gv", "gv_final", "coef")
_MADE = ("gx", "gv0", "gparams", "norm_sums")


def forward(extension: ModuleType, inp: LIFInputs, out: LIFForward) -> Any:
    """The arguments of a forward launch."""
    args = _common(extension, inp)
    _addresses(args, _WRITTEN, out)
    if inp.before and out.v is not None:
        args.before = True
    return args


def backward(extension: ModuleType, inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward) -> Any:
    """The arguments of a backward launch."""
    args = _common(extension, inp)
    if edges is not None:
        args.edges = edges.data_ptr()
    _addresses(args, _GRADIENTS, grads)
    _addresses(args, _MADE, out)
    if inp.before and grads.v is not None:
        args.before = True
    return args


def finish(extension: ModuleType, norm: Finish, out: Finished) -> Any:
    """The arguments of what finishes statistics."""
    args = extension.NormArgs()
    args.C, args.count = out.affine.shape[1], norm.samples
    args.eps, args.momentum = norm.eps, -1.0 if norm.momentum is None else norm.momentum
    if norm.weight is not None:
        args.weight, args.bias, args.type = norm.weight.data_ptr(), address(norm.bias), NUMBERS[norm.weight.dtype]
    if norm.running_mean is not None:
        args.running_mean, args.running_var = norm.running_mean.data_ptr(), address(norm.running_var)
        args.batches, args.running = address(norm.batches), NUMBERS[norm.running_mean.dtype]
    args.affine, args.moments, args.coef = map(address, out)
    return args


def norm_grads(extension: ModuleType, out: NormGrads, sums: Tensor, own: Tensor | None = None) -> Any:
    """The arguments of what finishes the sums of a norm; ``own``: those of this process, where others have theirs."""
    args = extension.NormArgs()
    args.C, args.count = out.affine.shape[1], out.samples
    args.affine, args.moments, args.coef = out.affine.data_ptr(), out.moments.data_ptr(), address(out.coef)
    args.sums, args.own = sums.data_ptr(), address(own)
    args.gweight, args.gbias = address(out.weight), address(out.bias)
    if (written := out.bias if out.weight is None else out.weight) is not None:  # one of them alone may be wanted
        args.type = NUMBERS[written.dtype]
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
