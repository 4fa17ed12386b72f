"""``trtkern bench --sweep``: one op over a grid of sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from trtkern.bench.cases import SHAPES, SUITES, Case, parse_shape
from trtkern.names import KERNELS

SWEPT = (*KERNELS, "recurrent")
"""The ops whose shapes are swept: all with sizes of their own choice."""


def axes_of(op: str, count: int) -> tuple[str, ...]:
    """The names of the axes of an op's shapes with so many numbers: ("T", "N")."""
    return next((names for names in _forms(op) if len(names) == count), ())


def _forms(op: str) -> list[tuple[str, ...]]:
    return [tuple(form.split(",")) for form in SHAPES[op].split(" or ")]


def parse(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """ "T=1,4,16" as the values of each axis, in their order.

    Raises:
        ValueError: another form, an axis twice, a value twice or below 1.
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        axis, equals, numbers = text.partition("=")
        if not equals or not axis.strip():
            raise ValueError(f"--sweep: expected an axis and its sizes such as T=1,4,16, got {text!r}")
        axis = axis.strip()
        values = parse_shape(numbers, "--sweep")
        if axis in found or len(set(values)) < len(values):
            raise ValueError(f"--sweep: expected each axis once, and each size of it once, got {text!r}")
        found[axis] = tuple(sorted(values))
    return found


def cases(texts: Sequence[str], op: str, shapes: Sequence[str], dtype: str, neuron: str) -> list[Case]:
    """The cases of a sweep, the small ones first.

    Args:
        texts: "T=1,4,16" and so on.
        op: one of ``SWEPT``.
        shapes: at most one "T,N": the sizes of the axes that are not swept; without it those of the suite "default".
        dtype: of the inputs.
        neuron: of op "lif".

    Raises:
        ValueError: an op that has no sizes of its own, an axis that it has not, more than one shape.
    """
    swept = parse(texts)
    if op not in SWEPT:
        raise ValueError(f"--sweep: expected one of {', '.join(SWEPT)} as --op, got {op}")
    if len(shapes) > 1:
        raise ValueError(f"--sweep: expected at most one --shape beside it, got {len(shapes)}")
    fits = [names for names in _forms(op) if set(swept) <= set(names)]
    if not fits:
        wrong = next(axis for axis in swept if not any(axis in names for names in _forms(op)))
        raise ValueError(f"--sweep: expected an axis of --op {op}, whose shapes are {SHAPES[op]}, got {wrong!r}")
    base = parse_shape(shapes[0]) if shapes else _base(op, [len(names) for names in fits])
    names = next((names for names in fits if len(names) == len(base)), None)
    if names is None:
        raise ValueError(f"--shape: expected {' or '.join(map(','.join, fits))} beside --sweep, got {shapes[0]!r}")
    choices = [swept.get(name, (size,)) for name, size in zip(names, base, strict=True)]
    made = [Case(op, tuple(shape), dtype, neuron=neuron) for shape in product(*choices)]
    return sorted(made, key=lambda case: case.elements)


def _base(op: str, counts: Sequence[int]) -> tuple[int, ...]:
    """The first shape of the suite "default" with as many numbers as the axes that are swept need."""
    return next(case.shape for case in SUITES["default"] if case.op == op and len(case.shape) in counts)
