"""From the tensors of a LIF op to one launch: the classes that select code, block sizes, and the arguments in order."""

# The path of a call, a forward pass of the LIF:
#
#   trtkern/ops/lif.py          has seen every tensor, and makes what the pass will write
#   trtkern/backends/triton.py  lif_forward: makes the launch on x's device and calls it
#   kernels/lif_launch.py       forward_launch (here): T and N, whether all addresses suit 16-byte accesses (aligned),
#                               the classes that select code (_plan: chunk, channels, image, lanes), and the
#                               arguments in the kernel's order
#   kernels/launch.py           Launch: a kernel of Triton with its grid, its arguments and its options
#   kernels/compiled.py         on an NVIDIA GPU: which compiled kernel that is, without Triton's own search
#   kernels/lif.py              lif_forward: a program's neurons through all steps, a chunk at a time
#   kernels/channels.py, pooling.py, numerics.py   what the kernels share
#
# Backward, backward_launches: kernels/lif_backward.py makes the h of a chunk again and walks back through them, the
# last chunk first; what it leaves to add up, kernels/batch_norm_finish.py adds up behind it: add_up.

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from trtkern.kernels.batch_norm_finish import add_up_launch
from trtkern.kernels.launch import (
    Launch,
    aligned,
    channel_class,
    chunk_class,
    classes,
    options,
    partial_sums,
    sum_columns,
    warp_size,
)
from trtkern.kernels.lif import lif_forward
from trtkern.kernels.lif_backward import lif_backward
from trtkern.kernels.neurons import steps
from trtkern.kernels.numerics import derivative
from trtkern.kernels.pooling import POSITIONS, geometry

if TYPE_CHECKING:
    from trtkern.backends.base import LIFBackward, LIFForward, LIFGrads, LIFInputs, NormGrads, Pool

_FORWARD = classes(lif_forward)
_BACKWARD = classes(lif_backward)


class _Load(NamedTuple):
    """What a thread keeps beside the potentials: the norm, sums for parameters and for the norm, coef, gv, residual."""

    normed: bool
    learn: bool = False
    sums: bool = False
    coef: bool = False
    gv: bool = False
    residual: bool = False


_LOADS = {normed: _Load(normed) for normed in (False, True)}


def _lanes(steps: int, element: int, wide: bool, pool: str, C: int, inner: int, load: _Load) -> int:
    """Neurons of a thread: those of a 16-byte access, or fewer where their state does not fit in the registers."""
    normed, learn, sums, coef, gv, _ = load
    long, places = steps > 8, pool == "places"
    if not wide:  # one element an access, each with an address of its own
        return 2 if learn or sums or pool != "none" else 4
    if (long and learn and normed) or (places and ((long and (sums or coef)) or (steps > 4 and learn))):
        return 2
    # Eight neurons, each with five sums or six parameters, do not fit: half precision then has 8-byte accesses. Nor do
    # 16 steps of h and of what is kept beside it.
    if learn and (C > 1 or steps > 4):
        return 4
    if long and (places or (normed and (sums or coef)) or (C > 1 and gv)):
        return 4
    if steps > 4 and places and (sums or coef):
        return 4
    # Six numbers of a channel, in every lane.
    if steps > 4 and sums and coef and inner % 8 > 0:
        return 4
    return 16 // element


class _Plan(NamedTuple):
    """What follows from sizes and options alone."""

    wide: bool
    block: int
    lanes: int
    """Neurons side by side in a thread."""
    total: int
    """Lanes in all."""
    channels: str
    sizes: tuple[int, ...]
    """n, C, inner, half, side as the kernels are given them."""
    constants: tuple[Any, ...]
    """STEPS and all after it."""
    options: dict[str, Any]


@lru_cache(maxsize=1024)
def _plan(
    op: str, T: int, most: int, N: int, element: int, even: bool, C: int, inner: int, pool: Pool | None, load: _Load,
    warp: int,
) -> _Plan:  # fmt: skip
    """most: steps of a chunk; even: N and all addresses are multiples of 16; element: its bytes; C: channels, 0 without
    per-channel vectors."""
    steps, loop = chunk_class(T, most)
    image = geometry(op, pool)
    if pool is not None and inner >= 2 * pool.row:  # the channels lie outside of the images
        inner //= POSITIONS[image.kind]
    wide = even and image.suits(N, 16 // element)
    lanes = _lanes(steps, element, wide, image.kind, C, inner, load)
    # Short trains need more neurons a program to be worth their start; long ones spread over the processors better.
    chosen = options(4 if steps == 4 else 1 if loop else 2, load.sums and (pool is not None or load.residual))
    block = chosen["num_warps"] * warp * lanes
    channels = channel_class(op, C, inner, lanes, wide)
    n, half, side = image.numbers(N, lanes, wide)
    sizes = (n, max(C, 1), inner, half, side)
    constants = (steps, loop, image.kind, wide, channels, block, lanes)
    return _Plan(wide, block, lanes, N // POSITIONS[image.kind], channels, sizes, constants, chosen)


def _sample(inp: LIFInputs, N: int) -> int:
    """Neurons of a sample, where those have lengths."""
    return 0 if inp.lengths is None else N // inp.lengths.numel()


def forward_launch(inp: LIFInputs, out: LIFForward) -> Launch:
    """The forward pass: reads x, writes what ``out`` holds."""
    x = inp.x
    T = x.shape[0]
    N = x.numel() // T
    affine, residual = inp.norm or (None, None)
    vector = inp.params if affine is None else affine
    even = aligned(N, (x, inp.v0, residual, out.s, out.v, out.v_final, out.edges, out.packed))
    C = 0 if vector is None else vector.shape[1]
    load = _LOADS[affine is not None]
    plan = _plan("lif_forward", T, inp.spec.chunk, N, x.element_size(), even, C, inp.inner, inp.pool, load, warp_size())
    args = (
        x, inp.v0, inp.params, affine, residual, inp.lengths, out.s, out.v, out.v_final, out.edges, out.packed,
        out.flag, T, *plan.sizes, _sample(inp, N), inp.scalars, steps(inp.spec), inp.before and out.v is not None,
        T > 1 and x.stride(0) == 0, *plan.constants,
    )  # fmt: skip
    return Launch(_FORWARD[plan.wide], (-(-plan.total // plan.block),), args, plan.options)


def backward_launches(
    inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward, norm: NormGrads | None = None
) -> list[Launch]:
    """The backward pass, which reads x and ``grads`` and writes what ``out`` holds; then, where there are sums, what
    adds them up and fills ``norm``."""
    x, spec = inp.x, inp.spec
    T = x.shape[0]
    N = x.numel() // T
    if spec.chunk < T and edges is None:
        raise ValueError(f"lif_backward: expected edges for T = {T}, got None; the forward pass writes them")
    affine, residual = inp.norm or (None, None)
    vector = inp.params if affine is None else affine
    even = aligned(N, (x, inp.v0, residual, edges, grads.s, grads.v, grads.v_final, out.x, out.v0))
    C = 0 if vector is None else vector.shape[1]
    load = _Load(
        affine is not None, out.params is not None, out.sums is not None, grads.coef is not None, grads.v is not None,
        residual is not None,
    )  # fmt: skip
    plan = _plan("lif_backward", T, spec.chunk, N, x.element_size(), even, C, inp.inner, inp.pool, load, warp_size())
    columns = plan.total
    params = len(spec.row.params)
    learned = summed = None
    if load.learn or load.sums:
        inner = plan.sizes[2]
        if C > 1:
            columns = sum_columns(columns, C * inner, plan.wide)
        merged = plan.lanes if plan.channels == "shared" else 1
        if load.learn:
            learned = partial_sums(x, params, columns, plan.block, C, inner, merged)
        if load.sums:
            summed = partial_sums(x, 2, columns, plan.block, C, inner, merged)
    args = (
        x, inp.v0, inp.params, affine, residual, inp.lengths, edges, grads.s, grads.v, grads.v_final, grads.coef,
        out.x, out.v0, learned, summed, T, *plan.sizes, _sample(inp, N), columns // 16 if plan.wide else columns,
        inp.scalars, spec.alpha, steps(spec), inp.before and grads.v is not None,
        derivative(spec.surrogate),
        T > 1 and x.stride(0) == 0, *plan.constants,
    )  # fmt: skip
    first = Launch(_BACKWARD[plan.wide], (-(-columns // plan.block),), args, plan.options)
    if learned is None and summed is None:
        return [first]
    return [first, add_up_launch(learned, summed, out.params, out.sums, norm)]
