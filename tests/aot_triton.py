"""Compiles the Triton kernels for GPUs that are not here and prints, as JSON, what the compiled code does.

Run as a process of its own, without TRITON_INTERPRET: ``python tests/aot_triton.py``. The kernels are compiled through
the functions that launch them (``trtkern.kernels.*_launch``) and through Triton's own binder; only the driver, which
says what the current GPU is, is replaced.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from trtkern import surrogates
from trtkern.backends.base import LIFBackward, LIFForward, LIFGrads, LIFInputs, RegularizerSpec
from trtkern.kernels import lif_launch, regularizer
from trtkern.kernels.lif_launch import Launch
from trtkern.spec import LIFSpec
from trtkern.surrogates import exp

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SCALARS = (0.5, 1.0, 0.0, 1.0, 1.0, 0.0)
STEEPNESS = 1.5


def own_surrogate(u, alpha):
    """What a user might write, with a number of the module."""
    return STEEPNESS * exp(-alpha * abs(u))


class Driver:
    """Stands for the GPU that is not here. Triton keeps the kernels of each device number apart."""

    target = "sm_90"

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


def forward(
    T: int, N: int, dtype: torch.dtype, offset: int = 0, scalars: tuple = SCALARS, x: Tensor | None = None
) -> Launch:
    """The launch of a forward pass as training asks for it: spikes, edges if T > 16, the flag."""
    if x is None:
        x = torch.empty(T * N + offset, dtype=dtype)[offset:].view(T, N)
    edges = torch.empty(max(-(-T // 16) - 1, 0), 1).expand(-1, N) if T > 16 else None
    out = LIFForward(x, None, None, edges, torch.zeros(1, dtype=torch.int32))
    return lif_launch.forward_launch(LIFInputs(x, None, None, scalars, LIFSpec(), 1), out)


def backward(
    T: int, N: int, dtype: torch.dtype, offset: int = 0, scalars: tuple = SCALARS, x: Tensor | None = None,
    channels: int = 0, surrogate: str = "triangle", reset: str = "hard",
) -> Launch:  # fmt: skip
    """The launch of a backward pass from the gradient of the spikes, with gradients of parameters if channels > 0."""
    if x is None:
        x = torch.empty(T * N + offset, dtype=dtype)[offset:].view(T, N)
    edges = torch.empty(max(-(-T // 16) - 1, 0), 1).expand(-1, N) if T > 16 else None
    params = torch.empty(6, channels) if channels else None
    inputs = LIFInputs(x, None, params, scalars, LIFSpec(reset, surrogate), 1)
    out = LIFBackward(x, None, params)
    return lif_launch.backward_launch(inputs, edges, LIFGrads(x, None, None), out)[0]


def regularize(accumulate: bool) -> Launch:
    """The launch over two tensors, one of them odd in size."""
    weights = [torch.empty(5000), torch.empty(7)]
    return regularizer.regularizer_launch(weights, RegularizerSpec(6, 1e-5, 0.25, 1e-5), weights, accumulate, 1.0)[0]


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
    """One row for a LIF kernel; lanes is the number of neurons that a thread owns."""
    driver.target = target
    lif_launch.warp_size.cache_clear()
    launch = (forward if direction == "forward" else backward)(T, N, dtype, **options)
    names = dict(zip(launch.kernel.arg_names, launch.args, strict=True))
    threads = launch.options["num_warps"] * lif_launch.warp_size()
    row = {"direction": direction, "T": T, "dtype": str(dtype).removeprefix("torch."), "aligned": names["ALIGNED"]}
    return measured(target, launch, **row, lanes=names["BLOCK"] // threads, steps=names["STEPS"], **options)


def all_rows() -> list[dict[str, Any]]:
    """A representative of every class."""
    f32, bf16 = torch.float32, torch.bfloat16
    own = surrogates.register(own_surrogate, "own")
    rows = [lif_row("sm_90", direction, T, f32) for direction in ("forward", "backward") for T in (4, 8, 16, 40)]
    rows += [lif_row("sm_90", direction, 16, bf16) for direction in ("forward", "backward")]
    rows += [lif_row("sm_90", "backward", 4, f32, surrogate=name) for name in (*surrogates.BUILTIN[1:], own)]
    rows += [lif_row("sm_90", "backward", 4, torch.float16, reset="soft")]
    rows += [lif_row("sm_90", "backward", 16, f32, channels=channels) for channels in (1, 8)]
    rows += [lif_row("sm_90", direction, 4, f32, N=1009) for direction in ("forward", "backward")]
    for target in ("sm_80", "gfx942"):
        rows += [lif_row(target, direction, 4, f32) for direction in ("forward", "backward")]
    for target, accumulate in (("sm_90", False), ("sm_90", True), ("sm_80", True), ("gfx942", True)):
        rows.append(measured(target, regularize(accumulate), direction="regularizer", accumulate=accumulate))
    return rows


def count_compiles() -> dict[str, list[int]]:
    """For each direction: the number of shapes, of different keys that Triton would compile, and of classes."""
    driver.target = "sm_90"
    lif_launch.warp_size.cache_clear()
    shapes = [(1, 1), (1, 16), (2, 64), (3, 1009), (4, 4096), (4, 100), (5, 64), (7, 33), (8, 2**20), (9, 48), (12, 7)]
    shapes += [
        (16, 1024),
        (16, 1),
        (17, 16),
        (33, 640),
        (40, 1009),
        (500, 8192),
        (1000, 31),
        (4, 2**33),
        (64, 2**31 + 1),
    ]
    keys: set[str] = set()

    counts = {}
    compile_key = mock.patch.object(JITFunction, "_do_compile", lambda self, key, *rest: keys.add(key))
    with compile_key:
        for direction in (forward, backward):
            keys.clear()
            for i, (T, N) in enumerate(shapes):
                scalars = tuple(0.25 * (i + k) for k in range(6))
                compiled(direction(T, N, torch.float32, scalars=scalars, x=torch.empty(1, 1).expand(T, N)))
                if T * N < 2**20:  # a pointer that is not aligned, whatever N is
                    compiled(direction(T, N, torch.float32, offset=1, scalars=scalars))
            classes = {lif_launch.chunk_class(T) for T, N in shapes}
            counts[direction.__name__] = [len(shapes), len(keys), 2 * len(classes)]
    return counts


driver = Driver()

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        triton.runtime.driver.set_active(driver)
        print(json.dumps({"compiles": count_compiles(), "rows": all_rows()}))
