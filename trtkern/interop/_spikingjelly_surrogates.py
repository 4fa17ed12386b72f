"""The surrogates of SpikingJelly: which row of ``trtkern.surrogates`` each is, or a function where none is the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from trtkern.interop.adapters import CannotConvert, package_of
from trtkern.surrogates import exp, maximum, where


def piecewise_exp(u, alpha):
    """alpha / 2 * exp(-alpha * abs(u)): PiecewiseExp."""
    return 0.5 * alpha * exp(-alpha * abs(u))


def soft_sign(u, alpha):
    """alpha / (2 * (1 + alpha * abs(u))**2): SoftSign."""
    d = 1.0 + alpha * abs(u)
    return 0.5 * alpha / (d * d)


def super_spike(u, alpha):
    """alpha / (1 + abs(u))**2: SuperSpike."""
    d = 1.0 + abs(u)
    return alpha / (d * d)


def nonzero_sign_log_abs(u, alpha):
    """1 / (1 / alpha + abs(u)): NonzeroSignLogAbs."""
    return 1.0 / (1.0 / alpha + abs(u))


def piecewise_leaky_relu(u, alpha):
    """1 / (2 * alpha) where abs(u) < alpha, else 0.01: PiecewiseLeakyReLU with w = alpha and its default c."""
    return where(abs(u) < alpha, 0.5 / alpha, 0.01)


def s2nn(u, alpha):
    """The derivative of a sigmoid below 0, 1 / (u + 1) from there on: S2NN with its default beta."""
    sig = 1.0 / (1.0 + exp(-alpha * u))
    return where(u < 0.0, alpha * sig * (1.0 - sig), 1.0 / (maximum(u, 0.0) + 1.0))


def leaky_k_relu(u, alpha):
    """alpha from 0 on, else 0: LeakyKReLU with k = alpha and its default leak."""
    return where(u < 0.0, 0.0, alpha)


def fake_numerical_gradient(u, alpha):
    """min(1 / abs(u), alpha): FakeNumericalGradient."""
    return 1.0 / maximum(abs(u), 1.0 / alpha)


def log_tailed_relu(u, alpha):
    """0 up to 0, 1 up to 1, then 1 / u: LogTailedReLU with its default alpha of 0; alpha means nothing here.

    It jumps at 0, which for a neuron that meets its threshold exactly is 0 there, and 1 here (``fire_on_equal``).
    """
    return where(u > 0.0, 1.0 / maximum(u, 1.0), 0.0)


def log_tailed_leaky_relu(u, alpha):
    """alpha up to 0, 1 up to 1, then 1 / u: LogTailedReLU."""
    return where(u > 0.0, 1.0 / maximum(u, 1.0), alpha)


def deterministic_pass(u, alpha):
    """1 everywhere: DeterministicPass; alpha means nothing here."""
    return 1.0


Found = tuple[str | Callable, float]


def _second(function: Any, name: str, value: float) -> None:
    """A function has one parameter here; the second one of theirs is refused where it is not the default."""
    if getattr(function, name) != value:
        kind = type(function).__name__
        raise CannotConvert(f"expected a {kind} with {name}={value!r}, got {name}={getattr(function, name)!r}")


def _q_pseudo_spike(function: Any) -> Found:
    _second(function, "alpha", 2.0)
    return "fast_sigmoid", 2.0


def _piecewise_leaky_relu(function: Any) -> Found:
    if function.c == 0:
        return "rectangle", 0.5 / function.w
    _second(function, "c", 0.01)
    return piecewise_leaky_relu, float(function.w)


def _s2nn(function: Any) -> Found:
    _second(function, "beta", 1.0)
    return s2nn, float(function.alpha)


def _leaky_k_relu(function: Any) -> Found:
    _second(function, "leak", 0.0)
    return leaky_k_relu, float(function.k)


KNOWN: dict[str, Callable[[Any], Found]] = {
    "Sigmoid": lambda f: ("sigmoid", f.alpha),
    "ATan": lambda f: ("atan", f.alpha),
    "PiecewiseQuadratic": lambda f: ("triangle", 1 / f.alpha),
    "Rect": lambda f: ("rectangle", f.alpha),
    "Erf": lambda f: ("gaussian", math.sqrt(2) * f.alpha),
    "SoftSign": lambda f: ("fast_sigmoid", 2.0) if f.alpha == 2 else (soft_sign, f.alpha),
    "SuperSpike": lambda f: ("fast_sigmoid", 1.0) if f.alpha == 1 else (super_spike, f.alpha),
    "QPseudoSpike": _q_pseudo_spike,
    "PiecewiseLeakyReLU": _piecewise_leaky_relu,
    "PiecewiseExp": lambda f: (piecewise_exp, f.alpha),
    "NonzeroSignLogAbs": lambda f: (nonzero_sign_log_abs, f.alpha),
    "S2NN": _s2nn,
    "LeakyKReLU": _leaky_k_relu,
    "FakeNumericalGradient": lambda f: (fake_numerical_gradient, f.alpha),
    "LogTailedReLU": lambda f: (log_tailed_relu, 1.0) if f.alpha == 0 else (log_tailed_leaky_relu, f.alpha),
    "DeterministicPass": lambda _: (deterministic_pass, 1.0),
}
"""By the name of the class: the surrogate and its alpha. Functions run on every backend but cuda."""


def surrogate_of(node: Any) -> dict[str, Any]:
    """``surrogate`` and ``alpha`` of a neuron's ``surrogate_function``.

    Raises:
        CannotConvert: it is of no known class, or its numbers have no equal.
    """
    function = node.surrogate_function
    if isinstance(function, str):  # the neurons that SpikingJelly compiled for CUDA, up to 0.0.0.0.5
        found = {"ATan": "atan", "Sigmoid": "sigmoid"}.get(function)
        if found is None:
            raise CannotConvert(f"expected surrogate_function to be 'ATan' or 'Sigmoid', got {function!r}")
        return {"surrogate": found, "alpha": float(node.alpha)}
    kind = type(function)
    make = KNOWN.get(kind.__name__)
    # A class of the same name elsewhere is taken with a neuron from there, which is compared with what is made of it.
    if make is None or package_of(function) not in ("spikingjelly", package_of(node)):
        known = ", ".join(sorted(KNOWN))
        raise CannotConvert(f"expected a surrogate_function of SpikingJelly's {known}, got {kind.__qualname__}")
    if not getattr(function, "spiking", True):
        raise CannotConvert("expected a surrogate_function with spiking=True, got spiking=False, which fires no spikes")
    surrogate, alpha = make(function)
    return {"surrogate": surrogate, "alpha": float(alpha)}
