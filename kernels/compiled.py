"""Launches a kernel that was compiled before without asking Triton which one it is.

Triton looks at every argument of every launch to find the compiled kernel, which takes longer than all the rest of a
launch. Here the kernel is found by all that selects code, as ``classes`` in ``kernels/launch.py`` declares the
arguments: pointers without a type, then integers and numbers with theirs, then constants. Nothing else does on NVIDIA
GPUs; for AMD's, where the size of a tensor does besides, and in the interpreter Triton itself launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from triton import knobs

MOST = 4096
"""Kernels that are remembered; then all are forgotten."""

_PLAIN = {bool, int, str}


class _Layout(NamedTuple):
    """Of the arguments of a kernel."""

    kernel: Any
    """Held, so that no other object gets its id."""
    pointers: int
    """How many, the first."""
    aligned: tuple[int, ...]
    """Those whose alignment selects code."""
    tuples: tuple[int, ...]
    """Tuples of run-time numbers, the types of which select code."""
    constants: int
    """Where the constants begin."""


class _Compiled(NamedTuple):
    """A compiled kernel, and the constants of its key, which are held so that no other object gets their ids."""

    kernel: Any
    constants: tuple[Any, ...]


_layouts: dict[int, _Layout] = {}
_compiled: dict[tuple[Any, ...], _Compiled] = {}


def _layout(kernel: Any) -> _Layout:
    params = kernel.params
    pointers = [i for i, p in enumerate(params) if not p.annotation]
    constants = [i for i, p in enumerate(params) if p.is_constexpr]
    tuples = [i for i, p in enumerate(params) if p.annotation and not p.is_constexpr and not p.annotation_type]
    between = range(len(pointers), len(params) - len(constants))
    if pointers != [*range(len(pointers))] or constants != [*range(between.stop, len(params))]:
        raise TypeError(f"{kernel.__name__}: expected pointers, then typed numbers, then constants in its signature")
    aligned = [i for i in pointers if not params[i].do_not_specialize_on_alignment]
    found = _Layout(kernel, len(pointers), tuple(aligned), tuple(tuples), between.stop)
    return _layouts.setdefault(id(kernel), found)


def key(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], device: Any) -> tuple[Any, ...]:
    """All that selects code: the kernel, the device, the options, which pointers are None, their types and alignment,
    the types of tuples, and the constants."""
    layout = _layouts.get(id(kernel)) or _layout(kernel)
    pointers = args[: layout.pointers]
    return (
        id(kernel), device, knobs.runtime.debug, knobs.compilation.instrumentation_mode,
        *options.items(),
        *[None if t is None else t.dtype for t in pointers],
        *[(t := args[i]) is not None and t.data_ptr() & 15 == 0 for i in layout.aligned],
        *[float if type(n) is float else (type(n), n) for i in layout.tuples for n in args[i]],
        *[(type(c), c) if type(c) in _PLAIN else id(c) for c in args[layout.constants :]],
    )  # fmt: skip


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """``kernel.run(*args, grid=grid, warmup=False, **options)`` on an NVIDIA GPU."""
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    which = key(kernel, args, options, device)
    found = _compiled.get(which)
    if found is None or kernel.pre_run_hooks:
        made = kernel.run(*args, grid=grid, warmup=False, **options)
        if made is None:  # a hook of Triton's took over
            return
        if len(_compiled) >= MOST:
            _compiled.clear()
        _compiled[which] = _Compiled(made, args[_layouts[id(kernel)].constants :])
        return
    found.kernel[(*grid, 1, 1)](*args, stream=driver.get_current_stream(device))
