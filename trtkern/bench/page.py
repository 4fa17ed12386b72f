"""``docs/performance.md`` and a page a machine beside it, made of nothing but the rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from trtkern.bench import heat, machine_page
from trtkern.bench.machine_page import AHEAD, Machine, compared, kinds, relu_ratios
from trtkern.bench.rows import Row

HEAD = """# Performance

How fast are the kernels, and compared with what? This page explains how they are measured and what the numbers mean,
and shows a picture of each machine. Behind each picture is a page with every number.

Nothing here is typed by hand. The pages are made of [rows](#the-rows) that are in the repository, each with the command
that measured it. This is what made them:

```text
{command}
```

## What is measured

- **Single layers**: one spiking layer over all its time steps, forward and backward, beside the same layer in other
  libraries, in plain PyTorch (a loop over time, the "eager loop") and in PyTorch compiled by `torch.compile`.
- **Whole steps**: a training step of a network (forward, loss, backward, optimiser) beside the same network with ReLU
  in place of the spiking neurons, and beside the same network in another library.
- **Many sizes**: the single layers again from tiny to large, to find out where somebody else is faster.
- **Host time**: layers so small that only Python and PyTorch itself are left to be timed.

Before anything is timed its results are compared with a computation in float64. What disagrees is listed as WRONG and
is not timed. Then all candidates take turns for some rounds, so that a machine that becomes slower for a while is
slower for all of them.

## What the numbers mean

- **ms (p20 to p80)**: milliseconds for one call, the median of the rounds. A fifth of the rounds took less than p20, a
  fifth took more than p80.
- **GB/s**: the least number of bytes that a case has to read and write ([how they are counted](traffic.md)), divided by
  the time.
- **of copy**: that rate as a share of the rate at which PyTorch copies memory (`copy_`), measured in the same rounds. A
  layer that does little arithmetic cannot be much faster than 100 %. In the pictures this is the copy limit.
- **x trtkern**: how many times as long as trtkern a candidate takes, with a 90 % interval: 2.0 means that trtkern is
  twice as fast, and below 1 trtkern is the slower one. It is the median over the rounds of the ratio within a round.
- **x ReLU**: the other way round, trtkern's time over that of the network with ReLU: 0.6 means that the spiking network
  takes 0.6 times as long.
- **peak MiB**: the memory that one call allocates. **compile s**: seconds that compiling took before the first call;
  they are not in the times.
- **unbind** and **x[t]**: two ways in which a loop can take its time steps. With `x[t]`, autograd makes a gradient of
  the whole input at every step, which is T times as much memory traffic.

On a CPU, a call of less than 0.1 s follows one that is not timed, so that it does not find the memory as another
candidate left it. Every library is measured at its own default settings.

## The machines

A comparison is one other implementation of a layer in one case. It is *lost* where the other one is faster by more than
the noise, which means that the whole 90 % interval of "x trtkern" is below 1. It is *within the noise* where the
interval has 1 in it, or where there were too few rounds for an interval. "Held to" an instruction set means that the
processor has a newer one, which was not used.
"""

MEASURE = """## On your machine

This measures the same, with the other libraries beside trtkern. The last line writes pages like these.

```sh
python3 -m venv peers
peers/bin/pip install torch==2.13.0 '.[train]'
peers/bin/pip install --no-deps -r bench/peers.txt
peers/bin/trtkern bench --op lif
peers/bin/trtkern bench --suite open-neuromorphic --budget 300
peers/bin/trtkern bench --suite sizes --peers snntorch,spikingjelly --budget 5400
peers/bin/trtkern bench --op overhead
peers/bin/trtkern bench --op step --direction each --candidates own,exact,relu
peers/bin/trtkern bench --page mine.md
```
"""


def write(rows: Sequence[Row], path: Path, source: Path, command: str) -> list[Path]:
    """Write the overview, a page a machine and their pictures beside it; what was written, the overview first.

    Raises:
        OSError: a file cannot be written.
    """
    found = machine_page.machines(rows, path)
    made = [path]
    for machine in found:
        made += machine_page.write(machine, path.name)
    parts = [HEAD.format(command=command), *_table(found), ""]
    parts += [part for machine in found for part in _shown(machine, made)]
    files = sorted(source.glob("*.csv")) if source.is_dir() else [source]
    linked = [f"- [{file.name}]({Path(os.path.relpath(file, path.parent)).as_posix()})" for file in files]
    parts += [MEASURE, "## The rows\n", *linked, ""]
    path.write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")
    return made


def _table(found: Sequence[Machine]) -> list[str]:
    """A line a machine: what was measured on it, and what the comparisons come to."""
    lines = [
        "| machine | measured | comparisons of layers | lost | within the noise | whole steps, x ReLU | newest |",
        "|---|---|---|---|---|---|---|",
    ]
    for machine in found:
        shown = kinds(machine.rows)
        layers = [compared(shown[kind]) for kind in ("cases", "sizes") if kind in shown]
        counts = [
            sum(numbers) if layers else ""
            for numbers in zip(
                *[(each.number, each.lost, len(each.behind) + len(each.level) - each.lost) for each in layers],
                strict=True,
            )
        ] or ["", "", ""]
        ratios = relu_ratios(shown.get("steps", []))
        steps = f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} networks" if len(ratios) > 1 else ""
        steps = f"{ratios[0]:.2f}, 1 network" if len(ratios) == 1 else steps
        said = ", ".join(machine_page.NAMES[kind] for kind in shown)
        cells = [
            f"[{machine.title}]({machine.page.name})",
            said,
            *map(str, counts),
            steps,
            max(row.date for row in machine.rows),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _shown(machine: Machine, made: Sequence[Path]) -> list[str]:
    """Its heading, its picture, the way to its page."""
    parts = [f"### {machine.title}\n"]
    for file, said in ((machine.file("", "svg"), AHEAD), (machine.file("-sizes", "png"), heat.KEY)):
        if file in made:
            parts.append(f"![{said}]({file.name})\n")
            break
    threads = sorted({row.threads for row in machine.rows})
    used = f"{' and '.join(map(str, threads))} thread{'s' if threads != [1] else ''}"
    return [*parts, f"Measured with {used}. All numbers: [{machine.title}]({machine.page.name}).\n"]
