"""Compiles neurons that feed each other for GPUs that are not here and prints, as JSON, what their code does.

Run as a process of its own, without TRITON_INTERPRET: ``python tests/aot_recurrent.py``.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import aot_launches
import torch
from triton.runtime.jit import JITFunction

from trtkern.kernels.launch import Launch, warp_size
from trtkern.profiling.inspect import TARGETS, triton

KERNELS = ("recurrent_forward", "recurrent_backward", "turn_weight")


def cases(target: str) -> Iterator[dict[str, Any]]:
    """On sm_90 the sizes and what may be asked for, elsewhere a case or two."""
    bf16 = torch.bfloat16
    yield {"N": 512, "neuron": "AdLIF", "params": 512}
    if target == "sm_90":
        yield {"N": 512}
        yield {"N": 512, "dtype": bf16}
        yield {"N": 513, "neuron": "ALIF", "every": True}
        yield {"N": 1024, "neuron": "AdLIF", "params": 1024, "every": True}


def row(target: str, launch: Launch, case: dict[str, Any]) -> dict[str, Any]:
    """A launch and what its compiled code does."""
    kernel = triton.compiled(launch)
    amd = kernel.asm.get("amdgcn", "")
    return {
        **triton.read(kernel)._asdict(), "target": target, "kernel": launch.kernel.__name__, "N": case["N"],
        "dtype": str(case.get("dtype", torch.float32)).removeprefix("torch."), "neuron": case.get("neuron", "LIF"),
        "params": case.get("params", 0), "every": case.get("every", False),
        "threads": launch.options["num_warps"] * warp_size(), "grid": launch.grid,
        "contractable": len(re.findall(r"\b(?:mul|add|sub)\.f32", kernel.asm.get("ptx", ""))),
        "int32_products": len(re.findall(r"arith\.muli .*[ x]i32\b", kernel.asm["ttir"])),
        "handed": len(re.findall(r"s_waitcnt vmcnt\(0\)\n\s*v_mov_b32(?:(?!_load)[\s\S])*?s_barrier", amd)),
        "barriers": len(re.findall(r"\bbar(?:rier)?\.sync", kernel.asm.get("ptx", ""))),
    }  # fmt: skip


def rows(target: str) -> Iterator[dict[str, Any]]:
    """All of a target."""
    turned = False  # the same kernel for all
    with triton.compiling_for(target):
        for case in cases(target):
            for launch in aot_launches.recurrents(**case):
                name = launch.kernel.__name__
                if name in KERNELS and not (turned and name == "turn_weight"):
                    yield row(target, launch, case)
                turned = turned or name == "turn_weight"


def compiles() -> dict[str, int]:
    """Different keys that Triton would compile of each kernel: steps, samples and sizes within a class are none."""
    keys: dict[str, set[str]] = {}
    with (
        triton.compiling_for("sm_90"),
        mock.patch.object(
            JITFunction, "_do_compile", lambda self, key, *rest: keys.setdefault(self.__name__, set()).add(key)
        ),
    ):
        for N in (16, 48, 128, 256, 272, 512, 1024, 7, 129, 500, 1000):
            for T, B in ((17, 1), (40, 6), (250, 128)):
                for launch in aot_launches.recurrents(N, T=T, B=B):
                    triton.compiled(launch)
    return {name: len(found) for name, found in keys.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        report = {"compiles": compiles()}  # before anything is compiled, which is then found
        report["rows"] = [each for target in TARGETS for each in rows(target)]
        print(json.dumps(report))
