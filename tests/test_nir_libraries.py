"""NIR between this package and SpikingJelly, snnTorch, Norse and sinabs, with equal spikes both ways.

Where a library cannot read or write something that it says it can, a test shows that on a file of its own.
"""

import warnings

import pytest
import torch
from torch import nn

from trtkern import nn as snn
from trtkern.interop.nir import NodeGraph, from_nir, to_nir

nir = pytest.importorskip("nir")

T, B = 30, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nirtorch says that its older functions will go
        yield


def library(name):
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def some_fire(spikes):
    assert 0.02 < spikes.float().mean() < 0.9 and set(spikes.unique().tolist()) == {0.0, 1.0}


def by_steps(model, x):
    """A model of nirtorch, which takes a step and a state."""
    seen, state = [], None
    for x_t in x:
        y, state = model(x_t, state)
        seen.append(y)
    return torch.stack(seen).detach()


def louder(model, factors):
    with torch.no_grad():
        for place, factor in factors.items():
            model[place].weight.mul_(factor)
    return model.eval()


def recurrent(lif, out):
    layers = {"fc": nn.Linear(6, 10), "lif": lif, "rec": nn.Linear(10, 10), "fc2": nn.Linear(10, 4), "out": out}
    edges = ["input fc", "fc lif", "lif rec", "rec lif", "lif fc2", "fc2 out", "out output"]
    return NodeGraph(layers, [tuple(edge.split()) for edge in edges])


# SpikingJelly


def spikingjelly():
    library("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron, nir_exchange

    return functional, layer, neuron, nir_exchange


@pytest.mark.parametrize("dt", [1e-4, 2e-3])
def test_spikingjelly_there_and_back(dt, tmp_path):
    functional, layer, neuron, exchange = spikingjelly()
    net = nn.Sequential(
        layer.Conv2d(2, 6, 3, padding=1), neuron.IFNode(), layer.AvgPool2d(2), layer.Flatten(),
        layer.Linear(96, 20), neuron.LIFNode(tau=3.0, decay_input=False), layer.Linear(20, 10, bias=False),
        neuron.LIFNode(tau=2.0), layer.Linear(10, 9), neuron.ParametricLIFNode(init_tau=2.5), layer.Linear(9, 8),
        neuron.CUBALIFNode(c_decay=0.5, v_decay=0.8),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0 if parameter.dim() else 1.0)
        net[0].bias.add_(0.3)
    functional.set_step_mode(net, "m")
    x = torch.rand(T, B, 2, 8, 8)
    exchange.export_to_nir(net, x, dt=dt, save_path=tmp_path / "theirs.nir")
    functional.reset_net(net)
    expected = net(x).detach()
    some_fire(expected)
    here = from_nir(tmp_path / "theirs.nir", dt=dt, dialect="spikingjelly")
    assert isinstance(here, snn.TimeSequential) and torch.equal(here(x), expected)
    nir.write(tmp_path / "ours.nir", to_nir(here, (2, 8, 8), dt=dt, dialect="spikingjelly"))
    there = exchange.import_from_nir(tmp_path / "ours.nir", dt=dt, step_mode="m")
    assert torch.equal(there(x)[0].detach(), expected)


def test_spikingjelly_reads_what_is_written_here(tmp_path):
    exchange = spikingjelly()[3]
    model = snn.TimeSequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), snn.LIF(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 30),
        snn.CUBALIF(0.5, 0.3, 0.8), nn.Linear(30, 10), snn.IF(0.7), nn.Linear(10, 8),
        snn.LIF(0.75, 0.5, v_threshold=0.1),
    )  # fmt: skip
    louder(model, {5: 4.0, 7: 6.0, 9: 2.0})
    x = torch.rand(T, B, 2, 8, 8)
    some_fire(model(x))
    nir.write(tmp_path / "ours.nir", to_nir(model, (2, 8, 8), dt=1e-3, dialect="spikingjelly"))
    there = exchange.import_from_nir(tmp_path / "ours.nir", dt=1e-3, step_mode="m")
    assert torch.equal(there(x)[0].detach(), model(x))


def test_spikingjelly_and_norse_read_cycles(tmp_path):
    exchange = spikingjelly()[3]
    norse = norse_nir()[1]
    model = recurrent(snn.LIF(0.8, 0.2, v_threshold=0.1), snn.LIF(0.7, 0.3, v_threshold=0.03))
    x = torch.rand(T, B, 6) * 3
    some_fire(model(x))
    for dialect, read in (("spikingjelly", exchange.import_from_nir), ("norse", norse)):
        nir.write(tmp_path / "ours.nir", to_nir(model, 6, dt=1e-3, dialect=dialect))
        there = read(nir.read(tmp_path / "ours.nir"), dt=1e-3)
        assert torch.equal(by_steps(there, x), model(x)), dialect


# snnTorch


def snntorch():
    theirs = library("snntorch")
    from snntorch.export_nir import export_to_nir
    from snntorch.import_nir import import_from_nir

    return theirs, export_to_nir, import_from_nir


ZERO = {"init_hidden": True, "reset_mechanism": "zero", "reset_delay": False}


def snntorch_spikes(net, x):
    for layer in net:
        if hasattr(layer, "reset_mem"):
            layer.reset_mem()
    seen = [net(x_t) for x_t in x]
    return torch.stack([y[0] if isinstance(y, tuple) else y for y in seen]).detach()


def test_snntorch_there_and_back(tmp_path):
    """Its writer needs a beta and a threshold for each neuron, and its reader makes the reset to zero, at once."""
    theirs, write, read = snntorch()
    net = nn.Sequential(
        nn.Linear(12, 20), theirs.Leaky(beta=torch.full((20,), 0.8), threshold=torch.full((20,), 1.0), **ZERO),
        nn.Linear(20, 15, bias=False),
        theirs.Synaptic(
            alpha=torch.full((15,), 0.5), beta=torch.full((15,), 0.7), threshold=torch.full((15,), 0.5), **ZERO
        ),
        nn.Linear(15, 6), theirs.Leaky(beta=torch.rand(6), threshold=torch.full((6,), 0.2), output=True, **ZERO),
    )  # fmt: skip
    x = torch.rand(T, B, 12) * 2
    nir.write(tmp_path / "theirs.nir", write(net, x[0], ignore_dims=[0]))
    expected = snntorch_spikes(net, x)
    some_fire(expected)
    here = from_nir(tmp_path / "theirs.nir", dt=1e-4, dialect="snntorch")
    assert torch.equal(here(x), expected)
    nir.write(tmp_path / "ours.nir", to_nir(here, 12, dt=1e-4, dialect="snntorch"))
    assert torch.equal(by_steps(read(nir.read(tmp_path / "ours.nir")), x), expected)


def test_snntorch_s_own_reset_is_asked_for(tmp_path):
    """Its default, to subtract the threshold in the step after the spike, is in no file."""
    theirs, write, _ = snntorch()
    leaky = theirs.Leaky(beta=torch.full((20,), 0.8), threshold=torch.full((20,), 1.0), init_hidden=True)
    net, x = nn.Sequential(nn.Linear(12, 20), leaky), torch.rand(T, B, 12) * 2
    nir.write(tmp_path / "theirs.nir", write(net, x[0], ignore_dims=[0]))
    expected = snntorch_spikes(net, x)
    some_fire(expected)
    assert torch.equal(from_nir(tmp_path / "theirs.nir", dt=1e-4, dialect="snntorch", reset="soft")(x), expected)


def test_snntorch_reads_what_is_written_here(tmp_path):
    read = snntorch()[2]
    model = snn.TimeSequential(
        nn.Conv2d(2, 6, 3, padding=1), snn.LIF(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 30),
        snn.CUBALIF(0.5, 0.3, 0.8), nn.Linear(30, 8), snn.LIF(0.75, 0.25, v_threshold=0.1),
    )  # fmt: skip
    louder(model, {4: 4.0, 6: 6.0})
    x = torch.rand(T, B, 2, 8, 8)
    some_fire(model(x))
    nir.write(tmp_path / "ours.nir", to_nir(model, (2, 8, 8), dt=1e-4, dialect="snntorch"))
    assert torch.equal(by_steps(read(nir.read(tmp_path / "ours.nir")), x), model(x))


def test_snntorch_writes_cycles_and_does_not_read_its_own(tmp_path):
    theirs, write, read = snntorch()
    layer = theirs.RLeaky(beta=0.8, linear_features=10, **ZERO)
    with torch.no_grad():
        # Its loop adds the bias in the first step, before any spike; the readers of NIR do not.
        layer.recurrent.bias.zero_()
    net, x = nn.Sequential(nn.Linear(5, 10), layer), torch.rand(T, B, 5) * 3
    nir.write(tmp_path / "theirs.nir", write(net, x[0], ignore_dims=[0]))
    expected = snntorch_spikes(net, x)
    some_fire(expected)
    assert torch.equal(from_nir(tmp_path / "theirs.nir", dt=1e-4, dialect="snntorch")(x), expected)
    with pytest.raises(AttributeError, match="'GraphModule' object has no attribute 'items'"):
        read(nir.read(tmp_path / "theirs.nir"))


# Norse


def norse_nir():
    library("norse")
    from norse.torch.utils.export_nir import to_nir as write
    from norse.torch.utils.import_nir import from_nir as read

    return write, read


def norse_network(readout=True):
    norse = library("norse.torch")
    box = norse.LIFBoxParameters(torch.full((20,), 200.0), v_th=torch.full((20,), 0.2), v_leak=torch.zeros(20))
    layers = [
        nn.Linear(12, 20), norse.LIFBoxCell(box), nn.Linear(20, 16),
        norse.IAFCell(norse.IAFParameters(v_th=torch.full((16,), 0.8))),
    ]  # fmt: skip
    if readout:
        leak = norse.LIBoxParameters(torch.full((6,), 100.0), v_leak=torch.zeros(6))
        layers += [nn.Linear(16, 6, bias=False), norse.LIBoxCell(leak)]
    return norse.SequentialState(*layers)


@pytest.mark.parametrize("dt", [1e-3, 2e-3])
def test_norse_there_and_back(dt, tmp_path):
    """It writes each time constant times dt, which the dialect undoes."""
    write, read = norse_nir()
    net, x = norse_network(readout=False), torch.rand(T, B, 12) * 2
    for layer in (net[1], net[3]):
        layer.dt = dt
    graph = write(net, x[0], dt=dt)
    nir.write(tmp_path / "theirs.nir", graph)
    expected = by_steps(net, x)
    some_fire(expected)
    here = from_nir(tmp_path / "theirs.nir", dt=dt, dialect="norse")
    assert torch.equal(here(x), expected)
    nir.write(tmp_path / "ours.nir", to_nir(here, 12, dt=dt, dialect="norse"))
    assert torch.equal(by_steps(read(nir.read(tmp_path / "ours.nir"), dt=dt), x), expected)
    assert not torch.equal(by_steps(read(graph, dt=dt), x), expected)  # its reader takes it for another network


def test_norse_s_readout_and_its_cell_with_a_synapse(tmp_path):
    norse = library("norse.torch")
    write, _ = norse_nir()
    net, x = norse_network(), torch.rand(T, B, 12) * 2
    here = from_nir(write(net, x[0]), dt=1e-3, dialect="norse")
    torch.testing.assert_close(here(x), by_steps(net, x), rtol=1e-5, atol=1e-6)
    cells = [norse.LIFCell(norse.LIFParameters(v_th=torch.tensor(v_th))) for v_th in (0.3, 0.1)]
    net = norse.SequentialState(nn.Linear(12, 20), cells[0], nn.Linear(20, 6), cells[1])
    graph = write(net, x[0])
    some_fire(by_steps(net, x))
    assert torch.equal(from_nir(graph, dt=1e-3, dialect="norse")(x), by_steps(net, x))
    with pytest.raises(TypeError, match="Scalar datasets don't support chunk/filter options"):
        nir.write(tmp_path / "theirs.nir", graph)  # parameters without a shape, the default of the library


def test_norse_reads_what_is_written_here(tmp_path):
    read = norse_nir()[1]
    model = snn.TimeSequential(
        nn.Conv2d(2, 6, 3, padding=1), snn.LIF(), nn.AvgPool2d(2, divisor_override=1), nn.Flatten(), nn.Linear(96, 30),
        snn.CUBALIF(0.5, 0.3, 0.8), nn.Linear(30, 20, bias=False), snn.IF(0.7), nn.Linear(20, 8),
        snn.LIF(0.75, 0.5, v_threshold=0.1),
    )  # fmt: skip
    louder(model, {4: 4.0, 6: 6.0, 8: 2.0})
    x = torch.rand(T, B, 2, 8, 8)
    some_fire(model(x))
    nir.write(tmp_path / "ours.nir", to_nir(model, (2, 8, 8), dt=1e-3, dialect="norse"))
    assert torch.equal(by_steps(read(nir.read(tmp_path / "ours.nir"), dt=1e-3), x), model(x))


# sinabs


def sinabs():
    library("sinabs")
    import sinabs.layers as layers
    import sinabs.nir as exchange
    from sinabs.activation import MembraneReset, MembraneSubtract, SingleSpike

    return layers, exchange, SingleSpike, {"soft": MembraneSubtract(), "hard": MembraneReset()}


def batch_first(run, x):
    """A layer of sinabs takes [B * T, ...]."""
    y = run(x.transpose(0, 1).flatten(0, 1))
    return (y[0] if isinstance(y, tuple) else y).detach().unflatten(0, (B, T)).transpose(0, 1)


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_sinabs_there_to_here(reset, tmp_path):
    """Its writer says neither the reset nor how many spikes a step may have: at most one, of a network like this."""
    layers, exchange, single, resets = sinabs()
    kw = {"spike_fn": single, "reset_fn": resets[reset], "batch_size": B}
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), layers.IAFSqueeze(**kw), layers.SumPool2d(2), nn.Flatten(),
        nn.Linear(96, 30),
        layers.LIFSqueeze(tau_mem=torch.full((30,), 5.0), spike_threshold=torch.full((30,), 0.1), **kw),
        nn.Linear(30, 20, bias=False),
        layers.LIFSqueeze(tau_mem=torch.linspace(3, 9, 20), spike_threshold=torch.full((20,), 0.05), **kw),
        nn.Linear(20, 5), layers.ExpLeakSqueeze(tau_mem=torch.full((5,), 10.0), batch_size=B),
    )  # fmt: skip
    louder(net, {0: 2.0})
    x = torch.rand(T, B, 2, 8, 8)
    graph = exchange.to_nir(net, x.transpose(0, 1).flatten(0, 1))
    with pytest.raises(TypeError, match="One of data, shape or dtype must be specified"):
        nir.write(tmp_path / "theirs.nir", graph)  # shapes that it leaves open
    graph.infer_types()
    nir.write(tmp_path / "theirs.nir", graph)
    here = from_nir(tmp_path / "theirs.nir", dt=1e-3, dialect="sinabs", reset=reset)
    for last in (8, 10):
        for layer in net:
            if hasattr(layer, "reset_states"):
                layer.reset_states()
        expected = batch_first(net[:last], x)
        if last == 8:
            some_fire(expected)
            assert torch.equal(here[:8](x), expected)
        else:
            torch.testing.assert_close(here(x), expected, rtol=1e-5, atol=1e-6)


def test_sinabs_reads_what_is_written_here(tmp_path):
    """It resets softly, fires several times a step, and holds an IF above minus its threshold: with weights and inputs
    that bring no more than a threshold a step, and nothing below 0, it computes what is written."""
    exchange = sinabs()[1]
    soft = {"v_reset": None, "fire_on_equal": True}
    model = snn.TimeSequential(
        nn.Conv2d(2, 6, 3, padding=1), snn.IF(**soft), nn.AvgPool2d(2, divisor_override=1), nn.Flatten(),
        nn.Linear(96, 30), snn.IF(0.5, **soft), nn.Linear(30, 8, bias=False),
        snn.LIF(0.75, 0.25, v_threshold=0.1, **soft),
    )  # fmt: skip
    with torch.no_grad():
        for place, most in {0: 1.0, 4: 0.5, 6: 0.37}.items():
            weight = model[place].weight.abs_()
            weight.mul_(most / weight.flatten(1).sum(1).view(-1, *[1] * (weight.dim() - 1)))
            if model[place].bias is not None:
                model[place].bias.zero_()
    x = torch.rand(T, B, 2, 8, 8)
    some_fire(model(x))
    nir.write(tmp_path / "ours.nir", to_nir(model, (2, 8, 8), dt=1e-3, dialect="sinabs"))
    there = exchange.from_nir(nir.read(tmp_path / "ours.nir"), batch_size=B).float()
    assert torch.equal(batch_first(there, x), model(x))


def test_sinabs_reads_a_readout(tmp_path):
    exchange = sinabs()[1]
    model, x = snn.TimeSequential(nn.Linear(4, 5), snn.LI(0.9, 1.0)), torch.rand(T, B, 4)
    nir.write(tmp_path / "ours.nir", to_nir(model, 4, dt=1e-3, dialect="sinabs"))
    there = exchange.from_nir(nir.read(tmp_path / "ours.nir"), batch_size=B).float()
    torch.testing.assert_close(batch_first(there, x), model(x), rtol=1e-5, atol=1e-6)


# What docs/nir.md says that they do


def test_snntorch_wants_numbers_for_each_neuron_and_reads_if_with_a_leak():
    theirs, write, read = snntorch()
    with pytest.raises(ValueError, match="type mismatch"):
        write(nn.Sequential(nn.Linear(4, 3), theirs.Leaky(beta=0.8, **ZERO)), torch.rand(2, 4), ignore_dims=[0])
    graph = to_nir(snn.TimeSequential(nn.Linear(4, 3), snn.IF()), 4, dt=1e-4)
    graph.nodes["1"].r[:] = 1.0
    assert [m.beta.item() for m in read(graph).modules() if hasattr(m, "beta")] == [pytest.approx(0.9)]


def test_sinabs_fires_more_than_once_and_holds_the_potential():
    layers, exchange, *_ = sinabs()
    graph = to_nir(snn.IF(v_reset=None), 3, dt=1e-3, dialect="sinabs")
    there = next(m for m in exchange.from_nir(graph, batch_size=1).modules() if isinstance(m, layers.IAFSqueeze))
    assert there(torch.full((1, 3), 2.5)).tolist() == [[2.0] * 3]
    assert (there.v_mem >= -1).all() and there(torch.full((1, 3), -9.0)).sum() == 0 and (there.v_mem == -1).all()


def test_nir_checks_kernels_as_squares_and_knows_no_groups():
    import numpy as np

    wide = nir.Conv2d((8, 8), np.ones((2, 2, 3, 5)), 1, 0, 1, 1, np.ones(2))
    assert wide.output_type["output"].tolist() == [2, 6, 6]  # [2, 6, 4]
    grouped = nir.Conv2d((8, 8), np.ones((4, 1, 3, 3)), 1, 1, 1, 4, np.ones(4))
    assert grouped.input_type["input"].tolist() == [1, 8, 8]  # [4, 8, 8]
    nodes = {"input": nir.Input(np.array([4, 8, 8])), "conv": grouped, "output": nir.Output(np.array([4, 8, 8]))}
    graph = nir.NIRGraph(nodes, [("input", "conv"), ("conv", "output")], type_check=False)
    x = torch.rand(2, 1, 4, 8, 8)
    expected = nn.functional.conv2d(x.flatten(0, 1), torch.ones(4, 1, 3, 3), torch.ones(4), padding=1, groups=4)
    assert torch.equal(from_nir(graph, dt=1e-3)(x).flatten(0, 1), expected)
