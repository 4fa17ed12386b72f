"""The claims of the TRT paper (arXiv 2506.19256), tested: a smaller gap between training and test, gradients that
vanish more slowly over time, Fisher information that sits earlier, flatter minima, accuracy.

    python bench/claims.py                 trains what is missing in runs/claims and measures what was not measured
    python bench/claims.py --data digits   one data set of the two: minutes instead of hours

Every run is killed and started again at will. T = 10 and delta = 0.5, where the penalty of TRT differs from plain L2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SEEDS = (0, 1, 2, 3, 4)
SWEEP = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Strengths of the penalty (lam) that the validation images choose from, for L2 and for TRT each."""
SWEEP_SEEDS = (0, 1)
COMMON = ("--timesteps", "10", "--batch-size", "64", "--threads", "1", "--select", "validation")
DATA = {
    "digits": ("--epochs", "40", "--keep-every", "8", "--set", "train_images=500"),
    "fashion-mnist": (
        "--epochs", "15", "--keep-every", "3", "--set", "train_images=2000", "--set", "validation=0.01",
        "--set", 'model.layers=[16,"pool",32,"pool"]',
    ),
}  # fmt: skip
PAPER = 5e-5
"""lam of the paper where T = 10."""


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


def validation(folder: Path) -> tuple[float, float]:
    """Accuracy and cross entropy of the chosen weights of a run on the held-out images."""
    found = json.loads((folder / "result.json").read_text())["validation"]
    return found["accuracy"], found["cross_entropy"]


def chosen(data: str, control: str, runs: Path) -> float:
    """The strength with the highest accuracy on the held-out images, over the seeds of the sweep; ties go to the lower
    cross entropy."""

    def reached(lam: float) -> tuple[float, float]:
        found = [validation(runs / data / Arm(control, lam).folder / f"seed{seed}") for seed in SWEEP_SEEDS]
        return sum(accuracy for accuracy, _ in found), -sum(loss for _, loss in found)

    return max(SWEEP, key=reached)


def sweep(data: str) -> list[tuple[str, Arm, int]]:
    """The runs from which the strengths are chosen."""
    return [(data, Arm(control, lam), seed) for control in SWEPT.values() for lam in SWEEP for seed in SWEEP_SEEDS]


def arms(data: str, runs: Path) -> dict[str, Arm]:
    """What is compared; the sweep is done."""
    return FIXED | {name: Arm(control, chosen(data, control, runs)) for name, control in SWEPT.items()}


def everything(data: Iterable[str], runs: Path, each: Callable[..., object], jobs: int) -> None:
    """Train all runs, ``jobs`` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        for name in data:
            list(pool.map(lambda run: each(*run, runs), sweep(name)))
            named = arms(name, runs)
            list(
                pool.map(lambda run: each(*run, runs), [(name, arm, seed) for arm in named.values() for seed in SEEDS])
            )


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, action="append", help="may be given again; both by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="where the run folders are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    options = parser.parse_args()
    everything(options.data or DATA, options.runs, train, options.jobs)


if __name__ == "__main__":
    main()
