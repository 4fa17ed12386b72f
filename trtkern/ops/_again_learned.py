"""Calls of a neuron with learned parameters that are made again on a CPU (``ops/_again.py``).

The tensors go to the Function as they are. It puts them together with the numbers, looks at what they hold, and takes
the gradient of each out of the kernel's. In the ordinary way ``stack`` and autograd do that, with several operations
for each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trtkern.ops import checks
from trtkern.ops._again import Again, Asked, empty_like, stacked, suits
from trtkern.ops._known import recall
from trtkern.ops._library import apply, needs_grad, once
from trtkern.ops._prepared import (
    NEED_PARAMS,
    NEED_V0,
    WANT_H,
    WANT_PACKED,
    WANT_SPIKES,
    WANT_STATE,
    WANT_V,
    wanted_with,
)
from trtkern.ops._same import Entries, Same
from trtkern.ops._saved import layouts, restored
from trtkern.ops.checks import Number
from trtkern.ops.lif import _LIFBackward
from trtkern.spec import LIFSpec


class AgainLearned(Again):
    """A call that was made before.

    Args:
        values: the parameters of that call by name, tensors among them; the names are those of the neuron's rows.
        channels: those of a parameter tensor [P, C].
    """

    __slots__ = ("_fill", "_numbers", "_parameters", "_shapes", "_which", "learned")

    def __init__(self, values: dict[str, Number], channels: int, *told: Any) -> None:
        super().__init__(*told)
        self.learned = tuple(name for name, value in values.items() if isinstance(value, Tensor))
        names = list(values)
        self._which = [names.index(name) for name in self.learned]
        self._shapes = [values[name].shape for name in self.learned]  # type: ignore[union-attr]
        rows = [
            (i, shape.numel(), checks.allowed(name))
            for name, i, shape in zip(self.learned, self._which, self._shapes, strict=True)
        ]
        numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values.values()]
        self._fill = self._fixed.prepared.run["lif_parameters"](numbers, rows, channels).fill
        self._parameters = partial(torch.empty, (len(values), channels), dtype=torch.float32, device="cpu")
        if needs_grad(*(values[name] for name in self.learned)):  # type: ignore[arg-type]
            self._needs += NEED_PARAMS

    def __call__(  # type: ignore[override]
        self, x: Tensor, flag: Tensor, learned: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> Any:
        """The outputs that are wanted, as ``Again`` gives them."""
        if self.differentiable:
            return _apply(x, flag, self, *learned, *state)
        return self.run(x, flag, learned, state)[0]

    def run(
        self, x: Tensor, flag: Tensor, learned: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Any, Tensor | None, Tensor]:
        """The same without autograd, the states between chunks and the parameters."""
        params = self._parameters()
        if not self._fill(params, learned):
            self._fixed.prepared.look(params)
        want = self.want
        s = empty_like(x) if want & WANT_SPIKES else None
        v = empty_like(x) if want & (WANT_V | WANT_H) else None
        last = self._room() if want & WANT_STATE else None
        edges = None if self._edges is None else self._edges()
        self._forward((x, self._joined(state), params, None, None, s, v, last, edges, None, flag))
        return self._given(s, v, last), edges, params

    def backward(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of x, of each learned parameter and of each state."""
        saved = ctx.saved_tensors
        if self._back is None or not self._back.fits((), (*saved, *grads)):
            return self._ordinary(ctx, saved, grads)
        x, edges, params, *state = saved
        gs, gv, *last = self._by_name(grads)
        gx = empty_like(x)
        gv0 = self._room() if self._needs & NEED_V0 else None
        gparams = self._parameters() if self._needs & NEED_PARAMS else None
        self._backward((
            x, self._joined(state), params, None, None, None, None, None, edges, None, None,
            gs, gv, self._joined(last), None, gx, gv0, gparams,
        ))  # fmt: skip
        return gx, *self._of_learned(gparams), *self._apart(gv0, len(state))

    def _of_learned(self, gparams: Tensor | None) -> Sequence[Tensor | None]:
        if gparams is None:
            return (None,) * len(self.learned)
        found = []
        for i, shape in zip(self._which, self._shapes, strict=True):
            row = gparams[i]
            if shape.numel() != len(row):  # one number for all channels
                row = row.unsqueeze(0).sum(1)
            found.append(row if row.shape == shape else row.view(shape))
        return found

    def _ordinary(self, ctx: Any, given_back: tuple, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        assert self.layouts is not None
        saved = restored(given_back, self.layouts)
        x, edges, params, *state = saved
        gs, gv, *last = self._by_name(grads)
        if once(*saved, *grads) and self._aligned(x, gs, gv, last):
            self._back = Same(False, (), (*given_back, *grads))
        if self.step:
            x, gs, gv = x.unsqueeze(0), *(None if g is None else g.unsqueeze(0) for g in (gs, gv))
        v0, gv_final = stacked(state), stacked(last)
        needs, fixed = self._needs, self._fixed
        if once(gs, gv, gv_final, x, v0, params):
            gx, gv0, gparams, *_ = fixed.prepared.backward(
                x, v0, params, None, None, None, edges, gs, gv, gv_final, None, None, 0, None, needs
            )
        else:
            # So that a second derivative is refused, also where nothing else here needs a gradient.
            params = params.detach().requires_grad_(torch.is_grad_enabled())
            gx, gv0, gparams = apply(_LIFBackward, "lif", gs, gv, gv_final, x, v0, params, None, edges, fixed, needs)
        parts: Sequence[Tensor | None] = (None,) * len(state)
        if needs & NEED_V0:
            parts = (gv0,) if self._states == 1 else gv0.unbind(0)
        learned = self._of_learned(gparams if needs & NEED_PARAMS else None)
        return gx[0] if self.step else gx, *learned, *parts


class _AgainLearned(torch.autograd.Function):
    # As that of ``ops/_again.py``.
    apply = torch._C._FunctionBase.__dict__["apply"]

    @staticmethod
    def forward(ctx: Any, x: Tensor, flag: Tensor, call: AgainLearned, *tensors: Tensor) -> Any:
        count = len(call.learned)
        state = tensors[count:]
        made, edges, params = call.run(x, flag, tensors[:count], state)
        if call.layouts is None:
            call.layouts = layouts((x, edges, params, *state))
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, edges, params, *state)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        gx, *others = ctx.call.backward(ctx, grads)
        return gx, None, None, *others


_apply = _AgainLearned.apply


def again_learned(
    key: Any, x: Tensor, flag: Tensor, values: dict[str, Number], state: tuple[Tensor, ...], step: bool, spec: LIFSpec,
    want: int, own: Sequence[Entries], asked: Asked = (),
) -> AgainLearned | None:  # fmt: skip
    """The call that was just made, by the key that it is known by; None where it is not of this sort.

    Args:
        values: of the neuron's rows, in their order.
    """
    ready = recall(key)
    if ready is None or ready.numbers is not None or not ready.plain or ready.backend != "cpu" or want & WANT_PACKED:
        return None
    ranges = spec.row.ranges or {}  # of a user's own neuron they may be any, and the call is made in the ordinary way
    if any(name in ranges for name, value in values.items() if isinstance(value, Tensor)):
        return None
    sequence = x.detach().unsqueeze(0) if step else x.detach()
    learned = tuple(value for value in values.values() if isinstance(value, Tensor))
    if not suits(x, sequence, state) or any(t.dtype != torch.float32 or not t.is_contiguous() for t in learned):
        return None
    differentiable = needs_grad(x, *state, *learned)
    fixed = ready.fixed.get(wanted_with(sequence, spec, want, differentiable))
    if fixed is None or fixed.prepared is None:
        return None
    axis = fixed.channels.axis
    channels = 1 if axis is None else sequence.shape[axis]
    v0, params = stacked([t.detach() for t in state]), torch.empty((len(values), channels), dtype=torch.float32)
    inputs = fixed.prepared.inputs(sequence, v0, params, None, None, None, bool(want & WANT_H))
    same = Same(torch.is_grad_enabled(), own, (x, flag, *learned, *state), asked)
    return AgainLearned(values, channels, x, state, step, fixed, want, inputs, same, differentiable)
