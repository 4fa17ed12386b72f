"""Neurons that feed each other in Triton against torch's loop: a stage of ``make gpu``, which writes rows.

    python bench/gpu_recurrent.py --csv FILE           sizes of Spiking Heidelberg Digits and others, on the GPU
    python bench/gpu_recurrent.py --csv FILE --small   without a GPU: tiny sizes, Triton in its interpreter

Forward without a graph ("fwd"), and forward and backward ("both"): one launch over all steps, the loop of steps that
many neurons take, and plain torch. What the first two compute is compared with float64, all gradients too, before
anything is timed. The time forward depends on the firing rate, which the row's note has.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import gpu_stages
import torch
from torch import nn

from trtkern import nn as snn
from trtkern.bench import measure, rows
from trtkern.kernels import recurrent_launch
from trtkern.selftest.recurrent import RecurrentCell, compare_recurrent

ROUNDS = 15
CHECKED = 40
"""Steps that are compared with float64 at the most."""


class Size(NamedTuple):
    """Of a layer; x is [T, B, N]."""

    neuron: str
    T: int
    B: int
    N: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"recurrent {self.neuron} T={self.T}, B={self.B}, N={self.N}"


SIZES = (
    Size("ALIF", 250, 128, 512),
    Size("ALIF", 250, 128, 512, torch.bfloat16),
    Size("LIF", 100, 256, 128),
    Size("AdLIF", 100, 128, 1024),
    Size("LIF", 50, 256, 2048),
)
SMALL = (Size("ALIF", 3, 2, 5),)

Run = Callable[[], Any]


def layer(size: Size, backend: str, device: torch.device) -> nn.Module:
    """The layer, the same numbers for every backend; some percent of its neurons fire."""
    torch.manual_seed(0)
    linear = nn.Linear(size.N, size.N)
    nn.init.normal_(linear.weight, std=0.4 / math.sqrt(size.N))
    return snn.Recurrent(getattr(snn, size.neuron)(backend=backend, surrogate="atan"), linear).to(device)


@contextmanager
def at_most(neurons: int | None) -> Iterator[None]:
    """Within, one launch takes so many neurons, and more are a loop of steps; None: as it is."""
    usual = recurrent_launch.LARGEST
    recurrent_launch.LARGEST = usual if neurons is None else neurons
    try:
        yield
    finally:
        recurrent_launch.LARGEST = usual


def run_of(net: nn.Module, x: torch.Tensor, direction: str, largest: int | None) -> Run:
    """One call."""

    def run() -> Any:
        with at_most(largest):
            if direction == "fwd":
                with torch.no_grad():
                    return net(x)
            return torch.autograd.grad(net(x).float().sum(), [x, *net.parameters()])

    return run


def candidates(size: Size, x: torch.Tensor, direction: str) -> Iterator[tuple[str, Run]]:
    """Name and what to run; this project's first one is what the others are compared with."""
    net = layer(size, "triton", x.device)
    if size.N <= recurrent_launch.LARGEST:
        yield "trtkern one launch", run_of(net, x, direction, None)
    yield "trtkern loop of steps", run_of(net, x, direction, 0)
    yield "torch loop", run_of(layer(size, "reference", x.device), x, direction, None)


def wrong(size: Size, device: torch.device, largest: int | None) -> str:
    """In what a size differs from float64; empty where it does not."""
    cell = RecurrentCell(
        size.neuron, size.dtype, learnable="none", timesteps=min(size.T, CHECKED), batch=min(size.B, 9), size=size.N
    )
    with at_most(largest):
        errors = compare_recurrent("triton", cell, str(device))
    return "" if errors.within(size.dtype) else str(errors)


def measured(size: Size, device: torch.device, direction: str, seconds: float) -> list[rows.Row]:
    """The rows of one size and direction, in that time."""
    x = (torch.randn(size.T, size.B, size.N, device=device) + 0.5).to(size.dtype).requires_grad_()
    same = {
        **rows.origin(device), "malloc": "", "suite": "recurrent", "case": size.name, "op": "recurrent",
        "shape": f"{size.T},{size.B},{size.N}", "dtype": str(size.dtype).removeprefix("torch."),
        "direction": direction, "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    ready, made = [], []
    for name, run in candidates(size, x, direction):
        begin = time.monotonic()
        try:
            largest = 0 if name == "trtkern loop of steps" else None
            status, note = "WRONG", wrong(size, device, largest) if name.startswith("trtkern") else ""
            run()
        except Exception as error:  # of whatever kind: the others run
            status, note = "failed", rows.words(error)
        if note:
            made.append(rows.Row(**same, candidate=name, library=rows.library(name), status=status, note=note))
        else:
            compiled = name.startswith("trtkern") * (time.monotonic() - begin)  # the comparison is in it
            ready.append(measure.Candidate(name, run, 0, round(compiled, 1)))
    if not ready:
        return made
    with torch.no_grad():
        rate = layer(size, "reference", device)(x.detach()).float().mean().item()
    longest = max(measure.warm_up(each, seconds=seconds / 20) for each in ready)
    rounds = max(3, min(ROUNDS, int(seconds / 2 / max(longest * len(ready), 1e-9))))
    times = measure.interleave(ready, [rounds] * len(ready), size.name, timer=measure.clock(device))
    first = next((each for name, each in times.items() if rows.library(name) == "trtkern"), [math.nan] * rounds)
    for each in ready:
        figures = {**rows.figures(times[each.name], times[each.name], first, 0, 1), "compile_s": each.compile_s}
        note = f"{100 * rate:.1f}% of the neuron-steps fire"
        kind = rows.library(each.name)
        made.append(rows.Row(**same, candidate=each.name, library=kind, status="ok", note=note, **figures))
    return made


def main() -> int:
    """Measure every size, rows as they come; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="rows are added to it")
    parser.add_argument("--seconds", type=float, default=120.0, help="of all together (default: 120)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.small else "cuda")
    todo = [(size, way) for size in (SMALL if options.small else SIZES) for way in ("fwd", "both")]
    begin, late, found = time.monotonic(), 0, []
    quiet: Any = nullcontext()
    if options.small:  # the interpreter computes with numpy, which warns of what is silent on a GPU
        import numpy

        quiet = numpy.errstate(all="ignore")
    with quiet:
        for at, (size, direction) in enumerate(todo):
            left = options.seconds - (time.monotonic() - begin)
            if left <= 0:
                late += 1
                continue
            made = measured(size, device, direction, left / (len(todo) - at))
            rows.append(made, options.csv)
            found += made
            for row in made:
                print(
                    f"{row.case} {row.direction}, {row.candidate}: {row.status} {row.p50_ms} ms {row.note}", flush=True
                )
    if late:
        print(f"{gpu_stages.CUT_MARK}{late} sizes were not measured; give GPU_MINUTES more")
    return int(any(row.status in ("WRONG", "failed") and row.library == "trtkern" for row in found))


if __name__ == "__main__":
    sys.exit(main())
