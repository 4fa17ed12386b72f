"""The rows of the suite "sizes" as maps: a cell a case, its colour and number how far ahead this project is."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.colors import Normalize, TwoSlopeNorm

from trtkern.bench.ahead import OPS
from trtkern.bench.plot import groups
from trtkern.bench.rows import Row
from trtkern.bench.table import DIRECTIONS, three
from trtkern.output import style
from trtkern.output.pictures import sheet

KEY = "Blue, above 1: trtkern is faster; red, below 1: the other is (with a dot: by more than the noise)"
FARTHEST = 3.0
"""log2 of the ratio with the strongest colour."""


class Cell(NamedTuple):
    """What a case says in a map."""

    value: float
    """NaN where nothing was measured."""
    behind: bool = False
    """Whether this project is behind by more than the noise."""


NOTHING = Cell(math.nan)


class Map(NamedTuple):
    """A picture's panel."""

    title: str
    axes: tuple[str, str]
    """What the columns are, and the rows."""
    columns: list[str]
    rows: list[str]
    cells: list[list[Cell]]
    ratio: bool
    """Whether the values are ratios around 1; else shares up to 1."""


def is_other(row: Row, relu: bool) -> bool:
    """Whether a measured row is another implementation of the neuron; with ``relu`` whether it is BatchNorm + ReLU."""
    alone = row.candidate in ("copy_", "BatchNorm alone") or row.library == "trtkern"
    return row.status == "ok" and not alone and (row.candidate == "BatchNorm + ReLU") == relu


def ahead(group: Sequence[Row], relu: bool = False) -> Cell:
    """The time of the fastest other candidate of a case over that of this project's fastest."""
    ours = [row.times_ours for row in group if row.status == "ok" and row.library == "trtkern"]
    theirs = [row for row in group if is_other(row, relu) and row.times_ours == row.times_ours]
    if not ours or not theirs:
        return NOTHING
    best = min(theirs, key=lambda row: row.times_ours)
    own = min(ours)
    return Cell(best.times_ours / own, best.rounds > 2 and best.times_ours_high / own < 1)


def of_copy(group: Sequence[Row]) -> Cell:
    """The share of the copy rate at which this project moves the least bytes of the case."""
    shares = [row.copy_share for row in group if row.status == "ok" and row.library == "trtkern"]
    return Cell(max(shares)) if shares else NOTHING


def maps(rows: Sequence[Row]) -> list[Map]:
    """The maps of one machine's rows: for each op, neuron, dtype and direction two."""
    kinds: dict[tuple[str, ...], list[list[Row]]] = {}
    for group in groups(rows).values():
        first = group[0]
        neuron = first.case.partition(first.op)[0].strip()
        kinds.setdefault((first.op, neuron, first.dtype, first.direction), []).append(group)
    made = []
    for (op, neuron, dtype, direction), measured in kinds.items():
        what = f"{neuron or OPS.get(op, op)}, {dtype}, {DIRECTIONS[direction]}"
        place = _of_layer if op == "bn-lif" else _of_neurons
        made.append(_map(f"{what}:\nfastest other / trtkern", measured, place, ahead, True))
        if op == "bn-lif":
            made.append(
                _map(f"{what}:\nBatchNorm + ReLU / trtkern", measured, place, lambda group: ahead(group, True), True)
            )
        else:
            made.append(_map(f"{what}:\nshare of the copy rate that trtkern reaches", measured, place, of_copy, False))
    return made


Place = tuple[tuple[Any, ...], str, tuple[Any, ...], str, tuple[str, str]]
"""What a column is sorted by, what it is called, the same of the row, and what they are."""


def _of_neurons(row: Row) -> Place:
    T, *neurons = map(int, row.shape.split(","))
    N = math.prod(neurons)
    called = f"{N >> 20} Mi" if N % (1 << 20) == 0 else f"{N >> 10} Ki" if N % (1 << 10) == 0 else str(N)
    return (N,), called, (T,), str(T), ("neurons N", "time steps T")


def _of_layer(row: Row) -> Place:
    T, B, *image = map(int, row.shape.split(","))
    layout = "contiguous" if row.case.endswith(row.dtype) else row.case.rpartition(" ")[2]
    size = "x".join(map(str, image))
    return (layout != "contiguous", B), f"batch {B}\n{layout}", (T, *image), f"T={T} {size}", ("", "layer")


def _map(
    title: str, measured: list[list[Row]], place: Callable[[Row], Place], cell: Callable[[list[Row]], Cell], ratio: bool
) -> Map:
    cells: dict[tuple[str, str], Cell] = {}
    columns: dict[str, tuple[Any, ...]] = {}
    rows: dict[str, tuple[Any, ...]] = {}
    axes = ("", "")
    for group in measured:
        left, column, down, row, axes = place(group[0])
        columns[column], rows[row] = left, down
        cells[row, column] = cell(group)
    across, along = (sorted(names, key=lambda name: names[name]) for names in (columns, rows))
    return Map(title, axes, across, along, [[cells.get((r, c), NOTHING) for c in across] for r in along], ratio)


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of one machine's suite "sizes": two maps for each op, neuron, dtype and direction, one below the
    other.

    Raises:
        OSError: the file cannot be written.
    """
    drawn = maps(rows)
    heights = [style.tall(len(each.rows), around=1.5) for each in drawn]
    said = textwrap.fill(f"{rows[0].machine}, {rows[0].threads} threads. {KEY}.", 62)
    with sheet(path, (1.2 * style.WIDTH, sum(heights) + 0.9), said) as figure:
        places = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axis, each in zip(places.flat, drawn, strict=True):
            _draw(axis, each)


def _draw(axis: Any, drawn: Map) -> None:
    """A map with its numbers."""
    scale: Normalize = TwoSlopeNorm(0.0, -FARTHEST, FARTHEST) if drawn.ratio else Normalize(0.0, 1.0)
    shown = [[math.log2(cell.value) if drawn.ratio else cell.value for cell in row] for row in drawn.cells]
    axis.imshow(shown, cmap=style.AROUND if drawn.ratio else style.SHARES, norm=scale, aspect="auto")
    axis.set_title(drawn.title, parse_math=False)
    axis.set_xticks(range(len(drawn.columns)), drawn.columns)
    axis.set_yticks(range(len(drawn.rows)), drawn.rows)
    axis.set(xlabel=drawn.axes[0], ylabel=drawn.axes[1])
    axis.tick_params(length=0)
    for down, row in enumerate(drawn.cells):
        for right, cell in enumerate(row):
            if math.isnan(cell.value):
                continue
            dark = abs(shown[down][right]) > 0.6 * FARTHEST if drawn.ratio else cell.value > 0.6
            words = three(cell.value) if drawn.ratio else f"{cell.value:.0%}"
            ink = style.ON_SHADE[dark]
            axis.text(right, down, words, ha="center", va="center", fontsize=style.SMALL, color=ink)
            if cell.behind:
                axis.plot(right + 0.38, down, "o", color=ink, markersize=4)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
