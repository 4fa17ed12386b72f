"""The surrogate derivatives: each one defined here, once, for every backend.

A surrogate is a plain function of ``(u, alpha)``, ``u = h - v_threshold``, built from arithmetic, comparisons and the
names ``exp``, ``abs``, ``maximum`` and ``where``. As it stands it runs on Python floats; ``trtkern.dialect`` rebinds
those names for torch and Triton and prints the function as C++ when the extensions are built.

This module imports the standard library only: the build loads it by path, before torch exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

PRIMITIVES = ("exp", "abs", "maximum", "where")
"""The names that a surrogate may use; ``trtkern.dialect`` gives them their meaning on every backend."""


def exp(x: float) -> float:
    """e**x; inf instead of an OverflowError, as floating-point hardware answers."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def maximum(a: float, b: float) -> float:
    """The larger of the two; NaN if either is NaN, on every backend."""
    return math.nan if a != a or b != b else max(a, b)


def where(condition: bool, a: float, b: float) -> float:
    """a where the condition holds, b elsewhere."""
    return a if condition else b


def triangle(u, alpha):
    """max(0, alpha - abs(u)) / alpha**2: the TRT and TET reference codes (arXiv 2506.19256, 2202.11946)."""
    # The factor does not depend on u: compilers take the division out of the loop.
    return maximum(alpha - abs(u), 0.0) * (1.0 / (alpha * alpha))


def sigmoid(u, alpha):
    """alpha * sig * (1 - sig) with sig = 1 / (1 + exp(-alpha * u)): SpikingJelly's Sigmoid."""
    sig = 1.0 / (1.0 + exp(-alpha * u))
    return alpha * sig * (1.0 - sig)


def atan(u, alpha):
    """(alpha / 2) / (1 + (pi / 2 * alpha * u)**2): SpikingJelly's and snnTorch's ATan (Fang et al. 2021)."""
    z = 1.5707963267948966 * alpha * u
    return 0.5 * alpha / (1.0 + z * z)


def rectangle(u, alpha):
    """alpha where abs(u) < 1 / (2 * alpha), else 0: STBP (Wu et al. 2018)."""
    return where(abs(u) < 0.5 / alpha, alpha, 0.0)


def fast_sigmoid(u, alpha):
    """1 / (1 + alpha * abs(u))**2: SuperSpike (Zenke & Ganguli 2018), snnTorch."""
    d = 1.0 + alpha * abs(u)
    return 1.0 / (d * d)


def gaussian(u, alpha):
    """alpha / sqrt(2 * pi) * exp(-(alpha * u)**2 / 2)."""
    z = alpha * u
    return 0.3989422804014327 * alpha * exp(-0.5 * z * z)


@dataclass(frozen=True)
class Surrogate:
    """A derivative ``dsigma/du`` and the sharpness that ``alpha=None`` stands for."""

    name: str
    function: Callable
    default_alpha: float
    builtin: bool = True


# The position of a row is its number in the compiled code: append, never reorder.
TABLE: dict[str, Surrogate] = {
    row.name: row
    for row in (
        Surrogate("triangle", triangle, 1.0),
        Surrogate("sigmoid", sigmoid, 4.0),
        Surrogate("atan", atan, 2.0),
        Surrogate("rectangle", rectangle, 1.0),
        Surrogate("fast_sigmoid", fast_sigmoid, 25.0),
        Surrogate("gaussian", gaussian, 1.0),
    )
}
BUILTIN: tuple[str, ...] = tuple(TABLE)


def register(function: Callable, name: str | None = None, default_alpha: float = 1.0) -> str:
    """Add a function of ``(u, alpha)`` to the table and return the name that it goes by.

    It runs on the ``reference`` and ``triton`` backends; ``cpu`` and ``cuda`` hold the built-in rows only. Import
    ``exp``, ``maximum`` and ``where`` from this module to write it. Registering the same function twice is harmless.

    Raises:
        TypeError: the function is no plain Python function of two arguments without a closure, or uses other names
            than exp, abs, maximum, where and global floats.
        ValueError: the name belongs to another surrogate.
    """
    code = getattr(function, "__code__", None)
    if code is None or code.co_argcount != 2 or code.co_freevars:
        raise TypeError(
            f"surrogate: expected a plain function of (u, alpha) without a closure, got {function!r}; "
            "define it at module level"
        )
    strange = [n for n in code.co_names if n not in PRIMITIVES and not isinstance(function.__globals__.get(n), float)]
    if strange:
        raise TypeError(
            f"surrogate: expected {function.__name__} to use {', '.join(PRIMITIVES)} and floats only, got "
            f"{strange[0]!r}; write `from trtkern.surrogates import exp, maximum, where` and call them by these names"
        )
    name = name or f"{function.__module__}.{function.__qualname__}"
    known = TABLE.get(name)
    if known is not None and known.function.__code__ is not code:
        raise ValueError(f"surrogate: the name {name!r} is taken by {known.function!r}; pass another name")
    TABLE.setdefault(name, Surrogate(name, function, default_alpha, builtin=False))
    return name


def lookup(name: str) -> Surrogate:
    """The row of that name; a ValueError with the list of names otherwise."""
    try:
        return TABLE[name]
    except KeyError:
        raise ValueError(f"surrogate: expected one of {', '.join(TABLE)}, got {name!r}") from None
