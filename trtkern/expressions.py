"""Straight-line functions as expressions: run on symbols, differentiated both ways, printed as Python and as C++.

A function over arithmetic, comparisons and the names in ``CALLS`` is run once with symbols in place of numbers. What
comes out is a graph of expressions in which equal parts are one. ``Gradients`` differentiates such graphs in reverse
mode, ``tangents`` in forward mode; ``python`` and ``cpp`` print them.

This module imports the standard library only: the build uses it before torch exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

CALLS = ("fma", "exp", "abs", "maximum", "where")
"""The names that a function may call."""
COMPARISONS = ("<", "<=", ">", ">=", "==")
_made: ContextVar[dict[tuple, Expression]] = ContextVar("made", default={})  # noqa: B039 (one for all, on purpose)


class Expression:
    """A node: a symbol, a number, or an operation over other nodes. Equal nodes are the same object."""

    __slots__ = ("args", "number", "op")

    op: str
    """"symbol", "number", one of + - * /, "neg", a comparison, or one of ``CALLS``."""
    args: tuple[Any, ...]
    """Nodes; the name of a symbol; the value of a number."""
    number: int
    """Nodes are numbered as they are made: each after those that it is made of."""

    def __new__(cls, op: str, *args: Any) -> Expression:
        made = _made.get()
        known = made.get((op, *args))
        if known is None:
            known = super().__new__(cls)
            known.op, known.args, known.number = op, args, len(made)
            made[op, *args] = known
        return known

    def __bool__(self) -> bool:
        raise TypeError(f"expected a straight line, got a decision on {text(self)}; use where(condition, a, b)")

    def __add__(self, other: Any) -> Expression:
        return _sum(self, of(other))

    def __radd__(self, other: Any) -> Expression:
        return _sum(of(other), self)

    def __sub__(self, other: Any) -> Expression:
        return _difference(self, of(other))

    def __rsub__(self, other: Any) -> Expression:
        return _difference(of(other), self)

    def __mul__(self, other: Any) -> Expression:
        return _product(self, of(other))

    def __rmul__(self, other: Any) -> Expression:
        return _product(of(other), self)

    def __truediv__(self, other: Any) -> Expression:
        return _quotient(self, of(other))

    def __rtruediv__(self, other: Any) -> Expression:
        return _quotient(of(other), self)

    def __neg__(self) -> Expression:
        return _negative(self)

    def __abs__(self) -> Expression:
        return Expression("abs", self)

    def __lt__(self, other: Any) -> Expression:
        return Expression("<", self, of(other))

    def __le__(self, other: Any) -> Expression:
        return Expression("<=", self, of(other))

    def __gt__(self, other: Any) -> Expression:
        return Expression(">", self, of(other))

    def __ge__(self, other: Any) -> Expression:
        return Expression(">=", self, of(other))


def symbol(name: str) -> Expression:
    """What stands for a number, or for a condition, of that name."""
    return Expression("symbol", name)


def of(value: Any) -> Expression:
    """A node as it is; a number as one.

    Raises:
        TypeError: neither.
    """
    if isinstance(value, Expression):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number or an expression, got {value!r}")
    return Expression("number", float(value))


ZERO, ONE = of(0.0), of(1.0)


@contextmanager
def anew() -> Iterator[None]:
    """Within, nodes are numbered from the start again: what is derived and printed is then the same in every process,
    whatever it has made before."""
    token = _made.set({(node.op, *node.args): node for node in (ZERO, ONE)})
    try:
        yield
    finally:
        _made.reset(token)


# What is made is simplified only where the result is the same number, but for the sign of a zero and for 0 * NaN, which
# arise where a gradient is structurally zero.


def _sum(a: Expression, b: Expression) -> Expression:
    if ZERO in (a, b):
        return b if a is ZERO else a
    if b.op == "neg":
        return _difference(a, b.args[0])
    whole = _both_parts(b.args[0], b.args[1], a) if b.op == "*" else None
    return Expression("+", a, b) if whole is None else whole


def _difference(a: Expression, b: Expression) -> Expression:
    if b is ZERO:
        return a
    if a is ZERO:
        return -b
    if a is b:
        return ZERO
    if a.op == "-" and a.args[0] is b:  # (b - c) - b
        return -a.args[1]
    if a.op == "+" and b in a.args:
        return a.args[1] if a.args[0] is b else a.args[0]
    return Expression("-", a, b)


def _product(a: Expression, b: Expression) -> Expression:
    if ZERO in (a, b):
        return ZERO
    if ONE in (a, b):
        return b if a is ONE else a
    if a.op == "neg" and b.op == "neg":
        return a.args[0] * b.args[0]
    return Expression("*", a, b)


def _quotient(a: Expression, b: Expression) -> Expression:
    return a if b is ONE or a is ZERO else Expression("/", a, b)


def _negative(a: Expression) -> Expression:
    if a.op == "number":
        return of(-a.args[0]) if a is not ZERO else ZERO
    return a.args[0] if a.op == "neg" else Expression("neg", a)


def fused(a: Any, b: Any, c: Any) -> Expression:
    """a * b + c, rounded once."""
    a, b, c = of(a), of(b), of(c)
    if c is ZERO or ZERO in (a, b):
        return a * b + c
    if ONE in (a, b):
        return a * b + c
    if b.op == "neg":  # one form of two; to negate the first factor, a gradient, takes no instruction and no register
        a, b = -a, b.args[0]
    whole = _both_parts(a, b, c)
    return Expression("fma", a, b, c) if whole is None else whole


def _both_parts(a: Expression, b: Expression, c: Expression) -> Expression | None:
    """a * b + c where c is a * (1 - b), or something added to that; else None."""
    rest = ONE - b
    if c.op == "*" and c.args == (a, rest):
        return a
    if c.op == "fma" and c.args[:2] == (a, rest):
        return c.args[2] + a
    return None


def choice(condition: Any, a: Any, b: Any) -> Expression:
    """a where the condition holds, b elsewhere."""
    a, b = of(a), of(b)
    return a if a is b else Expression("where", of(condition), a, b)


_MEANINGS: dict[str, Callable] = {
    "fma": fused,
    "exp": lambda x: Expression("exp", of(x)),
    "abs": lambda x: Expression("abs", of(x)),
    "maximum": lambda a, b: Expression("maximum", of(a), of(b)),
    "where": choice,
}


def traced(function: Callable, *arguments: Any) -> Any:
    """What the function makes of symbols: it runs once, with the names of ``CALLS`` bound to expressions.

    Raises:
        TypeError: it decides on a symbol, or calls what it must not.
    """
    return rebind(function, _MEANINGS)(*arguments)


def rebind(function: Callable, names: Mapping[str, Any]) -> FunctionType:
    """The same code object over other globals: ``names`` replaces those that it calls."""
    code = function.__code__
    bound = FunctionType(code, {**function.__globals__, **names}, function.__name__, function.__defaults__)
    bound.__module__ = function.__module__
    bound.__qualname__ = function.__qualname__
    return bound


class Gradients:
    """Reverse-mode differentiation: cotangents of nodes, added up as the graph is walked from its outputs back.

    Args:
        sums: {node: what its cotangent is added to}; elsewhere it starts from nothing.
    """

    def __init__(self, sums: Mapping[Expression, Expression] | None = None) -> None:
        self.found: dict[Expression, Expression] = dict(sums or {})

    def of(self, node: Expression) -> Expression:
        """The cotangent of a node so far; zero if nothing depended on it."""
        return self.found.get(node, ZERO)

    def add(self, node: Expression, *factors: Any) -> None:
        """Add the product of one or two factors to a node's cotangent; with two and a sum that is there by fma."""
        factors = tuple(map(of, factors))
        if ZERO in factors or node.op == "number":
            return
        so_far = self.of(node)
        if len(factors) == 2 and ONE not in factors:
            self.found[node] = fused(*factors, so_far)
        else:
            term = factors[0] if len(factors) == 1 or factors[1] is ONE else factors[1]
            self.found[node] = so_far + term

    def back(self, outputs: Sequence[Expression], stop: Sequence[Expression]) -> None:
        """Hand the cotangents of the outputs to the nodes ``stop``, at which the walk ends."""
        ends, seen, nodes = set(stop), set(), list(outputs)
        while nodes:
            node = nodes.pop()
            if node not in seen and node not in ends and node.op not in ("symbol", "number"):
                seen.add(node)
                nodes += node.args
        for node in sorted(seen, key=lambda node: -node.number):
            g = self.of(node)
            if g is not ZERO:
                self._node(node, g)

    def only(self, nodes: Sequence[Expression]) -> None:
        """Forget the cotangents of all other nodes: they were handed on, and another walk would hand them on again."""
        kept = set(nodes)
        self.found = {node: g for node, g in self.found.items() if node in kept}

    def _node(self, node: Expression, g: Expression) -> None:
        match node.op, node.args:
            case "+", (a, b):
                self.add(a, g)
                self.add(b, g)
            case "-", (a, b):
                self.add(a, g)
                self.add(b, -g)
            case "*", (a, b):
                self.add(a, g, b)
                self.add(b, g, a)
            case "/", (a, b):
                self.add(a, g / b)
                self.add(b, -(g / b), node)
            case "neg", (a,):
                self.add(a, -g)
            case "fma", (a, b, c):
                self.add(a, g, b)
                self.add(b, g, a)
                self.add(c, g)
            case "exp", (a,):
                self.add(a, g, node)
            case "abs", (a,):
                self.add(a, choice(a > ZERO, g, choice(a < ZERO, -g, ZERO)))
            case "maximum", (a, b):
                half = choice(Expression("==", a, b), g * 0.5, ZERO)
                self.add(a, choice(a > b, g, half))
                self.add(b, choice(b > a, g, half))
            case "where", (condition, a, b) if condition.op == "symbol":  # a spike: s * a + (1 - s) * b
                # In numbers, not in conditions: compilers for GPUs would keep one for each step of a chunk.
                s = choice(condition, ONE, ZERO)
                self.add(a, g, s)
                self.add(b, g, ONE - s)
                self.add(condition, g, a - b)
            case "where", (condition, a, b):
                self.add(a, choice(condition, g, ZERO))
                self.add(b, choice(condition, ZERO, g))


def tangents(outputs: Sequence[Expression], given: Mapping[Expression, Expression]) -> tuple[Expression, ...]:
    """Forward-mode differentiation: the tangents of the outputs.

    Args:
        outputs: nodes.
        given: {node: its tangent}; every other symbol is a constant.
    """
    found = dict(given)

    def of_node(node: Expression) -> Expression:
        if node not in found:
            found[node] = _tangent(node, of_node)
        return found[node]

    return tuple(map(of_node, outputs))


def _tangent(node: Expression, d: Callable[[Expression], Expression]) -> Expression:
    match node.op, node.args:
        case "+", (a, b):
            return d(a) + d(b)
        case "-", (a, b):
            return d(a) - d(b)
        case "*", (a, b):
            return fused(d(a), b, a * d(b))
        case "/", (a, b):
            return (d(a) - node * d(b)) / b
        case "neg", (a,):
            return -d(a)
        case "fma", (a, b, c):
            return fused(d(a), b, fused(a, d(b), d(c)))
        case "exp", (a,):
            return d(a) * node
        case "abs", (a,):
            return choice(a > ZERO, d(a), choice(a < ZERO, -d(a), ZERO))
        case "maximum", (a, b):
            return choice(a > b, d(a), choice(b > a, d(b), (d(a) + d(b)) * 0.5))
        case "where", (condition, a, b) if condition.op == "symbol":  # a spike: the derivative by it is a - b
            return fused(a - b, d(condition), choice(condition, d(a), d(b)))
        case "where", (condition, a, b):
            return choice(condition, d(a), d(b))
    return ZERO


# Printing.


def text(node: Expression) -> str:
    """The node as Python, for messages."""
    return _Printer(_PYTHON).term(node)


_PYTHON: dict[str, str] = {name: f"{name}({{}}, {{}}, {{}})" for name in ("fma", "where")} | {
    "exp": "exp({})", "abs": "abs({})", "maximum": "maximum({}, {})", "neg": "(-{})"
}  # fmt: skip
_CPP: dict[str, str] = {name: form.replace("(", "_(", 1) for name, form in _PYTHON.items()} | {"neg": "(-{})"}


class _Printer:
    """Statements of one assignment each for the parts that are used more than once, and the terms made of them."""

    def __init__(self, forms: Mapping[str, str], number: str = "{!r}", names: Mapping[Expression, str] = {}) -> None:
        self.forms, self.number, self.names = forms, number, dict(names)

    def term(self, node: Expression) -> str:
        if node in self.names:
            return self.names[node]
        if node.op == "symbol":
            return node.args[0]
        if node.op == "number":
            return self.number.format(node.args[0])
        parts = [self.term(each) for each in node.args]
        return self.forms.get(node.op, f"({{}} {node.op} {{}})").format(*parts)

    def shared(self, outputs: Sequence[Expression]) -> list[tuple[str, Expression, str]]:
        """(name, node, term) of every part that is used again, in order."""
        uses: dict[Expression, int] = {}
        nodes = list(outputs)
        while nodes:
            node = nodes.pop()
            uses[node] = uses.get(node, 0) + 1
            if uses[node] == 1 and node.op not in ("symbol", "number"):
                nodes += node.args
        again = [node for node, count in uses.items() if count > 1 and node.op not in ("symbol", "number")]
        made: list[tuple[str, Expression, str]] = []
        for node in sorted(again, key=lambda node: node.number):
            term = self.term(node)
            self.names[node] = f"t{len(made)}"
            made.append((self.names[node], node, term))
        return made


Argument = str | tuple[str, Sequence[str]]
"""The name of an argument, and if it is a tuple the names of its parts."""


def python(
    name: str,
    arguments: Sequence[Argument],
    outputs: Sequence[Any],
    given: Mapping[str, Expression] = {},
) -> str:
    """The source of a Python function of that name.

    Args:
        name: of the function.
        arguments: in order; a tuple is unpacked.
        outputs: nodes, or tuples of nodes, which it returns as a tuple.
        given: {symbol: what it stands for}, computed first.
    """
    heads = [each if isinstance(each, str) else each[0] for each in arguments]
    lines = [f"def {name}({', '.join(heads)}):"]
    flat = [node for each in outputs for node in (each if isinstance(each, tuple) else (each,))]
    used = symbols([*flat, *given.values()])
    for each in arguments:
        if not isinstance(each, str) and used & {*each[1]}:
            lines.append(f"    {', '.join(each[1])}{',' if len(each[1]) == 1 else ''} = {each[0]}")
    printer = _Printer(_PYTHON)
    lines += [f"    {key} = {printer.term(node)}" for key, node in given.items() if key in used]
    lines += [f"    {key} = {term}" for key, _, term in printer.shared(flat)]
    lines.append(f"    return {_tuple(printer, outputs)}")
    return "\n".join(lines) + "\n"


def _tuple(printer: _Printer, outputs: Sequence[Any]) -> str:
    parts = [_tuple(printer, each) if isinstance(each, tuple) else printer.term(each) for each in outputs]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def symbols(outputs: Sequence[Expression]) -> set[str]:
    """The names of all symbols in the outputs."""
    seen, nodes = set(), list(outputs)
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += node.args if node.op not in ("symbol", "number") else ()
    return {node.args[0] for node in seen if node.op == "symbol"}


def cpp(outputs: Mapping[str, Expression], names: Mapping[str, str]) -> list[str]:
    """C++ statements over F that assign to each left side its node.

    Args:
        outputs: {left side: node}; a node that is its own left side is left out.
        names: {symbol: what C++ calls it}.
    """
    known = {symbol(key): name for key, name in names.items()}
    printer = _Printer(_CPP, "lit<F>({!r}f)", known)
    shared = printer.shared(list(outputs.values()))
    lines = [f"const {'auto' if node.op in COMPARISONS else 'F'} {key} = {term};" for key, node, term in shared]
    # All are computed before any is written: a left side may be read by another.
    written = [(left, printer.term(node)) for left, node in outputs.items() if printer.term(node) != left]
    lines += [f"const F w{i} = {term};" for i, (_, term) in enumerate(written)]
    return lines + [f"{left} = w{i};" for i, (left, _) in enumerate(written)]
