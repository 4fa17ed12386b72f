"""``docs/performance.md``, made of nothing but the rows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from trtkern.bench import heat
from trtkern.bench.cases import many
from trtkern.bench.plot import groups, picture
from trtkern.bench.rows import Row, slug
from trtkern.bench.table import DIRECTIONS, number, ordered, three

HEAD = """# Performance

Made by `{command}` from [the rows]({rows}). To measure on your machine, with the other libraries beside it:

```
python3 -m venv peers && peers/bin/pip install torch==2.13.0 '.[train]'
peers/bin/pip install --no-deps -r bench/peers.txt
peers/bin/trtkern bench --op lif
peers/bin/trtkern bench --suite open-neuromorphic --budget 300
peers/bin/trtkern bench --suite sizes --peers snntorch,spikingjelly --budget 5400
peers/bin/trtkern bench --op overhead
peers/bin/trtkern bench --op step --direction each --candidates own,exact,relu
```

Times are medians of interleaved rounds, in milliseconds, with the 20th and 80th percentile; on a CPU a call of less
than 0.1 s follows one that is not timed, so that it does not find the memory as another candidate left it. "Of copy"
is the share of the rate of torch's `copy_`, measured in the same rounds, at which the least bytes of the case (the
traffic model, [design.md](design.md)) are moved. "x trtkern" is the median of the paired ratios to this project's
first candidate with its 90 % interval, above 1 where this project is faster. "Peak" is what one call allocates.
Compile time stands apart and is not in the times; this project's CPU kernels have none, so counting it could only
lengthen the others. Every candidate passed a comparison with float64, at its own library's settings, before it was
timed; what did not is listed as WRONG. `unbind` and `x[t]` are the two ways in which a loop can take its steps: with
indexing, autograd makes a gradient of the whole input at every step, T times as much memory traffic, and blocks that
do not fit what the process has kept are mapped anew (a heap that keeps them all would grow by a tensor a step).
"""


SIZES = """Neurons over a grid of T and N, and BatchNorm + LIF at every layer of VGGSNN, ResNet-19 and the digits'
network, batch 8 and 64, in both memory layouts, against the strongest candidates alone: the loop compiled whole (up to
T = 16; from there on the compiled cell and the eager loop, since compiling takes about a second a step), what other
libraries have that is compiled, and BatchNorm + ReLU. A cell is the time of the fastest other one over this project's:
above 1 this project is faster, and a dot says that it is behind by more than the noise."""


OVERHEAD = """Forward and backward of one layer on tensors so small that what is left is the time of the host: Python,
autograd and the dispatcher. Medians of rounds, each the median of many calls; below a layer of this project what it is
set beside: ReLU, or BatchNorm2d and ReLU on images whose time steps are folded into the batch. "step" is one step in a
loop, `layer.step`, beside the same neuron as a cell of plain torch, and beside ReLU. On the GPU backends the
kernels are compiled as they are for a GPU and everything before a launch is done, but a stand-in for the GPU's driver
launches nothing, and what the driver's own launcher takes is not in it."""


STEPS = """Whole training steps: forward, the TRT loss, backward and Adam. "Backward" ends with Adam's new weights.
"trtkern cpu, exact" leaves all convolutions and matrix products to torch; without it what has packed spikes is computed
from the bits, where a kernel takes its size. "x ReLU" is the time of this project over that of the same network with
ReLU in place of the neurons, in the memory layout in which that is faster: the median of paired ratios with its 90 %
interval, below 1 where the spiking network is faster. "spikformer" is a block of it. A network that another library has
of its own, such as SpikingJelly's Spikformer, is measured as it is there, with its own neurons; it is another network,
and its results are not compared."""


def write(rows: Sequence[Row], path: Path, source: Path, command: str) -> list[Path]:
    """Write the page and the pictures of each machine beside it; what was written.

    Raises:
        OSError: a file cannot be written.
    """
    machines: dict[str, list[Row]] = {}
    for row in rows:
        machines.setdefault(row.machine, []).append(row)
    parts = [HEAD.format(command=command, rows=Path(os.path.relpath(source, path.parent)).as_posix())]
    made = [path]
    for name, mine in machines.items():
        kinds = _kinds(mine)
        apart = [part for kind, of in kinds.items() for part in (_by_threads(of) if kind == "steps" else [of])]
        parts.append(_head(name, [groups(part) for part in apart]))
        for kind, found in kinds.items():
            text, file = _SECTIONS[kind](found, path.with_name(f"{path.stem}-{slug(name)}.png"))
            parts.append(text)
            made += [] if file is None else [file]
    path.write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")
    return made


def _kinds(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows by the section that shows them, those that are there."""
    made: dict[str, list[Row]] = {kind: [] for kind in _SECTIONS}
    for row in rows:
        own = {"overhead": "overhead", "step": "steps"}.get(row.op, "cases")
        made["sizes" if many(row.suite) else own].append(row)
    return {kind: found for kind, found in made.items() if found}


def _head(name: str, kinds: list[dict[tuple[str, str], list[Row]]]) -> str:
    """What the rows of a machine were measured with."""
    newest = [group[-1] for shown in kinds for group in shown.values()]
    said = sorted({f"{row.versions}, {row.threads} threads, malloc: {row.malloc}" for row in newest})
    commands = dict.fromkeys(f"{row.date}, {row.commit}: `{row.command}`" for row in newest)
    return "\n".join([f"## {name}\n", *said, "", *(f"- {line}" for line in commands), ""])


def _cases(rows: list[Row], file: Path) -> tuple[str, Path | None]:
    """A table for each case and direction, and the picture of all, if anything was measured."""
    shown, drawn = groups(rows), any(row.status == "ok" for row in rows)
    if drawn:
        picture(rows, file)
    parts = [*_losses(shown), "", f"![Times of every candidate, and the copy limit]({file.name})", ""]
    for (case, direction), group in shown.items():
        parts += [f"### {case}, {DIRECTIONS[direction]}\n", *_table(group), ""]
    return "\n".join(parts), file if drawn else None


def _sizes(rows: list[Row], file: Path) -> tuple[str, Path | None]:
    """The suite "sizes": a map, and the cases that are not won; its tables would be a hundred."""
    file, drawn = file.with_stem(f"{file.stem}-sizes"), any(row.status == "ok" for row in rows)
    if drawn:
        heat.picture(rows, file)
    parts = ["### Many sizes\n", SIZES, "", *_losses(groups(rows)), "", f"![Ratios by size]({file.name})", ""]
    return "\n".join(parts), file if drawn else None


def _overhead(rows: list[Row], file: Path) -> tuple[str, Path | None]:
    """One table of all layers, in microseconds."""
    parts = ["### Host time\n", OVERHEAD, ""]
    parts.append("| case | candidate | library | us (p20 to p80) | x trtkern (90 %) | rounds | what it calls |")
    parts.append("|---|---|---|---|---|---|---|")
    for group in groups(rows).values():
        for row in group:
            if row.status != "ok":
                parts.append(f"| {row.case} | {row.candidate} | {row.library} | {row.status}: {row.note} | | | |")
                continue
            low, middle, high = (three(1e3 * ms) for ms in (row.p20_ms, row.p50_ms, row.p80_ms))
            ratio = _ratio(row)
            parts.append(
                f"| {row.case} | {row.candidate} | {row.library} | {middle} ({low} to {high}) | {ratio} | "
                f"{row.rounds} | {row.note} |"
            )
    return "\n".join([*parts, ""]), None


def _by_threads(rows: list[Row]) -> list[list[Row]]:
    """The rows of each number of threads, which are cases of their own."""
    return [[row for row in rows if row.threads == count] for count in sorted({row.threads for row in rows})]


def _steps(rows: list[Row], file: Path) -> tuple[str, Path | None]:
    """One table of all networks, directions and numbers of threads."""
    parts = ["### Whole steps\n", STEPS, ""]
    parts.append(
        "| case | part | threads | candidate | library | ms (p20 to p80) | x trtkern (90 %) | x ReLU (90 %) | peak MiB "
        "| rounds | note |"
    )
    parts.append("|---" * 11 + "|")
    for group in (group for part in _by_threads(rows) for group in groups(part).values()):
        first = next((row for row in group if row.library == "trtkern" and row.status == "ok"), None)
        relu = min((row for row in group if "ReLU" in row.candidate), key=lambda row: row.p50_ms, default=None)
        for row in ordered(group):
            said = f"| {row.case} | {DIRECTIONS[row.direction]} | {row.threads} | {row.candidate} | {row.library} |"
            if row.status != "ok":
                parts.append(f"{said} {row.status}: {row.note} | | | | | |")
                continue
            low, middle, high = map(three, (row.p20_ms, row.p50_ms, row.p80_ms))
            beside = "" if row is not first or relu is None else _inverse(relu)
            peak = f"{row.peak_bytes / 2**20:.1f}" if row.peak_bytes >= 0 else ""
            parts.append(
                f"{said} {middle} ({low} to {high}) | {_ratio(row)} | {beside} | {peak} | {row.rounds} | {row.note} |"
            )
    return "\n".join([*parts, ""]), None


def _inverse(row: Row) -> str:
    """This project's time over that of a row."""
    return f"**{1 / row.times_ours:.2f}** ({1 / row.times_ours_high:.2f} to {1 / row.times_ours_low:.2f})"


_SECTIONS: dict[str, Callable[[list[Row], Path], tuple[str, Path | None]]] = {
    "cases": _cases, "sizes": _sizes, "steps": _steps, "overhead": _overhead,
}  # fmt: skip


def _ratio(row: Row) -> str:
    """ "x trtkern", with its interval where there are rounds enough for one."""
    ratio = number(row.times_ours, ".2f")
    return ratio + (f" ({row.times_ours_low:.2f} to {row.times_ours_high:.2f})" if ratio and row.rounds > 2 else "")


def _losses(shown: dict[tuple[str, str], list[Row]]) -> list[str]:
    """Where somebody else is faster, BatchNorm + ReLU too, and where it cannot be told: before anything else."""
    behind, level, compared = [], [], 0
    for (case, direction), group in shown.items():
        linear = next((row for row in group if row.candidate == "Linear alone"), None)
        for row in group:
            alone = row.candidate in ("copy_", "Linear alone", "BatchNorm alone") or "trtkern" in row.candidate
            if row.status != "ok" or row.times_ours != row.times_ours or alone:
                continue
            compared += 1
            words = (
                f"- {case}, {DIRECTIONS[direction]}: {row.candidate}, {row.times_ours:.2f} of our time "
                f"({row.times_ours_low:.2f} to {row.times_ours_high:.2f}, {row.rounds} rounds)"
            )
            if row.times_ours < 1 and row.compile_s > 0:
                words += f"; its {row.compile_s:.1f} s of compiling take {_calls_to_catch_up(row):,} calls to make up"
            if linear is not None:
                words += f"; the Linear alone takes {linear.times_ours:.2f} ({linear.rounds} rounds)"
            if row.times_ours < 1:
                behind.append(words)
            elif row.times_ours_low < 1:
                level.append(words)
    first = f"Of {compared} comparisons with other implementations this project is behind in {len(behind)}"
    more = f", and ahead by less than the noise in {len(level)}" if level else ""
    return [f"{first}{more}{':' if behind or level else '.'}", *behind, *level]


def _calls_to_catch_up(row: Row) -> int:
    """After how many calls a faster candidate has made up for the time of its compiling."""
    return math.ceil(1e3 * row.compile_s * row.times_ours / (row.p50_ms * (1 - row.times_ours)))


def _table(group: list[Row]) -> list[str]:
    lines = [
        "| candidate | library | ms (p20 to p80) | GB/s | of copy | x trtkern (90 %) | peak MiB | compile s | rounds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ordered(group):
        note = f" ({row.note})" if row.note else ""
        if row.status != "ok":
            lines.append(f"| {row.candidate} | {row.library} | {row.status}: {row.note} | | | | | | |")
            continue
        bold = "**" if row.library == "trtkern" else ""
        ratio = _ratio(row)
        peak = f"{row.peak_bytes / 2**20:.1f}" if row.peak_bytes >= 0 else ""
        low, middle, high = map(three, (row.p20_ms, row.p50_ms, row.p80_ms))
        lines.append(
            f"| {bold}{row.candidate}{bold}{note} | {row.library} | {bold}{middle}{bold} ({low} to {high}) | "
            f"{number(row.gb_per_s, '.1f')} | {number(row.copy_share, '.0%')} | {ratio} | {peak} | "
            f"{row.compile_s:.1f} | {row.rounds} |"
        )
    return lines
