"""The roofline of a step as a picture: how far each layer is from what memory and arithmetic allow."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trtkern.output.text import short
from trtkern.profiling.step.report import PartTime, StepProfile

COLORS = {
    "convolutions": "#3b6ea8", "linear layers": "#7a5195", "neurons": "#d1603d", "normalisation": "#4f9d69",
    "other layers": "#8a8a8a",
}  # fmt: skip
LABELLED = 6
"""Points with a name: the layers that take longest."""


def roofline(axes: Axes, found: StepProfile) -> None:
    """FLOP/s over FLOP/byte, both logarithmic: a point a layer and direction below the two measured rates."""
    copy, product = found.rates
    points = [
        (row, part.flops / part.bytes, part.flops / part.seconds, filled)
        for row in found.rows
        for part, filled in ((row.forward, True), (row.backward, False))
        if part.flops and part.bytes and part.seconds
    ]
    ridge = product / copy
    across = [ridge, *(x for _, x, _, _ in points)]
    low, high = min(across) / 4, max(across) * 4
    axes.plot([low, ridge, high], [low * copy, product, product], color="#222", linewidth=1.2)
    axes.annotate(
        f"copy {copy / 1e9:.1f} GB/s", (low, low * copy), xytext=(14, -2), textcoords="offset points", fontsize=8
    )
    axes.annotate(
        f"matmul {product / 1e9:.0f} GFLOP/s", (ridge, product), xytext=(2, 5), textcoords="offset points", fontsize=8
    )
    for row, x, y, filled in points:
        color = COLORS.get(row.group, COLORS["other layers"])
        axes.scatter(x, y, s=26, edgecolors=color, facecolors=color if filled else "white", zorder=3)
    _names(axes, points)
    for group in dict.fromkeys(row.group for row, *_ in points):
        axes.scatter([], [], s=26, color=COLORS.get(group, COLORS["other layers"]), label=group)
    axes.scatter([], [], s=26, edgecolors="#222", facecolors="#222", label="forward")
    axes.scatter([], [], s=26, edgecolors="#222", facecolors="white", label="backward")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP/s", title="layers with counted FLOP")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=7, loc="lower right")


def _names(axes: Axes, points: list[tuple[PartTime, float, float, bool]]) -> None:
    """Names of the layers that take longest, in a column, each with a line to its first point."""
    first = {row.name: (row, x, y) for row, x, y, _ in reversed(points)}
    longest = sorted(first.values(), key=lambda point: -point[0].seconds)[:LABELLED]
    for place, (row, x, y) in enumerate(sorted(longest, key=lambda point: point[1])):
        axes.annotate(
            short(row.name, 24), (x, y), xytext=(0.45, 0.62 - 0.055 * place), textcoords="axes fraction", fontsize=7,
            ha="right", va="center", parse_math=False,
            arrowprops={"arrowstyle": "-", "color": "#999", "linewidth": 0.6, "relpos": (1, 0.5)},
        )  # fmt: skip


def uncounted(found: StepProfile) -> list[PartTime]:
    """The layers that move bytes and whose FLOP are not counted."""
    return [row for row in found.rows if row.bytes and not row.flops]


def bandwidth(axes: Axes, found: StepProfile) -> None:
    """Bytes per second of the layers whose FLOP are not counted: neurons, normalisation, pooling; a bar a direction."""
    rows = uncounted(found)
    for index, row in enumerate(rows):
        color = COLORS.get(row.group, COLORS["other layers"])
        for part, shift, filled in ((row.forward, -0.2, True), (row.backward, 0.2, False)):
            if part.bytes and part.seconds:
                axes.barh(
                    index + shift, part.bytes / part.seconds / 1e9, 0.36, edgecolor=color,
                    facecolor=color if filled else "white",
                )  # fmt: skip
    axes.axvline(found.rates.copy / 1e9, color="#222", linewidth=1.2)
    _name(axes, [short(row.name, 24) for row in rows])
    axes.set(xlabel="GB/s of the bytes to move (line: copy rate)", title="the others: filled forward, empty backward")


def share(axes: Axes, found: StepProfile) -> None:
    """Milliseconds of each part, forward and backward."""
    rows: list[PartTime] = sorted(found.rows, key=lambda row: -row.seconds)[:20]
    for index, row in enumerate(rows):
        color = COLORS.get(row.group, COLORS["other layers"])
        forward, backward = 1e3 * row.forward.seconds, 1e3 * row.backward.seconds
        axes.barh(index, forward, edgecolor=color, facecolor=color)
        axes.barh(index, backward, left=forward, edgecolor=color, facecolor="white")
    _name(axes, [short(row.name, 28) for row in rows])
    axes.set(xlabel="ms", title="time: filled forward, empty backward")


def _name(axes: Axes, names: list[str]) -> None:
    """Bars with their names, the first on top, over a grid."""
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)


def plot(found: StepProfile, path: Path) -> None:
    """Roofline and bandwidths in one picture file, of the kind that the name's ending says.

    Raises:
        OSError, ValueError: the file cannot be written, or its kind is unknown.
    """
    figure = Figure(figsize=(12, max(4.6, 1.6 + 0.24 * len(uncounted(found)))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(found.notes()[0], fontsize=9, parse_math=False)
    left, right = figure.subplots(1, 2)
    roofline(left, found)
    bandwidth(right, found)
    figure.savefig(path, dpi=120)
