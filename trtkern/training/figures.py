"""The pictures of a run: each draws on the axes that it is given, from plain rows and tensors."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from trtkern.profiling.activity import LayerActivity

COLORS = {"train": "#3b6ea8", "validation": "#d1603d", "test": "#d1603d"}
NUMBERED = 20
"""Classes up to which the confusion matrix shows its numbers."""
_VECTOR = 2500
"""Cells up to which a heat map is drawn as rectangles; above it is an image."""

Row = Mapping[str, Any]


def splits(rows: Sequence[Row]) -> list[str]:
    """The splits that the rows have averages of, training first."""
    return [name for name in COLORS if any(name in row for row in rows)]


def loss(axes: Axes, rows: Sequence[Row]) -> None:
    """Total loss over the epochs, and the cross entropy where it is another."""
    positive = True
    for name in splits(rows):
        epochs, total = series(rows, name, "loss")
        _, cross_entropy = series(rows, name, "cross_entropy")
        style = _style(name, epochs)
        axes.plot(epochs, total, label=f"{name} loss", **style)
        if cross_entropy != total:
            axes.plot(epochs, cross_entropy, label=f"{name} cross entropy", linestyle="--", linewidth=1, **style)
        positive = positive and all(value > 0 for value in (*total, *cross_entropy))
    axes.set(xlabel="epoch", ylabel="loss", title="loss")
    if positive:
        logarithmic(axes)
    over_epochs(axes)


def accuracy(axes: Axes, rows: Sequence[Row]) -> None:
    """Accuracy over the epochs, in per cent; the title has the last one of the held-out split."""
    for name in splits(rows):
        epochs, values = series(rows, name, "accuracy")
        axes.plot(epochs, [100 * value for value in values], label=name, **_style(name, epochs))
    name = splits(rows)[-1]
    epochs, values = series(rows, name, "accuracy")
    title = f"{name} accuracy after epoch {epochs[-1]}: {100 * values[-1]:.2f} %"
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title=title)
    over_epochs(axes)


def learning_rate(axes: Axes, rows: Sequence[Row]) -> None:
    """The learning rate at the beginning of each epoch."""
    epochs = [row["epoch"] for row in rows]
    axes.plot(epochs, [row["lr"] for row in rows], **_style("train", epochs))
    axes.set(xlabel="epoch", ylabel="learning rate", title="learning rate")
    axes.set_ylim(bottom=0)
    over_epochs(axes, legend=False)


def confusion(axes: Axes, counts: Tensor, classes: Sequence[str]) -> None:
    """Counts [C, C], a row a true class; the shade is the root of the share of the row: small ones are seen too."""
    number = len(classes)
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    _heat(axes, share.sqrt().tolist(), "Blues")
    if number <= NUMBERED:
        for i, row in enumerate(counts.tolist()):
            for j, count in enumerate(row):
                if count:
                    shade = "white" if share[i, j] > 0.3 else "black"
                    axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color=shade)
        shown = list(range(number))
    else:
        shown = list(range(0, number, 5 * math.ceil(number / 100)))
    labels = [short(classes[i], 18) for i in shown]
    axes.set_xticks(shown, labels, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(shown, labels, fontsize=7, parse_math=False)
    axes.set(xlabel="taken for", ylabel="true class", aspect="equal")


def firing(axes: Axes, activity: Mapping[str, LayerActivity]) -> None:
    """Mean rate of each layer at each step."""
    steps = max(len(layer.rate) for layer in activity.values())
    cells = [layer.rate.tolist() + [math.nan] * (steps - len(layer.rate)) for layer in activity.values()]
    image = _heat(axes, cells, "viridis", high=max(float(layer.rate.max()) for layer in activity.values()))
    names = [short(name, 28) for name in activity]
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axes.set_xticks(ticks := _few(steps), [str(step + 1) for step in ticks])
    axes.set(xlabel="timestep", title="spikes per neuron and step")
    axes.figure.colorbar(image, ax=axes)


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


def short(text: str, length: int) -> str:
    """The text, printable, without its middle where it is longer."""
    text = printable(text)
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - half]}…{text[-half:]}"


def printable(text: object) -> str:
    """As a string, with a replacement for what no document may hold: control characters, single surrogates."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def series(rows: Sequence[Row], split: str, part: str) -> tuple[list[int], list[float]]:
    """(epochs, values) of a part of the averages of a split."""
    found = [(row["epoch"], row[split][part]) for row in rows if split in row]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _style(name: str, epochs: Sequence[int]) -> dict[str, Any]:
    return {"color": COLORS[name], "marker": "o" if len(epochs) <= 30 else None, "markersize": 3}


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


def _heat(axes: Axes, cells: list[list[float]], colors: str, high: float = 1.0) -> Any:
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


def _few(count: int) -> list[int]:
    """At most 12 indices below ``count``, evenly spaced from 0."""
    return list(range(0, count, math.ceil(count / 12)))
