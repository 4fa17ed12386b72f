"""Learned numbers that cannot leave their range."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trtkern.ops import checks
from trtkern.ops.checks import Number

KINDS = ("sigmoid", "softplus", "clamp")


class Bounded(nn.Module):
    """A learned parameter of a neuron that stays in its range whatever the optimiser does: ``LIF(decay=Bounded(0.9))``.

    What is trained is ``raw``; the neuron gets, computed in float32 (float64 for float64)::

        sigmoid    low + (high - low) * sigmoid(raw)    strictly inside at the start; saturates towards both ends
        softplus   low + log(1 + exp(raw))              no upper end: for a threshold
        clamp      min(max(raw, low), high)             reaches both ends; the gradient is 1, but at an end 0 where
                                                        it would lead further out, so that it comes back

    Args:
        value: what the parameter starts with: a number, or a tensor of shape [] or [C].
        kind: "sigmoid", "softplus" or "clamp".
        low, high: the range; high is 1, with "softplus" always infinite. "clamp" takes infinite ends.

    The state dict has ``decay.raw`` for ``LIF(decay=Bounded(...))``. ``layer.decay()`` is the value of the moment.

    Raises:
        TypeError, ValueError: an unknown kind, a range without room, a value that is not in it.
    """

    def __init__(self, value: Number, kind: str = "sigmoid", *, low: float = 0.0, high: float | None = None) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"Bounded: expected kind to be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "softplus" and high not in (None, math.inf):
            raise ValueError(f'Bounded: expected no high with "softplus", got high={high!r}; use "sigmoid" or "clamp"')
        self.kind = kind
        self.low, self.high = _range(kind, low, high)
        checks.held_parameter("Bounded", "value", value)
        # Kept for reset_parameters: no buffer, since a state dict has no use for it.
        if isinstance(value, Tensor):
            self._start, raw = value.detach().clone(), torch.empty_like(value)
        else:
            self._start, raw = torch.tensor(float(value), device="cpu"), torch.empty(())
        self.raw = nn.Parameter(raw)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """raw as it was at first; it stays without a value where that was given on "meta"."""
        if self._start.is_meta:
            return
        with torch.no_grad():
            self.raw.copy_(self._inverse(self._start.double()))

    def forward(self) -> Tensor:
        """The value, with a gradient to ``raw``."""
        raw = self.raw.float() if self.raw.dtype.itemsize < 4 else self.raw
        if self.kind == "clamp":
            return _Clamp.apply(raw, self.low, self.high)
        if self.kind == "softplus":
            return self.low + F.softplus(raw)
        # lerp is exact at both ends: rounding leads out of no range.
        return torch.lerp(raw.new_full((), self.low), raw.new_full((), self.high), torch.sigmoid(raw))

    def _inverse(self, value: Tensor) -> Tensor:
        low, high = value.aminmax()
        inside = self.low <= low and high <= self.high if self.kind == "clamp" else self.low < low and high < self.high
        if not inside:
            ends = "from" if self.kind == "clamp" else "strictly between"
            raise ValueError(
                f"Bounded: expected value to be {ends} {self.low:g} {'to' if self.kind == 'clamp' else 'and'} "
                f"{self.high:g}, got {low.item():g} to {high.item():g}; pass low and high"
            )
        if self.kind == "clamp":
            return value
        value = value - self.low
        if self.kind == "softplus":
            return value + torch.log(-torch.expm1(-value))
        return torch.logit(value / (self.high - self.low))

    def extra_repr(self) -> str:
        """How it is bounded, and how many numbers it is."""
        return f"kind={self.kind!r}, low={self.low:g}, high={self.high:g}, shape={list(self.raw.shape)}"


def _range(kind: str, low: float, high: float | None) -> tuple[float, float]:
    if high is None:
        high = math.inf if kind == "softplus" else 1.0
    for name, end in (("low", low), ("high", high)):
        if isinstance(end, bool) or not isinstance(end, (int, float)):
            raise TypeError(f"Bounded: expected {name} to be a number, got {checks.describe(end)}")
    finite = {"sigmoid": (low, high), "softplus": (low,), "clamp": ()}[kind]
    if not low < high or not all(math.isfinite(end) for end in finite):
        raise ValueError(f"Bounded: expected low < high, finite with {kind!r}, got low={low!r} and high={high!r}")
    return float(low), float(high)


class _Clamp(torch.autograd.Function):
    """Clamp whose gradient leads back in: 0 only where a step against it would go further out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(raw: Tensor, low: float, high: float) -> Tensor:
        return raw.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        raw, ctx.low, ctx.high = inputs
        ctx.save_for_backward(raw)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (raw,) = ctx.saved_tensors
        (g,) = grads
        outward = ((raw <= ctx.low) & (g > 0)) | ((raw >= ctx.high) & (g < 0))
        return torch.where(outward, torch.zeros_like(g), g), None, None
