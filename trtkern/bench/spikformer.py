"""A block of the Spikformer (Zhou et al. 2022, arXiv 2209.15425), of this project's layers and in plain torch.

Tokens go in as the currents behind the patch embedding; its last BatchNorm and neurons make spikes of them. Spiking
self-attention: Q, K and V are spikes, each of Linear, BatchNorm and neurons; s Q K^T V, which has no softmax and so is
computed from the right, goes through neurons with a threshold of 1/2, then through Linear, BatchNorm and neurons. An
MLP of two such layers, four times as wide within, follows. What each of the two makes is added to its input; the sums
are integers, and stay dense. A mean over the tokens and a Linear are the readout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from trtkern.bench import plain
from trtkern.nn import LIF, BatchNormLIF, ConvBatchNormLIF, SpikeLinear
from trtkern.ops.spikes import dense

HEAD, SCALE, WIDER, THRESHOLD = 32, 0.125, 4, 0.5
"""Channels of a head, s, how much wider the MLP is within, the threshold behind the attention: as the paper's code."""


class Parts(NamedTuple):
    """What a block is made of; each takes and gives [T, B * N, channels], as a tensor or as packed spikes."""

    norm: Callable[[int], nn.Module]
    """BatchNorm and neurons of that many channels."""
    linear: Callable[[int, int], nn.Module]
    """Linear without bias from so many channels to so many, BatchNorm, neurons."""
    neurons: Callable[[float], nn.Module]
    """Neurons with that threshold."""


class Spikformer(nn.Module):
    """Currents of tokens [T, B, N, D] -> logits [T, B, classes].

    Args:
        width: D, a multiple of ``HEAD``.
        parts: what it is made of.
        classes: how many.
    """

    def __init__(self, width: int, parts: Parts, classes: int = 10) -> None:
        super().__init__()
        self.embedding = parts.norm(width)
        self.q, self.k, self.v = (parts.linear(width, width) for _ in range(3))
        self.attention, self.project = parts.neurons(THRESHOLD), parts.linear(width, width)
        self.hidden, self.out = parts.linear(width, WIDER * width), parts.linear(WIDER * width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, N, D] -> [T, B, classes]."""
        tokens = x.shape[1:3]

        def heads(spikes: Any) -> Tensor:
            """[T, B, heads, N, ``HEAD``]."""
            return dense(spikes).unflatten(1, tokens).unflatten(-1, (-1, HEAD)).transpose(2, 3)

        spikes = self.embedding(x.flatten(1, 2))
        q, k, v = (heads(layer(spikes)) for layer in (self.q, self.k, self.v))
        mixed = SCALE * q @ (k.transpose(-1, -2) @ v)
        attended = self.attention(mixed.transpose(2, 3).flatten(3).flatten(1, 2))
        total = dense(spikes) + dense(self.project(attended))
        total = total + dense(self.out(self.hidden(total)))
        return self.classifier(total.unflatten(1, tokens).mean(2))


class _PlainNorm(nn.BatchNorm1d):
    """BatchNorm over [T, B, C], then neurons; the keys of its state dict are those of ``BatchNormLIF``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.neurons = plain.Neurons(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.neurons(super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


def _plain_linear(channels: int, out: int) -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Linear(channels, out, bias=False), norm=_PlainNorm(out)))


def in_plain_torch(width: int) -> Spikformer:
    """The block with neurons over unbind, nothing of trtkern in it."""
    return Spikformer(width, Parts(_PlainNorm, _plain_linear, lambda threshold: plain.Neurons(0.5, threshold)))


def own(width: int, *, backend: str = "auto", checkpoint: bool = False) -> Spikformer:
    """The block of this project's layers, whose neurons hand on packed spikes."""

    def norm(channels: int) -> BatchNormLIF:
        return BatchNormLIF(channels, packed=True, backend=backend)

    def linear(channels: int, out: int) -> nn.Module:
        return ConvBatchNormLIF(SpikeLinear(channels, out, bias=False), norm(out), checkpoint=checkpoint)

    return Spikformer(
        width, Parts(norm, linear, lambda threshold: LIF(v_threshold=threshold, packed=True, backend=backend))
    )
