"""A sweep: every point of a grid with every seed, each a run of ``trtkern train`` in a process of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trtkern.output.files import read_json
from trtkern.output.files import write as write_whole
from trtkern.training import plan as plans
from trtkern.training import seeds as several
from trtkern.training.folder import PLAN, hold, read_plan
from trtkern.training.options import RESUME, of_command

ASKED, RESULT = "sweep.json", "result.json"
POLL = 0.1
"""Seconds between two looks at the processes."""
LONGEST = 200
"""Bytes of a folder's name; file systems allow 255, of which the log's has some more."""
Point = tuple[str, ...]
"""What a point of the grid changes: ("loss.lam=1e-6", "lr=1e-3")."""


class Run(NamedTuple):
    """A point with a seed."""

    point: Point
    seed: int
    folder: Path

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def result(self) -> dict[str, Any] | None:
        """What it reached; None before its end."""
        try:
            found = read_json(self.folder / RESULT)
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found.get("test"), dict) else None

    def arguments(self, recipe: str, more: Sequence[str]) -> list[str]:
        """Of ``trtkern``: begin it, or go on with it."""
        if (self.folder / PLAN).exists():
            return ["train", "--resume", str(self.folder), *beside_resume(more)]
        return self.beginning(recipe, more)

    def beginning(self, recipe: str, more: Sequence[str]) -> list[str]:
        """Of ``trtkern``: begin it."""
        changes = [word for change in self.point for word in ("--set", change)]
        return [
            "train", "--recipe", recipe, *changes, "--seed", str(self.seed), *more, "--run-dir", str(self.folder)
        ]  # fmt: skip


def beside_resume(more: Sequence[str]) -> list[str]:
    """Of options of ``trtkern train`` those that a run does not keep, and that may stand beside --resume."""
    kinds = {
        flag: option.kind for option in of_command() if RESUME in option.where
        for each in option.flags for flag in each.split("/")
    }  # fmt: skip
    found, words = [], iter(more)
    for word in words:
        name, equals, _ = word.partition("=")
        if name in kinds:
            found += [word] if equals or kinds[name] is bool else [word, *itertools.islice(words, 1)]
    return found


def grid(texts: Iterable[str]) -> list[Point]:
    """The points of "loss.lam=1e-6,1e-5" and others like it: every value of each key with every one of the others.

    Raises:
        ValueError: no key or no value, or one that is there twice.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        found = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]  # not within a list or a table
        if not key or not equals or not all(found) or len(set(found)) < len(found) or key in axes:
            raise ValueError(
                f"--grid: expected a key that is not there yet and different values of it, such as loss.lam=1e-6,1e-5, "
                f"got {text!r}"
            )
        axes[key] = found
    return list(itertools.product(*([f"{key}={value}" for value in values] for key, values in axes.items())))


def runs(points: Sequence[Point], seeds: Sequence[int], place: Path) -> list[Run]:
    """Of every point and seed, in folders that are named after them."""
    made = [Run(point, seed, place / _name(point, seed)) for point in points for seed in seeds]
    assert len({run.folder for run in made}) == len(made)
    return made


def _name(point: Point, seed: int) -> str:
    """Readable, and as different as the points are: what a folder's name should not have is written as its number."""
    kept = [re.sub(r"[^\w.=+-]", lambda found: f"%{ord(found[0]):x}", change) for change in point]
    name, end = ",".join(kept), f"seed{seed}"
    if len(name.encode()) > LONGEST:
        name = f"{name.encode()[:LONGEST].decode(errors='ignore')}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return ",".join([name, end] if name else [end])


def check(todo: Mapping[Run, Mapping[str, Any]]) -> None:
    """Raise if two points are the same training, or if a run that is there is another one than is asked for now.

    Args:
        todo: {run: its plan}.

    Raises:
        ValueError: the message names them.
    """
    points: dict[str, Point] = {}
    for run, plan in todo.items():
        other = points.setdefault(json.dumps({**plan, "seed": None}, sort_keys=True), run.point)
        if other != run.point:
            raise ValueError(
                f"--grid: expected another training at each point, got the same at {' '.join(other)} as at "
                f"{' '.join(run.point)}; what the grid says may not be said by another option"
            )
        with suppress(ValueError):  # of a damaged file the run itself says what is wrong
            before = plans.checked(read_plan(run.folder))
            if differing := sorted(key for key in before if before[key] != plan[key]):
                break
    else:
        return
    key = differing[0]
    raise ValueError(
        f"sweep: expected {run.folder} with {key} = {plan[key]!r}, as the recipe says now, got {before[key]!r}, with "
        f"which it was begun; name another --run-dir, or put the recipe back"
    )


def claim(place: Path, recipe: str, more: Sequence[str]) -> None:
    """Write down what all runs of a sweep have in common; a grid and seeds may grow, this may not change.

    Other processes are kept from the folder until this one ends.

    Raises:
        ValueError: the folder has a sweep of another recipe or with other options, or another process is at it.
        OSError: it cannot be made or written.
    """
    asked = {"recipe": recipe, "options": list(more)}
    place.mkdir(parents=True, exist_ok=True)
    hold(place, "sweep: expected a sweep")
    try:
        before = read_json(place / ASKED)
    except FileNotFoundError:
        write_whole(place / ASKED, (json.dumps(asked, indent=2) + "\n").encode())
        return
    if before != asked:
        raise ValueError(
            f"sweep: expected in {place} a sweep of {_said(asked)}, got one of {_said(before)}; name another --run-dir"
        )


def _said(asked: dict[str, Any]) -> str:
    return shlex.join(["--recipe", asked["recipe"], *asked["options"]])


def perform(
    todo: Sequence[Run], jobs: int, recipe: str, more: Sequence[str], bound: Callable[[], None],
    told: Callable[[Run, int], None],
) -> dict[Run, int]:  # fmt: skip
    """Run them, so many at a time; the exit status of each. Those that are at its end are passed over.

    Args:
        todo: in this order.
        jobs: processes at a time.
        recipe, more: as ``claim``.
        bound: called in each process before it begins: has it end with this one.
        told: called with each that has ended.

    A KeyboardInterrupt ends all of them with a checkpoint, and goes on.
    """
    waiting = [run for run in todo if run.result() is None]
    working: dict[Run, subprocess.Popen] = {}
    ended: dict[Run, int] = {}
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.pop(0)
                working[run] = _begin(run, run.arguments(recipe, more), bound)
            for run, process in list(working.items()):
                if process.poll() is not None:
                    del working[run]
                    ended[run] = process.returncode
                    told(run, process.returncode)
            time.sleep(POLL)
    finally:
        for process in working.values():
            process.send_signal(signal.SIGTERM)
        for process in working.values():
            process.wait()
    return ended


def _begin(run: Run, arguments: Sequence[str], bound: Callable[[], None]) -> subprocess.Popen:
    """In a group of its own: Ctrl-C comes to this process alone, which ends the others."""
    with open(run.log, "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trtkern.cli", *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            process_group=0, preexec_fn=bound,
        )  # fmt: skip


def last_line(run: Run) -> str:
    """What a run has said last, which is why it failed."""
    lines = run.log.read_text(errors="replace").split("\n") if run.log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "nothing")


def table(done: Sequence[Run]) -> tuple[list[dict[str, Any]], str]:
    """A row a point, the best first: mean and standard deviation over the seeds; and whether that is of the "accuracy"
    or, where a run has none, of the "loss". Held-out images order the points where there are some, else the test's."""
    results = {run: result for run in done if (result := run.result()) is not None}
    figure = "accuracy" if all("accuracy" in result["test"] for result in results.values()) else "loss"
    points: dict[Point, dict[int, dict[str, float]]] = {}
    for run, result in results.items():
        found: dict[str, float] = {split: result[split][figure] for split in ("validation", "test") if split in result}
        points.setdefault(run.point, {})[run.seed] = found
    rows = [{"point": list(point), **several.summarise(found)} for point, found in points.items()]
    sign = -1 if figure == "accuracy" else 1
    split = "validation" if all("validation" in row["mean"] for row in rows) else "test"
    return sorted(rows, key=lambda row: sign * row["mean"][split]), figure


def array(todo: Sequence[Run], jobs: int, recipe: str, more: Sequence[str], place: Path) -> Path:
    """A script for sbatch with a task a run, so many at a time; each goes on with its run where it has begun."""
    cases = []
    for number, run in enumerate(todo):
        begin = shlex.join(["trtkern", *run._replace(folder=Path("RUN")).beginning(recipe, more)])
        cases.append(f'{number}) run={shlex.quote(str(run.folder.resolve()))}; begin=({begin[: -len("RUN")]}"$run") ;;')
    log = f"{str(place.resolve()).replace('%', '%%')}/%a.log"
    text = SCRIPT.format(
        last=len(todo) - 1, jobs=jobs, cases="\n    ".join(cases), log=log, here=shlex.quote(str(Path.cwd())),
        beside="".join(f" {shlex.quote(word)}" for word in beside_resume(more)),
    )  # fmt: skip
    write_whole(place / "array.slurm", text.encode())
    return place / "array.slurm"


SCRIPT = """#!/bin/bash
#SBATCH --job-name=trtkern-sweep
#SBATCH --array=0-{last}%{jobs}
#SBATCH --output="{log}"
#SBATCH --open-mode=append
#SBATCH --requeue

set -euo pipefail
cd {here}
case $SLURM_ARRAY_TASK_ID in
    {cases}
esac
if [ -e "$run/result.json" ]; then exit 0; fi
if [ -e "$run/plan.json" ]; then exec trtkern train --resume "$run"{beside}; fi
exec "${{begin[@]}}"
"""
