"""What a user brings along: a network, data, a schedule, random changes, a loss; each by name or as an object."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trtkern import nn as snn
from trtkern.backends import named
from trtkern.train import Callback

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"
CLASSES = ["rows", "columns", "both", "none"]


class Net(nn.Module):
    """Images of stripes -> logits [T, B, classes]; Dropout draws from torch's generator in every step."""

    def __init__(self, classes: int = 4, hidden: int = 16, timesteps: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.layers = nn.Sequential(
            nn.Linear(64, hidden), snn.LIF(decay=0.5, backend=BACKEND), nn.Dropout(dropout), nn.Linear(hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1).expand(self.timesteps, -1, -1))


class Sequences(nn.Module):
    """Sequences [T, B, 5] -> [T, B, outputs]."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 12), snn.LIF(decay=0.5, backend=BACKEND), nn.Linear(12, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def network(hidden: int = 16, timesteps: int = 2, dropout: float = 0.0) -> nn.Module:
    return Net(4, hidden, timesteps, dropout)


def stripes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] with a bright row, column, both or none, and which."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 4
    places = torch.randint(8, (count,), generator=generator)
    for index, (label, place) in enumerate(zip(labels.tolist(), places.tolist(), strict=True)):
        images[index, 0, place] += label in (0, 2)
        images[index, 0, :, place] += label in (1, 2)
    return images, labels


class Stripes(torch.utils.data.Dataset):
    """Stripes with noise of every generator that a user may draw from."""

    classes = CLASSES

    def __init__(self, count: int = 96, seed: int = 0) -> None:
        self.images, self.labels = stripes(count, seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import random

        import numpy as np

        noise = torch.randn(1, 8, 8) + random.random() + float(np.random.rand())
        return self.images[index] + 0.05 * noise, int(self.labels[index])


def data(count: int = 96) -> tuple[Stripes, Stripes]:
    return Stripes(count), Stripes(32, 1)


def falling(step: int, steps: int) -> float:
    return 1 - step / steps


def noisy(images: Tensor, generator: torch.Generator, amount: float = 0.1) -> Tensor:
    return images + amount * torch.randn(images.shape, generator=generator)


def margin(logits: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    return scale * nn.functional.multi_margin_loss(logits.mean(0), target)


class Impatient(Callback):
    """Ends the run in a step, as a crash does; 0 is after the epoch."""

    def __init__(self, epoch: int, step: int) -> None:
        self.at = epoch, step

    def step(self, trainer, epoch, step, loss) -> None:
        if (epoch, step) == self.at:
            raise KeyboardInterrupt


def numbers(count: int = 64) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Sequences [N, 6, 5] and the mean of each, which a readout is to give."""
    x = torch.randn(count + 16, 6, 5, generator=torch.Generator().manual_seed(0))
    y = x.mean((1, 2))[:, None]
    return (x[:count], y[:count]), (x[count:], y[count:])
