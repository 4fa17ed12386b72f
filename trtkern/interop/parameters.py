"""Parameters of another library's neurons: numbers, per-channel tensors and Parameters as a layer here takes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trtkern.interop.adapters import CannotConvert
from trtkern.nn.bounded import Bounded
from trtkern.ops import checks
from trtkern.ops.checks import Number


class Channels:
    """The parameters of one neuron, each of which broadcasts with one step [B, ..., C] from the right.

    A layer here takes one value, or one for each place of one axis, ``dim``: the last one until a parameter is met that
    has another.
    """

    def __init__(self) -> None:
        self.dim = -1
        self._named: str | None = None

    def held(self, name: str, value: Any) -> Number:
        """A parameter as a layer takes it: a float, a tensor [C], or the Parameter itself, where it is one.

        Raises:
            CannotConvert: values along several axes, along another axis than those of another parameter, or a
                Parameter of another form than [] or [C].
        """
        if not isinstance(value, Tensor):
            return float(value)
        learned = isinstance(value, nn.Parameter)
        if value.numel() == 1 and not learned:
            return float(value)
        axes = [axis - value.dim() for axis, size in enumerate(value.shape) if size > 1]
        if len(axes) > 1 or value.numel() == 0 or (learned and value.dim() > 1):
            raise CannotConvert(
                f"expected {name} with one value, or one for each place of one axis, got {checks.describe(value)}"
            )
        if axes and self._named is not None and axes[0] != self.dim:
            raise CannotConvert(f"expected {name} and {self._named} along one axis, got {axes[0]} and {self.dim}")
        if axes:
            self.dim, self._named = axes[0], name
        return value if learned else value.detach().reshape(-1)


def along(value: Number, channel_dim: int) -> Number:
    """A parameter as it broadcasts with one step: a tensor [C] along ``channel_dim``, counted from the last axis."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    return value.reshape(-1, *[1] * (-channel_dim - 1))


class Clamped(Bounded):
    """A learned parameter that is clamped to [0, 1] in each call, as ``value.clamp(0, 1)`` does it.

    The gradient is torch's: 1 from 0 to 1 and 0 outside, where a parameter that an optimiser took there stays.
    (``Bounded(value, "clamp")`` leads it back.)

    Args:
        value: the Parameter, which stays the one that is trained.
    """

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__(value.detach().clamp(0, 1), "clamp")
        self.raw = value

    def forward(self) -> Tensor:
        """The value, with a gradient to ``raw``."""
        return (self.raw.float() if self.raw.dtype.itemsize < 4 else self.raw).clamp(self.low, self.high)
