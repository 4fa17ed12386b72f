"""Tensors that take long to make, kept on the disk under a key of all that they depend on.

An entry is one safetensors file, ``<name>-<SHA-256 of the key>.safetensors``. It holds the key and a checksum, is
written whole or not at all, and is checked whenever it is read. A file may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtkern.data import tensor_file
from trtkern.data.files import in_utf8
from trtkern.output.files import cache_folder


def default_folder() -> Path:
    """$TRTKERN_CACHE, else $XDG_CACHE_HOME/trtkern, else ~/.cache/trtkern."""
    return cache_folder()


def fingerprint(root: Path, files: Iterable[Path], times: bool = True) -> str:
    """SHA-256 of the files' names below ``root``, sizes and, with ``times``, times of change; contents are not read.

    Raises:
        OSError: a file is missing.
    """
    rows = []
    for file in files:
        status = file.stat()
        rows.append([file.relative_to(root).as_posix(), status.st_size, *[status.st_mtime_ns] * times])
    return sha256_of(sorted(rows))


def sha256_of(key: Any) -> str:
    """SHA-256 of plain JSON types; a mapping has the same in any order."""
    return hashlib.sha256(_text(key).encode()).hexdigest()


def _text(key: Any) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)


def cached(folder: Path, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` returns, from the folder if it was made before; always pages of the entry's file.

    Args:
        folder: made if it is missing. Several processes may use it at once: the one that ends last writes last.
        key: all that the tensors depend on, plain JSON types; its "name", if any, begins the name of the file.
        make: called if there is no such file, or if it is damaged, which is warned about.

    Raises:
        OSError: the folder cannot be written (this is tried before ``make`` is called), or the disk is full.
            Nothing is left of a file that could not be written.
        ImportError: safetensors is not installed.
    """
    text = _text(key)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", str(key.get("name", "data")))
    path = folder / f"{name}-{sha256_of(key)}.safetensors"
    _require()
    try:
        return _read(path, text)
    except FileNotFoundError:
        pass
    except ValueError as error:
        warnings.warn(f"{error}; making it again", RuntimeWarning, stacklevel=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None
    tensors = tensor_file.on_cpu(make())
    _write(path, tensors, tensor_file.header(tensors, "key", text))
    return _read(path, text)


def empty(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled whose memory is pages of a file without a name in that folder, and not of this process:
    for what is larger than the memory.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    count = math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(1, count) * dtype.itemsize)  # so that no page can fail to come
            with in_utf8(Path(file.name)) as named:
                flat = torch.from_file(str(named), shared=True, size=max(1, count), dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise _unwritable(folder, error) from None
    return flat[:count].view(*shape)


def _require() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"data: expected safetensors for the cache, got none ({error}); pip install 'trtkern[data]'"
        ) from None


def _read(path: Path, text: str) -> dict[str, Tensor]:
    """Raises FileNotFoundError: no such file; ValueError: not what was written under this key."""
    from safetensors import SafetensorError

    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        tensors, header = tensor_file.read(path)
    except (SafetensorError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"data: expected a file of the cache, got a damaged one {path} ({reason})") from None
    if header.get("key") != text:
        raise ValueError(f"data: expected the key that names {path}, got another one in it")
    if not tensor_file.intact(tensors, header, "key"):
        raise ValueError(f"data: expected the checksum that {path} was written with, got another: it is damaged")
    return tensors


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    from safetensors import SafetensorError

    try:
        tensor_file.write(path, tensors, header)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path.parent, error) from None


def _unwritable(folder: Path, error: Exception) -> OSError:
    return OSError(
        f"data: expected a folder for the cache that can be written and has room, got {folder} ({error}); name another "
        f"one with --cache-dir"
    )
