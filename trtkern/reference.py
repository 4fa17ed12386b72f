"""The oracle: every neuron as a readable time loop in torch, differentiated by autograd. Never optimised.

Everything else in this package is tested against these functions. They run in any floating dtype (float64 for tests),
on any device, and support second derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import neurons, surrogates
from trtkern._torch import within
from trtkern.expressions import rebind
from trtkern.spec import LIFSpec

__all__ = [
    "Taps", "Trace", "advance", "average_pool", "batch_norm", "delay", "delay_taps", "lif", "recurrent",
    "regularizer", "spike_conv", "spike_conv_input_grad", "spike_conv_weight_grad", "spikes_pack", "spikes_unpack",
    "statistics", "surrogate_derivative",
]  # fmt: skip


class Trace(NamedTuple):
    """Spikes s, potentials v after the reset and h before the firing, each [T, ...]; state: after the last step."""

    s: Tensor
    """Spikes, [T, ...]."""
    v: Tensor
    """Potentials after the reset, [T, ...]."""
    h: Tensor
    """Potentials before the firing, [T, ...]."""
    state: Tensor
    """[...]; of a neuron with several states [S, ...]."""


def _exp(x: Tensor | float) -> Any:
    return torch.exp(x) if isinstance(x, Tensor) else surrogates.exp(x)  # of a parameter that is a number


def _maximum(a: Tensor | float, b: Tensor | float) -> Any:
    if not isinstance(a, Tensor):
        return _maximum(b, a) if isinstance(b, Tensor) else surrogates.maximum(a, b)
    # No constant of its own for a number: torch's scan takes none.
    return torch.maximum(a, b.to(a) if isinstance(b, Tensor) else torch.full_like(a, b))


def _where(condition: Any, a: Tensor | float, b: Tensor | float) -> Any:
    """a where the condition holds, b elsewhere. A spike is a condition too, with the derivative a - b."""
    if not isinstance(condition, Tensor):  # of numbers
        return a if condition else b
    if condition.dtype == torch.bool:
        return torch.where(condition, a, b)
    s = condition
    a, b = (torch.as_tensor(each, dtype=s.dtype, device=s.device) for each in (a, b))
    difference = a - b
    # A potential of +inf fires and is reset: what is multiplied by 0 must not be inf.
    finite = torch.where(torch.isfinite(difference), difference, torch.zeros_like(difference))
    return torch.where(s > 0, a, b) + (s - s.detach()) * finite


NAMES = {
    "fma": lambda a, b, c: a * b + c,
    "exp": _exp,
    "abs": abs,
    "maximum": _maximum,
    "where": _where,
}
"""What the names of ``trtkern.expressions.CALLS`` mean for tensors."""


@cache
def _derivative(name: str) -> Any:
    return rebind(surrogates.lookup(name).function, NAMES)


_STEPS: dict[tuple[str, str], tuple[Any, ...]] = {}
"""Charge, fire and settle of every neuron and reset; made at once: torch.compile traces no making of functions."""


def _keep(row: neurons.Neuron) -> None:
    for reset, settle in row.settle.items():
        _STEPS[row.name, reset] = tuple(rebind(function, NAMES) for function in (row.charge, row.fire, settle))


neurons.each(_keep)


def steps(neuron: str, reset: str) -> tuple[Any, ...]:
    """Charge, fire and settle of a neuron, over tensors."""
    return _STEPS[neuron, reset]


def surrogate_derivative(u: Tensor, name: str, alpha: float) -> Tensor:
    """dsigma/du of the named surrogate at ``u``, in u's dtype.

    Args:
        u: potential less threshold, any shape.
        name: of the surrogate.
        alpha: its sharpness.
    """
    return _derivative(surrogates.lookup(name).name)(u, torch.as_tensor(alpha, dtype=u.dtype))


def _slope(u: Tensor, name: str, alpha: float) -> Tensor:
    # A NaN potential has a NaN derivative, also where the surrogate is a constant there.
    return torch.where(torch.isnan(u), u, surrogate_derivative(u, name, alpha))


class _Spike(torch.autograd.Function):
    """1 where u > 0, else 0; backward multiplies by the surrogate derivative, which stays differentiable."""

    @staticmethod
    def forward(u: Tensor, name: str, alpha: float) -> Tensor:
        return (u > 0).to(u.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        u, ctx.name, ctx.alpha = inputs
        ctx.save_for_backward(u)
        ctx.save_for_forward(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (u,) = ctx.saved_tensors
        return grads[0] * _slope(u, ctx.name, ctx.alpha), None, None


class _SpikeInBothModes(_Spike):
    """The same with a forward mode, for eager code: torch.compile traces no Function that has one."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        with within(ctx.saved_tensors) as (u,):
            return tangents[0] * _slope(u, ctx.name, ctx.alpha)


def spike(u: Tensor, spec: LIFSpec, known: Tensor) -> Tensor:
    """``known``, the spikes of u as somebody else found them, with the surrogate derivative, in both modes."""
    own = _SpikeInBothModes.apply(u, spec.surrogate, spec.alpha)
    return known + (own - own.detach())


def live(x: Tensor, lengths: Tensor) -> Tensor:
    """Which numbers of x [T, B, ...] lie within the steps of their samples, of which there are lengths [B]."""
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1) < lengths
    return steps.view(*steps.shape, *[1] * (x.dim() - 2))


def _run(
    x: Tensor,
    v0: Tensor | None,
    params: Sequence[Tensor | float],
    spec: LIFSpec,
    lengths: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Of every step: potential - threshold, the spikes, the trace and the state after it."""
    row, single = spec.row, len(spec.row.states) == 1
    charge, fire, settle = steps(spec.neuron, spec.reset)
    state = tuple([torch.zeros_like(x[0])] * len(row.states)) if v0 is None else (v0,) if single else v0.unbind(0)
    spike = _Spike if torch.compiler.is_compiling() else _SpikeInBothModes
    within = None if lengths is None else live(x, lengths)
    for t, current in enumerate(x.unbind(0)):
        before = state
        if within is not None:  # behind the end it runs on zeros, so that nothing there is infinite
            current, state = _masked(within[t], current), tuple(_masked(within[t], each) for each in state)
        trace = charge(current, state, params)
        potential, threshold = fire(trace, params)
        u = potential - threshold
        s = spike.apply(u, spec.surrogate, spec.alpha)
        state = settle(trace, s > 0 if spec.detach_reset else s, params)
        if within is not None:
            s, trace = _masked(within[t], s), tuple(_masked(within[t], each) for each in trace)
            state = tuple(torch.where(within[t], new, old) for new, old in zip(state, before, strict=True))
        yield u, s, trace, state


def advance(
    current: Tensor, state: tuple[Tensor, ...], params: Sequence[Tensor | float], spec: LIFSpec
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One step without gradients: whether it fired, as a condition, the trace and the state after it.

    Args:
        current: the input current of the step, [...].
        state: the parts of the state before it, [...] each.
        params: the parameters in the order of the neuron's row, numbers or tensors that broadcast.
        spec: the choices of the neuron.
    """
    charge, fire, settle = steps(spec.neuron, spec.reset)
    trace = charge(current, state, params)
    potential, threshold = fire(trace, params)
    fired = potential > threshold
    return fired, trace, settle(trace, fired, params)


def _masked(condition: Tensor, value: Tensor) -> Tensor:
    return torch.where(condition, value, torch.zeros_like(value))


def lif(
    x: Tensor,
    v0: Tensor | None,
    params: Sequence[Tensor | float],
    spec: LIFSpec,
    lengths: Tensor | None = None,
) -> Trace:
    """The neuron that ``spec`` names, step by step: charge, fire, settle (``trtkern.neurons``).

    Args:
        x: [T, ...] input current.
        v0: the state before the first step, [...], of a neuron with several states [S, ...]; None is zero.
        params: the neuron's parameters in the order of its row: numbers, or tensors that broadcast with x[0].
        spec: neuron, reset, surrogate, alpha, detach_reset.
        lengths: [B], the steps of each sample of x [T, B, ...]; None: each has T. Behind them s, v and h are 0, and the
            state stays as it is.

    Returns:
        Trace: s, v, h, each [T, ...], and the last state, in x's dtype.
    """
    row = spec.row
    spikes, potentials, charges = [], [], []
    for _, s, trace, state in _run(x, v0, params, spec, lengths):
        spikes.append(s)
        potentials.append(state[row.membrane])
        charges.append(trace[row.potential])
    last = state[0] if len(row.states) == 1 else torch.stack(state)
    v = torch.stack(potentials)
    return Trace(
        torch.stack(spikes), v if lengths is None else _masked(live(x, lengths), v), torch.stack(charges), last
    )


def recurrent(
    x: Tensor,
    s0: Tensor | None,
    v0: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    params: Sequence[Tensor | float],
    spec: LIFSpec,
    known: Tensor | None = None,
) -> Trace:
    """Neurons that feed each other: current[t] = x[t] + s[t-1] weight^T + bias, then the neuron's step.

    Args:
        x: [T, B, N].
        s0: [B, N], the spikes before the first step, None is zero.
        v0, params, spec: as in ``lif``.
        weight: [N, N], from neuron k to neuron j at [j, k].
        bias: [N], or None.
        known: [T, B, N], the spikes as somebody else found them: what is compared with those goes on from them, so
            that a potential that lies on its threshold to within a rounding is no other sequence.

    Returns:
        Trace: s, v, h, each [T, B, N], and the last state.
    """
    row, single = spec.row, len(spec.row.states) == 1
    charge, fire, settle = steps(spec.neuron, spec.reset)
    state = tuple([torch.zeros_like(x[0])] * len(row.states)) if v0 is None else (v0,) if single else v0.unbind(0)
    s = torch.zeros_like(x[0]) if s0 is None else s0
    spikes, potentials, charges = [], [], []
    for t, given in enumerate(x.unbind(0)):
        trace = charge(given + torch.nn.functional.linear(s, weight, bias), state, params)
        potential, threshold = fire(trace, params)
        if known is None:
            s = (_Spike if torch.compiler.is_compiling() else _SpikeInBothModes).apply(
                potential - threshold, spec.surrogate, spec.alpha
            )
        else:
            s = spike(potential - threshold, spec, known[t])
        state = settle(trace, s > 0 if spec.detach_reset else s, params)
        spikes.append(s)
        potentials.append(state[row.membrane])
        charges.append(trace[row.potential])
    last = state[0] if single else torch.stack(state)
    return Trace(torch.stack(spikes), torch.stack(potentials), torch.stack(charges), last)


def differences(x: Tensor, v0: Tensor | None, params: Sequence[Tensor | float], spec: LIFSpec) -> Tensor:
    """potential - threshold of every step, [T, ...]: where the neuron fires, and what the surrogate is taken at."""
    return torch.stack([u for u, *_ in _run(x, v0, params, spec)])


def batch_norm(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    axis: int,
) -> Tensor:
    """weight * (y - mean) * rstd + bias (+ residual), computed in float64.

    Args:
        y, residual: [T, ...].
        mean, rstd, weight, bias: [C], along ``axis`` of y.
        axis: that of the channels.
    """
    shape = [-1, *[1] * (y.dim() - axis - 1)]
    x = (y.double() - mean.double().view(shape)) * rstd.double().view(shape)
    if weight is not None:
        x = x * weight.double().view(shape)
    if bias is not None:
        x = x + bias.double().view(shape)
    return x if residual is None else x + residual.double()


def statistics(y: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all axes but ``axis``, [C] float64.

    Args:
        y: any shape, with the channels on ``axis``.
        axis: that of the channels.
    """
    var, mean = torch.var_mean(y.double(), [a for a in range(y.dim()) if a != axis], correction=0)
    return mean, var


def average_pool(s: Tensor) -> Tensor:
    """2x2 averages over the last two axes of [..., H, W]; an odd last row or column is dropped.

    Args:
        s: [..., H, W].
    """
    return torch.nn.functional.avg_pool2d(s.flatten(0, 1), 2).unflatten(0, s.shape[:2])


def spikes_pack(s: Tensor) -> Tensor:
    """[T, ...] spikes as uint8 [ceil(T / 8), ...]: bit t % 8 of plane t // 8 is whether s[t] is not 0.

    Args:
        s: [T, ...] of 0 and 1.
    """
    planes = []
    for steps in s.split(8):
        bits = [(step != 0).to(torch.uint8) << t for t, step in enumerate(steps)]
        planes.append(torch.stack(bits).sum(0, dtype=torch.uint8))
    return torch.stack(planes)


def spikes_unpack(words: Tensor, start: int, steps: int, dtype: torch.dtype) -> Tensor:
    """Steps start to start + steps - 1 of what ``spikes_pack`` made, [steps, ...].

    Args:
        words: uint8 [ceil(T / 8), ...].
        start: the first step.
        steps: how many.
        dtype: of what comes out.
    """
    return torch.stack([(words[t // 8] >> (t % 8) & 1).to(dtype) for t in range(start, start + steps)])


def _spike_images(conv: Any, dtype: torch.dtype) -> Tensor:
    """What is convolved, [T * B, C, H, W], of a ``trtkern.backends.base.SpikeConvolution``."""
    words = conv.words if conv.words.dim() == 6 else conv.words[None]
    spikes, *others = (spikes_unpack(each, 0, conv.timesteps, dtype) for each in words)
    for other in others:
        spikes = spikes + other
    return (average_pool(spikes) if conv.pooled else spikes).flatten(0, 1)


def spike_conv(conv: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of packed spikes: they are unpacked, and torch convolves them.

    Args:
        conv: ``trtkern.backends.base.SpikeConvolution``.
        weight: [K, C, kernel_h, kernel_w].
        bias: [K], or None.

    Returns:
        [T * B, K, out_h, out_w].
    """
    images = _spike_images(conv, weight.dtype)
    return torch.nn.functional.conv2d(images, weight, bias, conv.stride, conv.padding)


def spike_conv_weight_grad(conv: Any, g: Tensor, weight: Tensor) -> Tensor:
    """The gradient of ``weight`` from that of ``spike_conv``, g [T * B, K, out_h, out_w]; of weight's shape.

    Args:
        conv: how the spikes lie in the words, and stride and padding (``SpikeConvolution``).
        g: the gradient of the output, [T * B, K, H, W].
        weight: [K, C, kH, kW], of which the shape alone matters.
    """
    images = _spike_images(conv, g.dtype)
    _, gweight, _ = torch.ops.aten.convolution_backward(
        g, images, weight, None, conv.stride, conv.padding, (1, 1), False, (0, 0), 1, (False, True, False)
    )
    return gweight


def spike_conv_input_grad(conv: Any, g: Tensor, weight: Tensor) -> Tensor:
    """The gradient of what is convolved, [T * B, C, H, W], from that of ``spike_conv``, g [T * B, K, out_h, out_w].

    Args:
        conv: how the spikes lie in the words, and stride and padding (``SpikeConvolution``).
        g: the gradient of the output, [T * B, K, H, W].
        weight: [K, C, kH, kW].
    """
    shape = (g.shape[0], weight.shape[1], *conv.image)
    images = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
    gx, _, _ = torch.ops.aten.convolution_backward(
        g, images, weight, None, conv.stride, conv.padding, (1, 1), False, (0, 0), 1, (True, False, False)
    )
    return gx


class Taps(NamedTuple):
    """What a delay reads at each step: near = x[t - k] and far = x[t - k - 1], both [T, ...], and the share of far."""

    near: Tensor
    """x[t - k], [T, ...]."""
    far: Tensor
    """x[t - k - 1], [T, ...]."""
    share: Tensor
    """f, where the delay is k + f steps; it broadcasts with x[0]."""


def delay_taps(x: Tensor, delays: Tensor, v0: Tensor | None, most: int, rounded: bool = False) -> Taps:
    """What ``delay`` mixes, of the same arguments.

    Args:
        x: [T, ...].
        delays: steps, which broadcast with x[0].
        v0: the ``most`` steps before x, or None for zeros.
        most: the most steps that a delay may have.
        rounded: whether delays are rounded to whole steps.
    """
    held = delays.detach().clamp(0, most)
    whole = torch.nan_to_num(held.floor()).clamp(max=max(most - 1, 0))
    share = delays - whole
    if rounded:  # the share is 0 or 1, and its gradient what it was
        share = share + ((share >= 0.5).to(share.dtype) - share).detach()
    before = x.new_zeros((most + 1, *x.shape[1:]))
    if v0 is not None:
        before = torch.cat([before[:1], v0])
    line, steps = torch.cat([before, x]), torch.arange(x.shape[0], device=x.device)
    at = steps.view(-1, *[1] * (x.dim() - 1)) - whole.to(torch.int64)  # [T, ...], as it broadcasts with x
    near, far = (line.gather(0, (at + late).expand(x.shape)) for late in (most + 1, most))
    return Taps(near, far, share)


def delay(x: Tensor, delays: Tensor, v0: Tensor | None, most: int, rounded: bool = False) -> Tensor:
    """y[t] = (1 - f) x[t - k] + f x[t - k - 1], the delay being k + f steps, 0 <= f < 1, or f = 1 where it is ``most``.

    The derivative by the delay is x[t - k - 1] - x[t - k].

    Args:
        x: [T, ...].
        delays: from 0 to ``most``; they broadcast with x[0].
        v0: [most, ...], the steps before the first one, the last of them last; None: zeros.
        most: no delay is longer.
        rounded: f is 0 or 1, whichever is nearer, with the derivative as if it were not.
    """
    near, far, share = delay_taps(x, delays, v0, most, rounded)
    rest = 1 - share
    # A share of 0 reads nothing: 0 * NaN is NaN. What is finite stays, for the derivative by the share.
    near = torch.where((rest == 0) & ~torch.isfinite(near), torch.zeros_like(near), near)
    far = torch.where((share == 0) & ~torch.isfinite(far), torch.zeros_like(far), far)
    return rest * near + share * far


def regularizer(weights: Sequence[Tensor], spec: Any) -> Tensor:
    """``R(w) = (lam / T) sum_t sum_w w^2 / (1 + (e^(delta t) - 1) (|w| + eps))``, a 0-dim tensor (arXiv 2506.19256).

    Args:
        weights: tensors of any shape and one floating dtype.
        spec: timesteps, lam, delta, eps (``trtkern.backends.base.RegularizerSpec``).
    """
    steps = []
    for t in range(spec.timesteps):
        # e^(delta t) - 1 may overflow, or be more than w's dtype holds: the term of that step is then 0.
        slope = surrogates.exp(spec.delta * t) - 1
        held = [w for w in weights if slope <= torch.finfo(w.dtype).max]
        if held:
            steps.append(sum((w.square() / (1 + slope * (w.abs() + spec.eps))).sum() for w in held))
    return torch.stack(steps).sum() * (spec.lam / spec.timesteps)
