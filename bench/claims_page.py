"""docs/results.md and its pictures, made of the rows that ``bench/claims.py`` measured."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from trtkern.bench.measure import ROOT
from trtkern.output import style

ROWS, PAGE = ROOT / "bench" / "claims.csv", ROOT / "docs" / "results.md"
QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Of Student's t at 97.5 %, by degrees of freedom."""


class Measure(NamedTuple):
    """A column of the rows that a claim is about."""

    title: str
    unit: str
    digits: int
    better: int
    """+1 where the claim is that TRT has more of it, -1 where less."""
    scale: float = 1.0


MEASURES = {
    "gap": Measure("accuracy gap", "points", 2, -1, 100),
    "loss_gap": Measure("loss gap", "nats", 3, -1),
    "vanishing": Measure("gradient left a step further back", "a factor", 3, 1),
    "centroid": Measure("Fisher centroid", "steps", 3, -1),
    "eigenvalue": Measure("largest Hessian eigenvalue", "", 2, -1),
    "trace": Measure("Hessian trace", "", 1, -1),
    "sharpness": Measure("ε-sharpness", "nats", 3, -1),
    "test": Measure("test accuracy", "%", 2, 1, 100),
}
CLAIMS = {
    "A smaller gap between training and test": ("gap", "loss_gap"),
    "Gradients that vanish more slowly over time": ("vanishing",),
    "Fisher information that sits earlier": ("centroid",),
    "Flatter minima": ("eigenvalue", "trace", "sharpness"),
    "Accuracy": ("test",),
}
TRT, L2 = "TRT, lam by validation", "L2, lam by validation"
"""The arms that the claims compare: at a strength where the two differ."""
OTHERS = ("SDT", "TET", "TET + one-hot MSE", L2)
Found = dict[str, dict[int, dict[str, Any]]]
"""{arm: {seed: row}}"""


def read() -> dict[str, Found]:
    """bench/claims.csv by data set, numbers as numbers; of a run that is there twice the later row counts."""
    found: dict[str, Found] = {}
    with open(ROWS, newline="") as file:
        for row in csv.DictReader(file):
            values: dict[str, Any] = {**row, **{name: float(row[name]) for name in MEASURES}}
            values["lam"] = float(row["lam"]) if row["lam"] else None
            values["centroids"] = json.loads(row["centroids"])
            found.setdefault(row["data"], {}).setdefault(row["arm"], {})[int(row["seed"])] = values
    return found


class Interval(NamedTuple):
    """Mean of paired differences and its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of some values; one that is not finite makes all of it so."""
        mean = statistics.fmean(values)
        half = QUANTILE[len(values) - 1] * deviation(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)

    def verdict(self, better: int) -> str:
        """What the interval says of a claim that the difference has the sign ``better``."""
        low, high = sorted((better * self.low, better * self.high))
        if not math.isfinite(self.mean):
            return "not measured"
        return "supported" if low > 0 else "contradicted" if high < 0 else "not decided"


def deviation(values: Sequence[float]) -> float:
    """The standard deviation (n - 1); NaN where a value is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def difference(found: Found, arm: str, other: str, name: str) -> Interval:
    """Of a measure between the runs of two arms with the same seed."""
    seeds, scale = sorted(set(found[arm]) & set(found[other])), MEASURES[name].scale
    return Interval.of([scale * (found[arm][seed][name] - found[other][seed][name]) for seed in seeds])


def shown(interval: Interval, digits: int) -> str:
    """A difference with its interval."""
    return f"{interval.mean:+.{digits}f} ({interval.low:+.{digits}f} to {interval.high:+.{digits}f})"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation (n - 1)."""
    return f"{statistics.fmean(values):.{digits}f} ± {deviation(values):.{digits}f}"


def overview(found: Found) -> str:
    """A row an arm: every measure over the seeds."""
    head = [
        "loss",
        "λ",
        "training accuracy (%)",
        *(f"{m.title}{f' ({m.unit})' * bool(m.unit)}" for m in MEASURES.values()),
    ]
    lines = [head, ["---"] * len(head)]
    for arm, rows in found.items():
        lam = next(iter(rows.values()))["lam"]
        cells = [
            arm,
            "" if lam is None else f"{lam:g}",
            spread([100 * float(row["train"]) for row in rows.values()], 2),
        ]
        for name, m in MEASURES.items():
            cells.append(spread([m.scale * row[name] for row in rows.values()], m.digits))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdicts(found: Found) -> str:
    """A row a claim and measure: TRT against the others, and what the interval says."""
    head = ["claim", "measure", *(f"TRT - {other}" for other in OTHERS)]
    lines = [head, ["---"] * len(head)]
    for claim, names in CLAIMS.items():
        for name in names:
            m, cells = MEASURES[name], []
            for other in OTHERS:
                interval = difference(found, TRT, other, name)
                cells.append(f"{shown(interval, m.digits)}: **{interval.verdict(m.better)}**")
            lines.append([claim if name == names[0] else "", m.title, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sentences(found: Found) -> list[str]:
    """What each claim comes to: against SDT, TET + one-hot MSE, and plain L2, which is TRT without its decay."""
    said = []
    for claim, names in CLAIMS.items():
        said.append(f"- **{claim}**")
        for other in ("SDT", "TET + one-hot MSE", L2):
            results = [difference(found, TRT, other, name).verdict(MEASURES[name].better) for name in names]
            whole = (
                results[0]
                if len(set(results)) == 1
                else ", ".join(f"{MEASURES[name].title} {result}" for name, result in zip(names, results, strict=True))
            )
            said.append(f"  - against {other}: {whole}")
    return said


def dots(data: str, found: Found) -> None:
    """A point a run and a line at the mean, a panel a measure."""
    from trtkern.output.pictures import rows as named_rows
    from trtkern.output.pictures import sheet

    with sheet(PAGE.with_name(f"results-{data}.png"), (2 * style.WIDTH, 4 * style.tall(len(found)))) as figure:
        panels = figure.subplots(4, 2, sharey=True).flatten()
        for axes, (name, m) in zip(panels, MEASURES.items(), strict=True):
            for place, (arm, rows) in enumerate(found.items()):
                values = [m.scale * row[name] for row in rows.values()]
                color = style.OURS if arm.startswith("TRT") else style.THEIRS
                axes.plot(values, [place] * len(values), "o", color=color, alpha=0.6, markersize=5)
                axes.plot([statistics.fmean(values)] * 2, [place - 0.32, place + 0.32], color=color, linewidth=2)
            named_rows(axes, list(found))
            axes.locator_params(axis="x", nbins=5)
            axes.set_title(m.title[:1].upper() + m.title[1:])
            claim = "claimed: more" if m.better > 0 else "claimed: less"
            axes.set_xlabel(f"{m.unit}; {claim}" if m.unit else claim)


def centroids(data: str, found: Found) -> None:
    """The centroid over the epochs, mean and range over the seeds."""
    from trtkern.output.pictures import over_steps, sheet

    with sheet(PAGE.with_name(f"results-{data}-centroid.png"), (1.6 * style.WIDTH, 1.3 * style.HEIGHT)) as figure:
        axes = figure.subplots()
        for color, (arm, rows) in zip(style.SERIES, found.items(), strict=False):
            epochs = [epoch for epoch, _ in next(iter(rows.values()))["centroids"]]
            series = [[value for _, value in row["centroids"]] for row in rows.values()]
            steps = list(zip(*series, strict=True))
            axes.plot(epochs, [statistics.fmean(step) for step in steps], "o-", color=color, label=arm)
            lows, highs = [min(s) for s in steps], [max(s) for s in steps]
            axes.fill_between(epochs, lows, highs, color=color, alpha=0.08, linewidth=0)
        title = "When the network is informed: mean of the seeds, and their range"
        axes.set(xlabel="epoch", ylabel="information centroid (time step)", title=title)
        over_steps(axes)


SETUPS = {
    "digits": "The 8x8 handwritten digits that come with the package: 500 training images, 144 for validation, 360\n"
    "for the test; two convolutions of 16 and 32 channels, 40 epochs.",
    "fashion-mnist": "2,000 training images, 600 for validation and all 10,000 for the test, mirrored at random in\n"
    "training; two convolutions of 8 and 16 channels, each pooled, 15 epochs.",
}


def page(found: dict[str, Found]) -> str:
    """docs/results.md, of what ``read`` found."""
    parts = [HEAD]
    for data, arms in found.items():
        seeds = len(next(iter(arms.values())))
        same = "\n".join(sentences(arms))
        parts.append(
            f"## {data}\n\n{SETUPS[data]}\n\n### {data}: what the {seeds} seeds support\n\n{SUPPORT}\n\n{same}\n\n"
            f"{DIFFERENCES}\n\n{verdicts(arms)}\n\n{RUNS}\n\n![Every run, every measure](results-{data}.png)\n\n"
            f"![The centroid over the epochs](results-{data}-centroid.png)\n\n"
            f"### {data}: all measures\n\n{MEANS}\n\n{overview(arms)}\n"
        )
    if missing := [data for data in SETUPS if data not in found]:
        parts.append(f"## {', '.join(missing)}\n\nNot measured yet: the command above goes on with it.\n")
    return "\n".join(parts) + TAIL


SUPPORT = "In one word each, TRT against three other ways to train:"
DIFFERENCES = (
    "The numbers behind these words are the mean differences between TRT and each other way, with their 95 % intervals:"
)
RUNS = "The first picture shows every run by every measure, the second one the Fisher centroid over the epochs."
MEANS = "Mean ± standard deviation over the seeds."
HEAD = """# The paper's claims, tested

The paper behind TRT ([arXiv 2506.19256](https://arxiv.org/abs/2506.19256)) says five things of its loss: that it
closes the gap between training and test, slows the vanishing of gradients over time, moves Fisher information to
early time steps, finds flatter minima, and is more accurate. This page tests each of these claims on two small data
sets. [TRT](trt.md) says what the loss is made of.

One command makes the page, its pictures and [its rows](../bench/claims.csv):

```sh
python bench/claims.py
```

## What is compared

TRT is compared with four other ways to train the same network:

- **SDT**, the usual loss: the cross entropy of the mean output over the time steps.
- **TET**: the cross entropy of every time step, and a squared error to a constant. There is no penalty on the
  weights.
- **TET + one-hot MSE**: the cross entropy and the one-hot squared error of every time step, which is TRT without its
  penalty (lam = 0).
- **L2**: TRT with delta = 0, that is the same penalty without its decay over time.

What TRT adds by itself is therefore the difference to L2. What its parts add together is the difference to SDT.

The strength lam of the penalty is chosen in two ways. "lam by validation" is the strongest of five (1e-4 to 1e-2)
whose accuracy on held-out images, over two seeds, is within one standard error of the best. It is chosen for L2 and
for TRT apart. "lam of the paper" is 5e-5, the paper's value where T = 10.

## How to read the verdicts

A difference is taken between two runs of one seed, which begin with the same weights and see the images in the same
order. Its mean over the seeds stands with a 95 % interval by Student's t.

- A claim is **supported** where the interval lies on its side of zero,
- **contradicted** where it lies on the other side,
- and **not decided** where it holds zero.

Of so many intervals one in twenty misses by chance, so a single word proves little. Look for what agrees.

"""
TAIL = """
## How each measure is taken

Every measure is taken in evaluation mode, of the weights that the validation images chose, and on training images
without random changes, unless it says otherwise. [Looking at what a network learnt](analysis.md) has the definitions.

- **Gap**: training accuracy less test accuracy; and test cross entropy less training cross entropy, both of the mean
  output.
- **Gradient left a step further back**: the factor by which the norm of the gradient of the last step's cross entropy
  shrinks for each time step that it goes back in the neurons' potentials; the mean over the layers. 1 would be no
  vanishing.
- **Fisher centroid**: the mean time step of the per-sample Fisher information. Low means early. The picture shows it
  over the epochs.
- **Largest eigenvalue, trace**: of the Hessian (the second derivatives) of the cross entropy of the mean output, by
  Lanczos and by Hutchinson's estimator, from differences of surrogate gradients. Low means flat. The penalty is not
  part of this loss. A scale of the weights that BatchNorm takes back moves these two measures, and a stronger penalty
  makes weights smaller; ε-sharpness is relative to the weights, and is freer of that.
- **ε-sharpness**: the largest rise of the loss that is found where each filter of the weights moves by at most 5 % of
  its length. Low means flat.
- **Test accuracy**: of all test images.

## What this does not say

The networks and data sets are small, and static images are shown for T = 10 steps. The paper's own experiments use
larger networks, and event cameras for T = 10. Its accuracies are not tested here. What the losses reach with more
images and the settings for CIFAR-10, where TRT is within a few percent of L2, is in [What the parts of the loss
bring](controls.md).
"""


def write() -> None:
    """The page and its pictures, anew from the rows."""
    found = read()
    for data, arms in found.items():
        dots(data, arms)
        centroids(data, arms)
    PAGE.write_text(page(found), encoding="utf-8")
