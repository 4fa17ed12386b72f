"""``trtkern doctor``: what runs on this machine. It needs torch and numpy alone, and prints plain text."""

from __future__ import annotations

import os
import platform
import shutil
import textwrap
from collections.abc import Callable, Iterable
from importlib import metadata
from importlib.util import find_spec

from trtkern import __version__

RESULTS = {True: "ok", False: "FAILED", None: "not available"}


def version() -> str:
    """One line, without loading torch: the versions of trtkern, Python and torch, and which kernels were compiled."""
    try:
        torch = f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch = "no torch"
    compiled = [name for name in ("cpu", "cuda") if find_spec(f"trtkern._{name}") is not None]
    kernels = f"compiled kernels for {' and '.join(compiled)}" if compiled else "no compiled kernels"
    return f"trtkern {__version__}, Python {platform.python_version()}, {torch}, {kernels}"


def main(tell: Callable[..., None] | None = None) -> int:
    """Show what works on this machine, what does not and why, and try every backend on numbers.

    Args:
        tell: takes what was found by name, for ``--json``.

    Returns:
        The exit status: 1 if a backend that is available computes something wrong.
    """
    from trtkern import selftest
    from trtkern.output.text import say
    from trtkern.training.run import versions

    known = {**versions(), **_devices(), "own neurons": _own_neurons()}
    _print("Versions and devices", known.items())
    rows = selftest.run()
    if tell is not None:
        tell(machine=known, backends=[{"name": row.name, "ok": row.ok, "detail": row.detail} for row in rows])
    print()
    _print(
        "Backends, in the order in which --backend auto asks them, and their self-tests",
        ((row.name, RESULTS[row.ok], row.detail) for row in rows),
    )
    failed = [row.name for row in rows if row.ok is False]
    if failed:
        return say(f"failed its self-test, do not trust its numbers on this machine: {', '.join(failed)}", 1)
    return 0


def _print(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    """Short columns and a long one at the end, which goes on below itself where the terminal ends."""
    from trtkern.output.text import aligned

    heads, texts = zip(*((row[:-1], row[-1]) for row in rows), strict=True)
    print(title)
    for head, text in zip(aligned([(*head, "") for head in heads], right=()), texts, strict=True):
        place = f"  {head}"
        width = max(shutil.get_terminal_size((140, 24)).columns, len(place) + 40)
        print(textwrap.fill(text, width, initial_indent=place, subsequent_indent=" " * len(place)))


def _devices() -> dict[str, str]:
    import torch

    rows = {"CPU": f"{_cpu_name()}, {os.cpu_count()} logical CPUs, torch takes {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{card.name}, {card.total_memory / 2**30:.1f} GiB, sm_{card.major}{card.minor}"
    if "cuda:0" not in rows:
        built_for_gpus = torch.version.cuda or torch.version.hip
        rows["GPU"] = "none that torch can use" + ("" if built_for_gpus else " (this torch is built for CPUs only)")
    return rows


def _own_neurons() -> str:
    """Whether the cpu backend can compile neurons and surrogates of the user's own."""
    from trtkern.backends import _compiled, cpu

    problem, by = _compiled.available()
    try:
        problem = cpu.missing() or problem
    except ValueError as error:  # an instruction set that is not there: what the backend's own line says
        problem = str(error)
    return f"compiled for the CPU at first use by {by}" if problem is None else f"not compiled for the CPU: {problem}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
