"""What a row of the table of neurons is, and the rows that a user registers.

``trtkern.neurons`` has the rows that are built in, and is the door to what is here. This module imports the standard
library only: the build uses it before torch exists.
"""

from __future__ import annotations

import hashlib
import inspect
import keyword
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, ClassVar

from trtkern import expressions, surrogates
from trtkern.expressions import Expression, symbol
from trtkern.names import unknown

TABLE: dict[str, Neuron] = {}
"""The rows that are built in; ``trtkern.neurons`` fills it."""
RESETS = ("hard", "soft")
"""The resets that a neuron of a user's own can have two settle functions for."""
OPTIONS = (
    "surrogate",
    "alpha",
    "detach_reset",
    "fire_on_equal",
    "packed",
    "reset",
    "time_dim",
    "channel_dim",
    "backend",
)
"""What a layer takes beside its neuron's parameters, which can have none of these names."""


def fma(a: float, b: float, c: float) -> float:
    """a * b + c; rounded once on every backend.

    Args:
        a: a factor.
        b: the other one.
        c: what is added.
    """
    return a * b + c


@dataclass(frozen=True)
class Neuron:
    """A row of the table.

    Args:
        name: of the neuron; that of its layer.
        states: the names of the state's numbers, "v" (the membrane potential after the reset) among them.
        trace: the names of the trace's numbers, "h" (the potential before the firing) among them.
        params: the names of the parameters, in the order of their rows.
        charge: (x, state, p) -> trace.
        fire: (trace, p) -> (potential, threshold).
        settle: by the name of a reset that the neuron can have, (trace, s, p) -> state.
    """

    name: str
    states: tuple[str, ...]
    trace: tuple[str, ...]
    params: tuple[str, ...]
    charge: Callable
    fire: Callable
    settle: Mapping[str, Callable]
    builtin: ClassVar[bool] = True

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]] | None:
        """From where to where each parameter may go; None: that follows from its name (``trtkern.ops.checks``)."""
        return None

    @property
    def membrane(self) -> int:
        """Which state is v."""
        return self.states.index("v")

    @property
    def potential(self) -> int:
        """Which number of the trace is h."""
        return self.trace.index("h")

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True, eq=False)
class Registered(Neuron):
    """A row of a user's own; its functions are those that were registered, traced and printed again.

    Args:
        defaults: of the parameters; None: a layer has to be given it.
        bounds: from where to where a parameter may go; one without is finite.
        still: the threshold is the parameter ``v_threshold`` alone.
    """

    defaults: Mapping[str, float | None]
    bounds: Mapping[str, tuple[float, float]]
    still: bool
    builtin: ClassVar[bool] = False

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """``bounds``."""
        return self.bounds

    @property
    def short(self) -> str:
        """Its name without the digest."""
        return self.name.rpartition("@")[0]


_VERSIONS: dict[str, Registered] = {}
"""Every neuron that was ever registered, by its whole name."""
_places: dict[str, dict[str, None]] = {}
"""The modules whose import registers it, in another process, by its whole name."""
LATEST: dict[str, Registered] = {}
"""The latest of each name."""
_listeners: list[Callable[[Neuron], None]] = []


def each(told: Callable[[Neuron], None]) -> None:
    """Call that with every row: now with those that there are, and with each that is registered later."""
    for row in (*TABLE.values(), *_VERSIONS.values()):
        told(row)
    _listeners.append(told)


def compiled(file: str, source: str) -> Callable:
    """The function that the source defines over the names of ``expressions.CALLS``; Triton, too, finds its lines."""
    from trtkern import straight

    names = {"fma": fma, **{call: getattr(surrogates, call) for call in ("exp", "maximum", "where")}}
    # torch.compile looks for what a function calls in the module that it names.
    return straight.compiled(file, source, {**names, "__name__": "trtkern.neurons"})


def lookup(name: str) -> Neuron:
    """The row of that name; a ValueError with the list of names otherwise.

    Args:
        name: of the neuron, as in ``TABLE``, or what ``register`` returned.
    """
    row = TABLE.get(name) or _VERSIONS.get(name) or LATEST.get(name)
    if row is None:
        raise unknown("neuron", name, (*TABLE, *LATEST))
    return row


def register(
    name: str,
    *,
    states: Sequence[str],
    params: Mapping[str, float | None],
    charge: Callable,
    fire: Callable,
    settle: Callable | Mapping[str, Callable],
    trace: Sequence[str] | None = None,
    ranges: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> str:
    """Add a neuron of your own, and return the name that it goes by: ``name@digest of its code``, for ``snn.Neuron``.

    Three straight-line functions say what a step computes, in this order (docs/extending.md walks through it)::

        trace = charge(x, state, p)               what the step computes from the input current and the state before it
        potential, threshold = fire(trace, p)     it fires where the first is above the second
        state = settle(trace, s, p)               the state after the step; where(s, a, b) is a where it fired, else b

    ``state``, ``trace`` and ``p`` are tuples whose parts also have names: ``p.tau``. The functions are made of
    arithmetic, comparisons, global numbers (with the values that they have now) and ``fma``, ``exp``, ``abs``,
    ``maximum`` and ``where`` of ``trtkern.neurons``. They run once, here, on symbols; the backward pass is derived from
    what comes out.
    The backends reference and triton run the neuron at once, cpu compiles it at first use, cuda refuses it.

    Another neuron under the same name, such as an edited cell of a notebook, replaces it for what is made from now on;
    layers that are there keep theirs. Other processes find it by importing the module that this call stands in: call
    it at the top of a file.

    Args:
        name: of letters, digits, _ . and -.
        states: one or two names, "v" among them: the potential after the reset.
        params: {name: default}, at most 10; None: a layer has to be given it.
        charge, fire, settle: the functions. Two resets are {"hard": settle, "soft": settle}.
        trace: as many names as states, "h" among them, the potential before the firing; None: the states, with h for v.
        ranges: {name of a parameter: (lowest, highest)}; a parameter without one may be any finite number.

    Raises:
        TypeError: a function is no straight line; the message has its file and line.
        ValueError: a name or a number; it says what was expected.
    """
    who = f"neurons.register: {name}"
    states, settle = _states(who, name, states), settle if isinstance(settle, Mapping) else {"hard": settle}
    usual = tuple("h" if each == "v" else each for each in states)
    trace = _words(who, "trace", usual if trace is None else trace)
    if len(trace) != len(states) or "h" not in trace:
        raise ValueError(
            f"{who}: expected a trace of {len(states)} names, as many as states, with h among them, got "
            f"{', '.join(trace)}"
        )
    held, bounds = _params(who, params, ranges)
    if not settle or not set(settle) <= set(RESETS):
        raise ValueError(f"{who}: expected settle to be a function or {{'hard': f, 'soft': g}}, got {settle!r}")
    with expressions.anew():
        parts, still = _traced(who, states, trace, tuple(held), charge, fire, settle)
        sources = _sources(states, trace, tuple(held), parts)
    meaning = (states, trace, tuple(held.items()), tuple(bounds.items()), still, tuple(sources.items()))
    whole = f"{name}@{hashlib.sha256(repr(meaning).encode()).hexdigest()[:12]}"
    if whole not in _VERSIONS:
        made = {part: compiled(f"<{part} of {whole}>", source) for part, source in sources.items()}
        settled = {reset: made[reset] for reset in settle}
        row = Registered(
            whole, states, trace, tuple(held), made["charge"], made["fire"], settled, held, bounds, still
        )  # fmt: skip
        _VERSIONS[whole] = row
        for told in _listeners:
            told(row)
    frame = inspect.currentframe()
    caller = frame.f_back if frame is not None else None
    here = "__main__" if caller is None else str(caller.f_globals.get("__name__", "__main__"))
    _places.setdefault(whole, {}).update(dict.fromkeys((here, str(charge.__module__))))
    LATEST[name] = _VERSIONS[whole]
    return whole


def _states(who: str, name: str, states: Sequence[str]) -> tuple[str, ...]:
    """The states, when they and the neuron's name are such."""
    taken = {each.casefold() for each in TABLE}
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.-]*", name) or name.casefold() in taken:
        raise ValueError(
            f"neurons.register: expected a name of letters, digits, _ . and - that no built-in neuron has, got {name!r}"
        )
    states = _words(who, "states", states)
    if not 1 <= len(states) <= 2 or "v" not in states:
        raise ValueError(f"{who}: expected one or two states, v among them, got {', '.join(states) or 'none'}")
    return states


def _words(who: str, what: str, given: Any) -> tuple[str, ...]:
    """The names, when each is one of Python, and there once."""
    names = (given,) if isinstance(given, str) else tuple(given)
    for each in names:
        if not isinstance(each, str) or not each.isidentifier() or keyword.iskeyword(each) or each.startswith("_"):
            raise ValueError(f"{who}: expected {what} to be names, got {each!r}; use letters, digits and _")
    if len(set(names)) < len(names):
        raise ValueError(f"{who}: expected {what} to differ, got {', '.join(names)}")
    return names


def _params(who: str, params: Any, ranges: Any) -> tuple[dict[str, float | None], dict[str, tuple[float, float]]]:
    """Defaults and ranges, checked."""
    most = max(len(row.params) for row in TABLE.values())
    if not isinstance(params, Mapping) or not 1 <= len(params) <= most:
        raise ValueError(f"{who}: expected params as {{name: default}} with 1 to {most} names, got {params!r}")
    names = _words(who, "params", list(params))
    if taken := [each for each in names if each in OPTIONS]:
        raise ValueError(
            f"{who}: expected parameters whose names no option of a layer has, got {taken[0]!r}; rename it"
        )
    if strange := [each for each in ranges if each not in names]:
        raise unknown(f"{who}: ranges", strange[0], names)
    bounds = {}
    for each, ends in ranges.items():
        low, high = (float(end) for end in ends)
        if not low <= high:
            raise ValueError(f"{who}: expected the range of {each} as (lowest, highest), got {ends!r}")
        bounds[each] = (low, high)
    held: dict[str, float | None] = {}
    for each, value in params.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{who}: expected the default of {each} to be a number or None, got {value!r}")
        held[each] = None if value is None else float(value)
        low, high = bounds.get(each, (-math.inf, math.inf))
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{who}: expected the default of {each} to be finite, {low:g} to {high:g}, got {value!r}")
    return held, bounds


Parts = tuple[Expression, ...]


def _symbols(prefix: str, names: Sequence[str]) -> Parts:
    return tuple(symbol(f"{prefix}_{name}") for name in names)


def _traced(
    who: str, states: tuple[str, ...], trace: tuple[str, ...], params: tuple[str, ...], charge: Callable,
    fire: Callable, settle: Mapping[str, Callable],
) -> tuple[dict[str, Parts], bool]:  # fmt: skip
    """What the functions make of symbols, by function or reset; and whether the threshold is ``v_threshold``."""
    from trtkern.straight import Function, group

    x, s, p = symbol("x"), symbol("s"), _symbols("p", params)
    state, traces = _symbols("state", states), _symbols("trace", trace)
    before, numbers, made = (group(*each) for each in (
        ("state", states, state), ("p", params, p), ("trace", trace, traces)
    ))  # fmt: skip
    dots = (*params, *dict.fromkeys((*states, *trace)))
    charging = Function(f"{who}, charge", charge, ("x", "state", "p"), dots)
    firing = Function(f"{who}, fire", fire, ("trace", "p"), dots)
    parts = {
        "charge": charging.numbers(charging.run(x, before, numbers), trace),
        "fire": firing.numbers(firing.run(made, numbers), ("potential", "threshold")),
    }
    lines = {"charge": charging, "fire": firing}
    for reset, function in settle.items():
        what = "settle" if len(settle) == 1 else f"settle ({reset})"
        lines[reset] = Function(f"{who}, {what}", function, ("trace", "s", "p"), dots)
        parts[reset] = lines[reset].numbers(lines[reset].run(made, s, numbers), states, (s,))
    _used(parts, lines, states, trace, params)
    return parts, "v_threshold" in params and parts["fire"][1] is p[params.index("v_threshold")]


def _used(
    parts: Mapping[str, Parts], lines: Mapping[str, Any], states: tuple[str, ...], trace: tuple[str, ...],
    params: tuple[str, ...],
) -> None:  # fmt: skip
    """Refuse an input that does not reach h, and a number that nothing reads or that is always the same."""
    held = {"state": states, "trace": trace, "p": params}
    known = {prefix: {f"{prefix}_{name}" for name in names} for prefix, names in held.items()}
    used = {name: expressions.symbols(list(found)) for name, found in parts.items()}
    for name, nodes in parts.items():
        if name == "fire":
            continue
        made_of = {"x"} | known["state"] if name == "charge" else {"s"} | known["trace"]
        for part, node in zip(trace if name == "charge" else states, nodes, strict=True):
            if not expressions.symbols([node]) & made_of:
                shown = expressions.text(node)
                raise lines[name].refused(f"{part} to depend on what the step has", f"{part} = {shown}")
    h = parts["charge"][trace.index("h")]
    if "x" not in expressions.symbols([h]):
        raise lines["charge"].refused("the input current x in h of the same step", f"h = {expressions.text(h)}")
    if not used["fire"] & known["trace"]:
        raise lines["fire"].refused("a number of the trace in what it compares", "none: it fires always or never")
    everywhere = set().union(*used.values())
    for prefix, kind in (("state", "the state"), ("trace", "the trace's number"), ("p", "the parameter")):
        for name in held[prefix]:
            if f"{prefix}_{name}" not in everywhere:
                raise lines["charge"].refused(f"{kind} {name} to be used", "functions that do not", "leave it out")


def _sources(
    states: tuple[str, ...], trace: tuple[str, ...], params: tuple[str, ...], parts: Mapping[str, Parts]
) -> dict[str, str]:
    """The functions printed, by function or reset; the same in every process."""

    def arguments(prefix: str, names: Sequence[str]) -> expressions.Argument:
        return prefix, [f"{prefix}_{name}" for name in names]

    p, made = arguments("p", params), arguments("trace", trace)
    heads: dict[str, list[expressions.Argument]] = {
        "charge": ["x", arguments("state", states), p], "fire": [made, p]
    }  # fmt: skip
    settled: list[expressions.Argument] = [made, "s", p]
    return {
        name: expressions.python(name if name in heads else "settle", heads.get(name, settled), nodes)
        for name, nodes in parts.items()
    }


def reference(name: str) -> str | tuple[str, tuple[str, ...]]:
    """What ``restore`` finds that neuron by in another process: its name, and whose import registers it."""
    row = lookup(name)
    return row.name if row.builtin else (row.name, tuple(_places[row.name]))


def restore(reference: str | tuple[str, tuple[str, ...]]) -> str:
    """The name of a neuron by what ``reference`` gave: one that is registered here, or once its module is imported.

    Raises:
        ValueError: it is not, then; says so when a layer is loaded, not when it first runs.
    """
    if isinstance(reference, str):
        return reference
    whole, modules = reference
    name, failures = whole.rpartition("@")[0], []
    for module in modules:
        if whole in _VERSIONS:
            break
        try:
            import_module(module)
        except ImportError as error:
            failures.append(repr(error))
    if whole in _VERSIONS:
        return whole
    if name not in LATEST:
        why = "; ".join(failures) or f"no registration in {' or '.join(modules)}"
        raise ValueError(
            f"neurons: expected the neuron {name!r} to be registered where a layer with it is loaded, got {why}; call "
            f"trtkern.neurons.register({name!r}, ...) at the top of a module that can be imported, or before loading"
        )
    warnings.warn(
        f"neurons: {name!r} is not the one that the layer was saved with: its code or its defaults have changed; the "
        "one that is here is used",
        stacklevel=2,
    )
    return LATEST[name].name
