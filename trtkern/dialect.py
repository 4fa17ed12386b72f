"""The surrogates and the neurons as C++: what the build prints into two headers.

Standard library only, like what it prints: the build uses it before torch exists.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace

from trtkern import adjoint, expressions, neurons, surrogates
from trtkern.expressions import Expression
from trtkern.neurons import Neuron
from trtkern.straight import Function


def headers() -> dict[str, str]:
    """The headers that the extensions are built with, by name: ``trtkern_NAME.h``.

    "tables" has the fingerprint of the others. An extension shows its own, so that one that was built from other tables
    is not asked for their numbers (``trtkern.backends``).
    """
    with expressions.anew():
        printed = {
            "surrogates": cpp_header(surrogates.TABLE[name].function for name in surrogates.BUILTIN),
            "neurons": neurons_header(neurons.TABLE.values()),
        }
    mark = hashlib.sha256("".join(printed.values()).encode()).hexdigest()[:16]
    return printed | {"tables": f'#pragma once\n#define TK_TABLES "{mark}"\n'}


_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_OPERATORS = _ARITHMETIC | {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_CALLS = {"exp": "exp_", "abs": "abs_", "maximum": "maximum_", "where": "where_"}


def to_cpp(function: Callable) -> str:
    """The function as a C++ template over F (a float, or a vector of floats): ``F name(F u, F alpha)``.

    Raises:
        ValueError: the function uses something besides assignments, arithmetic, comparisons and the four names.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise ValueError(f"surrogate: expected a function definition, got {ast.dump(tree)}")
    arguments = ", ".join(f"F {argument.arg}" for argument in tree.args.args)
    lines = [_statement(node) for node in tree.body if not _is_docstring(node)]
    body = "\n".join(f"  {line}" for line in lines)
    return f"template <class F>\nTK_INLINE F {tree.name}({arguments}) {{\n{body}\n}}\n"


def cpp_header(functions: Iterable[Callable]) -> str:
    """A header with every function and ``surrogate<ID>(u, alpha)``, ID being its position."""
    functions = list(functions)
    # No include guard: each CPU instruction set includes it once, inside a namespace of its own.
    return "// Generated from trtkern/surrogates.py when the extension is built.\n\n" + "\n".join(
        [*map(to_cpp, functions), _selected([function.__name__ for function in functions])]
    )


def _selected(names: list[str]) -> str:
    """What takes a surrogate by its position."""
    cases = "".join(f"  if constexpr (ID == {i}) return {name}(u, alpha);\n" for i, name in enumerate(names))
    select = f"template <int ID, class F>\nTK_INLINE F surrogate(F u, F alpha) {{\n{cases}}}\n"
    cases = "".join(f"    case {i}: return {name}(u, alpha);\n" for i, name in enumerate(names))
    select += f"template <class F>\nTK_INLINE F surrogate_of(int id, F u, F alpha) {{\n  switch (id) {{\n{cases}  }}\n"
    return f"{select}  return u;\n}}\n\nconstexpr int kSurrogates = {len(names)};\n"


def neurons_header(table: Iterable[Neuron]) -> str:
    """A header with a struct for each neuron, and ``for_neuron(id, f)``, id being its position."""
    table = list(table)
    cases = "".join(f"    case {i}: return f({row.name}{{}});\n" for i, row in enumerate(table))
    select = f"template <class F>\ninline void for_neuron(int id, F f) {{\n  switch (id) {{\n{cases}  }}\n}}\n"
    structs = [_neuron(i, row) for i, row in enumerate(table)]
    return "// Generated from trtkern/neurons.py when the extension is built.\n\n" + "\n".join([*structs, select])


def own_headers(row: Neuron, surrogate: Callable | None) -> dict[str, str]:
    """The headers for one neuron that the extensions were not built with, or not with that surrogate.

    Args:
        row: the neuron, of a user's own or of the table.
        surrogate: the one surrogate, or None for all that are built in.

    Raises:
        TypeError, ValueError: the surrogate is no straight line; the message has its file and line.
    """
    with expressions.anew():
        struct = (
            _neuron(1, replace(row, name="Own"))
            + "\ntemplate <class F>\ninline void for_neuron(int, F f) {\n  f(Own{});\n}\n"
        )
        if surrogate is not None:
            return {"surrogates": _own_surrogate(surrogate), "neurons": struct}
    return {"surrogates": headers()["surrogates"], "neurons": struct}


def _own_surrogate(function: Callable) -> str:
    """The header of surrogates with one of a user's, traced."""
    line = Function("surrogate", function, ("u", "alpha"))
    u, alpha = expressions.symbol("u"), expressions.symbol("alpha")
    (slope,) = line.numbers(line.run(u, alpha), ("the derivative",))
    body = "".join(f"  {each}\n" for each in expressions.cpp({"slope": slope}, {}))
    made = f"template <class F>\nTK_INLINE F own_surrogate(F u, F alpha) {{\n  F slope;\n{body}  return slope;\n}}\n"
    return made + _selected(["own_surrogate"])


_RESETS = {"hard": "kHard", "soft": "kSoft", "none": "kNone"}


def _neuron(number: int, row: Neuron) -> str:
    """The struct of a neuron: its numbers, and its step forward and back (``trtkern.neurons``, ``trtkern.adjoint``)."""
    charge_back = adjoint.charge_back(row)
    both = itertools.product(row.settle, (False, True))
    parts = {(reset, detach): adjoint.fired_back(row, reset, detach) for reset, detach in both}
    changed = {reset: _changed(row, parts[reset, False][1], charge_back[2]) for reset in row.settle}
    # A charge that is curved in x asks for x, which is read together with the state.
    read = {"x", *(f"state_{name}" for name in row.states)}
    needs = bool(expressions.symbols([charge_back[0], *charge_back[1]]) & read)
    potential, threshold = adjoint.fire(row)
    functions = [
        _function(row, "charge", "F x, const F* state, const F* p, F* trace", _left("trace", adjoint.charge(row))),
        _function(
            row, "fire", "const F* trace, const F* p, F& potential, F& threshold",
            {"potential": potential, "threshold": threshold},
        ),
        _function(
            row, "settle", "int reset, const F* trace, C s, const F* p, F* state",
            {f"reset == {_RESETS[reset]}": _left("state", adjoint.settle(row, reset)) for reset in row.settle},
            "class C, ",
        ),
        _function(
            row, "fired_back",
            "int reset, bool detach, const F* trace, C s, const F* p, const F* g, F g_s, F slope, F* g_trace, F* sum",
            {
                f"reset == {_RESETS[reset]} && {'' if detach else '!'}detach": {
                    **_left("g_trace", trace), **_left("sum", sums)
                }
                for (reset, detach), (trace, sums) in parts.items()
            },
            "class C, ",
        ),
        _function(
            row, "charge_back", "F x, const F* state, const F* p, const F* g, F& g_x, F* g_state, F* sum",
            {"g_x": charge_back[0], **_left("g_state", charge_back[1]), **_left("sum", charge_back[2])},
        ),
    ]  # fmt: skip
    masks = " : ".join(f"reset == {_RESETS[reset]} ? {mask:#x}u" for reset, mask in changed.items())
    return f"""struct {row.name} {{
  static constexpr int kId = {number}, kStates = {len(row.states)}, kTraces = {len(row.trace)};
  static constexpr int kParams = {len(row.params)}, kV = {row.membrane}, kH = {row.potential};
  static constexpr bool kNeedsState = {str(needs).lower()};  // the gradients of x and of the state depend on the state
  // The parameters that have a gradient, a bit each.
  TK_INLINE static unsigned learned(int reset) {{ return {masks} : 0u; }}
{"".join(functions)}}};
"""


def _left(name: str, nodes: Iterable[Expression]) -> dict[str, Expression]:
    return {f"{name}[{i}]": node for i, node in enumerate(nodes)}


def _changed(row: Neuron, *sums: Iterable[Expression]) -> int:
    """The bits of the parameters whose sum is another after the step."""
    so_far = adjoint.symbols("sum", row.params)
    changed = {i for part in sums for i, (a, b) in enumerate(zip(part, so_far, strict=True)) if a is not b}
    return sum(1 << i for i in changed)


def _function(row: Neuron, name: str, arguments: str, body: dict, types: str = "") -> str:
    """A static member; the body is {left side: node}, or {condition: {left side: node}}."""
    names = {f"state_{each}": f"state[{i}]" for i, each in enumerate(row.states)}
    names |= {f"trace_{each}": f"trace[{i}]" for i, each in enumerate(row.trace)}
    names |= {f"p_{each}": f"p[{i}]" for i, each in enumerate(row.params)}
    names |= {f"sum_{each}": f"sum[{i}]" for i, each in enumerate(row.params)}
    names |= {f"g_{each}": f"g[{i}]" for i, each in enumerate(row.trace if name == "charge_back" else row.states)}
    lines = []
    for left, node in body.items():
        if isinstance(node, dict):
            block = "".join(f"      {line}\n" for line in expressions.cpp(node, names))
            lines.append(f"    if ({left}) {{\n{block}    }}\n")
    if not lines:
        lines = [f"    {line}\n" for line in expressions.cpp(body, names)]
    return f"  template <{types}class F>\n  TK_INLINE static void {name}({arguments}) {{\n{''.join(lines)}  }}\n"


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _statement(node: ast.stmt) -> str:
    if isinstance(node, ast.Return) and node.value is not None:
        return f"return {_expression(node.value)};"
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return f"F {node.targets[0].id} = {_expression(node.value)};"
    raise ValueError(f"surrogate: no C++ for the statement {ast.unparse(node)!r}")


def _expression(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=int() | float() as number):
            return f"lit<F>({float(number)!r}f)"
        case ast.Name():
            return node.id
        case ast.UnaryOp(op=ast.USub()):
            return f"(-{_expression(node.operand)})"
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return f"({_expression(node.left)} {_OPERATORS[type(node.op)]} {_expression(node.right)})"
        case ast.Compare(ops=[op]) if type(op) in _OPERATORS:
            return f"({_expression(node.left)} {_OPERATORS[type(op)]} {_expression(node.comparators[0])})"
        case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
            return f"{_CALLS[name]}({', '.join(map(_expression, node.args))})"
    raise ValueError(f"surrogate: no C++ for the expression {ast.unparse(node)!r}")
