"""What an epoch adds up, and how far it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tally:
    """Running sums of the loss parts and of correct answers, on the device: adding never waits for it."""

    NAMES = ("loss", "cross_entropy", "mse", "regularizer")

    def __init__(self, device: str) -> None:
        self._sums = torch.zeros(len(self.NAMES) + 1, dtype=torch.float64, device=device)
        self.images = 0

    @torch.no_grad()
    def add(self, parts: tuple[Tensor, ...], logits: Tensor, target: Tensor) -> None:
        """One batch: its parts (means over the batch), its logits [T, B, C] and its labels [B]."""
        count = target.numel()
        correct = (logits.float().mean(0).argmax(1) == target).sum()
        self._sums += torch.stack([*(part.double() * count for part in parts), correct.double()])
        self.images += count

    def state(self) -> Tensor:
        """The sums, and the number of images behind them."""
        return torch.cat([self._sums.cpu(), torch.tensor([self.images], dtype=torch.float64)])

    def restore(self, state: Tensor) -> None:
        """The inverse of ``state``."""
        self._sums.copy_(state[:-1])
        self.images = int(state[-1])

    def read(self) -> dict[str, float]:
        """Averages over the images, accuracy as a fraction."""
        values = [value / self.images for value in self._sums.tolist()]
        return dict(zip((*self.NAMES, "accuracy"), values, strict=True))


class Begun(NamedTuple):
    """An epoch that has begun: steps made, their sums, and the seconds that they took."""

    step: int = 0
    sums: Tensor | None = None
    seconds: float = 0.0
