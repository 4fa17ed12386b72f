"""What the parts of the TRT loss bring: SDT, TET, TET + one-hot MSE, L2 and TRT on Fashion-MNIST, several seeds each.

    python bench/controls.py                trains what is missing in runs/controls (25 runs), then writes
                                            bench/controls.csv, docs/controls.md and docs/controls.png
    python bench/controls.py --page         writes the page and the picture anew from bench/controls.csv

10,000 training images (stratified, the same for all), all test images, a small network, T = 4, no choice of an epoch.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trtkern.bench.measure import ROOT, append, commit, machine, today

CONTROLS = {
    "SDT": "fashion-mnist+sdt",
    "TET": "fashion-mnist+tet",
    "TET + one-hot MSE (lam = 0)": "fashion-mnist+tet-mse",
    "L2 (delta = 0)": "fashion-mnist+l2",
    "TRT": "fashion-mnist",
}
OPTIONS = (
    "--set", "train_images=10000", "--set", 'model.layers=[16,"pool",32,"pool"]', "--epochs", "20", "--select", "last",
    "--threads", "1", "--seeds", "0,1,2,3,4",
)  # fmt: skip
COLUMNS = ("train", "test", "gap")
ROWS, PAGE, PICTURE = ROOT / "bench" / "controls.csv", ROOT / "docs" / "controls.md", ROOT / "docs" / "controls.png"

Runs = dict[str, dict[int, dict[str, float]]]
"""{loss: {seed: {column: value in percent}}}"""


def train(name: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of a control, whose runs are trained where they are not done."""
    recipe = CONTROLS[name]
    place = folder / recipe.replace("+", "-")
    arguments = ["train", "--recipe", recipe, *OPTIONS, "--run-dir", str(place)]
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_suffix(".log"), "w") as log:
        code = subprocess.run([sys.executable, "-m", "trtkern.cli", *arguments], stdout=log, stderr=log).returncode
    if code:
        raise RuntimeError(f"{name}: training ended with status {code}; see {place.with_suffix('.log')}")
    summary = json.loads((place / "seeds.json").read_text())
    print(f"{name}: " + ", ".join(f"{column} {100 * summary['mean'][column]:.2f} %" for column in COLUMNS), flush=True)
    same = {"date": today(), "commit": commit(), "machine": machine(), "loss": name}
    command = shlex.join(["trtkern", *arguments[:-2]])
    return [
        {**same, "seed": seed, **{column: round(row[column], 6) for column in COLUMNS}, "command": command}
        for seed, row in summary["seeds"].items()
        if not known(name, int(seed), row)
    ]


def known(name: str, seed: int, row: dict[str, float]) -> bool:
    """Whether bench/controls.csv ends with that run as it is."""
    before = read().get(name, {}).get(seed) if ROWS.exists() else None
    return before is not None and all(abs(before[column] - 100 * row[column]) < 1e-3 for column in COLUMNS)


def read() -> Runs:
    """bench/controls.csv; of a run that is there twice the later one counts."""
    found: Runs = {}
    with open(ROWS, newline="") as file:
        for row in csv.DictReader(file):
            values = {column: 100 * float(row[column]) for column in COLUMNS}
            found.setdefault(row["loss"], {})[int(row["seed"])] = values
    return found


def spread(values: list[float]) -> str:
    """Mean and standard deviation (n - 1)."""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def page(runs: Runs) -> str:
    """docs/controls.md."""
    seeds = sorted(next(iter(runs.values())))
    lines = []
    for name, found in runs.items():
        cells = [spread([found[seed][column] for seed in seeds]) for column in COLUMNS]
        beside = [found[seed]["test"] - runs["SDT"][seed]["test"] for seed in seeds]
        cells.append("" if name == "SDT" else spread(beside))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    command = shlex.join(["trtkern", "train", "--recipe", "fashion-mnist+l2", *OPTIONS])
    table = "\n".join(lines)
    return f"""# What the parts of the TRT loss bring

The TRT loss has three parts: the cross entropy of every time step, a squared error of every step, and a penalty on the
weights that decays over time ([TRT](trt.md)). To see what each brings, it is taken away. This page trains one
network with five losses, from the usual one to all of TRT, and compares the accuracies:

- **SDT** is the usual loss: the cross entropy of the mean output.
- **TET** has the cross entropy of every step, and a squared error to a constant (lam = 0.05).
- **TET + one-hot MSE** is TRT without its penalty (lam = 0).
- **L2** is TRT with a penalty that does not decay (delta = 0): plain L2.
- **TRT** is all of it, with lam = 1e-5 and delta = 0.25, as for CIFAR-10.

## How it was measured

`python bench/controls.py` made this page, its picture and [its rows](../bench/controls.csv): Fashion-MNIST,
{len(seeds)} seeds, 10,000 training images (stratified, the same for all runs), mirrored at random; a network of two
convolutions (16 and 32 channels, each pooled), T = 4, 20 epochs. The last epoch is reported, so the test images choose
nothing. One of the commands that it runs:

```sh
{command}
```

## What came out

The accuracies are in percent, in evaluation mode, as mean ± standard deviation over the seeds. "Train - test" is the
gap between training and test. "Test - SDT" pairs the runs of one seed, which begin with the same weights and see the
images in the same order.

| loss | train | test | train - test | test - SDT |
|---|---|---|---|---|
{table}

![Test accuracy and gap of every run](controls.png)

## What this does not say

With weights of usual size the penalty of these settings is within a few percent of plain L2
([why](trt.md#why-the-penalty-decays-over-time)), and lam is small. So what separates TRT from TET + one-hot MSE here is
no more than the table shows. [The paper's claims, tested](results.md) compares them where the two penalties differ.
"""


def draw(runs: Runs) -> None:
    """docs/controls.png: a point a run, the mean as a line."""
    from trtkern.output import style
    from trtkern.output.pictures import rows, sheet

    titles = {"test": ("Accuracy on the test images", "%"), "gap": ("How much better on training images", "points")}
    with sheet(PICTURE, (2 * style.WIDTH, style.tall(len(runs), least=2.8))) as figure:
        for axes, (column, (title, unit)) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
            for place, (name, found) in enumerate(runs.items()):
                values = [row[column] for row in found.values()]
                color = style.OURS if name == "TRT" else style.THEIRS
                axes.plot(values, [place] * len(values), "o", color=color, alpha=0.6, markersize=5)
                axes.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color=color, linewidth=2)
            rows(axes, list(runs))
            axes.set(xlabel=f"{unit}; a dot a run, a line their mean", title=title)


def main() -> None:
    """Train, append the rows, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="train nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/controls"), help="where the run folders are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    options = parser.parse_args()
    if not options.page:
        with ThreadPoolExecutor(options.jobs) as pool:
            for rows in pool.map(lambda name: train(name, options.runs), CONTROLS):
                if rows:
                    append(rows, ROWS)
    runs = read()
    PAGE.write_text(page(runs), encoding="utf-8")
    draw(runs)


if __name__ == "__main__":
    main()
