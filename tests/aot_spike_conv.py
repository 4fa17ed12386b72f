"""Compiles the kernels of spike convolutions for GPUs that are not here and prints, as JSON, what their code does.

Run as a process of its own, without TRITON_INTERPRET: ``python tests/aot_spike_conv.py``.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import aot_launches
import torch

from trtkern.kernels.launch import Launch, warp_size
from trtkern.profiling.inspect import TARGETS, triton

WAYS = (("ieee", torch.float32), ("bf16x3", torch.float32), ("int8x3", torch.float32), ("half", torch.bfloat16))
UNITS = r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.\S+|v_mfma_\w+"


def cases(target: str) -> Iterator[tuple[str, torch.dtype, dict[str, Any]]]:
    """Ways to multiply, each with what it is a case of; on sm_90 every class, elsewhere each way once.

    Pooled come all but ieee, which loads its spikes as they do and multiplies as it does without pooling.
    """
    yield from ((precision, dtype, {}) for precision, dtype in WAYS)
    if target == "sm_90":
        changes = ({"T": 16}, {"C": 63})
        yield from ((precision, dtype, {"pooled": True}) for precision, dtype in WAYS[1:])
        yield from ((precision, dtype, change) for change in changes for precision, dtype in WAYS)
        yield "int8x3", torch.float32, {"bias": True}


def row(target: str, launch: Launch, plain: bool) -> dict[str, Any]:
    """The tile of a launch and what its compiled code does.

    plain: without a pipeline, whose first stages have their loads in the code once more.
    """
    if plain:
        launch = launch._replace(options={**launch.options, "num_stages": 1})
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=True))
    kernel = triton.compiled(launch)
    code = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    names = ("PRECISION", "STEPS", "BLOCK_P", "BLOCK_K", "BLOCK_C", "ALIGNED", "POOL")
    return {
        **{name: values.get(name) for name in names}, **triton.read(kernel)._asdict(), "target": target,
        "plain": plain, "kernel": launch.kernel.__name__, "bias": values.get("bias") is not None,
        "threads": launch.options["num_warps"] * warp_size(), "units": sorted(set(re.findall(UNITS, code))),
    }  # fmt: skip


def rows(target: str) -> Iterator[dict[str, Any]]:
    """All of a target, each kernel once: many cases split their weight and add up alike."""
    done = set()
    with triton.compiling_for(target):
        for precision, dtype, change in cases(target):
            for launch in aot_launches.spike_convs(precision, dtype, **change):
                name, bias = launch.kernel.__name__, "bias" in change
                constants = (arg for arg in launch.args if isinstance(arg, bool | str))
                kind = (name, launch.args[1].dtype, *constants, *{"C", "T"} & change.keys(), bias)
                if not name.startswith("spike_conv"):
                    kind = (name, launch.args[1].dtype)
                if kind in done or (bias and name != "spike_conv_forward"):
                    continue
                done.add(kind)
                yield row(target, launch, False)
                counted = "C" not in change and ("T" not in change or precision == "half")
                if name.startswith("spike_conv") and target != "sm_80" and counted:
                    yield row(target, launch, True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        print(json.dumps([each for target in TARGETS for each in rows(target)]))
