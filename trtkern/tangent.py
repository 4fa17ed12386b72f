"""The forward-mode derivative of a neuron, derived from the three functions that define it.

A tangent d_a is the derivative of a number a along a direction, carried beside it. A step carries those of its input
current, of the state before it and of the parameters on, in the order in which the step itself runs::

    d_trace = charge_tangent(x, state, p, d_x, d_state, d_p)
    d_s = fire_tangent(trace, p, slope, d_trace, d_p)
    d_state = settle_tangent(trace, s, p, d_trace, d_s, d_p)

``slope`` is the surrogate derivative at potential - threshold. Where that difference is NaN the tangent of the spike
is NaN, whatever the surrogate answers. With ``detach`` it goes no further than the spike itself, as the gradient of
``trtkern.adjoint`` does not come back through it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from trtkern import adjoint, expressions, neurons
from trtkern.adjoint import Parts, names, symbols
from trtkern.expressions import Argument, Expression, choice, symbol
from trtkern.neurons import Neuron


def charge_tangent(neuron: Neuron, of_x: bool, of_p: bool) -> Parts:
    """The tangent of the trace as expressions of x, state_*, p_*, d_x, d_state_* and d_p_*."""
    given = {symbol("x"): symbol("d_x")} if of_x else {}
    given |= _paired("state", neuron.states) | (_paired("p", neuron.params) if of_p else {})
    return expressions.tangents(adjoint.charge(neuron), given)


def fire_tangent(neuron: Neuron, of_p: bool) -> Expression:
    """The tangent of the spike as an expression of trace_*, p_*, slope, d_trace_* and d_p_*."""
    potential, threshold = adjoint.fire(neuron)
    u = potential - threshold
    given = _paired("trace", neuron.trace) | (_paired("p", neuron.params) if of_p else {})
    (moved,) = expressions.tangents((u,), given)
    return choice(Expression("==", u, u), symbol("slope") * moved, u)


def settle_tangent(neuron: Neuron, reset: str, detach: bool, of_p: bool) -> Parts:
    """The tangent of the state as expressions of trace_*, s, p_*, d_trace_*, d_s and d_p_*."""
    given = _paired("trace", neuron.trace) | (_paired("p", neuron.params) if of_p else {})
    if not detach:
        given[symbol("s")] = symbol("d_s")
    return expressions.tangents(adjoint.settle(neuron, reset), given)


def _paired(prefix: str, parts: tuple[str, ...]) -> dict[Expression, Expression]:
    return dict(zip(symbols(prefix, parts), symbols(f"d_{prefix}", parts), strict=True))


@cache
def functions(name: str, reset: str, detach: bool, of_x: bool, of_p: bool) -> tuple[Callable, Callable, Callable]:
    """The three of that neuron as Python functions over the names of ``expressions.CALLS``.

    Args:
        name, reset, detach: of the neuron.
        of_x, of_p: whether the input current and the parameters have tangents; what has none is not read.
    """
    with expressions.anew():
        return _functions(neurons.lookup(name), reset, detach, of_x, of_p)


def _functions(neuron: Neuron, reset: str, detach: bool, of_x: bool, of_p: bool) -> tuple[Callable, Callable, Callable]:
    state: Argument = ("state", names("state", neuron.states))
    trace: Argument = ("trace", names("trace", neuron.trace))
    p: Argument = ("p", names("p", neuron.params))
    d_state: Argument = ("d_state", names("d_state", neuron.states))
    d_trace: Argument = ("d_trace", names("d_trace", neuron.trace))
    d_p: Argument = ("d_p", names("d_p", neuron.params))
    sources = (
        expressions.python("charge_tangent", ["x", state, p, "d_x", d_state, d_p], charge_tangent(neuron, of_x, of_p)),
        expressions.python("fire_tangent", [trace, p, "slope", d_trace, d_p], [fire_tangent(neuron, of_p)]),
        expressions.python(
            "settle_tangent",
            [trace, "s", p, d_trace, "d_s", d_p],
            settle_tangent(neuron, reset, detach, of_p),
        ),
    )
    label = f"{neuron.name}, {reset} reset{', detached' * detach}{', x' * of_x}{', p' * of_p}"
    charge, fire, settle = (neurons.compiled(f"<a tangent {i} of {label}>", source) for i, source in enumerate(sources))
    return charge, fire, settle
