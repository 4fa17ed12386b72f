"""Checkpoints: one file a save, written whole or not at all, read without running anything that it holds."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "checkpoint.pt"
FORMAT = 1


class Checkpoint(NamedTuple):
    """A model's state and what it needs to be rebuilt (plain JSON types)."""

    model: dict[str, Tensor]
    metadata: dict[str, Any]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``path`` atomically: to a temporary file beside it, flushed to the disk, then renamed over it.

    Whatever goes wrong, a checkpoint that was there before stays as it was.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    content = {
        "metadata": json.dumps({"format": FORMAT, **checkpoint.metadata}),
        "model": {name: tensor.detach().cpu() for name, tensor in checkpoint.model.items()},
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, its tensors on the CPU. ``path`` may be the run folder that holds it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, no checkpoint, or of a later format.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint: expected a run folder with {NAME} or such a file, got {path}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        metadata = json.loads(content["metadata"])
        model = content["model"]
        version = metadata.pop("format")
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"checkpoint: expected a checkpoint of trtkern, got a damaged or different file {file} "
            f"({type(error).__name__}: {reason})"
        ) from None
    if version != FORMAT:
        raise ValueError(f"checkpoint: expected format {FORMAT}, got {version} in {file}; use a later trtkern")
    return Checkpoint(model, metadata)
