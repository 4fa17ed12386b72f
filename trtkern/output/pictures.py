"""Pictures: an ``<svg>`` element of what is drawn on axes, and what several pictures have in common."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

_VECTOR = 2500
"""Cells up to which a heat map is drawn as rectangles; above it is an image."""

_INK = "#010203"
"""What is drawn in no colour of its own: the page's ink takes its place."""
_RULES = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color", "patch.edgecolor")


def svg(draw: Callable[[Axes], None], size: tuple[float, float], salt: str) -> str:
    """An ``<svg>`` element of what ``draw`` puts on new axes, its text as text; ``size`` in inches.

    It stands on the page without a background, and what is black or white in it is the page's ink or paper, so that it
    reads on a light page and on a dark one. Words that ``draw`` makes black or white stay so: they stand on a colour.

    ``salt`` makes the names inside differ from those of other pictures on the page.
    """
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, **dict.fromkeys(_RULES, _INK)}
    options |= {"axes.facecolor": "none", "figure.facecolor": "none"}
    with matplotlib.rc_context(options), warnings.catch_warnings():
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
    begin, element, style = found.groups()
    style = style.replace(_INK, "currentColor")
    if element in ("text", "tspan"):
        style = re.sub(rf"(?!#000000){_DARK}", "currentColor", style)
        return begin + re.sub(r"(fill): (?!#000000|#ffffff)(#[0-9a-f]{6})", _mixed, style)
    if "stroke: " not in style:  # a cell
        return begin + style
    style = re.sub(_DARK, "currentColor", style).replace("#ffffff", "var(--page, #fff)")
    if "stroke: currentColor" in style and "fill: " not in style:  # matplotlib leaves out a black one
        style = f"fill: currentColor; {style}"
    return begin + re.sub(r"(stroke): (#[0-9a-f]{6})", _mixed, style)


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
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def over_epochs(axes: Axes, legend: bool = True) -> None:
    """The x axis in whole epochs, a grid and a legend."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.dataLim.intervalx
    if low == high:
        axes.set_xlim(low - 0.5, high + 0.5)
    axes.grid(alpha=0.3, which="both")
    if legend:
        axes.legend(frameon=False)


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
