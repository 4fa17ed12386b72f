"""The predicted peak of a training step beside the measured one: VGGSNN, T = 4, 8 frames of 2x48x48, within budgets.

    python bench/budget.py            two minutes; rows go to bench/budget.csv

Each row is a ``Trainer`` of its own that takes two steps, every allocation of which torch reports: what is measured is
the most that there was at once, from the first weight to the last update. The weights afterwards are compared with
those of the trainer without a budget. Then further steps are timed without the profiler, in turns: the median of their
seconds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trtkern.bench import rows  # noqa: E402
from trtkern.bench.measure import append  # noqa: E402
from trtkern.malloc import keep_pages  # noqa: E402
from trtkern.models import vggsnn  # noqa: E402
from trtkern.profiling.memory.peak import peak  # noqa: E402
from trtkern.train import Trainer  # noqa: E402
from trtkern.training import budget  # noqa: E402
from trtkern.training.step import Step  # noqa: E402
from trtkern.training.tally import Tally  # noqa: E402

CSV = ROOT / "bench" / "budget.csv"
BATCH, STEPS, ROUNDS = 8, 2, 9
BUDGETS = (None, "265MiB", "250MiB", "235MiB")
CPU = torch.device("cpu")


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Random frames and labels for ``STEPS`` steps, and a batch to test on."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand((STEPS + 1) * BATCH, 4, 2, 48, 48, generator=generator).round()
    labels = torch.randint(10, (len(frames),), generator=generator)
    return (frames[BATCH:], labels[BATCH:]), (frames[:BATCH], labels[:BATCH])


def network() -> nn.Module:
    """VGGSNN, under the seed of the run."""
    return vggsnn(10)


def trained(limit: str | None) -> tuple[Trainer, Callable[[], float]]:
    """A trainer, and what takes its next step: the seconds of it."""
    trainer = Trainer(
        network, data(), memory=limit, epochs=1, batch_size=BATCH, select="last", classes=10, device="cpu",
        threads=torch.get_num_threads(),
    )  # fmt: skip
    step = Step(trainer.logits, trainer.loss, trainer.optimizer, trainer.scaler, None, lambda parts: None)
    tally, batches = Tally("cpu"), itertools.cycle(range(STEPS))
    trainer.model.train()

    def take() -> float:
        place = next(batches)
        frames, labels = next(itertools.islice(trainer.loader.whole(BATCH), place, None))
        begin = time.perf_counter()
        step(frames, labels, tally)
        return time.perf_counter() - begin

    return trainer, take


def measured(limit: str | None, like: list[Tensor] | None) -> tuple[dict[str, Any], list[Tensor]]:
    """A row without its seconds, and the weights."""
    made: list[Trainer] = []

    def steps() -> None:
        trainer, take = trained(limit)
        made.append(trainer)
        for _ in range(STEPS):
            take()

    highest = peak(steps, CPU)
    (trainer,) = made
    weights = [weight.detach().clone() for weight in trainer.model.parameters()]
    plan = trainer.plan
    if plan is None:
        plan = budget.planned(trainer, trainer.settings, trainer.loader, budget.Share(1, BATCH))
    pairs = zip(weights, weights if like is None else like, strict=True)
    return {
        "budget": limit or "none", "ways": " ".join(plan.ways.values()), "predicted_peak": plan.peak,
        "measured_peak": highest, "ratio": round(plan.peak / highest, 4), "predicted_longer": round(plan.cost, 4),
        "difference": torch.stack([(a - b).abs().max() for a, b in pairs]).max().item(),  # NaN where one is
    }, weights  # fmt: skip


def main() -> None:
    """The rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=CSV)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    keep_pages()  # as ``trtkern train`` does
    found, like = [], None
    for limit in BUDGETS:
        row, weights = measured(limit, like)
        found.append(row)
        like = weights if like is None else like
    takes = {limit: trained(limit)[1] for limit in BUDGETS}
    times: dict[str | None, list[float]] = {limit: [] for limit in BUDGETS}
    for _ in range(ROUNDS):
        for limit, take in takes.items():
            times[limit].append(take())
    told = {"case": "vggsnn-4", "batch": BATCH}
    command = f"python bench/budget.py --threads {options.threads}"
    made = [
        {**rows.origin(CPU), **told, **row, "step_seconds": round(statistics.median(taken), 3), "command": command}
        for row, taken in zip(found, times.values(), strict=True)
    ]
    append(made, options.csv)
    for row in made:
        print({name: row[name] for name in ("budget", "predicted_peak", "measured_peak", "ratio", "step_seconds")})


if __name__ == "__main__":
    main()
