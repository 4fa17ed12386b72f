"""Building blocks of the networks: each takes [T, B, C, H, W] or packed spikes and gives spikes of every step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from trtkern import nn as layers
from trtkern.names import NEURONS, OWN_NEURON, is_own, unknown
from trtkern.nn import (
    LIF,
    BatchNormLIF,
    ConvBatchNormLIF,
    OverTime,
    SpikeConv2d,
    SpikeLinear,
    Spikes,
    TimeSequential,
)
from trtkern.nn._neuron import Spiking
from trtkern.nn.norms import SyncBatchNorm
from trtkern.nn.own import maker
from trtkern.ops.spikes import add, dense, pack, packing
from trtkern.own import OwnError, imported

fx.wrap("dense")


class NarrowProjection(SpikeConv2d):
    """A strided 1x1 convolution as that of every stride-th pixel; the spikes are kept dense.

    For fewer than 16 channels in channels_last: the gradient of such a strided convolution's weight writes past its
    workspace in oneDNN up to 3.12 at least (uxlfoundation/oneDNN#6035), which ends the process.
    """

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """As ``SpikeConv2d.forward``."""
        return super().forward(dense(x))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        down, right = self.stride
        return nn.functional.conv2d(input[..., ::down, ::right], weight, bias)


@dataclass(frozen=True)
class Convolution:
    """The numbers of a convolution without bias."""

    channels: int
    out: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1

    def make(self) -> SpikeConv2d:
        """The convolution, drawn from the Kaiming normal distribution (fan_out, relu) as in the TRT paper's code."""
        narrow = (self.kernel, self.padding) == (1, 0) and self.stride > 1 and self.channels < 16
        kind = NarrowProjection if narrow else SpikeConv2d
        conv = kind(self.channels, self.out, self.kernel, self.stride, self.padding, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return conv

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of what it makes of an image of that size; below 1 where the kernel does not fit."""
        return windows(size, self.kernel, self.stride, self.padding)


def windows(size: tuple[int, int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """How many windows fit into (H, W): floor((H + 2 padding - kernel) / stride) + 1."""
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    return height, width


def neuron_of(neuron: type[Spiking] | str) -> Callable[..., Spiking]:
    """The class of neurons of that name; a class is itself. Of a neuron of the user's own, by its name or by
    "module:NAME", what makes its layers.

    Raises:
        ValueError: none of these; the message lists the names.
        OwnError: "module:NAME" leads to nothing, or to something else.
    """
    if isinstance(neuron, str) and is_own(neuron):
        found = imported(neuron, "model.neuron")
        if not (isinstance(found, type) and issubclass(found, Spiking)) and not isinstance(found, str):
            raise OwnError(
                f"model.neuron: expected {neuron} to be what trtkern.neurons.register returned, or a class of spiking "
                f"neurons, got {found!r}"
            )
        neuron = found
    if isinstance(neuron, type) and issubclass(neuron, Spiking):
        return neuron
    if neuron in NEURONS:
        return getattr(layers, str(neuron))
    try:
        return maker(neuron)
    except (TypeError, ValueError):
        others = f", a class of spiking neurons, or {OWN_NEURON}"
        raise unknown("neuron", neuron, NEURONS, others) from None


@dataclass(frozen=True)
class Style:
    """How all blocks of a network are made: what is kept for the backward pass, and the neurons.

    Args:
        checkpoint: keep no convolution's output (``ConvBatchNormLIF``).
        packed: keep bits in place of dense spikes.
        sync: share the statistics of the batch among the processes of torch.distributed.
        neuron: what makes the neurons (``neuron_of``).
        lif: what that neuron takes.
        recurrent: the neurons of each layer feed each other (``Recurrent``): of Linear layers only.
        max_delay: above 0: what each hidden Linear layer reads comes later by a learned delay a channel (``Delay``), of
            so many steps at the most.
    """

    checkpoint: bool = False
    packed: bool = True
    sync: bool = False
    neuron: Callable[..., Spiking] = LIF
    lif: dict[str, Any] = field(default_factory=dict)
    recurrent: bool = False
    max_delay: int = 0

    @classmethod
    def of(
        cls, checkpoint: bool, packed: bool, *, sync: bool = False, neuron: type[Spiking] | str = LIF,
        recurrent: bool = False, max_delay: int = 0, **lif: Any,
    ) -> Style:  # fmt: skip
        """The style that a network's options say; an unknown neuron's name is a ValueError."""
        return cls(checkpoint, packed, sync, neuron_of(neuron), lif, recurrent, max_delay)

    def block(self, conv: Convolution, *, pool: int = 1, packed: bool = True) -> ConvBatchNormLIF:
        """Convolution, BatchNorm, LIF, a 2x2 average with ``pool=2``; ``packed=False`` where none wants the bits."""
        if self.max_delay:
            raise ValueError(
                f"model: expected max_delay=0 with convolutions, got {self.max_delay}; delays stand before a Linear "
                "(FC-n, FCBN-n)"
            )
        return self._normed(conv.make(), conv.out, pool=pool, packed=packed)

    def linear(self, features: int, out: int) -> ConvBatchNormLIF | TimeSequential:
        """Linear without bias, BatchNorm, LIF: [T, B, ...] with ``features`` numbers behind the batch axis."""
        layer = SpikeLinear(features, out, bias=False)
        parts = OrderedDict[str, nn.Module]() if (delay := self.delay(features)) is None else OrderedDict(delay=delay)
        if self.recurrent:
            norm = (SyncBatchNorm if self.sync else nn.BatchNorm1d)(out)
            return TimeSequential(OrderedDict(**parts, linear=layer, norm=norm, lif=self.feeding(out)))
        normed = self._normed(layer, out)
        return TimeSequential(OrderedDict(**parts, block=normed)) if parts else normed

    def delay(self, features: int) -> nn.Module | None:
        """Learned delays, drawn from all that there are; None without any."""
        return Delayed(features, self.max_delay) if self.max_delay else None

    def tokens(self, features: int, out: int, *, bias: bool) -> ConvBatchNormLIF:
        """Linear, BatchNorm, LIF over tokens: [T, B, L, features] -> [T, B, L, out]."""
        return self._normed(SpikeLinear(features, out, bias=bias), out, channel_dim=-1)

    def token_norm(self, channels: int) -> BatchNormLIF:
        """BatchNorm and LIF over tokens [T, B, L, channels]."""
        return self._norm(channels, channel_dim=-1)

    def neurons(self, **own: Any) -> Spiking:
        """LIF alone, with some settings of its own."""
        return self.neuron(packed=self.packed, **{**self.lif, **own})

    def feeding(self, out: int) -> nn.Module:
        """Neurons alone, or ``recurrent`` ones: W is drawn orthogonal and has no bias (Bittar and Garner 2022)."""
        if not self.recurrent:
            return self.neurons()
        linear = nn.Linear(out, out, bias=False)
        nn.init.orthogonal_(linear.weight)
        return layers.Recurrent(self.neurons(), linear)

    def _normed(
        self, layer: nn.Module, out: int, *, pool: int = 1, packed: bool = True, channel_dim: int = 2
    ) -> ConvBatchNormLIF:
        norm = self._norm(out, pool=pool, packed=packed, channel_dim=channel_dim)
        return ConvBatchNormLIF(layer, norm, checkpoint=self.checkpoint)

    def _norm(self, out: int, *, pool: int = 1, packed: bool = True, channel_dim: int) -> BatchNormLIF:
        if self.recurrent:
            raise ValueError(
                "model: expected recurrent=True with layers of neurons behind a Linear (FC-n, FCBN-n), got neurons in "
                "images or tokens; leave recurrent out"
            )
        return BatchNormLIF(
            out,
            channel_dim=channel_dim,
            pool=pool,
            sync=self.sync,
            packed=self.packed and packed,
            neuron=self.neuron,
            **self.lif,
        )

    def shortcut(self, conv: Convolution) -> TimeSequential:
        """Convolution and BatchNorm over time, batch and space, without neurons."""
        norm = (SyncBatchNorm if self.sync else nn.BatchNorm2d)(conv.out)
        return TimeSequential(OrderedDict(conv=conv.make(), norm=norm))


class Pool(OverTime):
    """Pooling of the dense spikes of every step; the maxima of spikes are spikes, and are packed again.

    Args:
        module: the pooling of one step.
        packed: give ``Spikes``: for maxima only.
    """

    def __init__(self, module: nn.Module, *, packed: bool = False) -> None:
        super().__init__(module)
        self.packed = packed

    def forward(self, x: Tensor | Spikes) -> Any:
        """[T, B, C, H', W'] of x [T, B, C, H, W]."""
        pooled = super().forward(x)
        return _packed_again(pooled) if self.packed else pooled


@fx.wrap
def _packed_again(maxima: Tensor) -> Tensor | Spikes:
    """The maxima with their words, where those can be kept for a backward pass."""
    return Spikes(maxima, pack(maxima)) if packing(torch.is_grad_enabled()) else maxima


@fx.wrap
def _unpooled(x: Tensor | Spikes) -> Tensor | Spikes:
    """x, without words that are not its own."""
    return x.spikes if isinstance(x, Spikes) and x.pooled else x


class ResidualBlock(nn.Module):
    """LIF(BN(conv(LIF(BN(conv(x))))) + shortcut(x)): the residual is added before the neurons, in their pass.

    Args:
        first, second: the two convolutions.
        shortcut: a 1x1 convolution with BatchNorm behind it; None for the identity.
        style: how the blocks are made.
        packed: give ``Spikes`` if the style says so.

    State-dict prefixes: first, second, shortcut, each with conv and norm.
    """

    takes_time = takes_lengths = True
    takes_spikes = True

    def __init__(
        self,
        first: Convolution,
        second: Convolution,
        shortcut: Convolution | None,
        style: Style,
        *,
        packed: bool = True,
    ) -> None:
        super().__init__()
        self.first = style.block(first)
        self.second = style.block(second, packed=packed)
        self.shortcut = None if shortcut is None else style.shortcut(shortcut)

    def forward(self, x: Tensor | Spikes, lengths: Tensor | None = None) -> Tensor | Spikes:
        """Spikes [T, B, C', H', W'] of x [T, B, C, H, W]."""
        more = {} if lengths is None else {"lengths": lengths}
        residual = _unpooled(x) if self.shortcut is None else self.shortcut(x, **more)
        return self.second(self.first(x, **more), residual, **more)


class SEWBlock(nn.Module):
    """Spike-element-wise residual block (Fang et al. 2021, arXiv 2102.04159): g(s, i), s = two times LIF(BN(conv)).

    i is the input, or LIF(BN(conv1x1(input))) where the shape changes. With "ADD" the result is a small integer: it
    keeps the bits of the spikes that it is the sum of, where those are not written (``trtkern.ops.spikes.add``).

    Args:
        first, second: the two convolutions.
        shortcut: the 1x1 convolution; None for the identity.
        style: how the blocks are made.
        connect: "ADD": s + i; "AND": s i; "IAND": i (1 - s).

    State-dict prefixes: first, second, shortcut, each with conv and norm.
    """

    takes_time = takes_lengths = True
    takes_spikes = True

    def __init__(
        self, first: Convolution, second: Convolution, shortcut: Convolution | None, style: Style, connect: str = "ADD"
    ) -> None:
        super().__init__()
        if connect not in CONNECT:
            raise ValueError(f"SEWBlock: expected connect from {', '.join(CONNECT)}, got {connect!r}")
        self.first = style.block(first)
        self.second = style.block(second, packed=connect == "ADD")
        self.shortcut = None if shortcut is None else style.block(shortcut, packed=connect == "ADD")
        self.connect = connect

    def forward(self, x: Tensor | Spikes, lengths: Tensor | None = None) -> Tensor | Spikes:
        """[T, B, C', H', W'] of x [T, B, C, H, W]."""
        more = {} if lengths is None else {"lengths": lengths}
        s = self.second(self.first(x, **more), **more)
        i = x if self.shortcut is None else self.shortcut(x, **more)
        return _connected(s, i, self.connect)

    def extra_repr(self) -> str:
        """How s and i are connected."""
        return f"connect={self.connect!r}"


@fx.wrap
def _connected(s: Tensor | Spikes, i: Tensor | Spikes, connect: str) -> Tensor | Spikes:
    """What a SEW block makes of its spikes s and its input i."""
    if connect == "ADD" and isinstance(s, Spikes) and isinstance(i, Spikes) and (both := add(s, i)) is not None:
        return both
    return CONNECT[connect](dense(s), dense(i))


CONNECT = {
    "ADD": lambda s, i: s + i,
    "AND": lambda s, i: s * i,
    "IAND": lambda s, i: i * (1 - s),
}
"""What a SEW block makes of its spikes s and its input i."""


class Delayed(nn.Module):
    """Learned delays of [T, B, ...] with ``features`` numbers behind the batch axis: [T, B, features]."""

    takes_time = takes_lengths = True
    takes_spikes = True

    def __init__(self, features: int, max_delay: int) -> None:
        super().__init__()
        self.delay = layers.Delay(features, max_delay, learnable=True)

    def forward(self, x: Tensor | Spikes, lengths: Tensor | None = None) -> Tensor:
        """Each number as many steps later as its delay says, between two steps a mix of both."""
        return self.delay(dense(x).flatten(2), **({} if lengths is None else {"lengths": lengths}))


class LinearLIF(nn.Module):
    """LIF(W x + b): [T, B, ...] with ``features`` numbers behind the batch axis -> spikes [T, B, out]."""

    takes_time = takes_lengths = True
    takes_spikes = True

    def __init__(self, features: int, out: int, style: Style) -> None:
        super().__init__()
        self.delay = style.delay(features)
        self.linear = SpikeLinear(features, out)
        self.lif = style.feeding(out)

    def forward(self, x: Tensor | Spikes, lengths: Tensor | None = None) -> Tensor | Spikes:
        """Spikes [T, B, out] of x [T, B, ...]."""
        more = {} if lengths is None else {"lengths": lengths}
        if self.delay is not None:
            x = self.delay(x, **more)
        return self.lif(self.linear(x), **more)
