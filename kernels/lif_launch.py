"""From the tensors of a LIF op to one launch: the classes that select code, block sizes, and the arguments in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from trtkern.kernels.launch import (
    Launch,
    Sums,
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
from trtkern.kernels.numerics import derivative
from trtkern.kernels.pooling import POSITIONS, Geometry, geometry

if TYPE_CHECKING:
    from trtkern.backends.base import LIFBackward, LIFForward, LIFGrads, LIFInputs

_FORWARD = classes(lif_forward)
_BACKWARD = classes(lif_backward)


def _options(steps: int, loop: bool, roomy: bool = False) -> dict[str, Any]:
    # Short trains need more neurons a program to be worth their start; long ones spread over the processors better.
    return options(4 if steps == 4 else 1 if loop else 2, roomy)


class _Shape(NamedTuple):
    """What both directions derive from their inputs."""

    T: int
    N: int
    vector: Tensor | None
    """One of the per-channel vectors."""
    inner: int
    """Of lanes, not of neurons."""
    static: bool
    image: Geometry
    wide: bool

    @property
    def lanes(self) -> int:
        """Lanes in all, each with one neuron at each position."""
        return self.N // POSITIONS[self.image.kind]

    @property
    def many(self) -> bool:
        """Whether there is more than one channel."""
        return self.vector is not None and self.vector.shape[1] > 1


def _shape(op: str, inp: LIFInputs, tensors: list[Tensor | None]) -> _Shape:
    x, inner = inp.x, inp.inner
    T = x.shape[0]
    N = x.numel() // T
    vector, residual = inp.norm or (inp.params, None)
    image = geometry(op, inp.pool)
    if inp.pool is not None and inner >= 2 * inp.pool.row:  # the channels lie outside of the images
        inner //= POSITIONS[image.kind]
    wide = aligned(N, (x, inp.v0, residual, *tensors)) and image.suits(N, 16 // x.element_size())
    return _Shape(T, N, vector, inner, T > 1 and x.stride(0) == 0, image, wide)


def _lanes(x: Tensor, shape: _Shape, steps: int, normed: bool, learn: bool, sums: bool, coef: bool, gv: bool) -> int:
    """Neurons of a thread: those of a 16-byte access, or fewer where their state does not fit in the registers."""
    long, places = steps > 8, shape.image.kind == "places"
    if not shape.wide:  # one element an access, each with an address of its own
        return 2 if learn or sums or shape.image.kind != "none" else 4
    if (long and learn and normed) or (places and ((long and (sums or coef)) or (steps > 4 and learn))):
        return 2
    # Eight neurons, each with five sums or six parameters, do not fit: half precision then has 8-byte accesses. Nor do
    # 16 steps of h and of what is kept beside it.
    if learn and (shape.many or steps > 4):
        return 4
    if long and (places or (normed and (sums or coef)) or (shape.many and gv)):
        return 4
    if steps > 4 and places and (sums or coef):
        return 4
    # Six numbers of a channel, in every lane.
    if steps > 4 and sums and coef and shape.inner % 8 > 0:
        return 4
    return 16 // x.element_size()


def forward_launch(inp: LIFInputs, out: LIFForward) -> Launch:
    """The forward pass: reads x, writes what ``out`` holds."""
    x = inp.x
    affine, residual = inp.norm or (None, None)
    shape = _shape("lif_forward", inp, [out.s, out.v, out.v_final, out.edges, out.packed])
    steps, loop = chunk_class(shape.T)
    chosen = _options(steps, loop)
    lanes = _lanes(x, shape, steps, affine is not None, False, False, False, False)
    block = chosen["num_warps"] * warp_size() * lanes
    n, half, side = shape.image.numbers(shape.N, lanes, shape.wide)
    channels, C = channel_class("lif_forward", shape.vector, shape.inner, lanes, shape.wide)
    args = (
        x, inp.v0, inp.params, affine, residual, out.s, out.v, out.v_final, out.edges, out.packed, out.flag,
        shape.T, n, C, shape.inner, half, side, *inp.scalars,
        inp.spec.reset, steps, loop, shape.static, shape.image.kind, shape.wide, channels, block, lanes,
    )  # fmt: skip
    return Launch(_FORWARD[shape.wide], (-(-shape.lanes // block),), args, chosen)


def backward_launch(
    inp: LIFInputs, edges: Tensor | None, grads: LIFGrads, out: LIFBackward
) -> tuple[Launch, list[tuple[Sums, Tensor]]]:
    """The backward pass: reads x and ``grads``, writes what ``out`` holds; sums that are left to add up, and where."""
    x, spec = inp.x, inp.spec
    affine, residual = inp.norm or (None, None)
    shape = _shape("lif_backward", inp, [edges, grads.s, grads.v, grads.v_final, out.x, out.v0])
    wide = shape.wide
    steps, loop = chunk_class(shape.T)
    if loop and edges is None:
        raise ValueError(f"lif_backward: expected edges for T = {shape.T}, got None; the forward pass writes them")
    chosen = _options(steps, loop, inp.pool is not None and out.sums is not None)
    learn = out.params is not None
    lanes = _lanes(
        x, shape, steps, affine is not None, learn, out.sums is not None, grads.coef is not None, grads.v is not None
    )
    block = chosen["num_warps"] * warp_size() * lanes
    n, half, side = shape.image.numbers(shape.N, lanes, shape.wide)
    channels, C = channel_class("lif_backward", shape.vector, shape.inner, lanes, wide)
    columns = shape.lanes
    if shape.many and (learn or out.sums is not None):
        columns = sum_columns(columns, C * shape.inner, wide)
    merged = lanes if channels == "shared" else 1
    sums = [
        None if total is None else partial_sums(x, rows, columns, block, C, shape.inner, merged)
        for rows, total in ((6, out.params), (2, out.sums))
    ]
    args = (
        x, inp.v0, inp.params, affine, residual, edges, grads.s, grads.v, grads.v_final, grads.coef, out.x, out.v0,
        *(s and s.partial for s in sums),
        shape.T, n, columns // 16 if wide else columns, C, shape.inner, half, side,
        *inp.scalars, spec.alpha, spec.reset, spec.detach_reset, derivative(spec.surrogate), steps, loop,
        shape.static, shape.image.kind, wide, channels, block, lanes,
    )  # fmt: skip
    left = [
        (s, total) for s, total in zip(sums, (out.params, out.sums), strict=True) if s is not None and total is not None
    ]
    return Launch(_BACKWARD[wide], (-(-columns // block),), args, chosen), left
