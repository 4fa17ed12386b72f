"""Neurons of papers' code: classes of their names and fields that are written here, and, where somebody has fetched
them into the folder that TRTKERN_PAPERS names, the networks of six repositories."""

import copy
import os

import papers
import pytest
import torch
from torch import nn

from trtkern import interop
from trtkern import nn as snn
from trtkern.interop.stepping import FromStart

PAPERS = papers.folder_of(os.environ)


class Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, width):
        ctx.save_for_backward(u)
        ctx.width = width
        return (u > 0).to(u)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        return g * (ctx.width - u.abs()).clamp(min=0) / ctx.width**2, None


class ATan(nn.Module):
    def __init__(self, alpha=2.0):
        super().__init__()
        self.alpha, self.spiking = alpha, True

    def forward(self, u):
        return Arctangent.apply(u, self.alpha)


class Arctangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, alpha):
        ctx.save_for_backward(u)
        ctx.alpha = alpha
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        return g * ctx.alpha / 2 / (1 + (torch.pi / 2 * ctx.alpha * u) ** 2), None


class LIFSpike(nn.Module):
    """As TET has it: [B, T, ...]."""

    def __init__(self, thresh=1.0, tau=0.5, gama=1.0):
        super().__init__()
        self.thresh, self.tau, self.gama = thresh, tau, gama
        self.act = Triangle.apply

    def forward(self, x):
        mem, spikes = 0, []
        for step in x.unbind(1):
            mem = mem * self.tau + step
            spikes.append(self.act(mem - self.thresh, self.gama))
            mem = mem * (1 - spikes[-1])
        return torch.stack(spikes, 1)


class LIFNode(nn.Module):
    """As TRT has it: [B, T, ...]."""

    def __init__(self, v_threshold=1.0, v_reset=0.0, tau=2.0, surrogate_type="triangle", surrogate_param=1.0):
        super().__init__()
        self.v_threshold, self.v_reset, self.tau = v_threshold, v_reset, tau
        self.surrogate_type, self.surrogate_param = surrogate_type, surrogate_param
        self.mem, self.spike_pot = 0, []

    def forward(self, x):
        self.mem, self.spike_pot = 0, []
        for step in x.unbind(1):
            self.mem = self.mem / self.tau + step
            spike = Triangle.apply(self.mem - self.v_threshold, self.surrogate_param)
            reset = self.v_threshold * spike if self.v_reset is None else (self.mem - self.v_reset) * spike
            self.mem = self.mem - reset
            self.spike_pot.append(spike)
        return torch.stack(self.spike_pot, 1)


class MultiStepLIFNode(nn.Module):
    """A copy of SpikingJelly's of old: [T, B, ...], which keeps v until it is reset."""

    def __init__(self, tau=2.0, v_threshold=1.0, v_reset=0.0, detach_reset=True, alpha=2.0):
        super().__init__()
        self.tau, self.v_threshold, self.v_reset, self.detach_reset = tau, v_threshold, v_reset, detach_reset
        self.surrogate_function = ATan(alpha)
        self.reset()

    def forward(self, x):
        spikes = [self.step(step) for step in x]
        return torch.stack(spikes)

    def step(self, x):
        rest = 0.0 if self.v_reset is None else self.v_reset
        self.v = self.v + (x - (self.v - rest)) / self.tau
        spike = self.surrogate_function(self.v - self.v_threshold)
        held = spike.detach() if self.detach_reset else spike
        self.v = self.v - held * self.v_threshold if self.v_reset is None else (1 - held) * self.v + held * rest
        return spike

    def reset(self):
        self.v = 0.0 if self.v_reset is None else self.v_reset


class MultiStepParametricLIFNode(MultiStepLIFNode):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.w = nn.Parameter(torch.tensor(0.3))

    @property
    def tau(self):
        return 1 / self.w.sigmoid()

    @tau.setter
    def tau(self, value):
        pass


class IFNode(MultiStepLIFNode):
    """One step a call."""

    def step(self, x):
        self.v = self.v + x
        spike = self.surrogate_function(self.v - self.v_threshold)
        held = spike.detach() if self.detach_reset else spike
        rest = 0.0 if self.v_reset is None else self.v_reset
        self.v = self.v - held * self.v_threshold if self.v_reset is None else (1 - held) * self.v + held * rest
        return spike

    forward = step


def frames(*sizes):
    return 3 * torch.rand(sizes, dtype=torch.float64) - 0.3


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        (LIFSpike(), snn.LIF),
        (LIFSpike(thresh=0.7, tau=0.25, gama=0.8), snn.LIF),
        (LIFNode(), snn.LIF),
        (LIFNode(v_threshold=0.6, v_reset=None, tau=1.0), snn.LIF),
        (LIFNode(v_reset=-0.2, surrogate_param=2.0), snn.LIF),
        (MultiStepLIFNode(), snn.LIF),
        (MultiStepLIFNode(v_threshold=0.5, v_reset=None, detach_reset=False, alpha=3.0), snn.LIF),
        (MultiStepLIFNode(v_reset=-0.3), FromStart),
        (MultiStepParametricLIFNode(), snn.PLIF),
        (IFNode(detach_reset=False), interop.Stepping),
        (IFNode(v_reset=-0.1), interop.Stepping),
    ],
)
def test_classes_of_papers_convert_by_their_names_and_fields(node, kind):
    net = nn.Sequential(nn.Linear(4, 6), node, nn.Linear(6, 3)).double()
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(net), report, strict=True)
    assert type(after[1]) is kind and list(report.converted) == ["1"]
    run = (lambda net, x: torch.stack([net(step) for step in x])) if kind is interop.Stepping else None
    result = interop.check(net, after, frames(5, 3, 4), run=run)
    assert result.different == 0 and result.within(0.0, 1e-9) and result.fired > 0.05
    x = frames(5, 3, 6)
    if run is None:
        before, spikes = net[1](x), after[1](x)
        assert 0 < float(spikes.detach().mean()) < 1
        assert spikes.shape == before.shape and spikes.dtype == before.dtype


def test_a_learned_decay_stays_the_same_parameter():
    net = nn.Sequential(MultiStepParametricLIFNode())
    w, keys = net[0].w, list(net.state_dict())
    after = interop.convert(net, strict=True)
    assert after[0].w is w and list(after.state_dict()) == keys == ["0.w"]


class Strict(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha, self.spiking = 2.0, True

    def forward(self, u):
        return (u > 0).to(u)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node: setattr(node, "act", lambda u, width: Triangle.apply(-u, width)), "got other outputs"),
        (lambda node: setattr(node, "act", lambda u, width: Triangle.apply(u, 2 * width)), "got other gradients"),
        (lambda node: setattr(node, "act", lambda u, width: (u > 0).to(u)), "got RuntimeError"),
        (lambda node: setattr(node, "act", None), "runs on a CPU, .* got TypeError"),
        (lambda node: setattr(node, "tau", torch.ones(3)), r"expected tau to be one number, got a tensor \[3\]"),
        (lambda node: delattr(node, "gama"), "expected a LIFSpike with thresh, tau, gama, got none called 'gama'"),
        (lambda node: setattr(node, "thresh", -1.0), "v_threshold"),
    ],
)
def test_a_class_that_only_looks_like_one_is_left_alone(change, message):
    node = LIFSpike()
    change(node)
    report = interop.ConvertReport()
    net = interop.convert(nn.Sequential(node), report)
    assert net[0] is node and not report.converted
    with pytest.raises(ValueError, match=message):
        interop.convert(net, strict=True)
    assert net[0] is node


def test_firing_at_the_threshold_is_part_of_what_is_compared():
    node = MultiStepLIFNode()
    node.surrogate_function.forward = lambda u: Arctangent.apply(u - 1e-9, 2.0)  # ">" in place of ">="
    with pytest.raises(ValueError, match="got other outputs"):
        interop.convert(nn.Sequential(node), strict=True)


def test_a_surrogate_of_another_name_is_refused():
    node = MultiStepLIFNode()
    node.surrogate_function = Strict()
    with pytest.raises(ValueError, match=r"expected a surrogate_function of SpikingJelly's .*, got Strict"):
        interop.convert(nn.Sequential(node), strict=True)
    other = LIFNode(surrogate_type="rectangle")
    with pytest.raises(ValueError, match="expected surrogate_type to be sigmoid or triangle, got 'rectangle'"):
        interop.convert(nn.Sequential(other), strict=True)


def test_a_network_that_hands_a_threshold_on_is_no_neuron():
    class Network(nn.Sequential):
        def __init__(self):
            super().__init__(LIFNode())
            self.v_threshold = 1.0

    report = interop.ConvertReport()
    interop.convert(Network(), report, strict=True)
    assert list(report.converted) == ["0"] and not report.left


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if PAPERS is None:
        pytest.skip("TRTKERN_PAPERS names no folder with the repositories of papers")
    folder = tmp_path_factory.mktemp("library")
    papers.old_library(PAPERS, folder)
    return folder


@pytest.mark.parametrize("name", papers.NETWORKS)
def test_the_networks_of_papers(name, library, monkeypatch):
    repository, place, module, make, sizes = papers.NETWORKS[name]
    if not (PAPERS / repository).exists():
        pytest.skip(f"{PAPERS} has no {repository}")
    net = papers.made(PAPERS, library, repository, place, module, make)
    after = interop.convert(copy.deepcopy(net), strict=True)
    # TET and TRT return spikes in float32 whatever comes in.
    single = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double() if x.dtype != torch.float32 else single(x))
    torch.manual_seed(0)
    # TET adds the axis of time to the very tensor that it is given, which must then be no leaf.
    result = interop.check(net, after, 4 * torch.rand(sizes, dtype=torch.float64), run=lambda net, x: net(1 * x))
    print(f"\n{name}: {result}")
    assert result.within(1e-12, 1e-5) and not result.unmatched
    assert len(result.gradients) > 10 and "input" in result.gradients
