"""The run folder: made, with its plan, before torch is loaded, so that a run that dies at once can be begun anew."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PLAN = "plan.json"
"""What the user asked for (``plan.make``)."""
CONFIG = "config.json"
"""What is in force (``run.write_config``)."""
RUNS = Path("runs")

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)
"""What a file system answers that knows no fsync of folders, or no locks."""
ADVICE = {
    errno.ENOSPC: "make room on that disk", errno.EDQUOT: "make room in your quota",
    errno.EROFS: "mount it for writing", **dict.fromkeys((errno.EACCES, errno.EPERM), "look at its permissions"),
}  # fmt: skip

_PART = re.compile(
    r"\.(?:plan\.json|config\.json|metrics\.jsonl|result\.json|report\.html|analysis\.html|curves\.png|seeds\.json"
    r"|[a-z]+-\d+\.safetensors)\.part"
)
"""What ``write`` leaves of a file of a run when it is killed."""


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
        folder = _free(RUNS / f"{plan['data']}-{plan['loss']}-seed{plan['seed']}")
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


def hold(folder: Path) -> None:
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
            f"train: expected a run that no other process is at, got {folder}, which is in use; wait for that one, or "
            f"end it"
        ) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            os.close(handle)
            raise named(error, folder, "to lock") from None
        tell(
            f"the file system of {folder} has no locks ({error.strerror}): start no other process on this run while "
            f"this one is at it"
        )
        _held[place] = handle
        return
    _held[place] = handle
    with naming(folder, "to clear away half-written files in"):  # without a lock another process may be at them
        for path in [path for path in place.iterdir() if _PART.fullmatch(path.name)]:
            path.unlink(missing_ok=True)


def tell(line: str) -> None:
    """Say on stderr what the user should know before there is a console."""
    print(f"trtkern: {line}", file=sys.stderr)


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
    if (handle := _held.pop(folder.resolve(), None)) is not None:
        os.close(handle)
    for place in (folder, *([folder.parent] if folder.parent == RUNS else [])):
        try:
            place.rmdir()
        except OSError:
            return


def begun(folder: Path) -> None:
    """Raise a ValueError if no run was begun in ``folder``."""
    if not ((folder / PLAN).exists() or (folder / CONFIG).exists() or any(folder.glob("checkpoint-*.safetensors"))):
        raise ValueError(f"--resume: expected a run folder with {PLAN}, got {folder}; start the run anew")


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it holds something else.
        OSError: it cannot be read; the message names it.
    """
    with naming(path, "a file that can be read"):
        content = path.read_bytes()
    return parse(content)


def parse(content: bytes | str) -> dict[str, Any]:
    """The JSON object in that text.

    Raises:
        ValueError: it is none.
    """
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} where an object should stand")
    return found


def named(error: OSError, path: Path, wanted: str = "to write") -> OSError:
    """The same error with the file that it befell, and what to do; one that has its words already as it is."""
    if error.strerror is None:
        return error
    advice = ADVICE.get(error.errno or 0)
    made = type(error)(f"train: expected {wanted} {path}, got {error.strerror}" + (f"; {advice}" if advice else ""))
    made.errno = error.errno
    return made


@contextmanager
def naming(path: Path, wanted: str = "to write") -> Iterator[None]:
    """Inside, an OSError that names no file becomes one of that file (``named``)."""
    try:
        yield
    except OSError as error:
        raise named(error, path, wanted) from None


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, file and folder flushed to the disk.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    temporary = path.with_name(f".{path.name}.part")  # what a crash leaves there goes when the run is taken up again
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def _flush(folder: Path) -> None:
    """The names in a folder, to the disk, where the file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)
