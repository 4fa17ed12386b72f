"""What stands in a model where ``BatchNormLIF`` was, or where its parts were before."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._neuron import AnyState, Spiking
from trtkern.nn.time import OverTime, TimeSequential, for_lengths, over_time
from trtkern.ops.spikes import Spikes, remember


class Absorbed(nn.Identity):
    """Keeps the place of a layer that ``convert_norm_lif`` put into the ``BatchNormLIF`` before it.

    Names and indices of the layers behind it stay what they were, and ``unfuse`` puts the layer back.

    Args:
        norm: in the place of a neuron, the class of the BatchNorm before it.
        wrapped: that BatchNorm was in ``OverTime``.
        pool: in the place of a pooling layer, that layer.
    """

    def __init__(self, norm: Any = None, wrapped: bool = False, pool: nn.Module | None = None) -> None:
        super().__init__()
        # In a tuple the pooling layer is no child, which would be in printed models and run by ``apply``.
        self.norm, self.wrapped, self.pool = norm, wrapped, (pool,)

    def extra_repr(self) -> str:
        """What is missing here."""
        return "neuron" if self.pool[0] is None else type(bare(self.pool[0])).__name__


class UnfusedBatchNormLIF(Leaf, TimeSequential):
    """norm, lif and pool one after the other: what ``unfuse`` makes of a ``BatchNormLIF`` that was never a pair.

    Args:
        norm: a BatchNorm.
        lif: a layer of spiking neurons.
        pool: None or ``nn.AvgPool2d(2)``.
        channel_dim: the axis of the channels: 2, or -1, where norm gets [T * B * ..., C].
    """

    takes_spikes = False

    def __init__(self, norm: nn.Module, lif: Spiking, pool: nn.Module | None = None, *, channel_dim: int = 2) -> None:
        super().__init__(OrderedDict(norm=norm, lif=lif, **({} if pool is None else {"pool": pool})))
        self.channel_dim = channel_dim

    norm: Any
    lif: Any
    pool: Any

    def forward(  # type: ignore[override]
        self,
        y: Tensor,
        residual: Tensor | Spikes | None = None,
        v0: AnyState = None,
        *,
        return_state: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor | Spikes | tuple[Any, ...]:
        """As ``BatchNormLIF.forward``."""
        if is_proxy(y):
            return self(y, residual, v0, return_state=return_state, lengths=lengths)
        for_lengths("UnfusedBatchNormLIF: layer 'norm'", self.norm, lengths)
        if self.channel_dim == 2:
            x = over_time(self.norm, y)
        else:
            x = self.norm(y.flatten(0, -2)).unflatten(0, y.shape[:-1])
        if residual is not None:
            x = x + (residual.spikes if isinstance(residual, Spikes) else residual).to(x.dtype)
        made = self.lif(x, v0, return_state=return_state, lengths=lengths)
        spikes, *state = made if return_state else (made,)
        if "pool" in self._modules:
            pooled = over_time(self.pool, spikes)
            if isinstance(spikes, Spikes):
                remember(pooled)
                spikes = Spikes(pooled, spikes.words)
            else:
                spikes = pooled
        return (spikes, *state) if return_state else spikes


def bare(layer: nn.Module) -> nn.Module:
    return layer.module if isinstance(layer, OverTime) else layer
