"""The backward pass of a neuron, derived from the three functions that define it.

A step is undone in two parts, last part first. The first goes back through the reset and the firing, from the gradients
of the state and of the spike to that of the trace::

    g_trace, sums = fired_back(trace, p, g_state, g_s, slope, sums)

and the second through the charge, from the gradient of the trace to those of the input current and the state before::

    g_x, g_state, sums = charge_back(x, state, p, g_trace, sums)

``slope`` is the surrogate derivative at potential - threshold, ``sums`` the gradients of the parameters so far. Where
that difference is NaN so is the gradient of the potential, whatever the surrogate answers. Between the two stands what
a kernel adds: the gradient of a trace that was returned.

This module imports the standard library only: the build uses it before torch exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from trtkern import expressions, neurons
from trtkern.expressions import Expression, Gradients, choice, symbol, traced
from trtkern.neurons import Neuron

Parts = tuple[Expression, ...]


def symbols(prefix: str, parts: Iterable[str]) -> Parts:
    """A symbol for each part."""
    return tuple(map(symbol, names(prefix, parts)))


def charge(neuron: Neuron) -> Parts:
    """The trace as expressions of x, state_* and p_*."""
    return _parts(traced(neuron.charge, symbol("x"), symbols("state", neuron.states), symbols("p", neuron.params)))


def fire(neuron: Neuron) -> Parts:
    """The potential and the threshold as expressions of trace_* and p_*."""
    return _parts(traced(neuron.fire, symbols("trace", neuron.trace), symbols("p", neuron.params)))


def settle(neuron: Neuron, reset: str) -> Parts:
    """The state after the step as expressions of trace_*, s and p_*."""
    known = symbols("trace", neuron.trace), symbol("s"), symbols("p", neuron.params)
    return _parts(traced(neuron.settle[reset], *known))


def fired_back(neuron: Neuron, reset: str, detach: bool) -> tuple[Parts, Parts]:
    """The gradients of the trace, and the sums, as expressions of trace_*, s (it fired), p_*, g_* (of the state), g_s,
    slope and sum_*."""
    trace, p, s = symbols("trace", neuron.trace), symbols("p", neuron.params), symbol("s")
    grads, ends = _sums(neuron), (*trace, *p, s)
    after = settle(neuron, reset)
    for node, g in zip(after, symbols("g", neuron.states), strict=True):
        grads.add(node, g)
    grads.back(after, ends)
    grads.only(ends)
    spike = symbol("g_s") + (expressions.ZERO if detach else grads.of(s))
    if not detach and s in grads.found:
        grads.found[s] = expressions.ZERO
        again = _sums(neuron)  # as above, but what comes through the spike is added to its gradient by fma
        again.found[s] = symbol("g_s")
        for node, g in zip(after, symbols("g", neuron.states), strict=True):
            again.add(node, g)
        again.back(after, ends)
        again.only(ends)
        grads, spike = again, again.of(s)
    potential, threshold = fire(neuron)
    through = symbol("slope") * spike
    # A parameter is finite, so that the potential tells; the difference would be kept in a register to be asked.
    u = potential if threshold in p else potential - threshold
    known = Expression("==", u, u)
    grads.add(potential, through)
    grads.found[potential] = choice(known, grads.of(potential), u)
    grads.add(threshold, -(through if threshold in p else choice(known, through, u)))
    grads.back((potential, threshold), (*trace, *p))
    return tuple(map(grads.of, trace)), tuple(map(grads.of, p))


def charge_back(neuron: Neuron) -> tuple[Expression, Parts, Parts]:
    """The gradients of x and of the state before, and the sums, as expressions of x, state_*, p_*, g_* (of the trace)
    and sum_*."""
    x, state, p = symbol("x"), symbols("state", neuron.states), symbols("p", neuron.params)
    grads, trace = _sums(neuron), charge(neuron)
    for node, g in zip(trace, symbols("g", neuron.trace), strict=True):
        grads.add(node, g)
    grads.back(trace, (x, *state, *p))
    return grads.of(x), tuple(map(grads.of, state)), tuple(map(grads.of, p))


def _sums(neuron: Neuron) -> Gradients:
    pairs = zip(symbols("p", neuron.params), symbols("sum", neuron.params), strict=True)
    return Gradients(dict(pairs))


def _parts(made: Any) -> Parts:
    return tuple(map(expressions.of, made))


# As Python, for torch and Triton.


def fired_back_source(neuron: Neuron, reset: str, detach: bool) -> str:
    """``fired_back(trace, p, g_state, g_s, slope, sums)``, which returns the gradients of the trace, and the sums."""
    potential, threshold = fire(neuron)
    arguments: list[expressions.Argument] = [
        ("trace", names("trace", neuron.trace)),
        ("p", names("p", neuron.params)),
        ("g_state", names("g", neuron.states)),
        "g_s",
        "slope",
        ("sums", names("sum", neuron.params)),
    ]
    outputs = fired_back(neuron, reset, detach)
    return expressions.python("fired_back", arguments, outputs, {"s": potential > threshold})


def charge_back_source(neuron: Neuron) -> str:
    """``charge_back(x, state, p, g_trace, sums)``, which returns the gradients of x and of the state, and the sums."""
    arguments: list[expressions.Argument] = [
        "x",
        ("state", names("state", neuron.states)),
        ("p", names("p", neuron.params)),
        ("g_trace", names("g", neuron.trace)),
        ("sums", names("sum", neuron.params)),
    ]
    return expressions.python("charge_back", arguments, charge_back(neuron))


def names(prefix: str, parts: Iterable[str]) -> list[str]:
    """The names of the symbols that ``symbols`` makes."""
    return [f"{prefix}_{part}" for part in parts]


@cache
def functions(name: str, reset: str, detach: bool) -> tuple[Callable, Callable]:
    """``fired_back`` and ``charge_back`` of that neuron as Python functions over the names of ``expressions.CALLS``."""
    neuron = neurons.lookup(name)
    label = f"{name}, {reset} reset{', detached' * detach}"
    with expressions.anew():
        return (
            neurons.compiled(f"<the firing of {label}>", fired_back_source(neuron, reset, detach)),
            neurons.compiled(f"<the charge of {name}>", charge_back_source(neuron)),
        )
