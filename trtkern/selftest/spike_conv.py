"""Convolutions of packed spikes by every kernel of the CPU, against the reference in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import cpu
from trtkern.backends.base import SpikeConvolution
from trtkern.ops.spike_conv import Shape, spike_conv, spike_conv_weight_grad
from trtkern.ops.spikes import pack

SPIKE_CONV_TOLERANCE = 1e-5
"""Of the largest number."""


def compare_spike_conv() -> tuple[list[str], str]:
    """The kernels that the instruction set in use has, and what is wrong with one of them, or ""."""
    draw = torch.Generator().manual_seed(0)
    words = pack((torch.rand(9, 2, 32, 6, 5, generator=draw) < 0.3).float())
    weight, g = torch.randn(32, 32, 3, 3, generator=draw), torch.randn(18, 32, 6, 5, generator=draw)
    conv, shape = SpikeConvolution(words, 9, False, (1, 1), (1, 1)), Shape(9, False, (1, 1), (1, 1))
    y = reference.spike_conv(conv, weight.double(), None)
    gweight = reference.spike_conv_weight_grad(conv, g.double(), weight.double())
    found = []
    for kernel in cpu.spike_conv_kernels(conv, weight):
        found.append(kernel)
        for what, made, expected in (
            ("forward", spike_conv(words, weight, None, shape, kernel), y),
            ("the weight's gradient", spike_conv_weight_grad(words, g, weight, shape, kernel), gweight),
        ):
            if not _error(made, expected) <= SPIKE_CONV_TOLERANCE:
                return found, f"{kernel}, {what}: relative error {_error(made, expected):.1e}"
    return found, ""


def _error(made: Tensor, expected: Tensor) -> float:
    return float((made.double() - expected).abs().max() / expected.abs().max())


def spike_kernels() -> str:
    """Which of them are taken on this machine, in one line."""
    return cpu.spike_conv_described()
