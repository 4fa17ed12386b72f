"""Two profiles of one step, with other work beside them: do they agree, or say that they cannot?

    python bench/profile_trust.py --pairs 10

Each pair is two profiles of the same step of a small network, set side by side by ``trtkern.profiling.compare``. Busy
loops, each a process of its own, run beside none of the two, beside both, or beside the second alone. Once the second
has twice the batch, so that there is a difference to be found. A row of bench/profile_trust.csv is a pair:

    before_ms, after_ms   medians of the steps without the profiler
    low_ms, high_ms       the interval of their difference
    said                  "cannot be told" (the two agree within their intervals), "faster" or "slower"
    layers, told          rows that both profiles have, and how many of them are called faster or slower
    warned                what the two profiles warn of
    verdicts              "same", "one" (the other said that it has none), "none", or "contradict"
"""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from trtkern.bench import rows
from trtkern.bench.measure import ROOT, append
from trtkern.malloc import keep_pages
from trtkern.models import ConvSNN
from trtkern.profiling import StepProfile, compare, profile

CPU = torch.device("cpu")
CASES = {
    "no loop": (0, 0, 1), "one loop beside both": (1, 1, 1), "one loop beside the second": (0, 1, 1),
    "two loops beside the second": (0, 2, 1), "twice the batch": (0, 0, 2), "twice the batch, one loop beside both":
    (1, 1, 2),
}  # fmt: skip
"""Busy loops beside the first profile, beside the second, and the batch of the second over that of the first."""
SHAPE, WIDTHS, BATCH = (2, 16, 16), (32, "pool", 64, "pool", 64), 8


def spin() -> None:
    """Forever."""
    while True:
        pass


@contextmanager
def loops(count: int) -> Iterator[None]:
    """So many, while the block runs."""
    started = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(count)]
    for each in started:
        each.start()
    try:
        yield
    finally:
        for each in started:
            each.terminate()
            each.join()


def profiled(batch: int, steps: int) -> StepProfile:
    """A training step of the network, in a fresh one."""
    torch.manual_seed(0)
    model = ConvSNN(SHAPE, WIDTHS, 10)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    return profile(model, torch.rand(4, batch, *SHAPE), optimizer=optimizer, steps=steps)


def verdicts(one: StepProfile, other: StepProfile) -> str:
    """Whether they name the same kind of layers."""
    said = [None if any("No verdict" in line for line in each.verdict()) else each for each in (one, other)]
    named = [next(iter(each.groups())) for each in said if each is not None]
    return ("none", "one", "same" if len(set(named)) == 1 else "contradict")[len(named)]


def pair(case: str, steps: int) -> dict[str, object]:
    """Two profiles, and what their comparison says."""
    first, second, times = CASES[case]
    with loops(first):
        before = profiled(BATCH, steps)
    with loops(second):
        after = profiled(BATCH * times, steps)
    found = compare(before, after)
    layers = [row for row in found.rows[:-1] if row.low is not None]
    total = found.total
    return {
        "case": case, "steps": steps, "before_ms": f"{1e3 * before.plain:.2f}", "after_ms": f"{1e3 * after.plain:.2f}",
        "low_ms": f"{1e3 * (total.low or 0):.2f}", "high_ms": f"{1e3 * (total.high or 0):.2f}", "said": total.said,
        "layers": len(layers), "told": sum(row.said != "cannot be told" for row in layers),
        "warned": " ".join(sorted({doubt.kind for each in (before, after) for doubt in each.doubts()})),
        "verdicts": verdicts(before, after),
    }  # fmt: skip


def main() -> None:
    """Measure, and say how often they agreed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="of each case")
    parser.add_argument("--steps", type=int, default=8, help="profiled in each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "profile_trust.csv")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_pages()
    command = shlex.join(["python", "bench/profile_trust.py", *sys.argv[1:]])
    counts: dict[str, Counter[str]] = {case: Counter() for case in CASES}
    for _ in range(asked.pairs):
        for case in CASES:
            found = pair(case, asked.steps)
            append([{**rows.origin(CPU), **found, "command": command}], asked.csv)
            counts[case][f"{found['said']}, verdicts {found['verdicts']}"] += 1
    for case, said in counts.items():
        print(f"{case}: " + "; ".join(f"{count} x {what}" for what, count in said.most_common()))


if __name__ == "__main__":
    main()
