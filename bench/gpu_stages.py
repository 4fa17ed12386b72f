"""Stages that share a time: each is a process that is cut when its part is used up, and named."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

OK, FAILED, CUT, SKIPPED = "ok", "FAILED", "cut", "skipped"
CUT_MARK = "out of time: "
"""A line of a stage's output that begins so says what the stage itself left out because its time was used up."""
ENDS_ITSELF = 0.8
"""Of its time, after which a stage that can end by itself does so (``UNTIL``, ``{seconds}``)."""
UNTIL = "TRTKERN_UNTIL"
"""Environment variable: the time (``time.time``) at which a stage begins nothing new."""
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
    """What has to be importable."""
    after: Sequence[str] = ()
    """Stages that must not have failed, been cut or skipped."""
    tests: bool = False
    """Whether it runs tests: one that does not end by itself hangs, and has failed."""
    env: Mapping[str, str] = field(default_factory=dict)


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
    importlib.invalidate_caches()  # an earlier stage may have installed it
    for module in stage.modules:
        if importlib.util.find_spec(module) is None:
            return f"the Python package {module} is not installed"
    return ""


def run(
    stages: Sequence[Stage], seconds: float, logs: Path, done: Callable[[Outcome], None], grace: float = GRACE
) -> list[Outcome]:
    """Run the stages in turn. What one leaves of its time the following ones have.

    Args:
        seconds: of all together; the last may overrun by ``grace``.
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
    command = [part.replace("{seconds}", f"{soft:.0f}") for part in stage.command]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", UNTIL: str(time.time() + soft), **stage.env}
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True, preexec_fn=_heed
            )
        except OSError as error:
            return Outcome(stage.name, FAILED, 0.0, allowed, str(error))
        try:
            status = process.wait(allowed)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process, grace)
    seconds, text = time.monotonic() - begin, log.read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if any(map(str.isalnum, line))]
    last = " ".join(lines[-1].strip("= ").split())[:160] if lines else "it said nothing"
    if status is None:
        end = "it did not end, its last words" if stage.tests else "its time was used up, its last words"
        return Outcome(stage.name, FAILED if stage.tests else CUT, seconds, allowed, f"{end}: {last}")
    if status:
        return Outcome(stage.name, FAILED, seconds, allowed, f"exit status {status}: {last}")
    left_out = [line for line in lines if line.startswith(CUT_MARK)]
    if left_out:
        return Outcome(stage.name, CUT, seconds, allowed, f"{left_out[-1]}; {last}" if last != left_out[-1] else last)
    return Outcome(stage.name, OK, seconds, allowed, last)


def _heed() -> None:
    """In a stage before it begins: Ctrl-C ends it, though this process may ignore it, as under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End the process and those that it started: Ctrl-C first, so that it writes what it has."""
    if process.poll() is not None:
        return
    _signal(process, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], which: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of them have ended meanwhile
        os.killpg(process.pid, which)
