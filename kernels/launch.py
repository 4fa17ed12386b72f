"""What every launch shares: the classes that select code, block sizes, partial sums.

What is compiled depends on the options, the dtype, the chunk class and the alignment class, on nothing else: at most
one compile for each, and no tuning at run time. The tests compile ahead of time through these very functions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from trtkern.kernels import compiled
from trtkern.kernels.numerics import INTERPRETED
from trtkern.spec import CHUNK

FEWEST_COLUMNS = 1 << 17
"""Enough lanes to fill a GPU."""

_LOOSE_POINTERS = ("param_rows", "affine", "coef", "flag", "lengths", "delays")


class Launch(NamedTuple):
    """One kernel launch: what ``kernel.run(*args, grid=grid, warmup=False, **options)`` does."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]

    def __call__(self) -> None:
        if target().backend == "cuda":
            compiled.launch(*self)
        else:
            self.kernel.run(*self.args, grid=self.grid, warmup=False, **self.options)


def classes(function: Callable) -> tuple[Any, Any]:
    """The kernel for the unaligned class, where no pointer's alignment is looked at, and for the aligned class.

    Its arguments are pointers without a type, then integers and numbers with theirs, then constants.
    """
    given = inspect.signature(function).parameters
    pointers = [name for name, p in given.items() if p.annotation is p.empty]
    integers = [name for name, p in given.items() if p.annotation == "tl.int64"]
    loose = [name for name in pointers if name in _LOOSE_POINTERS]
    return (
        triton.jit(function, do_not_specialize=integers, do_not_specialize_on_alignment=pointers),
        triton.jit(function, do_not_specialize=integers, do_not_specialize_on_alignment=loose),
    )


@cache
def target() -> GPUTarget:
    """What Triton compiles for; nothing in the interpreter."""
    return GPUTarget("", 0, 32) if INTERPRETED.value else triton.runtime.driver.active.get_current_target()


def warp_size() -> int:
    """Threads that run together: 32, or 64 on some AMD GPUs."""
    return target().warp_size


def chunk_class(T: int, most: int = CHUNK) -> tuple[int, bool]:
    """(STEPS, LOOP) for T steps, at most so many in a chunk."""
    return (4, False) if T <= 4 else (8, most < T) if T <= 8 or most == 8 else (16, T > 16)


def aligned(N: int, tensors: Iterable[Tensor | None]) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes, with N a multiple of 16."""
    return N % 16 == 0 and not any(t is not None and t.data_ptr() & 15 for t in tensors)


def options(warps: int, roomy: bool = False) -> dict[str, Any]:
    """How Triton compiles; in the interpreter a program is as large as possible.

    roomy: all registers may be used. Left alone, NVIDIA's assembler may spill some to have more threads at a time.
    """
    return _options(warps, roomy and target().backend == "cuda")


@cache
def _options(warps: int, roomy: bool) -> dict[str, Any]:
    chosen = {"num_warps": 8 if INTERPRETED.value else warps, "num_stages": 1, "enable_fp_fusion": False}
    return {**chosen, "maxnreg": 255} if roomy else chosen


def channel_class(op: str, C: int, inner: int, lanes: int, wide: bool) -> str:
    """Which of the four ways to load per-channel vectors [rows, C]; lanes: neurons side by side in a thread."""
    if C < 2:
        return "one" if C else "none"
    if inner >= 1 << 30 or C >= 1 << 30:
        got = f"{C} and {inner}"
        raise ValueError(f"{op}: expected fewer than 2**30 channels and neurons a channel, got {got}; use fewer")
    return "shared" if wide and inner % lanes == 0 else "many"


def partial_sums(x: Tensor, rows: int, columns: int, block: int, C: int, inner: int, merged: int) -> Tensor:
    """Room for sums over neurons, [rows, repeats, C, neurons side by side] float32: one a program of ``block`` columns
    when there is one channel, else one for ``merged`` columns."""
    shape = (rows, columns // (C * inner), C, inner // merged)
    if C == 1:
        shape = (rows, -(-columns // block), 1, 1)
    return x.new_empty(shape, dtype=torch.float32)


@lru_cache(maxsize=1024)
def sum_columns(N: int, period: int, wide: bool) -> int:
    """The columns that sums over N neurons are kept in: a divisor of N, a multiple of the period of the channels.

    Their traffic is 8 bytes a sum and column (or for all columns of a thread, where they share a channel). An eighth of
    N, but not too few, costs a few percent; the smallest possible number above that is taken,
    which is N itself where N has no such divisor.
    """
    repeats = N // period
    least = -(-max(FEWEST_COLUMNS, N // 8) // period)
    divisors = {d for k in range(1, math.isqrt(repeats) + 1) if repeats % k == 0 for d in (k, repeats // k)}
    return period * min((d for d in divisors if d >= least and (not wide or d * period % 16 == 0)), default=repeats)
