"""A convolution (or Linear) and the BatchNorm + LIF behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trtkern.backends import choose
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._neuron import spikes_of
from trtkern.nn.batch_norm_lif import BatchNormLIF
from trtkern.ops import _check
from trtkern.ops.batch_norm_lif import OP, Source, batch_norm_lif
from trtkern.ops.spikes import Spikes


class ConvBatchNormLIF(Leaf):
    """A convolution over every step, then ``BatchNormLIF``: [T, B, C, H, W] -> spikes.

    Args:
        conv: ``SpikeConv2d`` or ``SpikeLinear``, which keep the words of packed input in place of the dense spikes.
        norm: the ``BatchNormLIF`` behind it.
        checkpoint: do not keep the convolution's output y, which is nearly all that is kept otherwise: the backward
            pass convolves once more to make it. Gradients are the same bit for bit where the convolution repeats
            itself, as it does on a CPU. Without effect in what torch.compile compiles, torch.export or torch.jit.trace
            records, and on the reference.

    A static input (expanded along time) is convolved once.
    """

    takes_time = True

    def __init__(self, conv: nn.Conv2d | nn.Linear, norm: BatchNormLIF, *, checkpoint: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.checkpoint = conv, norm, checkpoint

    def forward(
        self,
        x: Tensor | Spikes,
        residual: Tensor | Spikes | None = None,
        v0: Tensor | None = None,
        *,
        return_state: bool = False,
    ) -> Tensor | Spikes | tuple[Any, ...]:
        """As ``BatchNormLIF.forward`` of the convolved x [T, B, C, H, W]."""
        if is_proxy(x):
            return self(x, residual, v0, return_state=return_state)
        if not self.checkpoint or not torch.is_grad_enabled() or torch.compiler.is_compiling() or _check.recording():
            return self.norm(self.conv(x), residual, v0, return_state=return_state)
        norm = self.norm
        dense = x.spikes if isinstance(x, Spikes) else x
        with torch.no_grad():
            y = self.conv(dense)
        if choose(norm.lif.backend, OP, y.device.type, y.dtype, norm.lif.spec.token) == "reference":
            return norm(self.conv(x), residual, v0, return_state=return_state)
        words = x.words if isinstance(x, Spikes) else None
        pooled = isinstance(x, Spikes) and x.pooled
        source = Source(dense, words, pooled, self.conv.weight, self.conv.bias, self._make(y))
        neuron = norm.neuron(state=return_state)
        out = batch_norm_lif(y, norm.norm(), neuron, residual, v0, norm.channel_dim, source)
        return (spikes_of(out), out.state) if return_state else spikes_of(out)

    def _make(self, y: Tensor) -> Any:
        """The convolution as a function of its tensors, under the autocast of this moment."""
        conv, kind = self.conv, y.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def make(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
            with torch.autocast(kind, autocast[1], enabled=autocast[0]):
                return torch.func.functional_call(conv, given, (x,))

        return make
