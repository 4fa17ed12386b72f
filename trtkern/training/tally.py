"""What an epoch adds up, and how far it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trtkern.parallel.job import Job


class Tally:
    """Running sums of the loss parts and of correct answers, on the device: adding never waits for it.

    Args:
        device: where.
        classes: of how many it also counts which one was taken for which.
        scored: whether answers are right or wrong; numbers instead of classes are not.
    """

    NAMES = ("loss", "cross_entropy", "mse", "regularizer")

    def __init__(self, device: str, classes: int = 0, scored: bool = True) -> None:
        self._scored = scored
        self._sums = torch.zeros(len(self.NAMES) + 1, dtype=torch.float64, device=device)
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        """[classes, classes]: images of the class of the row that were answered with the class of the column."""
        self.images = 0

    @torch.no_grad()
    def add(self, parts: tuple[Tensor, ...], logits: Tensor, target: Tensor) -> None:
        """One batch: its parts (means over the batch), its logits [T, B, C], and its targets: labels [B], or those of
        each step [T, B], where the answer of each step counts; soft ones, [B, C] or [T, B, C], are of their largest
        class."""
        count = logits.shape[1]
        correct = self._score(logits, target) if self._scored else logits.new_zeros(())
        self._sums[:-1] += torch.stack([*parts]).double() * count
        self._sums[-1] += correct
        self.images += count

    def _score(self, logits: Tensor, target: Tensor) -> Tensor:
        """How many answers are right; those of single steps count in part."""
        if target.is_floating_point():
            target = target.argmax(-1)
        steps = target.dim() == 2
        answer = logits.float().argmax(2) if steps else logits.float().mean(0).argmax(1)
        correct = (answer == target).sum()
        if self.confusion.numel():
            size = self.confusion.shape[0]
            self.confusion += torch.bincount((target * size + answer).flatten(), minlength=size**2).view(size, size)
        return correct / len(target) if steps else correct

    def clear(self) -> None:
        """Begin anew, in the same memory."""
        self._sums.zero_()
        self.confusion.zero_()
        self.images = 0

    def state(self) -> Tensor:
        """The sums, and the number of images behind them."""
        return torch.cat([self._sums.cpu(), torch.tensor([self.images], dtype=torch.float64)])

    def over(self, job: Job) -> Tally:
        """That of all processes of a job together; itself where there is one. This one stays what it is."""
        if job.alone:
            return self
        whole = Tally(str(self._sums.device), len(self.confusion), self._scored)
        whole.restore(job.add_(self.state().to(self._sums.device)))
        whole.confusion = job.add_(self.confusion.clone()) if self.confusion.numel() else self.confusion
        return whole

    def restore(self, state: Tensor) -> None:
        """The inverse of ``state``."""
        self._sums.copy_(state[:-1])
        self.images = int(state[-1])

    def read(self) -> dict[str, float]:
        """Averages over the images, accuracy as a fraction; without it where nothing is scored."""
        values = [value / self.images for value in self._sums.tolist()]
        names = (*self.NAMES, "accuracy") if self._scored else self.NAMES
        return dict(zip(names, values, strict=False))


class Begun(NamedTuple):
    """An epoch that has begun: steps made, their sums, and the seconds that they took."""

    step: int = 0
    sums: Tensor | None = None
    seconds: float = 0.0
