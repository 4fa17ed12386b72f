"""Whole training steps: a spiking network against what it should cost, and against what it costs elsewhere.

    python bench/step.py                      every case; rows go to bench/results.csv
    python bench/step.py --case vggsnn-4      VGGSNN against the same network with BatchNorm + ReLU
    python bench/step.py --case resnet19-4    ResNet-19 with the TRT loss against the same in plain torch

A step is forward, loss, backward and Adam. Both networks of a case have the same convolutions, BatchNorms, pooling,
readout and loss and see the same images in the same rounds. VGGSNN and its ReLU network run in channels_last; plain
torch runs its neurons over unbind and the penalty in a loop over T and the weights, in either layout. "x limit" is the
ratio to the ReLU network, or to plain torch in channels_last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtkern.bench import rows
from trtkern.bench.measure import ROOT, Candidate, append, interleave, warm_up
from trtkern.malloc import keep_pages
from trtkern.models import load_reference_weights, resnet19, vggsnn
from trtkern.models.conv import VGGSNN
from trtkern.nn import TRTLoss

# The network that the tests compare with: nothing of trtkern is in it.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import plain

CASES = {"vggsnn-4": (4, 8), "resnet19-4": (4, 8)}
"""T and the batch, of 2x48x48 frames or 3x32x32 images."""


class ReLUNet(nn.Module):
    """The layers of ``ConvSNN`` with BatchNorm + ReLU in place of the neurons."""

    def __init__(self, shape: tuple[int, int, int], layers: Sequence[int | str], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        modules: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, str):
                modules.append(nn.AvgPool2d(2))
                height, width = height // 2, width // 2
            else:
                conv = nn.Conv2d(channels, layer, 3, padding=1, bias=False)
                modules += [conv, nn.BatchNorm2d(layer), nn.ReLU(inplace=True)]
                channels = layer
        self.layers = nn.Sequential(*modules)
        self.classifier = nn.Linear(channels * height * width, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, C, H, W] -> [T, B, classes]."""
        images = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.classifier(self.layers(images).flatten(1)).unflatten(0, x.shape[:2])


def step(model: nn.Module, frames: Tensor, target: Tensor) -> Callable[[], float]:
    """One training step, mean cross-entropy over every timestep; returns the loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(frames)
        loss = functional.cross_entropy(logits.flatten(0, 1), target.repeat(len(frames)))
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def agrees(case: str, model: nn.Module, reference: nn.Module, frames: Tensor) -> bool:
    """Whether the fused network computes what the readable one does, of one frame of the batch: logits within the few
    spikes that rounding may move, and the gradient of the first convolution in the same direction."""
    reference.load_state_dict(model.state_dict())
    found = []
    for net in (model, reference):
        net.zero_grad()
        logits = net(frames)
        logits.square().mean().backward()
        found.append((logits.detach(), next(net.parameters()).grad.flatten()))
    (mine, grad), (want, expected) = found
    error = ((mine - want).norm() / want.norm()).item()
    cosine = functional.cosine_similarity(grad, expected, dim=0).item()
    if error < 0.02 and cosine > 0.99:
        return True
    print(f"{case}: WRONG and not timed: logits differ by {error:.1e}, gradients point apart (cosine {cosine:.3f})")
    return False


def build(case: str, backend: str) -> tuple[list[Candidate], Candidate]:
    """The candidates, and the ReLU network as what they are measured against."""
    timesteps, batch = CASES[case]
    frames = torch.rand(timesteps, batch, 2, 48, 48)
    target = torch.randint(10, (batch,))
    relu = Candidate("BatchNorm + ReLU", step(ReLUNet((2, 48, 48), VGGSNN, 10), frames, target), 0)
    candidates = []
    model = vggsnn(backend=backend)
    if agrees(case, model, vggsnn(backend="reference"), frames[:, :1]):
        candidates.append(Candidate(f"trtkern {backend}", step(model, frames, target), 0))
        checkpointed = vggsnn(backend=backend, checkpoint=True)
        candidates.append(Candidate(f"trtkern {backend}, checkpoint", step(checkpointed, frames, target), 0))
    return candidates, relu


def trt_step(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], float]:
    """One training step with that loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = loss(model(x), y)
        total.backward()
        optimizer.step()
        return total.item()

    return run


def build_resnet(case: str, backend: str) -> tuple[list[Candidate], Candidate]:
    """ResNet-19 and its plain twins, of the same weights."""
    timesteps, batch = CASES[case]
    images, target = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    twin, last = plain.resnet19(), plain.resnet19()
    twin.timesteps = last.timesteps = timesteps
    last.load_state_dict(twin.state_dict())
    last.to(memory_format=torch.channels_last)
    model = resnet19(timesteps=timesteps, backend=backend)
    load_reference_weights(model, twin.state_dict())
    loss, few = TRTLoss(model), images[:2]
    found = [f(net(few), target[:2]) for net, f in ((model, loss), (twin, partial(plain.trt_loss, twin)))]
    error = abs(found[0].item() / found[1].item() - 1)
    plainly = Candidate("plain torch, channels_last", trt_step(last, partial(plain.trt_loss, last), images, target), 0)
    candidates = [Candidate("plain torch", trt_step(twin, partial(plain.trt_loss, twin), images, target), 0)]
    if error < 1e-2:
        candidates.append(Candidate(f"trtkern {backend}", trt_step(model, loss, images, target), 0))
    else:
        print(f"{case}: WRONG and not timed: losses differ by {error:.1e}")
    return candidates, plainly


BUILDERS = {"vggsnn-4": build, "resnet19-4": build_resnet}


def measured(
    case: str, candidates: Sequence[Candidate], baseline: Candidate, rounds: int, malloc: str
) -> list[dict[str, Any]]:
    """A row of bench/results.csv for each; each ratio is taken to the baseline of its own round."""
    everything = [baseline, *candidates]
    for candidate in everything:
        warm_up(candidate)
    times = interleave(everything, [rounds] * len(everything), case)
    command = " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    made = []
    for candidate in everything:
        base = times[baseline.name]
        found = rows.figures(times[candidate.name], base, base, 0, 0)
        ratio = {"times_limit" + end: found.pop("times_ours" + end) for end in ("", "_low", "_high")}
        made.append(
            {
                **rows.origin(torch.device("cpu")), "malloc": malloc, "case": case, "candidate": candidate.name,
                "baseline": baseline.name, **found, "gb_per_s": 0.0, **ratio, "compile_s": 0.0, "command": command,
            }
        )  # fmt: skip
    return made


def show(made: Sequence[dict[str, Any]]) -> None:
    """The rows as a table on the terminal."""
    first = made[0]
    print(f"\n{first['case']}  ({first['machine']}, {first['threads']} threads, malloc: {first['malloc']})")
    print(f"{'candidate':34} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'x limit':>8}  90 % interval")
    for row in sorted(made, key=lambda row: row["p50_ms"]):
        times = " ".join(f"{row[name]:9.3f}" for name in ("p20_ms", "p50_ms", "p80_ms"))
        ratio = f"{row['times_limit']:8.2f}  {row['times_limit_low']:.2f} to {row['times_limit_high']:.2f}"
        print(f"{row['candidate']:34} {times} {ratio}")


def main() -> None:
    """Run the cases that the command line asks for, show their rows and append them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases whose name starts with this")
    parser.add_argument("--backend", default="cpu", help="the backend to measure (default: cpu)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default: 15)")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep", help="keep pages, or glibc's defaults")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results.csv", help="CSV to append rows to")
    options = parser.parse_args()
    chosen = [case for case in BUILDERS if case.startswith(options.case)]
    if not chosen or options.rounds < 3:
        parser.error(f"expected a case of {', '.join(BUILDERS)} and at least 3 rounds")
    if options.threads:
        torch.set_num_threads(options.threads)
    malloc = "glibc default"
    if options.malloc == "keep":
        malloc = "keeps pages" if keep_pages() else "keeps pages was asked for, and the C library refused"
    torch.manual_seed(0)
    for case in chosen:
        made = measured(case, *BUILDERS[case](case, options.backend), options.rounds, malloc)
        show(made)
        append(made, options.output)


if __name__ == "__main__":
    main()
