"""What ``trtkern train`` does in a process that trains together with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtkern.commands import _runs
from trtkern.commands._common import FAILURE, Quit, one_line, quits
from trtkern.output import console
from trtkern.output.files import read_json
from trtkern.parallel import launch
from trtkern.parallel.job import TIMEOUT, Job, JobError, join, leave
from trtkern.training import folder as folders


def begin(plan: dict[str, Any], run_dir: str | None, download: bool) -> int:
    """Run a plan, or go on with what this job has begun of it before its processes were started anew."""
    return _together(plan["timeout"], lambda job: _begun(job, plan, run_dir, download))


def resume(folder: Path, given: dict[str, Any], other_data: bool) -> int:
    """As ``_runs.resume``."""
    timeout = given.get("timeout") or _patience(folder)
    return _together(timeout, lambda job: _runs.resume(folder, given, other_data, job))


def series(plan: dict[str, Any], seeds: str, folder: Path, download: bool) -> int:
    """As ``_runs.series``."""
    return _together(plan["timeout"], lambda job: _runs.series(plan, seeds, folder, download, job))


def _together(timeout: float, work: Callable[[Job], int]) -> int:
    """Join the others and do it; one of them says how it ended."""
    launch.bound()
    with quits(FAILURE, JobError):
        job = join(timeout)
    if not job.first:
        console.quieten()
    with _spoken(job):
        status = work(job)
    leave()
    return status


def _begun(job: Job, plan: dict[str, Any], run_dir: str | None, download: bool) -> int:
    with _runs.refusing(job):
        found = folders.taken_up(plan, run_dir, job.kept("folder")) if job.first else (Path(), False)
        folder, begun = job.told(found)
        job.keep("folder", str(folder))
    return _runs.resume(folder, {}, False, job) if begun else _runs.begin(plan, folder, download, job)


def _patience(folder: Path) -> float:
    """The timeout that a run has: it is needed before the first process can tell it."""
    try:
        for name, within in ((folders.CONFIG, "settings"), (folders.PLAN, None)):
            if (folder / name).exists():
                found = read_json(folder / name)
                return float((found if within is None else found[within])["timeout"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the first process says what is wrong with the file
    return TIMEOUT


@contextmanager
def _spoken(job: Job) -> Iterator[None]:
    """Inside, how it ends is said by one process.

    What starting all of them anew would not mend ends the job; that another one is gone does not.

    Raises:
        Quit: as what is inside, without words where another process has said it.
    """
    try:
        with quits(FAILURE, JobError), job.listening():
            yield
    except Quit as error:
        if job.alone:
            raise
        if not job.speaks():
            raise Quit("", error.status) from error
        lost = _lost(error)
        if lost is None:
            launch.end(error.status)
            raise Quit(str(error) if job.first else f"rank {job.rank}: {error}", error.status) from error
        if left := launch.restarts_left():
            often = "once" if left == 1 else f"{left} times"
            again = f"all of them start anew from the last checkpoint, as they may {often} more"
            raise Quit(f"{one_line(lost)}; {again}", error.status) from error
        raise


def _lost(error: BaseException | None) -> JobError | None:
    """What says that another process is gone, among what led to the error."""
    while error is not None and not isinstance(error, JobError):
        error = error.__cause__
    return error
