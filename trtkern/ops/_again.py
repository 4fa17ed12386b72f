"""Calls of a neuron that are made again: what may have changed since is compared, memory is taken, a kernel launched.

A call of a neuron whose parameters are numbers is prepared when it was made once, by the ordinary way (``ops/lif.py``).
Before it is made again everything that the checks and choices of that way look at is compared with what they saw, in
one native call (``ops/_same.py``); whatever differs goes the ordinary way. The Function here has fewer inputs and
outputs than that of ``ops/lif.py``, and each state is a tensor of its own to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trtkern.backends.base import LIFBackward, LIFForward, LIFGrads, LIFInputs
from trtkern.ops._known import recall
from trtkern.ops._library import apply, needs_grad, once
from trtkern.ops._prepared import (
    NEED_V0,
    NEED_X,
    WANT_H,
    WANT_PACKED,
    WANT_SPIKES,
    WANT_STATE,
    WANT_V,
    Prepared,
    wanted_with,
)
from trtkern.ops._same import Entries, Same
from trtkern.ops._saved import layouts, restored
from trtkern.ops.lif import _LIFBackward, given
from trtkern.spec import LIFSpec

empty_like = torch.empty_like
Asked = Sequence[tuple[Callable, tuple, Any]]


class Again:
    """A call that was made before.

    Args:
        x: what it was made on: a sequence [T, ...], or one step [...].
        state: before the first step, a tensor for each of the neuron's states in a step's shape; none: zeros.
        step: x is one step.
        fixed: what the ordinary way told its Function.
        want: the outputs that the caller gets.
        inputs: an example of what the backend reads, of which no tensor is kept.
        same: what is compared; of the tensors x, the flag and the state.
    """

    learned: tuple[str, ...] = ()
    """Parameters that are tensors, by name (``ops/_again_learned.py``)."""

    _backward: Callable[..., None]
    """What launches the backward pass."""

    __slots__ = (
        "_adjacent", "_back", "_backward", "_edges", "_fixed", "_forward", "_needs", "_room", "_rows",
        "_state_bytes", "_states", "differentiable", "fits", "layouts", "step", "want",
    )  # fmt: skip

    def __init__(
        self, x: Tensor, state: tuple[Tensor, ...], step: bool, fixed: Any, want: int, inputs: LIFInputs, same: Same,
        differentiable: bool,
    ) -> None:  # fmt: skip
        self.step, self.want, self._fixed, self.differentiable = step, want, fixed, differentiable
        # Whether all is as it was: fits(dicts, tensors).
        self.fits = same.fits
        self._back: Same | None = None
        self.layouts: list[Any] | None = None
        spec, steps, one = inputs.spec, inputs.x.shape[0], inputs.x.detach()[0]
        self._states, self._rows, self._state_bytes = len(spec.row.states), one.shape[0], 4 * one.numel()
        place = {"dtype": torch.float32, "device": x.device}
        several = () if self._states == 1 else (self._states * self._rows, *one.shape[1:])
        self._room = partial(torch.empty, several or one.shape, **place)
        count = (steps - 1) // spec.chunk * self._states if differentiable else 0
        self._edges = partial(torch.empty, (count, one.numel()), **place) if count else None
        self._needs = NEED_X + NEED_V0 * needs_grad(*state) + given(want)
        self._adjacent = "lif_again" in fixed.prepared.run
        self._forward, self._backward = _launchers(fixed.prepared, inputs)

    def __call__(self, x: Tensor, flag: Tensor, state: tuple[Tensor, ...]) -> Any:
        """The outputs that are wanted: spikes, v or h, then each state; a tensor where that is one."""
        if self.differentiable:
            return _apply(x, flag, self, *state)
        return self.forward(x, flag, state)[0]

    def forward(self, x: Tensor, flag: Tensor, state: tuple[Tensor, ...]) -> tuple[Any, Tensor | None]:
        """The same without autograd, and the states between chunks."""
        want, edges = self.want, None if self._edges is None else self._edges()
        v0 = self._joined(state) if state else None
        if want == WANT_SPIKES:  # the common call
            spikes = empty_like(x)
            self._forward((x, v0, None, None, None, spikes, None, None, edges, None, flag))
            return spikes, edges
        s = empty_like(x) if want & WANT_SPIKES else None
        v = empty_like(x) if want & (WANT_V | WANT_H) else None
        last = self._room() if want & WANT_STATE else None
        self._forward((x, v0, None, None, None, s, v, last, edges, None, flag))
        return self._given(s, v, last), edges

    def _given(self, s: Tensor | None, v: Tensor | None, last: Tensor | None) -> Any:
        """Those that are there, each state for itself."""
        if v is None and last is None:
            return s
        made = [t for t in (s, v) if t is not None]
        if last is not None:
            made += [last] if self._states == 1 else torch.unsafe_split(last, self._rows)
        return tuple(made) if len(made) > 1 else made[0]

    def backward(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of x and of each state."""
        saved = ctx.saved_tensors
        if self._back is None or not self._back.fits((), (*saved, *grads)):
            return self._ordinary(ctx, saved, grads)
        x, edges, *state = saved
        gx = empty_like(x)
        if self.want == WANT_SPIKES and not state:
            self._backward((
                x, None, None, None, None, None, None, None, edges, None, None, *grads, None, None, None, gx, None
            ))  # fmt: skip
            return (gx,)
        gs, gv, *last = self._by_name(grads)
        gv0 = self._room() if self._needs & NEED_V0 else None
        self._backward((
            x, self._joined(state), None, None, None, None, None, None, edges, None, None,
            gs, gv, self._joined(last), None, gx, gv0,
        ))  # fmt: skip
        return gx, *self._apart(gv0, len(state))

    def _by_name(self, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """gs, gv, and those of the states: all, or none."""
        want, given_to = self.want, list(grads)
        if not want & WANT_SPIKES:
            given_to.insert(0, None)
        if not want & (WANT_V | WANT_H):
            given_to.insert(1, None)
        return given_to

    def _joined(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        """The parts as one tensor [S, ...], or the first where the others lie behind it as in that; parts that are all
        None are None."""
        if not parts:
            return None
        first = parts[0]
        if self._states == 1:
            return first
        if first is None or not self._adjacent:
            return stacked(parts)
        at = first.data_ptr()
        for part in parts[1:]:
            at += self._state_bytes
            if part is None or part.data_ptr() != at:
                return stacked(parts)
        return first

    def _apart(self, gv0: Tensor | None, count: int) -> Sequence[Tensor | None]:
        if gv0 is None:
            return (None,) * count
        return (gv0,) if self._states == 1 else torch.unsafe_split(gv0, self._rows)

    def _ordinary(self, ctx: Any, given_back: tuple, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradients in the way of ``ops/lif.py``, where anything may come; what came is what fits from now on."""
        assert self.layouts is not None
        saved = restored(given_back, self.layouts)
        x, edges, *state = saved
        gs, gv, *last = self._by_name(grads)
        if once(*saved, *grads) and self._aligned(x, gs, gv, last):
            self._back = Same(False, (), (*given_back, *grads))
        if self.step:
            x, gs, gv = x.unsqueeze(0), *(None if g is None else g.unsqueeze(0) for g in (gs, gv))
        v0, gv_final = stacked(state), stacked(last)
        needs, fixed = self._needs, self._fixed
        if fixed.prepared is not None and once(gs, gv, gv_final, x, v0):
            gx, gv0, *_ = fixed.prepared.backward(
                x, v0, None, None, None, None, edges, gs, gv, gv_final, None, None, 0, None, needs
            )
        else:
            gx, gv0, _ = apply(_LIFBackward, "lif", gs, gv, gv_final, x, v0, None, None, edges, fixed, needs)
        parts: Sequence[Tensor | None] = (None,) * len(state)
        if self._needs & NEED_V0:
            parts = (gv0,) if self._states == 1 else gv0.unbind(0)
        return gx[0] if self.step else gx, *parts

    def _aligned(self, x: Tensor, gs: Tensor | None, gv: Tensor | None, last: Sequence[Tensor | None]) -> bool:
        """Whether the gradients are as the kernel reads them."""
        if gv is None and self.want & WANT_H:  # which is told the kernel by what comes for it
            return False
        steps = all(
            g is None
            or (g.shape == x.shape and g.stride() == x.stride() and g.dtype == x.dtype and g.device == x.device)
            for g in (gs, gv)
        )
        return steps and all(g is None or (g.dtype == torch.float32 and g.is_contiguous()) for g in last)


class _Again(torch.autograd.Function):
    # Without what Function.apply does for transforms: none is there where a call fits.
    apply = torch._C._FunctionBase.__dict__["apply"]

    @staticmethod
    def forward(ctx: Any, x: Tensor, flag: Tensor, call: Again, *state: Tensor) -> Any:
        made, edges = call.forward(x, flag, state)
        if call.layouts is None:
            call.layouts = layouts((x, edges, *state))
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, edges, *state)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        gx, *gstate = ctx.call.backward(ctx, grads)
        return gx, None, None, *gstate


_apply = _Again.apply


def again(
    key: Any, x: Tensor, flag: Tensor, state: tuple[Tensor, ...], step: bool, spec: LIFSpec, want: int,
    own: Sequence[Entries], asked: Asked = (),
) -> Again | None:  # fmt: skip
    """The call that was just made, by the key that it is known by (``known``); None where it is not of this sort."""
    ready = recall(key)
    if ready is None or ready.numbers is None or not ready.plain or want & WANT_PACKED:
        return None
    sequence = x.detach().unsqueeze(0) if step else x.detach()
    if not suits(x, sequence, state):
        return None
    differentiable = needs_grad(x, *state)
    fixed = ready.fixed.get(wanted_with(sequence, spec, want, differentiable))
    if fixed is None or fixed.prepared is None:
        return None
    v0 = stacked([t.detach() for t in state])
    inputs = fixed.prepared.inputs(sequence, v0, None, None, None, None, bool(want & WANT_H))
    same = Same(torch.is_grad_enabled(), own, (x, flag, *state), asked)
    return Again(x, state, step, fixed, want, inputs, same, differentiable)


def suits(x: Tensor, sequence: Tensor, state: tuple[Tensor, ...]) -> bool:
    """Whether outputs and states as they are made here are what the kernel writes."""
    if not x.is_contiguous() or not x.numel() or sequence.dim() < 2:
        return False
    return all(t.shape == sequence.shape[1:] and t.is_contiguous() and t.dtype == torch.float32 for t in state)


def stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """A state, or its gradient, as ``ops/lif.py`` takes it."""
    there = next((part for part in parts if part is not None), None)
    if there is None or len(parts) == 1:
        return there
    return torch.stack([torch.zeros_like(there) if part is None else part for part in parts])


Launcher = Callable[[tuple], None]


def _launchers(prepared: Prepared, example: LIFInputs) -> tuple[Launcher, Launcher]:
    """What launches the forward and the backward pass for tensors in the order of ``csrc/lif/fields.h``."""
    made = prepared.run.get("lif_again")
    if made is not None:
        return made(example)
    run_forward, run_backward = prepared.run["lif_forward"], prepared.run["lif_backward"]
    axes, others = example.x.dim(), example[2:]

    def inputs(x: Tensor, v0: Tensor | None) -> LIFInputs:
        return LIFInputs(x if x.dim() == axes else x.unsqueeze(0), v0, *others)

    def forward(tensors: tuple) -> None:
        x, v0, _, _, _, s, v, last, edges, packed, flag = tensors
        run_forward(inputs(x, v0), LIFForward(s, v, last, edges, flag, packed))

    def backward(tensors: tuple) -> None:
        x, v0, _, _, _, _, _, _, edges, _, _, gs, gv, last, _, gx, gv0 = tensors
        run_backward(inputs(x, v0), edges, LIFGrads(gs, gv, last), LIFBackward(gx, gv0, None))

    return forward, backward
