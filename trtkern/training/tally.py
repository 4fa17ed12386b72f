"""What an epoch adds up, and how far it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tally:
    """Running sums of the loss parts and of correct answers, on the device: adding never waits for it.

    With ``classes`` it also counts which class was taken for which.
    """

    NAMES = ("loss", "cross_entropy", "mse", "regularizer")

    def __init__(self, device: str, classes: int = 0) -> None:
        self._sums = torch.zeros(len(self.NAMES) + 1, dtype=torch.float64, device=device)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        """[classes, classes]: images of the class of the row that were answered with the class of the column."""
        self.images = 0

    @torch.no_grad()
    def add(self, parts: tuple[Tensor, ...], logits: Tensor, target: Tensor) -> None:
        """One batch: its parts (means over the batch), its logits [T, B, C] and its labels [B]."""
        count = target.numel()
        answer = logits.float().mean(0).argmax(1)
        correct = (answer == target).sum()
        self._sums += torch.stack([*(part.double() * count for part in parts), correct.double()])
        if self.confusion.numel():
            size = self.confusion.shape[0]
            self.confusion += torch.bincount(target * size + answer, minlength=size**2).view(size, size)
        self.images += count

    def clear(self) -> None:
        """Begin anew, in the same memory."""
        self._sums.zero_()
        self.confusion.zero_()
        self.images = 0

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
