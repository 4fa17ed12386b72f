"""The claims of the TRT paper (arXiv 2506.19256), tested: a smaller gap between training and test, gradients that
vanish more slowly over time, Fisher information that sits earlier, flatter minima, accuracy.

    python bench/claims.py                 trains what is missing in runs/claims and measures what was not measured
    python bench/claims.py --data digits   one data set of the two: minutes instead of hours
    python bench/claims.py --page          writes the page anew from bench/claims.csv

It makes bench/claims.csv, docs/results.md and its pictures. It may be stopped at any moment, and goes on when it is
started again: a run that is done is not trained twice, and one that was cut off is resumed. T = 10 and delta = 0.5,
where the penalty of TRT differs from plain L2.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claims_page

from trtkern.bench.measure import append, commit, machine, today
from trtkern.output.files import write

SEEDS = (0, 1, 2, 3, 4)
SWEEP = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Strengths of the penalty (lam) that the validation images choose from, for L2 and for TRT each."""
SWEEP_SEEDS = (0, 1)
COMMON = ("--timesteps", "10", "--batch-size", "64", "--threads", "1", "--select", "validation")
DATA = {
    "digits": ("--epochs", "40", "--keep-every", "8", "--set", "train_images=500"),
    "fashion-mnist": (
        "--epochs", "15", "--keep-every", "3", "--set", "train_images=2000", "--set", "validation=0.01",
        "--set", 'model.layers=[8,"pool",16,"pool"]',
    ),
}  # fmt: skip
VALIDATION = {"digits": 144, "fashion-mnist": 600}
"""Images that are held out."""
PAPER = 5e-5
"""lam of the paper where T = 10."""
FEW, BATCH = 200, 50
"""Training images that everything but the accuracies is measured on, and how many at a time."""


@dataclass(frozen=True)
class Arm:
    """A way to train: a control of the recipe, and the strength of its penalty where it has one."""

    control: str
    lam: float | None = None

    def arguments(self, data: str) -> tuple[str, ...]:
        """Of ``trtkern train``, less the seed."""
        recipe = f"{data}+{self.control}" if self.control else data
        penalty: tuple[str, ...] = ()
        if self.lam is not None:
            penalty = ("--lam", f"{self.lam:g}", *(() if self.control == "l2" else ("--delta", "0.5")))
        return ("--recipe", recipe, *DATA[data], *COMMON, *penalty)

    @property
    def folder(self) -> str:
        """The name of its runs."""
        return (self.control or "trt") + ("" if self.lam is None else f"-{self.lam:g}")


FIXED = {
    "SDT": Arm("sdt"), "TET": Arm("tet"), "TET + one-hot MSE": Arm("tet-mse"), "L2, lam of the paper": Arm("l2", PAPER),
    "TRT, lam of the paper": Arm("", PAPER),
}  # fmt: skip
SWEPT = {"L2, lam by validation": "l2", "TRT, lam by validation": ""}


def train(data: str, arm: Arm, seed: int, runs: Path) -> Path:
    """The folder of that run, trained where it is not done."""
    place = runs / data / arm.folder / f"seed{seed}"
    if (place / "result.json").exists() and (place / "report.html").exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    if (place / "plan.json").exists():
        arguments = ["--resume", str(place)]
    else:
        arguments = [*arm.arguments(data), "--seed", str(seed), "--run-dir", str(place)]
    log = place.with_suffix(".log")
    with open(log, "a") as file:
        code = subprocess.run([sys.executable, "-m", "trtkern.cli", "train", *arguments], stdout=file, stderr=file)
    if code.returncode:
        raise RuntimeError(f"claims: expected a training that ends, got status {code.returncode}; see {log}")
    print(f"trained {place.relative_to(runs)}", flush=True)
    return place


def validation(folder: Path) -> float:
    """Accuracy of the chosen weights of a run on the held-out images."""
    return json.loads((folder / "result.json").read_text())["validation"]["accuracy"]


def chosen(data: str, control: str, runs: Path) -> float:
    """The strongest penalty whose accuracy on the held-out images, over the seeds of the sweep, is within one standard
    error of the best (Breiman et al. 1984): it costs nothing that these images can show, and is where a penalty does
    most."""

    def reached(lam: float) -> float:
        folder = runs / data / Arm(control, lam).folder
        return statistics.fmean(validation(folder / f"seed{seed}") for seed in SWEEP_SEEDS)

    accuracies = {lam: reached(lam) for lam in SWEEP}
    best = max(accuracies.values())
    error = math.sqrt(best * (1 - best) / (VALIDATION[data] * len(SWEEP_SEEDS)))
    return max(lam for lam, accuracy in accuracies.items() if accuracy >= best - error)


def sweep(data: str) -> list[tuple[str, Arm, int]]:
    """The runs from which the strengths are chosen."""
    return [(data, Arm(control, lam), seed) for control in SWEPT.values() for lam in SWEEP for seed in SWEEP_SEEDS]


def arms(data: str, runs: Path) -> dict[str, Arm]:
    """What is compared; the sweep is done."""
    return FIXED | {name: Arm(control, chosen(data, control, runs)) for name, control in SWEPT.items()}


def measure(place: Path) -> dict[str, Any]:
    """What the claims are about, of the weights that a run chose; kept in its folder."""
    kept = place / "claims.json"
    if kept.exists():
        return json.loads(kept.read_text())
    from trtkern import analysis
    from trtkern.commands.analyze._opened import drawn, epochs_of, opened

    run = opened(str(place), split="train", samples=FEW, batch_size=BATCH, threads=1)
    model, few = run.trainer.model, run.samples
    reached = {split: _reached(model, drawn(run.trainer, split, None, 250)) for split in ("train", "test")}
    curved = analysis.curvature(
        model, few, eigenvalues=1, method="differences", starts=1, iterations=15, tolerance=1e-2, trace_vectors=8,
        balls={"filters": 0.05},
    )  # fmt: skip
    found: dict[str, Any] = {
        "train": reached["train"][0], "test": reached["test"][0], "gap": reached["train"][0] - reached["test"][0],
        "loss_gap": reached["test"][1] - reached["train"][1],
        "vanishing": analysis.gradients(model, few).vanishing, "centroid": analysis.fisher(model, few).centroid,
        "eigenvalue": float(curved.eigenvalues[0]), "trace": curved.trace,
        "sharpness": curved.sharpness["filters"].increase,
    }  # fmt: skip
    found["centroids"] = []
    for path in epochs_of(str(place)):
        then = opened(str(path), split="train", samples=FEW, batch_size=BATCH, threads=1)
        epoch = int(then.about["weights"].split()[1])
        found["centroids"].append((epoch, analysis.fisher(then.trainer.model, then.samples).centroid))
    write(kept, json.dumps(found).encode())  # whole or not at all: it may be stopped at any moment
    return found


def _reached(model: Any, samples: Any) -> tuple[float, float]:
    """Accuracy and cross entropy of the mean output, in evaluation mode."""
    import torch

    model.eval()
    right, loss = 0, 0.0
    with torch.no_grad():
        for inputs, labels in samples:
            out = model(inputs).mean(0)
            right += int((out.argmax(1) == labels).sum())
            loss += float(torch.nn.functional.cross_entropy(out, labels, reduction="sum"))
    return right / len(samples), loss / len(samples)


def row(data: str, name: str, arm: Arm, seed: int, runs: Path) -> dict[str, Any]:
    """What is written of a run that is trained, measured now if it was not."""
    place = train(data, arm, seed, runs)
    command = [sys.executable, __file__, "--measure", str(place)]
    code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if code.returncode:
        raise RuntimeError(f"claims: expected measures of {place}, got status {code.returncode}")
    found = measure(place)
    print(f"{data}, {name}, seed {seed}: test {found['test']:.2%}, centroid {found['centroid']:.3f}", flush=True)
    numbers = {key: f"{value:.6g}" for key, value in found.items() if key != "centroids"}
    centroids = json.dumps([(epoch, round(value, 4)) for epoch, value in found["centroids"]])
    return {
        "date": today(), "commit": commit(), "machine": machine(), "data": data, "arm": name,
        "lam": "" if arm.lam is None else f"{arm.lam:g}", "seed": seed, **numbers, "centroids": centroids,
        "command": shlex.join(["trtkern", "train", *arm.arguments(data), "--seed", str(seed)]),
    }  # fmt: skip


def known(made: dict[str, Any], before: list[dict[str, str]]) -> bool:
    """Whether bench/claims.csv has that row already, whenever it was made."""
    changing = ("date", "commit", "machine")
    return any(all(old[key] == str(value) for key, value in made.items() if key not in changing) for old in before)


def everything(data: Iterable[str], runs: Path, jobs: int) -> None:
    """Train and measure all runs, ``jobs`` at a time, and write the rows that are new."""
    with ThreadPoolExecutor(jobs) as pool:
        for name in data:
            list(pool.map(lambda run: train(*run, runs), sweep(name)))
            wanted = [(name, title, arm, seed) for title, arm in arms(name, runs).items() for seed in SEEDS]
            made = list(pool.map(lambda run: row(*run, runs), wanted))
            before = list(csv.DictReader(claims_page.ROWS.open(newline=""))) if claims_page.ROWS.exists() else []
            if fresh := [found for found in made if not known(found, before)]:
                append(fresh, claims_page.ROWS)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, action="append", help="may be given again; both by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="where the run folders are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--page", action="store_true", help="write the page anew from bench/claims.csv alone")
    parser.add_argument("--measure", type=Path, metavar="RUN", help="measure one run, and write nothing else")
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure)
        return
    if not options.page:
        everything(options.data or DATA, options.runs, options.jobs)
    claims_page.write()


if __name__ == "__main__":
    main()
