"""``trtkern doctor``."""

from __future__ import annotations

import os
import platform

from trtkern.commands._common import FAILURE, Quit, console

RESULTS = {True: "[green]ok[/green]", False: "[red]FAILED[/red]", None: "not available"}


def doctor() -> int:
    """Show what works on this machine, what does not and why, and try every backend on numbers.

    Exit status 1 if a backend that is available computes something wrong.
    """
    from rich.table import Table
    from rich.text import Text

    from trtkern import selftest
    from trtkern.training.progress import facts
    from trtkern.training.run import versions

    out = console()
    out.print(facts("Versions and devices", {**versions(), **_devices()}))
    rows = selftest.run()
    table = Table("backend", "self-test", "", title="Backends, in the order in which auto asks", title_justify="left")
    for row in rows:
        table.add_row(row.name, RESULTS[row.ok], Text(row.detail))
    out.print(table)
    failed = [row.name for row in rows if row.ok is False]
    if failed:
        raise Quit(f"failed its self-test, do not trust its numbers on this machine: {', '.join(failed)}", FAILURE)
    return 0


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


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
