"""The 8x8 handwritten digits that come with the package (digits.txt says whose they are), split once and for all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PATH = Path(__file__).with_name("digits.csv.gz")


def load(test_fraction: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images [1437, 8, 8] (0..16), train labels, test images [360, 8, 8], test labels, uint8.

    The split is stratified and belongs to the data: it is the same whatever seed a run has, so runs compare.
    """
    table = torch.from_numpy(np.loadtxt(PATH, dtype=np.uint8, delimiter=","))
    images, labels = table[:, :64].reshape(-1, 8, 8), table[:, 64]
    test = stratified(labels, test_fraction, seed)
    return images[~test], labels[~test], images[test], labels[test]


def stratified(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """A mask [N] of ceil(fraction * N) members, each class having its share to within one."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.bincount(labels.long())
    exact = counts.double() * fraction
    share = exact.floor().long()
    left = math.ceil(fraction * labels.numel()) - int(share.sum())
    share[(exact - share).argsort(descending=True, stable=True)[:left]] += 1  # the largest remainders
    mask = torch.zeros(labels.numel(), dtype=torch.bool)
    for label, wanted in enumerate(share.tolist()):
        members = torch.nonzero(labels == label)[:, 0]
        mask[members[torch.randperm(members.numel(), generator=generator)[:wanted]]] = True
    return mask
