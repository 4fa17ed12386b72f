"""Pairs of BatchNorm and LIF into BatchNormLIF and back: the same results, parameters and checkpoints."""

import copy
import io
import itertools
import warnings

import pytest
import torch
from pairs import MODELS, B, C, H, T, convolutional, equal, hooked, made, same, snapshot
from torch import nn

from trtkern import nn as snn
from trtkern.nn import Absorbed, convert_norm_lif, convert_state_dict, unfuse
from trtkern.nn.time import OverTime, TimeSequential


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def fused_layers(model):
    return [module for module in model.modules() if isinstance(module, snn.BatchNormLIF)]


@pytest.mark.parametrize("name", MODELS)
def test_fused_and_back(name):
    model, x = made(name)
    want = copy.deepcopy(model)
    before, text = snapshot(model), repr(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert convert_norm_lif(model) is model
    assert len(fused_layers(model)) == (2 if name in ("convolutional", "module") else 1)
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    same(model, want, x)
    same(model.eval(), want.eval(), x)
    model.load_state_dict(convert_state_dict(before, model))
    assert unfuse(model) is model
    assert repr(model) == text and equal(model.state_dict(), before)
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    want.load_state_dict(before)
    same(model.train(), want.train(), x)


def test_what_the_fused_layer_is():
    model = convolutional(eps=1e-2, momentum=0.3)
    model[1].weight.requires_grad_(False)
    model[1].eval()
    bn, lif, plif = model[1], model[2], model[6]
    keys = list(model.state_dict())
    convert_norm_lif(model)
    layer = model[1]
    assert [type(module) for module in model[1:4]] == [snn.BatchNormLIF, Absorbed, Absorbed]
    assert [type(module) for module in model[5:8]] == [snn.BatchNormLIF, Absorbed, OverTime]
    assert list(model._modules) == [str(i) for i in range(10)]
    assert (layer.eps, layer.momentum, layer.pool, layer.channel_dim, layer.training) == (1e-2, 0.3, 2, 2, False)
    assert (
        layer.lif is lif and layer.weight is bn.weight and not layer.weight.requires_grad and layer.bias.requires_grad
    )
    assert layer.running_mean is bn.running_mean and layer.num_batches_tracked is bn.num_batches_tracked
    assert model[5].pool == 1 and model[5].lif is plif and not model[5].sync
    assert "Absorbed(neuron)" in repr(model) and "Absorbed(AvgPool2d)" in repr(model)
    changed = {"5.module.weight": "5.weight", "6.w": "5.lif.w", "6.v_leak": "5.lif.v_leak"}
    changed |= {
        f"5.module.{name}": f"5.{name}" for name in ("bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert list(model.state_dict()) == [changed.get(key, key) for key in keys]


def test_an_optimiser_goes_on():
    model, x = made("convolutional")
    want = copy.deepcopy(model)
    nets = {model: torch.optim.Adam(model.parameters(), 1e-2), want: torch.optim.Adam(want.parameters(), 1e-2)}
    for step in range(4):
        if step == 2:
            convert_norm_lif(model)
        for net, optimizer in nets.items():
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    unfuse(model)
    assert len(nets[model].state) == len(list(model.parameters()))
    for a, b in zip(model.state_dict().values(), want.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    # An optimiser's checkpoint goes by the order of the parameters: it loads into the other form too.
    torch.optim.Adam(convert_norm_lif(want).parameters()).load_state_dict(nets[model].state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_cross(name):
    model, x = made(name)
    fused = convert_norm_lif(copy.deepcopy(model))
    model(x)
    for source, target in itertools.permutations([model, fused, unfuse(copy.deepcopy(fused))], 2):
        target.load_state_dict(convert_state_dict(source.state_dict(), target))
        assert equal(snapshot(target), convert_state_dict(source.state_dict(), target))
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(convert_state_dict(torch.load(buffer, weights_only=True), model))


def test_errors_name_the_keys():
    model = convolutional()
    fused = convert_norm_lif(copy.deepcopy(model))
    both = model.state_dict() | {"5.lif.w": torch.zeros(6)}
    with pytest.raises(ValueError, match=r"one key for '5.lif.w', got '6.w' and '5.lif.w'"):
        convert_state_dict(both, fused)
    with pytest.raises(ValueError, match=r"one key for '6.w', got '6.w' and '5.lif.w'"):
        convert_state_dict(both, model)
    part = {key: value for key, value in model.state_dict().items() if key != "6.w"} | {"extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "5.lif.w"(?s:.*)Unexpected.*"extra"'):
        fused.load_state_dict(convert_state_dict(part, fused))


class OwnForward(TimeSequential):
    def forward(self, x):
        return super().forward(x) + 1


class OwnNorm(nn.BatchNorm2d):
    pass


class OwnNeuron(snn.LIF):
    def forward(self, x):
        return 1 - super().forward(x)


def changed(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def shared():
    norm = nn.BatchNorm2d(C)
    return TimeSequential(norm, snn.LIF(), nn.ReLU(), norm)


def shared_wrapper():
    wrapper = OverTime(nn.BatchNorm2d(C))
    return TimeSequential(wrapper, snn.LIF(), nn.ReLU(), wrapper)


PER_CHANNEL = torch.full((C,), 0.5)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: OwnForward(nn.BatchNorm2d(C), snn.LIF()), "OwnForward, which holds them, has a forward of its own"),
        (lambda: TimeSequential(OwnNorm(C), snn.LIF()), "expected one of BatchNorm1d, .*, got OwnNorm"),
        (lambda: TimeSequential(nn.LazyBatchNorm2d(), snn.LIF()), "got LazyBatchNorm2d"),
        (lambda: TimeSequential(nn.BatchNorm2d(C), OwnNeuron()), "OwnNeuron has a forward of its own"),
        (lambda: TimeSequential(hooked(nn.BatchNorm2d(C)), snn.LIF()), "BatchNorm2d has hooks"),
        (lambda: TimeSequential(hooked(OverTime(nn.BatchNorm2d(C))), snn.LIF()), "OverTime has hooks"),
        (lambda: TimeSequential(nn.BatchNorm2d(C), hooked(snn.LIF())), "LIF has hooks"),
        (shared, "this BatchNorm2d is used in several places"),
        (shared_wrapper, "this BatchNorm2d is used in several places"),
        (lambda: TimeSequential(nn.BatchNorm2d(C, eps=0), snn.LIF()), "expected eps to be a number > 0"),
        (lambda: TimeSequential(nn.BatchNorm2d(C, momentum=1.5), snn.LIF()), r"expected momentum in \[0, 1\]"),
        (
            lambda: TimeSequential(changed(nn.BatchNorm2d(C), track_running_stats=False), snn.LIF()),
            "without using them",
        ),
        (lambda: TimeSequential(changed(nn.BatchNorm2d(C), weight=None), snn.LIF()), "a bias and no weight"),
        (lambda: TimeSequential(nn.SyncBatchNorm(C, process_group=[1]), snn.LIF()), "process_group of its own"),
        (lambda: nn.Sequential(OverTime(nn.BatchNorm2d(C)), snn.LIF(time_dim=1)), "axis 0, got time_dim=1"),
        (lambda: TimeSequential(nn.BatchNorm1d(C), snn.LIF(time_dim=-3)), "axis 0, got time_dim=-3"),
        (lambda: TimeSequential(nn.BatchNorm2d(C), snn.LIF(PER_CHANNEL, channel_dim=3)), "axis 2, got channel_dim=3"),
        (lambda: TimeSequential(nn.BatchNorm1d(C), snn.LIF(PER_CHANNEL, channel_dim=-1)), "axis 2, got channel_dim=-1"),
        (lambda: nn.Sequential(nn.BatchNorm2d(C), snn.LIF(PER_CHANNEL)), "axis 1, got channel_dim=2"),
    ],
)
def test_a_pair_that_differs_is_left_alone(model, why):
    net = nn.ModuleDict({"part": model()})
    before = list(net.modules())
    with pytest.warns(UserWarning, match=rf"convert_norm_lif: 'part.0' and 'part.1' stay two layers: .*{why}"):
        convert_norm_lif(net)
    assert all(a is b for a, b in zip(net.modules(), before, strict=True))


@pytest.mark.parametrize(
    "model",
    [
        lambda: TimeSequential(nn.Linear(3, 4), snn.LIF(), nn.BatchNorm1d(4), nn.ReLU(), snn.LIF()),
        lambda: TimeSequential(nn.GroupNorm(2, 4), snn.LIF(), nn.BatchNorm1d(4), snn.LI()),
        lambda: nn.ModuleList([nn.BatchNorm1d(4), snn.LIF()]),
        lambda: nn.BatchNorm2d(3),
        lambda: nn.Sequential(snn.BatchNormLIF(3), snn.LIF()),
        lambda: nn.Sequential(),
    ],
)
def test_models_without_pairs_are_untouched(model):
    net = model()
    before = [(name, module, list(module._modules)) for name, module in net.named_modules()]
    convert_norm_lif(net)
    after = [(name, module, list(module._modules)) for name, module in net.named_modules()]
    assert len(after) == len(before)
    assert all(a[0] == b[0] and a[1] is b[1] and a[2] == b[2] for a, b in zip(after, before, strict=True))
    assert equal(convert_state_dict(net.state_dict(), net), net.state_dict())


@pytest.mark.parametrize(
    ("norm", "pool", "fuses"),
    [
        (nn.BatchNorm2d(C), nn.AvgPool2d(2, 2), True),
        (nn.SyncBatchNorm(C), nn.AvgPool2d(2), True),
        (nn.BatchNorm1d(C), nn.AvgPool2d(2), False),
        (nn.BatchNorm2d(C), nn.AvgPool2d(3), False),
        (nn.BatchNorm2d(C), nn.AvgPool2d(2, 1), False),
        (nn.BatchNorm2d(C), nn.AvgPool2d((2, 1)), False),
        (nn.BatchNorm2d(C), nn.AvgPool2d(2, padding=1), False),
        (nn.BatchNorm2d(C), nn.AvgPool2d(2, divisor_override=3), False),
        (nn.BatchNorm2d(C), hooked(nn.AvgPool2d(2)), False),
        (nn.BatchNorm2d(C), nn.MaxPool2d(2), False),
    ],
)
def test_which_pooling_is_fused(norm, pool, fuses):
    net = convert_norm_lif(TimeSequential(norm, snn.LIF(), pool))
    assert net[0].pool == (2 if fuses else 1) and (net[2] is pool) == (not fuses)
    assert net[0].sync == isinstance(norm, nn.SyncBatchNorm)
    assert type(unfuse(net)[0]) is type(norm) and type(net[2]) is type(pool)


class Branches(nn.Module):
    """Layers that no nn.Sequential holds, as in a residual block written by hand."""

    def __init__(self):
        super().__init__()
        self.norm, self.lif = nn.BatchNorm2d(C), snn.LIF()
        self.stem = TimeSequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(), OverTime(nn.BatchNorm2d(C)))
        self.body = TimeSequential(nn.BatchNorm2d(C), snn.LIF(), nn.Conv2d(C, C, 1), snn.PLIF())
        self.hooked = TimeSequential(hooked(nn.BatchNorm2d(C)), snn.IF())
        self.fused = nn.ModuleList([snn.BatchNormLIF(C), unfuse(nn.ModuleList([snn.BatchNormLIF(C)]))[0], snn.LI()])


def test_the_report_names_what_is_left_and_why():
    report = snn.ConversionReport()
    net = Branches()
    with pytest.warns(UserWarning, match="hooks"):
        assert convert_norm_lif(net, report) is net
    assert report.fused == ["body.0", "fused.1"]
    assert [type(layer) for layer in net.fused] == [snn.BatchNormLIF, snn.BatchNormLIF, snn.LI]
    apart = "it stands in Branches, not in an nn.Sequential: what runs before and behind it is not known"
    hooks = "BatchNorm2d has hooks, which would be lost"
    assert report.left == {
        "hooked.0": hooks,
        "hooked.1": hooks,
        "norm": apart,
        "lif": apart,
        "stem.1": "expected spiking neurons directly behind it, got ReLU",
        "stem.3": "expected spiking neurons directly behind it, got nothing",
        "body.3": "expected a BatchNorm directly before it, got Conv2d",
    }
    assert report.summary() == {"fused": report.fused, "left": report.left}
    lines = str(report).splitlines()
    assert lines[0] == "fused 2: body.0, fused.1" and lines[1] == "left 7:" and len(lines) == 9
    assert lines[-1] == "  'body.3': expected a BatchNorm directly before it, got Conv2d"


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (lambda: nn.BatchNorm2d(3), {"": "it stands in nothing"}),
        (lambda: snn.PLIF(), {"": "it stands in nothing"}),
        (lambda: OverTime(nn.BatchNorm2d(3)), {"": "it stands in nothing"}),
        (lambda: nn.Sequential(nn.GroupNorm(2, 4), snn.LIF()), {"1": "got GroupNorm"}),
        (
            lambda: nn.Sequential(snn.LIF(), nn.ModuleDict({"norm": nn.BatchNorm1d(3)})),
            {"0": "nothing", "1.norm": "Dict"},
        ),
        (lambda: nn.Sequential(snn.BatchNormLIF(3), nn.Linear(3, 3), snn.LI()), {}),
        (lambda: nn.Linear(3, 3), {}),
    ],
)
def test_reports_of_models_without_pairs(model, left):
    report = snn.ConversionReport()
    convert_norm_lif(model(), report)
    assert report.fused == [] and list(report.left) == list(left)
    assert all(why in report.left[name] for name, why in left.items())
    assert str(report).startswith("fused 0: none\nleft ")


def test_packed_spikes_stay_packed():
    net = TimeSequential(nn.BatchNorm2d(C), snn.LIF(packed=True)).double()
    want = copy.deepcopy(net)
    x = torch.randn(T, B, C, H, H, dtype=torch.float64)
    got = convert_norm_lif(net)(x)
    assert isinstance(got, snn.Spikes) and torch.equal(got.words, want(x).words)
    assert torch.equal(unfuse(net)(x).words, got.words)
    pooled = convert_norm_lif(TimeSequential(*want, nn.AvgPool2d(2)))
    assert pooled[0].pool == 1 and isinstance(pooled(x), torch.Tensor)


def test_one_neuron_in_several_places():
    lif = snn.PLIF()
    net = TimeSequential(nn.BatchNorm2d(C), lif, nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), lif).double()
    want, text = copy.deepcopy(net), repr(net)
    x = torch.randn(T, B, C, H, H, dtype=torch.float64)
    convert_norm_lif(net)
    assert net[0].lif is net[3].lif is lif
    same(net, want, x)
    net.load_state_dict(convert_state_dict(want.state_dict(), net))
    assert repr(unfuse(net)) == text and net[1] is net[4] is lif


def test_copies_of_a_fused_model():
    model, x = made("convolutional")
    convert_norm_lif(model).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x)) and repr(unfuse(other)) == repr(unfuse(copy.deepcopy(model)))


def test_fullgraph():
    torch._dynamo.reset()
    net = convert_norm_lif(TimeSequential(nn.Linear(3, 4), nn.BatchNorm1d(4), snn.LIF(), nn.Linear(4, 2), timesteps=T))
    x = torch.randn(B, 3)
    want = copy.deepcopy(net)(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), want)
