"""Measuring: interleaved rounds, paired ratios, quantiles; and where and when a row of ``bench/`` was measured."""

from __future__ import annotations

import csv
import getpass
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trtkern import __version__
from trtkern.profiling.step.conditions import ISA_ASKED as ISA_ASKED
from trtkern.profiling.step.conditions import machine as machine
from trtkern.profiling.step.spread import interval

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where this is one."""

Timer = Callable[[Callable[[], object]], float]
"""Calls a function; returns the seconds that it took."""


@dataclass(frozen=True)
class Candidate:
    """Something to time: ``run`` is called once a round; ``bytes`` is what it must move at the least (0: not known)."""

    name: str
    run: Callable[[], object]
    bytes: int
    compile_s: float = 0.0
    prepare: Callable[[], object] | None = None
    """Called before ``run``, and not timed."""
    finish: Callable[[], object] | None = None
    """Called after ``run``, and not timed: lets go of what it kept."""
    settle: bool = False
    """Whether a call that is not timed goes before each that is: it finds its pages and code as in a loop of its own,
    and not as the candidate before it left them."""

    def call(self, timer: Timer) -> float:
        """The seconds of one ``run``."""
        for each in (on_cpu, timer) if self.settle else (timer,):
            if self.prepare is not None:
                self.prepare()
            seconds = each(self.run)
            if self.finish is not None:
                self.finish()
        return seconds


def on_cpu(run: Callable[[], object]) -> float:
    """Seconds on the clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def on_processor(run: Callable[[], object]) -> float:
    """Seconds of processor time of all threads, which other work on the machine changes less."""
    start = time.process_time()
    run()
    return time.process_time() - start


def on_gpu(run: Callable[[], object]) -> float:
    """Seconds between two CUDA events around the call, on the current stream."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def clock(device: torch.device) -> Timer:
    """That of a device."""
    return on_gpu if device.type == "cuda" else on_cpu


def interleave(
    candidates: Sequence[Candidate],
    visits: Sequence[int],
    label: str,
    seed: int = 0,
    timer: Timer = on_cpu,
    times: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Visit the candidates in random order, round after round; the seconds of each visit by name, NaN where a round
    leaves a candidate out.

    Args:
        visits: how often each is visited, spread evenly over as many rounds as the first (which is in every one) has.
        times: filled as the rounds go, for whoever interrupts them; a fresh one otherwise.
    """
    times = {} if times is None else times
    rounds, shuffle = visits[0], random.Random(seed)
    for done in range(rounds):
        if sys.stderr.isatty():
            print(f"\r{label}: round {done + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
        found = dict.fromkeys((candidate.name for candidate in candidates), float("nan"))
        for at in shuffle.sample(range(len(candidates)), len(candidates)):
            if (done + 1) * visits[at] // rounds > done * visits[at] // rounds:
                found[candidates[at].name] = candidates[at].call(timer)
        for name, seconds in found.items():
            times.setdefault(name, []).append(seconds)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return times


def warm_up(candidate: Candidate, calls: int = 15, seconds: float = 2.0) -> float:
    """Until the caches, the threads and the allocator (which takes some ten rounds to keep its pages) are settled, or
    the time is up; returns the seconds of the last call, what comes before it included."""
    start = time.perf_counter()
    for _ in range(calls):
        begin = time.perf_counter()
        candidate.call(on_cpu)
        now = time.perf_counter()
        if now - start > seconds:
            break
    return now - begin


def median_ratio(mine: Sequence[float], theirs: Sequence[float], scale: float = 1.0) -> tuple[float, float, float]:
    """Median of mine / (theirs * scale) over the rounds that have both, and its 90 % interval (``spread.interval``)."""
    ratios = [a / (b * scale) for a, b in zip(mine, theirs, strict=True) if a == a and b == b]
    return (statistics.median(ratios), *interval(ratios))


def compile_apart() -> None:
    """What torch compiles for the instruction set that ATEN_CPU_CAPABILITY names goes to a folder of its own.

    torch finds compiled code again by its source. Found under another set, it computes wrong numbers.
    """
    if asked := os.environ.get("ATEN_CPU_CAPABILITY"):
        folder = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{asked}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def today() -> str:
    """The date of a row."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def commit() -> str:
    """The commit that is measured; a + says that files differ from it. The version, outside of a checkout."""
    if not (ROOT / ".git").exists():
        return f"v{__version__}"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    own = (":!bench/*.csv", ":!bench/results/*.csv")  # rows beside this one do not count
    changed = git("status", "--porcelain", "-uno", "--", ".", *own)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def append(rows: list[dict[str, Any]], path: Path) -> None:
    """Add rows of one shape to a CSV file, with a header when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
