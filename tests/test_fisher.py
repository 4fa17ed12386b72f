"""Fisher information of every timestep, against plain loops over samples and timesteps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn as tnn
from torch.nn import functional as F

from trtkern import cli, nn
from trtkern.analysis import Fisher, Result, Samples, _layer_gradients, fisher
from trtkern.analysis._fisher import Epoch
from trtkern.backends import named
from trtkern.commands import _runs
from trtkern.models._blocks import Convolution, LinearLIF, ResidualBlock, SEWBlock, Style
from trtkern.models._network import SpikingNetwork
from trtkern.models.conv import ConvSNN

pytestmark = pytest.mark.usefixtures("one_thread")

T, CLASSES = 3, 4
# Not "auto": in Triton's interpreter a step takes minutes.
FUSED = "cpu" if named("cpu").missing() is None else "reference"


def plain(model, inputs, labels, batch_dim):
    """Per layer and sample [N, L, T], and of the mean loss of all [L, T]: autograd's gradients of the weights."""
    model.eval()
    names = [name for name, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))]

    def squares(x, y):
        steps = len(model(x))
        found = torch.zeros(len(names), steps, dtype=torch.float64)
        for t in range(steps):
            model.zero_grad()
            F.cross_entropy(model(x)[: t + 1].mean(0), y).backward()
            for place, name in enumerate(names):
                own = model.get_submodule(name).parameters(recurse=False)
                found[place, t] = sum(float(p.grad.double().square().sum()) for p in own if p.grad is not None)
        model.zero_grad()
        return found

    own = [squares(inputs.narrow(batch_dim, n, 1), labels[n : n + 1]) for n in range(len(labels))]
    return names, torch.stack(own), squares(inputs, labels)


def conv(**options):
    return ConvSNN((2, 6, 6), [3, "pool", 4], CLASSES, timesteps=T, backend="reference", **options)


def residual():
    style = Style.of(False, True, backend="reference")
    blocks = [
        style.block(Convolution(2, 4)),
        ResidualBlock(Convolution(4, 4), Convolution(4, 4), None, style),
        SEWBlock(Convolution(4, 6, stride=2), Convolution(6, 6), Convolution(4, 6, 1, 2, 0), style),
        ResidualBlock(Convolution(6, 6, stride=2), Convolution(6, 6), Convolution(6, 6, 1, 2, 0), style),
        LinearLIF(24, 5, style),
    ]
    return SpikingNetwork(blocks, nn.SpikeLinear(5, CLASSES), timesteps=T)


def no_scales():
    """Weights of BatchNorm that are 0, behind which no gradient of the input is left."""
    model = residual()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNormLIF):
                m.weight[1::2] = 0
    return model


def folded():
    """torch's own layers over time and batch in one axis, of each kind."""
    return nn.TimeSequential(
        tnn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), tnn.GroupNorm(2, 4), nn.LIF(backend="reference"),
        tnn.Conv2d(4, 4, (2, 1), stride=2, groups=2, padding=(1, 0), bias=False), tnn.BatchNorm2d(4),
        nn.LIF(backend="reference", packed=True), tnn.AvgPool2d(2), tnn.Flatten(), tnn.LayerNorm(8),
        tnn.Linear(8, CLASSES), timesteps=T,
    )  # fmt: skip


class Foreign(tnn.Module):
    """A network as others write them: a loop over time, one step a call, in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = tnn.Conv1d(12, 5, 3, padding=1), tnn.BatchNorm1d(5)
        self.hidden, self.out = tnn.Linear(5, 4), tnn.Linear(24, CLASSES)

    def forward(self, x):
        v, outs = 0.0, []
        for _ in range(T):
            y = self.norm(self.conv(x.flatten(1, 2)))
            y.relu_()
            v = 0.5 * v + self.hidden(y.transpose(1, 2))
            outs.append(self.out(v.sigmoid().flatten(1)))
        return torch.stack(outs)


class BatchFirst(tnn.Module):
    """Batch and time folded with the batch outermost."""

    def __init__(self):
        super().__init__()
        self.first, self.last = tnn.Linear(72, 6), tnn.Linear(6, CLASSES)

    def forward(self, x):
        steps = x.flatten(1).unsqueeze(1) * torch.arange(1, T + 1).view(1, T, 1)
        y = self.first(steps.flatten(0, 1)).tanh()
        return self.last(y).unflatten(0, (-1, T)).cumsum(1).transpose(0, 1)


NETWORKS = {
    "images": (conv, False),
    "frames": (conv, True),
    "checkpoint": (lambda: conv(checkpoint=True), True),
    "residual": (residual, False),
    "zero scales": (no_scales, True),
    "folded": (folded, False),
    "foreign": (Foreign, False),
}


def problem(name, frames, count=7):
    model = NETWORKS[name][0]().double()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(getattr(m, "running_mean", None), torch.Tensor):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.2, 1)
                m.weight.mul_(torch.randn_like(m.weight))
                m.bias.normal_(0.5)
    shape = (T, count, 2, 6, 6) if frames else (count, 2, 6, 6)
    return model, torch.rand(shape, dtype=torch.float64) * 2, torch.randint(CLASSES, (count,))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_definition(name):
    """Every layer and sample; and the formula of the batch, of each batch of three, the last of one left out."""
    frames = NETWORKS[name][1]
    model, x, y = problem(name, frames)
    found = fisher(model, Samples.of("test", (x, y), batch_size=3, batch_dim=int(frames)), confidence=None)
    assert (found.method, found.reason) == ("hooks", "")
    names, own, _ = plain(model, x, y, int(frames))
    assert found.layers == names and (own.sum(0) > 0).all()
    exact = {"rtol": 1e-6, "atol": 0.0}
    torch.testing.assert_close(found.by_sample, own.sum(1), **exact)
    torch.testing.assert_close(found.information, own.sum(1).mean(0), **exact)
    torch.testing.assert_close(found.by_layer, own.mean(0), **exact)
    batches = [plain(model, x.narrow(int(frames), at, 3), y[at : at + 3], int(frames))[2] for at in (0, 3)]
    torch.testing.assert_close(found.batch_mean.by_layer, (batches[0] + batches[1]) / 2, **exact)
    torch.testing.assert_close(found.batch_mean.information, (batches[0] + batches[1]).sum(0) / 2, **exact)
    assert (found.batch_mean.size, found.batch_mean.batches) == (3, 2)
    for kind, values in ((found, found.information), (found.batch_mean, found.batch_mean.information)):
        assert kind.centroid == pytest.approx(sum((t + 1) * float(values[t]) for t in range(T)) / float(values.sum()))


class Raw(tnn.Module):
    """Linear, with a parameter of its own beside."""

    def __init__(self):
        super().__init__()
        self.out, self.gain = tnn.Linear(72, CLASSES), tnn.Parameter(torch.ones(()))

    def forward(self, x):
        return (self.out(x.flatten(1)) * self.gain).sin().expand(T, -1, -1).cumsum(0)


class Tied(Raw):
    def __init__(self):
        super().__init__()
        del self.gain
        self.gain, self.again = 1.0, tnn.Linear(72, CLASSES)
        self.again.weight = self.out.weight

    def forward(self, x):
        return super().forward(x) + self.again(x.flatten(1).cos())


class Beside(Raw):
    """The weight of a layer is used without the layer, too."""

    def __init__(self):
        super().__init__()
        del self.gain
        self.gain = 1.0

    def forward(self, x):
        return super().forward(x) + x.flatten(1).cos() @ self.out.weight.T


class Deaf(tnn.Module):
    """A layer that is called for nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.out = tnn.Linear(72, 5), tnn.Linear(72, CLASSES)

    def forward(self, x):
        self.first(x.flatten(1))
        return self.out(x.flatten(1)).expand(T, -1, -1)


class Later(tnn.Module):
    """Outputs that know the steps after them."""

    def __init__(self):
        super().__init__()
        self.first, self.out = tnn.Linear(72, 5), tnn.Linear(5, CLASSES)

    def forward(self, x):
        steps = x.flatten(1) * torch.arange(1, T + 1).view(T, 1, 1)
        return self.out(self.first(steps).tanh().flip(0))


def learned():
    return conv(neuron=nn.PLIF)


def weight_norm():
    model = conv()
    tnn.utils.parametrizations.weight_norm(model.classifier)
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (learned, r"layers.0.norm.lif \(PLIF\) has parameters of its own kind"),
        (weight_norm, r"classifier.parametrizations.weight \(ParametrizationList\) has parameters of its own kind"),
        (Raw, r"the model \(Raw\) has parameters"),
        (Tied, "again and out share a parameter"),
        (Beside, "differ from those of a single sample"),
        (Later, "differ from those of a single sample"),
        (BatchFirst, "differ from those of a single sample"),
    ],
)
def test_what_only_the_loop_can_do(make, why):
    model, y = make().double(), torch.randint(CLASSES, (4,))
    x = torch.rand(4, 2, 6, 6, dtype=torch.float64)
    found = fisher(model, (x, y), confidence=None)
    assert found.method == "loop"
    _, own, whole = plain(model, x, y, 0)
    # A shared parameter counts once.
    wanted = own.sum(1) if make is not Tied else (own[:, 0] + own[:, 1] - shared(model, x, y))
    torch.testing.assert_close(found.by_sample, wanted, rtol=1e-9, atol=0.0)
    if make is not Tied:
        torch.testing.assert_close(found.by_layer, own.mean(0), rtol=1e-9, atol=0.0)
        torch.testing.assert_close(found.batch_mean.by_layer, whole, rtol=1e-9, atol=0.0)
    with pytest.raises(
        ValueError, match=f'fisher: expected a model for method="hooks", got one where .*{why}'
    ) as error:
        fisher(model, (x, y), confidence=None, method="hooks")
    assert found.reason in str(error.value)


def shared(model, x, y):
    """[N, T] squared norms of the gradient of the weight that two layers have."""
    values = F.log_softmax(model(x).cumsum(0) / torch.arange(1, T + 1).view(T, 1, 1), 2)
    values = values[:, torch.arange(len(y)), y]
    one = [
        [torch.autograd.grad(v, model.out.weight, retain_graph=True)[0].square().sum() for v in row] for row in values
    ]
    return torch.tensor(one, dtype=torch.float64).T


def test_nothing_is_left_behind():
    """Neither in the model nor in the random numbers; twice the same, from within no_grad too."""
    model, x, y = problem("checkpoint", True, 20)
    model.train()
    model.layers[0].conv.weight.requires_grad_(False)
    model(x).sum().backward()
    grads = [p.grad for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    random = torch.get_rng_state()
    with torch.no_grad():
        one, two = (fisher(model, (x, y), batch_dim=1, batch_size=8) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random) and model.training and model.layers[0].checkpoint
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(grads) - 1)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert flags == (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    assert torch.equal(one.by_sample, two.by_sample) and torch.equal(one.interval, two.interval)
    assert one.layers[0] == "layers.0.norm"


def test_the_interval():
    """Around the value, wider with more confidence; that of many equal samples is a point."""
    model, x, y = problem("images", False, 24)
    found = [fisher(model, (x, y), confidence=c) for c in (0.5, 0.95)]
    for one in found:
        low, high = one.interval
        assert (low < one.information).all() and (one.information < high).all()
        assert one.centroid_interval[0] < one.centroid < one.centroid_interval[1]
    assert (found[0].interval[0] > found[1].interval[0]).all() and (found[0].interval[1] < found[1].interval[1]).all()
    error = found[1].by_sample.std(0) / 24**0.5
    width = (found[1].interval[1] - found[1].interval[0]) / (2 * 1.96 * error)
    assert ((width > 0.8) & (width < 1.15)).all()
    same = fisher(model, (x[:1].expand(20, -1, -1, -1), y[:1].expand(20)))
    torch.testing.assert_close(same.interval, same.information.expand(2, -1), rtol=1e-9, atol=0.0)


def test_errors():
    model, x, y = problem("images", False, 19)
    with pytest.raises(ValueError, match="fisher: expected at least 20 samples for an interval, got 19; give more, or"):
        fisher(model, (x, y))
    with pytest.raises(ValueError, match=r"fisher: expected confidence to be None or a number above 0 .* got 95"):
        fisher(model, (x, y), confidence=95)
    with pytest.raises(ValueError, match=r"fisher: method.* expected one of auto, hooks, loop, got 'hook'"):
        fisher(model, (x, y), method="hook")
    with pytest.raises(ValueError, match=r"fisher: expected logits .*not their mean"):
        fisher(tnn.Sequential(tnn.Flatten(), tnn.Linear(72, CLASSES)).double(), (x, y), confidence=None)
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    for method in ("hooks", "loop"):
        with pytest.raises(ValueError, match="fisher: expected finite logits, got some that are NaN"):
            fisher(model, (x, y), confidence=None, method=method)


def test_saved_and_drawn(tmp_path):
    """Two results in the same pictures; epochs, and what no gradient reaches, too."""
    model, x, y = problem("images", False, 21)
    one = fisher(model, (x, y), batch_size=8)
    none = fisher(Deaf().double(), (x, y), batch_size=8)
    assert none.method == "hooks" and not none.by_layer[0].any() and none.by_layer[1].any()
    whole = dataclasses.replace(one, history=[Epoch.of(2, none), Epoch.of(4, one)])
    whole.save(tmp_path / "fisher.json")
    again = Result.load(tmp_path / "fisher.json")
    assert torch.equal(again.by_sample, one.by_sample) and again.history[1].centroid == one.centroid
    assert str(again) == str(whole) and "From epoch 2 to epoch 4 the centroid went from" in str(whole)
    assert f"With batches of 8 (2 of them) its centroid is {one.batch_mean.centroid:.3f}" in str(one)
    assert len(whole.plot().axes) == 5 + 2  # two of them have a bar of colours
    drawn = Fisher.pictures({"a": whole, "b": none})
    assert len(drawn) == 6
    for picture in drawn.values():
        picture.draw(Figure().add_subplot())


def test_no_information():
    """A network that is certain beyond what numbers hold."""
    model, x, _ = problem("images", False, 20)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1e6, 0, 0, 0]))
    found = fisher(model, (x, torch.zeros(20, dtype=torch.int64)))
    assert not found.information.any() and found.centroid != found.centroid
    assert "is nan" in str(found) and len(found.plot().axes) == 4


def test_single_precision():
    """The fused kernels, against the definition on the same graph: within the rounding of float32."""
    model = conv().float()
    fused = ConvSNN((2, 6, 6), [3, "pool", 4], CLASSES, timesteps=T, backend=FUSED)
    fused.load_state_dict(model.state_dict())
    x, y = torch.rand(6, 2, 6, 6) * 2, torch.randint(CLASSES, (6,))
    found = fisher(fused, (x, y), confidence=None)
    _, own, whole = plain(fused, x, y, 0)
    assert found.method == "hooks"
    torch.testing.assert_close(found.by_sample, own.sum(1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.batch_mean.by_layer, whole, rtol=1e-5, atol=1e-12)


CONVOLUTIONS = {
    "square": {"kernel_size": 3, "padding": 1},
    "one place": {"kernel_size": 1},
    "rows apart": {"kernel_size": (3, 2), "padding": (1, 0), "stride": (2, 1)},
    "places apart": {"kernel_size": (2, 3), "padding": (0, 1), "stride": (1, 2), "bias": False},
    "far apart": {"kernel_size": (2, 1), "stride": 3},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    "groups": {"kernel_size": 3, "groups": 2},
    "dilated": {"kernel_size": 2, "dilation": (2, 1)},
}


@pytest.mark.parametrize("held", [_layer_gradients.HELD, 1])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_samples_of_a_convolution(name, last, held, monkeypatch):
    """Against autograd for each sample, for all steps and for the first; also where nothing may be held."""
    monkeypatch.setattr(_layer_gradients, "HELD", held)
    layer = tnn.Conv2d(4, 6, **CONVOLUTIONS[name]).double()
    x = torch.randn(T * 5, 4, 7, 8, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if last else x
    y = layer(x)
    g = torch.randn_like(y)  # in the layout of y
    trained = frozenset(key for key, _ in layer.named_parameters())
    mine = _layer_gradients.Convolution(layer, x.unflatten(0, (T, 5)), trained)
    assert (mine.stretches is None) == (held == 1 or name in ("groups", "dilated"))
    for steps in (T, 1):
        own, whole = mine(g.unflatten(0, (T, 5))[:steps])
        y, rows = layer(x).unflatten(0, (T, 5))[:steps], g.unflatten(0, (T, 5))[:steps]

        def square(y, rows):
            found = torch.autograd.grad(y, list(layer.parameters()), rows, retain_graph=True)
            return sum(grad.square().sum() for grad in found)

        wanted = torch.stack([square(y[:, n], rows[:, n]) for n in range(5)])
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=0.0)
        torch.testing.assert_close(whole, square(y, rows), rtol=1e-10, atol=0.0)


def test_long_steps_are_added_up_as_short_ones(monkeypatch):
    """What a norm sums up, whatever the size of a step decides."""
    layer = tnn.BatchNorm2d(3).double().eval()
    layer.running_mean.uniform_(-1, 1)
    x, g = torch.randn(2, T, 4, 3, 5, 5, dtype=torch.float64)
    found = []
    for long in (1, 2**20):
        monkeypatch.setattr(_layer_gradients, "LONG", long)
        mine = _layer_gradients.ByChannel(layer, x, frozenset({"weight", "bias"}))
        found.append([mine(g), mine(g[:2]), mine(g[:1])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0.0)
    assert all((own > 0).all() and whole > 0 for own, whole in found[0])
    for some in (g, g.transpose(2, 4).contiguous().transpose(2, 4), g.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(_layer_gradients.over_steps(some), g.sum(0, keepdim=True), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [5, 20])
def test_neurons_without_the_steps_behind(steps):
    """The fused kernels, of whose T steps the first t run alone, against T whole backward passes: residuals, pooling,
    packed spikes, layers of torch and of this package; single precision."""
    networks = [
        ConvSNN((2, 6, 6), [3, "pool", 4], CLASSES, timesteps=steps, backend=FUSED),
        tnn.Sequential(
            nn.SpikeConv2d(2, 4, 3, padding=1), nn.BatchNormLIF(4, pool=2, packed=True, backend=FUSED),
            nn.SpikeLinear(36, 6), nn.LIF(backend=FUSED), nn.SpikeLinear(6, 8), nn.ALIF(backend=FUSED),
            tnn.Linear(8, CLASSES),
        ),
    ]  # fmt: skip
    y = torch.randint(CLASSES, (4,))
    for axis, model in enumerate(networks):
        x = torch.rand((4, 2, 6, 6) if axis == 0 else (steps, 4, 2, 6, 6)) * 3
        found = fisher(model, (x, y) if axis == 0 else Samples.of("test", (x, y), batch_dim=1), confidence=None)
        _, own, whole = plain(model, x, y, axis)
        assert found.method == "hooks" and (own.sum(0) > 0).any()
        torch.testing.assert_close(found.by_sample, own.sum(1), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(found.by_layer, own.mean(0), rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(found.batch_mean.by_layer, whole, rtol=1e-5, atol=1e-12)


def test_the_command(tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    monkeypatch.chdir(tmp_path)
    options = ["--backend", FUSED, "--threads", "1", "--device", "cpu", "--set", "model.layers=[4]"]
    options += ["-T", "2", "--batch-size", "256", "--epochs", "2", "--keep-every", "1"]
    assert cli.main(["train", "--run-dir", "a", *options]) == 0
    assert cli.main(["analyze", "fisher", "a", "--samples", "30", "--batch-size", "16"]) == 0
    assert "the centroid went from" in capsys.readouterr().out
    found = Fisher.load("a/analysis/fisher.json")
    assert len(found.by_sample) == 30 and found.batch_mean.size == 16 and "train images" in found.about["samples"]
    assert [one.epoch for one in found.history] == [1, 2] and Path("a/analysis/fisher.png").exists()
    file = next(str(path) for path in Path("a").glob("epoch-*1*.safetensors"))
    assert cli.main(["analyze", "fisher", file, "--samples", "20", "--split", "test", "--out", "b.json"]) == 0
    assert not Fisher.load("b.json").history
    for wrong, why in (
        (["a", "--samples", "19"], "fisher: expected at least 20 samples for an interval, got 19"),
        (["a", "--confidence", "1"], "expected confidence to be None or a number above 0 and below 1, got 1.0"),
        ([file, "--epochs"], "analyze: expected a run folder with the weights of its epochs"),
        (["nowhere"], "nowhere"),
    ):
        assert cli.main(["analyze", "fisher", *wrong]) == 2
        assert why in capsys.readouterr().err
