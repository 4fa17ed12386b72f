"""Neuron layers whose membrane does not leak linearly; they are given tau, as SpikingJelly's are."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from trtkern.nn._neuron import Spiking, wide
from trtkern.nn.bounded import Bounded
from trtkern.ops import checks
from trtkern.ops.checks import Number


class _Timed(Spiking):
    """A neuron that is given tau, where the kernels take gain = 1 / tau."""

    @property
    def gain(self) -> Number:
        """1 / tau."""
        return self._inverse("tau")

    def _inverse(self, name: str) -> Number:
        value = self._value(name)
        checks.held_now(type(self).__name__, name, value)
        return 1 / wide(value)


class QIF(_Timed):
    """Quadratic integrate-and-fire (SpikingJelly's QIFNode; Gerstner et al., Neuronal Dynamics, chapter 5.3):
    h[t] = v[t-1] + (x[t] + a0 * (v[t-1] - v_rest) * (v[t-1] - v_c)) / tau; fire and reset as ``LIF``.

    Args:
        tau: > 0, in steps.
        a0: steepness of the parabola.
        v_rest: the potential that v returns to.
        v_c: above it v rises by itself.
        v_reset: potential after a spike; None for the soft reset.
        spiking: what ``LIF`` takes besides: v_threshold, reset_amount, surrogate, ...

    The defaults are SpikingJelly's. Parameters, state and errors are as ``LIF`` has them.
    """

    kind = "QIF"

    def __init__(
        self,
        tau: Number | Bounded = 2.0,
        a0: Number | Bounded = 1.0,
        v_rest: Number | Bounded = 0.0,
        v_c: Number | Bounded = 0.8,
        *,
        v_reset: Number | Bounded | None = -0.1,
        **spiking: Any,
    ) -> None:
        super().__init__({"tau": tau, "a0": a0, "v_rest": v_rest, "v_c": v_c}, v_reset=v_reset, **spiking)


class EIF(_Timed):
    """Exponential integrate-and-fire (SpikingJelly's EIFNode; Gerstner et al., Neuronal Dynamics, chapter 5.2):
    h[t] = v[t-1] + (x[t] + v_rest - v[t-1] + delta_t * exp((v[t-1] - theta_rh) / delta_t)) / tau; fire and reset as
    ``LIF``.

    Args:
        tau: > 0, in steps.
        delta_t: > 0; sharpness of the exponential.
        theta_rh: rheobase threshold: above it v rises by itself.
        v_rest: the potential that v returns to.
        v_reset: potential after a spike; None for the soft reset.
        spiking: what ``LIF`` takes besides: v_threshold, reset_amount, surrogate, ...

    The defaults are SpikingJelly's. Parameters, state and errors are as ``LIF`` has them.
    """

    kind = "EIF"

    def __init__(
        self,
        tau: Number | Bounded = 2.0,
        delta_t: Number | Bounded = 1.0,
        theta_rh: Number | Bounded = 0.8,
        v_rest: Number | Bounded = 0.0,
        *,
        v_reset: Number | Bounded | None = -0.1,
        **spiking: Any,
    ) -> None:
        own = {"tau": tau, "delta_t": delta_t, "theta_rh": theta_rh, "v_rest": v_rest}
        super().__init__(own, v_reset=v_reset, **spiking)


class IzhikevichState(NamedTuple):
    """What ``Izhikevich`` is after a step, [B, C, ...] float32 each."""

    v: Tensor
    """The potential."""
    w: Tensor
    """The recovery."""


class Izhikevich(_Timed):
    """``QIF`` with a recovery current (Izhikevich 2003, doi 10.1109/TNN.2003.820440; SpikingJelly's IzhikevichNode):
    h[t] = v[t-1] + (x[t] + a0 * (v[t-1] - v_rest) * (v[t-1] - v_c) - w[t-1]) / tau and
    w[t] = w[t-1] + (a * (h[t] - v_rest) - w[t-1]) / tau_w + b * s[t]; fire and reset as ``LIF``.

    Args:
        tau, a0, v_rest, v_c: as in ``QIF``.
        tau_w: > 0, in steps.
        a: what the potential adds to w.
        b: what a spike adds to w.
        v_reset: potential after a spike; None for the soft reset.
        spiking: what ``LIF`` takes besides: v_threshold, reset_amount, surrogate, ...

    The defaults are SpikingJelly's. Parameters, state and errors are as ``LIF`` has them; ``state_names`` are v, w.
    """

    kind = "Izhikevich"
    State = IzhikevichState

    def __init__(
        self,
        tau: Number | Bounded = 2.0,
        a0: Number | Bounded = 1.0,
        v_rest: Number | Bounded = -0.1,
        v_c: Number | Bounded = 0.8,
        tau_w: Number | Bounded = 2.0,
        a: Number | Bounded = 0.0,
        b: Number | Bounded = 0.0,
        *,
        v_reset: Number | Bounded | None = 0.0,
        **spiking: Any,
    ) -> None:
        own = {"tau": tau, "a0": a0, "v_rest": v_rest, "v_c": v_c, "tau_w": tau_w, "a": a, "b": b}
        super().__init__(own, v_reset=v_reset, **spiking)

    @property
    def rate_w(self) -> Number:
        """1 / tau_w."""
        return self._inverse("tau_w")
