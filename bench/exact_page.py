"""docs/exact.md, made of bench/exact.csv and bench/exact_losses.csv alone."""

from __future__ import annotations

import csv
import statistics

from trtkern.bench.measure import ROOT

ROWS, LOSSES = ROOT / "bench" / "exact.csv", ROOT / "bench" / "exact_losses.csv"
PAGE = ROOT / "docs" / "exact.md"
SHOWN = (1, 2, 5, 10, 20, 50)
"""Steps."""

Rows = list[dict[str, str]]


def read() -> tuple[Rows, Rows]:
    """The rows of the trainings and of the first steps."""
    found = []
    for path in (ROWS, LOSSES):
        with open(path, newline="") as file:
            found.append(list(csv.DictReader(file)))
    return found[0], found[1]


def spread(values: list[float]) -> str:
    """Mean and standard deviation (n - 1), in percent."""
    return f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


def trainings(rows: Rows) -> tuple[list[str], list[str]]:
    """Lines of the table, and what they say in words."""
    lines, said = [], []
    for data in dict.fromkeys(row["data"] for row in rows):
        by_way: dict[str, dict[str, dict[str, str]]] = {}
        for row in rows:
            if row["data"] == data:
                by_way.setdefault(row["way"], {})[row["seed"]] = row
        exact, kernels = by_way["exact"], by_way["kernels"]
        seeds = sorted(set(exact) & set(kernels), key=int)
        tests = {way: [float(found[seed]["test"]) for seed in seeds] for way, found in by_way.items()}
        for way, found in by_way.items():
            first = found[seeds[0]]
            counted = (
                f"{first['kernel_forward']} forward, {first['kernel_weight_grad']} of weights, "
                f"in {first['layer_calls']} calls"
            )
            train = spread([float(found[seed]["train"]) for seed in seeds])
            lines.append(f"| {data} | {way} | {len(seeds)} | {train} | {spread(tests[way])} | {counted} |")
        pairs = [b - a for a, b in zip(tests["exact"], tests["kernels"], strict=True)]
        mean, wide = statistics.fmean(pairs), max(statistics.stdev(found) for found in tests.values())
        within = "within" if abs(mean) <= wide else "beyond"
        said.append(
            f"On {data} the mean test accuracy with the kernels differs by {100 * mean:+.2f} points, {within} the "
            f"{100 * wide:.2f} points (one standard deviation) by which the seeds of one way differ."
        )
    return lines, said


def steps(rows: Rows) -> tuple[list[str], list[str]]:
    """Lines of the table of the first steps, and what all steps say in words."""
    lines, said = [], []
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        for row in mine:
            if int(row["step"]) in SHOWN:
                numbers = [f"{float(row[key]):.1e}" for key in ("kernels", "one_ulp_middle", "one_ulp_most")]
                lines.append(f"| {network} | {row['step']} | {float(row['loss']):.4f} | {' | '.join(numbers)} |")
        beyond = [row for row in mine if float(row["kernels"]) > float(row["one_ulp_most"])]
        largest = {key: max(float(row[key]) for row in mine) for key in ("kernels", "one_ulp_most")}
        kernels = f"{mine[0]['kernel_forward']} forward, {mine[0]['kernel_weight_grad']} of weights"
        said.append(
            f"{network}: in {len(mine) - len(beyond)} of {len(mine)} steps the loss with the kernels is no farther "
            f"from that of the exact run than that of the farthest of {mine[0]['nudges']} runs moved by an ulp. "
            f"Over all steps it is {largest['kernels']:.1e} away at the most, and those runs "
            f"{largest['one_ulp_most']:.1e}. Kernels that ran: {kernels}, in {mine[0]['layer_calls']} calls of layers."
        )
    return lines, said


def page(trained: Rows, stepped: Rows) -> str:
    """docs/exact.md."""
    trainings_lines, trainings_words = trainings(trained)
    steps_lines, steps_words = steps(stepped)
    trainings_table, steps_table = "\n".join(trainings_lines), "\n".join(steps_lines)
    trainings_said, steps_said = "\n\n".join(trainings_words), "\n\n".join(steps_words)
    commands = "\n".join(dict.fromkeys(
        f"- {row['date']}, {row['commit']}, {row['machine']}, kernels of {row['isa']}, {row['versions']}, "
        f"{row['threads']} threads: `{row['command']}`"
        for row in (*trained, *stepped)
    ))  # fmt: skip
    return PAGE_TEXT.format(
        trainings_table=trainings_table, trainings_said=trainings_said, others=int(stepped[0]["nudges"]) + 1,
        steps_table=steps_table, steps_said=steps_said, commands=commands,
    )  # fmt: skip


PAGE_TEXT = """# Trainings with kernels for packed spikes, and exact ones

On a CPU this project computes convolutions of spikes from their bits, which is faster than torch's convolutions. The
sums are the same, but they are taken in another order and so are rounded otherwise, and a potential next to its
threshold may fall on the other side. From there on two trainings go different ways, as they do with another number of
threads. Does that harm the accuracy? This page trains both ways and compares.

- **Kernels** is the default: what has packed spikes is computed from the bits, where a kernel takes its size.
- **Exact** is `--exact-convolutions`: torch's own kernels compute every convolution.

```sh
trtkern train --recipe digits --exact-convolutions
```

Use the exact way to compare with torch bit for bit; [What is promised bit for
bit](bitwise.md#convolutions-of-spikes-and-exact-ones) says what is promised of either.

## Accuracy

Trainings of one seed begin with the same weights and see the images in the same order. The last epoch is reported, in
percent, as mean ± standard deviation over the seeds. The recipes are those of the package; Fashion-MNIST is trained
on 10,000 images, and tested on all. The last column counts, in the run of the first seed, how often a kernel computed
a layer, evaluations included.

| data | way | seeds | train | test | kernels that ran |
|---|---|---|---|---|---|
{trainings_table}

{trainings_said}

## The first steps

Two trainings that differ in a rounding move apart step by step. How fast is that, and is it faster than by the
smallest change of the weights that there is? The table has the loss of the first steps, and how far others are from
it: the kernels, and runs with torch's own kernels whose weights were moved at the beginning by one unit in the last
place (ulp), up or down at random. VGGSNN is trained on frames [4, 8, 2, 48, 48] of random events, whose rates belong
to their class. Kernels that did no more than such a move would be the farthest of all in one of {others} steps on
average.

| network | step | loss, exact | kernels | 1 ulp, median | 1 ulp, farthest |
|---|---|---|---|---|---|
{steps_table}

{steps_said}

## How it was measured

Made by `python bench/exact.py` from [the trainings](../bench/exact.csv) and [the first
steps](../bench/exact_losses.csv):

{commands}
"""
