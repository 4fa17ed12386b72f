"""Files: written whole or not at all, read as JSON, and errors that name them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)
"""What a file system answers that knows no fsync of folders, or no locks."""
ADVICE = {
    errno.ENOSPC: "make room on that disk", errno.EDQUOT: "make room in your quota",
    errno.EROFS: "mount it for writing", **dict.fromkeys((errno.EACCES, errno.EPERM), "look at its permissions"),
}  # fmt: skip


def cache_folder() -> Path:
    """$TRTKERN_CACHE, else $XDG_CACHE_HOME/trtkern, else ~/.cache/trtkern; what is kept there can be made again."""
    own, base = os.environ.get("TRTKERN_CACHE", ""), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).absolute()
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "trtkern"


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
