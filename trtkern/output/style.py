"""The style of everything that is drawn: the one place with a colour, a size of type or a size of a picture in it.

Plain words and numbers, so that what only names a colour needs no matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SERIES = ("#3b6ea8", "#d1603d", "#00b4a5", "#963c4b", "#c3a500", "#78a5ff", "#006900", "#0069e1")
"""Of the series in a picture: legible on white and on black, and told apart by those too who do not see red, green or
blue as others do."""
MARKS = "os^Dv<>P"
"""Beside the colours of as many series, for printers and eyes that tell colours apart badly."""
OURS, THEIRS = SERIES[0], SERIES[1]
"""This project, and whoever it is set beside."""
ASIDE = "#7a7a7a"
"""What is neither: a yardstick, a limit, a line at 0."""
DARK = "#222222"
"""A line that is measured and bounds the others; on a page it becomes the page's ink."""
EMPTY = "white"
"""The inside of an open dot; on a page it becomes the page's paper."""
SPLITS = {"train": SERIES[0], "validation": SERIES[1], "test": SERIES[1]}
KINDS = {
    "convolutions": SERIES[0], "linear layers": SERIES[5], "neurons": SERIES[1], "normalisation": SERIES[2],
    "other layers": ASIDE,
}  # fmt: skip
"""Of the parts of a step."""

SHADES, COUNTS, SHARES, AROUND = "viridis", "Blues", "YlGnBu", "RdBu"
"""Maps of numbers, of counts, of shares of a best, and of ratios around 1, on which this project is the blue side."""
ON_SHADE = {False: "black", True: "white"}
"""Words on a cell of a map, by whether it is dark."""

TITLE, TEXT, SMALL = 11.0, 10.0, 9.5
"""Points. Nothing is set in less than ``SMALL``: where a page shows a picture smaller, the words still have 10 pixels
(``LEAST``)."""
PX = 96 / 72
"""Pixels of a point."""
LEAST, MOST = 10 / (PX * SMALL), 1.1
"""How much smaller (it scrolls then) and larger than it was drawn a page shows a picture."""
WIDTH, HEIGHT = 4.6, 3.3
"""Inches: two stand beside each other on a page, and one fills the width of a phone."""
WHOLE = 9.2
"""Inches: a picture with a row for itself."""
ROW = 0.22
"""Inches of a row with a name in it."""
DPI = 120
"""Of a file: about a page's width for two pictures beside each other."""

BLACK, WHITE = "#000000", "#ffffff"
"""As matplotlib writes them."""
INK = "#010203"
"""What is drawn in no colour of its own: the page's ink takes its place."""
LIGHT = {
    "page": "#fff", "ink": "#1a1a1a", "soft": "#505050", "line": "#dcdcdc", "band": "#f4f5f7", "link": "#1d5c9e",
    "alarm": "#b3261e", "lift": "0%", "sink": "30%",
}  # fmt: skip
"""A page's colours; ``lift`` and ``sink``: how much white or black dark and light colours are mixed with."""
NIGHT = {
    "page": "#15181c", "ink": "#e4e6e9", "soft": "#a9afb7", "line": "#363c44", "band": "#1f2329", "link": "#86b7f0",
    "alarm": "#f08379", "lift": "40%", "sink": "0%",
}  # fmt: skip


def series(number: int) -> str:
    """The colour of a series, counted from 0; they begin anew after the last."""
    return SERIES[number % len(SERIES)]


def mark(number: int) -> str:
    """Likewise its mark."""
    return MARKS[number % len(MARKS)]


def tall(rows: int, least: float = 2.4, around: float = 1.2) -> float:
    """Inches of a picture with so many rows of names, ``around`` of them for title and axis."""
    return max(least, around + ROW * rows)


def css(colors: Mapping[str, str]) -> str:
    """A page's colours as the declarations of a style sheet."""
    return " ".join(f"--{name}: {value};" for name, value in colors.items())


def options() -> dict[str, Any]:
    """What matplotlib is told (``rcParams``)."""
    return {
        "font.family": "sans-serif", "font.size": TEXT, "axes.titlesize": TITLE, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.titlepad": 8.0, "axes.labelsize": TEXT, "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "legend.frameon": False, "figure.titlesize": TITLE,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "grid.alpha": 0.3,
        "axes.axisbelow": True, "lines.linewidth": 1.6, "lines.markersize": 4.0, "axes.linewidth": 0.8,
        "axes.prop_cycle": _cycle(), "image.cmap": SHADES,
    }  # fmt: skip


def _cycle() -> Any:
    from cycler import cycler

    return cycler(color=SERIES)
