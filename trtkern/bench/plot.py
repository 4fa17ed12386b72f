"""The rows as a picture: the time of every candidate with its interval, and the copy rate, which is the limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from trtkern.bench.rows import Row
from trtkern.bench.table import DIRECTIONS, three
from trtkern.output import style
from trtkern.output.pictures import interval, plain, sheet
from trtkern.output.pictures import rows as named_rows

YARDSTICKS = ("copy_", "Linear alone", "BatchNorm alone")
"""Candidates that are no other implementation of what is measured."""
KEY = "blue: trtkern, orange: others, grey: yardsticks; a dot is the median, its line reaches from p20 to p80"


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by case and direction, in the order in which they came; a case that was measured again, only its last."""
    made: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        made.setdefault((row.case, row.direction), []).append(row)
    for key, group in made.items():
        last = group[-1]
        run = (last.date, last.commit, last.command)
        newest = {row.candidate: row for row in group if (row.date, row.commit, row.command) == run}
        made[key] = list(newest.values())
    return made


def limit(group: Sequence[Row]) -> float | None:
    """Milliseconds in which ``copy_`` would move the least bytes of a case; None where that was not measured."""
    copied = any(row.candidate == "copy_" for row in group)
    ours = next((row for row in group if row.library == "trtkern" and row.status == "ok" and row.bytes), None)
    return ours.p50_ms * ours.copy_share if copied and ours is not None else None


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of one machine: a panel for each case and direction, times on a logarithmic axis.

    The dashed line is the limit: the time in which ``copy_`` would move the least bytes of the case. The kernels do a
    few operations a byte, so it is memory that limits them.

    Raises:
        OSError: the file cannot be written.
    """
    timed = {key: [row for row in group if row.status == "ok"] for key, group in groups(rows).items()}
    panels = {key: sorted(group, key=lambda row: row.p50_ms) for key, group in timed.items() if group}
    columns = 1 if len(panels) < 4 else 2
    sizes = [len(group) for group in panels.values()]
    heights = [style.tall(max(sizes[at : at + columns]), 1.6, 1.3) for at in range(0, len(sizes), columns)]
    title = f"{rows[0].machine}, {rows[0].threads} threads\n{KEY}"
    with sheet(path, (columns * 1.5 * style.WIDTH, sum(heights) + 0.5), title) as figure:
        places = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axes in places.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, ((case, direction), group) in zip(places.flat, panels.items(), strict=False):
            panel(axes, group)
            axes.set_title(f"{case}, {DIRECTIONS[direction]}", loc="right", parse_math=False)


def panel(axes: Axes, group: Sequence[Row]) -> None:
    """The candidates of a case, the fastest on top. ``copy_`` is the limit, and no row, where that is known: it copies
    another number of bytes."""
    at_best = limit(group)
    group = [row for row in group if row.candidate != "copy_" or not at_best]
    for at, row in enumerate(group):
        aside = row.candidate in YARDSTICKS or "ReLU" in row.candidate
        color = style.OURS if row.library == "trtkern" else style.ASIDE if aside else style.THEIRS
        interval(axes, at, (row.p20_ms, row.p50_ms, row.p80_ms), color)
        axes.annotate(
            three(row.p50_ms), (max(row.p80_ms, row.p50_ms), at), xytext=(7, 0), textcoords="offset points",
            va="center", fontsize=style.SMALL,
        )  # fmt: skip
    named_rows(axes, [row.candidate for row in group])
    times = [row.p50_ms for row in group] + ([at_best] if at_best else [])
    axes.set_xlim(min(times) / 1.5, max([*times, *(row.p80_ms for row in group)]) * 2.2)
    plain(axes)
    if at_best:
        axes.axvline(at_best, color=style.DARK, linestyle="--", linewidth=1.2)
        axes.annotate(
            "copy limit", (at_best, -0.5), xytext=(3, 2), textcoords="offset points", fontsize=style.SMALL, va="bottom"
        )
        axes.set_ylim(len(group) - 0.5, -1.2)
    axes.set_xlabel("ms a call (logarithmic)")
