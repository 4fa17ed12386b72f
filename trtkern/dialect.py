"""One surrogate, three dialects: rebinds its names to torch or Triton, and prints it as C++ at build time.

Standard library only, like ``surrogates.py``: the build loads both by path.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable

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
    cases = "".join(f"  if constexpr (ID == {i}) return {f.__name__}(u, alpha);\n" for i, f in enumerate(functions))
    select = f"template <int ID, class F>\nTK_INLINE F surrogate(F u, F alpha) {{\n{cases}}}\n"
    count = f"constexpr int kSurrogates = {len(functions)};\n"
    # No include guard: each CPU instruction set includes it once, inside a namespace of its own.
    return "// Generated from trtkern/surrogates.py when the extension is built.\n\n" + "\n".join(
        [*map(to_cpp, functions), select, count]
    )


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
