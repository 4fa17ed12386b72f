"""Whole training steps of the paper's networks, on a GPU: what ``make gpu`` measures of them.

    python bench/gpu_steps.py --case resnet19 --dtype bfloat16 --csv FILE
    python bench/gpu_steps.py --case vggsnn --dtype float32 --csv FILE

A step is forward, the TRT loss, backward and Adam; bfloat16 is autocast. Compared are this project on each backend,
SpikingJelly's neurons in each implementation that it offers here, the plain network (neurons over unbind, a penalty
that loops over T and the weights), and the network with ReLU in place of the neurons, the last three in both memory
layouts. SpikingJelly's and the ReLU network have this project's penalty: what differs is the neuron. Each network with
neurons is compared with the plain one in float32 first.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_stages
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from trtkern import reference
from trtkern.bench import measure, memory, peers, rows
from trtkern.bench.layers import Layer, Where, backends
from trtkern.bench.measure import Candidate
from trtkern.bench.table import table
from trtkern.models import load_reference_weights, resnet19, vggsnn
from trtkern.nn import TRTLoss

# The network that the tests compare with: nothing of trtkern is in it.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import plain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
GATE_BATCH, LOSS_ERROR, COSINE = 2, 1e-2, 0.95
"""Samples that the gate looks at; how far the losses may be apart; the least cosine of the gradients of the first
convolution. Rounding moves a spike here and there, and a network of ten layers carries it on."""


class Network(NamedTuple):
    """What a case trains: T, the batch, the shape of an image or frame."""

    timesteps: int
    batch: int
    shape: tuple[int, int, int]

    @property
    def features(self) -> int:
        """What VGGSNN's classifier takes: 512 channels, four times halved."""
        return 512 * (self.shape[1] // 16) * (self.shape[2] // 16)


CASES = {"resnet19": Network(6, 64, (3, 32, 32)), "vggsnn": Network(10, 32, (2, 48, 48))}
REHEARSAL = {"resnet19": Network(2, 2, (3, 8, 8)), "vggsnn": Network(2, 2, (2, 16, 16))}


class Swapped(nn.Module):
    """A function in the place of ``plain.Neurons``."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, ...] -> [T, B, ...]."""
        return self.run(x)


class Entry(NamedTuple):
    """A network of the contest."""

    name: str
    library: str
    model: nn.Module
    loss: TRTLoss | None
    """None: the loss of the plain network, with its loops."""
    against: Layer | None = None
    """The neuron that it computes, where it is not the paper's."""
    judged: bool = True


def inputs(network: Network, case: str, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W], or frames [T, B, C, H, W], and labels; the same in every process."""
    draw = torch.Generator().manual_seed(0)
    shape = (batch, *network.shape) if case == "resnet19" else (network.timesteps, batch, *network.shape)
    return torch.rand(shape, generator=draw).to(device), torch.randint(10, (batch,), generator=draw).to(device)


def plain_network(
    case: str, network: Network, device: torch.device, run: Callable | None = None, *,
    form: torch.memory_format = torch.contiguous_format,
) -> nn.Module:  # fmt: skip
    """The plain network, always of the same weights, with a function in place of its neurons."""
    torch.manual_seed(0)
    made = plain.resnet19() if case == "resnet19" else plain.vggsnn(network.features)
    made.timesteps = network.timesteps
    if run is not None:
        for module in list(made.modules()):
            for name, child in module.named_children():
                if isinstance(child, plain.Neurons):
                    setattr(module, name, Swapped(run))
    return made.to(device, memory_format=form)


def entries(case: str, network: Network, device: torch.device) -> Iterator[Entry | tuple[str, str, str, str]]:
    """The networks; of what cannot be built its name, library, status and why."""
    where = Where(device, torch.float32, network.timesteps, math.prod(network.shape), False)
    for backend in backends("all", "batch_norm_lif", where):
        options: dict[str, Any] = {"shape": network.shape, "backend": backend}
        model = resnet19(timesteps=network.timesteps, **options) if case == "resnet19" else vggsnn(**options)
        load_reference_weights(model, plain_network(case, network, torch.device("cpu")).state_dict())
        model.to(device)
        yield Entry(f"trtkern {backend}", "trtkern", model, TRTLoss(model))
    (peer,) = peers.choose("spikingjelly")
    layers: list[Layer] = []
    if peer.missing:
        yield peer.name, "", "skipped", peer.missing
    else:
        try:
            layers = [layer for layer in peer.layers(where) if " LIFNode m" in layer.name]
        except Exception as error:  # of whatever kind: the others are measured
            yield peer.name, peer.version, "failed", words(error)
    library = f"torch {torch.__version__}"
    for layout, form in LAYOUTS.items():
        made = partial(plain_network, case, network, device, form=form)
        relu = made(functional.relu)
        yield Entry(f"BatchNorm + ReLU, {layout}", library, relu, TRTLoss(relu), judged=False)
        for layer in layers:
            theirs = made(layer.run)
            yield Entry(f"{layer.name}, {layout}", f"{peer.name} {peer.version}", theirs, TRTLoss(theirs), layer)
        yield Entry(f"plain torch, {layout}", library, made(), None)


def words(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def whole_loss(entry: Entry, x: Tensor, y: Tensor) -> Tensor:
    """The loss with its penalty, and its gradients into ``.grad``."""
    logits = entry.model(x)
    if entry.loss is None:
        total = plain.trt_loss(entry.model, logits.float(), y)
        total.backward()
        return total.detach()
    data = entry.loss.parts(logits, y, regularize=False).total
    data.backward()
    return data.detach() + entry.loss.add_grad_()


def step(entry: Entry, x: Tensor, y: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """One training step, in which nothing waits for a GPU."""
    optimizer = torch.optim.Adam(entry.model.parameters(), lr=1e-4)

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
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def differs(entry: Entry, case: str, network: Network, device: torch.device) -> str:
    """Why an entry is WRONG: loss or gradient are not those of the plain network with its neuron; empty if they are."""
    run = None
    if entry.against is not None:
        neuron = entry.against.neuron
        run = lambda x: reference.lif(x, None, neuron.numbers, neuron.spec).s  # noqa: E731
    twin = Entry("", "", plain_network(case, network, device, run), None)
    x, y = inputs(network, case, GATE_BATCH, device)
    state = {name: tensor.clone() for name, tensor in entry.model.state_dict().items()}
    with exactly():
        found, wanted = whole_loss(entry, x, y).item(), whole_loss(twin, x, y).item()
    entry.model.load_state_dict(state)
    grads = [next(each.model.parameters()).grad for each in (entry, twin)]
    cosine = functional.cosine_similarity(*(grad.flatten() for grad in grads if grad is not None), dim=0).item()
    error = abs(found / wanted - 1)
    said = f"loss off by {error:.1e}, cosine of the first gradients {cosine:.4f}"
    print(f"{entry.name}: {said}", flush=True)
    return "" if error < LOSS_ERROR and cosine > COSINE else said


def main() -> None:
    """Measure one case and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--csv", type=Path, required=True, help="rows are added to it")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of everything (default: 60)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny images")
    options = parser.parse_args()
    begin = time.monotonic()
    device = torch.device("cpu" if options.rehearse else "cuda")
    network = (REHEARSAL if options.rehearse else CASES)[options.case]
    size = "x".join(map(str, (network.timesteps, network.batch, *network.shape)))
    same: dict[str, Any] = {
        "date": measure.today(), "commit": measure.commit(), "machine": rows.machine(device),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "threads": torch.get_num_threads(), "malloc": "default", "suite": "step", "op": "step",
        "case": f"{options.case} step {size} {options.dtype}", "shape": size.replace("x", ","), "dtype": options.dtype,
        "direction": "both", "command": f"python {os.path.relpath(sys.argv[0])} {' '.join(sys.argv[1:])}",
    }  # fmt: skip
    made = contest(options.case, network, device, (begin, options.budget), same)
    rows.append(made, options.csv)
    Console(width=160).print(table(made))
    late = sum(row.note.startswith("over the budget") for row in made)
    if late:
        print(f"{gpu_stages.CUT_MARK}{late} networks were left out; give GPU_MINUTES more")
    ours = [row for row in made if row.library == "trtkern" and row.status == "ok"]
    print(f"{same['case']}: " + ", ".join(f"{row.candidate} {row.p50_ms:.1f} ms" for row in ours))
    if not ours or any(row.library == "trtkern" and row.status in ("WRONG", "failed") for row in made):
        sys.exit(1)


def contest(
    case: str, network: Network, device: torch.device, time_: tuple[float, float], same: dict[str, Any]
) -> list[rows.Row]:
    """Judge, warm up and measure the peak for half of the time, interleaved rounds for the rest; the rows.

    Args:
        time_: when it began (``time.monotonic``), and how many seconds it has.
    """
    begin, seconds = time_
    admitted: list[tuple[Entry, Candidate, int]] = []
    left_out: list[rows.Row] = []
    x, y = inputs(network, case, network.batch, device)
    for entry in entries(case, network, device):
        if not isinstance(entry, Entry):
            name, library, status, note = entry
            left_out.append(rows.Row(**same, candidate=name, library=library, status=status, note=note))
            continue
        leave = partial(rows.Row, **same, candidate=entry.name, library=entry.library)
        if time.monotonic() > begin + 0.5 * seconds and admitted:
            left_out.append(leave(status="skipped", note="over the budget"))
            continue
        try:
            if entry.judged and (why := differs(entry, case, network, device)):
                left_out.append(leave(status="WRONG", note=why))
                continue
            candidate = Candidate(entry.name, step(entry, x, y, DTYPES[same["dtype"]]), 0)
            measure.warm_up(candidate, calls=3, seconds=seconds / 60)
            admitted.append((entry, candidate, memory.peak(candidate, device)))
        except Exception as error:  # of whatever kind, out of memory too: the others are measured
            left_out.append(leave(status="failed", note=words(error)))
    candidates = [candidate for _, candidate, _ in admitted]
    if not candidates:
        return left_out
    timer = measure.on_gpu if device.type == "cuda" else measure.on_cpu
    round_ = sum(timer(candidate.run) for candidate in candidates)
    rounds = max(1, min(25, int((begin + seconds - time.monotonic()) / round_)))
    times: dict[str, list[float]] = {}
    try:
        measure.interleave(candidates, [rounds] * len(candidates), same["case"], timer=timer, times=times)
    except KeyboardInterrupt:  # what was measured is kept
        if not times:
            raise
        print(f"{gpu_stages.CUT_MARK}stopped after {len(times[candidates[0].name])} of {rounds} rounds")
    mine = times[candidates[0].name]
    note = {True: "ATan(2), not the triangle"}
    return [
        rows.Row(
            **same, candidate=entry.name, library=entry.library, status="ok",
            note="no neuron" if not entry.judged else note.get(entry.against is not None, ""), peak_bytes=peak,
            compile_s=0.0, **rows.figures(times[entry.name], mine, mine, 0, 0),
        )
        for entry, _, peak in admitted
    ] + left_out  # fmt: skip


if __name__ == "__main__":
    main()
