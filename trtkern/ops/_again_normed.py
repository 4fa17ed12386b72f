"""Calls of a BatchNorm + neuron that are made again (``ops/_again.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trtkern.backends.base import Finish, Finished, LIFBackward, LIFForward, LIFGrads, LIFInputs, Norm, NormGrads
from trtkern.ops import layout
from trtkern.ops._again import Again, stacked, suits
from trtkern.ops._known import recall
from trtkern.ops._library import apply, needs_grad, once
from trtkern.ops._norm import OP, BatchNorm, moved
from trtkern.ops._prepared import NEED_V0, WANT_H, WANT_PACKED, WANT_SPIKES, WANT_STATE, wanted_with
from trtkern.ops._same import Entries, Same
from trtkern.ops._saved import layouts, restored
from trtkern.ops.batch_norm_lif import Fixed, Neuron, NormedBackward


class AgainNormed(Again):
    """A call that was made before, without a residual, on one process; y in place of x.

    Args:
        norm: of that call.
    """

    __slots__ = ("_affine", "_channels", "_dtype", "_first", "_output")

    def __init__(
        self, y: Tensor, state: tuple[Tensor, ...], fixed: Fixed, want: int, inputs: LIFInputs, same: Same,
        differentiable: bool, norm: BatchNorm,
    ) -> None:  # fmt: skip
        super().__init__(y, state, False, fixed, want, inputs, same, differentiable)
        self._first, self._forward, self._backward = _launchers(inputs, fixed, norm)
        self._channels, device = fixed.channels, y.device
        laid = layout.pooled_shape(y) if fixed.pool else (y.shape, y.stride())
        self._output = partial(torch.empty_strided, *laid, dtype=y.dtype, device=device)
        self._affine = norm.weight is not None, norm.bias is not None
        there = norm.bias if norm.weight is None else norm.weight
        self._dtype = there.dtype if there is not None and needs_grad(norm.weight, norm.bias) else None

    def __call__(  # type: ignore[override]
        self, y: Tensor, norm: tuple[Tensor | None, ...], flag: Tensor, state: tuple[Tensor, ...]
    ) -> Any:
        """Spikes, then each state; a tensor where that is one. ``norm``: weight, bias and the running statistics."""
        if self.differentiable:
            return _apply(y, norm[0], norm[1], (norm, flag), self, *state)
        return self.normed(y, norm, flag, state)[0]

    def normed(
        self, y: Tensor, norm: tuple[Tensor | None, ...], flag: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Any, tuple[Tensor | None, ...]]:
        """The same without autograd, and what is kept besides y and the state: affine, moments, coef, edges."""
        C, device, running = self._channels, y.device, self._fixed.samples == 0
        s = self._output()
        last = self._room() if self.want & WANT_STATE else None
        edges = None if self._edges is None else self._edges()
        affine = torch.empty((3, C), dtype=torch.float32, device=device)
        moments = torch.empty((2, C), dtype=torch.float64, device=device)
        coef = torch.empty((3, C), dtype=torch.float32, device=device) if running else None
        weight, bias, *held = norm
        if running:
            self._first(y, (*held[:2], weight, bias, None, None, None, affine, moments, coef))
        else:
            self._first(y, (None, None, weight, bias, *held, affine, moments, None))
            moved(*held)
        self._forward((y, self._joined(state), None, affine, None, s, None, last, edges, None, flag))
        if last is None:
            return s, (affine, moments, coef, edges)
        states = (last,) if self._states == 1 else torch.unsafe_split(last, self._rows)
        return (s, *states), (affine, moments, coef, edges)

    def backward(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of y, weight, bias and each state."""
        saved = ctx.saved_tensors
        if self._back is None or not self._back.fits((), (*saved, *grads)):
            return self._ordinary(ctx, saved, grads)
        y, affine, moments, coef, edges, *state = saved
        C, device, dtype, needs_v0 = self._channels, y.device, self._dtype, self._needs & NEED_V0
        gs, *last = grads
        gx, v0, gv_final = torch.empty_like(y), self._joined(state), self._joined(last)
        gv0 = self._room() if needs_v0 else None
        told = (y, v0, None, affine, None, None, None, None, edges, None, None, gs, None, gv_final)
        gweight = gbias = None
        if dtype is not None:
            gweight = torch.empty(C, dtype=dtype, device=device)
            gbias = torch.empty(C, dtype=dtype, device=device)
        running = self._fixed.samples == 0
        if running and dtype is None:
            self._backward((*told, coef, gx, gv0, None, None), None)
            return gx, None, None, *self._apart(gv0, len(state))
        sums = torch.empty((2, C), dtype=torch.float64, device=device)
        made = None if running else torch.empty((3, C), dtype=torch.float32, device=device)
        finish = (*_NO_STATISTICS, affine, moments, made, sums, None, gweight, gbias)
        if running:
            self._backward((*told, coef, gx, gv0, None, sums), finish)
        else:
            self._backward((*told, None, None, gv0, None, sums), finish)
            self._backward((*told, made, gx), None)
        return (
            gx,
            gweight if self._affine[0] else None,
            gbias if self._affine[1] else None,
            *self._apart(gv0, len(state)),
        )

    def _ordinary(self, ctx: Any, given_back: tuple, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        assert self.layouts is not None
        saved = restored(given_back, self.layouts)
        y, affine, moments, coef, edges, *state = saved
        gs, *last = grads
        if once(*saved, *grads) and self._as_read(gs, last):
            self._back = Same(False, (), (*given_back, *grads))
        v0, gv_final = stacked(state), stacked(last)
        weight, bias = ctx.needs_input_grad[1:3]
        needs = (True, False, bool(self._needs & NEED_V0), weight, bias, False)
        told = (gs, None, gv_final, y, None, v0, None, None, edges, affine, moments, coef, self._fixed)
        ctx.first = None
        if once(gs, gv_final, y, v0):
            found = NormedBackward.forward(*told, self._dtype, needs, ctx)
        else:
            found = apply(NormedBackward, OP, *told, self._dtype, needs, None)
        gy, _, gv0, gweight, gbias, _ = found
        parts: Sequence[Tensor | None] = (None,) * len(state)
        if self._needs & NEED_V0:
            parts = (gv0,) if self._states == 1 else gv0.unbind(0)
        return gy, gweight if weight else None, gbias if bias else None, *parts

    def _as_read(self, gs: Tensor | None, last: Sequence[Tensor | None]) -> bool:
        """Whether the gradients are as the kernel reads them."""
        shape, stride = self._output.args
        spikes = gs is None or (
            gs.shape == shape and gs.stride() == stride and gs.dtype == self._output.keywords["dtype"]
        )
        return spikes and all(g is None or (g.dtype == torch.float32 and g.is_contiguous()) for g in last)


_NO_STATISTICS = (None,) * 7


class _AgainNormed(torch.autograd.Function):
    # As that of ``ops/_again.py``.
    apply = torch._C._FunctionBase.__dict__["apply"]

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor | None, bias: Tensor | None, held: tuple, call: AgainNormed, *state: Tensor
    ) -> Any:  # fmt: skip
        norm, flag = held
        made, more = call.normed(y, norm, flag, state)
        if call.layouts is None:
            call.layouts = layouts((y, *more, *state))
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, *more, *state)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        gy, gweight, gbias, *gstate = ctx.call.backward(ctx, grads)
        return gy, gweight, gbias, None, None, *gstate


_apply = _AgainNormed.apply


def again_normed(
    key: Any, y: Tensor, norm: BatchNorm, neuron: Neuron, state: tuple[Tensor, ...], own: Sequence[Entries]
) -> AgainNormed | None:
    """The call that was just made, by the key that it is known by; None where it is not of this sort."""
    ready, want = recall(key), neuron.want
    if ready is None or ready.numbers is None or not (ready.laid and ready.together and ready.in_place):
        return None
    flat, sequence = y.is_contiguous(), y.detach()
    if want & (WANT_PACKED | WANT_H) or neuron.pool != ready.pool or norm.group is not None or not want & WANT_SPIKES:
        return None
    if not y.numel() or layout.is_static(sequence):
        return None
    if (state or want & WANT_STATE) and not suits(y, sequence, state):
        return None
    tensors = (y, *state, norm.weight, norm.bias)
    differentiable = needs_grad(*tensors)
    if (differentiable and not y.requires_grad) or (len(neuron.spec.row.states) > 1 and not flat):
        return None
    fixed = ready.fixed.get(wanted_with(sequence, neuron.spec, want, differentiable))
    if fixed is None or fixed.prepared is None or neuron.flag is None:
        return None
    affine = torch.empty((3, fixed.channels), dtype=torch.float32, device=y.device)
    v0 = stacked([t.detach() for t in state])
    inputs = fixed.prepared.inputs(sequence, v0, None, affine, None, None, False)
    same = Same(torch.is_grad_enabled(), own, (y, neuron.flag, *norm[:5], *state))
    return AgainNormed(y, state, fixed, want, inputs, same, differentiable, norm)


def _launchers(inputs: LIFInputs, fixed: Fixed, norm: BatchNorm) -> tuple[Callable, Callable, Callable]:
    """What launches the statistics (finished; running ones are only that) of y and tensors in the order of
    ``csrc/norm/fields.h``, the forward pass and the backward pass of tensors in that of ``csrc/lif/fields.h``, the
    latter with those that finish its sums."""
    prepared = fixed.prepared
    assert prepared is not None
    running, weight, bias = fixed.samples == 0, norm.weight, norm.bias
    finish = Finish(weight, bias, *norm[2:5], norm.eps, norm.momentum, fixed.samples)
    made = prepared.run.get("batch_norm_lif_again")
    if made is not None:
        return made(inputs, finish, fixed.channels)
    run, inner, samples, eps, momentum = prepared.run, inputs.inner, fixed.samples, norm.eps, norm.momentum

    def first(y: Tensor, tensors: tuple) -> None:
        mean, var, weight, bias, running_mean, running_var, batches, *out = tensors
        finish = Finish(weight, bias, running_mean, running_var, batches, eps, momentum, samples)
        if running:
            run["batch_norm_lif_finish"](mean, var, finish, Finished(*out))
        else:
            run["batch_norm_lif_affine"](y, inner, finish, Finished(*out))

    others: list[Any]
    _, _, _, scalars, spec, _, _, *others = inputs  # and no tensor

    def told(y: Tensor, v0: Tensor | None, affine: Tensor) -> LIFInputs:
        return LIFInputs(y, v0, None, scalars, spec, inner, Norm(affine, None), *others)

    def forward(tensors: tuple) -> None:
        y, v0, _, affine, _, s, v, last, edges, packed, flag = tensors
        run["lif_forward"](told(y, v0, affine), LIFForward(s, v, last, edges, flag, packed))

    def backward(tensors: tuple, finish: tuple | None) -> None:
        y, v0, _, affine, _, _, _, _, edges, _, _, gs, gv, last, coef, gx, *others = tensors
        gv0, sums = others[0] if others else None, others[2] if others else None
        norm = None
        if finish is not None:
            *_, affine, moments, made, _, _, gweight, gbias = finish
            norm = NormGrads(affine, moments, samples, made, gweight, gbias)
        run["lif_backward"](
            told(y, v0, affine), edges, LIFGrads(gs, gv, last, coef), LIFBackward(gx, gv0, None, sums), norm
        )

    return first, forward, backward
