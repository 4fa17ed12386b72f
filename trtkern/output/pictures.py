"""Pictures in the style of the house: on a page, as a file, and what several of them have in common."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from trtkern.output import style
from trtkern.output.page import escaped

_VECTOR = 2500
"""Cells up to which a heat map is drawn as rectangles; above it is an image."""

_RULES = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color", "patch.edgecolor")


@contextmanager
def styled(**more: Any) -> Iterator[None]:
    """Whatever is drawn inside has the style of the house; ``more`` of matplotlib's options beside it."""
    told: Any = style.options() | more
    with matplotlib.rc_context(told):
        yield


@contextmanager
def sheet(
    path: Path | IO[bytes], size: tuple[float, float] = (style.WIDTH, style.HEIGHT), title: str = ""
) -> Iterator[Figure]:
    """An empty figure of that many inches, written when all is drawn, on white, of the kind that the name's ending
    says (PNG without one).

    Raises:
        OSError, ValueError: the file cannot be written, or its kind is unknown.
    """
    with styled():
        figure = Figure(figsize=size, layout="constrained")
        if title:
            figure.suptitle(title, parse_math=False, fontsize=style.TEXT, x=0.01, ha="left")
        yield figure
        figure.savefig(path, dpi=style.DPI)


def alone(draw: Callable[[Axes], None], size: tuple[float, float], title: str) -> str:
    """A picture that is a file of its own, as SVG: with its own paper, light or dark as the reader has it.

    Args:
        draw: puts it on new axes.
        size: in inches.
        title: for those who cannot see it.
    """
    element = svg(draw, size, title)
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', element)
    assert found is not None
    night = style.css(style.NIGHT)
    rules = f"svg {{ color: var(--ink); {style.css(style.LIGHT)} }}\n"
    rules += f"@media (prefers-color-scheme: dark) {{ svg {{ {night} }} }}\n"
    rules += "text { font-family: system-ui, 'DejaVu Sans', sans-serif !important; }"
    paper = f'<rect width="{found[1]}" height="{found[2]}" fill="var(--page)"/>'
    start = element.index(">") + 1
    named = f'<title>{escaped(title)}</title>\n <style type="text/css">{rules}</style>\n {paper}'
    return f"{element[:start]}\n {named}{element[start:]}".replace("<svg ", '<svg role="img" ', 1)


def svg(draw: Callable[[Axes], None], size: tuple[float, float], salt: str) -> str:
    """An ``<svg>`` element of what ``draw`` puts on new axes, its text as text; ``size`` in inches.

    It stands on the page without a background, and what is black or white in it is the page's ink or paper, so that it
    reads on a light page and on a dark one. Words that ``draw`` makes black or white stay so: they stand on a colour.

    ``salt`` makes the names inside differ from those of other pictures on the page.
    """
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, **dict.fromkeys(_RULES, style.INK)}
    options |= {"axes.facecolor": "none", "figure.facecolor": "none"}
    with styled(**options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # measured here, drawn by the browser's fonts
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        engine: Any = figure.get_layout_engine()
        engine.execute(figure)
        figure.set_layout_engine("none")  # savefig would draw everything a second time to find the layout
        stream = io.StringIO()
        canvas.print_svg(stream, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = stream.getvalue()
    text = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", text[text.index("<svg") :])
    return re.sub(r'(<(\w+)[^>]*? style=")([^"]*)', _themed, text)


def _themed(found: re.Match[str]) -> str:
    """The start of an element, its black and white made the page's ink and paper; the colour of a line that would be
    lost on a dark page or on a light one is mixed there."""
    begin, element, said = found.groups()
    said = said.replace(style.INK, "currentColor")
    if element in ("text", "tspan"):
        said = re.sub(rf"(?!{style.BLACK}){_DARK}", "currentColor", said)
        return begin + re.sub(rf"(fill): (?!{style.BLACK}|{style.WHITE})(#[0-9a-f]{{6}})", _mixed, said)
    if "stroke: " not in said:  # a cell
        return begin + said
    said = re.sub(_DARK, "currentColor", said).replace(style.WHITE, f"var(--page, {style.LIGHT['page']})")
    if "stroke: currentColor" in said and "fill: " not in said:  # matplotlib leaves out a black one
        said = f"fill: currentColor; {said}"
    return begin + re.sub(r"(stroke): (#[0-9a-f]{6})", _mixed, said)


def _mixed(found: re.Match[str]) -> str:
    """A colour that is too dark or too light for one of the two pages, mixed by what the page says (``--lift``,
    ``--sink``); behind the plain colour, for browsers that mix none."""
    parts = [int(found[2][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    light = sum(w * p**2.2 for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    if 0.09 < light < 0.5:
        return found[0]
    other = "white var(--lift, 0%)" if light <= 0.09 else "black var(--sink, 0%)"
    return f"{found[0]}; {found[1]}: color-mix(in srgb, {other}, {found[2]})"


_DARK = r"#([0-5][0-9a-f])\1\1(?![0-9a-f])"
"""Black, and greys that are lost on a dark page."""


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    _plain(axes.yaxis, *axes.get_ylim())


def whole(axes: Axes, grid: bool = True) -> None:
    """The x axis in whole numbers: epochs, time steps."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.dataLim.intervalx
    if low == high:
        axes.set_xlim(low - 0.5, high + 0.5)
    if grid:
        axes.grid(which="both")


def over_steps(axes: Axes) -> None:
    """The x axis in whole steps or epochs, a grid, and the names of the lines."""
    whole(axes)
    named(axes)


def named(axes: Axes) -> None:
    """Say what the labelled things are: at the ends of the lines where there is room for it, else in a legend below.
    To be called when limits and scales are set. A single one needs a name too, where it was given one.
    """
    handles, names = axes.get_legend_handles_labels()
    if not names:
        return
    lines = [handle for handle in handles if isinstance(handle, Line2D)]
    box = axes.get_window_extent()
    assert axes.figure is not None
    point = axes.figure.get_figure(root=True).dpi / 72
    gap = 1.3 * style.SMALL * point / box.height
    wide = 0.55 * style.SMALL * point * max(map(len, names)) / box.width
    if len(lines) < len(handles) or len(names) * gap > 0.9 or wide > 0.45:
        below(axes)
        return
    ends = [end for line in lines if (end := _end(axes, line)) is not None]
    names = [name.replace(r"\$", "$") for name in names]  # as they stand where matplotlib would read formulas
    marked = sorted(zip(ends, names, lines, strict=False), key=lambda each: each[0][1])
    places = spread([end[1] for end, _, _ in marked], gap)
    for (end, name, line), place in zip(marked, places, strict=True):
        axes.annotate(
            name, end, xytext=(1.04, place), xycoords="axes fraction", textcoords="axes fraction", va="center",
            fontsize=style.SMALL, parse_math=False, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linestyle": line.get_linestyle(),
                        "linewidth": 1.0, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2},
        )  # fmt: skip


def _end(axes: Axes, line: Line2D) -> tuple[float, float] | None:
    """Where a line's last point is, as a share of the axes; None: nowhere."""
    axes.get_xlim(), axes.get_ylim()  # they are found here, if they were not before
    there = [(x, y) for x, y in line.get_xydata().tolist() if math.isfinite(x) and math.isfinite(y)]  # type: ignore[union-attr]
    if not there:
        return None
    x, y = (line.get_transform() - axes.transAxes).transform(there[-1]).tolist()
    return (x, min(max(y, 0.0), 1.0)) if math.isfinite(y) else None


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Rising places, moved apart until each two are ``gap`` from each other, as little as that takes, within 0 and 1
    where they fit."""
    groups = [[place, 1.0] for place in places]  # centre and number of those that touch
    merged: list[list[float]] = []
    for centre, count in groups:
        merged.append([centre, count])
        while len(merged) > 1 and merged[-1][0] - merged[-2][0] < gap * (merged[-1][1] + merged[-2][1]) / 2:
            (one, of_one), (two, of_two) = merged[-2:]
            both = of_one + of_two
            merged[-2:] = [[(one * of_one + two * of_two) / both, both]]
            merged[-1][0] = min(max(merged[-1][0], gap * (both - 1) / 2), 1 - gap * (both - 1) / 2)
    return [centre + gap * (i - (count - 1) / 2) for centre, count in merged for i in range(int(count))]


def below(axes: Axes) -> None:
    """A legend below the axis and its label, where it hides nothing; in two columns where their names are short."""
    names = axes.get_legend_handles_labels()[1]
    assert axes.figure is not None
    inches = axes.get_window_extent().width / axes.figure.dpi / 0.775  # with the part that axes start with
    column = 0.55 * style.SMALL * max(map(len, names), default=0) + 30
    columns = 2 if 2 * column <= 72 * inches else 1
    under = axes.transAxes + ScaledTranslation(0, -0.5, axes.figure.dpi_scale_trans)
    axes.legend(
        ncols=columns, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=under, borderaxespad=0.0, borderpad=0.0,
        handlelength=1.8, columnspacing=1.2,
    )  # fmt: skip


def interval(axes: Axes, row: float, values: tuple[float, float, float], color: Any, filled: bool = True) -> None:
    """A dot in its row, and the interval around it: (low, middle, high); without one where that is not finite."""
    low, middle, high = values
    if math.isfinite(low) and math.isfinite(high):
        axes.plot([low, high], [row, row], color=color, linewidth=1.6, solid_capstyle="butt", zorder=2.5)
    axes.plot(
        [middle], [row], "o", markersize=6, markeredgecolor=color, markeredgewidth=1.4,
        markerfacecolor=color if filled else style.EMPTY, zorder=3,
    )  # fmt: skip


def rows(axes: Axes, names: Sequence[str]) -> None:
    """The y axis has a row for each name, the first on top, and lines across."""
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="both")


def plain(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers, few enough to be read."""
    axes.set_xscale("log")
    _plain(axes.xaxis, *axes.get_xlim())


def _plain(axis: Axis, low: float, high: float) -> None:
    """Numbers as people write them, as many as a logarithmic axis of that range has room for."""
    steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if high < 4 * low else (1, 2, 5) if high < 60 * low else (1,)
    axis.set_major_locator(LogLocator(subs=[float(step) for step in steps], numticks=12))
    axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if 1e3 <= x < 1e6 else f"{x:g}")
    axis.set_minor_formatter(NullFormatter())


def heat(axes: Axes, cells: list[list[float]], colors: str, high: float = 1.0) -> Any:
    """Rows of numbers as shades, the first row on top; what is not a number stays white."""
    values = torch.tensor(cells, dtype=torch.float64)
    rows, columns = values.shape
    limits: dict[str, Any] = {"cmap": colors, "vmin": 0.0, "vmax": high or 1.0}
    if values.numel() <= _VECTOR:
        edges = [[i - 0.5 for i in range(count + 1)] for count in (columns, rows)]
        image = axes.pcolormesh(*edges, values.numpy(), **limits)
        axes.invert_yaxis()
        return image
    return axes.imshow(values.numpy(), interpolation="none", aspect="auto", **limits)


def few(count: int) -> list[int]:
    """At most 12 indices below ``count``, evenly spaced from 0."""
    return list(range(0, count, math.ceil(count / 12)))
