"""Stages that share a time: each is a process that is cut when its part is used up, and named."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

STATUS = OK, FAILED, CUT, SKIPPED = "ok", "FAILED", "cut", "skipped"
CUT_MARK = "out of time: "
"""A line of a stage's output that begins so says what the stage itself left out because its time was used up."""
ENDS_ITSELF = 0.8
"""Of its time, after which a stage that can end by itself does so (``UNTIL``, ``{seconds}``)."""
START = 6.0
"""Seconds of it until a Python with torch has begun to count."""
UNTIL = "TRTKERN_UNTIL"
"""Environment variable: the time (``time.time``) at which a stage begins nothing new."""
BROKEN = re.compile(r"(FAILED|ERROR) \S*::")
"""A line of pytest's (or of tests/gpu_only.py, as it happens) that names a test that failed."""
LACKS = "import sys; from importlib.util import find_spec; print(*[m for m in sys.argv[1:] if find_spec(m) is None])"
GRACE = 8.0
"""Seconds between Ctrl-C, at which a bench writes what it has, and the end of a process."""


@dataclass(frozen=True)
class Stage:
    """A command and what it may take."""

    name: str
    command: Sequence[str]
    """"{seconds}" in it becomes the seconds after which it should end by itself."""
    share: float
    """Of the time, in proportion to the shares of the stages that are still to come."""
    programs: Sequence[str] = ()
    """What has to be on PATH; the stage is skipped without it."""
    modules: Sequence[str] = ()
    """What its interpreter, the first word of the command, has to be able to import."""
    refusals: Sequence[str] = ()
    """Words with which its tool says that it cannot work on this machine: the stage has not failed, it is skipped."""
    after: Sequence[str] = ()
    """Stages that must not have failed, been cut or skipped."""
    tests: bool = False
    """Whether it runs tests: it has failed if one of them has, though the rest ran out of time, and if it does not heed
    Ctrl-C then: a process that waits for a kernel that never ends does not."""
    env: Mapping[str, str] = field(default_factory=dict)
    rows: Path | None = None
    """The file to which it adds rows of ``trtkern bench``: it has failed if one of this project's is not right."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    name: str
    status: str
    seconds: float
    allowed: float
    words: str


def log_name(stage: str) -> str:
    """The file of its output."""
    return f"{stage.replace(' ', '-')}.log"


def lacks(stage: Stage) -> str:
    """The first program or module that a stage needs and that is not here; empty when all are."""
    for program in stage.programs:
        if shutil.which(program) is None:
            return f"no {program} on PATH"
    if stage.modules and shutil.which(stage.command[0]):
        command = [stage.command[0], "-c", LACKS, *stage.modules]
        done = subprocess.run(command, env={**os.environ, **stage.env}, capture_output=True, text=True, check=False)
        if names := done.stdout.split():
            return f"the Python package {names[0]} is not installed"
    return ""


def run(
    stages: Sequence[Stage], seconds: float, logs: Path, done: Callable[[Outcome], None], grace: float = GRACE
) -> list[Outcome]:
    """Run the stages in turn. What one leaves of its time the following ones have.

    Args:
        seconds: of all together; the last may overrun by ``grace``, and three times that if it runs tests.
        logs: a folder; the output of each stage goes to NAME.log in it.
        done: told of each outcome as it comes.

    Raises:
        KeyboardInterrupt: the user stopped it; the stage that was running has been ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    for at, stage in enumerate(stages):
        allowed = max(0.0, end - time.monotonic()) * stage.share / sum(each.share for each in stages[at:])
        blocked = [name for name in stage.after if name in outcomes and outcomes[name].status != OK]
        if blocked:
            outcome = Outcome(stage.name, SKIPPED, 0.0, allowed, f"needs {blocked[0]}")
        elif reason := lacks(stage):
            outcome = Outcome(stage.name, SKIPPED, 0.0, allowed, reason)
        elif allowed <= 0:
            outcome = Outcome(stage.name, CUT, 0.0, allowed, "no time was left; give GPU_MINUTES more")
        else:
            outcome = _one(stage, allowed, logs / log_name(stage.name), grace)
        outcomes[stage.name] = outcome
        done(outcome)
    return list(outcomes.values())


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """1 if a stage failed, else 0: what was cut or skipped is named, and is no failure."""
    return int(any(outcome.status == FAILED for outcome in outcomes))


def _one(stage: Stage, allowed: float, log: Path, grace: float) -> Outcome:
    begin, soft = time.monotonic(), ENDS_ITSELF * allowed
    command = [part.replace("{seconds}", f"{max(soft / 2, soft - START):.0f}") for part in stage.command]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", UNTIL: str(time.time() + soft), **stage.env}
    known = len(_rows(stage.rows))
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True, preexec_fn=_heed
            )
        except OSError as error:
            return Outcome(stage.name, FAILED, 0.0, allowed, str(error))
        heeded = True
        try:
            status = process.wait(allowed)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            heeded = _end(process, (3 if stage.tests else 1) * grace)  # pytest-xdist ends its workers one by one
    verdict, words = _judged(stage, status, heeded, log.read_text(errors="replace"))
    if stage.rows is not None:
        verdict, words = _counted(_rows(stage.rows)[known:], verdict, words)
    return Outcome(stage.name, verdict, time.monotonic() - begin, allowed, words)


def _judged(stage: Stage, status: int | None, heeded: bool, text: str) -> tuple[str, str]:
    """Status and words from how a stage ended (None: its time was used up) and from what it said."""
    lines = [line.strip() for line in text.splitlines() if any(map(str.isalnum, line))]
    last = " ".join(lines[-1].replace("│", " ").strip("= ").split())[:160] if lines else "it said nothing"
    if status is None:
        failed = [line for line in lines if BROKEN.match(line)] if stage.tests else []
        if failed:
            return FAILED, f"its time was used up; before that {failed[0][:160]}"
        if stage.tests and not heeded:
            return FAILED, f"it hangs: it did not heed Ctrl-C when its time was used up, its last words: {last}"
        stopped = [line for line in lines if line.startswith("interrupted: ")]
        return CUT, f"its time was used up; {'; '.join(stopped)[:160] or 'its last words'}: {last}"
    if status:
        refusal = next((line for line in lines if any(words in line for words in stage.refusals)), "")
        if refusal:
            return SKIPPED, f"its tool cannot work here: {refusal[:160]}"
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return FAILED, f"{how}: {last}"
    left_out = [line for line in lines if line.startswith(CUT_MARK)]
    if left_out:
        return CUT, f"{left_out[-1]}; {last}" if last != left_out[-1] else last
    return OK, last


def _rows(path: Path | None) -> list[dict[str, str]]:
    """What a file of rows holds; nothing where there is none yet."""
    if path is None or not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _counted(new: Sequence[Mapping[str, str]], verdict: str, words: str) -> tuple[str, str]:
    """Status and words of a stage that added these rows."""
    bad = [row for row in new if row["library"] == "trtkern" and row["status"] in ("WRONG", "failed")]
    if bad:
        wrong = [f"{row['candidate']}, {row['case']}: {row['status']}: {row['note']}" for row in bad[:3]]
        verdict, words = FAILED, "; ".join(wrong)
    counts = ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in new).items())
    said = f"rows: {counts or 'none'}"
    late = sum(row["status"] == "skipped" and "budget" in row["note"] for row in new)
    if late:
        said += f", {late} of them for want of time"
        verdict, words = (CUT, "give GPU_MINUTES more") if verdict == OK else (verdict, words)
    return verdict, said if verdict == OK else f"{said}; {words}"


def _heed() -> None:
    """In a stage before it begins: Ctrl-C ends it, though this process may ignore it, as under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes], grace: float) -> bool:
    """End the process and those that it started: Ctrl-C first, so that it writes what it has. Whether it did so."""
    if process.poll() is not None:
        return True
    _signal(process, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    heeded = process.poll() is not None
    _signal(process, signal.SIGKILL)
    process.wait()
    return heeded


def _signal(process: subprocess.Popen[bytes], which: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of them have ended meanwhile
        os.killpg(process.pid, which)
