"""A neuron as the kernels call it: the functions of its row and of its derived backward pass, rebound to Triton."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton.language as tl

from trtkern import adjoint, expressions, neurons
from trtkern.expressions import rebind
from trtkern.kernels.numerics import INTERPRETED, NAMES, inline
from trtkern.spec import LIFSpec


@dataclass(frozen=True, eq=False)
class Steps:
    """A constant of a kernel: one neuron with one reset. See ``trtkern.neurons`` and ``trtkern.adjoint``."""

    charge: Any
    fire: Any
    settle: Any
    fired_back: Any
    charge_back: Any
    states: Any
    """How many numbers its state has."""
    traces: Any
    params: Any
    v: Any
    """Which state is the membrane potential."""
    h: Any
    """Which number of the trace is the potential before the firing."""
    alone: tuple[Any, ...]
    """By parameter, whether the state after a step depends on it and nothing else does."""
    cache_key: str
    """Triton keeps compiled kernels by it."""

    def __repr__(self) -> str:
        return f"Steps({self.cache_key})"


def steps(spec: LIFSpec) -> Steps:
    """The neuron of a spec: the same object at every call."""
    return _steps(spec.neuron, spec.reset, spec.detach_reset)


@cache
def _steps(name: str, reset: str, detach: bool) -> Steps:
    row = neurons.lookup(name)
    functions = (row.charge, row.fire, row.settle[reset], *adjoint.functions(name, reset, detach))
    text = "".join(inspect.getsource(function) for function in functions)
    with expressions.anew():
        settled = expressions.symbols(adjoint.settle(row, reset))
        elsewhere = expressions.symbols([*adjoint.charge(row), *adjoint.fire(row)])
    counts = (len(row.states), len(row.trace), len(row.params), row.membrane, row.potential)
    return Steps(
        *(inline(rebind(function, NAMES)) for function in functions),
        *(count if INTERPRETED.value else tl.constexpr(count) for count in counts),
        tuple(f"p_{param}" in settled - elsewhere for param in row.params),
        f"{name}-{reset}-{detach}-{hashlib.sha256(text.encode()).hexdigest()[:16]}",
    )


@inline
def chosen(condition, a, b, COUNT: tl.constexpr):
    """The COUNT numbers of a where the condition holds, of b elsewhere."""
    made = ()
    for i in tl.static_range(COUNT):
        made = made + (tl.where(condition, a[i], b[i]),)  # noqa: RUF005 (Triton knows no starred expression)
    return made


@inline
def added(numbers, at: tl.constexpr, value, COUNT: tl.constexpr):
    """The COUNT numbers, with a value added to one of them."""
    made = ()
    for i in tl.static_range(COUNT):
        made = made + (numbers[i] + value if i == at else numbers[i],)  # noqa: RUF005
    return made


@inline
def nothing(shape_of, COUNT: tl.constexpr):
    """COUNT times zero."""
    made = ()
    for _ in tl.static_range(COUNT):
        made = made + (tl.zeros_like(shape_of),)  # noqa: RUF005
    return made


@inline
def settled(trace, p, NEURON: tl.constexpr):
    """The state after a step, and whether it fired."""
    potential, threshold = NEURON.fire(trace, p)
    fired = potential > threshold
    return NEURON.settle(trace, fired, p), fired
