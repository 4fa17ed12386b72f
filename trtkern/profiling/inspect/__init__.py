"""What the compiler made of each kernel, without a GPU: registers, spills, access widths, bytes, occupancy.

>>> from trtkern.profiling.inspect import inspect
>>> [row.problems for row in inspect("sm_90", op="lif", backend="triton")]  # doctest: +SKIP
[[], []]
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trtkern.names import COMPILED, DTYPES, TARGETS, inspectable
from trtkern.neurons import TABLE
from trtkern.profiling.inspect.contract import OPS, triton_excess
from trtkern.profiling.inspect.report import Row, row, table, write

if TYPE_CHECKING:
    from trtkern.profiling.inspect.triton import Case

__all__ = ["COMPILED", "DTYPES", "OPS", "TARGETS", "Row", "inspect", "table", "triton_row", "triton_rows", "write"]


def triton_rows(op: str, target: str, timesteps: int = 4, dtype: str = "float32", neuron: str = "LIF") -> list[Row]:
    """A row for each representative launch of an op (``triton.representatives``), compiled for the target.

    Raises:
        RuntimeError: Triton's interpreter runs in this process, or a program of the CUDA toolkit is missing.
    """
    from trtkern.profiling.inspect import triton

    rows = []
    with triton.compiling_for(target):
        for name, options in triton.representatives(op, neuron):
            rows.append(triton_row(target, triton.case(name, timesteps, triton.DTYPES[dtype], **options)))
    return rows


def triton_row(target: str, case: Case) -> Row:
    """The row of a ``triton.Case``; Triton must be compiling for the target."""
    from trtkern.profiling.inspect import triton

    read = triton.read(triton.compiled(case.launch))
    backend = triton.TARGETS[target].backend
    excess = triton_excess(case.kernel, case.lanes, backend, read.loaded, read.stored)
    return row("triton", target, case.kernel, read, case.threads, read.shared, excess)


def inspect(
    target: str,
    *,
    op: str = "all",
    backend: str = "all",
    timesteps: int = 4,
    dtype: str = "float32",
    neuron: str = "LIF",
) -> list[Row]:
    """A row for each kernel of an op (``OPS``, or all) and backend, for aligned tensors and the defaults of a neuron.

    Of another neuron than LIF the Triton kernels are shown.

    Raises:
        ValueError: an unknown name, fewer than one timestep, or nothing that fits all of them (CUDA on an AMD GPU, the
            regulariser in CUDA or with a neuron).
        RuntimeError: what is needed is not installed or not built; says what.
    """
    inspectable(target, op, backend, timesteps, dtype, neuron, TABLE)
    ops = tuple(OPS) if op == "all" else (op,)
    found = _triton(ops, target, backend, timesteps, dtype, neuron)
    return found if neuron != "LIF" else [*found, *_cuda(ops, target, backend, timesteps, dtype)]


def _triton(ops: Iterable[str], target: str, backend: str, timesteps: int, dtype: str, neuron: str) -> list[Row]:
    if backend == "cuda":
        return []
    if find_spec("triton") is None:
        raise RuntimeError("inspect: Triton is not installed; type: pip install 'trtkern[inspect]' (or --backend cuda)")
    return [each for op in ops for each in triton_rows(op, target, timesteps, dtype, neuron)]


def _cuda(ops: tuple[str, ...], target: str, backend: str, timesteps: int, dtype: str) -> list[Row]:
    from trtkern.profiling.inspect import cuda

    held = [op for op in ops if op in cuda.CASES]
    if backend == "triton":
        return []
    if not held or not target.startswith("sm_"):
        if backend == "all":
            return []
        what = f"for {target}" if held else f"of {', '.join(ops)} (it holds {', '.join(cuda.CASES)})"
        raise ValueError(f"inspect: the CUDA backend has no kernels {what}; use --backend triton")
    return list(cuda.rows(held, target, timesteps, dtype, cuda.extension()))
