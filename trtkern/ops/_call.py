"""What the private ops ``lif_forward`` and ``lif_backward`` are told (``trtkern.ops.lif``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

WANT_SPIKES, WANT_V, WANT_STATE, WANT_EDGES, WANT_PACKED, WANT_H = 1, 2, 4, 8, 16, 32
NEED_V0, NEED_PARAMS, NEED_X, NEED_SUMS, GIVEN_H, NEED_COEF, NEED_Y = 1, 2, 4, 8, 16, 32, 64
"""NEED_Y: in place of gx the gradient of what was normalised with the statistics of a batch: a second pass."""


class Channels(NamedTuple):
    """Where the numbers of the channels belong."""

    axis: int | None
    """Of x; None: one number for all."""
    inner: int
    """Its stride in memory."""


class Call(NamedTuple):
    """What both directions are told, in the order of the schemas; tensors first."""

    x: Tensor
    """[T, ...], dense, or one dense step expanded along time."""
    v0: Tensor | None
    params: Tensor | None
    affine: Tensor | None
    """[3, C] float32: center, scale, shift; None: x is the input current."""
    residual: Tensor | None
    scalars: Sequence[float]
    token: str
    inner: int
    pool: bool
    """Average s over 2 x 2 neurons; x is then [T, B, C, H, W], contiguous or channels last, H and W even."""
