"""The loss of a network over fixed samples, as a function of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trtkern.analysis._network import Samples, logits_of, still
from trtkern.names import VIEWS, unknown
from trtkern.nn.losses import SDTLoss, TETLoss
from trtkern.ops import checks

Loss = str | Callable[[Tensor, Tensor], Tensor]
"""A name of ``LOSSES``, or a function of the logits [T, B, C] and the labels [B]: a mean over the batch, 0-dim."""
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(zip(VIEWS, (SDTLoss(), TETLoss(lam=0.0)), strict=True))
"""sdt: the cross entropy of the mean output. tet: the mean over time of the cross entropy of every output."""
WORDS = {
    "sdt": "the cross entropy of the output averaged over time",
    "tet": "the cross entropy of the output of each step, averaged over time",
}


def loss_called(who: str, loss: Loss) -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """The name of a loss and the function.

    Raises:
        ValueError, TypeError: no such name, no function.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise unknown(f"{who}: loss", loss, LOSSES, ", or a function of (logits, labels)")
        return loss, LOSSES[loss]
    if not callable(loss):
        raise TypeError(
            f"{who}: expected loss to be {' or '.join(map(repr, LOSSES))} or a function of (logits [T, B, C], labels), "
            f"got {checks.describe(loss)}"
        )
    return getattr(loss, "__name__", type(loss).__name__), loss


class Value(NamedTuple):
    """The loss where the weights are."""

    losses: Tensor
    """Mean loss of each batch, float64 [batches], on the CPU."""
    correct: int
    """Samples whose largest mean output is their label's."""


class Objective:
    """The mean loss over the samples; ``trainable`` parameters, in the model's order, are its weights.

    Only valid inside ``opened``, which puts the weights back.
    """

    def __init__(self, who: str, model: nn.Module, samples: Samples, loss: Loss) -> None:
        self.who, self.model, self.samples = who, model, samples
        self.loss_name, self.loss = loss_called(who, loss)
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trainable]
        self.parameters = [p for _, p in trainable]
        self.start = [p.detach().clone() for p in self.parameters]
        self.shares = torch.tensor([labels.numel() / len(samples) for _, labels in samples], dtype=torch.float64)
        """Of each batch in the mean, float64 [batches]."""
        wide = any(p.dtype == torch.float64 for p in self.parameters)
        self.dtype = torch.float64 if wide else torch.float32
        """Of flat vectors."""
        self.device = self.parameters[0].device

    @property
    def size(self) -> int:
        """How many weights there are."""
        return sum(p.numel() for p in self.parameters)

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """A tensor for each parameter (None is zero) as one vector [size]."""
        given = zip(self.parameters, tensors, strict=True)
        whole = [p.detach().new_zeros(p.shape) if t is None else t for p, t in given]
        return torch.cat([t.flatten().to(self.dtype) for t in whole])

    def split(self, vector: Tensor) -> list[Tensor]:
        """The inverse of ``flat``: views."""
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def move(self, *steps: tuple[float, Sequence[Tensor | None]]) -> None:
        """The weights to where they started plus the sum of alpha * direction, in place; without steps, back."""
        for i, (p, start) in enumerate(zip(self.parameters, self.start, strict=True)):
            # Of .data: a graph that was made before stays valid.
            p.data.copy_(start)
            for alpha, direction in steps:
                part = direction[i]
                if part is not None and alpha != 0:
                    p.data.add_(part.to(p.dtype), alpha=alpha)

    def value(self) -> Value:
        """The loss and what is classified correctly, without a graph."""
        losses, correct = [], torch.zeros((), dtype=torch.int64, device=self.device)
        with torch.no_grad():
            for inputs, labels in self.samples:
                logits = logits_of(self.who, self.model, inputs, labels)
                losses.append(self._loss(logits, labels).double())
                correct += (logits.mean(0).argmax(1) == labels).sum()
        return Value(torch.stack(losses).cpu(), int(correct))

    def mean(self, losses: Tensor) -> float:
        """The mean over the samples of what is given by batch, [batches]."""
        return float(self.shares @ losses)

    def deviation(self, values: Tensor) -> float:
        """The standard error of the mean over the samples, from its values in the batches; NaN if there is one."""
        count = values.numel()
        if count < 2:
            return float("nan")
        squares = (self.shares * (values - self.shares @ values)).square().sum()
        return float((squares * count / (count - 1)).sqrt())

    def gradients(self, *, twice: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """(loss, gradient [size]) of one batch after the other; ``twice`` leaves a graph to differentiate again."""
        with torch.enable_grad():
            for inputs, labels in self.samples:
                loss = self._loss(logits_of(self.who, self.model, inputs, labels), labels)
                found = torch.autograd.grad(loss, self.parameters, create_graph=twice, allow_unused=True)
                yield loss.detach().double().cpu(), self.flat(found)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss(logits, labels)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            raise TypeError(
                f"{self.who}: expected loss to return a 0-dim tensor, the mean over the batch, got "
                f"{checks.describe(loss)}"
            )
        return loss


@contextmanager
def opened(who: str, model: nn.Module, samples: Samples, loss: Loss) -> Iterator[Objective]:
    """An objective of a model in evaluation mode, which is afterwards as it was, its weights bit for bit."""
    with still(who, model):
        objective = Objective(who, model, samples, loss)
        try:
            yield objective
        finally:
            objective.move()
