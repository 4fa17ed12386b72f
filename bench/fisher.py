"""Fisher information of every timestep against what it would cost by T forward and backward passes.

    python bench/fisher.py                    every case; rows go to bench/fisher.csv
    python bench/fisher.py --case digits      the network of the digits

``trtkern.analysis.fisher`` finds, from the same samples, I_t of every sample and of the batch mean. Against it stand
T forward and T backward passes of the whole batch, each with the gradients of all weights: what the reference does for
the batch mean alone. Both run in the same rounds; "ratio" is the median over the rounds, with its 90 % interval. Times
are processor time of all threads, which other work on the machine changes less than the time on the clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtkern.analysis import fisher
from trtkern.bench import rows
from trtkern.bench.measure import ROOT, Candidate, append, interleave, median_ratio, on_processor, warm_up
from trtkern.malloc import keep_pages
from trtkern.models import vggsnn
from trtkern.models.build import build

Batches = list[tuple[Tensor, Tensor]]


class Case(NamedTuple):
    """A network, and how many batches of what it sees."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    batches: int
    axis: int = 0
    """That the samples are on."""


CASES = {
    "digits-10": Case(partial(build, "conv", (1, 8, 8), 10, layers=[16, 32, "pool"], timesteps=10), (64, 1, 8, 8), 4),
    "resnet19-6": Case(partial(build, "resnet19", (3, 32, 32), 10, timesteps=6), (4, 3, 32, 32), 1),
    "vggsnn-10": Case(vggsnn, (10, 4, 2, 48, 48), 1, 1),
}


def reference(model: nn.Module, data: Batches) -> Tensor:
    """[T] squared norms of the gradient of a batch's mean loss, averaged, as the paper's code finds them."""
    model.eval()
    found = []
    for inputs, labels in data:
        t, steps = 1, 1
        while t <= steps:
            model.zero_grad()
            logits = model(inputs)
            functional.cross_entropy(logits[:t].mean(0), labels).backward()
            found.append(sum((p.grad.double().square().sum() for p in model.parameters()), torch.zeros(())))
            t, steps = t + 1, len(logits)
    return torch.stack(found).view(len(data), -1).mean(0)


def candidates(name: str, backend: str) -> list[Candidate]:
    """``fisher`` and the reference, which must agree."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.make(backend=backend)
    data = [
        (torch.rand(case.shape), torch.randint(10, case.shape[case.axis : case.axis + 1])) for _ in range(case.batches)
    ]
    model.train()
    with torch.no_grad():
        model(data[0][0])  # running statistics with which neurons fire
    mine = partial(fisher, model, data, batch_dim=case.axis, confidence=None)
    found, wanted = mine(), reference(model, data)
    error = float((found.batch_mean.information / wanted - 1).abs().max())
    if not (found.method == "hooks" and error < 1e-3):
        sys.exit(f"{name}: WRONG and not timed: {found.method}, batch means differ by {error:.1e} {found.reason}")
    print(f"{name}: batch means agree to {error:.1e}")
    return [
        Candidate("T forward and backward passes", partial(reference, model, data), 0),
        Candidate("trtkern.analysis.fisher", mine, 0),
    ]


def measured(case: str, backend: str, rounds: int, malloc: str) -> list[dict[str, Any]]:
    """A row for each candidate."""
    both = candidates(case, backend)
    for candidate in both:
        warm_up(candidate, 5)
    times = interleave(both, [rounds] * 2, case, timer=on_processor)
    made = []
    for candidate in both:
        mine = times[candidate.name]
        middle, low, high = median_ratio(mine, times[both[0].name])
        made.append(
            {
                **rows.origin(torch.device("cpu")), "malloc": malloc, "case": case, "backend": backend,
                "candidate": candidate.name, "rounds": rounds, "p50_cpu_ms": 1e3 * statistics.median(mine),
                "ratio": middle, "ratio_low": low, "ratio_high": high,
                "command": " ".join(["python", "bench/fisher.py", *sys.argv[1:]]),
            }
        )  # fmt: skip
    return made


def main() -> None:
    """Run the cases that the command line asks for, show their rows and append them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases whose name starts with this")
    parser.add_argument("--backend", default="cpu", help="the backend to measure (default: cpu)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default: 9)")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "fisher.csv", help="CSV to append to")
    options = parser.parse_args()
    chosen = [case for case in CASES if case.startswith(options.case)]
    if not chosen or options.rounds < 3:
        parser.error(f"expected a case of {', '.join(CASES)} and at least 3 rounds")
    if options.threads:
        torch.set_num_threads(options.threads)
    malloc = "keeps pages" if keep_pages() else "glibc default"
    for case in chosen:
        made = measured(case, options.backend, options.rounds, malloc)
        for row in made:
            print(
                f"{case:12} {row['candidate']:32} {row['p50_cpu_ms']:9.1f} ms  ratio {row['ratio']:.2f} "
                f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
            )
        append(made, options.output)


if __name__ == "__main__":
    main()
