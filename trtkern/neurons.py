"""The neurons: each one defined here, once, for every backend.

A neuron is three straight-line functions, which every backend runs at each step in this order::

    trace = charge(x, state, p)      what the step computes from the input current and the state before it
    potential, threshold = fire(trace, p)
                                     it fires where potential > threshold; the surrogate is taken at their difference
    state = settle(trace, s, p)      the state after the step, with the reset; s: whether it fired

``state``, ``trace`` and ``p`` are tuples. ``s`` is a condition: ``where(s, a, b)`` is a where the neuron fired and b
elsewhere, and its derivative by the spike is a - b. The functions are built from arithmetic, comparisons and the names
``fma``, ``exp``, ``abs``, ``maximum`` and ``where``. ``trtkern.adjoint`` derives the backward pass from them; the
kernels keep ``trace`` and compute the state from it again.

docs/extending.md has the steps that make a row a layer, and those that need no checkout (``register``).

This module imports the standard library only: the build uses it before torch exists.
"""

from __future__ import annotations

from trtkern.rows import TABLE as TABLE
from trtkern.rows import Neuron as Neuron
from trtkern.rows import compiled as compiled
from trtkern.rows import each as each
from trtkern.rows import fma as fma
from trtkern.rows import lookup as lookup
from trtkern.rows import reference as reference
from trtkern.rows import register as register
from trtkern.rows import restore as restore
from trtkern.surrogates import exp as exp
from trtkern.surrogates import maximum as maximum
from trtkern.surrogates import where as where

__all__ = ["TABLE", "Neuron", "exp", "fma", "lookup", "maximum", "register", "where"]

# Leaky integrate-and-fire.


def lif_charge(x, state, p):
    """h[t] = decay * v[t-1] + gain * x[t] + bias."""
    (v,) = state
    decay, gain, bias, _reset_amount, _v_threshold, _v_reset = p
    return (fma(decay, v, fma(gain, x, bias)),)


def lif_fire(trace, p):
    """Where h[t] > v_threshold."""
    v_threshold = p[4]
    return trace[0], v_threshold


def lif_hard(trace, s, p):
    """v[t] = v_reset where it fired, else h[t]."""
    v_reset = p[5]
    return (where(s, v_reset, trace[0]),)


def lif_soft(trace, s, p):
    """v[t] = h[t] - reset_amount where it fired, else h[t]."""
    reset_amount = p[3]
    return (where(s, trace[0] - reset_amount, trace[0]),)


def lif_none(trace, s, p):
    """v[t] = h[t]."""
    return (trace[0],)


# A synaptic current in front of the membrane: NIR's CubaLIF, snnTorch's Synaptic, Norse's and Rockpool's LIF.


def cubalif_charge(x, state, p):
    """i[t] = decay_syn * i[t-1] + gain_syn * x[t]; h[t] = decay * v[t-1] + gain * i[t] + bias."""
    i, v = state
    decay_syn, gain_syn, decay, gain, bias, _reset_amount, _v_threshold, _v_reset = p
    i = fma(decay_syn, i, gain_syn * x)
    return i, fma(decay, v, fma(gain, i, bias))


def cubalif_fire(trace, p):
    """Where h[t] > v_threshold."""
    v_threshold = p[6]
    return trace[1], v_threshold


def cubalif_hard(trace, s, p):
    """v[t] = v_reset where it fired, else h[t]; i[t] stays."""
    v_reset = p[7]
    return trace[0], where(s, v_reset, trace[1])


def cubalif_soft(trace, s, p):
    """v[t] = h[t] - reset_amount where it fired, else h[t]; i[t] stays."""
    reset_amount = p[5]
    return trace[0], where(s, trace[1] - reset_amount, trace[1])


def cubalif_none(trace, s, p):
    """v[t] = h[t]; i[t] stays."""
    return trace


# A threshold that adapts: Bellec et al. 2018 (arXiv 1803.09574) and 2020, sinabs' ALIF, Norse's LSNN.


def alif_charge(x, state, p):
    """h[t] = decay * v[t-1] + gain * x[t] + bias; a[t-1] comes along."""
    decay, gain, bias, _decay_a, _gain_a, _beta, _reset_amount, _v_threshold, _v_reset = p
    v, a = state
    return fma(decay, v, fma(gain, x, bias)), a


def alif_fire(trace, p):
    """Where h[t] > v_threshold + beta * a[t-1]."""
    _decay, _gain, _bias, _decay_a, _gain_a, beta, _reset_amount, v_threshold, _v_reset = p
    return trace[0], fma(beta, trace[1], v_threshold)


def alif_hard(trace, s, p):
    """v[t] = v_reset where it fired, else h[t]; a[t] = decay_a * a[t-1] + gain_a * s[t]."""
    _decay, _gain, _bias, decay_a, gain_a, _beta, _reset_amount, _v_threshold, v_reset = p
    return where(s, v_reset, trace[0]), fma(decay_a, trace[1], where(s, gain_a, 0.0))


def alif_soft(trace, s, p):
    """v[t] = h[t] - reset_amount where it fired, else h[t]; a[t] = decay_a * a[t-1] + gain_a * s[t]."""
    _decay, _gain, _bias, decay_a, gain_a, _beta, reset_amount, _v_threshold, _v_reset = p
    return where(s, trace[0] - reset_amount, trace[0]), fma(decay_a, trace[1], where(s, gain_a, 0.0))


def alif_none(trace, s, p):
    """v[t] = h[t]; a[t] = decay_a * a[t-1] + gain_a * s[t]."""
    _decay, _gain, _bias, decay_a, gain_a, _beta, _reset_amount, _v_threshold, _v_reset = p
    return trace[0], fma(decay_a, trace[1], where(s, gain_a, 0.0))


# A current that adapts, also below the threshold: Bittar and Garner 2022 (doi 10.3389/fnins.2022.865897), sparch.


def adlif_charge(x, state, p):
    """h[t] = decay * v[t-1] + gain * (x[t] - w[t-1]) + bias; w[t-1] comes along."""
    decay, gain, bias, _decay_w, _a, _b, _reset_amount, _v_threshold, _v_reset = p
    v, w = state
    return fma(decay, v, fma(gain, x - w, bias)), w


def adlif_fire(trace, p):
    """Where h[t] > v_threshold."""
    v_threshold = p[7]
    return trace[0], v_threshold


def adlif_hard(trace, s, p):
    """v[t] = v_reset where it fired, else h[t]; w[t] = decay_w * w[t-1] + a * h[t] + b * s[t]."""
    _decay, _gain, _bias, decay_w, a, b, _reset_amount, _v_threshold, v_reset = p
    return where(s, v_reset, trace[0]), fma(decay_w, trace[1], fma(a, trace[0], where(s, b, 0.0)))


def adlif_soft(trace, s, p):
    """v[t] = h[t] - reset_amount where it fired, else h[t]; w[t] = decay_w * w[t-1] + a * h[t] + b * s[t]."""
    _decay, _gain, _bias, decay_w, a, b, reset_amount, _v_threshold, _v_reset = p
    return where(s, trace[0] - reset_amount, trace[0]), fma(decay_w, trace[1], fma(a, trace[0], where(s, b, 0.0)))


def adlif_none(trace, s, p):
    """v[t] = h[t]; w[t] = decay_w * w[t-1] + a * h[t] + b * s[t]."""
    _decay, _gain, _bias, decay_w, a, b, _reset_amount, _v_threshold, _v_reset = p
    return trace[0], fma(decay_w, trace[1], fma(a, trace[0], where(s, b, 0.0)))


# One state, not linear: SpikingJelly's QIFNode and EIFNode (Gerstner et al., Neuronal Dynamics, chapter 5).


def qif_charge(x, state, p):
    """h[t] = v[t-1] + gain * (x[t] + a0 * (v[t-1] - v_rest) * (v[t-1] - v_c))."""
    gain, a0, v_rest, v_c, _reset_amount, _v_threshold, _v_reset = p
    (v,) = state
    return (fma(gain, fma(a0 * (v - v_rest), v - v_c, x), v),)


def eif_charge(x, state, p):
    """h[t] = v[t-1] + gain * (x[t] + v_rest - v[t-1] + delta_t * exp((v[t-1] - theta_rh) / delta_t))."""
    gain, delta_t, theta_rh, v_rest, _reset_amount, _v_threshold, _v_reset = p
    (v,) = state
    return (fma(gain, x + v_rest - v + delta_t * exp((v - theta_rh) / delta_t), v),)


def threshold_at_5(trace, p):
    """Where h[t] > v_threshold."""
    v_threshold = p[5]
    return trace[0], v_threshold


def hard_at_6(trace, s, p):
    """v[t] = v_reset where it fired, else h[t]."""
    v_reset = p[6]
    return (where(s, v_reset, trace[0]),)


def soft_at_4(trace, s, p):
    """v[t] = h[t] - reset_amount where it fired, else h[t]."""
    reset_amount = p[4]
    return (where(s, trace[0] - reset_amount, trace[0]),)


# Izhikevich 2003 (doi 10.1109/TNN.2003.820440) as SpikingJelly's IzhikevichNode writes it.


def izhikevich_charge(x, state, p):
    """h[t] = v[t-1] + gain * (x[t] + a0 * (v[t-1] - v_rest) * (v[t-1] - v_c) - w[t-1]); w[t-1] comes along."""
    gain, a0, v_rest, v_c, _rate_w, _a, _b, _reset_amount, _v_threshold, _v_reset = p
    v, w = state
    return fma(gain, fma(a0 * (v - v_rest), v - v_c, x) - w, v), w


def izhikevich_fire(trace, p):
    """Where h[t] > v_threshold."""
    v_threshold = p[8]
    return trace[0], v_threshold


def izhikevich_hard(trace, s, p):
    """v[t] = v_reset where it fired, else h[t]; w[t] = w[t-1] + rate_w * (a * (h[t] - v_rest) - w[t-1]) + b * s[t]."""
    _gain, _a0, v_rest, _v_c, rate_w, a, b, _reset_amount, _v_threshold, v_reset = p
    h, w = trace
    return where(s, v_reset, h), fma(rate_w, a * (h - v_rest) - w, w) + where(s, b, 0.0)


def izhikevich_soft(trace, s, p):
    """v[t] = h[t] - reset_amount where it fired, else h[t]; w[t] as after the hard reset."""
    _gain, _a0, v_rest, _v_c, rate_w, a, b, reset_amount, _v_threshold, _v_reset = p
    h, w = trace
    return where(s, h - reset_amount, h), fma(rate_w, a * (h - v_rest) - w, w) + where(s, b, 0.0)


# A complementary membrane, which remembers spikes: Huang et al. 2024 (arXiv 2402.04663).


def clif_charge(x, state, p):
    """h[t] = decay * v[t-1] + gain * x[t] + bias; m[t-1] comes along."""
    decay, gain, bias, _rate, _reset_amount, _v_threshold = p
    v, m = state
    return fma(decay, v, fma(gain, x, bias)), m


def clif_fire(trace, p):
    """Where h[t] > v_threshold."""
    v_threshold = p[5]
    return trace[0], v_threshold


def clif_soft(trace, s, p):
    """m[t] = m[t-1] * sigmoid(rate * h[t]) + s[t]; v[t] = h[t] - (reset_amount + sigmoid(m[t])) where it fired."""
    _decay, _gain, _bias, rate, reset_amount, _v_threshold = p
    h, m = trace
    # Below -60 a sigmoid is 0 for every purpose, and its derivative must not be inf / inf.
    m = m / (1.0 + exp(-maximum(rate * h, -60.0))) + where(s, 1.0, 0.0)
    return where(s, h - (reset_amount + 1.0 / (1.0 + exp(-maximum(m, -60.0)))), h), m


# The position of a row is its number in the compiled code.
TABLE |= {
    row.name: row
    for row in (
        Neuron(
            "LIF", ("v",), ("h",),
            ("decay", "gain", "bias", "reset_amount", "v_threshold", "v_reset"),
            lif_charge, lif_fire, {"hard": lif_hard, "soft": lif_soft, "none": lif_none},
        ),
        Neuron(
            "CUBALIF", ("i", "v"), ("i", "h"),
            ("decay_syn", "gain_syn", "decay", "gain", "bias", "reset_amount", "v_threshold", "v_reset"),
            cubalif_charge, cubalif_fire, {"hard": cubalif_hard, "soft": cubalif_soft, "none": cubalif_none},
        ),
        Neuron(
            "ALIF", ("v", "a"), ("h", "a"),
            ("decay", "gain", "bias", "decay_a", "gain_a", "beta", "reset_amount", "v_threshold", "v_reset"),
            alif_charge, alif_fire, {"hard": alif_hard, "soft": alif_soft, "none": alif_none},
        ),
        Neuron(
            "AdLIF", ("v", "w"), ("h", "w"),
            ("decay", "gain", "bias", "decay_w", "a", "b", "reset_amount", "v_threshold", "v_reset"),
            adlif_charge, adlif_fire, {"hard": adlif_hard, "soft": adlif_soft, "none": adlif_none},
        ),
        Neuron(
            "QIF", ("v",), ("h",),
            ("gain", "a0", "v_rest", "v_c", "reset_amount", "v_threshold", "v_reset"),
            qif_charge, threshold_at_5, {"hard": hard_at_6, "soft": soft_at_4},
        ),
        Neuron(
            "EIF", ("v",), ("h",),
            ("gain", "delta_t", "theta_rh", "v_rest", "reset_amount", "v_threshold", "v_reset"),
            eif_charge, threshold_at_5, {"hard": hard_at_6, "soft": soft_at_4},
        ),
        Neuron(
            "Izhikevich", ("v", "w"), ("h", "w"),
            ("gain", "a0", "v_rest", "v_c", "rate_w", "a", "b", "reset_amount", "v_threshold", "v_reset"),
            izhikevich_charge, izhikevich_fire, {"hard": izhikevich_hard, "soft": izhikevich_soft},
        ),
        Neuron(
            "CLIF", ("v", "m"), ("h", "m"),
            ("decay", "gain", "bias", "rate", "reset_amount", "v_threshold"),
            clif_charge, clif_fire, {"soft": clif_soft},
        ),
    )
}  # fmt: skip

CENTERS: dict[str, float] = {
    "decay": 0.6, "gain": 0.5, "bias": 0.1, "reset_amount": 1.1, "v_threshold": 0.9, "v_reset": 0.1, "decay_syn": 0.4,
    "gain_syn": 0.9, "decay_a": 0.8, "gain_a": 0.7, "beta": 0.6, "decay_w": 0.7, "a": 0.2, "b": 0.5, "a0": 0.2,
    "v_rest": 0.1, "v_c": 1.6, "delta_t": 0.5, "theta_rh": 2.5, "rate_w": 0.4, "rate": 0.5,
}  # fmt: skip
"""What each parameter is near in the self-test and in the tests: numbers with which every neuron fires now and then and
forgets, so that an error of rounding does not grow with the steps."""
