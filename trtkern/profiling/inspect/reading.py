"""What a compiled kernel says of itself: registers, spills, shared memory, and its global accesses by width."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Reading(NamedTuple):
    """Of one kernel, a thread (on AMD GPUs a lane) of it."""

    registers: int
    """32-bit registers; on AMD GPUs vector registers, accumulators included."""
    spilled: int
    """Bytes of local memory (scratch)."""
    shared: int
    """Bytes of shared memory (LDS) a block, static."""
    loads: Mapping[int, int]
    """Width in bytes to the number of global load instructions."""
    stores: Mapping[int, int]

    @property
    def loaded(self) -> int:
        """Bytes that all loads of the code read, each counted once."""
        return sum(width * count for width, count in self.loads.items())

    @property
    def stored(self) -> int:
        """Bytes that all stores of the code write, each counted once."""
        return sum(width * count for width, count in self.stores.items())


@cache
def tool(name: str) -> str:
    """A program of the CUDA toolkit: on PATH, in /usr/local/cuda/bin, or in Triton's package.

    Raises:
        RuntimeError: it is in none of them.
    """
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is not None:
        return found
    try:
        import triton
    except ImportError:
        places = "neither on PATH nor in /usr/local/cuda/bin, and Triton, which brings one, is not installed"
        raise RuntimeError(f"inspect: {name} is {places}; type: pip install 'trtkern[inspect]'") from None
    packed = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not packed.exists():
        raise RuntimeError(f"inspect: {name} is neither on PATH nor in Triton's package; install the CUDA toolkit")
    return str(packed)


def run(name: str, *arguments: str | Path) -> str:
    """What such a program prints."""
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"inspect: {name} failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def usage(text: str) -> dict[str, dict[str, int]]:
    """The resource usage that cuobjdump prints: for each function REG, STACK, SHARED, LOCAL."""
    rows = re.findall(r"Function (\w+):\s+(REG:.*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", row)} for name, row in rows}


_SASS = re.compile(r"\b(LDG(?:STS)?|LDL?|ST[GL]?)\b(?:\.E)?([.A-Z0-9]*) ")
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def sass_accesses(code: str) -> Counter[tuple[str, int]]:
    """("load" | "store" | "local", width in bytes) of each access in NVIDIA machine code; "local" is a spill."""
    found: Counter[tuple[str, int]] = Counter()
    for name, suffix in _SASS.findall(code):
        width = next((_SASS_WIDTHS[part] for part in suffix.split(".") if part in _SASS_WIDTHS), 4)
        found["local" if name[-1] == "L" else "load" if name.startswith("LD") else "store", width] += 1
    return found


def of_sass(usage: Mapping[str, int], accesses: Mapping[tuple[str, int], int]) -> Reading:
    """From cuobjdump's resource usage (REG, STACK, LOCAL, SHARED) and the accesses of the machine code."""
    local = sum(width * count for (kind, width), count in accesses.items() if kind == "local")
    kinds = ({w: n for (k, w), n in accesses.items() if k == kind} for kind in ("load", "store"))
    return Reading(usage["REG"], usage["STACK"] + usage["LOCAL"] or local, usage["SHARED"], *kinds)


_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "sshort": 2}


def of_amdgcn(code: str) -> Reading:
    """From the assembly of one AMD kernel, whose metadata stands at its end."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"inspect: expected .{name} in the metadata of an AMD kernel, got none")
        return int(found[1])

    counts: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for kind, suffix in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", code):
        halves = suffix.removesuffix("_d16_hi").removesuffix("_d16").removesuffix("_hi")
        counts[kind][_AMD_WIDTHS.get(halves, 1)] += 1
    # Not the spill counts: scalar registers are spilled to vector registers, and these to accumulators, first.
    spilled, shared = number("private_segment_fixed_size"), number("group_segment_fixed_size")
    return Reading(number("vgpr_count"), spilled, shared, dict(counts["load"]), dict(counts["store"]))
