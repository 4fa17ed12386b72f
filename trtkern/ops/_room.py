"""Memory for what is made between the passes of a BatchNorm + neuron."""

from __future__ import annotations

import torch
from torch import Tensor

from trtkern.backends.base import Finished, NormGrads


def finished(like: Tensor, channels: int, coef: bool) -> Finished:
    """Room for what statistics are finished into, on the device of ``like``; ``coef``: with that."""
    device = like.device
    return Finished(
        torch.empty(3, channels, dtype=torch.float32, device=device),
        torch.empty(2, channels, dtype=torch.float64, device=device),
        torch.empty(3, channels, dtype=torch.float32, device=device) if coef else None,
    )


def norm_grads(affine: Tensor, moments: Tensor, count: int, coef: bool, dtype: torch.dtype | None) -> NormGrads:
    """Room for what the sums of a norm are finished into: ``coef``, and the gradients of weight and bias in ``dtype``
    unless that is None."""
    C, device = affine.shape[1], affine.device
    return NormGrads(
        affine,
        moments,
        count,
        torch.empty_like(affine) if coef else None,
        None if dtype is None else torch.empty(C, dtype=dtype, device=device),
        None if dtype is None else torch.empty(C, dtype=dtype, device=device),
    )
