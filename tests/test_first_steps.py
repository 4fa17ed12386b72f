"""Backward passes of the first t outputs: the steps after t are left out, and nothing else changes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn as tnn
from torch.nn import functional as F

from trtkern.analysis import _first_steps
from trtkern.analysis._first_steps import FirstSteps

pytestmark = pytest.mark.usefixtures("one_thread")

T, B = 5, 2


def first(share):
    made = FirstSteps()
    made.share = share
    return made


def test_how_many_rows():
    """All where nothing was said or something comes from later steps, NaN too; in any layout."""
    for g in (torch.ones(T * B, 3, 2, 2), torch.ones(T * B, 3, 2, 2).to(memory_format=torch.channels_last)):
        two = first(2 / T)
        assert two.few(g) == T * B
        g[2 * B :] = 0
        assert two.few(g) == 2 * B and two.few(g[:, :, :1]) == 2 * B and two.few(g[:, :, ::2]) == 2 * B
        assert first(1 / T).few(g) == FirstSteps().few(g) == T * B
        g[-1, -1, -1, -1] = torch.nan
        assert two.few(g) == T * B
    assert first(1 / 3).few(torch.zeros(3, 1)) == 1 and first(1 / 3).few(torch.zeros(3, 0)) == 3


LAYERS = {
    "conv1d": (lambda: tnn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "conv2d": (lambda: tnn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2), (4, 7, 8)),
    "same": (lambda: tnn.Conv2d(4, 6, 3, padding="same"), (4, 7, 8)),
    "circular": (lambda: tnn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), (4, 7, 8)),
    "conv3d": (lambda: tnn.Conv3d(2, 3, 2, stride=2), (2, 4, 5, 4)),
    "linear": (lambda: tnn.Linear(4, 6), (3, 4)),
    "norm": (lambda: tnn.BatchNorm2d(4), (4, 3, 3)),
    "no weights": (lambda: tnn.BatchNorm1d(4, affine=False), (4, 3)),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_autograds(name, last):
    """Of what a layer reads, whether or not something comes from the steps that were said to be left out."""
    make, shape = LAYERS[name]
    layer = make().double().eval().requires_grad_(False)
    for held in layer.buffers():
        if held.is_floating_point():
            held.uniform_(0.5, 2)
    x = torch.randn(T * B, *shape, dtype=torch.float64)
    if len(shape) == 3 and last:
        x = x.to(memory_format=torch.channels_last)
    found = []
    for recorded in (False, True):
        leaf = x.clone().requires_grad_()
        with first(2 / T) if recorded else nullcontext():
            y = layer(leaf)
        g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).clone()
        if not last:
            g[2 * B :] = 0
        inside_out = g.transpose(0, -1).contiguous().transpose(0, -1)
        found.append((y, *(torch.autograd.grad(y, leaf, way, retain_graph=True)[0] for way in (g, inside_out))))
    assert torch.equal(found[0][0], found[1][0])
    for wanted, mine in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(wanted, mine, rtol=1e-12, atol=1e-14)
        assert bool(mine[2 * B :].any()) == last


def test_what_is_left_out(monkeypatch):
    """Only zeros, and only in layers that have no gradient of their own to find."""
    seen = []
    product = _first_steps._BACK[F.linear]

    def spied(*args):
        back = product(*args)
        return lambda g: (seen.append(len(g)), back(g))[1]

    monkeypatch.setitem(_first_steps._BACK, F.linear, spied)
    layer = tnn.Linear(3, 3)
    x = torch.randn(T * B, 3, requires_grad=True)
    made = first(2 / T)
    with made:
        layer(x).sum().backward()
    assert not seen and layer.weight.grad is not None
    layer.requires_grad_(False)
    with made:
        y = layer(layer(x))
        with torch.no_grad():
            layer(x)
    for made.share in (2 / T, 1.0):
        y[: 2 * B].sum().backward(retain_graph=True)
    assert seen == [2 * B] * 2 + [T * B] * 2
