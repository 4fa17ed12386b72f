"""Tensors in one safetensors file, with a text and a checksum of both: checkpoints and entries of the cache.

The text stands in the file's header under a key of the caller's, the checksum beside it as "sha256". Safetensors is
imported when a file is read or written.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trtkern.data.files import in_utf8


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As such a file holds them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def header(tensors: Mapping[str, Tensor], key: str, text: str) -> dict[str, str]:
    """What stands in the header of a file of these tensors."""
    return {key: text, "sha256": _checksum(tensors, text)}


def read(path: Path, copy: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its header; whether they belong together ``intact`` says.

    Args:
        copy: whether the tensors are in memory of their own; otherwise they are pages of the file as long as they live.

    Raises:
        OSError: the file cannot be read.
        safetensors.SafetensorError, ValueError, RuntimeError: it is no whole file of tensors.
    """
    from safetensors import safe_open

    with in_utf8(path) as named, safe_open(named, framework="pt", device="cpu") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        told = opened.metadata() or {}
    return {name: tensor.clone() for name, tensor in tensors.items()} if copy else tensors, told


def write(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    """Write a file of these tensors and this header whole or not at all, flushed to the disk.

    Raises:
        OSError, safetensors.SafetensorError: it cannot be written; nothing is left of it.
    """
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with in_utf8(temporary) as named:
            save_file(dict(tensors), named, dict(told))
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)  # the rename itself
    finally:
        temporary.unlink(missing_ok=True)


def intact(tensors: Mapping[str, Tensor], told: Mapping[str, str], key: str) -> bool:
    """Whether the tensors and the text under ``key`` are those that the file was written with."""
    return key in told and told.get("sha256") == _checksum(tensors, told[key])


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of the text and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
