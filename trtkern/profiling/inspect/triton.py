"""Compiles the Triton kernels for GPUs that are not here, and reads what comes out.

They are compiled through the functions that launch them and through Triton's own binder; only the driver, which says
what the current GPU is, is replaced meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from trtkern.kernels.launch import Launch, warp_size
from trtkern.kernels.launch import target as compile_target
from trtkern.kernels.numerics import INTERPRETED
from trtkern.profiling.inspect import launches, reading
from trtkern.profiling.inspect.contract import Kernel
from trtkern.profiling.inspect.reading import Reading

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEURONS = 65536
"""Of the representative launches: 16 images in 16 channels."""


class Driver:
    """Stands for the GPU that is not here. Triton keeps the kernels of each device apart: its name is the device."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return f"inspected {self.target}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Within, Triton compiles for that target; no kernel may be launched.

    Raises:
        RuntimeError: Triton's interpreter runs in this process, so nothing is compiled.
    """
    if INTERPRETED.value:
        raise RuntimeError("inspect: TRITON_INTERPRET is set, so Triton compiles nothing; unset it")
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver(target))
    compile_target.cache_clear()
    try:
        yield
    finally:
        triton.runtime.driver._active = before  # reset_active() would look for a GPU
        compile_target.cache_clear()


def compiled(launch: Launch) -> Any:
    """What Triton's launcher would run on the current target."""
    return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.options)


def read(kernel: Any) -> Reading:
    """What the compiler made of a kernel; its shared memory is what a launch asks for."""
    if "amdgcn" in kernel.asm:
        found = reading.of_amdgcn(kernel.asm["amdgcn"])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = next(iter(reading.usage(reading.run("cuobjdump", "--dump-resource-usage", file.name)).values()))
            code = reading.run("nvdisasm", "-c", "-ndf", file.name)  # no data flow: sooner
        found = reading.of_sass(usage, reading.sass_accesses(code))
    return found._replace(shared=kernel.metadata.shared)


class Case(NamedTuple):
    """A launch: the kernel as the contract knows it, and what was decided for it."""

    kernel: Kernel
    launch: Launch
    lanes: int
    """Neurons side by side in a thread; of the regulariser the parameters of a thread."""
    threads: int
    """Of a block."""
    aligned: bool


def case(name: str, timesteps: int, dtype: torch.dtype, neurons: int = NEURONS, **options: Any) -> Case:
    """The launch of a kernel (``contract.OPS``) for the current target. ``options``: those of ``launches``."""
    element = torch.empty(0, dtype=dtype).element_size()
    known = {key: value for key, value in options.items() if key in Kernel._fields}
    if name == "regularizer":
        launch = launches.regularize(options.get("accumulate", True))
        values = dict(zip(launch.kernel.arg_names, launch.args, strict=True))
        threads = launch.options["num_warps"] * warp_size()
        return Case(Kernel(name, 4, 1, **known), launch, values["BLOCK"] // threads, threads, values["ALIGNED"])
    launch = getattr(launches, name)(timesteps, neurons, dtype, **options)
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=True))
    threads = launch.options["num_warps"] * warp_size()
    kernel = Kernel(name, element, values.get("STEPS", 8), values.get("LOOP", False), **known)
    return Case(kernel, launch, values["BLOCK"] // threads, threads, values["ALIGNED"])


_OF_NEURONS = ("forward", "backward", "norm_forward", "norm_sums", "norm_input")


def representatives(op: str, neuron: str = "LIF") -> Iterator[tuple[str, dict[str, Any]]]:
    """The launches that stand for an op: each kernel, with a residual, packed words and pooling where it knows them.

    Of another neuron than LIF those that have it in them.
    """
    if neuron != "LIF":
        made = ((name, options) for name, options in representatives(op) if name in _OF_NEURONS)
        yield from ((name, {**options, "neuron": neuron}) for name, options in made)
        return
    if op == "lif":
        yield from (("forward", {}), ("backward", {}))
    elif op == "bn-lif":
        yield from (("norm_statistics", {}), ("norm_forward", {}), ("norm_forward", {"residual": True, "packed": True}))
        yield from (("norm_sums", {}), ("norm_sums", {"residual": True}), ("norm_input", {}), ("norm_input_grad", {}))
        for pool in ("rows", "places"):
            yield from ((name, {"pool": pool}) for name in ("norm_forward", "norm_sums", "norm_input"))
    elif op == "regularizer":
        yield from (("regularizer", {"accumulate": accumulate}) for accumulate in (True, False))
    elif op == "pack":
        yield from (("spikes_packed", {}), ("spikes_unpacked", {}), ("spikes_unpacked", {"pool": "rows"}))
    elif op == "delay":
        yield from (("delay_forward", {}), ("delay_backward", {}), ("delay_backward", {"channels": 16}))
