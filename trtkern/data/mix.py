"""Images of a batch mixed with one another, and their labels with them: mixup and CutMix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Mix:
    """Every image with another one of its batch, by one share lam ~ Beta(alpha, alpha) a batch.

    mixup (Zhang et al. 2017, arXiv 1710.09412):   x = lam x_i + (1 - lam) x_j,   y = lam y_i + (1 - lam) y_j
    CutMix (Yun et al. 2019, arXiv 1905.04899):    a window of x_i, of the share 1 - lam, is that of x_j; lam is then
                                                   the share of x_i that is left, since a border may cut the window

    where j is a random permutation. Labels become soft, [B, C].

    Args:
        name: "mixup" or "cutmix".
        alpha: of the Beta distribution, above 0.
        p: share of the batches that are mixed.
    """

    name: str
    alpha: float
    p: float = 1.0

    def __call__(
        self, images: Tensor, labels: Tensor, classes: int, generator: torch.Generator, dim: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Images and soft labels.

        Args:
            images: [B, ...], with the batch in ``dim``.
            labels: [B] int64 or [B, C]; per step with a T behind the B.
            classes: C.
            generator: of all draws, on the CPU.

        Raises:
            ValueError: CutMix of what has no height and width.
        """
        soft = labels.float() if labels.is_floating_point() else F.one_hot(labels, classes).float()
        drawn = torch.rand(1, dtype=torch.float64, generator=generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        order = torch.randperm(len(labels), generator=generator)
        corner = torch.rand(2, dtype=torch.float64, generator=generator).tolist()
        if self.name == "mixup" and not images.is_floating_point():
            images = images.float()
        if drawn >= self.p:
            return images, soft
        lam = float(np.random.default_rng(seed).beta(self.alpha, self.alpha))
        order = order.to(images.device)
        others = images.index_select(dim, order)
        if self.name == "mixup":
            images = lam * images + (1 - lam) * others
        else:
            images, lam = _cut(images, others, lam, corner)
        return images, lam * soft + (1 - lam) * soft[order]


def _cut(images: Tensor, others: Tensor, lam: float, corner: list[float]) -> tuple[Tensor, float]:
    """With the window of the others, and the share that is left."""
    if images.dim() < 4:
        raise ValueError(f"mix: cutmix: expected images [B, C, H, W], got {list(images.shape)}")
    height, width = images.shape[-2:]
    side = (1 - lam) ** 0.5
    rows, columns = (
        (max(0, int(place * size) - int(size * side) // 2), min(size, int(place * size) + int(size * side) // 2))
        for place, size in zip(corner, (height, width), strict=True)
    )
    images = images.clone()
    images[..., rows[0] : rows[1], columns[0] : columns[1]] = others[..., rows[0] : rows[1], columns[0] : columns[1]]
    return images, 1 - (rows[1] - rows[0]) * (columns[1] - columns[0]) / (height * width)


def of(said: dict[str, Any]) -> Mix | None:
    """That of a recipe's table; None where it mixes nothing."""
    return Mix(**said) if said else None
