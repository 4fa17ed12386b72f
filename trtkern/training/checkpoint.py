"""Checkpoints: one safetensors file a save, written whole or not at all, checked by a checksum, and only data.

A run keeps its last few, ``checkpoint-<step>.safetensors``, so that there is one before a damaged one, and beside them
the weights that it chose, ``best-<step>.safetensors``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save as serialise
from torch import Tensor

from trtkern.data import tensor_file
from trtkern.output.files import naming, parse, write
from trtkern.parallel.job import Job
from trtkern.training.folder import nowhere

FORMAT = 2
KEPT = 3
"""Files of a run that stay, the newest."""

_NAME = re.compile(r"[a-z]+-(\d+)\.safetensors")
_MODEL, _STATE = "model.", "state."
_TEXT = "trtkern"
"""The key of the metadata in the header of a file."""


class DamagedError(ValueError):
    """A file that is no whole checkpoint; the message names it."""


class Checkpoint(NamedTuple):
    """A model's state, what it needs to be rebuilt (plain JSON types), and what a run needs to go on."""

    model: dict[str, Tensor]
    metadata: dict[str, Any]
    state: dict[str, Tensor]
    """Tensors of the optimiser and of the generators, by names of their own."""


class Writer:
    """Writes checkpoints, one after the other.

    Args:
        beside: while the training goes on, from copies of the tensors; else at once.
    """

    def __init__(self, beside: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if beside else None
        self._under_way: list[Future[Any]] = []

    def write(self, save: Callable[..., object], folder: Path, checkpoint: Checkpoint, step: int) -> None:
        """``save(folder, checkpoint, step)``.

        Raises:
            OSError: it could not be written; of one that is written beside, a later call or ``settle`` raises.
        """
        if self._pool is None:
            save(folder, checkpoint, step)
            return
        while self._under_way and self._under_way[0].done():
            self._under_way.pop(0).result()
        copied = checkpoint._replace(model=_copies(checkpoint.model), state=_copies(checkpoint.state))
        self._under_way.append(self._pool.submit(save, folder, copied, step))

    def settle(self) -> None:
        """Wait until all of them are written.

        Raises:
            OSError: one could not be.
        """
        while self._under_way:
            self._under_way.pop(0).result()

    def close(self) -> None:
        """Wait until all of them are written, or could not be; what ``settle`` raises is not raised."""
        if self._pool is not None:
            self._pool.shutdown()


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in memory of their own, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def spread(job: Job, found: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that the first process of a job has read, in all of them; None where it has none."""
    if job.alone:
        return found
    metadata = job.told(None if found is None else found.metadata)
    if metadata is None:
        return None
    model, state = ({}, {}) if found is None else (found.model, found.state)
    return Checkpoint(job.spread(model), metadata, job.spread(state))


def save(folder: Path, checkpoint: Checkpoint, step: int, kind: str = "checkpoint", kept: int = KEPT) -> Path:
    """Write ``<kind>-<step>.safetensors`` atomically, and drop all but the newest ``kept`` of its kind.

    To a temporary file beside it, flushed to the disk, then renamed. Whatever goes wrong, the checkpoints that were
    there before stay as they were.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    tensors = {_MODEL + name: tensor for name, tensor in checkpoint.model.items()}
    tensors |= {_STATE + name: tensor for name, tensor in checkpoint.state.items()}
    tensors = _apart(tensor_file.on_cpu(tensors))
    text = json.dumps({"format": FORMAT, **checkpoint.metadata})
    content = serialise(tensors, tensor_file.header(tensors, _TEXT, text))
    path = folder / f"{kind}-{step:08d}.safetensors"
    write(path, content)
    for old in found(folder, kind)[kept:]:
        with naming(old, "to remove"):
            old.unlink(missing_ok=True)
    return path


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With memory of its own for each: weights that a network has under two names stand in the file twice."""
    places: set[int] = set()
    made = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone() if place in places and place else tensor
        places.add(place)
    return made


def found(folder: Path, kind: str = "checkpoint") -> list[Path]:
    """The checkpoints of a run folder, the newest first."""
    return [path for path in _called(folder, kind) if path.is_file()]


def _called(folder: Path, kind: str = "checkpoint") -> list[Path]:
    """Whatever has the name of a checkpoint, the newest first."""
    steps = {at: path for path in folder.glob(f"{kind}-*") if (at := step_of(path)) is not None}
    return [steps[step] for step in sorted(steps, reverse=True)]


def step_of(path: Path) -> int | None:
    """The step in the name of such a file."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def load(path: Path, warn: Callable[[str], None] | None = None) -> Checkpoint:
    """Read a checkpoint, its tensors on the CPU.

    Args:
        path: a file, or the run folder, whose newest undamaged one is taken.
        warn: told about each damaged one of a folder; without it, a damaged one is an error.

    Raises:
        FileNotFoundError: no such file, or none in the folder.
        DamagedError: the file is damaged, no checkpoint, or of another format.
    """
    files = _called(path) if path.is_dir() else [path] if path.exists() else []
    if not files:
        raise nowhere(path)
    for file, before in zip(files, [*files[1:], None], strict=True):
        try:
            return _read(file)
        except DamagedError as error:
            if warn is None or before is None:
                raise
            warn(f"{error}; going on from the one before it, {before}")
    raise AssertionError("unreachable")


def _read(file: Path) -> Checkpoint:
    try:
        if not file.is_file():  # opening a pipe would wait for ever
            raise TypeError("a folder" if file.is_dir() else "no file")
        tensors, header = tensor_file.read(file, copy=True)  # the file may go while the run goes on
        metadata = parse(header[_TEXT])
        version = metadata.pop("format")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DamagedError(
            f"checkpoint: expected a checkpoint of trtkern, got a damaged or different file {file} "
            f"({type(error).__name__}: {reason})"
        ) from None
    if version != FORMAT:
        raise DamagedError(
            f"checkpoint: expected format {FORMAT}, got {version} in {file}; use the trtkern that made it"
        )
    if not tensor_file.intact(tensors, header, _TEXT):
        raise DamagedError(
            f"checkpoint: expected the checksum that {file} was written with, got another: it is damaged"
        )
    parts = [
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (_MODEL, _STATE)
    ]
    return Checkpoint(parts[0], metadata, parts[1])
