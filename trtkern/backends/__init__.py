"""The backends, in the order in which ``backend="auto"`` asks them."""

from __future__ import annotations

import torch

from trtkern.backends import cpu, cuda, reference, triton
from trtkern.backends.base import Backend, Case
from trtkern.names import BACKENDS as NAMES
from trtkern.names import unknown
from trtkern.spec import LIFSpec

BACKENDS: tuple[Backend, ...] = (cpu.BACKEND, triton.BACKEND, cuda.BACKEND, reference.BACKEND)


def named(name: str) -> Backend:
    """The backend of that name; a ValueError with the list otherwise."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise unknown("backend", name, NAMES)


def resolve(name: str, case: Case) -> Backend:
    """The backend that runs ``case``: the first that takes it for "auto", else the named one or an error.

    Raises:
        ValueError: no such backend, or it does not take this case (with its reason).
        RuntimeError: the backend cannot be used on this machine (with how to get it).
    """
    if name == "auto":
        return next(backend for backend in BACKENDS if backend.objection(case) is None)
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


def choose(name: str, op: str, device: str, dtype: torch.dtype, token: str | None = None) -> str:
    """``resolve`` by plain values: the name of the backend that runs the op; a constant to torch.compile."""
    return resolve(name, Case(op, device, dtype, None if token is None else LIFSpec.from_token(token))).name


# What torch.compiler.assume_constant_result(choose) sets, without its import of torch._dynamo, which takes seconds.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(case: Case) -> str:
    """The backend that "auto" takes for ``case`` and why the ones before it do not, in one line."""
    passed: list[str] = []
    for backend in BACKENDS:
        objection = backend.objection(case)
        if objection is None:
            return backend.name + (f" ({'; '.join(passed)})" if passed else "")
        passed.append(f"not {backend.name}: {objection}")
    raise RuntimeError(f"{case.op}: no backend takes {case}; {'; '.join(passed)}")
