"""Launches many kernels, none of which is compiled or run, and prints which kernel each would have been (JSON).

Run as a process of its own, without TRITON_INTERPRET. A kernel stands for what Triton would have compiled: Triton's own
key of the launch. Whatever ``trtkern.kernels.compiled`` launches has to be the kernel that Triton itself finds.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import aot_launches
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from trtkern.kernels import compiled
from trtkern.kernels.launch import Launch, options
from trtkern.profiling.inspect import launches, triton
from trtkern.surrogates import BUILTIN

LAUNCHED: list[str] = []
ASKED: list[str] = []


class Kernel:
    """In place of a compiled one."""

    function = packed_metadata = None

    def __init__(self, key: str) -> None:
        self.key = key

    def launch_metadata(self, *args: Any) -> None: ...

    def run(self, *args: Any) -> None:
        LAUNCHED.append(self.key)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) >= 3
        return lambda *args, stream: LAUNCHED.append(self.key)


def compiles(self: JITFunction, key: str, signature: Any, device: Any, *rest: Any) -> Kernel:
    """JITFunction._do_compile."""
    kernel = self.device_caches[device][0][key] = Kernel(f"{id(self)} {device} {key}")
    return kernel


def some_launches() -> Iterator[tuple[str, Launch]]:
    """Name and launch: whatever may change from call to call, one thing after the other, beside a first launch."""
    f32, bf16 = torch.float32, torch.bfloat16
    x = torch.empty(1, 1024).expand(4, 1024)
    for direction in (launches.forward, launches.backward):
        name = direction.__name__
        yield f"{name} first", direction(4, 1024, f32)
        yield f"{name} dtype", direction(4, 1024, bf16)
        yield f"{name} alignment", direction(4, 1024, f32, offset=1)
        yield f"{name} size", direction(4, 1009, f32)
        yield f"{name} stride", direction(4, 1024, f32, x=x)
        yield f"{name} steps", direction(8, 1024, f32)
        yield f"{name} edges", direction(40, 1024, f32)
        yield f"{name} neuron", direction(4, 1024, f32, neuron="ALIF")
    for reset, surrogate in itertools.product(("hard", "soft", "none"), BUILTIN):
        yield f"backward {reset} {surrogate}", launches.backward(4, 1024, f32, reset=reset, surrogate=surrogate)
    for channels in (1, 8):
        yield f"backward {channels} channels", launches.backward(4, 1024, f32, channels=channels)
    first = launches.forward(4, 1024, f32)
    yield "forward options", first._replace(options=options(8))
    yield "forward flag", first._replace(args=tuple(None if a is first.args[11] else a for a in first.args))
    # Both may be there or not without another constant: of one the alignment selects code, of the other nothing else.
    yield "forward state", first._replace(args=(first.args[0], torch.empty(1024), *first.args[2:]))
    yield "forward parameters", first._replace(args=(*first.args[:2], torch.empty(6, 1), *first.args[3:]))
    ends = torch.zeros(4, dtype=torch.int32)
    yield "forward lengths", first._replace(args=(*first.args[:5], ends, *first.args[6:]))
    odd = torch.empty(4 * 1024 + 1)[1:].view(4, 1024)  # as no launch of ours has it: one pointer alone is not aligned
    yield "forward one pointer", first._replace(args=(odd, *first.args[1:]))
    yield "forward scalars", first._replace(args=(*first.args[:19], (0.5,) * 5 + (1,), *first.args[20:]))
    for residual, pool in itertools.product((False, True), ("none", "rows", "places")):
        yield f"norm {residual} {pool}", launches.norm_sums(4, 65536, f32, residual=residual, pool=pool)
        yield f"norm forward {residual} {pool}", launches.norm_forward(4, 65536, f32, residual=residual, pool=pool)
    for dtype in (f32, bf16, torch.float16, torch.float64):
        yield from ((f"finish {i} {dtype}", each) for i, each in enumerate(aot_launches.finishes(dtype)))
    for change in ({}, {"N": 48, "T": 250}, {"N": 129}, {"dtype": bf16}, {"params": 1}, {"every": True}):
        made = aot_launches.recurrents(**{"N": 64, **change})
        yield from ((f"recurrent {i} {change}", each) for i, each in enumerate(made))
    yield from ((f"regularizer {add}", launches.regularize(add)) for add in (True, False))
    for way, dtype in (("ieee", f32), ("bf16x3", f32), ("int8x3", f32), ("ieee", bf16)):
        for change in ({}, {"bias": True}, {"pooled": True}, {"T": 8}, {"C": 63}, {"window": 0}):
            every = enumerate(aot_launches.spike_convs(way, dtype, **change))
            yield from ((f"spike conv {i} {way} {dtype} {change}", each) for i, each in every)
    yield "packed", launches.spikes_packed(4, 65536, f32)
    yield from ((f"unpacked {pool}", launches.spikes_unpacked(4, 65536, f32, pool)) for pool in ("none", "rows"))


def main() -> None:
    """Print the launches whose kernel was another than Triton's, how often Triton was asked, and each one's kernel."""
    run, wrong, kernels = JITFunction.run, [], {}

    def asked(self: JITFunction, *args: Any, **more: Any) -> Any:
        ASKED.append(self.__name__)
        return run(self, *args, **more)

    every = [*some_launches()]
    with mock.patch.object(JITFunction, "_do_compile", compiles), mock.patch.object(JITFunction, "run", asked):
        for turn, device, debug in itertools.product(range(2), (0, 1), (False, True)):
            random.Random(turn).shuffle(every)
            with (
                mock.patch.object(triton.Driver, "get_current_device", lambda self, device=device: device),
                mock.patch.object(knobs.runtime, "debug", debug),
            ):
                for name, launch in every:
                    right = run(launch.kernel, *launch.args, grid=launch.grid, warmup=True, **launch.options).key
                    launch()
                    if LAUNCHED[-1] != right:
                        wrong.append([name, device, debug])
                    kernels[f"{name} {device} {debug}"] = right
    launched = len(LAUNCHED)
    print(json.dumps({"wrong": wrong, "asked": len(ASKED), "launched": launched, "kernels": kernels}))
    assert len(compiled._compiled) == len(ASKED)


if __name__ == "__main__":
    with triton.compiling_for("sm_90"):
        main()
