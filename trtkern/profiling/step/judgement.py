"""What a profile lets one say: whether its figures can be trusted, and what bounds the step if they can."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple

from trtkern.profiling.step.parts import PartTime, together
from trtkern.profiling.step.spread import interval, spread

if TYPE_CHECKING:
    from trtkern.profiling.step.report import StepProfile

LEAST_STEPS = 3
"""Profiled steps from which on there is a verdict."""
OVERHEAD = (-0.02, 0.3)
"""What the profiler may seem to add to a step: it cannot make one faster, so less than nothing is noise, of which a
fiftieth is let pass; and a step that it makes longer by so much is no longer the step that was asked about."""
WAITED = 0.05
"""Share of a step for which a thread may be without a processor."""
SWITCHES = 50.0
"""Times a second that a thread may lose its processor, where the system does not say how long it waited."""
SCATTER = 0.25
"""How far p20 and p80 of the copy rate may be apart, as a share of its median."""


class Doubt(NamedTuple):
    """What speaks against the figures of a profile."""

    kind: Literal["steps", "changes", "operators", "overhead", "busy", "rates"]
    what: str
    """In words."""
    helps: str
    """What would help, in words."""
    fatal: bool
    """Whether there is no verdict for it."""

    def __str__(self) -> str:
        return f"{self.what}; {self.helps}."


def quieter(found: StepProfile) -> str:
    """What helps against times that scatter."""
    threads = "" if found.gpu or found.about.get("threads") == "1" else ", --threads 1"
    return f"a quieter machine{threads} or more --steps would help"


def doubts(found: StepProfile) -> list[Doubt]:
    """All of them, those for which there is no verdict first."""
    made = [*_of_steps(found), *_of_changes(found), *_of_overhead(found), *_of_machine(found)]
    return sorted(made, key=lambda doubt: not doubt.fatal)


def _of_steps(found: StepProfile) -> list[Doubt]:
    if found.steps >= LEAST_STEPS:
        return []
    what = (
        f"{found.steps} profiled step{'s' * (found.steps > 1)} do{'es' * (found.steps == 1)} not say how times scatter"
    )
    return [Doubt("steps", what, f"take {LEAST_STEPS} --steps or more", True)]


def _of_changes(found: StepProfile) -> list[Doubt]:
    alike = "give it batches of one shape, and profile apart what takes turns"
    made = [Doubt("changes", f"the model changes between steps: {what}", alike, True) for what in found.changes]
    if not made and len(set(found.operators)) > 1:
        what = f"{'kernels' if found.gpu else 'operators'} differ between steps"
        what += f": {min(found.operators):,} to {max(found.operators):,} ran"
        helps = "the medians are of steps that are not quite alike; see in --trace what comes and goes"
        made.append(Doubt("operators", what, helps, False))
    return made


def _of_overhead(found: StepProfile) -> list[Doubt]:
    cost, (low, high) = spread(found.overheads), OVERHEAD
    between = f"p20 to p80: {cost.p20:+.0%} to {cost.p80:+.0%}"
    if cost.p50 < low:
        what = f"steps were faster under the profiler ({cost.p50:+.1%}; {between}), so that the times are noise"
        return [Doubt("overhead", what, quieter(found), True)]
    if cost.p50 > high:
        what = f"the profiler makes the step {cost.p50:.0%} longer ({between}), and that of small operators most"
        return [Doubt("overhead", what, "a larger batch would help", True)]
    return []


def _of_machine(found: StepProfile) -> list[Doubt]:
    made = []
    waits = [each.waited for each in found.conditions if each.waited is not None]
    lost = [each.switches for each in found.conditions if each.switches is not None]
    others = "" if found.load is None else f" (load in the minute before: {found.load:.1f})"
    if waits:
        if (share := median(waits)) > WAITED:
            what = f"the machine is busy: a thread of the step waited {share:.0%} of it for a processor{others}"
            made.append(Doubt("busy", what, quieter(found), False))
    elif lost and (often := sum(lost) / sum(found.walls)) > SWITCHES:
        what = f"the machine is busy: the step lost a processor {often:,.0f} times a second{others}"
        made.append(Doubt("busy", what, quieter(found), False))
    copies = spread([rates.copy for rates in found.measured])
    if (apart := (copies.p80 - copies.p20) / copies.p50) > SCATTER:
        what = f"the copy rate scatters by {apart:.0%}, and with it how far layers are from their limit"
        made.append(Doubt("rates", what, quieter(found), False))
    return made


def verdict(found: StepProfile) -> list[str]:
    """What bounds the step. Where a doubt or the spread forbids it that is said instead."""
    if fatal := [doubt for doubt in found.doubts() if doubt.fatal]:
        return [f"No verdict: {'; '.join(doubt.what for doubt in fatal)}."]
    return [_shares(found), _bound(found)]


def _shares(found: StepProfile) -> str:
    """The share of each group, and how near it comes to its limit."""
    said = []
    for name, rows in found.groups().items():
        share = median(together(rows, found.steps)) / found.wall
        if share < 0.005:
            continue
        reached, which = found.limit(rows)
        rate = f" (at {reached:.0%} of the {which} rate)" if reached >= 0.005 else ""
        said.append(f"{share:.1%} in {name}{rate}")
    left = "idle or unattributed" if found.gpu else "unattributed"
    return f"{'; '.join(said)}; {found.unattributed / found.wall:.1%} {left}."


def _bound(found: StepProfile) -> str:
    groups = found.groups()
    parts = {name: together(rows, found.steps) for name, rows in groups.items()}
    nobody = "the GPU without work" if found.gpu else "what is in no layer"
    parts[nobody] = found.lefts
    first, *others = sorted(parts, key=lambda name: -median(parts[name]))
    if others and (tie := _tie(first, parts[first], others[0], parts[others[0]])):
        return f"No verdict: the two longest parts, {tie}; {quieter(found)}."
    if first == nobody:
        return "Most of the step is " + ("the GPU waiting for its host." if found.gpu else "in no layer.")
    return _of_group(found, first, groups[first])


def _tie(one: str, first: tuple[float, ...], other: str, second: tuple[float, ...]) -> str | None:
    """Says that two parts cannot be told apart, if they cannot; each step has a difference of them."""
    low, high = interval([a - b for a, b in zip(first, second, strict=True)])
    if low > 0:
        return None
    between = f"their difference is between {1e3 * low:+.2f} and {1e3 * high:+.2f} ms"
    return (
        f"{one} ({1e3 * median(first):.2f} ms) and {other} ({1e3 * median(second):.2f} ms), cannot be told apart: "
        f"{between}"
    )


def _of_group(found: StepProfile, name: str, rows: list[PartTime]) -> str:
    """What bounds the kind of layers that takes longest, and which of them most of all."""
    longest, *others = sorted(rows, key=lambda row: -row.seconds)
    where = longest.name
    if others:
        tie = _tie(longest.name, longest.times, others[0].name, others[0].times)
        most = f"{longest.name} and {others[0].name} (which cannot be told apart)" if tie else longest.name
        where = f"{name}, most of all {most}"
    reached, which = found.limit(rows)
    if not reached:
        return f"The step is bound by {where}, whose least time is not known."
    low, high = (reached * median(together(rows, found.steps)) / t for t in interval(together(rows, found.steps))[::-1])
    if low >= 0.5:
        return f"The step is bound by the {'arithmetic' if which == 'matmul' else 'memory traffic'} of {where}."
    at = f"at {reached:.1%} of the {which} rate"
    if high >= 0.5:
        return (
            f"The step is bound by {where}, {at} ({low:.0%} to {high:.0%}): whether that bounds it cannot be "
            f"told; {quieter(found)}."
        )
    uncounted = sum(row.seconds for row in rows if not row.flops and row.group in ("convolutions", "linear layers"))
    if 2 * uncounted > sum(row.seconds for row in rows):
        return (
            f"The step is bound by {where}, {at}; what they add up for spikes is not counted as FLOP, so how near they "
            "are to the limits of arithmetic is not known."
        )
    return (
        f"The step is bound by {where}, {at}: far from what memory and arithmetic allow; look at sizes, layout, dtype "
        "and the number of calls."
    )
