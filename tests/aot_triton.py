"""Compiles the Triton kernels for GPUs that are not here and prints, as JSON, what the compiled code does.

Run as a process of its own, without TRITON_INTERPRET: ``python tests/aot_triton.py``. The kernels are compiled through
the functions that launch them (``trtkern.kernels.*_launch``) and through Triton's own binder; only the driver, which
says what the current GPU is, is replaced. ``TRTKERN_AOT=all`` compiles whole grids.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import aot_launches
import torch
import triton
from aot_launches import Launch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from trtkern import surrogates
from trtkern.kernels.launch import chunk_class, warp_size
from trtkern.kernels.launch import target as compile_target
from trtkern.kernels.pooling import POSITIONS

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WHOLE = os.environ.get("TRTKERN_AOT") == "all"  # two minutes and a half on two cores
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """Stands for the GPU that is not here. Triton keeps the kernels of each device number apart."""

    target = "sm_90"

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: Launch) -> Any:
    """What Triton's launcher would run on the current target."""
    return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.options)


def sass(kernel: Any) -> dict[str, Any]:
    """Registers, spills, and every global access of a cubin by its width in bytes: {"LDG": {16: count}, "STG": ...}.

    int32_products: multiplications that an address could be made of and that overflow when T * N passes 2**31.
    contractable: additions and multiplications that the assembler may fuse behind our back.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True
        )
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    found: dict[str, Any] = {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"], "LDG": {}, "STG": {}}
    found["int32_products"] = len(re.findall(r"arith\.muli .*[ x]i32\b", kernel.asm["ttir"]))
    found["contractable"] = len(re.findall(r"\b(?:mul|add|sub)\.f32", kernel.asm["ptx"]))
    found["spilled"] += len(re.findall(r"\b(?:LDL|STL)\b", code))
    for name, suffix in re.findall(r"\b(LDG|STG)\.E([.A-Z0-9]*)", code):
        bits = re.search(r"\.[US]?(128|64|16|8)\b", suffix)
        width = int(bits.group(1)) // 8 if bits else 4
        found[name][width] = found[name].get(width, 0) + 1
    return found


def amdgcn(kernel: Any) -> dict[str, Any]:
    """The same for an AMD GPU, from its assembly."""
    code = kernel.asm["amdgcn"]
    found: dict[str, Any] = {"registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code).group(1)), "LDG": {}, "STG": {}}
    found["spilled"] = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", code)))
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2}
    for name, suffix in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", code):
        kind, width = ("LDG" if name == "load" else "STG"), widths.get(suffix, 0)
        found[kind][width] = found[kind].get(width, 0) + 1
    return found


def measured(target: str, launch: Launch, **more: Any) -> dict[str, Any]:
    """One row: the launch compiled for the target and looked at."""
    driver.target = target
    kernel = compiled(launch)
    return {"target": target, **more, **(amdgcn if target == "gfx942" else sass)(kernel)}


def lif_row(target: str, direction: str, T: int, dtype: torch.dtype, N: int = 1024, **options: Any) -> dict[str, Any]:
    """One row for a kernel over neurons: a thread owns ``lanes`` neurons, of which it pools ``positions`` each."""
    driver.target = target
    compile_target.cache_clear()
    asked = getattr(aot_launches, direction)(T, N, dtype, **options)
    names = dict(zip(asked.kernel.arg_names, asked.args, strict=True))
    threads = asked.options["num_warps"] * warp_size()
    row = {"direction": direction, "T": T, "dtype": str(dtype).removeprefix("torch."), "aligned": names["ALIGNED"]}
    row |= {"lanes": names["BLOCK"] // threads, "steps": names.get("STEPS", 8)}
    return measured(target, asked, **row, positions=POSITIONS[names.get("POOL", "none")], **options)


def all_rows(part: int, parts: int) -> list[dict[str, Any]]:
    """Every parts-th row, from number ``part`` on."""
    surrogates.register(aot_launches.own_surrogate, "own")
    norms = [(arguments, {"N": 65536, **options}) for arguments, options in aot_launches.norm_cases(WHOLE)]
    rows = [lif_row(*arguments, **options) for arguments, options in [*aot_launches.lif_cases(), *norms][part::parts]]
    for target, accumulate in (("sm_90", False), ("sm_90", True), ("sm_80", True), ("gfx942", True))[part::parts]:
        rows.append(
            measured(target, aot_launches.regularize(accumulate), direction="regularizer", accumulate=accumulate)
        )
    return rows


def count_compiles() -> dict[str, list[int]]:
    """For each direction: the number of shapes, of different keys that Triton would compile, and of classes."""
    driver.target = "sm_90"
    compile_target.cache_clear()
    shapes = [(1, 1), (1, 16), (2, 64), (3, 1009), (4, 4096), (4, 100), (5, 64), (7, 33), (8, 2**20), (9, 48), (12, 7)]
    shapes += [(16, 1024), (16, 1), (17, 16), (33, 640), (40, 1009), (500, 8192), (1000, 31)]
    shapes += [(4, 2**33), (64, 2**31 + 1)]
    images = [(T, 4096 * T) for T in (1, 3, 4, 5, 8, 9, 15, 16, 17, 40)]
    keys: set[str] = set()
    counts = {}
    with mock.patch.object(JITFunction, "_do_compile", lambda self, key, *rest: keys.add(key)):
        for direction in (aot_launches.forward, aot_launches.backward):
            keys.clear()
            for i, (T, N) in enumerate(shapes):
                scalars = tuple(0.25 * (i + k) for k in range(6))
                compiled(direction(T, N, torch.float32, scalars=scalars, x=torch.empty(T, 1).expand(T, N)))
                if T * N < 2**20:  # a pointer that is not aligned, whatever N is
                    compiled(direction(T, N, torch.float32, offset=1, scalars=scalars))
            counts[direction.__name__] = [len(shapes), len(keys), 2 * len({chunk_class(T) for T, N in shapes})]
        for direction in (aot_launches.norm_forward, aot_launches.norm_sums, aot_launches.norm_input):
            keys.clear()
            for T, N in images:
                compiled(direction(T, N, torch.float32, x=torch.empty(T, 1).expand(T, N)))
            counts[direction.__name__] = [len(images), len(keys), len({chunk_class(T) for T, N in images})]
    return counts


def main(part: int, parts: int) -> None:
    """Print the report; part 0 asks other processes for the other parts."""
    triton.runtime.driver.set_active(driver)
    if part:
        print(json.dumps(all_rows(part, parts)))
        return
    others = [
        subprocess.Popen([sys.executable, __file__, str(i), str(parts)], stdout=subprocess.PIPE)
        for i in range(1, parts)
    ]
    report = {"compiles": count_compiles(), "rows": all_rows(0, parts)}
    for other in others:
        report["rows"] += json.loads(other.communicate()[0])
        if other.returncode:
            raise SystemExit(other.returncode)
    print(json.dumps(report))


driver = Driver()

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main(*map(int, sys.argv[1:3] or (0, min(os.cpu_count() or 1, 4))))
