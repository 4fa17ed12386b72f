"""The machine during the steps: which one it is, and whether the process had its processors to itself."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

ISA_ASKED = ("TRTKERN_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""What in the environment asks for an instruction set: of this project's kernels, of torch's, compiled ones too, and of
the convolutions that torch leaves to oneDNN, and of the matrix products that it leaves to MKL."""
_THREADS = Path("/proc/self/task")


class Conditions(NamedTuple):
    """Of one step."""

    waited: float | None
    """The share of the step for which a thread of this process was ready and had no processor: of the thread that
    waited longest. None: the system does not say."""
    switches: int | None
    """How often a thread lost its processor to somebody else; None: the system does not say."""
    processors: float
    """Seconds of processor time of all threads, over the seconds of the step."""


class Watch:
    """``with watch.step():`` around each step, then ``found``."""

    def __init__(self) -> None:
        self.found: list[Conditions] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, one step."""
        waits, switches, used, begin = _waits(), _switches(), time.process_time(), time.perf_counter()
        yield
        wall = time.perf_counter() - begin
        used, after, now = time.process_time() - used, _waits(), _switches()
        waited = [seconds - waits.get(thread, 0.0) for thread, seconds in after.items()]
        self.found.append(
            Conditions(
                min(1.0, max(waited) / wall) if waited else None,
                None if now is None or switches is None else now - switches,
                used / wall,
            )
        )


def _waits() -> dict[str, float]:
    """Seconds that each thread has waited for a processor since it began, by Linux's scheduler; empty elsewhere."""
    found = {}
    try:
        for thread in os.listdir(_THREADS):
            found[thread] = 1e-9 * int((_THREADS / thread / "schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # no such file here, or a thread that has just ended
        pass
    return found


def _switches() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def load() -> float | None:
    """How many processes wanted a processor, on average over the last minute; None: the system does not say."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def machine(device: torch.device | None = None) -> str:
    """The GPU's name; of a CPU what the system calls it, its cores and the widest instruction set of the kernels;
    another one that the environment asks of them or of torch (``ISA_ASKED``) makes it another machine."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.open())}
        name = f"{lines.get('model name', name)} (family {lines.get('cpu family')}, model {lines.get('model')})"
        flags = lines.get("flags", "")
    known = (("amx_bf16", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
    found = [isa for flag, isa in known if f" {flag} " in f" {flags} "] or ["baseline"]
    names = [isa.lower().replace("-", "") for isa in found]
    # Who asks for what would be taken anyway asks for nothing; torch's own code knows no AMX.
    plain = {"TRTKERN_CPU_ISA": names[0], "ATEN_CPU_CAPABILITY": names[names[0] == "amx"]}
    asked = [f"{key}={os.environ[key]}" for key in ISA_ASKED if os.environ.get(key, "") not in ("", plain.get(key))]
    return ", ".join([name, f"{os.cpu_count()} cores", found[0], *asked])


def memory_free(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
