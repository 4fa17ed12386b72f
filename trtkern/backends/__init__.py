"""The backends, in the order in which ``backend="auto"`` asks them, unless one says that a case is its own."""

from __future__ import annotations

import torch
from torch import Tensor

from trtkern.backends import cpu, cuda, reference, triton
from trtkern.backends.base import Backend, Case
from trtkern.names import BACKENDS as NAMES
from trtkern.names import unknown
from trtkern.spec import LIFSpec

__all__ = ["BACKENDS", "NAMES", "Backend", "Case", "explain", "named", "order", "resolve"]

BACKENDS: tuple[Backend, ...] = (cpu.BACKEND, triton.BACKEND, cuda.BACKEND, reference.BACKEND)
"""Every backend, in the order in which "auto" asks them."""


def named(name: str) -> Backend:
    """The backend of that name; a ValueError with the list otherwise.

    Args:
        name: one of ``NAMES``, but "auto".
    """
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise unknown("backend", name, NAMES)


def order(case: Case) -> list[tuple[Backend, str | None]]:
    """The backends as "auto" asks them for this case, each with why it comes before its turn, or None.

    Args:
        case: what is to run.
    """
    reasons = [(backend, backend.prefers(case)) for backend in BACKENDS]
    return sorted(reasons, key=lambda row: row[1] is None)


def resolve(name: str, case: Case) -> Backend:
    """The backend that runs ``case``: the first that takes it for "auto", else the named one or an error.

    Args:
        name: "auto", or the name of a backend.
        case: what is to run.

    Raises:
        ValueError: no such backend, or it does not take this case (with its reason).
        RuntimeError: the backend cannot be used on this machine (with how to get it).
    """
    if name == "auto":
        return next(backend for backend, _ in order(case) if backend.objection(case) is None)
    backend = named(name)
    if not backend.holds(case.op):
        holders = ", ".join(other.name for other in BACKENDS if other.holds(case.op))
        raise ValueError(f"{case.op}: backend {name!r} does not hold this op; use one of {holders}")
    missing = backend.missing()
    if missing is not None:
        raise RuntimeError(f"{case.op}: backend {name!r} was asked for, but {missing}")
    refused = backend.refuses(case)
    if refused is not None:
        raise ValueError(f"{case.op}: backend {name!r} was asked for, but {refused}")
    return backend


def choose(
    name: str,
    op: str,
    device: str,
    dtype: torch.dtype,
    token: str | None = None,
    sizes: tuple[int, int, int] = (0, 0, 0),
    lengths: bool = False,
) -> str:
    """``resolve`` by plain values: the name of the backend that runs the op; a constant to torch.compile.

    ``sizes``: T, N and processors of the ``Case``.
    """
    spec = None if token is None else LIFSpec.from_token(token)
    return resolve(name, Case(op, device, dtype, spec, *sizes, lengths)).name


# What torch.compiler.assume_constant_result(choose) sets, without its import of torch._dynamo, which takes seconds.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sizes(x: Tensor) -> tuple[int, int, int]:
    """T, N and processors of x [T, ...], for ``choose``; zeros where "auto" does not look at them.

    That is on the CPU, where each step is the same one (it is read once), and in a program that torch records or
    compiles, which may run for other sizes.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing() or cuda.missing() is not None:
        return 0, 0, 0
    T, N = x.shape[0], x.numel() // max(1, x.shape[0])
    plain = isinstance(T, int) and isinstance(N, int) and (T == 1 or x.stride(0) != 0)
    return (T, N, cuda.processors(x.get_device())) if plain else (0, 0, 0)


def explain(case: Case) -> str:
    """The backend that "auto" takes for ``case`` and why the ones before it do not, in one line.

    Args:
        case: what is to run.
    """
    passed: list[str] = []
    for backend, reason in order(case):
        objection = backend.objection(case)
        if objection is None:
            told = passed if reason is None else [*passed, reason]
            return backend.name + (f" ({'; '.join(told)})" if told else "")
        passed.append(f"not {backend.name}: {objection}")
    raise RuntimeError(f"{case.op}: no backend takes {case}; {'; '.join(passed)}")
