"""The page of one machine: every row that was measured on it, beside ``docs/performance.md``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from trtkern.bench import ahead, heat
from trtkern.bench.cases import many
from trtkern.bench.plot import YARDSTICKS, groups
from trtkern.bench.rows import Row, slug
from trtkern.bench.table import DIRECTIONS, number, ordered, three
from trtkern.output.pictures import alone

CASES = """One layer at a time. A case is named by the operation, its sizes (time steps T first), and its number type;
"lif" is the neuron alone, "linear-lif" and "bn-lif" are the neuron behind a linear layer and behind BatchNorm. The
fastest candidate stands first."""


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


class Machine(NamedTuple):
    """A machine with the rows that were measured on it."""

    name: str
    """As the rows have it."""
    rows: list[Row]
    page: Path
    """The file of its page; its pictures are called alike."""

    @property
    def title(self) -> str:
        """Its name for people."""
        return called(self.name)

    def file(self, what: str, kind: str) -> Path:
        """A picture of it."""
        return self.page.with_name(f"{self.page.stem}{what}.{kind}")


def called(name: str) -> str:
    """A machine's name for people: without trade marks, and with what its instruction set was held to in words."""
    said = re.sub(r"\((R|TM)\)|\bProcessor\b", "", name)
    held = re.search(r", TRTKERN_CPU_ISA=(\w+)", said)
    whose = "trtkern and torch" if "ATEN_CPU_CAPABILITY" in said else "trtkern"
    said = " ".join(re.sub(r", \w+=\w+", "", said).split())
    isa = {"avx2": "AVX2", "avx512": "AVX-512", "amx": "AMX", "baseline": "no vector instructions"}
    return f"{said}, {whose} held to {isa.get(held[1], held[1])}" if held else said


def _slug(name: str) -> str:
    """A machine's name in a file name, short."""
    short = re.sub(r"\(family (\w+), model (\w+)\)", r"\1 \2", called(name))
    short = re.sub(r"(\d+) cores?", r"\1c", short)
    return slug(re.sub(r"[\w ]+ held to ", " as ", short).replace("AVX-512", "AVX512"))[:48]


def machines(rows: Sequence[Row], page: Path) -> list[Machine]:
    """The machines of the rows in their order, each with the file of its page beside the overview."""
    mine: dict[str, list[Row]] = {}
    for row in rows:
        mine.setdefault(row.machine, []).append(row)
    made: dict[str, Machine] = {}
    for name, found in mine.items():
        stem = f"{page.stem}-{_slug(name)}"
        stem += f"-{len(made) + 1}" if stem in made else ""
        made[stem] = Machine(name, found, page.with_name(f"{stem}.md"))
    return list(made.values())


def write(machine: Machine, overview: str) -> list[Path]:
    """Write its page and pictures; what was written.

    Args:
        machine: with its rows.
        overview: the name of the page that explains the words.

    Raises:
        OSError: a file cannot be written.
    """
    shown = kinds(machine.rows)
    apart = [part for kind, of in shown.items() for part in (by_threads(of) if kind == "steps" else [of])]
    parts = [f"# {machine.title}\n", f"What the columns mean is said on the [overview]({overview}).\n"]
    picture = ahead_of_others(machine)
    made = [machine.page]
    if picture is not None:
        parts.append(f"![{AHEAD}]({picture.name})\n")
        made.append(picture)
    for kind, found in shown.items():
        text, file = _SECTIONS[kind](found, machine)
        parts.append(text)
        made += [] if file is None else [file]
    parts.append(_origin(machine.name, [groups(part) for part in apart]))
    machine.page.write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")
    return made


AHEAD = "How many times as long as trtkern the fastest candidate of each other library takes, in each case"


def ahead_of_others(machine: Machine) -> Path | None:
    """Draw the cases and whole steps of a machine in one picture; None: there is nothing to compare."""
    shown = kinds(machine.rows)
    found = ahead.lines([row for kind in ("steps", "cases") for row in shown.get(kind, [])])
    if not found:
        return None
    file = machine.file("", "svg")
    title = "How many times as long the others take"
    file.write_text(alone(lambda axes: ahead.draw(axes, found, title), ahead.size(found), AHEAD), encoding="utf-8")
    return file


NAMES = {"steps": "whole steps", "cases": "single layers", "sizes": "many sizes", "overhead": "host time"}
"""Of the sections, in words."""


def kinds(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows by the section that shows them, those that are there."""
    made: dict[str, list[Row]] = {kind: [] for kind in _SECTIONS}
    for row in rows:
        own = {"overhead": "overhead", "step": "steps"}.get(row.op, "cases")
        made["sizes" if many(row.suite) else own].append(row)
    return {kind: found for kind, found in made.items() if found}


def _origin(name: str, kinds: list[dict[tuple[str, str], list[Row]]]) -> str:
    """What the rows of a machine were measured with."""
    newest = [group[-1] for shown in kinds for group in shown.values()]
    said = sorted({f"{row.versions}, {row.threads} threads, malloc: {row.malloc}" for row in newest})
    commands = dict.fromkeys(f"{row.date}, {row.commit}: `{row.command}`" for row in newest)
    lines = [f"- {line}" for line in (*said, *commands)]
    return "\n".join(["## Where these rows come from\n", f"The machine's full name: {name}.\n", *lines, ""])


def _cases(rows: list[Row], machine: Machine) -> tuple[str, Path | None]:
    """A table for each case and direction."""
    shown = groups(rows)
    parts = ["## Single layers\n", CASES, "", *compared(rows).said(), ""]
    for (case, direction), group in shown.items():
        parts += [f"### {case}, {DIRECTIONS[direction]}\n", *_table(group), ""]
    return "\n".join(parts), None


def _sizes(rows: list[Row], machine: Machine) -> tuple[str, Path | None]:
    """The suite "sizes": a map, and the cases that are not won; its tables would be a hundred."""
    file, drawn = machine.file("-sizes", "png"), any(row.status == "ok" for row in rows)
    if drawn:
        heat.picture(rows, file)
    parts = ["## Many sizes\n", SIZES, "", *compared(rows).said(), "", f"![{heat.KEY}]({file.name})", ""]
    return "\n".join(parts), file if drawn else None


def _overhead(rows: list[Row], machine: Machine) -> tuple[str, Path | None]:
    """One table of all layers, in microseconds."""
    parts = ["## Host time\n", OVERHEAD, ""]
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


def by_threads(rows: list[Row]) -> list[list[Row]]:
    """The rows of each number of threads, which are cases of their own."""
    return [[row for row in rows if row.threads == count] for count in sorted({row.threads for row in rows})]


def _steps(rows: list[Row], machine: Machine) -> tuple[str, Path | None]:
    """One table of all networks, directions and numbers of threads."""
    parts = ["## Whole steps\n", STEPS, ""]
    parts.append(
        "| case | part | threads | candidate | library | ms (p20 to p80) | x trtkern (90 %) | x ReLU (90 %) | peak MiB "
        "| rounds | note |"
    )
    parts.append("|---" * 11 + "|")
    for group in (group for part in by_threads(rows) for group in groups(part).values()):
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


def relu_ratios(rows: Sequence[Row]) -> list[float]:
    """Of each network whose whole step was measured with the fewest threads, this project's time over ReLU's."""
    made = []
    for (_, direction), group in groups([row for row in rows if row.threads == min(r.threads for r in rows)]).items():
        timed = [row for row in group if "ReLU" in row.candidate and row.status == "ok"]
        if direction == "both" and timed:
            made.append(1 / min(timed, key=lambda row: row.p50_ms).times_ours)
    return made


def _inverse(row: Row) -> str:
    """This project's time over that of a row."""
    return f"**{1 / row.times_ours:.2f}** ({1 / row.times_ours_high:.2f} to {1 / row.times_ours_low:.2f})"


_SECTIONS: dict[str, Callable[[list[Row], Machine], tuple[str, Path | None]]] = {
    "steps": _steps, "cases": _cases, "sizes": _sizes, "overhead": _overhead,
}  # fmt: skip


def _ratio(row: Row) -> str:
    """ "x trtkern", with its interval where there are rounds enough for one."""
    ratio = number(row.times_ours, ".2f")
    return ratio + (f" ({row.times_ours_low:.2f} to {row.times_ours_high:.2f})" if ratio and row.rounds > 2 else "")


class Compared(NamedTuple):
    """The comparisons with other implementations, in words where this project is not clearly ahead."""

    number: int
    behind: list[str]
    level: list[str]
    """Ahead by less than the noise."""
    lost: int = 0
    """Of those that it is behind in, by more than the noise."""

    def said(self) -> list[str]:
        """What they come to, the losses one by one."""
        first = f"Of {self.number} comparisons with other implementations this project is behind in {len(self.behind)}"
        more = f", and ahead by less than the noise in {len(self.level)}" if self.level else ""
        listed = [*self.behind, *self.level]
        return [f"{first}{more}{':' if listed else '.'}", *([""] if listed else []), *listed]


def compared(rows: Sequence[Row]) -> Compared:
    """Every other implementation of a case beside this project's, BatchNorm + ReLU too."""
    found = Compared(0, [], [])
    for (case, direction), group in groups(rows).items():
        linear = next((row for row in group if row.candidate == "Linear alone"), None)
        for row in group:
            alone = row.candidate in YARDSTICKS or "trtkern" in row.candidate
            if row.status != "ok" or math.isnan(row.times_ours) or alone:
                continue
            found = found._replace(number=found.number + 1)
            words = (
                f"- {case}, {DIRECTIONS[direction]}: {row.candidate}, {row.times_ours:.2f} of our time "
                f"({row.times_ours_low:.2f} to {row.times_ours_high:.2f}, {row.rounds} rounds)"
            )
            if row.times_ours < 1 and row.compile_s > 0:
                words += f"; its {row.compile_s:.1f} s of compiling take {_calls_to_catch_up(row):,} calls to make up"
            if linear is not None:
                words += f"; the Linear alone takes {linear.times_ours:.2f} ({linear.rounds} rounds)"
            if row.times_ours < 1:
                found.behind.append(words)
                found = found._replace(lost=found.lost + (row.rounds > 2 and row.times_ours_high < 1))
            elif row.times_ours_low < 1:
                found.level.append(words)
    return found


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
