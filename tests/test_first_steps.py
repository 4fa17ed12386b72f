"""Backward passes of the first t outputs: the steps after t are left out, and nothing else changes."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn as tnn
from torch.nn import functional as F

from trtkern import nn
from trtkern.analysis import _first_steps
from trtkern.analysis._first_steps import FirstSteps
from trtkern.backends import named
from trtkern.ops._prepared import Prepared
from trtkern.ops.spikes import dense

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


FUSED = named("cpu").missing() is None
NEURONS = {
    "lif": (lambda: nn.LIF(backend="cpu"), ()),
    "soft": (lambda: nn.LIF(v_reset=None, backend="cpu"), ()),
    "two states": (lambda: nn.ALIF(backend="cpu"), ()),
    "norm": (lambda: nn.BatchNormLIF(4, backend="cpu"), ()),
    "pooled": (lambda: nn.BatchNormLIF(4, pool=2, backend="cpu"), ()),
    "packed": (lambda: nn.BatchNormLIF(4, packed=True, backend="cpu"), ()),
    "residual": (lambda: nn.BatchNormLIF(4, backend="cpu"), ("residual",)),
    "static": (lambda: nn.BatchNormLIF(4, backend="cpu"), ("static",)),
}


def neuron(name, training=False):
    torch.manual_seed(1)
    layer = NEURONS[name][0]().train(training).requires_grad_(False)
    for held in layer.buffers():
        if held.is_floating_point():
            held.uniform_(0.5, 2)
    return layer


def passes(layer, name, steps, gradients, recorded):
    """The gradients of all that the layer reads, of one backward pass after the other over one graph."""
    torch.manual_seed(2)
    x = 2 * torch.randn(1 if "static" in NEURONS[name][1] else steps, 2, 4, 6, 6).requires_grad_()
    read = [x, torch.randn(steps, 2, 4, 6, 6, requires_grad=True)][: 1 + ("residual" in NEURONS[name][1])]
    made = FirstSteps()
    with made if recorded else nullcontext():
        y = dense(layer(x.expand(steps, -1, -1, -1, -1), *read[1:]))
    found = []
    for t, g in gradients:
        made.share = t / steps
        grads = torch.autograd.grad(y, read, g[:, :, :, : y.shape[-2], : y.shape[-1]], retain_graph=True)
        found.append([y.detach(), *(grad.clone() for grad in grads)])
    return found


@pytest.mark.skipif(not FUSED, reason="the compiled kernels of the CPU are not here")
@pytest.mark.parametrize("steps", [5, 37])
@pytest.mark.parametrize("name", NEURONS)
def test_neurons_give_the_same_bits(name, steps, monkeypatch):
    """In each pass, in whatever order they come; also where something comes from the steps that were to be left out."""
    torch.manual_seed(0)
    gradients = []
    for t in (1, 3, steps - 1, 2, steps, 4):
        g = torch.randn(steps, 2, 4, 6, 6)
        g[t:] = 0
        gradients.append((t, g))
    gradients.insert(3, (1, gradients[2][1]))
    wanted = passes(neuron(name), name, steps, gradients, False)
    seen, run = [], Prepared.backward

    def spied(self, x, *args, **more):
        seen.append(len(x))
        return run(self, x, *args, **more)

    monkeypatch.setattr(Prepared, "backward", spied)
    mine = passes(neuron(name), name, steps, gradients, True)
    for one, other in zip(wanted, mine, strict=True):
        assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # Each pass asks once, and once more for the first steps where there are fewer.
    assert seen == [steps, 1, steps, 3, steps, steps - 1, steps, steps, 2, steps, steps, 4]


@pytest.mark.skipif(not FUSED, reason="the compiled kernels of the CPU are not here")
@pytest.mark.parametrize("learned", [False, True])
def test_steps_that_know_of_each_other(learned):
    """The statistics of a batch, and gradients of weights, are of all steps."""
    torch.manual_seed(0)
    g = torch.randn(T, 2, 4, 6, 6)
    g[2:] = 0
    found = []
    for recorded in (False, True):
        layer = neuron("norm", training=not learned)
        layer.weight.requires_grad_(learned)
        found.append(passes(layer, "norm", T, [(2, g)], recorded)[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert bool(found[1][1][2:].any()) != learned


def test_rows_that_are_known_to_be_zero():
    """What a pass made is not looked at again; what anybody else made of it is."""
    made = first(2 / T)
    layer = tnn.Linear(3, 3).requires_grad_(False)
    x = torch.randn(T * B, 3, requires_grad=True)
    with made:
        y = layer(x)
    g = torch.ones(T * B, 3)
    g[2 * B :] = 0
    (whole,) = torch.autograd.grad(y, x, g, retain_graph=True)
    assert whole[: 2 * B].all() and not whole[2 * B :].any()
    for share in (2 / T, 3 / T, 1 / T):
        made.share = share
        assert made.few(whole) == made.few(whole.view(T, B, 3)) * B == 2 * B
        assert made.few(whole + 0) == {3: 3 * B, 2: 2 * B}.get(round(share * T), T * B)
    made.share = 1 / T
    g[B:] = 0
    (again,) = torch.autograd.grad(y, x, g, retain_graph=True)
    assert again.data_ptr() == whole.data_ptr() and made.few(again) == B and not again[B:].any()
    del whole, again, y
    gc.collect()
    assert not len(made._rooms)
