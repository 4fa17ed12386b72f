"""Two profiles side by side: what became faster, what slower, and what cannot be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, NamedTuple

from trtkern.output.text import aligned
from trtkern.profiling.step.judgement import quieter
from trtkern.profiling.step.parts import PartTime
from trtkern.profiling.step.report import StepProfile
from trtkern.profiling.step.spread import interval

Said = Literal["faster", "slower", "cannot be told", "new", "gone"]
MISS = 0.1
"""The chance that any of the intervals of a comparison misses its median, all rows together."""
TOTALS = ("unattributed", "step, profiled", "step")
"""The lines below the rows; the last is the step without the profiler."""


class Difference(NamedTuple):
    """A row of both profiles, or of one."""

    name: str
    """Of the layer or the part of the step."""
    kind: str
    """The name of its class, "BatchNorm2d -> BatchNormLIF" where that is another one now."""
    before: float | None
    """Seconds, median; None: it was not there."""
    after: float | None
    """None: it is gone."""
    low: float | None
    """``after`` less ``before`` in seconds, at the least."""
    high: float | None
    """At the most."""
    said: Said
    """Whether it became faster or slower, where that can be told."""

    @property
    def change(self) -> float | None:
        """The share by which it takes longer now; below 0 it is faster."""
        return self.after / self.before - 1 if self.before and self.after is not None else None


@dataclass(frozen=True)
class ProfileComparison:
    """What ``compare`` found. Printed, it is a table with a verdict below."""

    before: StepProfile
    after: StepProfile
    rows: tuple[Difference, ...]
    """The layers and parts of ``after`` in their order, then those that are gone, then the totals."""
    notes: tuple[str, ...]
    """In what the two differ besides their times, and what speaks against comparing them."""

    @property
    def total(self) -> Difference:
        """Of the step without the profiler."""
        return self.rows[-1]

    HEAD = ("layer", "type", "before ms", "after ms", "difference ms", "change", "")

    def table(self) -> list[tuple[str, ...]]:
        """The rows as text, below ``HEAD``."""
        return [
            (
                row.name, row.kind, _ms(row.before), _ms(row.after),
                "" if row.low is None or row.high is None else f"{1e3 * row.low:+.2f} to {1e3 * row.high:+.2f}",
                "" if row.change is None else f"{row.change:+.1%}",
                row.said,
            )
            for row in self.rows
        ]  # fmt: skip

    def verdict(self) -> str:
        """Whether the step became faster, in words."""
        total = self.total
        assert total.before is not None and total.after is not None and total.low is not None and total.high is not None
        times = f"{_ms(total.before)} ms before, {_ms(total.after)} ms after"
        between = f"the difference is between {1e3 * total.low:+.2f} and {1e3 * total.high:+.2f} ms"
        if total.said == "cannot be told":
            return f"Whether the step became faster cannot be told: {times}; {between}; {quieter(self.after)}."
        return f"The step is {total.said}: {times} ({total.change:+.1%}; {between})."

    def to_json(self) -> dict[str, Any]:
        """The rows, the notes and the verdict, ready for ``json.dumps``."""
        return {
            "schema": "trtkern profile comparison", "version": 1, "rows": [row._asdict() for row in self.rows],
            "notes": list(self.notes), "verdict": self.verdict(),
        }  # fmt: skip

    def __str__(self) -> str:
        shown = aligned([self.HEAD, *self.table()], right=(2, 3, 4, 5))
        return "\n".join(line.rstrip() for line in (*shown, "", *self.notes, self.verdict()))


def compare(before: StepProfile, after: StepProfile) -> ProfileComparison:
    """Set two profiles side by side, row by row, by the names of the layers.

    The median of a row lies in an interval (``spread.interval``, so narrow that all of them together are right in nine
    of ten comparisons). A row is faster or slower where the two intervals do not meet. They are made wider first by
    what is known of the machine: a step for a share of which a thread waited for a processor may have taken that share
    less, and where the machine copied or multiplied more slowly in one profile, that may be all the difference. Where a
    profile has too few steps, or its model changes between them, nothing is said of any row.

    Args:
        before: a profile.
        after: another one, of what is to be compared with it; of the same model on the same machine, or the notes say
            in what they differ.
    """
    names = [row.name for row in after.rows]
    old, new = ({row.name: row for row in found.rows} for found in (before, after))
    names += [name for name in old if name not in new]
    miss = MISS / (len(names) + len(TOTALS))
    blind = {doubt.kind for found in (before, after) for doubt in found.doubts() if doubt.fatal}
    rows = [_row(name, old.get(name), new.get(name), before, after, miss, bool(blind)) for name in names]
    totals = [(before.lefts, after.lefts), (before.walls, after.walls), (before.plains, after.plains)]
    for name, (first, second) in zip(TOTALS, totals, strict=True):
        low, high = _difference(first, second, before, after, miss)
        untold = bool(blind - {"overhead"} if name == TOTALS[-1] else blind)
        said = "cannot be told" if untold else _said(low, high)
        rows.append(Difference(name, "", median(first), median(second), low, high, said))
    return ProfileComparison(before, after, tuple(rows), tuple(_notes(before, after)))


def _row(
    name: str, old: PartTime | None, new: PartTime | None, before: StepProfile, after: StepProfile, miss: float,
    untold: bool,
) -> Difference:  # fmt: skip
    if old is None or new is None:
        present = new or old
        assert present is not None
        times = (None if old is None else old.seconds, None if new is None else new.seconds)
        return Difference(name, present.kind, *times, None, None, "new" if old is None else "gone")
    low, high = _difference(old.times, new.times, before, after, miss)
    kind = new.kind if old.kind == new.kind else f"{old.kind} -> {new.kind}"
    said = "cannot be told" if untold else _said(low, high)
    return Difference(name, kind, old.seconds, new.seconds, low, high, said)


def _said(low: float, high: float) -> Said:
    return "slower" if low > 0 else "faster" if high < 0 else "cannot be told"


def _difference(
    first: Sequence[float], second: Sequence[float], before: StepProfile, after: StepProfile, miss: float
) -> tuple[float, float]:
    """Between what seconds the second less the first lies."""
    one, other = _between(first, before, miss), _between(second, after, miss)
    paces = [1.0]
    if before.machine == after.machine:  # of another machine the pace is part of the answer
        paces += [new / old for old, new in zip(before.rates, after.rates, strict=True)]
    other = (other[0] * min(paces), other[1] * max(paces))  # as it may be at the pace of the first
    return other[0] - one[1], other[1] - one[0]


def _between(times: Sequence[float], found: StepProfile, miss: float) -> tuple[float, float]:
    """Where the median lies on a machine on which nothing waits."""
    low, high = interval(times, miss)
    waits = [each.waited or 0.0 for each in found.conditions] or [0.0] * len(times)
    least = interval([seconds * (1 - waited) for seconds, waited in zip(times, waits, strict=True)], miss)[0]
    return min(low, least), high


def _notes(before: StepProfile, after: StepProfile) -> list[str]:
    """In what they differ, and what speaks against each."""
    said = []
    if before.machine != after.machine:
        said.append(
            f"Another machine: {before.machine} before, {after.machine} after; the difference is theirs as well."
        )
    if before.title != after.title:
        said.append(
            f"Another model: {before.title} before, {after.title} after; rows are matched by their names alone."
        )
    old, new = ({row.name for row in found.rows if row.kind} for found in (before, after))
    if before.title == after.title and not old & new:
        said.append("Another model: no layer of one has the name of a layer of the other.")
    for name in dict.fromkeys((*before.about, *after.about)):
        was, is_ = before.about.get(name, "none"), after.about.get(name, "none")
        if was != is_:
            said.append(f"Another {name}: {was} before, {is_} after.")
    for name in dict.fromkeys((*before.versions, *after.versions)):
        was, is_ = before.versions.get(name, "none"), after.versions.get(name, "none")
        if was != is_:
            said.append(f"Another version of {name}: {was} before, {is_} after.")
    for when, found in (("Before", before), ("After", after)):
        said += [f"{when}: {doubt}" for doubt in found.doubts()]
    return said


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"
