"""Neurons that feed each other, too many for one program: a loop of steps, on an NVIDIA GPU recorded as a CUDA graph.

A step forward is torch's matrix product of the spikes with the weight, and the neurons' own kernel with T = 1
(``kernels/lif.py``), the state going in and out. A step backward is the product of the next step's gradient with the
weight, and that kernel's backward pass; the states before the steps of a chunk are computed again. ``forward`` and
``backward`` launch all of it in order; nothing of it looks at a number on the GPU, so ``recorded`` can capture it.

Products are float32 (TF32 where ``torch.backends.cuda.matmul.allow_tf32`` asks for it). In half precision what goes
from a step to the one before it is gx as it was written.

Launches: forward three a step in float32, five in half precision; backward three and five, and one a step to compute
the states again; one more pass over all steps for the parameters' gradients, one to pack the spikes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trtkern.backends.base import LIFBackward, LIFForward, LIFGrads, LIFInputs
from trtkern.kernels.lif_launch import backward_launches, forward_launch
from trtkern.kernels.spikes import pack_launch

if TYPE_CHECKING:
    from trtkern.backends.base import RecurrentBackward, RecurrentForward, RecurrentInputs

_NOTHING = LIFForward(None, None, None, None, None)


def _inputs(inp: RecurrentInputs, drive: Tensor, state: Tensor | None, before: bool = False) -> LIFInputs:
    """The neurons alone, for one step or more: drive [steps, B, N]."""
    return LIFInputs(drive, state, inp.params, inp.scalars, inp.spec, 1, before=before)


def _room(inp: RecurrentInputs) -> Tensor:
    """For the state of all neurons."""
    return inp.weight.new_empty(len(inp.spec.row.states), *inp.x.shape[1:])


def _float(row: Tensor, room: Tensor | None) -> Tensor:
    """The row in float32, of half precision in that room."""
    return row if room is None else room.copy_(row)


def forward(inp: RecurrentInputs, out: RecurrentForward) -> None:
    """Fills ``out``, step by step."""
    x, turned, chunk = inp.x, inp.weight.t(), inp.spec.chunk
    T, B, N = x.shape
    half = x.dtype != torch.float32
    total, spikes = (inp.weight.new_empty(B, N) if half else None for _ in range(2))
    row = None if out.current is not None else torch.empty_like(x[0])
    own = _room(inp)
    state, S = inp.v0, len(own)
    for t in range(T):
        drive = out.current[t] if out.current is not None else row
        sums = drive if total is None else total
        if inp.bias is None:
            sums.copy_(x[t])
        else:
            torch.add(x[t], inp.bias, out=sums)
        before = out.s[t - 1] if t else inp.s0
        if before is not None:
            sums.addmm_(_float(before, spikes), turned)
        if half:
            drive.copy_(sums)
        after = own
        if t + 1 == T and out.v_final is not None:
            after = out.v_final
        elif (t + 1) % chunk == 0 and t + 1 < T and out.edges is not None:
            after = out.edges[t // chunk * S : (t // chunk + 1) * S]
        v = None if out.v is None else out.v[t : t + 1]
        step = LIFForward(out.s[t : t + 1], v, after, None, out.flag)
        forward_launch(_inputs(inp, drive[None], state, inp.before), step)()
        state = after
    if out.packed is not None:
        pack_launch(out.s.view(T, -1), out.packed.view(-1, B * N))()


def _states_again(inp: RecurrentInputs, edges: Tensor | None, states: Tensor, chunk: int, count: int) -> list:
    """The states before each of the count steps of a chunk: the first None where it is zero."""
    S, t0 = states.shape[1], chunk * inp.spec.chunk
    first = inp.v0 if not chunk or edges is None else edges[(chunk - 1) * S : chunk * S]
    found: list[Tensor | None] = [first]
    for i in range(count - 1):
        out = _NOTHING._replace(v_final=states[i])
        forward_launch(_inputs(inp, inp.x[t0 + i : t0 + i + 1], found[i]), out)()
        found.append(states[i])
    return found


def backward(inp: RecurrentInputs, edges: Tensor | None, grads: LIFGrads, out: RecurrentBackward) -> None:
    """Fills ``out``, last step first."""
    current, chunk = inp.x, inp.spec.chunk
    T, B, N = current.shape
    half = current.dtype != torch.float32
    learn = out.params is not None
    gs = torch.empty_like(current if learn else current[:1])
    total, passed = (inp.weight.new_empty(B, N) if half else None for _ in range(2))
    states = inp.weight.new_empty(min(chunk, T), len(inp.spec.row.states), B, N)
    carry, own = grads.v_final, _room(inp)
    for j in range((T - 1) // chunk, -1, -1):
        before = _states_again(inp, edges, states, j, min(chunk, T - j * chunk))
        for i in range(len(before) - 1, -1, -1):
            t = j * chunk + i
            row = gs[t if learn else 0]
            sums = row if total is None else total
            if grads.s is None:
                sums.zero_()
            else:
                sums.copy_(grads.s[t])
            if t + 1 < T:
                sums.addmm_(_float(out.x[t + 1], passed), inp.weight)
            if half:
                row.copy_(sums)
            after = out.v0 if t == 0 and out.v0 is not None else own
            given = LIFGrads(row[None], None if grads.v is None else grads.v[t : t + 1], carry)
            inputs = _inputs(inp, current[t : t + 1], before[i], inp.before)
            for launch in backward_launches(inputs, None, given, LIFBackward(out.x[t : t + 1], after, None)):
                launch()
            carry = after
    if learn:
        inputs, given = _inputs(inp, current, inp.v0, inp.before), LIFGrads(gs, grads.v, grads.v_final)
        for launch in backward_launches(inputs, edges, given, LIFBackward(None, None, out.params)):
            launch()


MOST = 16
"""Graphs that are kept; then all are forgotten."""
_graphs: dict[tuple[Any, ...], Any] = {}


def recorded(run: Callable[[], None], what: tuple[Any, ...], tensors: list[Tensor | None]) -> None:
    """``run()``; where it runs on these very tensors again, as a CUDA graph.

    The first time it runs as it is, which compiles the kernels, the second time it is captured. Its own scratch lies in
    the graph's memory. The allocator of a training loop comes back with the same addresses at each step. Within the
    capture of somebody else, and on AMD GPUs, it runs as it is. No GPU has run this.
    """
    device = next(t for t in tensors if t is not None).device
    if device.type != "cuda" or torch.version.hip or torch.cuda.is_current_stream_capturing():
        run()
        return
    key = (device.index, *what, *(None if t is None else (t.data_ptr(), t.shape, t.dtype) for t in tensors))
    found = _graphs.get(key)
    if found is None:
        if len(_graphs) >= MOST:
            _graphs.clear()
        _graphs[key] = 1
        run()
        return
    if found == 1:
        found = torch.cuda.CUDAGraph()
        with torch.cuda.graph(found):
            run()
        _graphs[key] = found
    found.replay()
