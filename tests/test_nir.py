"""NIR: every node against its equation, and every layer through a file and back, with equal spikes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trtkern import nn as snn
from trtkern.interop.nir import NodeGraph, PerNeuron, Scale, Threshold, from_nir, to_nir
from trtkern.interop.nir.dialects import DIALECTS

nir = pytest.importorskip("nir")

DT = 1e-3
PAGE = Path(__file__).parents[1] / "docs" / "nir.md"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def through_a_file(model, shape, tmp_path, **settings):
    """The model that comes out of the file of a model's graph, and the graph."""
    settings = {"dt": DT, **settings}
    graph = to_nir(model, shape, **settings)
    assert graph.check_types()
    nir.write(tmp_path / "graph.nir", graph)
    return from_nir(tmp_path / "graph.nir", **settings), graph


def equal_spikes(model, shape, tmp_path, x=None, **settings):
    """Spikes of a model and of what its file gives, which have to be equal; and the graph."""
    back, graph = through_a_file(model, shape, tmp_path, **settings)
    x = torch.rand(12, 3, *shape) * 2 if x is None else x
    first, second = model(x), back(x)
    first = first.spikes if isinstance(first, snn.Spikes) else first
    assert torch.equal(first, second)
    return first, graph


def kinds(graph):
    return [type(node).__name__ for node in graph.nodes.values()]


CHANNELS = torch.linspace(0.2, 0.9, 4)

NEURONS = {
    "LIF": (lambda: snn.LIF(0.7, 0.4, v_threshold=0.3), "LIF"),
    "LIF of the paper": (snn.LIF, "LIF"),
    "LIF that forgets": (lambda: snn.LIF(0.0, 0.9), "LIF"),
    "LIF with a leak": (lambda: snn.LIF(0.9, 0.2, v_leak=0.25, v_threshold=0.5, v_reset=-0.1), "LIF"),
    "LIF of channels": (lambda: snn.LIF(CHANNELS, CHANNELS.flip(0), v_threshold=CHANNELS, v_reset=-CHANNELS), "LIF"),
    "LIF that learns": (lambda: snn.LIF(snn.Bounded(CHANNELS), v_threshold=snn.Bounded(0.5, "softplus")), "LIF"),
    "LIF packed": (lambda: snn.LIF(0.6, packed=True), "LIF"),
    "PLIF": (lambda: snn.PLIF(3.0, decay_input=True, v_threshold=0.4), "LIF"),
    "IF": (lambda: snn.IF(0.3, v_reset=0.05), "IF"),
    "IF of channels": (lambda: snn.IF(CHANNELS, v_threshold=CHANNELS), "IF"),
    "LI": (lambda: snn.LI(0.8, 0.5, v_leak=0.1), "LI"),
    "I": (lambda: snn.LI(1.0, 0.5), "I"),
    "CUBALIF": (lambda: snn.CUBALIF(0.6, 0.7, CHANNELS, v_threshold=0.3, v_leak=0.1, v_reset=-0.1), "CubaLIF"),
    "CUBALI": (lambda: snn.CUBALI(CHANNELS, 0.7, 0.8), "CubaLI"),
    "Threshold": (lambda: Threshold(CHANNELS), "Threshold"),
    "PerNeuron": (lambda: PerNeuron(snn.LIF(torch.rand(24), v_threshold=torch.rand(24))), "LIF"),
}


@pytest.mark.parametrize(
    ("name", "method"),
    # A decay of 0 has no time constant in the exponential method: test_nir_errors.py.
    [(n, m) for n in NEURONS for m in ("euler", "exponential") if (n, m) != ("LIF that forgets", "exponential")],
)
def test_neurons_go_and_come_back(name, method, tmp_path):
    make, kind = NEURONS[name]
    layer = make()
    out, graph = equal_spikes(layer, (4, 2, 3), tmp_path, method=method)
    assert kinds(graph) == ["Input", kind, "Output"]
    assert out.abs().sum() > 0 and (isinstance(layer, (snn.LI, snn.CUBALI)) or 0 < out.mean() < 1)


def test_channels_that_come_last(tmp_path):
    layer = snn.LIF(CHANNELS, v_threshold=CHANNELS, channel_dim=-1)
    out, _ = equal_spikes(layer, (5, 4), tmp_path)
    assert 0 < out.mean() < 1
    back, _ = through_a_file(layer, (5, 4), tmp_path)
    assert back[0].channel_dim == 3


LAYERS = {
    "Affine": (lambda: nn.Linear(6, 4), (6,), "Affine"),
    "Linear": (lambda: nn.Linear(6, 4, bias=False), (6,), "Linear"),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (3, 11), "Conv1d"),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=(2, 1), padding=1), (2, 8, 7), "Conv2d"),
    "Conv2d same": (lambda: nn.Conv2d(2, 4, 4, padding="same", bias=False), (2, 8, 7), "Conv2d"),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, 2, 1), (2, 8, 8), "AvgPool2d"),
    "SumPool2d": (lambda: nn.AvgPool2d(2, divisor_override=1), (2, 8, 9), "SumPool2d"),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((2, None)), (2, 8, 6), "AvgPool2d"),
    "Flatten": (nn.Flatten, (2, 3, 4), "Flatten"),
    "Flatten in part": (lambda: nn.Flatten(1, 2), (2, 3, 4), "Flatten"),
    "Scale": (lambda: Scale(torch.rand(2, 3, 4)), (2, 3, 4), "Scale"),
    "Delay": (lambda: snn.Delay(None, 3, 3), (2, 3), "Delay"),
    "Delay of each channel": (lambda: snn.Delay(3, 4, torch.tensor([0, 4, 1])), (3, 2, 2), "Delay"),
    "Delay of each place": (lambda: PerNeuron(snn.Delay(6, 5, torch.arange(6))), (2, 3), "Delay"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_go_and_come_back(name, tmp_path):
    make, shape, kind = LAYERS[name]
    out, graph = equal_spikes(snn.TimeSequential(make()), shape, tmp_path)
    assert kinds(graph) == ["Input", kind, "Output"] and out.abs().sum() > 0


def test_kernels_that_are_not_square(tmp_path):
    """nir 1.0.8 takes the height of a kernel for its width, in its check of types; the file is right, and is read."""
    model = snn.TimeSequential(nn.Conv2d(2, 3, (3, 5)), snn.LIF(0.9))
    graph = to_nir(model, (2, 8, 8), dt=DT)
    nir.write(tmp_path / "graph.nir", graph)
    x = torch.rand(6, 2, 2, 8, 8) * 2
    assert torch.equal(from_nir(tmp_path / "graph.nir", dt=DT)(x), model(x)) and model(x).sum() > 0


def a_network():
    model = snn.TimeSequential(
        nn.Conv2d(2, 8, 3, padding=1), snn.LIF(0.7, v_threshold=torch.rand(8) + 0.2), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 20), snn.CUBALIF(0.5, 0.9, 0.8, v_threshold=0.1), nn.Linear(20, 10, bias=False),
        snn.IF(0.8, v_threshold=0.5), nn.Linear(10, 5), snn.LI(0.9),
    )  # fmt: skip
    return model


def test_a_network_trains_after_it_came_back(tmp_path):
    model = a_network()
    back, graph = through_a_file(model, (2, 8, 8), tmp_path)
    x = torch.rand(20, 3, 2, 8, 8)
    assert isinstance(back, snn.TimeSequential) and len(back) == len(model)
    assert torch.equal(model[:8](x), back[:8](x)) and 0.01 < model[:8](x).mean() < 0.99
    for layers in (model, back):
        layers(x).square().mean().backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    assert graph.metadata == {"dt": DT, "method": "euler", "dialect": "nir"}


def test_what_is_to_be_learned_is(tmp_path):
    learn = ("decay", "gain", "decay_syn", "gain_syn", "v_leak", "v_threshold", "v_reset")
    graph = to_nir(a_network(), (2, 8, 8), dt=DT)
    back = from_nir(graph, dt=DT, learn=learn, surrogate="atan", alpha=2.0, detach_reset=True)
    x = torch.rand(20, 3, 2, 8, 8)
    assert torch.equal(from_nir(graph, dt=DT)(x), back(x))
    back(x).square().mean().backward()
    neurons = {name for name, _ in back.named_parameters() if not name.endswith(("weight", "bias"))}
    assert {"1.decay.raw", "1.gain", "1.v_threshold.raw", "5.decay_syn.raw", "5.gain_syn", "7.v_reset"} <= neurons
    assert back.get_parameter("5.decay.raw").grad.abs() > 0
    assert back[1].spec.surrogate == "atan" and back[1].spec.alpha == 2.0 and back[1].spec.detach_reset


@pytest.mark.parametrize("unit, dt, graph_unit", [("ms", 1.0, "s"), ("us", 1000.0, "ms"), ("s", 1e-3, "us")])
def test_units_of_time(unit, dt, graph_unit):
    layer, units = snn.LIF(0.75, v_threshold=0.5), {"unit": unit, "graph_unit": graph_unit}
    graph = to_nir(layer, 3, dt=dt, **units)
    factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[graph_unit]
    np.testing.assert_allclose(graph.nodes["lif"].tau, 4e-3 * factor)
    x = torch.rand(9, 2, 3)
    assert torch.equal(from_nir(graph, dt=dt, **units)(x), layer(x))
    # With half the step the neuron decays by less in each.
    assert from_nir(graph, dt=dt / 2, **units)[0].decay == pytest.approx(0.875)


def hand_written(node, **others):
    shape = node.input_type["input"]
    nodes = {"in": nir.Input(shape), "node": node, "out": nir.Output(shape), **others}
    return nir.NIRGraph(nodes, [("in", "node"), ("node", "out")], type_check=False)


def full(value):
    return np.full(3, float(value))


def cuba(x, i, v):
    i = i + 0.25 * (1.5 * x - i)
    return i, v + 0.1 * ((0.05 - v) + 5.0 * i)


EQUATIONS = {
    "LIF": (
        nir.LIF(tau=full(0.005), r=full(2.0), v_leak=full(0.1), v_threshold=full(0.7), v_reset=full(-0.2)),
        lambda x, i, v: (i, v + 0.2 * ((0.1 - v) + 2.0 * x)), 0.7, -0.2,
    ),
    "IF": (
        nir.IF(r=full(400.0), v_threshold=full(0.9), v_reset=full(0.1)), lambda x, i, v: (i, v + 0.4 * x), 0.9, 0.1
    ),
    "LI": (nir.LI(tau=full(0.01), r=full(3.0), v_leak=full(-0.1)),
           lambda x, i, v: (i, v + 0.1 * ((-0.1 - v) + 3.0 * x)), None, 0.0),
    "I": (nir.I(r=full(100.0)), lambda x, i, v: (i, v + 0.1 * x), None, 0.0),
    "CubaLIF": (
        nir.CubaLIF(
            tau_syn=full(0.004), tau_mem=full(0.01), r=full(5.0), v_leak=full(0.05), v_threshold=full(0.6),
            v_reset=full(0.0), w_in=full(1.5),
        ),
        cuba, 0.6, 0.0,
    ),
    "CubaLI": (
        nir.CubaLI(tau_syn=full(0.004), tau_mem=full(0.01), r=full(5.0), v_leak=full(0.05), w_in=full(1.5)),
        cuba, None, 0.0,
    ),
    "Threshold": (nir.Threshold(threshold=full(0.8)), lambda x, i, v: (i, x), 0.8, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_node_is_its_equation(name):
    """Euler's method by hand, in float64, with a step of 1 ms."""
    node, move, threshold, reset = EQUATIONS[name]
    x = torch.rand(40, 2, 3)
    i, v, expected = np.zeros((2, 3)), np.zeros((2, 3)), []
    for x_t in x.double().numpy():
        i, v = move(x_t, i, v)
        spikes = None if threshold is None else (v > threshold) * 1.0
        expected.append(v if spikes is None else spikes)
        v = v if spikes is None else np.where(spikes > 0, reset, v)
    got = from_nir(hand_written(node), dt=DT)(x)
    if threshold is None:
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    else:
        assert 0.05 < np.mean(expected) < 0.95
        np.testing.assert_array_equal(got, np.array(expected, dtype=np.float32))


def test_the_exponential_method_is_the_solution():
    """For an input that is constant, v is v_leak + r I (1 - exp(-t / tau)) after a time t, whatever the steps."""
    graph = hand_written(nir.LI(tau=full(0.02), r=full(2.0), v_leak=full(0.3)))
    for dt in (1e-3, 4e-3):
        v = from_nir(graph, dt=dt, method="exponential")(torch.ones(round(0.04 / dt), 1, 3))
        expected = 2.3 * (1 - np.exp(-2.0))
        np.testing.assert_allclose(v[-1], np.full((1, 3), expected), rtol=1e-5)


def test_scalars_are_for_all_neurons():
    """Norse and sinabs write numbers without a shape, some as tensors."""
    node = nir.LIF(
        tau=torch.tensor(0.005), r=torch.tensor(1.0), v_leak=torch.tensor(0.0), v_threshold=torch.tensor(0.3),
        v_reset=torch.tensor(0.0),
    )  # fmt: skip
    back = from_nir(hand_written(node), dt=DT)
    assert back[0].decay == pytest.approx(0.8) and back[0].gain == pytest.approx(0.2)


def test_delays_are_whole_steps_or_rounded():
    graph = hand_written(nir.Delay(delay=np.array([0.0, 2e-3, 3.4e-3])))
    with pytest.raises(ValueError, match=r"'node' \(Delay\): expected whole steps of 0.001, got 3.4 steps"):
        from_nir(graph, dt=DT)
    x = torch.rand(7, 2, 3)
    y = from_nir(graph, dt=DT, round_delays=True)(x)
    for neuron, steps in enumerate((0, 2, 3)):
        assert torch.equal(y[steps:, :, neuron], x[: 7 - steps, :, neuron]) and not y[:steps, :, neuron].any()


def test_a_delay_in_parts_is_a_delay():
    for steps in (0, 2, torch.tensor([0, 1, 4])):
        layer, x = snn.Delay(3, 4, steps), torch.rand(9, 2, 3)
        first, state = layer(x[:5], return_state=True)
        second, state = layer(x[5:], state, return_state=True)
        assert torch.equal(torch.cat([first, second]), layer(x))
        state, seen = None, []
        for x_t in x:
            y, state = layer.step(x_t, state)
            seen.append(y)
        assert torch.equal(torch.stack(seen), layer(x))


def test_soft_resets_and_equal_potentials_go_through_the_metadata(tmp_path):
    """NIR has no field for them: a file for this package says them beside its nodes."""
    amount = torch.rand(3) + 0.2
    for layer in (
        snn.LIF(0.8, 0.5, v_reset=None),
        snn.LIF(0.8, 0.5, v_reset=None, reset_amount=amount),
        snn.CUBALIF(0.5, 1.0, 0.5, 0.5, v_reset=None, fire_on_equal=True),
        snn.IF(0.25, fire_on_equal=True),
    ):
        x = torch.randint(0, 4, (20, 2, 3)).float()
        out, graph = equal_spikes(layer, (3,), tmp_path, x=x, dialect="trtkern")
        assert 0 < out.mean() < 1
        hard = from_nir(graph, dt=DT, reset="hard", fire_on_equal=False)
        assert not torch.equal(hard(x), out)
        # What the metadata say holds in every dialect.
        assert torch.equal(from_nir(graph, dt=DT)(x), out)


def test_the_code_on_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, PAGE.name, "exec"), names)
    assert "(1): LIF(decay=0.8" in capsys.readouterr().out
    learned = [name for name, _ in names["again"][1].named_parameters()]
    assert learned == ["v_threshold.raw", "decay.raw"] and isinstance(names["recurrent"], NodeGraph)


def test_the_page_names_every_node_dialect_and_argument():
    page = PAGE.read_text()
    wanted = [*DIALECTS, *(name for name in nir.ir.__all__ if name[0].isupper() and name != "NIRNode"), "round_delays"]
    assert [name for name in wanted if name not in page] == []


def test_the_model_stays_as_it_was():
    model = a_network().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    to_nir(model, (2, 8, 8), dt=DT, dialect="nir")
    assert not model.training and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
