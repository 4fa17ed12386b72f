"""The rows as a picture: the time of every candidate, and the roof, which is the copy rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from trtkern.bench.rows import Row
from trtkern.bench.table import DIRECTIONS, three

OURS, THEIRS, COPY = "#d1603d", "#3b6ea8", "#8a8a8a"


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


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of one machine: a panel for each case and direction, times on a logarithmic axis.

    The dashed line is the roof: the time in which ``copy_`` would move the least bytes of the case. The kernels do a
    few operations a byte, so it is memory that limits them.

    Raises:
        OSError: the file cannot be written.
    """
    timed = {key: [row for row in group if row.status == "ok"] for key, group in groups(rows).items()}
    panels = {key: sorted(group, key=lambda row: -row.p50_ms) for key, group in timed.items() if group}
    columns = 1 if len(panels) < 4 else 3
    sizes = [len(group) for group in panels.values()]
    heights = [max(sizes[at : at + columns]) + 2.5 for at in range(0, len(sizes), columns)]
    figure = Figure(figsize=(9 if columns == 1 else 7 * columns, 0.24 * sum(heights) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(rows[0].machine, parse_math=False, fontsize=10)
    places = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis in places.flat[len(panels) :]:
        axis.set_axis_off()
    axes = places.flat[: len(panels)]
    for axis, ((case, direction), group) in zip(axes, panels.items(), strict=True):
        axis.set_title(f"{case}, {DIRECTIONS[direction]}", fontsize=9, loc="left", parse_math=False)
        axis.barh(
            [row.candidate for row in group], [row.p50_ms for row in group], height=0.7,
            color=[OURS if row.library == "trtkern" else COPY if row.candidate == "copy_" else THEIRS for row in group],
        )  # fmt: skip
        for at, row in enumerate(group):
            axis.text(row.p50_ms * 1.04, at, three(row.p50_ms), va="center", fontsize=7)
        copy = next((row for row in group if row.candidate == "copy_"), None)
        ours = next((row for row in group if row.library == "trtkern" and row.bytes), None)
        if copy is not None and ours is not None:
            axis.axvline(ours.p50_ms * ours.copy_share, color="black", linestyle="--", linewidth=0.9)
        axis.set_xscale("log")
        low, high = min(row.p50_ms for row in group), max(row.p50_ms for row in group)
        axis.set_xlim(low / 1.6, high * 2)
        if high < 20 * low:
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=7)
        axis.margins(y=0.02)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.set_xlabel("ms (median); dashed: the least bytes of the case at the rate of copy_", fontsize=7)
    figure.savefig(path, dpi=110 if columns == 1 else 80)
