"""Delays: each channel of a sequence by a number of steps of its own, whole or between two."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern._torch import recording
from trtkern.backends import choose, named
from trtkern.backends.base import DelayGrads, Delays
from trtkern.ops import checks, layout
from trtkern.ops._beneath import look, transformed
from trtkern.ops._library import apply, define, differentiated, keep_for_both, pushed, refuse_second_derivative
from trtkern.ops._mapped import Fold
from trtkern.ops._saved import kept
from trtkern.ops.checks import Number

__all__ = ["delay", "state_after"]

LONGEST = 2**24
"""Steps: float32 holds no larger whole numbers one by one."""


def delay(
    x: Tensor,
    delays: Number,
    v0: Tensor | None = None,
    *,
    max_delay: int,
    rounded: bool = False,
    channel_dim: int = 2,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y[t] = (1 - f) x[t - k] + f x[t - k - 1], where the delay of a channel is k + f steps, k whole and 0 <= f < 1.

    A whole delay is a shift, bit for bit. The derivative by a delay is x[t - k - 1] - x[t - k], the slope of the line
    that it lies on; at a whole delay that is the one towards longer delays, at ``max_delay`` the one towards shorter.

    Args:
        x: [T, ...] in float32, bfloat16 or float16 (float64 runs on the reference), any strides.
        delays: in steps, from 0 to ``max_delay``; a number, or a tensor of shape [] or [C], with gradient.
        v0: [max_delay, ...] in x's dtype: the steps before the first one, the last of them last; None: zeros.
        max_delay: no delay is longer.
        rounded: whole steps, f being 0 or 1, whichever is nearer (1/2 goes up); the derivative is the same slope.
        channel_dim: the axis of x that ``delays`` [C] belong to.
        lengths: int32 or int64 [B] for x [T, B, ...]: the steps of each sample, 0 to T. Behind its end nothing is read
            of a sample, and y is 0. None: each has T.
        backend: "auto", or one of ``trtkern.backends.NAMES``; a named backend runs or raises.

    Returns:
        y [T, ...] in x's dtype and layout, with gradients to x, ``delays`` and v0, once (twice with
        ``backend="reference"``). Forward mode is made of torch operations.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
    """
    op = "delay"
    checks.sequence(op, x)
    check_max_delay(op, max_delay)
    check_delays(op, delays, max_delay)
    check_state(op, v0, x, max_delay)
    checks.lengths(op, lengths, x)
    axis = checks.channel_axis(op, {"delay": delays}, channel_dim, x)
    chosen = choose(backend, op, x.device.type, x.dtype)
    if lengths is not None:
        checks.length_values(op, lengths, x)
        x = within(x, lengths)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(delays, Tensor):
        steps = delays.to(wide).reshape(-1)
    else:
        steps = torch.full((1,), float(delays), dtype=wide, device=x.device)
    if chosen == "reference":
        y = _reference(x, steps, v0, axis, max_delay, rounded)
    else:
        y = _fused(x, steps, v0, axis, max_delay, rounded, chosen)
    return y if lengths is None else within(y, lengths)


def state_after(x: Tensor, v0: Tensor | None, max_delay: int, lengths: Tensor | None = None) -> Tensor:
    """What ``v0`` is of the sequence that follows x: the last ``max_delay`` steps of v0 and x, of each sample up to its
    end; a tensor of its own.

    Args:
        x: the sequence, [T, B, C, ...].
        v0: the steps before it, [max_delay, B, C, ...]; None is zeros.
        max_delay: the most steps that a delay may have.
        lengths: int [B]: the steps of each sample; None: each has T.
    """
    steps = x.shape[0]
    if lengths is None and not recording() and steps >= max_delay:
        return x[steps - max_delay :].clone()
    before = x.new_zeros((max_delay, *x.shape[1:])) if v0 is None else v0
    line = torch.cat([before, x])
    if lengths is None:
        return line[steps:]
    at = torch.arange(max_delay, device=x.device).unsqueeze(1) + lengths
    return line.gather(0, at.view(*at.shape, *[1] * (x.dim() - 2)).expand(before.shape))


def within(x: Tensor, lengths: Tensor) -> Tensor:
    """x, and zeros behind the end of each sample."""
    return torch.where(reference.live(x, lengths), x, torch.zeros((), dtype=x.dtype, device=x.device))


def check_max_delay(op: str, max_delay: object) -> None:
    """A whole number of steps that float32 can count to."""
    if isinstance(max_delay, bool) or not isinstance(max_delay, int):
        raise TypeError(f"{op}: expected max_delay to be an int, a number of steps, got {checks.describe(max_delay)}")
    if not 0 <= max_delay <= LONGEST:
        raise ValueError(f"{op}: expected max_delay to be 0 to {LONGEST:,} steps, got {max_delay}")


def check_delays(op: str, delays: Number, max_delay: int, held: bool = False) -> None:
    """Delays are a number or a tensor [] or [C], each from 0 to ``max_delay``; of a tensor that is looked at where it
    does not wait for a GPU, or where a layer is made with it (``held``)."""
    checks.parameters(op, {"delay": delays})

    def bounded(low: float, high: float) -> None:
        if not 0 <= low <= high <= max_delay:  # NaN neither
            came = repr(low) if low == high or low != low else f"values from {low!r} to {high!r}"
            raise ValueError(
                f"{op}: expected delays from 0 to max_delay={max_delay} steps, got {came}; pass a larger max_delay, or "
                "clamp them: learned ones are held there by trtkern.nn.Bounded"
            )

    if not isinstance(delays, Tensor):
        bounded(float(delays), float(delays))
        return
    cheap = delays.device.type == "cpu" and not torch.compiler.is_compiling()
    if not delays.is_meta and (held or cheap or checks.debugging()):
        look(lambda delays: bounded(*(end.item() for end in delays.aminmax())), delays.detach())


def check_state(op: str, v0: Tensor | None, x: Tensor, max_delay: int) -> None:
    """v0 is None, or the ``max_delay`` steps before x."""
    if v0 is None:
        return
    shape = (max_delay, *x.shape[1:])
    if not isinstance(v0, Tensor):
        raise TypeError(
            f"{op}: expected v0 to be a tensor of shape {shape} or None, which is zeros, got {checks.describe(v0)}; "
            "pass what return_state=True gave"
        )
    checks.plain(op, "v0", v0)
    if v0.shape != shape or v0.device != x.device:
        raise ValueError(
            f"{op}: expected v0 of shape {shape} on {x.device}, the {max_delay} steps before the first one, got "
            f"{checks.describe(v0)}; pass what return_state=True gave"
        )
    if v0.dtype != x.dtype:
        raise TypeError(
            f"{op}: expected v0 in {x.dtype} like x, got {checks.describe(v0)}; convert it with v0.to({x.dtype})"
        )


def _along(steps: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Numbers of the channels, as they broadcast with x[0]."""
    return steps.view(-1, *[1] * (0 if axis is None else x.dim() - axis - 1))


def _reference(
    x: Tensor, steps: Tensor, v0: Tensor | None, axis: int | None, most: int, rounded: bool
) -> Tensor:  # fmt: skip
    wide = steps.dtype
    made = reference.delay(x.to(wide), _along(steps, x, axis), None if v0 is None else v0.to(wide), most, rounded)
    return made.to(x.dtype)


class _Fixed(NamedTuple):
    """What the Function is told besides tensors."""

    axis: int | None
    inner: int
    most: int
    rounded: bool
    reads: bool
    """Whether the backward pass, or a tangent, may read x and v0 again: for the delays."""
    backend: str


def _fused(
    x: Tensor, steps: Tensor, v0: Tensor | None, axis: int | None, most: int, rounded: bool, backend: str
) -> Tensor:  # fmt: skip
    # A delayed sequence is not the same at every step, so neither is what is read here.
    x = x.contiguous() if recording() or layout.is_static(x) else layout.dense(x)
    x, inner = (x, 1) if axis is None else layout.by_channel(x, axis)
    dual = pushed("delay", x, steps, v0)
    reads = steps.requires_grad or dual or transformed()  # which hides what needs a gradient
    fixed = _Fixed(axis, inner, most, rounded, reads, backend)
    if differentiated(x, steps, v0) or dual:
        return apply(_Delay, "delay", x, steps, v0, fixed)
    return _Delay.forward(x, steps, v0, fixed)


NEED_X, NEED_V0, NEED_DELAYS = 1, 2, 4
"""What a backward pass has to make."""


class _Delay(torch.autograd.Function):
    @staticmethod
    def forward(x, steps, v0, fixed):
        return delay_forward(x, steps, v0, fixed.inner, fixed.most, fixed.rounded, fixed.backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, steps, v0, ctx.fixed = inputs
        keep_for_both(ctx, (), *((x, steps, v0) if ctx.fixed.reads else (None, steps, None)))

    @staticmethod
    def tangents(ctx: Any, saved: tuple, *tangents: Tensor | None) -> Tensor:
        x, steps, v0 = saved
        d_x, d_steps, d_v0 = tangents[:3]
        return _tangent(x, steps, v0, d_x, d_steps, d_v0, ctx.fixed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, steps, v0 = kept(ctx)
        needs_x, needs_steps, needs_v0, _ = ctx.needs_input_grad
        needs = NEED_X * needs_x + NEED_V0 * needs_v0 + NEED_DELAYS * needs_steps
        gx, gv0, gsteps = apply(_DelayBackward, "delay", grads[0], steps, x, v0, ctx.fixed, needs)
        return gx if needs_x else None, gsteps if needs_steps else None, gv0 if needs_v0 else None, None


class _DelayBackward(torch.autograd.Function):
    @staticmethod
    def forward(g, steps, x, v0, fixed, needs):
        if needs & NEED_DELAYS:
            g, inner = layout.alike(g, x), fixed.inner
        else:  # nothing but g is read, which may lie as it came
            x, v0, g = None, None, g.contiguous() if recording() or layout.is_static(g) else layout.dense(g)
            inner = 1 if fixed.axis is None else g.stride(fixed.axis)
        return delay_backward(g, steps, x, v0, inner, fixed.most, fixed.rounded, needs, fixed.backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        refuse_second_derivative("delay")


def _tangent(
    x: Tensor, steps: Tensor, v0: Tensor | None, d_x: Tensor | None, d_steps: Tensor | None, d_v0: Tensor | None,
    fixed: _Fixed,
) -> Tensor:  # fmt: skip
    """That of y: y is linear in x and v0, and has a slope along each delay."""
    along, most = _along(steps, x, fixed.axis), fixed.most
    made = torch.zeros_like(x, dtype=torch.float32)
    if d_x is not None or d_v0 is not None:
        d_x = torch.zeros_like(x) if d_x is None else d_x
        made = reference.delay(d_x.float(), along, None if d_v0 is None else d_v0.float(), most, fixed.rounded)
    if d_steps is not None:
        near, far, _ = reference.delay_taps(x.float(), along, None if v0 is None else v0.float(), most, fixed.rounded)
        made = made + _along(d_steps, x, fixed.axis) * (far - near)
    return made.to(x.dtype)


def _before(v0: Tensor, x: Tensor) -> Tensor:
    """v0 in the layout of x."""
    return layout.aligned(v0, v0.shape, layout.strides(x), x.dtype, x)


def _forward(x, steps, v0, inner, most, rounded, backend):
    out = layout.empty(x)
    if out.numel():
        before = None if v0 is None or most == 0 else _before(v0, x)
        named(backend).ops["delay_forward"](x, before, Delays(steps.contiguous(), inner, most, rounded), out)
    return out


def _grads(g, steps, most, needs):
    """Room for the gradients of x, v0 and the delays."""
    gx = layout.empty(g) if needs & NEED_X else None
    gv0 = g.new_empty_strided((most, *g.shape[1:]), layout.strides(g)) if needs & NEED_V0 else None
    return gx, gv0, torch.empty_like(steps) if needs & NEED_DELAYS else None


def _backward(g, steps, x, v0, inner, most, rounded, needs, backend):
    gx, gv0, gsteps = _grads(g, steps, most, needs)
    if gsteps is not None and (most == 0 or not g.numel()):
        gsteps.zero_()
    if g.numel():
        before = None if v0 is None or most == 0 else _before(v0, g)
        wanted = DelayGrads(gx, gv0 if most else None, gsteps if most else None)
        named(backend).ops["delay_backward"](g, x, before, Delays(steps.contiguous(), inner, most, rounded), wanted)
    return gx, gv0, gsteps


def _forward_mapped(info, dims, x, steps, v0, inner, most, rounded, backend):
    fold = _fold(info, x, dims[0], steps, dims[1], inner)
    made = torch.ops.trtkern.delay_forward(
        fold.steps(x, dims[0]), _rows(fold, steps, dims[1]), fold.steps(v0, dims[2]),
        fold.inner, most, rounded, backend,
    )  # fmt: skip
    return fold.out_steps(made)


def _backward_mapped(info, dims, g, steps, x, v0, inner, most, rounded, needs, backend):
    # Each sample has a gradient of its own for the delays, and so its own delays.
    own = torch.ops.trtkern.delay_backward
    given = steps
    dim = dims[1]
    if needs & NEED_DELAYS and dim is None:
        given, dim = steps.expand(info.batch_size, *steps.shape), 0
    if dims[0] is None:
        g = g.expand(info.batch_size, *g.shape)
    at = 0 if dims[0] is None else dims[0]
    fold = _fold(info, g, at, given, dim, inner)
    gx, gv0, gsteps = own(
        fold.steps(g, at), _rows(fold, given, dim), fold.steps(x, dims[2]), fold.steps(v0, dims[3]),
        fold.inner, most, rounded, needs, backend,
    )  # fmt: skip
    made = [
        fold.out_steps(gx) if needs & NEED_X else (gx, None),
        fold.out_steps(gv0) if needs & NEED_V0 else (gv0, None),
    ]
    made.append(fold.out_channels(gsteps) if needs & NEED_DELAYS else (gsteps, None))
    return tuple(each for each, _ in made), tuple(axis for _, axis in made)


def _fold(info: Any, x: Tensor, dim: int | None, steps: Tensor, own: int | None, inner: int) -> Fold:
    count = None if own is None else steps.numel() // steps.shape[own]
    return Fold(x, dim, info.batch_size, count, inner)


def _rows(fold: Fold, steps: Tensor, dim: int | None) -> Tensor:
    """The delays of all samples together."""
    rows = fold.rows(steps.unsqueeze(0), None if dim is None else dim + 1)
    assert rows is not None
    return rows[0]


delay_forward = define(
    "delay_forward(Tensor x, Tensor delays, Tensor? v0, SymInt inner, SymInt most, bool rounded, str backend) "
    "-> Tensor",
    _forward,
    lambda x, steps, v0, inner, most, rounded, backend: layout.empty(x),
    _forward_mapped,
)
delay_backward = define(
    "delay_backward(Tensor g, Tensor delays, Tensor? x, Tensor? v0, SymInt inner, SymInt most, bool rounded, "
    "int needs, str backend) -> (Tensor gx, Tensor gv0, Tensor gdelays)",
    _backward,
    lambda g, steps, x, v0, inner, most, rounded, needs, backend: _grads(g, steps, most, needs),
    _backward_mapped,
)
