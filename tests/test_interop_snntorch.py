"""snnTorch's neurons and networks of its tutorials, before and after ``trtkern.interop.convert``."""

import copy
import gc
import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from trtkern import interop, reference
from trtkern.interop.snntorch import _surrogate

snntorch = pytest.importorskip("snntorch")
from snntorch import surrogate, utils  # noqa: E402

T, B, C = 9, 3, 5


@pytest.fixture
def double(monkeypatch):
    """The library's spikes are float32 in every dtype, and so are its gradients then: float64 here, to tell errors."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.to(torch.float64))


def looped(node, x):
    """Every step's outputs, stacked; what a neuron with a visible state gives goes back in."""
    made, state = [], ()
    for step in x:
        out = node(step, *state)
        out = out if isinstance(out, tuple) else (out,)
        state = () if node.init_hidden else out[1:]
        made.append(out)
    return [torch.stack(each) for each in zip(*made, strict=True)]


def folded(node, x):
    made = interop.over_time(nn.Sequential(node))(x)
    return list(made) if isinstance(made, tuple) else [made]


def differentiated(run, node, x, parameters):
    """Outputs and gradients of one loss."""
    x = x.clone().requires_grad_()
    made = run(node, x)
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum() for y in made)
    wanted = [x, *parameters]
    return [y.detach() for y in made], torch.autograd.grad(loss, wanted)


def vector(*shape):
    return torch.linspace(0.3, 0.95, C).reshape(shape)


LEARNED = {"learn_beta": True, "learn_threshold": True}
NODES = {
    "leaky subtract": lambda: snntorch.Leaky(0.9),
    "leaky zero": lambda: snntorch.Leaky(0.9, reset_mechanism="zero"),
    "leaky none": lambda: snntorch.Leaky(0.9, reset_mechanism="none"),
    "leaky subtract learned": lambda: snntorch.Leaky(0.7, 0.8, **LEARNED),
    "leaky zero learned": lambda: snntorch.Leaky(0.7, 0.8, reset_mechanism="zero", **LEARNED),
    "leaky none learned": lambda: snntorch.Leaky(0.7, 0.8, reset_mechanism="none", **LEARNED),
    "leaky at once": lambda: snntorch.Leaky(0.8, reset_mechanism="zero", reset_delay=False),
    "leaky none at once": lambda: snntorch.Leaky(0.8, reset_mechanism="none", reset_delay=False),
    "leaky of one step": lambda: snntorch.Leaky(0.0),
    "leaky that learns from 0": lambda: snntorch.Leaky(0.0, learn_beta=True),
    "leaky at 1": lambda: snntorch.Leaky(1.0, learn_beta=True),
    "leaky above 1": lambda: snntorch.Leaky(1.5),
    "leaky learned threshold": lambda: snntorch.Leaky(0.9, learn_threshold=True),
    "leaky each": lambda: snntorch.Leaky(vector(C), vector(C)),
    "leaky each learned": lambda: snntorch.Leaky(vector(C), vector(C), **LEARNED),
    "leaky hidden": lambda: snntorch.Leaky(0.9, init_hidden=True),
    "leaky hidden and shown": lambda: snntorch.Leaky(0.9, init_hidden=True, output=True),
    "leaky without gradient": lambda: snntorch.Leaky(0.9, surrogate_disable=True),
    "lapicque": lambda: snntorch.Lapicque(beta=0.6),
    "lapicque none": lambda: snntorch.Lapicque(R=2.0, C=1.5, time_step=1.0, reset_mechanism="none"),
    "lapicque learned": lambda: snntorch.Lapicque(R=2.0, C=1.5, time_step=1.0, learn_threshold=True),
    "synaptic": lambda: snntorch.Synaptic(0.6, 0.8),
    "synaptic learned": lambda: snntorch.Synaptic(0.6, 0.8, learn_alpha=True, **LEARNED),
    "synaptic each": lambda: snntorch.Synaptic(vector(C), vector(C).flip(0)),
    "synaptic at once": lambda: snntorch.Synaptic(0.6, 0.8, reset_mechanism="zero", reset_delay=False),
    "synaptic none": lambda: snntorch.Synaptic(0.6, 0.8, reset_mechanism="none"),
    "alpha": lambda: snntorch.Alpha(0.9, 0.7, threshold=0.2, reset_mechanism="none"),
    "alpha learned": lambda: snntorch.Alpha(0.9, 0.7, threshold=0.2, reset_mechanism="none", **LEARNED),
}  # fmt: skip


@pytest.mark.parametrize("run", [looped, folded])
@pytest.mark.parametrize("name", NODES)
def test_a_neuron_gives_the_same_with_the_same_gradients(double, name, run):
    torch.manual_seed(0)
    before = NODES[name]().double()
    twin = copy.deepcopy(before)
    parameters = list(twin.parameters())
    after = interop.convert(twin, strict=True)
    assert {id(each) for each in after.parameters()} == {id(each) for each in parameters}
    x = 1.5 * torch.randn(T, B, C, dtype=torch.float64) + 0.4
    made, grads = differentiated(looped, before, x, list(before.parameters()))
    again, others = differentiated(run, after, x, parameters)
    assert torch.equal(made[0], again[0]) and 0.05 < made[0].mean() < 0.95
    for each, other in zip(made[1:], again[1:], strict=True):
        assert torch.allclose(each, other, 1e-12, 1e-12)
    for each, other in zip(grads, others, strict=True):
        assert each.abs().max() > 0 and torch.allclose(each, other, 1e-10, 1e-12)


@pytest.mark.parametrize("run", [looped, folded])
@pytest.mark.parametrize("name", NODES)
def test_in_float32_spikes_differ_only_where_rounding_decides(name, run):
    torch.manual_seed(0)
    before = NODES[name]()
    twin, exact = copy.deepcopy(before), copy.deepcopy(before).double()
    parameters = list(twin.parameters())
    after = interop.convert(twin, strict=True)
    x = 1.5 * torch.randn(T, B, C) + 0.4
    made, grads = differentiated(looped, before, x, list(before.parameters()))
    again, others = differentiated(run, after, x, parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda self: self.to(torch.float64))
        truth, wanted = differentiated(looped, exact, x.double(), list(exact.parameters()))
    if len(truth) > 1:
        assert (truth[-1] - exact.threshold).abs().min() > 1e-6  # else another seed is needed
    assert torch.equal(made[0], again[0])
    for old, new, true in zip((*made[1:], *grads), (*again[1:], *others), (*truth[1:], *wanted), strict=True):
        # A gradient that is the difference of large numbers is rounded in the library too.
        allowed = max(1e-5 * true.abs().max(), 4 * (old - true).abs().max())
        assert (new - true).abs().max() <= allowed


def test_values_along_the_channels_of_images(double):
    torch.manual_seed(0)
    x = torch.randn(T, B, C, 4, 4, dtype=torch.float64) + 0.4
    before = snntorch.Leaky(vector(C, 1, 1), threshold=vector(C, 1, 1)).double()
    after = interop.convert(copy.deepcopy(before), strict=True)
    for run in (looped, folded):
        before.reset_mem()
        made, grads = differentiated(looped, before, x, [])
        again, others = differentiated(run, after, x, [])
        assert torch.equal(made[0], again[0]) and torch.allclose(made[1], again[1], 1e-12, 1e-12)
        assert torch.allclose(grads[0], others[0], 1e-10, 1e-12)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_step_may_have_no_batch(shape):
    x = torch.rand(T, *shape)
    before = snntorch.Leaky(0.9)
    after = interop.convert(copy.deepcopy(before), strict=True)
    for run in (looped, folded)[: 1 + len(shape)]:
        made, again = looped(before, x), run(after, x)
        assert made[0].shape == again[0].shape and torch.equal(made[0], again[0])
        before.reset_mem()


SURROGATES = {
    "atan": lambda: surrogate.atan(3.0),
    "fast_sigmoid": lambda: surrogate.fast_sigmoid(10),
    "sigmoid": lambda: surrogate.sigmoid(4),
    "straight_through_estimator": surrogate.straight_through_estimator,
    "heaviside": surrogate.heaviside,
    "triangular": lambda: surrogate.triangular(0.75),
    "spike_rate_escape": lambda: surrogate.spike_rate_escape(2, 3),
    "SFS": lambda: surrogate.SFS(5, 0.2),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_is_the_library_s(double, name):
    made = SURROGATES[name]()
    u = (torch.arange(-300, 301, dtype=torch.float64) / 100).requires_grad_()
    (wanted,) = torch.autograd.grad(made(u).sum(), u)
    neuron = interop.convert(snntorch.Leaky(0.9, spike_grad=made)).neuron
    found = reference.surrogate_derivative(u.detach(), neuron.spec.surrogate, neuron.spec.alpha)
    assert torch.allclose(found.to(wanted), wanted, 1e-13, 1e-14)


def own_surrogate(u):
    return (u > 0).float()


REFUSED = {
    "subtracted at once": (lambda: snntorch.Leaky(0.9, reset_delay=False), "reset_delay=True"),
    "inhibition": (lambda: snntorch.Leaky(0.9, inhibition=True), "inhibition=False"),
    "quantised": (lambda: snntorch.Leaky(0.9, state_quant=torch.round), "state_quant=False"),
    "graded": (lambda: snntorch.Leaky(0.9, graded_spikes_factor=2.0), "graded_spikes_factor"),
    "learned grades": (lambda: snntorch.Leaky(0.9, learn_graded_spikes_factor=True), "graded_spikes_factor"),
    "random": (lambda: snntorch.Leaky(0.9, spike_grad=surrogate.SSO()), "got SSO"),
    "broken": (lambda: snntorch.Leaky(0.9, spike_grad=surrogate.LSO()), "got LSO"),
    "custom": (lambda: snntorch.Leaky(0.9, spike_grad=surrogate.custom_surrogate(own_surrogate)), "custom_surrogate"),
    "own": (lambda: snntorch.Leaky(0.9, spike_grad=own_surrogate), "got own_surrogate"),
    "along two axes": (lambda: snntorch.Leaky(torch.rand(4, 5)), "one axis"),
    "a learned beta of images": (lambda: snntorch.Leaky(torch.rand(4, 1, 1), learn_beta=True), "one axis"),
    "along different axes": (lambda: snntorch.Leaky(torch.rand(4, 1, 1), torch.rand(4)), "along one axis"),
    "threshold below 0": (lambda: snntorch.Leaky(0.9, -0.5), "v_threshold"),
    "lapicque zero": (lambda: snntorch.Lapicque(beta=0.8, reset_mechanism="zero"), "drops the input"),
    "lapicque learned": (lambda: snntorch.Lapicque(beta=0.8, learn_beta=True), "learn_beta"),
    "synaptic zero": (lambda: snntorch.Synaptic(0.8, 0.9, reset_mechanism="zero"), "drops the current"),
    "alpha": (lambda: snntorch.Alpha(0.9, 0.8), "reset_mechanism='none'"),
    "recurrent": (lambda: snntorch.RLeaky(0.9, linear_features=4), "none"),
    "recurrent synapse": (lambda: snntorch.RSynaptic(0.9, 0.8, linear_features=4), "none"),
    "lstm": (lambda: snntorch.SLSTM(4, 4), "none"),
    "parallel": (lambda: snntorch.LeakyParallel(4, 4), "none"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Inhibition")
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_is_named_and_left(name):
    make, message = REFUSED[name]
    node, report = make(), interop.ConvertReport()
    net = nn.ModuleDict({"first": snntorch.Leaky(0.5), "second": node})
    kept = dict(net.items())
    with pytest.raises(ValueError, match=r"changed nothing: 'second': snntorch\._neurons"):
        interop.convert(net, strict=True)
    assert dict(net.items()) == kept
    interop.convert(net, report)
    assert net["second"] is node and net["first"] is not kept["first"] and list(report.left) == ["second"]
    assert message in report.left["second"] and type(node).__name__ in report.left["second"]


def test_a_reset_that_was_changed_later_is_refused():
    node, report = snntorch.Leaky(0.9), interop.ConvertReport()
    node.reset_mechanism = "zero"
    interop.convert(node, report)
    assert "as the neuron was made with, got 'zero' and 'subtract'" in report.left[""]


def test_a_class_of_the_user_s_and_one_with_hooks_are_left():
    class Mine(snntorch.Leaky):
        pass

    net, report = nn.Sequential(Mine(0.9), snntorch.Leaky(0.9)), interop.ConvertReport()
    net[1].register_forward_hook(lambda *_: None)
    interop.convert(net, report)
    assert "expected Leaky itself" in report.left["0"] and "hooks" in report.left["1"] and not report.converted


def test_states_are_given_and_kept_as_the_library_does_it():
    x = torch.rand(T, B, C)
    before = snntorch.Leaky(0.9)
    after = interop.convert(copy.deepcopy(before))
    for node in (before, after):
        node.record = [node(x[0], node.init_leaky()), node(x[1]), node(x[2], mem=torch.full((B, C), 1.3)), node(x[3])]
        node.record.append(node(x[4], node.reset_mem()))
        node.record.append((node.mem, node(x[5][:1])[1]))  # a smaller batch begins at 0
    for one, other in zip(before.record, after.record, strict=True):
        assert all(torch.allclose(a, b, 1e-6, 1e-6) for a, b in zip(one, other, strict=True))
    with pytest.raises(TypeError, match="expected states mem"):
        after(x[0], None, None)
    with pytest.raises(TypeError, match="expected states mem"):
        after(x[0], syn=None)
    hidden = interop.convert(snntorch.Leaky(0.9, init_hidden=True))
    with pytest.raises(TypeError, match="init_hidden=True, got mem"):
        hidden(x[0], torch.zeros(B, C))
    with pytest.raises(ValueError, match="begin anew, got mem"):
        interop.over_time(Passing(after))(x)


@pytest.mark.parametrize("name", ["leaky subtract", "leaky zero", "leaky subtract learned", "synaptic learned"])
def test_a_state_that_the_caller_has_changed_or_cut_is_the_caller_s(double, name):
    """In place or not: the next step goes on from what mem is then."""

    def unrolled(node, x):
        out, made = node(x[0]), []
        for index, step in enumerate(x[1:]):
            state = list(out[1:])
            if index == 1:
                state[-1] = state[-1] * 1.5
            if index == 3:
                with torch.no_grad():
                    state[-1].mul_(0.5)
            if index == 4:
                state[-1].detach_()
            if index == 5:
                state[-1] = state[-1].detach()
            if index == 6:
                node.detach_hidden()
                state = []
            out = node(step, *state)
            made.append(out)
        return [torch.stack(each) for each in zip(*made, strict=True)]

    torch.manual_seed(0)
    before = NODES[name]().double()
    twin = copy.deepcopy(before)
    parameters = list(twin.parameters())
    after = interop.convert(twin)
    x = 1.5 * torch.randn(12, B, C, dtype=torch.float64) + 0.4
    made, grads = differentiated(unrolled, before, x, list(before.parameters()))
    again, others = differentiated(unrolled, after, x, parameters)
    for each, other in zip((*made, *grads), (*again, *others), strict=True):
        assert torch.allclose(each, other, 1e-10, 1e-12)


class Passing(nn.Module):
    def __init__(self, node):
        super().__init__()
        self.node = node

    def forward(self, x):
        return self.node(x, self.node.reset_mem())[0]


class Tutorial5(nn.Module):
    """Tutorial 5: two layers, and the loop inside of the forward."""

    def __init__(self, steps=T, beta=0.95):
        super().__init__()
        self.steps = steps
        self.fc1, self.lif1 = nn.Linear(20, 30), snntorch.Leaky(beta=beta)
        self.fc2, self.lif2 = nn.Linear(30, 10), snntorch.Leaky(beta=beta)

    def forward(self, x):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, potentials = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            potentials.append(mem2)
        return torch.stack(spikes), torch.stack(potentials)


def test_tutorial_5(double):
    torch.manual_seed(1)
    before = Tutorial5().double()
    before.fc1.weight.data.mul_(3)
    before.fc2.weight.data.mul_(3)
    after = interop.convert(copy.deepcopy(before), strict=True)
    x = torch.rand(8, 20, dtype=torch.float64)
    result = interop.check(before, after, x)
    assert result.within(1e-12, 1e-10) and set(result.gradients) == {*dict(before.named_parameters()), "input"}
    assert torch.equal(before(x)[0], after(x)[0]) and 0.02 < before(x)[0].mean() < 0.98


def tutorial_6():
    """Tutorial 6: a convolutional network of one step with hidden states."""
    grad = surrogate.fast_sigmoid(slope=25)
    return nn.Sequential(
        nn.Conv2d(1, 12, 5), nn.MaxPool2d(2), snntorch.Leaky(0.5, spike_grad=grad, init_hidden=True),
        nn.Conv2d(12, 16, 5), nn.MaxPool2d(2), snntorch.Leaky(0.5, spike_grad=grad, init_hidden=True),
        nn.Flatten(), nn.Linear(16 * 16, 10), snntorch.Leaky(0.5, spike_grad=grad, init_hidden=True, output=True),
    )  # fmt: skip


def forward_pass(net, x):
    utils.reset(net)
    made = [net(step) for step in x]
    return [torch.stack(each) for each in zip(*made, strict=True)]


def test_tutorial_6(double):
    torch.manual_seed(0)
    before = tutorial_6()
    for layer in before:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data.mul_(3)
    before.double()
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(before), report, strict=True)
    assert report.stepping == ["2", "5", "8"]
    x = torch.rand(T, 4, 1, 28, 28, dtype=torch.float64)
    for run, net in ((forward_pass, after), (lambda net, x: net(x), interop.over_time(after))):
        result = interop.check(before, net, x, run=forward_pass, run_after=run)
        assert result.within(1e-12, 1e-10) and result.fired > 0.5 and len(result.gradients) == 7
    spikes, whole = forward_pass(before, x)[0], interop.over_time(after)(x)[0]
    assert torch.equal(spikes, whole) and 0.02 < spikes.mean() < 0.98


def test_utils_reset_begins_anew_and_cuts_the_graph():
    torch.manual_seed(0)
    net = interop.convert(nn.Sequential(nn.Linear(C, C), snntorch.Leaky(0.9, init_hidden=True), Holder()))
    other = copy.deepcopy(net)
    x = 3 * torch.rand(T, B, C)
    first = torch.stack([net(step) for step in x])
    assert not torch.equal(torch.stack([net(step) for step in x]), first)
    for each in (net, other):
        for _ in range(2):
            utils.reset(net)
            y = torch.stack([each(step) for step in x])
            assert torch.equal(y, first)
            y.sum().backward()
    assert isinstance(net[1], snntorch.Leaky)
    net(x[0])
    net[1].detach_hidden()
    assert net[1].mem.abs().sum() > 0 and not net[1].mem.requires_grad
    net(x[0])
    net[1].detach()
    assert not net[1].mem.requires_grad
    net[1].reset()
    assert net[1].mem.abs().sum() == 0


class Holder(nn.Module):
    """snnTorch looks for neurons among the children of a network alone, and resets all there are of the class."""

    def __init__(self):
        super().__init__()
        self.inner = snntorch.Leaky(0.8, init_hidden=True)

    def forward(self, x):
        return self.inner(x)


def test_the_library_s_list_holds_no_dead_layer():
    node = interop.convert(snntorch.Leaky(0.9))
    gc.collect()
    before = len(snntorch.Leaky.instances)
    node(torch.rand(B, C))
    node(torch.rand(B, C))
    assert len(snntorch.Leaky.instances) == before + 1
    del node
    gc.collect()
    assert len(snntorch.Leaky.instances) == before
    snntorch.Leaky.reset_hidden()


@pytest.mark.parametrize("name", ["leaky each learned", "synaptic learned", "alpha"])
def test_copies_and_files(name):
    torch.manual_seed(0)
    after = interop.convert(NODES[name]())
    x = torch.rand(T, B, C)
    first = looped(after, x)
    assert after.mem.shape == (B, C)
    for twin in (copy.deepcopy(after), pickle.loads(pickle.dumps(after))):
        assert twin.mem.numel() == 0 and type(twin) is type(after)
        assert all(torch.equal(a, b) for a, b in zip(first, looped(twin, x), strict=True))
    fresh = interop.convert(NODES[name]())
    fresh.load_state_dict(after.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first, looped(fresh, x), strict=True))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_learned_beta_is_clamped_as_the_library_clamps_it(double, sign):
    """Also past the ends of its range."""
    before = snntorch.Leaky(0.9, learn_beta=True).double()
    twin = copy.deepcopy(before)
    optimisers = [torch.optim.SGD([node.beta], lr=4e-3) for node in (before, twin)]
    betas = [before.beta, twin.beta]
    after = interop.convert(twin)
    x, found = torch.rand(T, B, C, dtype=torch.float64), []
    for _ in range(4):
        for node, optimiser in zip((before, after), optimisers, strict=True):
            optimiser.zero_grad()
            (sign * looped(node, x)[1].sum()).backward()
            node.mem = node.mem.detach() * 0
            optimiser.step()
        assert torch.allclose(*betas, 1e-12, 1e-12)
        found.append(betas[0].item())
    assert not 0 <= found[-1] <= 1 and found[-1] == found[-2]


def test_the_settings_of_the_library_s_object_are_there():
    after = interop.convert(snntorch.Leaky(0.9, init_hidden=True, output=True))
    assert after.init_hidden and after.output and after.reset_mechanism == "subtract" and after.reset_delay
    assert _surrogate(snntorch.Leaky(0.9)) == ("atan", 2.0)


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "from_snntorch.py"))
    said = capsys.readouterr().out
    before, after = (re.search(rf"{name}: ([0-9.-]+)", said)[1] for name in ("snnTorch", "trtkern"))
    assert float(before) == pytest.approx(float(after), rel=1e-3) and float(before) != 0
    assert float(said.split()[-1]) < 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_a_step_whose_state_is_kept_is_refused(reentrant):
    from torch.utils.checkpoint import checkpoint

    net = interop.convert(nn.Sequential(snntorch.Leaky(0.5, init_hidden=True)))
    x = torch.rand(3, 2, 4, requires_grad=True)
    made = torch.stack([checkpoint(net, step, use_reentrant=reentrant) for step in x])
    with pytest.raises(RuntimeError, match=r"expected no torch\.utils\.checkpoint around one step"):
        made.sum().backward()
