"""The gate before every timing: spikes and input gradients against the readable loop in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.bench.layers import Neuron

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Of a gradient, relative to the largest one."""
_BLOCK = 1 << 22
"""Neuron-steps that the reference takes at a time: what it keeps of them is some 300 MiB."""


class Truth(NamedTuple):
    """Spikes [T, N] bool and gradient [T, N] float32 that a layer has to have."""

    spikes: Tensor
    gradient: Tensor


class Verdict(NamedTuple):
    """Whether the results agree, and in what they differ, in words."""

    right: bool
    words: str


def truth(x: Tensor, g: Tensor, neuron: Neuron) -> Truth:
    """What the neuron makes of x [T, ...] and the gradient g of its spikes, computed in float64."""
    currents, gradients = x.detach().flatten(1), g.flatten(1)
    width = max(1, _BLOCK // len(x))
    spikes, grads = [], []
    for block, incoming in zip(currents.split(width, 1), gradients.split(width, 1), strict=True):
        leaf = block.double().requires_grad_()
        s = reference.lif(leaf, None, neuron.numbers, neuron.spec).s
        (gx,) = torch.autograd.grad(s, leaf, incoming.double())
        spikes.append(s.detach() != 0)
        grads.append(gx.float())
    return Truth(torch.cat(spikes, 1), torch.cat(grads, 1))


def judge(s: Tensor, gx: Tensor, want: Truth, exact_state: bool = True) -> Verdict:
    """Compare what a layer made with what it had to make, both [T, ...].

    A potential within rounding of the threshold, or of a kink of the surrogate, may fall on either side, and takes its
    neuron's gradient along: allowed is one neuron-step in a million, at the least one neuron in 10,000.

    Args:
        exact_state: False for a library that keeps its potential in half precision: its spikes differ by right, and up
            to 5 % of them are only said.
    """
    spikes, gradient = s.detach().flatten(1), gx.detach().flatten(1).float()
    flipped = (spikes != 0) != want.spikes
    odd = (spikes != 0) & (spikes != 1)
    share = flipped.float().mean().item()
    if not exact_state and spikes.dtype != torch.float32:
        words = f"keeps its potential in {str(spikes.dtype).removeprefix('torch.')}: {share:.1%} of the spikes differ"
        return Verdict(share < 0.05 and not odd.any(), words)
    # Not error <= tolerance, which NaN would pass as not larger.
    error = (gradient - want.gradient).abs()
    near = error <= TOLERANCE[spikes.dtype] * want.gradient.abs().max()
    bad = (flipped | odd | ~near).any(0).float().mean().item()
    right = bad <= max(1e-4, 1e-6 * len(spikes))
    worst = error.nan_to_num(torch.inf).max().item()
    return Verdict(right, f"{bad:.1e} of the neurons differ, {share:.1e} of the spikes, gradients by up to {worst:.1e}")
