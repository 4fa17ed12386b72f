"""What every kernel file shares: exact fma, casts, and the names that surrogates and neurons call, in Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from trtkern import surrogates
from trtkern.expressions import rebind

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def inline(function: Callable) -> Any:
    """A function that kernels call: jitted, and left as it is in the interpreter, which runs plain Python faster."""
    return function if INTERPRETED.value else triton.jit(function)


@inline
def fma(a, b, c):
    """a * b + c in float32, rounded once."""
    if INTERPRETED:
        # The interpreter's own fma rounds twice. A product of two float32 is exact in float64.
        result = tl.cast(tl.cast(a, tl.float64) * tl.cast(b, tl.float64) + tl.cast(c, tl.float64), tl.float32)
    else:
        result = tl.fma(a, b, c)
    return result


@inline
def widen(x):
    """x in float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter's own cast loses subnormals.
        result = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.float32)
    return result


@inline
def narrow(x, DTYPE: tl.constexpr):
    """float32 x in DTYPE, to nearest even; NaN stays NaN."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter's own cast rounds ties up and drops the carry into the exponent.
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(DTYPE)
    return result


@inline
def bound(x):
    """A run-time integer as the bound of a range."""
    if INTERPRETED:
        # Recent numpy does not turn the interpreter's arrays of one element into Python integers by itself.
        result = x.handle.data.item()
    else:
        result = x
    return result


@inline
def exact(x):
    """A run-time number, or one of Python, in float64."""
    return tl.full((), x, tl.float64)


@inline
def exp(x):
    """e**x."""
    return tl.exp(tl.cast(x, tl.float32))


@inline
def absolute(x):
    """|x|."""
    return tl.abs(x)


@inline
def maximum(a, b):
    """The larger of the two; NaN if either is NaN (tl.maximum alone drops it)."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@inline
def where(condition, a, b):
    """a where the condition holds, b elsewhere."""
    return tl.where(condition, a, b)


NAMES = {"fma": fma, "exp": exp, "abs": absolute, "maximum": maximum, "where": where}
_derivatives: dict[str, Any] = {}


def derivative(name: str) -> Any:
    """The surrogate derivative of that name as a function that kernels call: the same object at every call."""
    row = surrogates.lookup(name)
    found = _derivatives.get(row.name)
    if found is None:
        function, names = row.function, dict(NAMES)
        if not INTERPRETED.value:  # compiled code takes no global number but a constexpr
            numbers = ((key, function.__globals__.get(key)) for key in function.__code__.co_names)
            names.update({key: tl.constexpr(number) for key, number in numbers if isinstance(number, float)})
        found = _derivatives[row.name] = inline(rebind(function, names))
    return found
