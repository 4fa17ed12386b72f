"""A neuron of one's own: adaptive exponential integrate-and-fire (Brette and Gerstner 2005, doi 10.1152/jn.00686.2005).

trtkern train --recipe digits --set model.neuron=adex:ADEX --set model.tau=3
"""

from trtkern.neurons import exp, register, where


def charge(x, state, p):
    v, w = state
    upswing = p.delta_t * exp((v - p.theta_rh) / p.delta_t)
    return v + (x + p.v_rest - v + upswing - w) / p.tau, w


def fire(trace, p):
    return trace.h, p.v_threshold


def settle(trace, s, p):
    w = trace.w + (p.a * (trace.h - p.v_rest) - trace.w) / p.tau_w + where(s, p.b, 0.0)
    return where(s, p.v_reset, trace.h), w


ADEX = register(
    "AdEx", states=("v", "w"), charge=charge, fire=fire, settle=settle,
    params={"tau": 2.0, "delta_t": 1.0, "theta_rh": 0.8, "v_rest": 0.0, "tau_w": 4.0, "a": 0.2, "b": 0.5,
            "v_threshold": 1.0, "v_reset": -0.1},
    ranges={name: (1e-3, float("inf")) for name in ("tau", "delta_t", "tau_w")},
)  # fmt: skip
