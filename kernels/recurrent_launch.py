"""From the tensors of neurons that feed each other to launches: block sizes, room, and the arguments in order.

Up to ``LARGEST`` neurons a direction is one launch over all T steps (``kernels/recurrent.py``), beside one that turns
the weight, or one that adds up the parameters' gradients. More are a loop of steps (``backends/_recurrent_steps.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trtkern.kernels.batch_norm_finish import add_up_launch
from trtkern.kernels.launch import Launch, aligned, classes, options, target, warp_size
from trtkern.kernels.neurons import steps
from trtkern.kernels.numerics import derivative
from trtkern.kernels.recurrent import recurrent_forward, turn_weight
from trtkern.kernels.recurrent_backward import recurrent_backward

if TYPE_CHECKING:
    from trtkern.backends.base import LIFGrads, RecurrentBackward, RecurrentForward, RecurrentInputs

_TURN = classes(turn_weight)
_FORWARD = classes(recurrent_forward)
_BACKWARD = classes(recurrent_backward)

LARGEST = 1024
"""Neurons that a program holds at the most; the weight of more would not stay in L2 either."""
LANES = 4
"""Neurons of a thread: a 16-byte access of float32."""
LEAST = 128
"""Lanes of a program at the least: those of a warp."""
ROWS = 8
"""Rows of the weight that a program has in flight."""
SAMPLES = 4
"""Of a program of the backward pass."""
TILE = 32
"""Rows and columns of the weight that are turned at a time."""


def _block(N: int, lanes: int, roomy: bool) -> tuple[int, dict[str, Any]]:
    """Lanes of a program that holds N neurons, and how it is compiled, with so many lanes a thread."""
    block = max(LEAST, 1 << (N - 1).bit_length())
    return block, options(max(1, block // (lanes * warp_size())), roomy)


def _waits() -> bool:
    """Whether a barrier has to wait for stores by itself (``handed_over``)."""
    return target().backend == "hip"


def _channels(params: Tensor | None, N: int) -> str:
    """How parameters are loaded (``kernels/channels.py``)."""
    return "none" if params is None else "one" if params.shape[1] == 1 or N == 1 else "many"


def _edges(edges: Tensor | None) -> Tensor | None:
    """None where there is none between the first chunk and a next."""
    return None if edges is None or not edges.numel() else edges


def forward_launches(inp: RecurrentInputs, out: RecurrentForward) -> list[Launch]:
    """The forward pass: the weight is turned, then all T steps."""
    x, weight = inp.x, inp.weight
    T, B, N = x.shape
    block, chosen = _block(N, LANES, False)
    turned, base = torch.empty_like(weight), weight.new_empty(N)
    heard = torch.empty(B, 2, 16 + block + ROWS, dtype=torch.int32, device=x.device)
    edges = _edges(out.edges)
    even = aligned(N, (x, inp.s0, inp.v0, turned, base, *out[:4], edges, out.packed))
    args = (
        x, inp.s0, inp.v0, turned, base, inp.params, out.s, out.current, out.v, out.v_final, edges, out.packed,
        out.flag, heard, T, B, N // 16 if even else N, inp.scalars, steps(inp.spec), inp.before and out.v is not None,
        inp.spec.chunk, even, _channels(inp.params, N), block, ROWS, _waits(),
    )  # fmt: skip
    turn = Launch(_TURN[0], (-(-N // TILE),), (weight, inp.bias, turned, base, N, TILE), options(4))
    return [turn, Launch(_FORWARD[even], (B,), args, chosen)]


def backward_launches(
    inp: RecurrentInputs, edges: Tensor | None, grads: LIFGrads, out: RecurrentBackward
) -> list[Launch]:
    """The backward pass, all T steps; then, where there are gradients of parameters, what adds them up."""
    current, spec = inp.x, inp.spec
    T, B, N = current.shape
    edges = _edges(edges)
    if spec.chunk < T and edges is None:
        raise ValueError(f"recurrent_backward: expected edges for T = {T}, got None; the forward pass writes them")
    even = aligned(N, (current, inp.v0, inp.weight, edges, *grads[:3], out.x, out.v0))
    # An address for each element leaves room for less.
    rows, lanes, samples = ROWS, LANES, SAMPLES
    if not even:
        rows, lanes, samples = ROWS // 2, LANES // 2 if N <= 512 else LANES, SAMPLES if N <= 512 else SAMPLES // 2
    block, chosen = _block(N, lanes, True)
    programs, columns = -(-B // samples), _channels(inp.params, N)
    states = inp.weight.new_empty(min(T, spec.chunk), len(spec.row.states), B, N)
    passed = inp.weight.new_empty(programs, 2, samples, block)
    partial = None if out.params is None else inp.weight.new_empty(len(spec.row.params), programs, N)
    args = (
        current, inp.v0, inp.weight, inp.params, edges, *grads[:3], out.x, out.v0, partial, states, passed,
        T, B, N // 16 if even else N, inp.scalars, spec.alpha, steps(spec), inp.before and grads.v is not None,
        derivative(str(spec.surrogate)), spec.chunk, even, columns, block, samples, rows,
        _waits(),
    )  # fmt: skip
    first = Launch(_BACKWARD[even], (programs,), args, chosen)
    if partial is None:
        return [first]
    sums = partial[:, :, None, :] if columns == "one" else partial[..., None]  # of all neurons together, or of each
    return [first, add_up_launch(sums, None, out.params, None, None)]
