"""What ``profile`` found: rows, totals and a verdict in words, as a table for people and as data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from trtkern.output.text import aligned, short, size
from trtkern.profiling.step import judgement, stored
from trtkern.profiling.step.advice import Advice
from trtkern.profiling.step.conditions import Conditions
from trtkern.profiling.step.judgement import Doubt
from trtkern.profiling.step.parts import Operator, PartTime, together
from trtkern.profiling.step.rates import Rates
from trtkern.profiling.step.spread import Spread, spread
from trtkern.profiling.step.work import SIZES

LEGEND = (
    "ms: median of the profiled steps, each column on its own, so that sums of medians differ a little; p20, p80: a "
    "fifth of the steps took less, a fifth took more; "
    "moved, FLOP: of forward and backward together; ~: sizes of input, parameters, output and their gradients, "
    "otherwise the traffic model; FLOP: of matrix products, convolutions and attention, nothing else is counted; "
    "of limit: the time that the bytes take at the copy rate, or the FLOP at the matmul rate, whichever is longer, "
    "over the time taken; a layer around others has what it does itself; (model): the model's own forward"
)
SMALL = 0.001
"""Of the step: operators that take less are summed up."""
OTHERS, OUTSIDE = "other operators", "outside of operators"


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes. Printed, it is a table with a verdict below."""

    title: str
    """What was profiled."""
    rows: tuple[PartTime, ...]
    """The layers in the order in which they first ran, then the other parts."""
    walls: tuple[float, ...]
    """Seconds of each profiled step."""
    plains: tuple[float, ...]
    """Seconds of each step without the profiler: as many, between the profiled ones."""
    measured: tuple[Rates, ...]
    """Copy and matmul rate, measured once after each profiled step."""
    gpu: bool
    """Whether they ran on a GPU."""
    about: dict[str, str]
    """What ran: device, dtype, threads, batch, loss."""
    machine: str = ""
    """The GPU, or the CPU with its cores and instruction set."""
    kept: str | None = None
    """What is kept for the backward pass, in words."""
    conditions: tuple[Conditions, ...] = ()
    """Of each profiled step: whether the process had its processors to itself."""
    load: float | None = None
    """How many processes wanted a processor in the minute before, on average."""
    changes: tuple[str, ...] = ()
    """What differs from one profiled step to the next: layers that run, shapes."""
    operators: tuple[int, ...] = ()
    """How many operators (on a GPU kernels) ran in each profiled step, without those that load and prepare a batch."""
    advice: tuple[Advice, ...] = ()
    """What can be done about it, the largest gain first."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python, torch and this package."""
    trace: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The last profiled step for chrome://tracing or Perfetto."""

    @property
    def steps(self) -> int:
        """How many steps were profiled."""
        return len(self.walls)

    @property
    def wall(self) -> float:
        """Seconds a step under the profiler, median."""
        return median(self.walls)

    @property
    def plain(self) -> float:
        """Seconds a step without the profiler, median."""
        return median(self.plains)

    @property
    def rates(self) -> Rates:
        """Copy and matmul rate, medians."""
        return Rates(*(median(rates) for rates in zip(*self.measured, strict=True)))

    @property
    def overheads(self) -> tuple[float, ...]:
        """The share that the profiler added to a step: each profiled one beside the plain one before it."""
        return tuple(wall / plain - 1 for wall, plain in zip(self.walls, self.plains, strict=True))

    @property
    def lefts(self) -> tuple[float, ...]:
        """Seconds of each profiled step that no row has; on a GPU it may have been idle."""
        taken = together(self.rows, self.steps)
        return tuple(wall - rows for wall, rows in zip(self.walls, taken, strict=True))

    @property
    def unattributed(self) -> float:
        """Seconds of the step that no row has, median; on a GPU it may have been idle."""
        return median(self.lefts)

    @property
    def attributed(self) -> float:
        """Share of the step that the rows have."""
        return 1 - self.unattributed / self.wall

    def limit(self, parts: Iterable[PartTime]) -> tuple[float, str]:
        """Share of the roofline that these reach, and the rate that bounds most of it: "copy" or "matmul"."""
        rows = list(parts)
        limits = [part.limit(self.rates) for row in rows for part in (row.forward, row.backward)]
        taken = median(together(rows, self.steps))
        least = sum(max(limit) for limit in limits)
        matmul = sum(max(limit) for limit in limits if limit[1] > limit[0])
        return (least / taken if taken else 0.0), "matmul" if 2 * matmul > least else "copy"

    def groups(self) -> dict[str, list[PartTime]]:
        """The rows by kind, the longest first."""
        found: dict[str, list[PartTime]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return dict(sorted(found.items(), key=lambda item: -median(together(item[1], self.steps))))

    def doubts(self) -> list[Doubt]:
        """What speaks against the figures, each with what would help."""
        return judgement.doubts(self)

    def verdict(self) -> list[str]:
        """What bounds the step, in words, as far as the figures carry it."""
        return judgement.verdict(self)

    def as_rows(self) -> list[dict[str, Any]]:
        """A flat dictionary a row, for CSV or a table: seconds, bytes, FLOP, the share of the limit."""
        return [
            {
                "layer": row.name, "type": row.kind, "group": row.group, "forward_s": row.forward.seconds,
                "backward_s": row.backward.seconds, **{f"{name}_s": value for name, value in _named(row.spread)},
                "forward_bytes": row.forward.bytes, "backward_bytes": row.backward.bytes, "bytes_by": row.how,
                "forward_flop": row.forward.flops, "backward_flop": row.backward.flops, "kept_bytes": row.kept,
                "of_limit": self.limit([row])[0], "limit": self.limit([row])[1], "firing_rate": row.rate,
            }
            for row in self.rows
        ]  # fmt: skip

    HEAD = (
        "layer", "type", "forward ms", "backward ms", "ms", "p20", "p80", "of step", "moved", "kept", "MFLOP", "FLOP/B",
        "of limit", "rate",
    )  # fmt: skip

    def table(self, kernels: bool = False) -> list[tuple[str, ...]]:
        """The rows as text, below ``HEAD``, with what is unattributed and the sum.

        Args:
            kernels: below each row what ran for it, indented; where a row has its type that is how often.
        """
        lines = []
        for row in self.rows:
            lines.append(self._line(row))
            if kernels:
                lines += [(f"  {line[0]}", *line[1:], *("",) * 6) for line in self.inside(row)]
        rest = ("",) * 6
        for name, times in (("unattributed", self.lefts), ("step", self.walls)):
            lines.append((name, "", "", "", *self._times(times), *rest))
        return lines

    def inside(self, row: PartTime) -> list[tuple[str, ...]]:
        """What ran for a row, the longest first: name, calls, then as in the table up to its share of the step.

        What takes less than a thousandth of the step is summed up. On a CPU the last line is the row's time outside of
        all operators: Python, autograd, the dispatcher.
        """
        nothing = Operator("", (0.0,) * self.steps, 0)
        halves = [{each.name: each for each in part.operators} for part in (row.forward, row.backward)]
        pairs = {name: [half.get(name, nothing) for half in halves] for name in (*halves[0], *halves[1])}

        def both(name: str) -> tuple[float, ...]:
            return tuple(map(sum, zip(*(each.times for each in pairs[name]), strict=True)))

        if not pairs:
            return []
        shown = sorted(pairs, key=lambda name: -median(both(name)))
        large = [name for name in shown if median(both(name)) >= SMALL * self.wall]
        small = [name for name in shown if name not in large]
        lines = [self._ran(name, *pairs[name]) for name in large]
        if small:
            sums = [_summed([pairs[name][half] for name in small]) for half in (0, 1)]
            lines.append(self._ran(OTHERS, *sums))
        if not self.gpu:
            spare = [
                tuple(t - sum(each.times[step] for each in part.operators) for step, t in enumerate(part.times))
                for part in (row.forward, row.backward)
            ]
            lines.append(self._ran(OUTSIDE, *(Operator(OUTSIDE, times, 0) for times in spare)))
        return lines

    def _ran(self, name: str, forward: Operator, backward: Operator) -> tuple[str, ...]:
        calls = forward.calls + backward.calls
        times = tuple(map(sum, zip(forward.times, backward.times, strict=True)))
        halves = (f"{1e3 * each.seconds:.2f}" for each in (forward, backward))
        return (short(name, 48), "" if not calls else f"{calls} call{'s' * (calls > 1)}", *halves, *self._times(times))

    def _times(self, times: tuple[float, ...]) -> tuple[str, str, str, str]:
        found = spread(times)
        low, middle, high = (f"{1e3 * seconds:.2f}" for seconds in found)
        return middle, low, high, f"{found.p50 / self.wall:.1%}"

    def _line(self, row: PartTime) -> tuple[str, ...]:
        reached, _ = self.limit([row])
        mark = "~" if row.how == SIZES else ""
        return (
            row.name,
            row.kind,
            f"{1e3 * row.forward.seconds:.2f}",
            f"{1e3 * row.backward.seconds:.2f}",
            *self._times(row.times),
            mark + size(round(row.bytes)) if row.bytes else "",
            "" if row.kept is None else size(row.kept),
            f"{1e-6 * row.flops:,.1f}" if row.flops else "",
            "" if row.intensity is None else f"{row.intensity:.1f}",
            f"{reached:.0%}" if row.bytes else "",
            "" if row.rate is None else f"{row.rate:.3f}",
        )

    def notes(self) -> list[str]:
        """What ran, and what the figures stand on."""
        what = ", ".join(f"{name} {value}" for name, value in self.about.items())
        plain, cost = spread(self.plains), spread(self.overheads)
        rates = (spread(each) for each in zip(*self.measured, strict=True))
        copy, product = (f"{1e-9 * r.p50:.1f} ({1e-9 * r.p20:.1f} to {1e-9 * r.p80:.1f})" for r in rates)
        return [
            f"{self.title}: {what}",
            f"{1e3 * plain.p50:.2f} ms a step without the profiler (median of {self.steps}; p20 to p80: "
            f"{1e3 * plain.p20:.2f} to {1e3 * plain.p80:.2f} ms); the profiler adds {cost.p50:+.1%} "
            f"({cost.p20:+.1%} to {cost.p80:+.1%})",
            f"copy rate {copy} GB/s, matmul rate {product} GFLOP/s: medians of the same rounds (p20 to p80)",
            *([] if self.kept is None else [self.kept]),
        ]

    def said(self) -> list[str]:
        """What is to be said of the figures: warnings, the verdict, what can be done."""
        warned = [f"Warning: {doubt}" for doubt in self.doubts()]
        tried = [f"  - {advice}" for advice in self.advice]
        return [*warned, *self.verdict(), *(["What can be done:", *tried] if tried else [])]

    def text(self, kernels: bool = False) -> str:
        """The table, what it stands on, warnings, verdict and advice; with ``kernels`` the operators of each row."""
        lines = [self.HEAD, *self.table(kernels)]
        shown = aligned(lines, right=range(2, len(self.HEAD)))
        return "\n".join(line.rstrip() for line in (*shown, "", *self.notes(), LEGEND, "", *self.said()))

    def __str__(self) -> str:
        return self.text()

    def write_trace(self, path: Path) -> None:
        """The last profiled step as JSON for chrome://tracing or ui.perfetto.dev.

        Raises:
            OSError: the file cannot be written.
        """
        path.write_text(json.dumps(self.trace), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """All of it but the trace, ready for ``json.dumps``; docs/reading-a-profile.md lists the fields."""
        said = {"doubts": [doubt._asdict() for doubt in self.doubts()], "verdict": self.verdict()}
        return {**stored.to_json(self), "said": said}

    @classmethod
    def from_json(cls, found: dict[str, Any], name: str = "the profile") -> StepProfile:
        """What ``to_json`` made.

        Args:
            found: as it was.
            name: what an error calls it: the file, say.

        Raises:
            ValueError: it is no profile, or one of another version of the format.
        """
        return stored.from_json(cls, found, name)


def _named(found: Spread) -> Iterable[tuple[str, float]]:
    return found._asdict().items()


def _summed(ran: list[Operator]) -> Operator:
    times = tuple(map(sum, zip(*(each.times for each in ran), strict=True)))
    return Operator(OTHERS, times, sum(each.calls for each in ran))
