"""Layers on packed spikes as the Triton kernels compute them, for the tests: what goes in, what has to come out."""

from __future__ import annotations

import importlib.util
import math
from contextlib import nullcontext

import numpy
import torch
from torch.nn import functional as F

from trtkern import reference
from trtkern.backends import named
from trtkern.selftest import device_of

BACKEND = named("triton")
REASON = "Triton is not installed" if importlib.util.find_spec("triton") is None else BACKEND.missing()
DEVICE = device_of(BACKEND) if REASON is None else "cpu"
TOLERANCE = 1e-5
"""Of the largest output, for float32; half precision rounds what goes out."""
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def last(tensor):
    """With channels last in memory, whatever the number of axes."""
    return tensor.movedim(-3, -1).contiguous().movedim(-1, -3) if tensor.dim() >= 4 else tensor.contiguous()


def run(launches):
    with numpy.errstate(all="ignore") if DEVICE == "cpu" else nullcontext():
        for launch in launches:
            launch()


def drawn(T, B, C, side, rate):
    """Spikes [T, B, C, H, W], an image a little wider than high (side 0: [T, B, C]), and their words."""
    spikes = (torch.rand(T, B, C, *((side, side + 1) if side else ())) < rate).double()
    return spikes, last(reference.spikes_pack(spikes)).to(DEVICE)


def convolved(spikes, weight, bias=None, stride=1, padding=0, pooled=False):
    """In float64, [T * B, K, ...]: what the kernels have to make of the spikes."""
    x = reference.average_pool(spikes) if pooled else spikes
    if weight.dim() == 2:
        return F.linear(x.flatten(0, 1), weight, bias)
    return F.conv2d(x.flatten(0, 1), weight, bias, stride, padding)


GUARD = 64
"""Elements before and behind every output, which no kernel may touch."""


class Guarded:
    """An output full of NaN, channels last, with memory around it that has to stay as it is."""

    def __init__(self, shape, dtype):
        self.memory = torch.full((math.prod(shape) + 2 * GUARD,), 7.0, dtype=dtype, device=DEVICE)
        stored = (*shape[:-3], *shape[-2:], shape[-3]) if len(shape) >= 4 else shape
        self.inner = self.memory[GUARD:-GUARD].fill_(torch.nan).view(stored)
        self.tensor = self.inner.movedim(-1, -3) if len(shape) >= 4 else self.inner

    def result(self):
        assert (self.memory[:GUARD] == 7).all() and (self.memory[-GUARD:] == 7).all()
        return self.tensor.cpu()


def forward(words, weight, bias, like, precision="ieee", **options):
    """What the kernel makes, in the shape of ``like``."""
    from trtkern.kernels.spike_conv_launch import forward_launches

    out = Guarded(like.shape, weight.dtype)
    bias = None if bias is None else bias.to(DEVICE)
    run(forward_launches(words, last(weight).to(DEVICE), bias, out.tensor, precision=precision, **options))
    return out.result()


def gradient(words, g, like, precision="ieee", **options):
    """The weight's gradient, in the shape of ``like``."""
    from trtkern.kernels.spike_conv_launch import weight_gradient_launches

    out = Guarded(like.shape, like.dtype)
    run(weight_gradient_launches(words, last(g).to(DEVICE), out.tensor, precision=precision, **options))
    return out.result()


def agrees(got, want, dtype=torch.float32):
    """Whether no element is farther off than the tolerance; NaN is nowhere near."""
    error = (got.double() - want).abs()
    allowed = TOLERANCE * want.abs().max() + ROUNDING[dtype] * want.abs()
    assert (error <= allowed).all(), f"{error.nan_to_num(torch.inf).max():.3g} of {want.abs().max():.3g}"
