"""The surrogate derivatives: each one defined here, once, for every backend.

A surrogate is a plain function of ``(u, alpha)``, ``u = h - v_threshold``, built from arithmetic, comparisons and the
names ``exp``, ``abs``, ``maximum`` and ``where``. As it stands it runs on Python floats; ``trtkern.dialect`` rebinds
those names for torch and Triton and prints the function as C++ when the extensions are built.

This module imports the standard library only: the build loads it by path, before torch exists.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType
from typing import Any

__all__ = [
    "BUILTIN", "TABLE", "Surrogate", "atan", "exp", "exponential", "fast_sigmoid", "gaussian", "lookup", "maximum",
    "rectangle", "register", "sigmoid", "triangle", "where",
]  # fmt: skip

PRIMITIVES = ("exp", "abs", "maximum", "where")
"""The names that a surrogate may use; ``trtkern.dialect`` gives them their meaning on every backend."""


def exp(x: float) -> float:
    """e**x; inf instead of an OverflowError, as floating-point hardware answers.

    Args:
        x: the exponent.
    """
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def maximum(a: float, b: float) -> float:
    """The larger of the two; NaN if either is NaN, on every backend.

    Args:
        a: a number.
        b: another one.
    """
    return math.nan if a != a or b != b else max(a, b)


def where(condition: bool, a: float, b: float) -> float:
    """a where the condition holds, b elsewhere.

    Args:
        condition: a comparison, or whether the neuron fired.
        a: the number where it holds.
        b: the number where it does not.
    """
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


def exponential(u, alpha):
    """alpha * exp(-alpha * abs(u)): sinabs' SingleExponential (Shrestha & Orchard 2018)."""
    return alpha * exp(-alpha * abs(u))


@dataclass(frozen=True)
class Surrogate:
    """A derivative ``dsigma/du`` and the sharpness that ``alpha=None`` stands for."""

    name: str
    """Of a user's function with a digest of its code behind an @: another code is another surrogate."""
    function: Callable
    """The derivative, of (u, alpha)."""
    default_alpha: float
    """What ``alpha=None`` stands for."""
    builtin: bool = True
    """Whether it comes with trtkern, and so is in the compiled code."""


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
        Surrogate("exponential", exponential, 2.0),
    )
}
"""The surrogates by their names, those that were registered too."""
BUILTIN: tuple[str, ...] = tuple(TABLE)
"""The names of the surrogates that every backend has."""


_VERSIONS: dict[str, Surrogate] = {}
"""Every function that was ever registered, by its whole name; ``TABLE`` has the latest of each."""


def register(function: Callable, name: str | None = None, default_alpha: float = 1.0) -> str:
    """Add a function of ``(u, alpha)`` to the table and return the name that it goes by: ``name@digest of its code``.

    It runs on the ``reference`` and ``triton`` backends, and on ``cpu`` where a C++ compiler is there, which compiles
    it at first use if it is a straight line; ``cuda`` holds the built-in rows only. Import ``exp``,
    ``maximum`` and ``where`` from this module to write it. Another function under the same name, such as an edited cell
    of a notebook, replaces it for what is made from now on; layers that are there keep theirs. The global
    floats that it uses count as part of it, with the values that they have now.

    Args:
        function: a plain function, defined at the top of a module if layers with it are to be pickled or sent to other
            processes: they take it along by its name (``restore``).
        name: what to call it; its module and name by default.
        default_alpha: what ``alpha=None`` stands for.

    Raises:
        TypeError: the function is no plain Python function of two arguments without a closure, or uses other names
            than exp, abs, maximum, where and global floats.
        ValueError: the name is that of a built-in surrogate, or has an @ or a | in it.
    """
    code = getattr(function, "__code__", None)
    if code is None or code.co_argcount != 2 or code.co_freevars:
        raise TypeError(
            f"surrogate: expected a plain function of (u, alpha) without a closure, got {function!r}; "
            "define it at module level"
        )
    floats = {n: function.__globals__[n] for n in code.co_names if isinstance(function.__globals__.get(n), float)}
    strange = [n for n in code.co_names if n not in PRIMITIVES and n not in floats]
    if strange:
        raise TypeError(
            f"surrogate: expected {function.__name__} to use {', '.join(PRIMITIVES)} and floats only, got "
            f"{strange[0]!r}; write `from trtkern.surrogates import exp, maximum, where` and call them by these names"
        )
    name = name or f"{function.__module__}.{function.__qualname__}"
    if name in BUILTIN or "@" in name or "|" in name:
        raise ValueError(f"surrogate: expected a name without @ and | that no built-in surrogate has, got {name!r}")
    meaning = (code.co_code, code.co_consts, code.co_names, code.co_varnames, floats, default_alpha)
    whole = f"{name}@{hashlib.sha256(repr(meaning).encode()).hexdigest()[:12]}"
    if whole not in _VERSIONS:
        if floats:  # at their values of now, which the digest is of
            frozen = FunctionType(code, {**function.__globals__, **floats}, function.__name__)
            frozen.__module__, frozen.__qualname__ = function.__module__, function.__qualname__
            function = frozen
        _VERSIONS[whole] = Surrogate(whole, function, default_alpha, builtin=False)
    TABLE[name] = _VERSIONS[whole]
    return whole


def lookup(name: str) -> Surrogate:
    """The row of that name; a ValueError with the list of names otherwise.

    Args:
        name: of the surrogate, as in ``TABLE``, or what ``register`` returned.
    """
    row = _VERSIONS.get(name) or TABLE.get(name)
    if row is None:
        from trtkern.names import unknown

        raise unknown("surrogate", name, TABLE)
    return row


def reference(name: str) -> str | tuple[str, str, str, float]:
    """What ``restore`` finds that surrogate by in another process: its name, and where its function is defined."""
    row = lookup(name)
    if row.builtin:
        return row.name
    return row.name, row.function.__module__, row.function.__qualname__, row.default_alpha


def restore(reference: str | tuple[str, str, str, float]) -> str:
    """The name of a surrogate by what ``reference`` gave: one that is registered here, or is imported now.

    Raises:
        ValueError: it is neither; says so when a layer is loaded, not when it first runs.
    """
    if isinstance(reference, str):
        return reference
    whole, module, path, default_alpha = reference
    if whole in _VERSIONS:
        return whole
    name = whole.rpartition("@")[0]
    try:
        function: Any = import_module(module)
        for part in path.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        if name not in TABLE:
            raise ValueError(
                f"surrogate: expected {name!r} to be importable where a layer with it is loaded, got {error!r}; define "
                "it with def at the top of a module that can be imported (no notebook, lambda or function inside a "
                f"function), or call trtkern.surrogates.register(function, {name!r}) before loading"
            ) from None
        found = TABLE[name].name
    else:
        found = register(function, name, default_alpha)
    if found != whole:
        warnings.warn(
            f"surrogate: {name!r} is not the one that the layer was saved with: its code has changed, or it was "
            "compiled by another version of Python; the one that is here is used",
            stacklevel=2,
        )
    return found
