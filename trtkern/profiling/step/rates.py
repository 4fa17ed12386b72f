"""What the machine can do at the most: copy memory and multiply matrices, timed in the rounds of what they bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

COPIED = {"cpu": 2**27, "cuda": 2**28}
"""Bytes of the tensor that is copied: beyond the caches."""
SIDE = {"cpu": 1024, "cuda": 4096}
"""Rows and columns of the matrices."""
TRIES = 3
"""Products of each dtype that is compared."""


class Rates(NamedTuple):
    """Of a round, or medians over the rounds."""

    copy: float
    """Bytes read and written per second by torch's ``copy_``."""
    product: float
    """FLOP/s of a product of square matrices, in the dtype of the step or in float32, whichever is faster: on a CPU
    without arithmetic of 16 bits that is float32."""


class Machine:
    """``round`` after ``round``, then ``found``."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        kind = device.type if device.type in SIDE else "cpu"
        self._device = device
        self._source = torch.ones(COPIED[kind] // 4, device=device)
        self._target = torch.empty_like(self._source)
        self._side = SIDE[kind]
        self.found: list[Rates] = []
        """Of each round."""
        self.shorter: float | None = None
        """How much faster products of bfloat16 are than of float32, where that is the dtype of the step."""
        self._use(self._faster(dtype), self._side)
        self._copy()
        self._multiply()

    def _faster(self, dtype: torch.dtype) -> torch.dtype:
        """Of this dtype and float32, by small products."""
        kinds = dict.fromkeys((dtype, torch.float32))
        shorter = dtype == torch.float32
        taken = {}
        for kind in [*kinds, *[torch.bfloat16] * shorter]:
            self._use(kind, max(16, self._side // 4))
            self._multiply()
            taken[kind] = median(self._seconds(self._multiply) for _ in range(TRIES))
        if shorter:
            self.shorter = taken[torch.float32] / taken[torch.bfloat16]
        return min(kinds, key=lambda kind: taken[kind])

    def _use(self, dtype: torch.dtype, side: int) -> None:
        self._left = torch.rand(side, side, device=self._device).to(dtype)
        self._product = torch.empty_like(self._left)

    def round(self) -> None:
        """Time each once."""
        copy = 2 * self._source.nbytes / self._seconds(self._copy)
        self.found.append(Rates(copy, 2 * self._side**3 / self._seconds(self._multiply)))

    def _copy(self) -> None:
        self._target.copy_(self._source)

    def _multiply(self) -> None:
        torch.mm(self._left, self._left, out=self._product)

    def _seconds(self, work: Callable[[], None]) -> float:
        wait(self._device)
        begin = time.perf_counter()
        work()
        wait(self._device)
        return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
