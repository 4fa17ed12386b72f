"""The run folder: made, with its plan, before torch is loaded, so that a run that dies at once can be begun anew."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any

PLAN = "plan.json"
"""What the user asked for (``plan.make``)."""
RUNS = Path("runs")


def create(plan: dict[str, Any], run_dir: str | None) -> Path:
    """Make the run folder with its plan: ``run_dir``, or the first free runs/<data>-<loss>-seed<k>[-n].

    Never one that holds a run; from then on it is this process's (``hold``).

    Raises:
        ValueError: ``run_dir`` holds something already, or another process has it.
        OSError: it cannot be made or written.
    """
    if run_dir is not None:
        folder = Path(run_dir)
        if not folder.is_dir():
            _make(folder, exist_ok=True)
        hold(folder)
        if any(folder.iterdir()):
            raise ValueError(f"--run-dir: expected an empty or new folder, got {folder}, which holds files")
        _make(folder, exist_ok=True)
    else:
        folder = _free(RUNS / f"{plan['data']}-{plan['loss']}-seed{plan['seed']}")
        hold(folder)
    write(folder / PLAN, (json.dumps(plan, indent=2) + "\n").encode())
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


def hold(folder: Path) -> None:
    """Keep other processes from this run, until this one ends, however it does.

    Raises:
        ValueError: another process has it.
        OSError: there is no such folder.
    """
    if (place := folder.resolve()) in _held:
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"train: expected a run that no other process is at, got {folder}, which is in use; wait for that one, or "
            f"end it"
        ) from None
    _held[place] = handle


def _let_go() -> None:
    """In a forked process: the run is its parent's, whose death must end the hold."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def discard(folder: Path) -> None:
    """Take back ``create``, of a folder with nothing but its plan; "runs" goes where it is empty then."""
    (folder / PLAN).unlink(missing_ok=True)
    if (handle := _held.pop(folder.resolve(), None)) is not None:
        os.close(handle)
    for place in (folder, *([folder.parent] if folder.parent == RUNS else [])):
        try:
            place.rmdir()
        except OSError:
            return


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a run that was begun in ``folder``.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--resume: expected a run folder with {PLAN}, got {folder}; start the run anew") from None
    except ValueError as error:
        raise ValueError(f"--resume: expected the {PLAN} of a run, got {folder / PLAN} ({error})") from None
    if not isinstance(plan, dict) or "device" not in plan or "recipe" not in plan:
        raise ValueError(f"--resume: expected the {PLAN} of a run, got other contents in {folder / PLAN}")
    return plan


def named(error: OSError, path: Path) -> OSError:
    """The same error with the file that it befell."""
    return OSError(error.errno, f"train: expected to write {path}, got {error.strerror}")


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, file and folder flushed to the disk."""
    temporary = path.with_name(f".{path.name}.part")  # what a crash leaves there is written over
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise named(error, path) from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
