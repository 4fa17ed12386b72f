"""All cases of a machine in one picture: how many times as long as this project everybody else takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from trtkern.bench.plot import YARDSTICKS, groups, limit
from trtkern.bench.rows import Row
from trtkern.bench.table import DIRECTIONS
from trtkern.output import style
from trtkern.output.pictures import below, interval, plain

WHO = {
    "torch.compile": "torch.compile", "eager": "eager loop", "snntorch": "snnTorch", "spikingjelly": "SpikingJelly",
    "norse": "Norse", "sinabs": "sinabs", "rockpool": "Rockpool",
}  # fmt: skip
"""Those with a colour of their own: what their candidates' names have in them, what they are called."""
OWN = "its own network"
"""In the note of a network that a library has of its own: it is another one."""
RELU = "ReLU instead of neurons"


class Times(NamedTuple):
    """The fastest candidate of somebody in a case."""

    who: str
    low: float
    middle: float
    """Its time over that of this project's first candidate, with the 90 % interval."""
    high: float


class Line(NamedTuple):
    """A case and direction in the picture."""

    name: str
    others: list[Times]
    limit: float
    """The time that copying takes, in the same unit; NaN where it was not measured."""


def who(row: Row) -> str:
    """Whose a candidate is: a library, a way of plain torch, or ``RELU``."""
    if "ReLU" in row.candidate:
        return RELU
    known = next((name for part, name in WHO.items() if part in row.candidate), None)
    return known or ("eager loop" if row.library.startswith("torch") else row.library.split()[0])


OPS = {
    "step": "step of", "lif": "LIF", "linear-lif": "linear + LIF", "bn-lif": "BatchNorm + LIF",
    "recurrent": "recurrent LIF", "delay": "delays", "regularizer": "TRT penalty", "pack": "packing of spikes",
}  # fmt: skip
"""In their order in the picture, and what they are called."""


def called(row: Row) -> str:
    """The case of a row for people; its direction where that is not forward and backward together."""
    words = row.case.replace(f" {row.dtype}", "").split()
    if row.op == "step":
        words.remove("step")
    said = " ".join(["step of", *words] if row.op == "step" else [OPS.get(w, w) if w == row.op else w for w in words])
    return said if row.direction == "both" else f"{said}, {DIRECTIONS[row.direction]}"


def lines(rows: Sequence[Row]) -> list[Line]:
    """A line for each case, direction and number of threads that has somebody else's time; rows of one machine."""
    made: list[tuple[int, Line]] = []
    threads = sorted({row.threads for row in rows})
    for count in threads:
        for group in groups([row for row in rows if row.threads == count]).values():
            best: dict[str, Row] = {}
            for row in group:
                alone = row.candidate in YARDSTICKS or "trtkern" in row.candidate
                if row.status != "ok" or alone or OWN in row.note or math.isnan(row.times_ours):
                    continue
                if (name := who(row)) not in best or row.times_ours < best[name].times_ours:
                    best[name] = row
            if not best:
                continue
            ours = next((row for row in group if row.library == "trtkern" and row.status == "ok"), None)
            at_best = limit(group)
            share = at_best / ours.p50_ms if ours is not None and at_best else math.nan
            name = called(group[0]) + (f", {count} thread{'s' * (count > 1)}" if len(threads) > 1 else "")
            shown = [Times(who_, r.times_ours_low, r.times_ours, r.times_ours_high) for who_, r in best.items()]
            made.append((list(OPS).index(group[0].op) if group[0].op in OPS else len(OPS), Line(name, shown, share)))
    return [line for _, line in sorted(made, key=lambda pair: pair[0])]


def size(shown: Sequence[Line]) -> tuple[float, float]:
    """Inches of the picture."""
    return style.WIDTH, 1.7 + 2 * style.ROW * len(shown)


def draw(axes: Axes, shown: Sequence[Line], title: str) -> None:
    """A row a case, its name above it: dots at what the fastest of each other library takes, this project at 1."""
    there = [
        name for name in (*WHO.values(), RELU) if any(name == other.who for line in shown for other in line.others)
    ]
    colors = dict(zip(WHO.values(), style.SERIES[1:], strict=True))
    for at, line in enumerate(shown):
        axes.axhline(at, color=style.ASIDE, linewidth=0.5, alpha=0.5, zorder=0)
        for other in sorted(line.others, key=lambda other: -other.middle):
            color = colors.get(other.who, style.ASIDE)
            interval(axes, at, (other.low, other.middle, other.high), color, filled=other.who != RELU)
        if not math.isnan(line.limit):
            axes.plot(line.limit, at, "|", color=style.DARK, markersize=10, markeredgewidth=1.6)
        axes.annotate(
            line.name, (0, at), xytext=(2, 6), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=style.SMALL, va="bottom", parse_math=False,
            bbox={"facecolor": style.EMPTY, "edgecolor": style.EMPTY, "pad": 0.5},
        ).set_in_layout(False)  # fmt: skip
    for name in there:
        axes.plot(
            [], [], "o", color=colors.get(name, style.ASIDE), label=name,
            markerfacecolor=style.EMPTY if name == RELU else colors[name],
        )  # fmt: skip
    if any(not math.isnan(line.limit) for line in shown):
        axes.plot([], [], "|", color=style.DARK, markersize=10, markeredgewidth=1.6, label="copy limit")
    ends = [x for line in shown for o in line.others for x in (o.low, o.middle, o.high)] + [
        line.limit for line in shown
    ]
    ends = [x for x in ends if x > 0 and math.isfinite(x)]
    axes.axvline(1, color=style.OURS, linewidth=2.2)
    axes.set_xlim(min([0.6, *(0.9 * x for x in ends)]), 1.2 * max([2.0, *ends]))
    axes.set_ylim(len(shown) - 0.4, -1.0)
    axes.set_yticks([])
    plain(axes)
    axes.grid(axis="x")
    axes.set(xlabel="time, in times of trtkern's (line at 1)", title=title)
    below(axes)
