"""The TRT regulariser over a whole list of tensors in one launch: value and gradient in one pass.

Bytes moved per parameter: 4 read, and with gradients 4 written (fresh) or 4 read and 4 written (added in place).
A program owns a piece of one tensor. A table on the device holds for each tensor its address, its gradient's, its size
and the number of its first piece; a program finds its tensor by bisection (a handful of cached reads).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkern.kernels.launch import Launch
from trtkern.kernels.numerics import bound, fma, inline

if TYPE_CHECKING:
    from trtkern.backends.base import RegularizerSpec

BLOCK = 2048  # parameters of a piece: two 16-byte accesses for each of 256 threads
LARGEST = 3.0e38  # e^(delta t) - 1 is cut off here: beyond, its term is 0 in float32 anyway


@inline
def _piece(w, grad, slopes, timesteps, one, weight, scale, mask, GRADIENT: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Writes or adds the gradient of a piece and returns the sum of w * w * sum_t 1 / (1 + c_t (|w| + eps))."""
    if mask is None:
        x = tl.load(w)
    else:
        x = tl.load(w, mask=mask, other=0.0)
    size = tl.abs(x)
    value = tl.zeros_like(x)
    slope = tl.zeros_like(x)
    for t in range(0, bound(timesteps), bound(one)):
        # With k = 1 + c eps and r = 1 / (k + c |w|): the value is w^2 sum r, its derivative w sum r (1 + k r).
        k = tl.load(slopes + timesteps + t)
        r = 1.0 / fma(tl.load(slopes + t), size, k)
        value += r
        slope += fma(k * r, r, r)
    if GRADIENT:
        gradient = x * slope * (weight * scale)
        if ACCUMULATE:
            if mask is None:
                gradient += tl.load(grad)
            else:
                gradient += tl.load(grad, mask=mask, other=0.0)
        tl.store(grad, gradient, mask=mask)
    return tl.sum(x * x * value, 0)


def regularizer_kernel(
    tensors, slopes, partial,
    count: tl.int64, timesteps: tl.int64, weight: tl.float32, scale: tl.float32,
    GRADIENT: tl.constexpr, ACCUMULATE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[piece] = weight * sum of w^2 sum_t 1 / (1 + c_t (|w| + eps)); scale times its gradient, written or added.

    tensors [count, 4] int64: address, address of the gradient, size, first piece, which ascends from 0;
    slopes [2, timesteps] float32: c_t, then 1 + c_t * eps.
    """
    piece = tl.program_id(0)
    low = tl.cast(count, tl.int32) * 0
    high = tl.cast(count, tl.int32)
    while high - low > 1:
        middle = (low + high) // 2
        here = tl.load(tensors + middle * 4 + 3) <= piece
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    row = tensors + low * 4
    start = (piece - tl.load(row + 3)) * BLOCK
    w = tl.load(row).to(tl.pointer_type(tl.float32))
    grad = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 2)
    if ALIGNED:
        w = tl.multiple_of(w, 16)
        grad = tl.multiple_of(grad, 16)
    offsets = start + tl.arange(0, BLOCK)
    timesteps = tl.cast(timesteps, tl.int32)
    # Opaque: or LLVM unrolls the loop over time for AMD GPUs, as it does from Triton 3.8 on.
    one = tl.minimum(tl.cast(count, tl.int32), 1)
    # A full piece needs no mask, which is what makes 16-byte accesses provable whatever the tensor's size.
    if start + BLOCK <= size:
        total = _piece(w + offsets, grad + offsets, slopes, timesteps, one, weight, scale, None, GRADIENT, ACCUMULATE)
    else:
        mask = offsets < size
        total = _piece(w + offsets, grad + offsets, slopes, timesteps, one, weight, scale, mask, GRADIENT, ACCUMULATE)
    tl.store(partial + piece, total * weight)


_KERNEL = triton.jit(
    regularizer_kernel,
    do_not_specialize=("count", "timesteps"),
    do_not_specialize_on_alignment=("tensors", "slopes", "partial"),
)
_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}

_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_TABLES = 64


def regularizer_launch(
    weights: Sequence[Tensor], spec: RegularizerSpec, grads: Sequence[Tensor] | None, accumulate: bool, scale: float
) -> tuple[Launch, Tensor]:
    """The launch over all non-empty ``weights``, and the partial sums [pieces] float32 that it leaves."""
    device = weights[0].device
    rows: list[int] = []
    pieces = bits = 0
    for i, w in enumerate(weights):
        if w.numel():
            addresses = (w.data_ptr(), grads[i].data_ptr() if grads is not None else 0)
            rows += (*addresses, w.numel(), pieces)
            pieces += -(-w.numel() // BLOCK)
            bits |= addresses[0] | addresses[1]
    partial = weights[0].new_empty(pieces)
    args = (
        _table(rows, device), _slopes(spec.timesteps, spec.delta, spec.eps, device), partial,
        len(rows) // 4, spec.timesteps, spec.lam / spec.timesteps, scale,
        grads is not None, accumulate and grads is not None, bits % 16 == 0, BLOCK,
    )  # fmt: skip
    return Launch(_KERNEL, (pieces,), args, _OPTIONS), partial


def _table(rows: list[int], device: torch.device) -> Tensor:
    """rows on the device, from the last few that were made on this stream: addresses mostly repeat step after step."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _upload(rows, torch.int64, device)
    key = (*rows, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    table = _tables.get(key)
    if table is None:
        table = _tables[key] = _upload(rows, torch.int64, device)
        if len(_tables) > _TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table


_slope_tables: dict[tuple, Tensor] = {}


def _slopes(timesteps: int, delta: float, eps: float, device: torch.device) -> Tensor:
    """c_t = e^(delta t) - 1, then 1 + c_t * eps, each [timesteps]."""
    key = (timesteps, delta, eps, device)
    table = _slope_tables.get(key)
    if table is None:
        # Near 709 is the last exponent that a float takes.
        c = [min(math.expm1(min(delta * t, 700.0)), LARGEST) for t in range(timesteps)]
        table = _upload(c + [min(1.0 + ct * eps, LARGEST) for ct in c], torch.float32, device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return table
            torch.cuda.current_stream(device).synchronize()  # once: from now on any stream may read it
        _slope_tables[key] = table
    return table


def _upload(numbers: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers on the device, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype)
    if torch.cuda.is_current_stream_capturing():
        # A graph replays launches: the numbers go in as their arguments, for host memory may be gone by then.
        table = torch.empty(len(numbers), dtype=dtype, device=device)
        for i, number in enumerate(numbers):
            table[i].fill_(number)
        return table
    return torch.tensor(numbers, dtype=dtype).pin_memory().to(device, non_blocking=True)
