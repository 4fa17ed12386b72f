"""Neuron layers over whole sequences: stateless between calls, one kernel a direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.nn._leaf import is_proxy
from trtkern.nn._neuron import Neuron, spikes_of, wide
from trtkern.nn.bounded import Bounded
from trtkern.ops import checks
from trtkern.ops.checks import Number
from trtkern.ops.spikes import Spikes, packing
from trtkern.spec import LIFSpec


class Spiking(Neuron):
    """What the spiking neurons share: threshold, reset, surrogate, outputs. A subclass has ``decay`` and ``gain``."""

    def __init__(
        self,
        *,
        v_leak: Number | Bounded = 0.0,
        v_threshold: Number | Bounded = 1.0,
        v_reset: Number | Bounded | None = 0.0,
        reset_amount: Number | Bounded | None = None,
        surrogate: str | Callable = "triangle",
        alpha: float | None = None,
        detach_reset: bool = False,
        fire_on_equal: bool = False,
        packed: bool = False,
        time_dim: int = 0,
        channel_dim: int = 2,
        backend: str = "auto",
    ) -> None:
        reset = "soft" if v_reset is None else "hard"
        super().__init__(LIFSpec(reset, surrogate, alpha, detach_reset), time_dim, channel_dim, backend)
        if reset == "hard" and reset_amount is not None:
            raise ValueError(
                f"{type(self).__name__}: expected reset_amount with a soft reset only, got reset_amount="
                f"{reset_amount!r} and v_reset={v_reset!r}; pass v_reset=None"
            )
        self.packed, self.fire_on_equal = packed, fire_on_equal
        self._hold("v_leak", v_leak)
        self._hold("v_threshold", v_threshold)
        if fire_on_equal:
            checks.above_zero(type(self).__name__, self._value("v_threshold"))
        for name, value in {"v_reset": v_reset, "reset_amount": reset_amount}.items():
            if value is None:
                setattr(self, name, None)
            else:
                self._hold(name, value)

    def forward(
        self,
        x: Tensor,
        v0: Tensor | None = None,
        *,
        return_state: bool = False,
        return_v: bool = False,
        return_h: bool = False,
    ) -> Tensor | Spikes | tuple[Any, ...]:
        """Spikes [T, B, C, ...] in x's dtype (``Spikes`` when packed); with ``return_state`` also the final v,
        [B, C, ...] float32; with ``return_v`` also v after the reset of every step, or with ``return_h`` h before it
        (what snnTorch calls ``mem``), [T, B, C, ...] in x's dtype; gradients flow through all of them.

        Args:
            x: input current [T, B, C, ...] (the axes are ``time_dim`` and ``channel_dim``).
            v0: potential before the first step, x's shape without time, float32; None is zero.
        """
        if is_proxy(x):
            return self(x, v0, return_state=return_state, return_v=return_v, return_h=return_h)
        want = {
            "return_state": return_state,
            "return_v": return_v,
            "return_h": return_h,
            "return_packed": packing(self.packed),
        }
        out = self._run(x, v0, self.values(), fire_on_equal=self.fire_on_equal, **want)
        made = tuple(made for made in (spikes_of(out), out.state, out.v, out.h) if made is not None)
        return made if len(made) > 1 else made[0]

    def values(self) -> dict[str, Number]:
        """decay, gain, bias, reset_amount, v_threshold and v_reset, as ``trtkern.ops.lif`` takes them."""
        decay, v_threshold = self._value("decay"), self._value("v_threshold")
        return {
            "decay": decay,
            "gain": self._value("gain"),
            "bias": self._bias(decay),
            "reset_amount": v_threshold if self.reset_amount is None else self._value("reset_amount"),
            "v_threshold": v_threshold,
            "v_reset": 0.0 if self.v_reset is None else self._value("v_reset"),
        }

    def _settings(self) -> dict[str, object]:
        names = ("v_leak", "v_threshold", "v_reset", "reset_amount")
        spec = self.spec
        return {
            **{name: getattr(self, name) for name in names},
            "surrogate": spec.surrogate,
            "alpha": spec.alpha,
            "detach_reset": spec.detach_reset,
            **{name: True for name in ("fire_on_equal", "packed") if getattr(self, name)},
        }


class LIF(Spiking):
    """Leaky integrate-and-fire neurons: h[t] = decay * v[t-1] + gain * x[t] + (1 - decay) * v_leak, fire, reset.

    A neuron fires where h[t] > v_threshold. With the hard reset v[t] = v_reset where it fired; with ``v_reset=None``
    the reset is soft: v[t] = h[t] - reset_amount * s[t]. The defaults are the neuron of TRT with tau = 2
    (arXiv 2506.19256): decay 1/tau, the triangle surrogate, the gradient flowing through the reset.

    Args:
        decay: in [0, 1].
        gain: what the input is multiplied by.
        v_leak: the potential that v decays to.
        v_threshold: >= 0.
        v_reset: potential after a spike; None for the soft reset.
        reset_amount: what a soft reset subtracts; None is the threshold.
        surrogate: a name in ``trtkern.surrogates.TABLE`` or a function of ``(u, alpha)``.
        alpha: sharpness of the surrogate; None is its default.
        detach_reset: no gradient through the spike in the reset.
        fire_on_equal: fire where h[t] >= v_threshold, as SpikingJelly does; the threshold must then be above 0.
        packed: return ``Spikes``, which carry the T bits of every neuron: what ``SpikeConv2d`` keeps.
        time_dim, channel_dim: axes of x; per-channel parameters belong to ``channel_dim``.
        backend: "auto", or one of ``trtkern.backends.NAMES``.

    ``decay, gain, v_leak, v_threshold, v_reset, reset_amount``: a number, or a tensor of shape [] or [C]; an
    ``nn.Parameter`` is trained, and outside of its range a call raises a ValueError on a CPU; a ``Bounded`` is trained
    and stays in its range. Nothing is kept between calls: pass the returned state as ``v0`` to go on.

    Raises:
        TypeError, ValueError: a parameter out of range, an unknown surrogate or backend.
    """

    def __init__(
        self,
        decay: Number | Bounded = 0.5,
        gain: Number | Bounded = 1.0,
        *,
        v_leak: Number | Bounded = 0.0,
        v_threshold: Number | Bounded = 1.0,
        v_reset: Number | Bounded | None = 0.0,
        reset_amount: Number | Bounded | None = None,
        surrogate: str | Callable = "triangle",
        alpha: float | None = None,
        detach_reset: bool = False,
        fire_on_equal: bool = False,
        packed: bool = False,
        time_dim: int = 0,
        channel_dim: int = 2,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            v_leak=v_leak,
            v_threshold=v_threshold,
            v_reset=v_reset,
            reset_amount=reset_amount,
            surrogate=surrogate,
            alpha=alpha,
            detach_reset=detach_reset,
            fire_on_equal=fire_on_equal,
            packed=packed,
            time_dim=time_dim,
            channel_dim=channel_dim,
            backend=backend,
        )
        self._hold("decay", decay)
        self._hold("gain", gain)

    def _settings(self) -> dict[str, object]:
        return {"decay": self.decay, "gain": self.gain, **super()._settings()}


class IF(LIF):
    """Integrate-and-fire: a LIF neuron that does not leak, decay = 1. Takes what LIF takes but decay and v_leak."""

    def __init__(self, gain: Number | Bounded = 1.0, **lif: Any) -> None:
        _refuse(self, lif, ("decay", "v_leak"), "an IF neuron does not leak")
        super().__init__(1.0, gain, **lif)


class PLIF(Spiking):
    """Parametric LIF: the decay is learned, decay = 1 - sigmoid(w) (Fang et al. 2021, arXiv 2007.05785).

    Args:
        init_tau: > 1; w starts where sigmoid(w) = 1 / init_tau.
        channels: None for one w, or the number of channels for one each.
        decay_input: gain = sigmoid(w) instead of 1.
        lif: what ``LIF`` takes, but decay and gain.
    """

    def __init__(
        self, init_tau: float = 2.0, channels: int | None = None, decay_input: bool = False, **lif: Any
    ) -> None:
        _refuse(self, lif, ("decay", "gain"), "both follow from w")
        if not (isinstance(init_tau, (int, float)) and math.isfinite(init_tau) and init_tau > 1):
            raise ValueError(
                f"PLIF: expected init_tau to be a number > 1, got {init_tau!r}; at 1 w is infinite and learns nothing: "
                "use LIF(decay=0.0), or LIF(decay=Bounded(0.0, 'clamp')) to learn the decay from there"
            )
        if channels is not None and (not isinstance(channels, int) or channels < 1):
            raise ValueError(f"PLIF: expected channels to be None or an int >= 1, got {channels!r}")
        super().__init__(**lif)
        self.decay_input, self.init_tau = decay_input, float(init_tau)
        self.w = nn.Parameter(torch.empty(() if channels is None else (channels,)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """w where sigmoid(w) = 1 / init_tau, and the non-finite flag to 0."""
        super().reset_parameters()
        nn.init.constant_(self.w, -math.log(self.init_tau - 1))

    @property
    def decay(self) -> Tensor:
        """1 - sigmoid(w), in float32 at least."""
        return 1 - torch.sigmoid(wide(self.w))

    @property
    def gain(self) -> Number:
        """sigmoid(w) in float32 at least with ``decay_input``, else 1."""
        return torch.sigmoid(wide(self.w)) if self.decay_input else 1.0

    def _settings(self) -> dict[str, object]:
        return {"w": self.w, "decay_input": self.decay_input, **super()._settings()}


def _refuse(layer: nn.Module, given: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if name in given:
            raise TypeError(f"{type(layer).__name__}: expected no {name} ({why}), got {given[name]!r}; use LIF")


class LI(Neuron):
    """Leaky integrator, a readout without spikes: v[t] = decay * v[t-1] + gain * x[t] + (1 - decay) * v_leak.

    Args:
        decay, gain, v_leak: as in ``LIF``.
        time_dim, channel_dim, backend: as in ``LIF``.
    """

    def __init__(
        self,
        decay: Number | Bounded = 0.5,
        gain: Number | Bounded = 1.0,
        *,
        v_leak: Number | Bounded = 0.0,
        time_dim: int = 0,
        channel_dim: int = 2,
        backend: str = "auto",
    ) -> None:
        super().__init__(LIFSpec("none"), time_dim, channel_dim, backend)
        for name, value in {"decay": decay, "gain": gain, "v_leak": v_leak}.items():
            self._hold(name, value)

    def forward(
        self, x: Tensor, v0: Tensor | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """v of every step, [T, B, C, ...] in x's dtype; with ``return_state`` also the last one in float32."""
        if is_proxy(x):
            return self(x, v0, return_state=return_state)
        out = self._run(x, v0, self.values(), return_spikes=False, return_state=return_state, return_v=True)
        made = tuple(tensor for tensor in (out.v, out.state) if tensor is not None)
        return made if len(made) > 1 else made[0]

    def values(self) -> dict[str, Number]:
        """decay, gain and bias, as ``trtkern.ops.lif`` takes them."""
        decay = self._value("decay")
        return {"decay": decay, "gain": self._value("gain"), "bias": self._bias(decay)}

    def _settings(self) -> dict[str, object]:
        return {"decay": self.decay, "gain": self.gain, "v_leak": self.v_leak}
