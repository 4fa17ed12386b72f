"""Models that tests record, decompose and write as ONNX."""

import torch
from torch import nn

from trtkern import models
from trtkern import nn as snn
from trtkern.names import NEURONS

C = 5


class Every(nn.Module):
    """Every neuron of the table, with each reset that it has, on one input: a tuple of what each gives."""

    def __init__(self):
        super().__init__()
        made = [getattr(snn, name) for name in NEURONS]
        layers = [make(v_reset=None) for make in made]
        layers += [make(v_threshold=torch.linspace(0.3, 0.6, C)) for make in made if make is not snn.CLIF]
        layers += [snn.LI(), snn.CUBALI(decay=torch.linspace(0.2, 0.9, C)), snn.LIF(fire_on_equal=True, packed=True)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return tuple(out.spikes if isinstance(out, snn.Spikes) else out for out in (layer(x) for layer in self.layers))


class Around(nn.Module):
    """What stands around neurons: norms with a residual, pooling and none, states and potentials that go in and out."""

    def __init__(self):
        super().__init__()
        self.conv = snn.SpikeConv2d(2, C, 3, padding=1)
        self.first = snn.BatchNormLIF(C, packed=True)
        self.second = snn.BatchNormLIF(C, neuron=snn.PLIF, pool=2)
        self.moving = snn.BatchNormLIF(C, track_running_stats=False)
        self.odd = snn.BatchNormLIF(C, neuron=snn.ALIF, pool=2)
        self.lif, self.two = snn.PLIF(channels=C), snn.CUBALIF(v_reset=None)
        self.fc = snn.SpikeLinear(C * 9, 3)

    def forward(self, x):
        y = self.conv(x)
        s = self.first(y)
        pooled = self.second(y, residual=s)
        odd = self.odd(y[..., :5])
        a, state, v = self.lif(pooled, return_state=True, return_v=True)
        b, both, h = self.two(pooled, return_state=True, return_h=True)
        again = self.two(pooled, v0=both)
        return self.fc(pooled), odd, a, state, v, b, both.i, both.v, h, again, self.moving(y)


def drawn(model):
    """The model in evaluation, with statistics and weights at random, so that its neurons fire."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, snn.BatchNormLIF)):
            if module.running_mean is not None:
                nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.weight, 1, 2)
    return model.eval()


def network(timesteps=4):
    """Average pooling, both kinds of residual blocks, a fully connected layer."""
    topology = "CONVAP-4-3-1-1_RES-4-3=3-1=1-1=1_SEWRES~ADD-8-3=3-2=1-1=1_FC-6_L-3"
    return drawn(models.from_topology(topology, shape=(2, 8, 8), timesteps=timesteps))


def listed(y):
    return list(y) if isinstance(y, tuple) else [y]


def same(got, want, **tolerance):
    """Equal but for rounding; where all of it is spikes, exactly. NaN equals nothing."""
    got, want = listed(got), listed(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        if set(b.unique().tolist()) <= {0.0, 1.0}:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, **{"rtol": 1e-5, "atol": 1e-5, **tolerance})
