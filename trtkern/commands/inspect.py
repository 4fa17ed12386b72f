"""``trtkern inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkern.commands._common import FAILURE, Quit, console, user_errors


def inspect(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, gfx942; repeat it for several.")] = None,
    backend: Annotated[str, typer.Option(help="triton, cuda, all.")] = "all",
    op: Annotated[str, typer.Option(help="lif, bn-lif, regularizer, pack, all.")] = "all",
    timesteps: Annotated[int, typer.Option(help="T: 1 to 4, 5 to 8, 9 to 16 and more are compiled apart.")] = 4,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows there.")] = None,
) -> int:
    """Show what the compiler makes of the GPU kernels; no GPU is needed, and none is used.

    Registers, spills and shared memory; accesses as count x bytes; bytes per neuron-step (regulariser: per parameter)
    in the code against the traffic contract; theoretical occupancy. Exit status 1 if a kernel moves more than the
    contract allows, or spills.
    """
    targets = target or ["sm_90"]
    with user_errors():
        if csv is not None and not csv.absolute().parent.is_dir():
            raise ValueError(f"--csv: expected a file in a folder that exists, got {csv}")
        from trtkern.profiling import inspect as inspector

        rows = []
        out = console()
        for each in targets:
            found = inspector.inspect(each, op=op, backend=backend, timesteps=timesteps, dtype=dtype)
            out.print(inspector.table(found, f"{each}, T = {timesteps}, {dtype}"))
            rows += found
        if csv is not None:
            inspector.write(rows, csv)
    wrong = [f"{each.name} {problem}" for each in rows for problem in each.problems]
    if wrong:
        raise Quit("; ".join(wrong), FAILURE)
    return 0
