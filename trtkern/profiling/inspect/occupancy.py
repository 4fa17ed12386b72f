"""Theoretical occupancy: the warps that a processor can hold at a time, from what a kernel asks for.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; granularities and rounding as
in NVIDIA's cuda_occupancy.h. AMD: "AMD Instinct MI300 Instruction Set Architecture" (CDNA 3) and LLVM's AMDGPU backend,
which prints the same number: eight waves a SIMD; 512 vector registers a lane for both register files, handed out by
eights; 64 KiB of LDS a compute unit.
"""

from __future__ import annotations

from typing import NamedTuple

from trtkern.names import unknown


class Limits(NamedTuple):
    """Of one processor (SM, or compute unit), made of ``parts`` schedulers (sub-partitions, or SIMDs)."""

    warp: int
    """Threads of a warp (wave)."""
    warps: int
    blocks: int
    registers: int
    """A part's, counted in registers of a whole warp: how many one-register warps its file would hold."""
    register_unit: int
    """Registers a thread are handed out in multiples of this."""
    shared: int
    """Bytes of shared memory (LDS)."""
    shared_unit: int
    shared_reserved: int
    """Bytes a block that the system keeps."""
    parts: int = 4


LIMITS = {
    "sm_80": Limits(32, 64, 32, 512, 8, 164 * 1024, 128, 1024),
    "sm_90": Limits(32, 64, 32, 512, 8, 228 * 1024, 128, 1024),
    "gfx942": Limits(64, 32, 16, 512, 8, 64 * 1024, 512, 0),
}


class Occupancy(NamedTuple):
    """Warps that can be resident at a time, and what keeps it from being more."""

    warps: int
    most: int
    unit: str
    """warps/SM, or waves/SIMD."""
    limit: str
    """registers, shared memory, blocks; empty when nothing but the number of warps is in the way."""

    @property
    def share(self) -> float:
        return self.warps / self.most


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(target: str, registers: int, shared: int, threads: int) -> Occupancy:
    """Of blocks of ``threads`` with ``registers`` a thread and ``shared`` bytes a block.

    On NVIDIA GPUs in warps an SM; on AMD GPUs in waves a SIMD.

    Raises:
        ValueError: a target that has no row in ``LIMITS``.
    """
    if target not in LIMITS:
        raise unknown("occupancy", target, LIMITS)
    limits = LIMITS[target]
    warps = -(-threads // limits.warp)
    held = limits.registers // _up(max(registers, 1), limits.register_unit) * limits.parts
    by_registers = held // warps if held >= _up(warps, limits.parts) else 0  # one block must fit all parts alike
    memory = _up(shared + limits.shared_reserved, limits.shared_unit)
    by = {
        "": limits.warps // warps,
        "blocks": limits.blocks if warps > 1 or limits.warp == 32 else limits.warps,
        "registers": by_registers,
        "shared memory": limits.shared // memory if memory else limits.warps,
    }
    blocks = min(by.values())
    limit = next(name for name, count in by.items() if count == blocks)
    if limits.warp == 32:
        return Occupancy(blocks * warps, limits.warps, "warps/SM", limit)
    return Occupancy(blocks * warps // limits.parts, limits.warps // limits.parts, "waves/SIMD", limit)
