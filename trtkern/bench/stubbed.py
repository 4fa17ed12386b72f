"""A process that measures the host time of a GPU backend where no GPU is: ``python -m trtkern.bench.stubbed``.

"time" puts a stand-in in the place of the GPU's driver. The backend then does all that it does for a launch, on tensors
of the CPU, but the launch itself does nothing: what the layers return is not to be looked at, which is why this is a
process of its own. "check" compares the same layers with float64, where the backend can run without a GPU: Triton in
its interpreter. Either prints an object of JSON by layer, or {"skipped": why}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from trtkern import backends, malloc
from trtkern.bench import overhead
from trtkern.bench.cases import Case, parse_shape
from trtkern.bench.stand_ins import STAND_INS, Absent


def check(backend: str, case: Case) -> dict[str, Any]:
    """By layer, what is wrong with it: of those that are right, nothing."""
    if (why := backends.named(backend).missing()) is not None:
        return {"skipped": why}
    verdicts = {kind: overhead.own(kind, case, backend).verdict() for kind in overhead.PAIRS}
    return {kind: verdict.words for kind, verdict in verdicts.items() if not verdict.right}


def time(backend: str, case: Case, rounds: int) -> dict[str, Any]:
    """By layer the seconds of each round, and how many launches its forward and its backward pass have."""
    try:
        launches = STAND_INS[backend]()
    except Absent as why:
        return {"skipped": str(why)}
    subjects = {kind: overhead.own(kind, case, backend)._replace(name=kind) for kind in overhead.PAIRS}
    found = {}
    for kind, subject in subjects.items():
        subject.both()  # compiles
        before = launches()
        out = subject.run(subject.x)
        between = launches()
        out.backward(subject.g)
        found[kind] = (between - before, launches() - between)
    seconds = overhead.timed(list(subjects.values()), rounds, f"{case.name} {backend}")
    return {kind: {"seconds": seconds[kind], "launches": found[kind]} for kind in subjects}


def main(what: str, backend: str, shape: str, dtype: str, rounds: str, threads: str) -> None:
    """Print what was asked for."""
    torch.set_num_threads(int(threads))
    malloc.keep_pages()
    case = Case("overhead", parse_shape(shape), dtype)
    print(json.dumps(check(backend, case) if what == "check" else time(backend, case, int(rounds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
