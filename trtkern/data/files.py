"""Files: read with errors that name them; from the network whole and checked, or not there at all."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.request
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

BLOCK = 1 << 20
"""Bytes read at once."""


def unreadable(what: str, path: str | Path, error: OSError) -> OSError:
    """The same kind of error, with a message that says what was expected."""
    return type(error)(f"data: expected {what} that can be read, got {path} ({error.strerror or error})")


@contextmanager
def in_utf8(path: Path) -> Iterator[Path]:
    """The path by a name that is UTF-8, for the length of the block: safetensors takes no other. Where the folder's is
    not, it is the folder as this process has it open.

    Raises:
        OSError: there is no such folder.
    """
    try:
        str(path.parent).encode()
    except UnicodeEncodeError:
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            yield Path(f"/proc/self/fd/{handle}", path.name)
        finally:
            os.close(handle)
    else:
        yield path


@contextmanager
def opened(path: Path, unpack: bool) -> Iterator[BinaryIO]:
    """A file to read bytes from, gzip-unpacked with ``unpack``.

    Raises:
        ValueError: a damaged gzip stream, met within; the message names the file.
        OSError: the file cannot be read.
    """
    try:
        with gzip.open(path, "rb") if unpack else open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"data: expected a whole gzip file, got {error} in {path}; get the file again") from None
    except OSError as error:
        raise unreadable("a file", path, error) from None


def checksum(path: Path, algorithm: str, unpack: bool = False) -> str:
    """The checksum of a file in hexadecimal, of what is packed in it with ``unpack``.

    Args:
        path: the file.
        algorithm: a name that ``hashlib.new`` knows, "md5" or "sha256".
        unpack: the file is gzip-packed and the checksum is of its contents.

    Raises:
        ValueError: with ``unpack``, a damaged gzip stream; the message names the file.
        OSError: the file cannot be read.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with opened(path, unpack) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it cannot be read; the message names it.
    """
    with opened(path, unpack=False) as file:
        return file.read()


def text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        ValueError: other bytes; the message names it.
        OSError: it cannot be read; the message names it.
    """
    try:
        return content(path).decode()
    except UnicodeDecodeError:
        raise ValueError(f"data: expected a text file in UTF-8, got other bytes in {path}; get it again") from None


def check_different(paths: Iterable[Path], what: str) -> None:
    """Raise if two of the files have the same content: one is a copy, and its samples may be in both splits.

    Only files of one size are opened, only those that begin alike are read.

    Raises:
        ValueError: two files are the same; the message names both.
        OSError: a file cannot be read; the message names it.
    """
    alike = _groups(paths, lambda path: path.stat().st_size)
    for read in (_beginning, lambda path: checksum(path, "sha256")):
        alike = [group for several in alike for group in _groups(several, read)]
    if alike:
        first, second = sorted(alike[0])[:2]
        raise ValueError(
            f"data: expected different {what}, got the same content in {first} and {second}; one is a copy (of a "
            f"second unpacking, say): delete it"
        )


def _groups(paths: Iterable[Path], key: Callable[[Path], Hashable]) -> list[list[Path]]:
    """Those of the files that share their key with others."""
    found: dict[Hashable, list[Path]] = {}
    for path in paths:
        found.setdefault(key(path), []).append(path)
    return [group for group in found.values() if len(group) > 1]


def _beginning(path: Path) -> bytes:
    with opened(path, unpack=False) as file:
        return hashlib.sha256(file.read(4096)).digest()


def fetch(target: Path, urls: Sequence[str], expected: str, check: Callable[[Path], str], limit: int) -> None:
    """Download a file to ``target``, which appears at once and checked, or not at all.

    The bytes go to ``<target>.part`` beside it, which is checked, then renamed; whatever ends the download, no part
    of it is left, and the next one starts anew.

    Args:
        target: where to; its folder is made.
        urls: where from; the next one is tried when a server does not answer or breaks off.
        expected: what ``check`` says of the right file, such as "MD5 c32a...".
        check: says the same of the file that came.
        limit: bytes of the file at most; no more is read.

    Raises:
        OSError: no server sent the file, or the folder cannot be written.
        ValueError: what came is not the file; nothing is kept of it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    failures = []
    try:
        for url in urls:
            try:
                _copy(url, partial, limit)
            except (OSError, http.client.HTTPException) as error:  # urllib.error.URLError is an OSError
                failures.append(f"{url}: {getattr(error, 'reason', error)}")
                continue
            if (came := check(partial)) != expected:
                raise ValueError(
                    f"data: expected {target.name} with {expected}, got {came} ({partial.stat().st_size:,} bytes) from "
                    f"{url}; try again, or put the right file into {target.parent} by hand"
                )
            partial.rename(target)
            return
    finally:
        partial.unlink(missing_ok=True)
    raise OSError(
        f"data: could not download {target.name} ({'; '.join(failures)}); put the file into {target.parent} by hand"
    )


def _copy(url: str, target: Path, limit: int) -> None:
    with urllib.request.urlopen(url, timeout=30) as answer, open(target, "wb") as file:
        while limit > 0:
            block = answer.read(min(BLOCK, limit))
            if not block:
                if missing := getattr(answer, "length", None):
                    raise ConnectionError(f"broke off {missing:,} bytes before the end")
                break
            file.write(block)
            limit -= len(block)
