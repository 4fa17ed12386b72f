"""``trtkern.interop``: networks that would come out otherwise than their loop are refused, whatever they do."""

import copy
import dataclasses
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trtkern import interop
from trtkern import nn as snn
from trtkern.interop import adapters
from trtkern.interop.nir.graph import NodeGraph


def neurons(**options):
    return interop.Stepping(snn.LIF(0.5, **options))


class Net(nn.Module):
    """A forward that a test gives."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.run(self, x)


def sequence(*shape):
    return 3 * torch.rand(shape or (4, 2, 3), generator=torch.Generator().manual_seed(0))


def loop(net, x):
    return torch.stack([net(step) for step in x])


def test_a_neuron_that_runs_twice_a_step_is_refused():
    net = interop.over_time(Net(lambda self, x: self.lif(2 * self.lif(x)), lif=neurons()))
    with pytest.raises(ValueError, match="a Stepping that runs twice"):
        net(sequence())
    assert interop.over_time(neurons_of(net))(sequence()).any()  # and what was left does not count for the next pass


def neurons_of(net):
    return Net(lambda self, x: self.lif(x), lif=net.net.lif)


def test_a_batch_on_another_axis_is_refused():
    net = interop.over_time(Net(lambda self, x: self.lif(x.transpose(0, 1)).transpose(0, 1), lif=neurons()))
    with pytest.raises(ValueError, match=r"T=4 and T \* B=8 at a neuron, got .*\(4, 8\)"):
        net(sequence(4, 2, 4))


@pytest.mark.parametrize("result", [lambda y: y.mean(), lambda y: y.mean(0)])
def test_a_result_without_a_row_for_each_sample_is_refused(result):
    net = interop.over_time(Net(lambda self, x: result(self.lif(x)), lif=neurons()))
    with pytest.raises(ValueError, match="in what the network returns"):
        net(sequence(4, 2, 4))


def test_no_samples():
    assert interop.over_time(nn.Sequential(nn.Linear(3, 5), neurons()))(sequence()[:, :0]).shape == (4, 0, 5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_within_is_refused_and_one_around_is_right(reentrant):
    def gradient(run):
        x = sequence().requires_grad_()
        run(x).sum().backward()
        return x.grad

    linear = nn.Linear(3, 3)
    plain = interop.over_time(nn.Sequential(linear, neurons()))
    inner = nn.Sequential(linear, neurons())
    within = interop.over_time(Net(lambda self, x: checkpoint(self.inner, x, use_reentrant=reentrant), inner=inner))
    with pytest.raises(RuntimeError, match=r"no torch\.utils\.checkpoint within"):
        gradient(within)
    around = gradient(lambda x: checkpoint(plain, x, use_reentrant=reentrant))
    assert torch.equal(around, gradient(plain)) and around.any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_a_step_of_a_loop_is_refused(reentrant):
    lif, x = neurons(), sequence().requires_grad_()
    made = loop(lambda step: checkpoint(lif, step, use_reentrant=reentrant), x)
    with pytest.raises(RuntimeError, match=r"Stepping: expected no torch\.utils\.checkpoint around one step"):
        made.sum().backward()


def test_running_statistics_of_an_instance_norm_go_from_step_to_step():
    x = sequence(4, 2, 3, 5)
    net = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), neurons())
    other = copy.deepcopy(net)
    assert torch.equal(interop.over_time(other)(x), loop(net, x))
    assert torch.equal(other[0].running_mean, net[0].running_mean)
    assert torch.equal(other[0].num_batches_tracked, net[0].num_batches_tracked)


def test_a_batch_norm_counts_its_own_steps_and_runs_once_a_step():
    net = interop.over_time(Net(lambda self, x: self.lif(x), lif=neurons(), norm=nn.BatchNorm1d(3)))
    net(sequence())
    assert net.net.norm.num_batches_tracked == 0
    twice = Net(lambda self, x: self.lif(self.norm(self.norm(x))), lif=neurons(), norm=nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="a BatchNorm or InstanceNorm that runs twice"):
        interop.over_time(twice)(sequence())
    twice.eval()
    assert torch.equal(interop.over_time(twice)(sequence()), loop(twice, sequence()))


@dataclasses.dataclass(frozen=True)
class Result:
    spikes: torch.Tensor


class Named(OrderedDict):
    """A dict of its own class, as transformers have it."""


@pytest.mark.parametrize("kind", [Result, Named])
def test_a_result_keeps_its_class(kind):
    y = interop.over_time(Net(lambda self, x: kind(spikes=self.lif(x)), lif=neurons()))(sequence())
    assert type(y) is kind
    assert (y["spikes"] if kind is Named else y.spikes).shape == (4, 2, 3)


def test_neurons_that_pack_give_dense_spikes():
    x = sequence()
    assert torch.equal(interop.over_time(nn.Sequential(neurons(packed=True)))(x), loop(neurons(), x))


def test_a_state_of_another_batch_names_reset():
    lif = neurons()
    lif(sequence()[0])
    with pytest.raises(ValueError, match=r"call reset\(\) where other sequences begin"):
        lif(sequence()[0, :1])


def test_a_step_mode_that_is_set_after_the_conversion_is_refused():
    lif = neurons()
    lif.step_mode = "s"
    with pytest.raises(ValueError, match=r"set the mode before trtkern\.interop\.convert"):
        lif.step_mode = "m"


def test_a_stream_refuses_cycles():
    graph = NodeGraph(
        {"lif": snn.LIF(0.5), "back": nn.Linear(3, 3)},
        [("input", "lif"), ("lif", "back"), ("back", "lif"), ("lif", "output")],
    )
    with pytest.raises(TypeError, match="got a cycle, whose state a stream does not carry"):
        snn.Stream(graph)
    chain = NodeGraph({"lif": snn.LIF(0.5)}, [("input", "lif"), ("lif", "output")])
    assert torch.equal(snn.Stream(chain).chunk(sequence()), chain(sequence()))


@pytest.mark.parametrize("edge", [("output", "lif"), ("lif", "input")])
def test_an_edge_against_the_ends_of_a_graph_is_refused(edge):
    with pytest.raises(ValueError, match="expected one from the input or to the output, got the other way round"):
        NodeGraph({"lif": snn.LIF(0.5)}, [("input", "lif"), ("lif", "output"), edge])


class Ours(nn.Module):
    """A neuron of a user's over sequences, whose state goes on from call to call."""

    def forward(self, x):
        return x

    def reset(self):
        pass


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(adapters, "_REGISTERED", [])
    interop.register("Ours", lambda node: snn.LIF(1 / getattr(node, "tau", 2.0)))


def reasons(model):
    report = interop.ConvertReport()
    interop.convert(model, report)
    return report.left


def test_neurons_over_sequences_in_two_places_stay(known):
    node = Ours()
    left = reasons(nn.Sequential(node, nn.ReLU(), node))
    assert list(left) == ["0", "2"] and "expected a layer over sequences in one place" in left["0"]
    assert not reasons(nn.Sequential(Ours(), nn.ReLU(), Ours()))


def test_a_method_that_is_one_object_s_own_stays(known):
    node = Ours()
    node.forward = lambda x: 7 * x
    assert "has a forward of its own in this object" in reasons(nn.Sequential(node))["0"]


def test_a_number_that_cannot_be_stays(known):
    node = Ours()
    node.tau = 0.0
    assert "division by zero" in reasons(nn.Sequential(node))["0"]


def test_a_user_s_class_of_the_name_of_one_here_is_another(known):
    interop.register("LIF", lambda node: node.not_there)
    model = nn.Sequential(snn.LIF(0.5), neurons())
    assert not reasons(model) and type(model[0]) is snn.LIF


def test_a_tau_that_is_trained_stays():
    node = pytest.importorskip("spikingjelly.activation_based.neuron").LIFNode(step_mode="m")
    del node.tau
    node.tau = nn.Parameter(torch.tensor(2.0))
    assert "expected tau to be a number, got one that is trained" in reasons(nn.Sequential(node))["0"]


def test_hooks_are_in_no_graph_of_nir():
    pytest.importorskip("nir")
    model = snn.TimeSequential(nn.Linear(3, 3), snn.LIF(0.5))
    model[0].register_forward_hook(lambda layer, x, y: 2 * y)
    with pytest.raises(ValueError, match="expected a layer without hooks, got Linear has hooks"):
        interop.to_nir(model, 3, dt=1e-3)
