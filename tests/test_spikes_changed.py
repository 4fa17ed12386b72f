"""Spikes that were written to after their words were made: the words are no longer theirs, and are not used."""

import copy
import pickle

import pytest
import torch

from trtkern import nn
from trtkern.ops import spikes as spikes_ops

CHANGES = {
    "mul_": lambda s: s.mul_(2),
    "of a view": lambda s: s[1].zero_() is None or s,
    "dropout": lambda s: torch.nn.functional.dropout(s, 0.5, inplace=True),
    "relu of a difference": lambda s: s.sub_(0.5).relu_(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("user", ["conv", "linear", "block", "checkpointed", "residual"])
def test_spikes_that_were_changed_in_place_are_taken_as_they_are(change, user):
    layer = {
        "conv": nn.SpikeConv2d(4, 3, 1),
        "linear": nn.SpikeLinear(96, 3),
        "block": nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 3, 1), nn.BatchNormLIF(3)),
        "checkpointed": nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 3, 1), nn.BatchNormLIF(3), checkpoint=True),
        "residual": nn.BatchNormLIF(4),
    }[user]
    x, y = 2 * torch.randn(5, 2, 4, 4, 6), torch.randn(5, 2, 4, 4, 6, requires_grad=True)

    def gradients(packed, pooled=False):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        neuron = nn.BatchNormLIF(4, packed=packed) if user == "residual" else nn.LIF(packed=packed)
        made = neuron(1 * leaf)
        made_changed = CHANGES[change](made.spikes if packed else made)
        given = nn.Spikes(made_changed, made.words) if packed else made_changed
        out = layer(y, given) if user == "residual" else layer(given)
        return torch.autograd.grad(out.sin().sum(), [leaf, *layer.parameters()])

    want, got = gradients(False), gradients(True)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(got, want, strict=True))
    assert all(g.abs().sum() > 0 for g in want[:2])


def test_a_change_behind_the_layer_does_no_harm_and_one_before_the_words_is_none():
    x = nn.LIF(packed=True)(2 * torch.randn(5, 2, 4, 4, 6))
    layer = nn.SpikeConv2d(4, 3, 1)
    (want,) = torch.autograd.grad(layer(x.spikes.clone()).sin().sum(), layer.weight)
    y = layer(x)
    x.spikes.mul_(3)
    assert torch.equal(torch.autograd.grad(y.sin().sum(), layer.weight)[0], want)
    again = nn.Spikes(x.spikes, spikes_ops.pack(x.spikes))
    assert spikes_ops.current(again) is again


def test_spikes_are_a_plain_pair():
    x = nn.LIF(packed=True)(2 * torch.randn(5, 2, 4, 4, 6))
    s, words = x
    assert x == nn.Spikes(s, words) and x._fields == ("spikes", "words") and spikes_ops.current(x) is x
    for copied in (pickle.loads(pickle.dumps(x)), copy.deepcopy(x)):
        assert torch.equal(copied.spikes, s) and torch.equal(copied.words, words)
        assert spikes_ops.current(copied) is copied
