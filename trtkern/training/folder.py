"""The run folder: made, with its plan, before torch is loaded, so that a run that dies at once can be begun anew."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from trtkern.names import short
from trtkern.output.files import UNSUPPORTED, named, naming, read_json, write
from trtkern.output.text import say

PLAN = "plan.json"
"""What the user asked for (``plan.make``)."""
CONFIG = "config.json"
"""What is in force (``run.write_config``)."""
RUNS = Path("runs")

_PART = re.compile(
    r"\.(?:plan\.json|config\.json|metrics\.jsonl|result\.json|report\.html|analysis\.html|curves\.png|seeds\.json"
    r"|[a-z]+-\d+\.safetensors)\.part"
)
"""What ``output.files.write`` leaves of a file of a run when it is killed."""


def create(plan: dict[str, Any], run_dir: str | None) -> Path:
    """Make the run folder with its plan: ``run_dir``, or the first free runs/<data>-<loss>-seed<k>[-n].

    Never one that holds a run; from then on it is this process's (``hold``). Where it fails nothing of it stays.

    Raises:
        ValueError: ``run_dir`` holds something already, or another process has it.
        OSError: it cannot be made or written.
    """
    if run_dir is not None:
        folder = Path(run_dir)
        if not folder.is_dir():
            _make(folder, exist_ok=True)
        hold(folder)
        with naming(folder, "an empty or new folder for the run"):
            holds = sorted(path.name for path in folder.iterdir())
        if holds:
            again = f"a run; `trtkern train --resume {shlex.quote(str(folder))}` goes on with it"
            what = again if PLAN in holds else "files"
            raise ValueError(f"--run-dir: expected an empty or new folder, got {folder}, which holds {what}")
        _make(folder, exist_ok=True)
    else:
        folder = _free(RUNS / f"{short(str(plan['data']))}-{short(str(plan['loss']))}-seed{plan['seed']}")
        hold(folder)
    try:
        write(folder / PLAN, (json.dumps(plan, indent=2) + "\n").encode())
    except BaseException:
        discard(folder)
        raise
    return folder


def _free(base: Path) -> Path:
    number = 1
    while True:
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            _make(folder, exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return folder


def _make(folder: Path, exist_ok: bool) -> None:
    """``mkdir -p`` and a trial of writing there."""
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        if not exist_ok and folder.is_dir():
            raise
        raise OSError(f"--run-dir: expected a folder that can be written, got {folder}, which is a file") from None
    except OSError as error:
        raise OSError(
            f"--run-dir: expected a folder that can be written, got {folder} ({error.strerror}); name another"
        ) from None


_held: dict[Path, int] = {}


def hold(folder: Path, what: str = "train: expected a run") -> None:
    """Keep other processes from this run, until this one ends, however it does; clear away what a killed one left.

    On a file system without locks nothing keeps them, and it says so.

    Raises:
        ValueError: another process has it.
        OSError: there is no such folder, or it cannot be read.
    """
    if (place := folder.resolve()) in _held:
        return
    with naming(folder, "a run folder that can be read"):
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"{what} that no other process is at, got {folder}, which is in use; wait for that one, or end it"
        ) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            os.close(handle)
            raise named(error, folder, "to lock") from None
        say(
            f"the file system of {folder} has no locks ({error.strerror}): start no other process on this run while "
            f"this one is at it"
        )
        _held[place] = handle
        return
    _held[place] = handle
    with naming(folder, "to clear away half-written files in"):  # without a lock another process may be at them
        for path in [path for path in place.iterdir() if _PART.fullmatch(path.name)]:
            path.unlink(missing_ok=True)


def _let_go() -> None:
    """In a forked process: the run is its parent's, whose death must end the hold."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def discard(folder: Path) -> None:
    """Take back ``create``, of a folder with nothing but its plan; "runs" goes where it is empty then."""
    with suppress(OSError):
        (folder / PLAN).unlink(missing_ok=True)
    release(folder)
    for place in (folder, *([folder.parent] if folder.parent == RUNS else [])):
        try:
            place.rmdir()
        except OSError:
            return


def release(folder: Path) -> None:
    """Let another process have the run."""
    if (handle := _held.pop(folder.resolve(), None)) is not None:
        os.close(handle)


def taken_up(plan: dict[str, Any], run_dir: str | None, before: str | None) -> tuple[Path, bool]:
    """The folder of a job's run, which this process holds from then on, and whether the run has begun.

    The processes of a job are started with one command line, and started anew with the same one. So where ``run_dir``
    holds a run of this plan it is that run's.

    Args:
        plan: of the run.
        run_dir: as of ``create``.
        before: the folder that the job had before its processes were started anew.

    Raises:
        ValueError, OSError: as ``create`` and ``hold``.
    """
    found = run_dir if before is None else before
    if found is None or not (Path(found) / PLAN).exists() or read_plan(Path(found)) != plan:
        return create(plan, run_dir), False
    hold(Path(found))
    return Path(found), before is not None or _saved(Path(found))


def _saved(folder: Path) -> bool:
    return any(folder.glob("checkpoint-*.safetensors"))


def somewhere(path: Path) -> None:
    """Raise a FileNotFoundError if there is nothing where a run or a checkpoint should be."""
    if not path.exists():
        raise nowhere(path)


def nowhere(path: Path) -> FileNotFoundError:
    """The error for a path without checkpoints."""
    wanted = "a run folder with checkpoint-*.safetensors or such a file"
    return FileNotFoundError(f"checkpoint: expected {wanted}, got {path}")


def begun(folder: Path) -> None:
    """Raise a ValueError if no run was begun in ``folder``."""
    if not ((folder / PLAN).exists() or (folder / CONFIG).exists() or _saved(folder)):
        raise ValueError(f"--resume: expected a run folder with {PLAN}, got {folder}; start the run anew")


def reportable(folder: Path) -> None:
    """Raise a ValueError if that is no folder of a run, for `trtkern report`."""
    wanted = "report: expected a run folder of `trtkern train`"
    if not folder.is_dir():
        raise ValueError(f"{wanted}, got {folder} ({'a file' if folder.exists() else 'nothing there'})")
    try:
        begun(folder)
    except ValueError:
        raise ValueError(f"{wanted}, got {folder}, which holds no run") from None


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a run that was begun in ``folder``.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        plan = read_json(folder / PLAN)
    except FileNotFoundError:
        raise ValueError(f"--resume: expected a run folder with {PLAN}, got {folder}; start the run anew") from None
    except ValueError as error:
        raise ValueError(f"--resume: expected the {PLAN} of a run, got {folder / PLAN} ({error})") from None
    if "device" not in plan or "recipe" not in plan:
        raise ValueError(f"--resume: expected the {PLAN} of a run, got other contents in {folder / PLAN}")
    return plan
