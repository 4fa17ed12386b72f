"""BatchNormLIF into a BatchNorm and a LIF: layers that were never pairs, and those that stay one layer."""

import copy
import warnings

import pytest
import torch
from pairs import B, C, H, T, equal, hooked, same, snapshot
from torch import nn

from trtkern import nn as snn
from trtkern.nn import Absorbed, UnfusedBatchNormLIF, convert_norm_lif, convert_state_dict, unfuse
from trtkern.nn.block import ConvBatchNormLIF
from trtkern.nn.spike_layers import SpikeConv2d
from trtkern.nn.time import OverTime, TimeSequential


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Block(nn.Module):
    """A model that was written with BatchNormLIF."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.norm = snn.BatchNormLIF(C, momentum=None, neuron=snn.PLIF, channels=C)
        self.out = ConvBatchNormLIF(SpikeConv2d(C, 4, 3), snn.BatchNormLIF(4, momentum=None, pool=2, packed=True))
        self.rows = TimeSequential(nn.Conv1d(9, 4, 1), snn.BatchNormLIF(4, momentum=None))
        self.last = snn.BatchNormLIF(4, momentum=None, channel_dim=-1, neuron=snn.IF, gain=torch.rand(4))

    def forward(self, x):
        v0 = torch.full_like(x[0], 0.1)
        spikes, state = self.norm(OverTime(self.conv)(x), x, v0, return_state=True)
        pooled = self.out(spikes + state)
        assert isinstance(pooled, snn.Spikes) and pooled.pooled
        return self.last(self.rows(pooled.spikes.flatten(-2).transpose(2, 3)).transpose(2, 3))


def test_layers_that_were_never_pairs():
    model = Block().double()
    x = torch.randn(T, B, C, H, H, dtype=torch.float64)
    want, text, before = copy.deepcopy(model), repr(model), snapshot(model)
    unfuse(model)
    layers = [model.norm, model.out.norm, model.rows[1], model.last]
    assert all(type(layer) is UnfusedBatchNormLIF and isinstance(layer, TimeSequential) for layer in layers)
    kinds = [nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm1d, nn.BatchNorm1d]
    assert [type(layer.norm) for layer in layers] == kinds
    same(model, want, x)
    same(model.eval(), want.eval(), x)
    model.load_state_dict(convert_state_dict(before, model))
    convert_norm_lif(model)
    # The neuron of a packed layer has been told to pack by itself.
    assert repr(model).replace("packed=True, time_dim", "time_dim") == text and equal(model.state_dict(), before)


def test_a_layer_by_itself():
    layer = snn.BatchNormLIF(3).double()
    x = torch.randn(T, B, 3, 5, dtype=torch.float64)
    apart = unfuse(layer, nn.BatchNorm1d)
    assert torch.equal(apart(x), layer(x)) and list(apart._modules) == ["norm", "lif"]
    assert type(unfuse(layer).norm) is nn.BatchNorm2d
    assert type(unfuse(snn.BatchNormLIF(3, sync=True)).norm) is nn.SyncBatchNorm
    again = convert_norm_lif(apart)
    assert type(again) is snn.BatchNormLIF and again.weight is layer.weight
    with pytest.raises(ValueError, match="expected 4D input"):
        unfuse(layer)(x)
    assert type(apart[:1]) is TimeSequential
    last = nn.Sequential(snn.BatchNormLIF(5, channel_dim=-1)).double()
    packed = TimeSequential(snn.LIF(packed=True), *last)
    assert torch.equal(packed(x), unfuse(packed)(x))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: snn.BatchNormLIF(3, channel_dim=1), "got channel_dim=1"),
        # Its pair had the channels on axis 1, where a TimeSequential does not have them.
        (lambda: TimeSequential(*convert_norm_lif(nn.Sequential(nn.BatchNorm2d(3), snn.LIF()))), "got channel_dim=1"),
        (lambda: hooked(snn.BatchNormLIF(3)), "BatchNormLIF has hooks"),
        (lambda: type("Own", (snn.BatchNormLIF,), {})(3), "Own is a class of its own"),
    ],
)
def test_a_layer_that_differs_is_left_alone(model, why):
    net = nn.Sequential(model())
    before = list(net.modules())
    with pytest.warns(UserWarning, match=rf"unfuse: '0(\.0)?' stays one layer: .*{why}"):
        unfuse(net)
    assert all(a is b for a, b in zip(net.modules(), before, strict=True))


def test_a_checkpointing_block_stays_fused():
    block = ConvBatchNormLIF(SpikeConv2d(2, 3, 3), snn.BatchNormLIF(3), checkpoint=True)
    with pytest.warns(UserWarning, match="'norm' stays one layer: .*checkpoint=True"):
        unfuse(block)
    assert isinstance(block.norm, snn.BatchNormLIF)


def test_after_a_change_by_hand_the_layers_do_not_go_back_wrongly():
    net = convert_norm_lif(TimeSequential(nn.Conv2d(C, 3, 1), nn.BatchNorm2d(3), snn.LIF(), nn.AvgPool2d(2))).double()
    x = torch.randn(T, B, C, H, H, dtype=torch.float64)
    short = TimeSequential(*net[:3])
    want = short(x)
    assert torch.equal(unfuse(short)(x), want) and type(short[1]) is UnfusedBatchNormLIF
    net = convert_norm_lif(TimeSequential(nn.Conv2d(C, 3, 1), nn.BatchNorm2d(3), snn.LIF(), nn.AvgPool2d(2))).double()
    net[1].pool = 1
    want = net(x)
    assert torch.equal(unfuse(net)(x), want) and type(net[3]) is Absorbed
