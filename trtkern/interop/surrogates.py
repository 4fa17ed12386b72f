"""Surrogates of other libraries that are no row of ``trtkern.surrogates``: shapes with more numbers than a sharpness::

    spec = LIF(surrogate=surrogate("exponential", height=0.5), alpha=2.0)  # 0.5 * exp(-2 * abs(u))

The numbers of a shape are frozen in its function, and stand in the function's name, by which another process that loads
such a layer finds it here. They run on every backend but CUDA, as every surrogate that is not built in.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from trtkern.surrogates import exp, maximum, where

# What a shape is made of beside u and alpha; ``surrogate`` puts other numbers in their place.
HEIGHT = 1.0
WINDOW = 1.0
CENTER = 0.0
DIP = 0.15
WIDER = 6.0
ABOVE = 1.0
BELOW = 1.0
AT = 1.0


def exponential(u, alpha):
    """HEIGHT * exp(-alpha * abs(u)): Rockpool's PeriodicExponential of at most one spike a step, sinabs'
    SingleExponential with its grad_scale."""
    return HEIGHT * exp(-alpha * abs(u))


def above(u, alpha):
    """HEIGHT where u >= -WINDOW, else 0: Rockpool's StepPWL, sinabs' Heaviside."""
    return where(u < -WINDOW, 0.0, HEIGHT)


def gaussian(u, alpha):
    """HEIGHT * exp(-(alpha * (u - CENTER))**2 / 2): sinabs' Gaussian with its mu and grad_scale."""
    z = alpha * (u - CENTER)
    return HEIGHT * exp(-0.5 * z * z)


def multi_gaussian(u, alpha):
    """HEIGHT * ((1 + DIP) * g(u, CENTER) - DIP * g(u, 1 / alpha) - DIP * g(u, -1 / alpha)), where the first g has the
    width 1 / alpha and the others are WIDER times as wide: sinabs' MultiGaussian (Yin et al. 2021)."""
    z, left, right = alpha * (u - CENTER), (alpha * u + 1.0) / WIDER, (alpha * u - 1.0) / WIDER
    dips = DIP / WIDER * (exp(-0.5 * right * right) + exp(-0.5 * left * left))
    return HEIGHT * ((1.0 + DIP) * exp(-0.5 * z * z) - dips)


def levels(u, alpha):
    """ABOVE where u > 0, BELOW where u < 0, AT where u is 0: snnTorch's straight_through_estimator, heaviside and
    triangular, Norse's "heaviside" (0 everywhere)."""
    return where(u > 0.0, ABOVE, where(u < 0.0, BELOW, AT))


def escape_rate(u, alpha):
    """HEIGHT * exp(-alpha * abs(u - CENTER)): snnTorch's spike_rate_escape."""
    return HEIGHT * exp(-alpha * abs(u - CENTER))


def sparse_fast_sigmoid(u, alpha):
    """1 / (1 + alpha * abs(u))**2 where u > CENTER, else 0: snnTorch's SFS (Perez-Nieves and Goodman 2021)."""
    d = 1.0 + alpha * abs(u)
    return where(u > CENTER, 1.0 / (d * d), 0.0)


def tent(u, alpha):
    """HEIGHT * max(0, 1 - alpha * abs(u)): Norse's "triangle"."""
    return HEIGHT * maximum(1.0 - alpha * abs(u), 0.0)


def squared_sech(u, alpha):
    """1 - tanh(alpha * u)**2: Norse's "tanh"."""
    t = exp(-2.0 * alpha * abs(u))
    d = 1.0 + t
    return 4.0 * t / (d * d)


SHAPES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "exponential": (exponential, ("HEIGHT",)),
    "above": (above, ("HEIGHT", "WINDOW")),
    "gaussian": (gaussian, ("HEIGHT", "CENTER")),
    "multi_gaussian": (multi_gaussian, ("HEIGHT", "CENTER", "DIP", "WIDER")),
    "levels": (levels, ("ABOVE", "BELOW", "AT")),
    "escape_rate": (escape_rate, ("HEIGHT", "CENTER")),
    "sparse_fast_sigmoid": (sparse_fast_sigmoid, ("CENTER",)),
    "tent": (tent, ("HEIGHT",)),
    "squared_sech": (squared_sech, ()),
}
"""Each shape with its numbers, in the order in which they stand in a name."""


def surrogate(shape: str, **numbers: float) -> Callable:
    """A function of (u, alpha) for ``surrogate=``: that shape with these numbers.

    Args:
        shape: a name in ``SHAPES``.
        numbers: height, window, center, dip, wider; what is not given is as it stands at the head of this file.
    """
    names = SHAPES[shape][1]
    held = {name: float(numbers.pop(name.lower(), globals()[name])) for name in names}
    if numbers:
        raise TypeError(f"surrogate: expected {', '.join(names).lower()} for {shape!r}, got {', '.join(numbers)}")
    return _made("__".join((shape, *(struct.pack(">d", value).hex() for value in held.values()))))


@cache
def _made(name: str) -> Callable:
    shape, *numbers = name.split("__")
    function, names = SHAPES[shape]
    values = [struct.unpack(">d", bytes.fromhex(number))[0] for number in numbers]
    made = FunctionType(function.__code__, {**globals(), **dict(zip(names, values, strict=True))}, name)
    made.__module__, made.__qualname__, made.__doc__ = __name__, name, function.__doc__
    return made


def __getattr__(name: str) -> Any:
    if name.partition("__")[0] in SHAPES:
        return _made(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
