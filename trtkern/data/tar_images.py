"""Images in tar shards, read where they lie, and the order in which an epoch goes through them."""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from trtkern.data import files
from trtkern.data.folder import DataError, ImageFiles
from trtkern.data.tar_index import Index
from trtkern.data.tar_shards import Shard

BUFFER = 10_000
"""Samples that the shuffle buffer of an epoch holds."""
OPEN = 64
"""Shards that a process keeps open at most."""
PIECE = 1 << 16
"""Samples of an order that are drawn at once."""


class TarImages(ImageFiles):
    """Images [N, 3, size, size] uint8 in tar shards: what stands for a tensor of them in a ``Split``.

    Any process reads any image, by one ``pread`` at the place that the index says. What is kept in memory is 8 bytes
    an image; the index is pages of its file.

    Args:
        index: where the images lie.
        rows: [N] which of them; None is all.
        size: height and width of an image as it is evaluated.
        buffer: samples of the shuffle buffer of ``order``.

    Raises:
        ValueError: ``size`` or ``buffer`` is not above 0.
    """

    def __init__(self, index: Index, rows: np.ndarray | None = None, size: int = 224, buffer: int = BUFFER) -> None:
        if not isinstance(buffer, int) or isinstance(buffer, bool) or buffer < 1:
            raise ValueError(f"data: expected a shuffle buffer of at least 1 sample, got {buffer!r}")
        super().__init__(index.root, index.names, size)
        self.index, self.buffer = index, buffer
        self.rows = np.arange(len(index.names)) if rows is None else rows
        self._files = _Files(index.root, index.shards)

    def __len__(self) -> int:
        return len(self.rows)

    def _taken(self, chosen: slice | np.ndarray) -> TarImages:
        part = TarImages(self.index, self.rows[chosen], self.size, self.buffer)
        part._files = self._files
        return part

    def name(self, index: int) -> bytes:
        """The shard of an image and its member there."""
        row = self.rows[index]
        return os.fsencode(self.index.shards[self.index.shard[row]].name) + b"/" + bytes(self.index.names[row])

    def stored(self, index: int) -> int:
        """Bytes of an image as it is stored."""
        return int(self.index.size[self.rows[index]])

    def opened(self, index: int) -> BinaryIO:
        """An image as it is stored.

        Raises:
            DataError: the shard was changed, or ends before the image does; the message names it.
            OSError: the shard cannot be read.
        """
        row = self.rows[index]
        offset, size = int(self.index.offset[row]), int(self.index.size[row])
        return io.BytesIO(self._files.read(int(self.index.shard[row]), offset, size))

    def digests(self) -> list[bytes]:
        """SHA-256 of each image's bytes.

        Raises:
            DataError, OSError: as of ``opened``; the message names the shard and the member.
        """
        found = []
        for index in range(len(self)):
            try:
                found.append(hashlib.sha256(self.opened(index).read()).digest())
            except OSError as error:
                raise files.unreadable("an image", self.path(index), error) from None
        return found

    def order(self, generator: torch.Generator) -> Tensor:
        """[N] int64: the order of an epoch, ``shuffled`` by shard and buffer."""
        return shuffled(torch.from_numpy(self.index.shard[self.rows]), self.buffer, generator)


def shuffled(shard: Tensor, buffer: int, generator: torch.Generator) -> Tensor:
    """A permutation of samples that lie in shards, of which few are read from at a time.

    The shards come in a random order, one after the other. Their samples go through a buffer: it is filled with the
    first ones, then each next one takes the place of one that is drawn from it, which comes out; at the end, what is
    left comes in a random order. A sample leaves the buffer after ``buffer`` others on average.

    Args:
        shard: [N] the shard of each sample.
        buffer: samples that the buffer holds; as many as there are, or more, and the permutation is any.
        generator: all is drawn from it, so one state gives one order.

    Returns:
        [N] int64.
    """
    grouped = shard.long().argsort(stable=True)
    sizes = torch.bincount(shard) if len(shard) else shard
    groups = grouped.split(sizes[sizes > 0].tolist())
    drawn = torch.randperm(len(groups), generator=generator)
    sequence = torch.cat([groups[place] for place in drawn.tolist()])
    held = sequence[:buffer].tolist()
    out = torch.empty(len(sequence), dtype=torch.int64)
    for first in range(len(held), len(sequence), PIECE):
        coming = sequence[first : first + PIECE].tolist()
        leaving = []
        drawn = torch.randint(len(held), (len(coming),), generator=generator)
        for place, sample in zip(drawn.tolist(), coming, strict=True):
            leaving.append(held[place])
            held[place] = sample
        out[first - len(held) :][: len(leaving)] = torch.tensor(leaving)
    out[len(sequence) - len(held) :] = torch.tensor(held)[torch.randperm(len(held), generator=generator)]
    return out


class _Files:
    """The shards that this process has open, the latest ``OPEN`` of them. A forked one goes on with the same: a
    ``pread`` moves no position that they would share."""

    def __init__(self, root: Path, shards: tuple[Shard, ...]) -> None:
        self._root, self._shards = root, shards
        self._opened: OrderedDict[int, io.FileIO] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """So many bytes of a shard from there on."""
        shard, path = self._shards[number], self._root / self._shards[number].name
        file = self._of(number, path)
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != shard[1:]:
            raise DataError(
                f"data: expected {path} as it was when its index was read, of {shard.size:,} bytes, got it changed "
                f"since, of {status.st_size:,} bytes; put it back, or begin anew"
            )
        content = os.pread(file.fileno(), size, offset)
        if len(content) != size:
            raise DataError(
                f"data: expected {size:,} bytes from byte {offset:,} of {path}, got {len(content):,}; get it again"
            )
        return content

    def _of(self, number: int, path: Path) -> io.FileIO:
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        while len(self._opened) >= OPEN:
            self._opened.popitem(last=False)[1].close()
        self._opened[number] = file = io.FileIO(path)
        return file
