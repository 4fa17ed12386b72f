"""One case and direction: warm-up, peak memory, interleaved rounds within a share of the budget, rows."""

from __future__ import annotations

import itertools
import math
import shlex
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from trtkern.bench import contest, measure, rows
from trtkern.bench.cases import CANDIDATES, Case, least_bytes, rotations
from trtkern.bench.measure import Candidate
from trtkern.profiling.memory.peak import peak

EACH = ("train-fwd", "bwd", "both")
"""What "each" is, in turn: forward with a graph, backward, and both."""
SETTLED = 0.1
"""Seconds: on a CPU a call that takes less has one before it that is not timed."""


@dataclass(frozen=True)
class Options:
    """What holds for all cases of a call."""

    device: torch.device
    backend: str = "all"
    direction: str = "both"
    suite: str = "default"
    rounds: int = 25
    budget: float = math.inf
    """Seconds of all cases together, compiling and checking included."""
    peers: str = "all"
    compiled: bool = True
    candidates: tuple[str, ...] = CANDIDATES
    """Of a step: what is compared."""
    malloc: str = "default"
    command: tuple[str, ...] = ()


@dataclass
class Ready:
    """A contestant that has passed the gate."""

    who: contest.Contestant
    library: str
    compile_s: float
    seconds: float
    """Of its last run."""
    note: str = ""


@dataclass
class Bench:
    """One case on its way."""

    case: Case
    options: Options
    end: float
    """On ``time.monotonic``: when its share of the budget is used up."""
    share: float = math.inf
    """Seconds of the budget."""
    ready: list[Ready] = field(default_factory=list)
    left_out: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Candidate, library, status, note."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


class Interrupted(KeyboardInterrupt):
    """Stopped by the user, with the rows of the rounds that were done."""

    def __init__(self, done: list[rows.Row]) -> None:
        super().__init__()
        self.rows = done


def _copy(case: Case, device: torch.device) -> Candidate:
    """torch's copy_ of as many bytes as one tensor of the case has, read and written."""
    sets = [
        (torch.ones(case.elements, dtype=case.torch_dtype, device=device),
         torch.zeros(case.elements, dtype=case.torch_dtype, device=device))
        for _ in range(rotations(case, device))
    ]  # fmt: skip
    turns = itertools.cycle(sets)

    def run() -> None:
        source, target = next(turns)
        target.copy_(source)

    return Candidate("copy_", run, 2 * case.elements * case.element_size)


def measured(bench: Bench, direction: str, share: float) -> list[rows.Row]:
    """The rows of one direction, its rounds fitted into ``share`` seconds."""
    begin = time.monotonic()
    device = bench.options.device
    fit = [one for one in bench.ready if direction in one.who.directions]
    least = least_bytes(bench.case, direction)
    copy = _copy(bench.case, device)
    candidates = [copy, *(_candidate(one, direction, least) for one in fit)]
    costs = {one.who.name: one.seconds for one in fit} | {copy.name: 0.0}
    seconds = []
    for candidate in candidates:
        seconds.append(costs[candidate.name])
        each = share / (4 * len(candidates))
        if 2 * seconds[-1] < each:  # of a slow one the gate was the warm-up
            seconds[-1] = measure.warm_up(candidate, seconds=min(2.0, each))
    known = {one.who.name: one.who.peak for one in fit if one.who.peak is not None}
    unknown = [candidate for candidate in candidates[1:] if candidate.name not in known]
    peaks = {"copy_": 0} | known | _peaks(unknown, costs, share / 5, device)
    if device.type == "cpu":
        candidates = [replace(c, settle=s < SETTLED) for c, s in zip(candidates, seconds, strict=True)]
        seconds = [2 * s if s < SETTLED else s for s in seconds]
    visits = planned(seconds, share - (time.monotonic() - begin), bench.options.rounds)
    times: dict[str, list[float]] = {}
    try:
        label, timer = f"{bench.case.name} {direction}", measure.clock(device)
        measure.interleave(candidates, visits, label, timer=timer, times=times)
    except KeyboardInterrupt:
        if min(map(len, times.values()), default=0):
            raise Interrupted(_rows(bench, direction, fit, candidates, times, peaks)) from None
        raise
    return _rows(bench, direction, fit, candidates, times, peaks)


def _peaks(candidates: list[Candidate], costs: dict[str, float], share: float, device: torch.device) -> dict[str, int]:
    """What each allocates at its peak, the quick ones first, while the next fits into ``share`` seconds: torch's
    profiler doubles the time of a call, and more."""
    found: dict[str, int] = {}
    end = time.monotonic() + max(share, 1.0)
    for candidate in sorted(candidates, key=lambda candidate: costs[candidate.name]):
        if time.monotonic() + 2 * costs[candidate.name] < end:
            found[candidate.name] = peak(partial(candidate.call, measure.on_cpu), device)
    return found


def _candidate(one: Ready, direction: str, least: int) -> Candidate:
    who = one.who
    run = {"fwd": who.inference, "train-fwd": who.forward, "bwd": who.backward, "both": who.both}[direction]
    prepare, finish = who.forward if direction == "bwd" else None, who.release if direction == "train-fwd" else None
    return Candidate(who.name, run, least, one.compile_s, prepare, finish)


def planned(seconds: list[float], share: float, rounds: int) -> list[int]:
    """How often to visit each: ``rounds`` times if that fits; else what is cheap keeps its rounds, what is slow shares
    the rest: once at the least, five times what takes less than a tenth of a second."""
    visits, left = [rounds] * len(seconds), share
    if not math.isfinite(share):
        return visits
    for done, at in enumerate(sorted(range(len(seconds)), key=lambda at: seconds[at])):
        fair = max(0.0, left) / (len(seconds) - done)
        least = min(rounds, 5) if seconds[at] < 2 * SETTLED else 1
        visits[at] = max(least, min(rounds, int(fair / max(seconds[at], 1e-9))))
        left -= visits[at] * seconds[at]
    visits[0] = max(visits)  # the copy is in every round
    return visits


def common(case: Case, options: Options, direction: str) -> dict[str, Any]:
    """What the rows of a case and direction have in common."""
    return {
        **rows.origin(options.device), "malloc": options.malloc, "suite": options.suite, "case": case.name,
        "op": case.op, "shape": ",".join(map(str, case.shape)), "dtype": case.dtype, "direction": direction,
        "command": shlex.join(options.command),
    }  # fmt: skip


def _rows(
    bench: Bench, direction: str, fit: list[Ready], candidates: list[Candidate], times: dict[str, list[float]],
    peaks: dict[str, int],
) -> list[rows.Row]:  # fmt: skip
    case = bench.case
    copy = candidates[0]
    first = next((one.who.name for one in fit if one.library == "trtkern"), "")
    none = [math.nan] * len(times["copy_"])
    same = common(case, bench.options, direction)
    made = []
    known = {one.who.name: one for one in fit}
    for candidate in candidates:
        mine = times[candidate.name]
        one = known.get(candidate.name)
        if all(value != value for value in mine) or (one is None and case.op == "step"):  # a step is no copy of images
            continue
        made.append(rows.Row(
            **same, candidate=candidate.name, library=one.library if one else f"torch {torch.__version__}",
            status="ok", note=one.note if one else "", peak_bytes=peaks.get(candidate.name, -1),
            compile_s=round(candidate.compile_s, 1),
            **rows.figures(mine, times["copy_"], times.get(first, none), candidate.bytes, copy.bytes),
        ))  # fmt: skip
    left_out = [
        rows.Row(**same, candidate=name, library=library, status=status, note=note)
        for name, library, status, note in bench.left_out
    ]
    return made + left_out
