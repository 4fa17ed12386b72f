"""Reads the CUDA extension: which kernels it holds, their machine code, whose memory each access in the PTX goes to."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from trtkern.profiling.inspect import reading
from trtkern.profiling.inspect.occupancy import LIMITS

KERNEL = re.compile(
    r"(forward|backward|statistics|input_grad)I\w*?(Float32|BFloat16|Float16)E?Li(\d+)E"  # E and V of its Traits
    r"(?:Li(\d+)ELb(\d)ELb(\d)E(?:EELi(\d+)E)?)?"  # K, LOOP, FUSED; the surrogate
)
BYTES = {"Float32": 4, "BFloat16": 2, "Float16": 2}
# What LifArgs begins with (csrc/lif/fields.h): addresses of 8 bytes each.
POINTERS: tuple[str, ...] = ("x", "v0", "params", "affine", "residual", "s", "v", "v_final", "edges", "packed", "flag")
POINTERS += ("gs", "gv", "gv_final", "coef", "gx", "gv0", "gparams", "norm_sums", "workspace", "counters")


class CudaKernel(NamedTuple):
    """A kernel by its mangled name: neurons a thread, steps of a chunk, whether T may exceed it.

    ``fused``: one that a plain LIF has no use for; it holds every surrogate, or none. ``ahead``: for long sequences of
    few neurons (``csrc/lif/cuda_ahead.h``), with every surrogate too.
    """

    direction: str
    element: str
    vec: int
    steps: int
    loop: bool
    surrogate: int
    fused: bool
    ahead: bool = False

    @property
    def row(self) -> int:
        """Bytes of a thread's part of all steps of a chunk."""
        return self.steps * self.vec * BYTES[self.element]


class Access(NamedTuple):
    """A global load or store: its bytes, and the tensors whose address it is made of."""

    kind: str
    bytes: int
    tensors: tuple[str, ...]


def kernel(name: str) -> CudaKernel | None:
    """The kernel of a mangled name; None for the reduction."""
    found = KERNEL.search(name)
    if found is None:
        return None
    direction, element, vec, steps, loop, fused, surrogate = found.groups()
    fuses, ahead = fused == "1" or steps is None, "lif_ahead" in name
    return CudaKernel(direction, element, int(vec), int(steps or 4), loop == "1", int(surrogate or 0), fuses, ahead)


def _match(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"inspect: expected {pattern} in PTX, got {text!r}")
    return found


def accesses(body: str) -> list[Access]:
    """The global accesses in the PTX of a kernel, each with the tensors that its address comes from."""
    definitions: defaultdict[str, list[tuple[str, str, list[str]]]] = defaultdict(list)
    found = []
    for line in body.splitlines():
        text = re.sub(r"^@!?%\w+\s+", "", line.split("//")[0].strip().rstrip(";"))
        operation, _, operands = text.partition(" ")
        if re.match(r"(ld|st)\.(volatile\.)?(global|[vbuf]\d)", operation):
            wide, bits = _match(r"(?:\.v(\d))?\.[busf](\d+)$", operation).groups()
            base = _match(r"\[(%\w+)", operands)[1]
            found.append((operation[:2], int(wide or 1) * int(bits) // 8, base))
        elif operation.startswith("cp.async") and ".global" in operation:  # to shared memory: [there], [from], bytes
            base, size = _match(r"\], \[(%\w+)(?:\+\d+)?\], (\d+)", operands).groups()
            found.append(("ld", int(size), base))
        elif not operation.startswith(("ld.shared", "st.", "bra", "setp")):
            registers = re.findall(r"%\w+", operands)
            if registers:
                definitions[registers[0]].append((operation, operands, registers[1:]))

    @cache
    def offset(register: str) -> int | None:
        """Bytes into LifArgs, for a register that points into it; None for another."""
        for operation, operands, sources in definitions[register]:
            if operation.startswith("mov") and "_param_0" in operands:
                return 0
            within = offset(sources[0]) if sources and operation.startswith(("mov", "add")) else None
            if within is not None:
                constant = re.search(r", (-?\d+)$", operands)
                return within + (int(constant[1]) if constant else 0)
        return None

    def roots(register: str) -> set[str]:
        """The tensors whose address reaches a register."""
        tensors: set[str] = set()
        reached, todo = {register}, [register]
        while todo:
            for operation, operands, sources in definitions[todo.pop()]:
                if operation.startswith("ld."):
                    base, plus = _match(r"\[(%?\w+)(?:\+(-?\d+))?\]", operands).groups()
                    start = 0 if "_param_0" in base else offset(base)
                    if start is not None and (at := start + int(plus or 0)) < 8 * len(POINTERS):
                        tensors.add(POINTERS[at // 8])
                else:
                    todo += set(sources) - reached
                    reached |= set(sources)
        return tensors

    return [Access(kind, size, tuple(sorted(roots(base)))) for kind, size, base in found]


def dump(binaries: Sequence[Path], *flags: str) -> str:
    """What cuobjdump prints of these files (an extension, or object files)."""
    return "".join(reading.run("cuobjdump", *flags, str(path)) for path in binaries)


def ptx(binaries: Sequence[Path]) -> dict[CudaKernel, tuple[str, str]]:
    """The mangled name and the PTX text of each kernel."""
    entries = re.findall(r"\.entry (\w+)\((.*?)\n}\n", dump(binaries, "-ptx"), re.S)
    return {found: (name, body) for name, body in entries if (found := kernel(name))}


def threads(body: str) -> int:
    """Threads of a block, of a kernel's PTX: its launch bounds."""
    bounds = re.search(r"\.maxntid (\d+)", body)
    if bounds is None:
        raise RuntimeError("inspect: expected launch bounds in the PTX of a CUDA kernel, got none")
    return int(bounds[1])


def usage(binaries: Sequence[Path], target: str) -> dict[str, dict[str, int]]:
    """Mangled name to REG, STACK, LOCAL, SHARED of each function of a target; SHARED is what the kernel asks for."""
    parts = re.split(r"^arch = (\w+)$", dump(binaries, "--dump-resource-usage"), flags=re.M)
    found: dict[str, dict[str, int]] = {}
    for arch, text in zip(parts[1::2], parts[2::2], strict=True):
        if arch == target:
            found |= reading.usage(text)
    # Code for sm_90 counts the KiB that the system keeps where a kernel has any, code for sm_80 does not.
    reserved = LIMITS[target].shared_reserved if target == "sm_90" else 0
    return {name: {**used, "SHARED": max(0, used["SHARED"] - reserved)} for name, used in found.items()}


def machine_code(
    binaries: Sequence[Path], target: str, names: Iterable[str] = ()
) -> dict[str, Counter[tuple[str, int]]]:
    """Mangled name to the accesses of each function (``reading.sass_accesses``); names: only of these."""
    some = [f"-fun={','.join(names)}"] if names else []
    parts = re.split(r"^\s*Function : (\w+)$", dump(binaries, "-sass", "-arch", target, *some), flags=re.M)
    named = zip(parts[1::2], parts[2::2], strict=True)
    return {name: reading.sass_accesses(code) for name, code in named}


def targets(binaries: Sequence[Path]) -> list[str]:
    """The GPUs that there is machine code for."""
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", dump(binaries, "-lelf"))))
