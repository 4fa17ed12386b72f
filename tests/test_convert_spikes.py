"""Models that exist: which of their layers come to compute on packed spikes, and what the report says."""

import json

import pytest
import torch
from torch import nn

from trtkern.nn import (
    LIF,
    BatchNormLIF,
    ConvBatchNormLIF,
    OverTime,
    SpikeConv2d,
    SpikeLayersReport,
    SpikeLinear,
    Spikes,
    TimeSequential,
    convert_norm_lif,
    convert_spike_layers,
)


def in_time():
    return TimeSequential(
        nn.Conv2d(2, 8, 3, padding=1), LIF(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), LIF(), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), LIF(), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def over_time():
    return nn.Sequential(
        OverTime(nn.Conv2d(2, 8, 3)), LIF(), OverTime(nn.Conv2d(8, 8, 3)), LIF(), nn.Flatten(2), nn.Linear(128, 5),
        LIF(), nn.Linear(5, 3),
    )  # fmt: skip


def of_blocks():
    return nn.Sequential(
        ConvBatchNormLIF(SpikeConv2d(2, 8, 3, padding=1), BatchNormLIF(8)),
        ConvBatchNormLIF(SpikeConv2d(8, 8, 3, padding=1), BatchNormLIF(8, pool=2)),
        ConvBatchNormLIF(SpikeConv2d(8, 8, 3, padding=1), BatchNormLIF(8)),
        SpikeLinear(8 * 16, 10),
    )  # fmt: skip


MODELS = {"in time": (in_time, 8, 3, 3), "over time": (over_time, 8, 3, 3), "of blocks": (of_blocks, 8, 3, 3)}


def run(model, x):
    torch.manual_seed(0)
    y = model(x)
    y = y.spikes if isinstance(y, Spikes) else y
    y.square().sum().backward()
    return y, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_that_computes_on_words(name):
    make, side, givers, takers = MODELS[name]
    torch.manual_seed(0)
    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 2, 2, side, side)
    if name == "in time":
        convert_norm_lif(model), convert_norm_lif(twin)
    held = list(model.parameters())
    report = SpikeLayersReport()
    assert convert_spike_layers(model, report) is model
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    packed = [m for m in model.modules() if getattr(m, "packed", False)]
    spiking = [m for m in model.modules() if isinstance(m, (SpikeConv2d, SpikeLinear))]
    assert (len(packed), len(spiking)) == (givers, takers if name != "of blocks" else 4)
    got, want = run(model, x), run(twin, x)
    assert torch.equal(got[0], want[0]) and want[0].isfinite().all()  # small: torch computes both
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))
    json.dumps(report.summary())
    assert sorted(report.converted.values()).count("packed=True") == givers


def test_what_is_left_and_why():
    shared = nn.Conv2d(4, 4, 1)
    hooked = nn.Conv2d(4, 4, 1)
    hooked.register_forward_hook(lambda *_: None)

    class Own(TimeSequential):
        def forward(self, x):
            return super().forward(x) + 0

    model = nn.ModuleDict(
        {
            "shared": TimeSequential(LIF(), shared, LIF(), shared),
            "hooked": TimeSequential(LIF(), hooked),
            "own": Own(LIF(), nn.Conv2d(4, 4, 1)),
            "plain": nn.Sequential(LIF(), nn.Conv2d(4, 4, 1)),
            "axis": nn.Sequential(LIF(time_dim=1), nn.Linear(4, 4)),
            "alone": nn.Linear(4, 4),
            "between": TimeSequential(LIF(), nn.Dropout(), nn.Linear(4, 4)),
        }
    )
    before = [type(m) for m in model.modules()]
    report = SpikeLayersReport()
    convert_spike_layers(model, report)
    assert [type(m) for m in model.modules()] == before and not report.converted
    said = report.left
    assert "several places" in said["shared.1"] and "hooks" in said["hooked.1"]
    assert "forward of its own" in said["own.1"] and "OverTime" in said["plain.1"]
    assert "time_dim=1" in said["axis.1"] and "not known" in said["alone"] and "not known" in said["between.2"]
    assert "several places" in str(report) and "converted 0: none" in str(report)


def test_an_optimiser_goes_on_and_names_stay():
    model = in_time()
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_spike_layers(model)
    assert [name for name, _ in model.named_parameters()] == names
    before = [p.detach().clone() for p in model.parameters()]
    run(model, torch.randn(4, 2, 2, 8, 8))
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert type(model[-1]) is SpikeLinear and type(model[-2]) is nn.Identity
