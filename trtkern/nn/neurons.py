"""Neuron layers over whole sequences: stateless between calls, one kernel a direction.

Those whose membrane leaks to a decay are here; those that are given a tau are in ``timed``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern.nn._neuron import Readout, Spiking, wide
from trtkern.nn.bounded import Bounded
from trtkern.ops.checks import Number


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
            {"v_leak": v_leak},
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
    """Integrate-and-fire: a LIF neuron that does not leak, decay = 1. Takes what LIF takes but decay and v_leak.

    Args:
        gain: what the input is multiplied by: a number, or a tensor of shape [] or [C].
        lif: what ``LIF`` takes beside.
    """

    def __init__(self, gain: Number | Bounded = 1.0, **lif: Any) -> None:
        _refuse(self, lif, ("decay", "v_leak"), "an IF neuron does not leak")
        super().__init__(1.0, gain, **lif)


class PLIF(Spiking):
    """Parametric LIF: the decay is learned, decay = 1 - sigmoid(w) (Fang et al. 2021, arXiv 2007.05785).

    Args:
        init_tau: > 1; w starts where sigmoid(w) = 1 / init_tau.
        channels: None for one w, or the number of channels for one each.
        decay_input: gain = sigmoid(w) instead of 1.
        v_leak, lif: what ``LIF`` takes, but decay and gain.
    """

    def __init__(
        self,
        init_tau: float = 2.0,
        channels: int | None = None,
        decay_input: bool = False,
        *,
        v_leak: Number | Bounded = 0.0,
        **lif: Any,
    ) -> None:
        _refuse(self, lif, ("decay", "gain"), "both follow from w")
        if not (isinstance(init_tau, (int, float)) and math.isfinite(init_tau) and init_tau > 1):
            raise ValueError(
                f"PLIF: expected init_tau to be a number > 1, got {init_tau!r}; at 1 w is infinite and learns nothing: "
                "use LIF(decay=0.0), or LIF(decay=Bounded(0.0, 'clamp')) to learn the decay from there"
            )
        if channels is not None and (not isinstance(channels, int) or channels < 1):
            raise ValueError(f"PLIF: expected channels to be None or an int >= 1, got {channels!r}")
        super().__init__({"v_leak": v_leak}, **lif)
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


class LI(Readout):
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
        super().__init__({"decay": decay, "gain": gain, "v_leak": v_leak}, time_dim, channel_dim, backend)


class CUBALIFState(NamedTuple):
    """What ``CUBALIF`` and ``CUBALI`` are after a step, [B, C, ...] float32 each."""

    i: Tensor
    """The synaptic current."""
    v: Tensor
    """The potential."""


class CUBALIF(Spiking):
    """LIF behind a synaptic current: i[t] = decay_syn * i[t-1] + gain_syn * x[t], which the membrane integrates.

    h[t] = decay * v[t-1] + gain * i[t] + (1 - decay) * v_leak; fire and reset as ``LIF``. It is NIR's CubaLIF,
    snnTorch's Synaptic, Norse's and Rockpool's LIF; the defaults are Norse's (tau_syn_inv = 200 / s,
    tau_mem_inv = 100 / s, dt = 1 ms).

    Args:
        decay_syn, decay: in [0, 1].
        gain_syn: what the input is multiplied by.
        gain: what the current is multiplied by; None is 1 - decay.
        v_leak: the potential that v decays to.
        spiking: what ``LIF`` takes besides: v_threshold, v_reset, surrogate, packed, backend, ...

    Parameters, state and errors are as ``LIF`` has them; ``state_names`` are i, v.
    """

    kind = "CUBALIF"
    State = CUBALIFState
    complements = (("gain", "decay"),)

    def __init__(
        self,
        decay_syn: Number | Bounded = 0.8,
        gain_syn: Number | Bounded = 1.0,
        decay: Number | Bounded = 0.9,
        gain: Number | Bounded | None = None,
        *,
        v_leak: Number | Bounded = 0.0,
        **spiking: Any,
    ) -> None:
        own = {"decay_syn": decay_syn, "gain_syn": gain_syn, "decay": decay, "gain": gain, "v_leak": v_leak}
        super().__init__(own, **spiking)


class CUBALI(Readout):
    """The readout of ``CUBALIF``: its current and its membrane without spikes; gives v of every step.

    Args:
        decay_syn, gain_syn, decay, gain, v_leak: as in ``CUBALIF``.
        time_dim, channel_dim, backend: as in ``LIF``.
    """

    kind = "CUBALIF"
    State = CUBALIFState
    complements = (("gain", "decay"),)

    def __init__(
        self,
        decay_syn: Number | Bounded = 0.8,
        gain_syn: Number | Bounded = 1.0,
        decay: Number | Bounded = 0.9,
        gain: Number | Bounded | None = None,
        *,
        v_leak: Number | Bounded = 0.0,
        time_dim: int = 0,
        channel_dim: int = 2,
        backend: str = "auto",
    ) -> None:
        own = {"decay_syn": decay_syn, "gain_syn": gain_syn, "decay": decay, "gain": gain, "v_leak": v_leak}
        super().__init__(own, time_dim, channel_dim, backend)


class ALIFState(NamedTuple):
    """What ``ALIF`` is after a step, [B, C, ...] float32 each."""

    v: Tensor
    """The potential."""
    a: Tensor
    """The adaptation of the threshold."""


class ALIF(Spiking):
    """LIF whose threshold rises with its spikes: it fires where h[t] > v_threshold + beta * a[t-1].

    h[t] = decay * v[t-1] + gain * x[t] + (1 - decay) * v_leak; a[t] = decay_a * a[t-1] + gain_a * s[t]. The soft reset
    subtracts ``reset_amount``, the threshold without its adaptation unless given (Bellec et al. 2020,
    doi 10.1038/s41467-020-17236-y; the threshold is that of Bellec et al. 2018, arXiv 1803.09574, with beta = 1.8).
    sinabs' ALIF and Norse's LSNN are of this kind.

    Args:
        decay, decay_a: in [0, 1]; the defaults are about 20 and 200 steps.
        gain: what the input is multiplied by; None is 1 - decay.
        gain_a: what a spike adds to a; None is 1 - decay_a.
        beta: what a is multiplied by.
        v_leak: the potential that v decays to.
        v_reset: None, the default, is the soft reset; else the potential after a spike.
        spiking: what ``LIF`` takes besides, but ``fire_on_equal``: v_threshold, reset_amount, surrogate, ...

    Parameters, state and errors are as ``LIF`` has them; ``state_names`` are v, a.
    """

    kind = "ALIF"
    State = ALIFState
    complements = (("gain", "decay"), ("gain_a", "decay_a"))
    still_threshold = False

    def __init__(
        self,
        decay: Number | Bounded = 0.95,
        gain: Number | Bounded | None = None,
        decay_a: Number | Bounded = 0.995,
        gain_a: Number | Bounded | None = None,
        beta: Number | Bounded = 1.8,
        *,
        v_leak: Number | Bounded = 0.0,
        v_reset: Number | Bounded | None = None,
        **spiking: Any,
    ) -> None:
        own = {"decay": decay, "gain": gain, "decay_a": decay_a, "gain_a": gain_a, "beta": beta, "v_leak": v_leak}
        super().__init__(own, v_reset=v_reset, **spiking)


class AdLIFState(NamedTuple):
    """What ``AdLIF`` is after a step, [B, C, ...] float32 each."""

    v: Tensor
    """The potential."""
    w: Tensor
    """The current of adaptation."""


class AdLIF(Spiking):
    """LIF with a current against it that follows potential and spikes (Bittar and Garner 2022,
    doi 10.3389/fnins.2022.865897; sparch's adLIF).

    h[t] = decay * v[t-1] + gain * (x[t] - w[t-1]) + (1 - decay) * v_leak;
    w[t] = decay_w * w[t-1] + a * h[t] + b * s[t]. sparch draws decay, decay_w, a and b for each neuron from ranges, in
    which the defaults are, and keeps them there: ``Bounded(..., "clamp", low=, high=)``.

    Args:
        decay: in [0, 1]; sparch: 0.82 to 0.96.
        gain: what the input is multiplied by; None is 1 - decay.
        decay_w: in [0, 1]; sparch: 0.967 to 0.992.
        a: what the potential adds to w; sparch: -1 to 1.
        b: what a spike adds to w; sparch: 0 to 2.
        v_leak: the potential that v decays to.
        v_reset: None, the default, is the soft reset; else the potential after a spike.
        spiking: what ``LIF`` takes besides: v_threshold, reset_amount, surrogate, ...

    Parameters, state and errors are as ``LIF`` has them; ``state_names`` are v, w.
    """

    kind = "AdLIF"
    State = AdLIFState
    complements = (("gain", "decay"),)

    def __init__(
        self,
        decay: Number | Bounded = 0.9,
        gain: Number | Bounded | None = None,
        decay_w: Number | Bounded = 0.98,
        a: Number | Bounded = 0.0,
        b: Number | Bounded = 1.0,
        *,
        v_leak: Number | Bounded = 0.0,
        v_reset: Number | Bounded | None = None,
        **spiking: Any,
    ) -> None:
        own = {"decay": decay, "gain": gain, "decay_w": decay_w, "a": a, "b": b, "v_leak": v_leak}
        super().__init__(own, v_reset=v_reset, **spiking)


class CLIFState(NamedTuple):
    """What ``CLIF`` is after a step, [B, C, ...] float32 each."""

    v: Tensor
    """The potential."""
    m: Tensor
    """The complementary potential."""


class CLIF(Spiking):
    """Complementary LIF: a second potential remembers spikes, and the reset grows with it (Huang et al. 2024,
    arXiv 2402.04663).

    h[t] = decay * v[t-1] + gain * x[t] + (1 - decay) * v_leak; m[t] = m[t-1] * sigmoid(rate * h[t]) + s[t]; where it
    fired v[t] = h[t] - (reset_amount + sigmoid(m[t])), else h[t]. The reset is soft, always.

    Args:
        decay: in [0, 1]; 1 - 1/tau of the paper, whose tau is 2.
        gain: what the input is multiplied by.
        rate: how fast m follows h; None is 1 - decay.
        v_leak: the potential that v decays to.
        v_reset: None.
        spiking: what ``LIF`` takes besides: v_threshold, reset_amount, surrogate, ...

    Parameters, state and errors are as ``LIF`` has them; ``state_names`` are v, m.
    """

    kind = "CLIF"
    State = CLIFState
    complements = (("rate", "decay"),)

    def __init__(
        self,
        decay: Number | Bounded = 0.5,
        gain: Number | Bounded = 1.0,
        rate: Number | Bounded | None = None,
        *,
        v_leak: Number | Bounded = 0.0,
        v_reset: None = None,
        **spiking: Any,
    ) -> None:
        super().__init__({"decay": decay, "gain": gain, "rate": rate, "v_leak": v_leak}, v_reset=v_reset, **spiking)
