"""Whole training steps of the paper's networks, on a GPU: what ``make gpu`` measures of them.

    python bench/gpu_steps.py --case resnet19 --dtype bfloat16 --csv FILE
    python bench/gpu_steps.py --case vggsnn --dtype float32 --csv FILE

A step is forward, the TRT loss, backward and a fused Adam; bfloat16 is autocast. Compared are this project on each
backend, eagerly and replayed from a CUDA graph, SpikingJelly's neurons in each implementation that it offers here, the
plain network (neurons over unbind, a penalty that loops over T and the weights), and the network with ReLU in place of
the neurons, the last three in both memory layouts. SpikingJelly's and the ReLU network have this project's penalty:
what differs is the neuron. Each network with neurons is compared with the plain one first, in float32 at few pixels; a
graph is made of other images, then replayed on these.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_stages
import torch
from gpu_networks import CASES, SMALL, Entry, Network, entries, inputs, plain, plain_network
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from trtkern import reference
from trtkern.bench import measure, memory, rows
from trtkern.bench.measure import Candidate
from trtkern.bench.table import table
from trtkern.training.step import CapturedStep, Step
from trtkern.training.tally import Tally

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADMISSION = 0.65
"""Of the time, for checking, compiling and warming up; the rounds are short."""
DRAWS, LOSS_ERROR, COSINE = 4, 1e-2, 0.95
"""Draws of images, of which one has to agree: how far the losses may be apart; the least cosine of the gradients of the
first convolution. Where rounding moves a spike the network carries it on, until that gradient is another one: at 32x32
and T = 6 the two memory layouts of plain torch have a cosine of 0.03. So few pixels mostly have no such spike."""


def whole_loss(entry: Entry, x: Tensor, y: Tensor) -> Tensor:
    """The loss with its penalty, and its gradients into ``.grad``."""
    if entry.captured:
        run = captured_step(entry, torch.float32, rate=0.0)
        for _ in range(CapturedStep.WARM_UP + 1):
            run(x.flip(-1), y.flip(0))  # made of these, and replayed on those
        return run(x, y)
    logits = entry.model(x)
    if entry.loss is None:
        total = plain.trt_loss(entry.model, logits.float(), y)
        total.backward()
        return total.detach()
    data = entry.loss.parts(logits, y, regularize=False).total
    data.backward()
    return data.detach() + entry.loss.add_grad_()


def adam(entry: Entry, rate: float) -> torch.optim.Optimizer:
    """The same for all: one kernel."""
    graph = entry.captured and next(entry.model.parameters()).is_cuda
    return torch.optim.Adam(entry.model.parameters(), lr=rate, fused=True, capturable=graph)


def captured_step(entry: Entry, dtype: torch.dtype, rate: float) -> Callable[[Tensor, Tensor], Tensor]:
    """This project's captured training step: the total loss of images and labels."""
    device = next(entry.model.parameters()).device

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return entry.model(images).float()

    assert entry.loss is not None
    kind, tally = CapturedStep if device.type == "cuda" else Step, Tally(str(device))
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    run = kind(forward, entry.loss, adam(entry, rate), scaler, None, lambda total: None)
    return lambda x, y: run(x, y, tally)


def step(entry: Entry, x: Tensor, y: Tensor, dtype: torch.dtype, rate: float = 1e-4) -> Callable[[], object]:
    """One training step, in which nothing waits for a GPU."""
    if entry.captured:
        return partial(captured_step(entry, dtype, rate), x, y)
    optimizer = adam(entry, rate)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = entry.model(x)
        if entry.loss is None:
            plain.trt_loss(entry.model, logits.float(), y).backward()
        else:
            entry.loss.parts(logits, y, regularize=False).total.backward()
            entry.loss.add_grad_()
        optimizer.step()

    return run


@contextmanager
def exactly() -> Iterator[None]:
    """Without TF32, which moves spikes."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def differs(entry: Entry, case: str, network: Network, device: torch.device) -> str:
    """Why an entry is WRONG: loss or gradient are not those of the plain network with its neuron; empty if they are."""
    run = None
    if entry.against is not None:
        neuron = entry.against.neuron
        run = lambda x: reference.lif(x, None, neuron.numbers, neuron.spec).s  # noqa: E731
    twin = Entry("", "", plain_network(case, network, device, run), None)
    said = ""
    for seed in range(DRAWS):
        x, y = inputs(network, case, device, seed)
        for each in (entry, twin):
            each.model.zero_grad(set_to_none=True)
        with exactly():
            found, wanted = whole_loss(entry, x, y).item(), whole_loss(twin, x, y).item()
        mine, theirs = (next(each.model.parameters()).grad for each in (entry, twin))
        if mine is None or theirs is None:
            return "the first convolution has no gradient"
        cosine = functional.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0).item()
        error = abs(found / wanted - 1)
        said = f"loss off by {error:.1e}, cosine of the first gradients {cosine:.4f}, draw {seed + 1} of {DRAWS}"
        print(f"{entry.name}: {said}", flush=True)
        if error < LOSS_ERROR and cosine > COSINE:
            return ""
    return said


def main() -> None:
    """Measure one case and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--csv", type=Path, required=True, help="rows are added to it")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of everything (default: 60)")
    parser.add_argument("--rounds", type=int, default=25, help="at the most (default: 25)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny images")
    options = parser.parse_args()
    begin = time.monotonic()
    device = torch.device("cpu" if options.rehearse else "cuda")
    network = (SMALL if options.rehearse else CASES)[options.case]
    size = "x".join(map(str, (network.timesteps, network.batch, *network.shape)))
    same: dict[str, Any] = {
        **rows.origin(device), "malloc": "default", "suite": "step", "op": "step",
        "case": f"{options.case} step {size} {options.dtype}", "shape": size.replace("x", ","), "dtype": options.dtype,
        "direction": "both", "command": f"python {os.path.relpath(sys.argv[0])} {' '.join(sys.argv[1:])}",
    }  # fmt: skip
    made: list[rows.Row] = []

    def sink(more: Sequence[rows.Row]) -> None:
        rows.append(more, options.csv)
        made.extend(more)

    admitted = admit(options.case, network, device, (begin, options.budget), same, sink)
    if admitted:
        sink(timed(admitted, device, begin + options.budget, options.rounds, same))
    Console(width=160).print(table(made))
    late = sum(row.note.startswith("over the budget") for row in made)
    if late:
        print(f"{gpu_stages.CUT_MARK}{late} networks were left out; give GPU_MINUTES more")
    ours = [row for row in made if row.library == "trtkern" and row.status == "ok"]
    print(f"{same['case']}: " + ", ".join(f"{row.candidate} {row.p50_ms:.1f} ms" for row in ours))
    if not ours or any(row.library == "trtkern" and row.status in ("WRONG", "failed") for row in made):
        sys.exit(1)


class Admitted(NamedTuple):
    """A network that has passed the gate."""

    entry: Entry
    candidate: Candidate
    peak: int


def admit(
    case: str, network: Network, device: torch.device, time_: tuple[float, float], same: dict[str, Any],
    sink: Callable[[Sequence[rows.Row]], None],
) -> list[Admitted]:  # fmt: skip
    """Judge the networks, warm them up and measure their peaks, for ``ADMISSION`` of the time.

    Args:
        time_: when it began (``time.monotonic``), and how many seconds it has.
        sink: gets a row of each that is left out.
    """
    begin, seconds = time_
    admitted: list[Admitted] = []
    x, y = inputs(network, case, device)
    for small, entry in zip(entries(case, SMALL[case], device), entries(case, network, device), strict=True):
        if not isinstance(entry, Entry):
            name, library, status, note = entry
            sink([rows.Row(**same, candidate=name, library=library, status=status, note=note)])
            continue
        assert isinstance(small, Entry)
        leave = partial(rows.Row, **same, candidate=entry.name, library=entry.library)
        if time.monotonic() > begin + ADMISSION * seconds and admitted:
            sink([leave(status="skipped", note="over the budget")])
            continue
        try:
            if entry.judged and (why := differs(small, case, SMALL[case], device)):
                sink([leave(status="WRONG", note=why)])
                continue
            candidate = Candidate(entry.name, step(entry, x, y, DTYPES[same["dtype"]]), 0)
            # Of a captured step all its eager calls: its peak is then that of the call that captures.
            measure.warm_up(candidate, CapturedStep.WARM_UP, math.inf if entry.captured else seconds / 60)
            admitted.append(Admitted(entry, candidate, memory.peak(candidate, device)))
        except Exception as error:  # of whatever kind, out of memory too: the others are measured
            sink([leave(status="failed", note=rows.words(error))])
    return admitted


def timed(
    admitted: Sequence[Admitted], device: torch.device, end: float, rounds: int, same: dict[str, Any]
) -> list[rows.Row]:
    """Interleaved rounds, at least one, until ``end`` (``time.monotonic``); the rows, also when it is interrupted."""
    candidates = [each.candidate for each in admitted]
    timer = measure.clock(device)
    times: dict[str, list[float]] = {}
    try:
        for number in range(rounds):
            begin = time.monotonic()
            measure.interleave(candidates, [1] * len(candidates), same["case"], number, timer, times)
            if 2 * time.monotonic() - begin > end:  # another one would not fit
                break
    except KeyboardInterrupt:  # what was measured is kept
        if not times:
            raise
        print(f"{gpu_stages.CUT_MARK}stopped after {len(times[candidates[0].name])} of {rounds} rounds")
    mine = times[candidates[0].name]
    notes = {False: "no neuron", True: "ATan(2), not the triangle"}
    return [
        rows.Row(
            **same, candidate=entry.name, library=entry.library, status="ok", peak_bytes=peak, compile_s=0.0,
            note=notes[entry.judged] if not entry.judged or entry.against is not None else "",
            **rows.figures(times[entry.name], mine, mine, 0, 0),
        )
        for entry, _, peak in admitted
    ]  # fmt: skip


if __name__ == "__main__":
    main()
