"""NIR: graphs that are no chains (sums, cycles, graphs in graphs), BatchNorms, and the networks of this package."""

import numpy as np
import pytest
import torch
from torch import nn

from trtkern import interop
from trtkern import nn as snn
from trtkern.interop.nir import NodeGraph, Scale, from_nir, to_nir
from trtkern.models import ConvSNN, from_topology, resnet19, vggsnn

nir = pytest.importorskip("nir")

DT = 1e-3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def recurrent():
    return NodeGraph(
        {"fc": nn.Linear(6, 10), "lif": snn.LIF(0.8, v_threshold=0.5), "rec": nn.Linear(10, 10), "out": snn.LI()},
        [("input", "fc"), ("fc", "lif"), ("lif", "rec"), ("rec", "lif"), ("lif", "out"), ("out", "output")],
    )  # fmt: skip


def back_from_a_file(model, shape, tmp_path, **settings):
    graph = to_nir(model, shape, dt=DT, **settings)
    assert graph.check_types()
    nir.write(tmp_path / "graph.nir", graph)
    return from_nir(tmp_path / "graph.nir", dt=DT, **settings), graph


def test_a_cycle_is_the_loop_that_one_writes(tmp_path):
    """The recurrent input is that of the step before; there is none in the first step, not even a bias."""
    model, x = recurrent(), torch.rand(15, 4, 6) * 2
    fc, lif, rec, out = (model.layer(name) for name in ("fc", "lif", "rec", "out"))
    v = u = past = None
    spikes, expected = [], []
    for x_t in x:
        s, v = lif.step(fc(x_t) if past is None else fc(x_t) + past, v)
        past = rec(s)
        y, u = out.step(s, u)
        spikes.append(s)
        expected.append(y)
    assert 0.05 < torch.stack(spikes).mean() < 0.95
    torch.testing.assert_close(model(x), torch.stack(expected), rtol=1e-5, atol=1e-6)
    back, graph = back_from_a_file(model, (6,), tmp_path)
    assert torch.equal(back(x), model(x)) and isinstance(back, NodeGraph)
    assert set(map(tuple, graph.edges)) == set(model.edges)


def test_a_cycle_in_parts_step_by_step_and_backwards():
    model, x = recurrent(), torch.rand(9, 4, 6) * 2
    whole, last = model(x, return_state=True)
    first, state = model(x[:4], return_state=True)
    second, state = model(x[4:], state, return_state=True)
    assert torch.equal(torch.cat([first, second]), whole)
    state, seen = None, []
    for x_t in x:
        y, state = model.step(x_t, state)
        seen.append(y)
    torch.testing.assert_close(torch.stack(seen), whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state.layers["lif"], last.layers["lif"], rtol=1e-6, atol=1e-6)
    whole.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def late(steps):
    """A delay of so many steps, one for all or one a channel."""
    return snn.Delay(3, int(torch.as_tensor(steps).max()), steps)


@pytest.mark.parametrize("steps", [1, 2, 3, torch.tensor([1, 2, 3])])
def test_a_delay_in_a_cycle_takes_the_steps_that_it_says(steps, tmp_path):
    model = NodeGraph(
        {"sum": Scale(torch.ones(3)), "line": late(steps), "half": Scale(torch.full((3,), 0.5))},
        [("input", "sum"), ("sum", "line"), ("line", "half"), ("half", "sum"), ("sum", "output")],
    )
    x = torch.rand(10, 2, 3)
    each = torch.as_tensor(steps).expand(3)
    expected = torch.zeros_like(x)
    for t in range(10):
        for neuron, count in enumerate(each.tolist()):
            fed = 0.5 * expected[t - count, :, neuron] if t >= count else 0.0
            expected[t, :, neuron] = x[t, :, neuron] + fed
    torch.testing.assert_close(model(x), expected)
    back, _ = back_from_a_file(model, (3,), tmp_path)
    assert torch.equal(back(x), model(x))
    first, state = model(x[:6], return_state=True)
    assert torch.equal(torch.cat([first, model(x[6:], state)]), model(x))


def test_two_cycles_that_meet(tmp_path):
    layers = {name: nn.Linear(4, 4) for name in ("ab", "ba", "aa")}
    layers.update(a=snn.LIF(0.9, 0.5), b=snn.CUBALIF(0.5, 1.0, 0.8))
    edges = [("input", "a"), ("a", "ab"), ("ab", "b"), ("b", "ba"), ("ba", "a"), ("a", "aa"), ("aa", "a"),
             ("input", "b"), ("b", "output"), ("a", "output")]  # fmt: skip
    model, x = NodeGraph(layers, edges), torch.rand(12, 3, 4) * 2
    back, _ = back_from_a_file(model, (4,), tmp_path)
    assert torch.equal(back(x), model(x)) and 0 < model(x).mean() < 2


def any_graph(seed):
    """Some nodes with random edges: each has one from a node before it, some have one from a node behind it."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def draw(high):
        return int(torch.randint(high, (), generator=random))

    layers, edges = {}, []
    for i in range(6):
        name = f"{'dbface'[i]}{i}"
        made = [
            lambda: snn.LIF(0.8, 0.6),
            lambda: nn.Linear(3, 3),
            lambda: late(draw(3)),
            lambda: snn.CUBALIF(v_threshold=0.2),
        ]
        layers[name] = made[0]() if i in (0, 3) else made[draw(4)]()
        before = ["input", *list(layers)[:-1]]
        edges += {(before[draw(len(before))], name) for _ in range(3)}
    names = list(layers)
    # Every way back leads to a neuron, so that every cycle has a state.
    edges += [(names[draw(3) + 3], names[0]), (names[5], names[3])]
    return NodeGraph(layers, [*edges, *((name, "output") for name in names)])


@pytest.mark.parametrize("seed", range(12))
def test_any_graph_goes_and_comes_back_and_runs_in_parts(seed, tmp_path):
    """A file keeps the order of edges, not that of nodes."""
    model, x = any_graph(seed), torch.rand(9, 2, 3) * 2
    assert any(part.cyclic for part in model.parts)
    back, _ = back_from_a_file(model, (3,), tmp_path)
    assert torch.equal(back(x), model(x)) and model(x).std() > 0
    first, state = model(x[:4], return_state=True)
    torch.testing.assert_close(torch.cat([first, model(x[4:], state)]), model(x), rtol=1e-6, atol=1e-6)


def test_a_graph_in_a_model_is_a_graph_in_the_graph(tmp_path):
    model = nn.Sequential(nn.Linear(3, 6), recurrent(), nn.Linear(10, 5), snn.LIF(0.9, v_threshold=0.2))
    back, graph = back_from_a_file(model, (3,), tmp_path)
    assert [type(node).__name__ for node in graph.nodes.values()] == [
        "Input", "Affine", "NIRGraph", "Affine", "LIF", "Output"
    ]  # fmt: skip
    x = torch.rand(12, 2, 3) * 3
    assert torch.equal(back(x), model(x)) and 0 < model(x).mean() < 1
    assert "1.lif" in back.names


def test_graphs_in_graphs_in_graphs():
    def inside(node):
        shape = np.array([3])
        nodes = {"input": nir.Input(shape), "it": node, "output": nir.Output(shape)}
        return nir.NIRGraph(nodes, [("input", "it"), ("it", "output")], type_check=False)

    scale = nir.Scale(scale=np.array([1.0, 2.0, 3.0]))
    back = from_nir(inside(inside(inside(scale))), dt=DT)
    assert isinstance(back, snn.TimeSequential) and list(back._modules) == ["it_it_it"]
    assert torch.equal(back(torch.ones(2, 1, 3)), torch.tensor([1.0, 2.0, 3.0]).expand(2, 1, 3))


def test_one_sum_for_all_edges_that_meet(tmp_path):
    """The same value twice in a sum is one edge and a Scale: NIR has each edge once."""

    class Fans(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.lif = nn.Linear(4, 4), nn.Linear(4, 4), snn.LIF(0.7, v_threshold=0.6)

        def forward(self, x):
            y = self.first(x)
            return self.lif(y + y + x) + self.second(x).add(x)

    model, x = Fans(), torch.rand(8, 2, 4)
    back, graph = back_from_a_file(model, (4,), tmp_path)
    assert sum(type(node).__name__ == "Scale" for node in graph.nodes.values()) == 1
    torch.testing.assert_close(back(x), model(x), rtol=1e-6, atol=1e-6)


def dyadic(model):
    """Weights, biases and statistics with few binary digits: every sum is exact, in whatever order and form."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.copy_(torch.randint(-4, 5, module.weight.shape) / 8)
                if module.bias is not None:
                    module.bias.copy_(torch.randint(-4, 5, module.bias.shape) / 8)
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, snn.BatchNormLIF)):
                module.eps = 2.0**-20
                module.running_var.copy_(4.0 ** torch.randint(-1, 2, module.running_var.shape) - 2.0**-20)
                module.running_mean.copy_(torch.randint(-4, 5, module.running_mean.shape) / 8)
                module.weight.copy_(torch.randint(1, 5, module.weight.shape) / 4)
                module.bias.copy_(torch.randint(0, 5, module.bias.shape) / 8)
    return model.eval()


def with_norms():
    return snn.TimeSequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), snn.BatchNormLIF(8, pool=2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), snn.LIF(), nn.AvgPool2d(2),
        nn.BatchNorm2d(8), snn.LIF(), snn.SpikeLinear(128, 12, bias=False), nn.BatchNorm1d(12), snn.LIF(),
        nn.BatchNorm1d(12), snn.LIF(), nn.Linear(12, 5),
    )  # fmt: skip


def test_norms_are_written_with_their_running_statistics(tmp_path):
    """Behind a convolution or a matrix they are a part of it, else a convolution or a matrix of their own; with
    numbers of few digits nothing is rounded, and every spike is the same."""
    model, x = dyadic(with_norms()), torch.randint(0, 3, (6, 2, 2, 16, 16)) / 2
    back, graph = back_from_a_file(model, (2, 16, 16), tmp_path)
    found = [type(node).__name__ for node in graph.nodes.values()]
    assert found.count("Conv2d") == 3 and found.count("Affine") == 3
    assert torch.equal(back(x), model(x)) and 0.02 < model[:13](x).mean() < 0.98


def test_a_norm_that_only_scales_is_a_scale():
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    graph = to_nir(snn.TimeSequential(norm, snn.LIF()), (3, 2, 2), dt=DT)
    assert [type(node).__name__ for node in graph.nodes.values()] == ["Input", "Scale", "LIF", "Output"]


NETWORKS = {
    "ConvSNN": (lambda: ConvSNN((1, 8, 8), [8, "pool", 8, "pool"], 5), (1, 8, 8)),
    "vggsnn": (vggsnn, (2, 48, 48)),
    "resnet19": (lambda: resnet19(shape=(3, 16, 16), width=8), (3, 16, 16)),
    "SEW": (lambda: from_topology("CONVAP-8-3-1-1_SEWRES~ADD-16-3=3-2=1-1=1_FC-16_L-5", shape=(2, 8, 8)), (2, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_of_this_package(name, tmp_path):
    """Residuals are edges that meet; the weights are drawn, the statistics those of a batch.

    A BatchNorm that is a part of its convolution is rounded otherwise than the layer, so a potential that lies at its
    threshold within some 1e-6 may fall to the other side: none of these numbers does.
    """
    make, shape = NETWORKS[name]
    model = make()
    x = torch.rand(4, 2, *shape)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    model.eval()
    back, _ = back_from_a_file(model, shape, tmp_path)
    with torch.no_grad():
        first, second = model(x), back(x)
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    assert first.std() > 0


def test_what_a_user_writes(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = snn.OverTime(nn.Conv2d(4, 4, 3, padding=1))
            self.norm = snn.BatchNormLIF(4, neuron=snn.CUBALIF, decay_syn=0.5)

        def forward(self, x):
            return self.norm(self.conv(x), residual=x)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(64, 3)
            self.dropout, self.readout = nn.Dropout(), snn.CUBALI()

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.readout(self.head(self.dropout(x.flatten(2))))

    model, x = dyadic(Network()), torch.randint(0, 3, (8, 2, 4, 4, 4)) / 2
    back, graph = back_from_a_file(model, (4, 4, 4), tmp_path)
    torch.testing.assert_close(back(x), model(x), rtol=1e-5, atol=1e-6)
    assert {"blocks.0.norm.lif", "head", "readout"} <= set(graph.nodes) and model(x).std() > 0


def test_networks_for_one_step_at_a_time(tmp_path):
    """What ``convert`` makes of another library's model, in a loop and over time."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.first = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), interop.Stepping(snn.LIF())
            self.head, self.second = nn.Linear(144, 5), interop.Stepping(snn.CUBALIF(v_threshold=0.25))

        def forward(self, x):
            return self.second(self.head(self.first(self.norm(self.conv(x))).flatten(1)))

    net = dyadic(Network())
    x = torch.randint(0, 3, (7, 2, 1, 8, 8)) / 2
    loop = torch.stack([net(x_t) for x_t in x])
    assert 0 < loop.mean() < 1
    for model in (net, interop.over_time(net)):
        back, _ = back_from_a_file(model, (1, 8, 8), tmp_path)
        assert torch.equal(back(x), loop)
    with pytest.raises(ValueError, match=r"a potential of 0 before the first step, got start=0.5"):
        to_nir(interop.Stepping(snn.LIF(), start=0.5), 3, dt=DT)


def test_a_static_image_and_unfused_layers(tmp_path):
    model = snn.TimeSequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), snn.LIF(), nn.Flatten(), nn.Linear(144, 3), timesteps=5
    )
    dyadic(model)
    fused = snn.convert_norm_lif(snn.TimeSequential(*model, timesteps=5))
    image = torch.randint(0, 3, (2, 1, 8, 8)) / 2
    for each in (model, fused, snn.unfuse(fused)):
        back, _ = back_from_a_file(each, (1, 8, 8), tmp_path)
        assert torch.equal(back(image.expand(5, -1, -1, -1, -1)), each(image)) and each(image).std() > 0


def test_a_stream_carries_graphs_of_neurons_and_refuses_what_else_has_a_state():
    edges = [("input", "a"), ("input", "b"), ("a", "b"), ("b", "output")]
    model, x = NodeGraph({"a": snn.LIF(0.9), "b": snn.CUBALIF(v_threshold=0.2)}, edges), torch.rand(9, 2, 3)
    stream = snn.stream(model)
    assert torch.equal(torch.cat([stream.chunk(x[:4]), stream.chunk(x[4:])]), model(x)) and model(x).sum() > 0
    with pytest.raises(TypeError, match="got a cycle, whose state a stream does not carry"):
        snn.stream(recurrent())


def test_a_graph_is_recorded_whole_by_torch_fx():
    model = nn.Sequential(nn.Linear(3, 6), recurrent())
    x = torch.rand(5, 2, 3)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
