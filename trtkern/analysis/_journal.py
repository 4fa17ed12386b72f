"""A file that work is written to as it is done, a line a piece, so that what was cut off goes on where it was."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trtkern.output.files import UNSUPPORTED, naming, parse


class Journal:
    """Lines of JSON: what the work is, then its pieces, {"at": [...], ...} each. Made by ``journal``."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self._handle = path, handle
        self.pieces: dict[tuple[int, ...], dict[str, Any]] = {}
        """What is done, by "at"."""

    def add(self, at: tuple[int, ...], **values: Any) -> None:
        """A piece is done: it stands in the file when this returns."""
        self.pieces[at] = values
        self._line({"at": at, **values})

    def _line(self, content: dict[str, Any]) -> None:
        line = json.dumps({name: _word(value) for name, value in content.items()})
        with naming(self.path):
            os.write(self._handle, (line + "\n").encode())

    def _begin(self, who: str, header: dict[str, Any]) -> None:
        """Read what is there, and begin where there is nothing.

        A last line without its end was being written when the process died: it goes.
        """
        with naming(self.path, "a file that can be read"):
            content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.ftruncate(self._handle, len(whole))
        if not whole:
            self._line(header)
            return
        found, *lines = whole.decode(errors="replace").splitlines()
        try:
            theirs = parse(found)
            for line in lines:
                piece = {name: _number(value) for name, value in parse(line).items()}
                self.pieces[tuple(map(int, piece.pop("at")))] = piece
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{who}: expected a file of points that {who} wrote, got {self.path}, which is none or is damaged; "
                "delete it, or name another file"
            ) from None
        ours = {name: json.loads(json.dumps(value)) for name, value in header.items()}
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"{who}: expected {self.path} to hold points of this work, got some of another one: {name} is "
                    f"{_brief(theirs.get(name))} there and {_brief(ours.get(name))} here; delete the file to begin "
                    "anew, name another one, or go on with what it was begun with"
                )


@contextmanager
def journal(who: str, path: str | Path, header: dict[str, Any]) -> Iterator[Journal]:
    """The journal in a file, which is made if it is not there; no other process has it meanwhile.

    Args:
        who: the function that works, for its messages.
        path: of the file.
        header: all that the pieces depend on, as JSON.

    Raises:
        ValueError: a file of other work, a damaged one, or one that another process is at.
        OSError: it cannot be read or written.
    """
    path = Path(path)
    with naming(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{who}: expected a file that no other process is at, got {path}, which is in use; wait for that one"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        made = Journal(path, handle)
        made._begin(who, header)
        yield made
    finally:
        os.close(handle)


def _word(value: Any) -> Any:
    """What JSON has no number for, as a word."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
