"""A step as pictures: where its time goes, and how far each layer is from what memory and arithmetic allow."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

from trtkern.output import style
from trtkern.output.pictures import below, plain, rows, sheet, spread
from trtkern.output.text import short
from trtkern.profiling.step.report import PartTime, StepProfile

LABELLED = 8
"""Points with a name in the roofline: the layers that take longest."""
LONGEST = 20
"""Rows of the pictures of times and of bandwidths: the layers that take longest."""
DIRECTIONS = "filled: forward, empty: backward"


class Point(NamedTuple):
    """A layer in one direction, in the roofline."""

    row: PartTime
    intensity: float
    """FLOP a byte."""
    rate: float
    """FLOP a second."""
    filled: bool
    """Forward."""


def points(found: StepProfile) -> list[Point]:
    """Of each layer whose FLOP and bytes are counted, forward and backward."""
    return [
        Point(row, part.flops / part.bytes, part.flops / part.seconds, filled)
        for row in found.rows
        for part, filled in ((row.forward, True), (row.backward, False))
        if part.flops and part.bytes and part.seconds
    ]


def roofline(axes: Axes, found: StepProfile) -> None:
    """FLOP/s over FLOP/byte, both logarithmic: a point a layer and direction below the two measured rates."""
    copy, product = found.rates
    shown = points(found)
    ridge = product / copy
    across = [ridge, *(point.intensity for point in shown)]
    low, high = min(across) / 4, max(across) * 4
    axes.plot([low, ridge, high], [low * copy / 1e9, product / 1e9, product / 1e9], color=style.DARK, linewidth=1.4)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    least = min([low * copy, *(point.rate for point in shown)]) / 1e9
    axes.set_ylim(least / 2, product / 1e9 * 6)
    middle = (low * ridge) ** 0.5
    axes.annotate(
        f"memory: {copy / 1e9:.1f} GB/s (copying)", (middle, middle * copy / 1e9), xytext=(0.01, 0.95),
        textcoords="axes fraction", fontsize=style.SMALL, va="center",
        arrowprops={"arrowstyle": "-", "color": style.ASIDE, "linewidth": 0.6, "relpos": (0.1, 0)},
    )  # fmt: skip
    axes.annotate(
        f"arithmetic: {product / 1e9:,.0f} GFLOP/s (matrix product)", (high, product / 1e9), xytext=(-4, 4),
        textcoords="offset points", fontsize=style.SMALL, ha="right",
    )  # fmt: skip
    for name in dict.fromkeys(point.row.name for point in shown):
        mine = [point for point in shown if point.row.name == name]
        color = _color(mine[0].row)
        axes.plot([p.intensity for p in mine], [p.rate / 1e9 for p in mine], color=color, linewidth=1.0, zorder=2)
        for point in mine:
            axes.plot(
                point.intensity, point.rate / 1e9, "o", markersize=6, markeredgecolor=color, markeredgewidth=1.4,
                markerfacecolor=color if point.filled else style.EMPTY, zorder=3,
            )  # fmt: skip
    _names(axes, shown)
    plain(axes)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"FLOP per byte moved ({DIRECTIONS})", ylabel="GFLOP/s reached")
    axes.set_title("How near the layers come to the machine's limits")
    axes.grid()
    _kinds(axes, [point.row for point in shown])


def _names(axes: Axes, shown: list[Point]) -> None:
    """Names of the layers that take longest, in a column beside the axes, each with a line to its first point."""
    first = {point.row.name: point for point in reversed(shown)}
    longest = sorted(first.values(), key=lambda point: -point.row.seconds)[:LABELLED]
    ends = [(axes.transData - axes.transAxes).transform((p.intensity, p.rate / 1e9)).tolist() for p in longest]
    ordered = sorted(zip(ends, longest, strict=True), key=lambda pair: pair[0][1])
    assert axes.figure is not None
    gap = 1.4 * style.SMALL * axes.figure.dpi / 72 / axes.get_window_extent().height
    for ((x, y), point), place in zip(ordered, spread([y for (_, y), _ in ordered], gap), strict=True):
        axes.annotate(
            f"{short(point.row.name, 24)}, {1e3 * point.row.seconds:.3g} ms", (x, y), xytext=(1.02, place),
            xycoords="axes fraction", textcoords="axes fraction", fontsize=style.SMALL, va="center", parse_math=False,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": style.ASIDE, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 4},
        )  # fmt: skip


def uncounted(found: StepProfile) -> list[PartTime]:
    """The layers that move bytes and whose FLOP are not counted."""
    return [row for row in found.rows if row.bytes and not row.flops]


def bandwidth(axes: Axes, found: StepProfile) -> None:
    """Bytes a second of the layers whose FLOP are not counted (neurons, normalisation, pooling): a row a layer, its
    forward joined to its backward."""
    longest = sorted(uncounted(found), key=lambda row: -row.seconds)[:LONGEST]
    names = {row.name for row in longest}
    shown = [row for row in found.rows if row.name in names]
    for index, row in enumerate(shown):
        color = _color(row)
        reached = [
            (part.bytes / part.seconds / 1e9, filled)
            for part, filled in ((row.forward, True), (row.backward, False))
            if part.bytes and part.seconds
        ]
        axes.plot([rate for rate, _ in reached], [index] * len(reached), color=color, linewidth=1.0, zorder=2)
        for rate, filled in reached:
            axes.plot(
                rate, index, "o", markersize=6, markeredgecolor=color, markeredgewidth=1.4,
                markerfacecolor=color if filled else style.EMPTY, zorder=3,
            )  # fmt: skip
    copy = found.rates.copy / 1e9
    axes.axvline(copy, color=style.DARK, linewidth=1.4)
    rows(axes, [short(row.name, 24) for row in shown])
    axes.set_xlim(0, max(1.08 * copy, 1.05 * axes.dataLim.x1))
    axes.set(xlabel=f"GB/s (line: copying, {copy:.1f})", title="Memory traffic of the other layers")
    _kinds(axes, shown)


def share(axes: Axes, found: StepProfile) -> None:
    """Milliseconds of each part, forward and backward."""
    shown = sorted(found.rows, key=lambda row: -row.seconds)[:LONGEST]
    for index, row in enumerate(shown):
        color = _color(row)
        forward, backward = 1e3 * row.forward.seconds, 1e3 * row.backward.seconds
        axes.barh(index, forward, 0.6, edgecolor=color, facecolor=color)
        axes.barh(index, backward, 0.6, left=forward, edgecolor=color, facecolor=style.EMPTY)
    rows(axes, [short(row.name, 24) for row in shown])
    axes.set_xlim(0, 1.05 * axes.dataLim.x1 or 1.0)
    axes.set(xlabel="ms a step (empty: backward)", title="What takes the time")
    _kinds(axes, shown)


def _color(row: PartTime) -> str:
    return style.KINDS.get(row.group, style.KINDS["other layers"])


def _kinds(axes: Axes, shown: list[PartTime]) -> None:
    """The colours of the kinds of layers that are there."""
    if not shown:
        return
    for kind in dict.fromkeys(row.group if row.group in style.KINDS else "other layers" for row in shown):
        axes.plot(
            [], [], "o", color=style.KINDS[kind], markersize=6, label=kind if kind != "other layers" else "others"
        )
    below(axes)


def heights(found: StepProfile) -> tuple[float, float]:
    """Inches of the pictures of times and of bandwidths."""
    return (
        style.tall(min(LONGEST, len(found.rows)), least=3.0, around=1.7),
        style.tall(min(LONGEST, len(uncounted(found))), least=3.0, around=1.7),
    )


def plot(found: StepProfile, path: Path) -> None:
    """All three in one picture file, of the kind that the name's ending says.

    Raises:
        OSError, ValueError: the file cannot be written, or its kind is unknown.
    """
    upper, lower = max(heights(found)), style.WHOLE / 2
    with sheet(path, (2 * style.WIDTH, upper + lower), found.notes()[0]) as figure:
        grid = figure.add_gridspec(2, 2, height_ratios=(upper, lower))
        share(figure.add_subplot(grid[0, 0]), found)
        bandwidth(figure.add_subplot(grid[0, 1]), found)
        roofline(figure.add_subplot(grid[1, :]), found)
