"""Compiles the Triton kernels for GPUs that are not here and prints, as JSON, what the compiled code does.

Run as a process of its own, without TRITON_INTERPRET: ``python tests/aot_triton.py``. What ``trtkern inspect`` shows,
and more cases on sm_90; ``TRTKERN_AOT=all`` compiles whole grids. Then the forward kernel with a fault planted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import aot_launches
import torch
from triton.runtime.jit import JITFunction

from trtkern import surrogates
from trtkern.commands._common import Quit
from trtkern.commands.inspect import inspect
from trtkern.kernels import lif, lif_launch
from trtkern.kernels.launch import chunk_class, classes
from trtkern.kernels.pooling import POSITIONS
from trtkern.profiling.inspect import OPS, TARGETS, launches, triton, triton_row

WHOLE = os.environ.get("TRTKERN_AOT") == "all"  # two minutes and a half on two cores
T, DTYPE = 4, torch.float32  # of what trtkern inspect shows unless asked for more


def shown(target: str) -> Iterator[aot_launches.Case]:
    """Of what ``trtkern inspect`` shows: on sm_90 what the grids of ``aot_launches`` leave out, else every kernel once,
    one with a residual, one with pooling."""
    seen = set()
    for op in OPS:
        for name, options in triton.representatives(op):
            gridded = name.startswith("norm_") and "pool" in options
            kept = name not in seen or (name == "norm_sums" and options in ({"residual": True}, {"pool": "rows"}))
            if not gridded if target == "sm_90" else kept:
                yield name, T, DTYPE, options
            seen.add(name)


def all_cases() -> Iterator[tuple[str, aot_launches.Case]]:
    """Each with its target."""
    for target in TARGETS:
        yield from ((target, case) for case in shown(target))
    yield from (("sm_90", case) for case in (*aot_launches.lif_cases(), *aot_launches.norm_cases(WHOLE)))


def row(target: str, name: str, T: int, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, what was decided, what the compiled code does, and what ``trtkern inspect`` says of it.

    int32_products: multiplications that an address could be made of and that overflow when T * N passes 2**31.
    contractable: additions and multiplications that the assembler may fuse behind our back.
    """
    with triton.compiling_for(target):
        case = triton.case(name, T, dtype, **options)
        shown = triton_row(target, case)
        asm = triton.compiled(case.launch).asm
    occupancy = re.search(r"; Occupancy: (\d+)", asm.get("amdgcn", ""))
    return {
        **options, "target": target, "direction": name, "T": T, "dtype": str(dtype).removeprefix("torch."),
        "aligned": case.aligned, "lanes": case.lanes, "steps": case.kernel.steps,
        "positions": POSITIONS[case.kernel.pool], **shown.reading._asdict(),
        "counted": shown.counted, "contract": shown.contract, "problems": shown.problems,
        "occupancy": shown.occupancy.warps, "compilers_occupancy": occupancy and int(occupancy[1]),
        "int32_products": len(re.findall(r"arith\.muli .*[ x]i32\b", asm["ttir"])),
        "contractable": len(re.findall(r"\b(?:mul|add|sub)\.f32", asm.get("ptx", ""))),
    }  # fmt: skip


def finishes(target: str) -> list[dict[str, Any]]:
    """Registers, spills and the float64 operations of all that runs between the passes of a norm.

    On sm_90 each launch for each type of the parameters, elsewhere each launch for one, and each type. What does not
    depend on the type is the same code for all of them, and read once.
    """
    rows, readings = [], {}
    with triton.compiling_for(target):
        for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64)):
            launches = aot_launches.finishes(dtype)
            for launch in launches if target == "sm_90" or WHOLE else launches[number::4]:
                kernel, name = triton.compiled(launch), launch.kernel.__name__
                found = re.findall(r"\b((?:sqrt|div|rcp|fma)\.\w+\.f64|atom\.\S+)", kernel.asm.get("ptx", ""))
                if kernel.hash not in readings:
                    readings[kernel.hash] = triton.read(kernel)._asdict()
                said = {"target": target, "kernel": name, "operations": sorted(set(found))}
                rows.append({**said, **readings[kernel.hash]})
    return rows


def lengths() -> list[dict[str, Any]]:
    """Registers and spills of what takes the lengths of samples, on sm_90."""
    with triton.compiling_for("sm_90"):
        compiled = [(name, triton.compiled(launch)) for name, launch in aot_launches.with_lengths()]
        return [{"name": name, **triton.read(kernel)._asdict()} for name, kernel in compiled]


def all_rows(part: int, parts: int) -> list[dict[str, Any]]:
    """Every parts-th row, from number ``part`` on."""
    surrogates.register(aot_launches.own_surrogate, "own")
    return [row(target, *case) for target, case in [*all_cases()][part::parts]]


def planted() -> dict[str, Any]:
    """What ``trtkern inspect`` says when the forward kernel stores a float32 copy of every h."""
    source, step = Path(lif.__file__).read_text(), "            if packed is not None:\n                word +="
    assert source.count(step) == 1
    copied = source.replace(
        step, "            tl.store(x + (t0 + i) * N + offsets, trace[0], mask=mask & live)\n" + step
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "planted_lif.py"
        path.write_text(copied)
        spec = importlib.util.spec_from_file_location("planted_lif", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        printed = io.StringIO()
        with (
            mock.patch.object(lif_launch, "_FORWARD", classes(module.lif_forward)),
            contextlib.redirect_stdout(printed),
        ):
            try:
                status, message = inspect(target=["sm_90"], backend="triton", op="lif"), ""
            except Quit as quits:
                status, message = quits.status, str(quits)
    return {"status": status, "message": message, "printed": printed.getvalue()}


def count_compiles() -> dict[str, list[int]]:
    """For each direction: the number of shapes, of different keys that Triton would compile, and of classes."""
    shapes = [(1, 1), (1, 16), (2, 64), (3, 1009), (4, 4096), (4, 100), (5, 64), (7, 33), (8, 2**20), (9, 48), (12, 7)]
    shapes += [(16, 1024), (16, 1), (17, 16), (33, 640), (40, 1009), (500, 8192), (1000, 31)]
    shapes += [(4, 2**33), (64, 2**31 + 1)]
    images = [(T, 4096 * T) for T in (1, 3, 4, 5, 8, 9, 15, 16, 17, 40)]
    keys: set[str] = set()
    counts = {}
    with mock.patch.object(JITFunction, "_do_compile", lambda self, key, *rest: keys.add(key)):
        for direction in (launches.forward, launches.backward):
            keys.clear()
            for i, (T, N) in enumerate(shapes):
                scalars = tuple(0.25 * (i + k) for k in range(6))
                triton.compiled(direction(T, N, torch.float32, scalars=scalars, x=torch.empty(T, 1).expand(T, N)))
                if T * N < 2**20:  # a pointer that is not aligned, whatever N is
                    triton.compiled(direction(T, N, torch.float32, offset=1, scalars=scalars))
            counts[direction.__name__] = [len(shapes), len(keys), 2 * len({chunk_class(T) for T, N in shapes})]
        for direction in (launches.norm_forward, launches.norm_sums, launches.norm_input):
            keys.clear()
            for T, N in images:
                triton.compiled(direction(T, N, torch.float32, x=torch.empty(T, 1).expand(T, N)))
            counts[direction.__name__] = [len(images), len(keys), len({chunk_class(T) for T, N in images})]
    return counts


def main(part: int, parts: int) -> None:
    """Print the report; part 0 asks other processes for the other parts."""
    if part:
        print(json.dumps(all_rows(part, parts)))
        return
    others = [
        subprocess.Popen([sys.executable, __file__, str(i), str(parts)], stdout=subprocess.PIPE)
        for i in range(1, parts)
    ]
    with triton.compiling_for("sm_90"):
        compiles = count_compiles()
    report = {"compiles": compiles, "rows": all_rows(0, parts), "planted": planted()}
    report["finishes"] = [row for target in TARGETS for row in finishes(target)]
    report["lengths"] = lengths()
    for other in others:
        report["rows"] += json.loads(other.communicate()[0])
        if other.returncode:
            raise SystemExit(other.returncode)
    print(json.dumps(report))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main(*map(int, sys.argv[1:3] or (0, min(os.cpu_count() or 1, 4))))
