"""The rows of a sweep as lines: how the time for a neuron-step grows along an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from trtkern.bench.heat import is_other
from trtkern.bench.plot import groups
from trtkern.bench.rows import Row
from trtkern.bench.sweep import axes_of
from trtkern.bench.table import DIRECTIONS


class Point(NamedTuple):
    """A case in the picture."""

    size: int
    """Along the axis."""
    low: float
    """Nanoseconds a neuron-step, p20."""
    middle: float
    high: float


class Line(NamedTuple):
    """Cases that differ along the axis alone."""

    label: str
    """ "T = 4"."""
    ours: list[Point]
    """This project's fastest."""
    other: list[Point]
    """The fastest of all others."""


class Panel(NamedTuple):
    """What is drawn on one pair of axes."""

    title: str
    axis: str
    lines: list[Line]


def panels(rows: Sequence[Row]) -> list[Panel]:
    """The panels of a sweep's rows: one for each op, neuron, dtype and direction.

    The axis is the last of those that take several sizes, so N of T and N; each choice of the others is a line.
    """
    kinds: dict[tuple[str, ...], list[list[Row]]] = {}
    for group in groups(rows).values():
        first = group[0]
        neuron = first.case.partition(first.op)[0].strip()
        kinds.setdefault((first.op, neuron, first.dtype, first.direction), []).append(group)
    return [
        _panel(f"{neuron or op}, {dtype}, {DIRECTIONS[direction]}", op, measured)
        for (op, neuron, dtype, direction), measured in kinds.items()
    ]


def _panel(title: str, op: str, measured: list[list[Row]]) -> Panel:
    shapes = [tuple(map(int, group[0].shape.split(","))) for group in measured]
    names = axes_of(op, len(shapes[0]))
    several = [at for at in range(len(names)) if len({shape[at] for shape in shapes}) > 1]
    along = several[-1] if several else len(names) - 1
    lines: dict[tuple[int, ...], Line] = {}
    for shape, group in sorted(zip(shapes, measured, strict=True), key=lambda pair: pair[0]):
        key = tuple(shape[at] for at in several if at != along)
        label = ", ".join(f"{names[at]} = {shape[at]:,}" for at in several if at != along)
        line = lines.setdefault(key, Line(label, [], []))
        steps = math.prod(shape[1:] if op == "regularizer" else shape)
        ok = [row for row in group if row.status == "ok"]
        for points, found in (
            (line.ours, [row for row in ok if row.library == "trtkern"]),
            (line.other, [row for row in ok if is_other(row, False)]),
        ):
            if found:
                best = min(found, key=lambda row: row.p50_ms)
                points.append(
                    Point(shape[along], *(1e6 * ms / steps for ms in (best.p20_ms, best.p50_ms, best.p80_ms)))
                )
    return Panel(title, names[along], list(lines.values()))


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of one machine's sweep: nanoseconds a neuron-step over the size of an axis, with p20 to p80.

    Raises:
        OSError: the file cannot be written.
    """
    drawn = panels(rows)
    figure = Figure(figsize=(7.5, 4.4 * len(drawn) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{rows[0].machine}, {rows[0].threads} threads\nsolid: trtkern, band p20 to p80; dashed: the fastest other",
        parse_math=False, fontsize=9,
    )  # fmt: skip
    for axes, panel in zip(figure.subplots(len(drawn), 1, squeeze=False).flat, drawn, strict=True):
        _draw(axes, panel)
    figure.savefig(path, dpi=110)


def _draw(axes: Any, panel: Panel) -> None:
    shades = colormaps["viridis"]
    for at, line in enumerate(panel.lines):
        color = shades(0.85 * at / max(1, len(panel.lines) - 1))
        for points, style in ((line.ours, "o-"), (line.other, "--")):
            axes.plot(
                [p.size for p in points], [p.middle for p in points], style, color=color, markersize=4, linewidth=1.4
            )
        sizes, low, high = ([getattr(p, name) for p in line.ours] for name in ("size", "low", "high"))
        axes.fill_between(sizes, low, high, color=color, alpha=0.25, linewidth=0)
        if line.ours:
            last = line.ours[-1]
            axes.annotate(
                line.label, (last.size, last.middle), xytext=(6, 0), textcoords="offset points", fontsize=8,
                color=color, va="center",
            )  # fmt: skip
    sizes = sorted({point.size for line in panel.lines for point in (*line.ours, *line.other)})
    axes.set(xscale="log", yscale="log", xlabel=panel.axis, ylabel="ns per neuron-step")
    axes.set_title(panel.title, fontsize=9, loc="left", parse_math=False)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
