"""Straight-line functions of a user's own: what they may be made of, and the file and line where they are not.

Such a function is plain Python over its arguments, numbers, arithmetic, comparisons and the names in
``trtkern.expressions.CALLS``. It is looked at before it runs (``plain``), runs once on symbols (``run``), and what it
returns is looked at (``numbers``); all that came of it can then be derived, printed and compiled.

This module imports the standard library only, as what uses it does.
"""

from __future__ import annotations

import dis
import inspect
import linecache
import math
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

from trtkern.expressions import CALLS, COMPARISONS, Expression, of, rebind, text, traced
from trtkern.names import nearest

USES = f"arithmetic (+ - * /), comparisons, global numbers and {', '.join(CALLS)}"
LARGEST = 3.4028234663852886e38
"""The largest number of float32, in which the kernels compute."""
_JUMPS = {dis.opname[op] for op in (*dis.hasjrel, *dis.hasjabs)}
_STRANGE = {
    "MAKE_FUNCTION": "a function or a comprehension inside",
    "IMPORT_NAME": "an import inside",
    "STORE_GLOBAL": "an assignment to a global name",
    "STORE_ATTR": "an assignment to an attribute",
    "STORE_SUBSCR": "an assignment to an element",
    "RAISE_VARARGS": "a raise",
}
"""Operations of Python's machine that no straight line has, in words."""


class Function:
    """A function of the user's with the place that it is refused at: file and line.

    Args:
        what: who asks, and what for: "neurons.register: AdEx, charge".
        function: the user's.
        arguments: what it is called with, in order.
        attributes: the names that may follow a dot.

    Raises:
        TypeError: it is no plain function of so many arguments, or no straight line.
    """

    def __init__(self, what: str, function: Any, arguments: Sequence[str], attributes: Sequence[str] = ()) -> None:
        self.what = what
        if not isinstance(function, FunctionType):
            raise TypeError(
                f"{what}: expected a plain function of ({', '.join(arguments)}), got {function!r}; write it with def "
                "at the top of a module"
            )
        self.function, self.code = function, function.__code__
        self._arguments(arguments)
        self.floats: dict[str, float] = {}
        """The global numbers that it uses, with the values that they have now."""
        self._straight(attributes)

    def refused(self, expected: str, got: str, do: str = "", line: int | None = None) -> TypeError:
        """The error: what was expected, what came and what to do, with the place."""
        place = f"{self.code.co_filename}, line {line or self.code.co_firstlineno}"
        return TypeError(f"{self.what} ({place}): expected {expected}, got {got}{f'; {do}' if do else ''}")

    def _arguments(self, arguments: Sequence[str]) -> None:
        code = self.code
        taken = code.co_varnames[: code.co_argcount]
        flags = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
        if len(taken) != len(arguments) or code.co_kwonlyargcount or code.co_flags & flags:
            raise self.refused(
                f"a function of ({', '.join(arguments)})", str(inspect.signature(self.function)), "take just these"
            )
        if code.co_freevars:
            raise self.refused(
                "a function without a closure",
                f"one that captures {', '.join(map(repr, code.co_freevars))}",
                "make it a parameter of the neuron, or a global number",
            )

    def _straight(self, attributes: Sequence[str]) -> None:
        line, found = self.code.co_firstlineno, []
        for each in dis.get_instructions(self.code):
            line = each.positions.lineno or line if each.positions is not None else line
            found.append((each.opname, each.argval, line))
        for name, _, line in found:
            if name in _JUMPS:
                jump = "a branch, a loop or a chain of comparisons"
                raise self.refused("a straight line", jump, "use where(condition, a, b)", line)
            if name in _STRANGE:
                raise self.refused("a straight line", _STRANGE[name], f"use {USES}", line)
        for name, value, line in found:
            if name == "COMPARE_OP" and str(value).strip("bol()") in ("==", "!="):
                got = f"a comparison with {value}"
                raise self.refused("<, <=, > or >=", got, "potentials are hardly ever equal", line)
            if name in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._global(value, line)
            if name in ("LOAD_ATTR", "LOAD_METHOD") and value not in attributes:
                known = f"one of {', '.join(attributes)} behind a dot" if attributes else "no attributes"
                raise self.refused(known, f"{value!r}{nearest(value, attributes)}", f"use {USES}", line)

    def _global(self, name: str, line: int) -> None:
        held = self.function.__globals__.get(name)
        if name in CALLS:
            if isinstance(held, FunctionType) and not str(held.__module__).startswith("trtkern."):
                raise self.refused(
                    f"{name} to be that of trtkern.neurons", "a function of your own of that name",
                    "write out what it computes", line,
                )  # fmt: skip
        elif isinstance(held, (int, float)) and not isinstance(held, bool):
            if not math.isfinite(held):
                raise self.refused(f"{name} to be a finite number", repr(held), line=line)
            self.floats[name] = float(held)
        else:
            calls = f"`from trtkern.neurons import {', '.join(call for call in CALLS if call != 'abs')}`"
            raise self.refused(USES, f"{name!r}{nearest(name, CALLS)}", f"write {calls} and call them by name", line)

    def run(self, *arguments: Any) -> Any:
        """What it makes of symbols.

        Raises:
            TypeError: it did with them what it may not; the message has the line.
        """
        try:
            return traced(rebind(self.function, self.floats), *arguments)
        except Exception as error:
            frames, line = error.__traceback__, None
            while frames is not None:
                line = frames.tb_lineno if frames.tb_frame.f_code is self.code else line
                frames = frames.tb_next
            said = str(error).removeprefix("expected ")
            if said == str(error) or not isinstance(error, (TypeError, AttributeError)):
                raise self.refused(USES, f"{type(error).__name__}: {error}", line=line) from None
            expected, _, rest = said.partition(", got ")
            raise self.refused(expected, rest, line=line) from None

    def numbers(self, made: Any, names: Sequence[str], conditions: Sequence[Expression] = ()) -> tuple[Expression, ...]:
        """What it returned, a number for each of the names.

        Args:
            made: what ``run`` gave.
            names: of the parts; one part may come without a tuple.
            conditions: symbols that are conditions, as the spike is.

        Raises:
            TypeError: another count, something else than numbers, or a condition that is taken for a number.
        """
        parts = made if isinstance(made, (tuple, list)) else (made,)
        if len(parts) != len(names):
            raise self.refused(f"it to return {', '.join(names)}", f"{len(parts)} parts instead of {len(names)}")
        found = []
        for name, part in zip(names, parts, strict=True):
            try:
                found.append(of(part))
            except TypeError:
                raise self.refused(f"a number for {name}", f"{part!r}", f"return {', '.join(names)}") from None
        self._conditions(found, set(conditions))
        return tuple(found)

    def _conditions(self, nodes: Sequence[Expression], known: set[Expression]) -> None:
        """Conditions stand first in a where, and nothing else does."""
        seen: set[Expression] = set()
        left = [(node, False) for node in nodes]
        while left:
            node, asked = left.pop()
            is_condition = node in known or node.op in COMPARISONS
            if is_condition and not asked:
                raise self.refused(
                    "numbers in arithmetic and in what it returns", f"the condition {text(node)}",
                    f"write where({text(node)}, 1.0, 0.0)",
                )  # fmt: skip
            if asked and not is_condition:
                raise self.refused(
                    "a condition first in where", f"the number {text(node)}", f"write where({text(node)} > 0.0, a, b)"
                )
            if node.op == "number" and not abs(node.args[0]) <= LARGEST:
                raise self.refused("numbers that are finite in float32", repr(node.args[0]))
            if node in seen or node.op in ("symbol", "number"):
                continue
            seen.add(node)
            left += [(each, node.op == "where" and i == 0) for i, each in enumerate(node.args)]


def group(label: str, names: Sequence[str], parts: Sequence[Any]) -> Any:
    """The parts as a tuple that has them by name too: ``p.tau``, ``p[0]``."""

    def missing(self: Any, name: str) -> Any:
        raise AttributeError(f"expected {label} to have {', '.join(names)}, got {label}.{name}{nearest(name, names)}")

    kind = namedtuple(label, names)  # type: ignore[misc]  # the names are not known before
    kind.__getattr__ = missing  # type: ignore[attr-defined]
    return kind(*parts)


def compiled(file: str, source: str, names: Mapping[str, Any]) -> Callable:
    """The function that the source defines over those names; Triton, too, finds its lines."""
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    bound = {**names}
    exec(compile(source, file, "exec"), bound)
    return bound[source.split("(", 1)[0].removeprefix("def ")]
