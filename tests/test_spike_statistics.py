"""Rates, intervals and rasters against plain loops over the spikes themselves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from trtkern import nn
from trtkern.analysis import Samples, SpikeStatistics, spikes
from trtkern.models import ConvSNN
from trtkern.profiling.firing.activity import firing_rates


class Fire(torch.nn.Module):
    """Neurons of another library: what is above 0.5 fires."""

    def forward(self, x):
        return (x > 0.5).float()


class Steps(torch.nn.Module):
    """One step at a time."""

    def __init__(self):
        super().__init__()
        self.fire = Fire()

    def forward(self, x):
        return torch.stack([self.fire(x_t) for x_t in x])


class Whole(Steps):
    """All steps as one batch."""

    def forward(self, x):
        return self.fire(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("kind", [Steps, Whole])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 11])
def test_against_plain_loops(kind, batch_size):
    torch.manual_seed(0)
    x = torch.rand(5, 11, 6)
    x[:, :, 0], x[:, :, 1] = 0, 1
    given, labels = (x > 0.5).float(), torch.zeros(11, dtype=torch.long)
    samples = Samples.of("t", (x, labels), batch_dim=1, batch_size=batch_size)
    found = spikes(kind(), samples, layers=["fire"], shown=[2, 10], neurons=4, bins=5).layers["fire"]
    rates = given.double().mean((0, 1)).tolist()
    histogram, intervals = [0.0] * 5, [0.0] * 5
    for n in range(6):
        histogram[min(4, int(rates[n] * 5 + 1e-12))] += 1
        for b in range(11):
            times = given[:, b, n].nonzero()[:, 0].tolist()
            for first, second in pairwise(times):
                intervals[second - first] += 1
    assert found.histogram.tolist() == histogram and found.intervals.tolist() == intervals
    torch.testing.assert_close(found.activity.rate, given.double().mean((1, 2)), rtol=1e-12, atol=0)
    assert (found.activity.silent, found.activity.saturated) == pytest.approx((1 / 6, 1 / 6))
    assert len(found.chosen) == 4 and found.chosen == sorted(set(found.chosen))
    for raster, sample in zip(found.rasters, (2, 10), strict=True):
        assert torch.equal(raster, given[:, sample, found.chosen].double())


@pytest.mark.parametrize("layers", [(4, 6), (4, "pool", 6)])
def test_agrees_with_the_firing_rates(layers):
    torch.manual_seed(0)
    model = ConvSNN((1, 8, 8), layers, 3, timesteps=3).train()
    images, labels = torch.randn(7, 1, 8, 8), torch.arange(7) % 3
    random = torch.get_rng_state()
    found = spikes(model, Samples.of("t", (images, labels), batch_size=3))
    assert torch.equal(torch.get_rng_state(), random) and model.training
    with firing_rates(model.eval()) as rates, torch.no_grad():
        model(images)
    assert list(found.layers) == list(rates.layers)
    for name, wanted in rates.layers.items():
        got = found.layers[name].activity
        torch.testing.assert_close(got.rate, wanted.rate, rtol=1e-12, atol=0)
        assert got._replace(rate=None) == wanted._replace(rate=None)
        assert float(found.layers[name].histogram.sum()) == wanted.neurons


def test_the_result(tmp_path):
    model = ConvSNN((1, 6, 6), (3, 3), 3, timesteps=3)
    found = spikes(model, (torch.randn(4, 1, 6, 6), torch.zeros(4, dtype=torch.long)), neurons=20)
    found.save(tmp_path / "spikes.json")
    again = SpikeStatistics.load(tmp_path / "spikes.json")
    assert str(again) == str(found)
    for name, layer in found.layers.items():
        assert torch.equal(again.layers[name].rasters[0], layer.rasters[0]) and len(layer.chosen) == 20
    assert len(found.plot(tmp_path / "spikes.png").axes) == 3
    assert len(SpikeStatistics.pictures({"a": found, "b": again})) == 4


def test_errors():
    samples = Samples.of("t", (torch.rand(2, 3, 4), torch.zeros(3, dtype=torch.long)), batch_dim=1)
    with pytest.raises(ValueError, match=r"spikes: expected a model that runs layers of spiking neurons.*layers="):
        spikes(Steps(), samples)
    with pytest.raises(ValueError, match="spikes: layers: expected one of fire, got 'fier'; did you mean 'fire'"):
        spikes(Steps(), samples, layers=["fier"])
    with pytest.raises(ValueError, match="spikes: expected shown to be numbers from 0 to 2, got 3"):
        spikes(nn.LIF(0.5), samples, shown=[3])
    with pytest.raises(ValueError, match="spikes: expected bins to be an int of at least 1, got 0"):
        spikes(nn.LIF(0.5), samples, bins=0)
    with pytest.raises(TypeError, match=r"spikes: expected model to be a torch.nn.Module"):
        spikes(torch.sin, samples)
