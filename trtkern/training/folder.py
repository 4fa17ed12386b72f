"""The run folder: made, with its plan, before torch is loaded, so that a run that dies at once can be begun anew."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

PLAN = "plan.json"
"""What the user asked for (``plan.make``)."""


def create(plan: dict[str, Any], run_dir: str | None) -> Path:
    """Make the run folder with its plan: ``run_dir``, or the first free runs/<data>-<loss>-seed<k>[-n].

    Never one that holds a run.

    Raises:
        ValueError: ``run_dir`` holds something already.
        OSError: it cannot be made or written.
    """
    if run_dir is not None:
        folder = Path(run_dir)
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--run-dir: expected an empty or new folder, got {folder}, which holds files")
        _make(folder, exist_ok=True)
    else:
        folder = _free(Path("runs") / f"{plan['data']}-{plan['loss']}-seed{plan['seed']}")
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


def discard(folder: Path) -> None:
    """Take back ``create``: of a folder with nothing but its plan; the folders above go where they are empty then."""
    (folder / PLAN).unlink(missing_ok=True)
    for place in (folder, folder.parent):
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
    if not isinstance(plan, dict):
        raise ValueError(f"--resume: expected the {PLAN} of a run, got {folder / PLAN}")
    return plan


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, file and folder flushed to the disk."""
    temporary = path.with_name(f".{path.name}.part")  # what a crash leaves there is written over
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
