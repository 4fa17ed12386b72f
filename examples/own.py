"""A network, data, a schedule and an augmentation of one's own: `python examples/own.py` trains them in seconds.

Killed and started again, it goes on where it was, to the same bits. docs/own.md explains it line by line.
"""

import torch
from torch import nn

from trtkern import nn as snn
from trtkern.train import Trainer


class Network(nn.Module):
    def __init__(self, hidden: int = 64, timesteps: int = 4) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.layers = nn.Sequential(nn.Linear(64, hidden), snn.LIF(decay=0.5), nn.Linear(hidden, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.flatten(1).expand(self.timesteps, -1, -1))  # [T, B, C]


class Stripes(torch.utils.data.Dataset):
    classes = ("rows", "columns")

    def __init__(self, count: int, seed: int) -> None:
        self.places = torch.randint(8, (count,), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = torch.rand(1, 8, 8), index % 2  # the noise is another one in every epoch
        image[0].T[self.places[index]] += label
        image[0][self.places[index]] += 1 - label
        return image, label


def data() -> tuple[Stripes, Stripes]:
    return Stripes(800, seed=0), Stripes(200, seed=1)


def flipped(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def falling(step: int, steps: int) -> float:
    return 1 - step / steps


if __name__ == "__main__":
    trainer = Trainer(Network, data, augment=flipped, schedule=falling, lr=1e-2, epochs=5)
    result = trainer.fit("runs/own")
    print(f"test accuracy {result.final.splits['test']['accuracy']:.2%}, report in runs/own/report.html")
