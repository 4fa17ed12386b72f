"""The rows of a case and direction as a table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from trtkern.bench.rows import Row

DIRECTIONS = {
    "fwd": "forward, without a graph", "train-fwd": "forward", "bwd": "backward", "both": "forward + backward",
}  # fmt: skip


def number(value: float, form: str, unknown: str = "") -> str:
    """Formatted; what was not measured as ``unknown``."""
    return unknown if math.isnan(value) else format(value, form)


def three(value: float) -> str:
    """Three digits; whole numbers from 1,000 on."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The measured ones by time, then those that were not timed."""
    return sorted(rows, key=lambda row: (row.status != "ok", row.p50_ms if row.status == "ok" else 0.0))


def table(rows: Sequence[Row]) -> Table:
    """Rows of one case and direction."""
    first = rows[0]
    made = Table(
        title=f"{first.case}, {DIRECTIONS[first.direction]}  ({first.machine}, {first.threads} threads)",
        title_justify="left",
    )
    unit, scale = ("us", 1e3) if first.op == "overhead" else ("ms", 1.0)
    times = tuple(f"p{part} {unit}" for part in (20, 50, 80))
    for name in ("candidate", *times, "GB/s", "of copy", "x trtkern", "peak MiB", "compile s"):
        made.add_column(name, justify="left" if name == "candidate" else "right", no_wrap=name != "candidate")
    made.add_column("note")
    for row in ordered(rows):
        if row.status != "ok":
            style = "red" if row.status in ("WRONG", "failed") else "dim"
            made.add_row(Text(row.candidate), *[""] * 8, Text(f"{row.status}: {row.note}"), style=style)
            continue
        few = f"{row.rounds} rounds" if row.rounds < 3 else ""
        made.add_row(
            Text(row.candidate), *(number(scale * value, ".3f") for value in (row.p20_ms, row.p50_ms, row.p80_ms)),
            number(row.gb_per_s, ".1f"), number(row.copy_share, ".0%"), number(row.times_ours, ".2f"),
            f"{row.peak_bytes / 2**20:.1f}" if row.peak_bytes >= 0 else "",
            number(row.compile_s, ".1f") if row.compile_s else "",
            Text("; ".join(filter(None, (row.note, few)))),
            style="bold" if row.library == "trtkern" else None,
        )  # fmt: skip
    return made
