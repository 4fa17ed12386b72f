"""From the tensors of a LIF op to one launch: the classes that select code, block sizes, and the arguments in order.

What is compiled depends on the options, the dtype, the chunk class and the alignment class, on nothing else: at most
one compile for each, and no tuning at run time. The tests compile ahead of time through these very functions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from trtkern.kernels.lif import lif_forward
from trtkern.kernels.lif_backward import lif_backward
from trtkern.kernels.numerics import INTERPRETED, derivative

if TYPE_CHECKING:
    from trtkern.backends.base import LIFBackward, LIFForward, LIFGrads, LIFInputs

_INTEGERS = ("T", "n", "columns", "C", "inner")
_UNALIGNED_POINTERS = ("values", "flag")


class Launch(NamedTuple):
    """One kernel launch: ``kernel.run(*args, grid=grid, warmup=False, **options)``."""

    kernel: Any
    grid: tuple[int]
    args: tuple
    options: dict[str, Any]

    def __call__(self) -> None:
        self.kernel.run(*self.args, grid=self.grid, warmup=False, **self.options)


def _classes(function: Callable) -> tuple[Any, Any]:
    """The kernel for the unaligned class, where no pointer's alignment is looked at, and for the aligned class."""
    names = list(inspect.signature(function).parameters)
    pointers = names[: names.index("T")]
    integers = [name for name in names if name in _INTEGERS]
    loose = [name for name in pointers if name in _UNALIGNED_POINTERS]
    return (
        triton.jit(function, do_not_specialize=integers, do_not_specialize_on_alignment=pointers),
        triton.jit(function, do_not_specialize=integers, do_not_specialize_on_alignment=loose),
    )


_FORWARD = _classes(lif_forward)
_BACKWARD = _classes(lif_backward)


@cache
def warp_size() -> int:
    """Threads that run together: 32, or 64 on some AMD GPUs."""
    return 32 if INTERPRETED.value else triton.runtime.driver.active.get_current_target().warp_size


def chunk_class(T: int) -> tuple[int, bool]:
    """(STEPS, LOOP) for T steps."""
    return (4, False) if T <= 4 else (8, False) if T <= 8 else (16, T > 16)


def aligned(N: int, tensors: Iterable[Tensor | None]) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes, with N a multiple of 16."""
    return N % 16 == 0 and not any(t is not None and t.data_ptr() & 15 for t in tensors)


def _options(steps: int, loop: bool) -> dict[str, Any]:
    # Short trains need more neurons a program to be worth their start; long ones spread over the processors better.
    warps = 8 if INTERPRETED.value else 4 if steps == 4 else 1 if loop else 2
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}


def _lanes(x: Tensor, wide: bool, learn: bool, crowded: bool) -> int:
    """Neurons of a thread: those of a 16-byte access, or fewer where their state does not fit in the registers."""
    if not wide:  # one element an access, each with an address of its own
        return 2 if learn else 4
    # Eight neurons, each with five sums or six parameters, do not fit: half precision then has 8-byte accesses.
    return 4 if crowded else 16 // x.element_size()


def _channels(values: Tensor | None, inner: int) -> tuple[str, int]:
    """Which of the three ways to load parameters, and their number of channels."""
    if values is None:
        return "none", 1
    if inner >= 1 << 30 or values.shape[1] >= 1 << 30:
        got = f"{values.shape[1]} and {inner}"
        raise ValueError(f"lif: expected fewer than 2**30 channels and neurons a channel, got {got}; use fewer")
    return ("one", 1) if values.shape[1] == 1 else ("many", values.shape[1])


def forward_launch(inp: LIFInputs, out: LIFForward) -> Launch:
    """The forward pass: reads x, writes what ``out`` holds."""
    x = inp.x
    T = x.shape[0]
    N = x.numel() // T
    steps, loop = chunk_class(T)
    wide = aligned(N, (x, inp.v0, out.s, out.v, out.v_final, out.edges))
    channels, C = _channels(inp.params, inp.inner)
    options = _options(steps, loop)
    lanes = _lanes(x, wide, False, False)
    block = options["num_warps"] * warp_size() * lanes
    args = (
        x, inp.v0, inp.params, out.s, out.v, out.v_final, out.edges, out.flag,
        T, N // 16 if wide else N, C, inp.inner, *inp.scalars,
        inp.spec.reset, steps, loop, wide, channels, block, lanes,
    )  # fmt: skip
    return Launch(_FORWARD[wide], (-(-N // block),), args, options)


class Sums(NamedTuple):
    """Partial sums of the parameters' gradients, and how to add them up without atomics: bitwise repeatable."""

    partial: Tensor
    shape: tuple[int, ...]

    def add_up(self, gradients: Tensor) -> None:
        """Writes the gradients [6, C]."""
        torch.sum(self.partial.view(self.shape), (1, 3), out=gradients)


def backward_launch(
    inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward
) -> tuple[Launch, Sums | None]:
    """The backward pass: reads x and ``grads``, writes what ``out`` holds, the parameters' part as partial sums."""
    x, spec = inp.x, inp.spec
    T = x.shape[0]
    N = x.numel() // T
    steps, loop = chunk_class(T)
    if loop and edges is None:
        raise ValueError(f"lif_backward: expected edges for T = {T}, got None; the forward pass writes them")
    wide = aligned(N, (x, inp.v0, edges, *grads, out.x, out.v0))
    channels, C = _channels(inp.params, inp.inner)
    options = _options(steps, loop)
    learn, many = out.params is not None, channels == "many"
    crowded = (learn and (many or steps > 4)) or (many and steps > 8 and grads.v is not None)
    lanes = _lanes(x, wide, learn, crowded)
    block = options["num_warps"] * warp_size() * lanes
    columns, sums = N, None
    if out.params is not None:
        columns, sums = _partial_sums(x, N, C, inp.inner, wide, block)
    args = (
        x, inp.v0, inp.params, edges, grads.s, grads.v, grads.v_final, out.x, out.v0, sums and sums.partial,
        T, N // 16 if wide else N, columns // 16 if wide else columns, C, inp.inner, *inp.scalars, spec.alpha,
        spec.reset, spec.detach_reset, derivative(spec.surrogate), steps, loop, wide, channels, block,
    )  # fmt: skip
    return Launch(_BACKWARD[wide], (-(-columns // block),), args, options), sums


def _partial_sums(x: Tensor, N: int, C: int, inner: int, wide: bool, block: int) -> tuple[int, Sums]:
    """The number of columns and room for their sums: one a program when there is one channel, else one a column."""
    if C == 1:
        programs = -(-N // block)
        return N, Sums(x.new_empty((6, programs), dtype=torch.float32), (6, programs, 1, 1))
    columns = sum_columns(N, C * inner, wide)
    partial = x.new_empty((6, columns), dtype=torch.float32)
    return columns, Sums(partial, (6, columns // (C * inner), C, inner))


@lru_cache(maxsize=1024)
def sum_columns(N: int, period: int, wide: bool) -> int:
    """The columns that the parameters' sums are kept in: a divisor of N, a multiple of the period of the channels.

    Their traffic is 48 bytes a column. An eighth of N, but at least 2**17 (enough to fill a GPU), costs a few percent;
    the smallest possible number above that is taken, which is N itself where N has no such divisor.
    """
    repeats = N // period
    least = -(-max(1 << 17, N // 8) // period)
    divisors = {d for k in range(1, math.isqrt(repeats) + 1) if repeats % k == 0 for d in (k, repeats // k)}
    return period * min((d for d in divisors if d >= least and (not wide or d * period % 16 == 0)), default=repeats)
