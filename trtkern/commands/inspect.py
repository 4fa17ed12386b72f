"""``trtkern inspect``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from trtkern.commands._common import FAILURE, Quit, user_errors
from trtkern.commands._completion import among
from trtkern.commands._json import as_json, tell
from trtkern.names import COMPILED, KERNELS, TARGETS, inspectable
from trtkern.neurons import TABLE
from trtkern.output.console import console
from trtkern.output.text import say


@as_json("inspect")
def inspect(
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="The GPU to compile for: sm_80 (A100), sm_90 (H100), gfx942 (MI300). May be given again.",
            show_default="sm_90",
            autocompletion=among(TARGETS),
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Which kernels: triton, cuda, all.", autocompletion=among(COMPILED))
    ] = "all",
    op: Annotated[
        str,
        typer.Option(
            help="Of what: lif (neurons), bn-lif (BatchNorm and neurons), regularizer (the TRT penalty), pack "
            "(spikes to bits), all.",
            autocompletion=among((*KERNELS, "all")),
        ),
    ] = "all",
    neuron: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"Of --op lif or bn-lif: {', '.join(TABLE)}.", autocompletion=among(TABLE)),
    ] = "LIF",
    timesteps: Annotated[
        int, typer.Option(help="How many time steps T; 1 to 4, 5 to 8, 9 to 16 and more are kernels of their own.")
    ] = 4,
    dtype: Annotated[str, typer.Option(help="Of the inputs: float32, bfloat16, float16.")] = "float32",
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows into this file as well.")] = None,
) -> int:
    """Show what the compiler makes of the GPU kernels; no GPU is needed, and none is used.

    For each kernel: registers, registers spilled to memory, shared memory, loads and stores by their width, the bytes
    that its code moves for a neuron and time step (regulariser: for a parameter) beside those that it should move, and
    how many threads the GPU can hold of it. The exit status is 1 if a kernel moves more than it should, or spills.
    """
    targets = target or ["sm_90"]
    with user_errors():
        if csv is not None and (csv.is_dir() or not csv.absolute().parent.is_dir()):
            raise ValueError(f"--csv: expected a file in a folder that exists, got {csv}")
        for each in targets:
            inspectable(each, op, backend, timesteps, dtype, neuron, TABLE)
        backend = _shown(backend)
        from trtkern.profiling import inspect as inspector

        rows = []
        out = console()
        for each in targets:
            found = inspector.inspect(each, op=op, backend=backend, timesteps=timesteps, dtype=dtype, neuron=neuron)
            out.print(inspector.table(found, f"{each}, T = {timesteps}, {dtype}"))
            rows += found
        if csv is not None:
            inspector.write(rows, csv)
    tell(rows=[each.cells() for each in rows])
    wrong = [f"{each.name} {problem}" for each in rows for problem in each.problems]
    if wrong:
        raise Quit("; ".join(wrong), FAILURE)
    return 0


def _shown(backend: str) -> str:
    """Whose kernels can be shown of all: without Triton those of the CUDA extension, with a word on the others."""
    if backend != "all" or find_spec("triton") is not None or find_spec("trtkern._cuda") is None:
        return backend
    say("Triton is not installed: its kernels are left out; type: pip install 'trtkern[inspect]'")
    return "cuda"
