"""NIR: what has no equal is refused by name, all of it together, and nothing is half converted."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from trtkern import nn as snn
from trtkern.interop.nir import NodeGraph, Scale, from_nir, to_nir
from trtkern.models import sew_resnet34

nir = pytest.importorskip("nir")

N = np.array([3])


def full(value):
    return np.full(3, float(value))


def lif(**changed):
    numbers = {"tau": 0.01, "r": 1.0, "v_leak": 0.0, "v_threshold": 1.0, "v_reset": 0.0, **changed}
    return nir.LIF(**{name: full(value) for name, value in numbers.items()})


def graph_of(nodes, edges):
    nodes = {"input": nir.Input(N), **nodes, "output": nir.Output(N)}
    return nir.NIRGraph(nodes, [tuple(edge.split()) for edge in edges], type_check=False)


def chain(node):
    return graph_of({"node": node}, ["input node", "node output"])


class Strange(nir.ir.node.NIRNode):
    def __init__(self):
        self.input_type, self.output_type, self.metadata = {"input": N}, {"output": N}, {}


LAYERS = [
    (snn.LIF(v_reset=None), (3,), r"\(LIF\): expected a hard reset.*got a soft reset.*dialect='trtkern'"),
    (snn.LIF(fire_on_equal=True), (3,), "firing above the threshold, got fire_on_equal=True"),
    (snn.ALIF(), (3,), r"\(ALIF\): expected LIF, IF, PLIF, LI, CUBALIF, CUBALI or Threshold, got ALIF"),
    (snn.QIF(), (3,), r"\(QIF\)"),
    (snn.LIF(time_dim=1), (3,), "time on axis 0, got time_dim=1"),
    (snn.LIF(torch.tensor([0.5, 1.0, 0.5])), (3,), "decay < 1, got decay of 1; take IF"),
    (snn.CUBALIF(decay=1.0), (3,), "decay < 1"),
    (snn.CUBALIF(decay_syn=1.0), (3,), "decay_syn < 1"),
    (snn.LIF(torch.full((4,), 0.5)), (3,), r"decay to have a number for each channel, got \(4,\) along axis 0"),
    (snn.TimeSequential(nn.Conv2d(4, 4, 3, groups=2)), (4, 8, 8), "groups=1, got a grouped convolution, groups=2"),
    (snn.TimeSequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), (4, 8, 8), "padding_mode='zeros'"),
    (snn.TimeSequential(nn.Conv2d(2, 4, 3)), (4, 8, 8), "2 channels and 2 axes of space"),
    (snn.TimeSequential(nn.Conv2d(2, 4, 3)), (2, 2, 2), "an image that the kernel fits into"),
    (nn.Sequential(nn.Conv2d(2, 4, 3)), (2, 8, 8), "put it into TimeSequential or OverTime"),
    (snn.TimeSequential(nn.MaxPool2d(2)), (2, 8, 8), r"'0' \(MaxPool2d\): expected a layer that has a node in NIR"),
    (snn.TimeSequential(nn.AvgPool2d(2, ceil_mode=True)), (2, 8, 8), "ceil_mode=False"),
    (snn.TimeSequential(nn.AvgPool2d(2, padding=1, count_include_pad=False)), (2, 8, 8), "count_include_pad=True"),
    (snn.TimeSequential(nn.AvgPool2d(2, divisor_override=3)), (2, 8, 8), "divisor_override of None or 1, got 3"),
    (snn.TimeSequential(nn.AdaptiveAvgPool2d(3)), (2, 8, 8), "an output size that divides the image"),
    (snn.TimeSequential(nn.BatchNorm2d(2)), (2, 8, 8), "a norm in evaluation, got one in training; call model.eval()"),
    (snn.BatchNormLIF(2), (2, 8, 8), "a norm in evaluation"),
    (snn.TimeSequential(nn.BatchNorm2d(2, track_running_stats=False)).eval(), (2, 8, 8), "running statistics"),
    (nn.BatchNorm1d(4).eval(), (4,), r"a norm over T \* B samples"),
    (nn.Sequential(nn.Linear(3, 3), nn.Dropout()), (3,), "dropout in evaluation"),
    (nn.Linear(4, 2), (3,), r"a vector of 4, got \(3,\)"),
    (nn.Linear(3, 2), (5, 3), r"a vector of 3, got \(5, 3\)"),
    (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (3,), r"'1' \(ReLU\)"),
    (nn.Sequential(nn.Flatten(1)), (3, 4), r"time and batch to stay axes of their own.*take Flatten\(2\)"),
    (Scale(torch.ones(4)), (3,), "a scale that fits"),
    (snn.Delay(4, 2, torch.ones(4)), (3,), "delays that fit"),
    (snn.Delay(3, 2, 1.25), (3,), r"delays of whole steps, got 1.25 steps; call its round_\(\)"),
    (snn.Delay(3, 2, 1.0, time_dim=1), (3,), "time on axis 0"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "shape", "message"), LAYERS)
def test_layers_without_an_equal(model, shape, message):
    with pytest.raises(ValueError, match=message):
        to_nir(model, shape, dt=1e-3)


def test_a_decay_of_zero_has_no_time_constant_in_the_exponential_method():
    with pytest.raises(ValueError, match=r"decay > 0 with the exponential method, got decay of 0; .*method='euler'"):
        to_nir(snn.LIF(0.0), 3, dt=1e-3, method="exponential")


def test_all_of_it_is_named_together():
    model = snn.TimeSequential(nn.Conv2d(2, 4, 3, groups=2), nn.MaxPool2d(2), snn.CLIF(), snn.LIF(v_reset=None))
    with pytest.raises(ValueError) as raised:
        to_nir(model, (2, 8, 8), dt=1e-3)
    first, *lines = str(raised.value).splitlines()
    assert first == "to_nir: 2 problems, and nothing was converted:"  # behind the pooling no shape is known
    assert [line.split("'")[1] for line in lines] == ["0", "1"]
    with pytest.raises(ValueError, match=r"'layers.1.module' \(MaxPool2d\)"):
        to_nir(sew_resnet34(shape=(3, 32, 32), width=8).eval(), (3, 32, 32), dt=1e-3)


def test_code_that_is_no_sum_of_layers():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif, self.fc = snn.LIF(), nn.Linear(3, 3)

        def forward(self, x):
            return self.lif(x) * self.fc(x)

    class Asks(Product):
        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    class Gives(Product):
        def forward(self, x):
            return self.lif(x, return_state=True)

    for kind, message in (
        (Product, r"'mul' \(Product\): expected sums and layers, got mul\(x, x\)"),
        (Asks, "can trace"),
        (Gives, "a call with one input"),
    ):
        with pytest.raises(ValueError, match=message):
            to_nir(kind(), 3, dt=1e-3)


ARGUMENTS = [
    ({"dt": 0.0}, ValueError, "dt to be finite and > 0, got 0.0"),
    ({"dt": "1"}, TypeError, "dt to be a number"),
    ({"dt": float("nan")}, ValueError, "dt to be finite"),
    ({"unit": "m"}, ValueError, "unit to be one of 's', 'ms', 'us', 'ns', got 'm'"),
    ({"graph_unit": "steps"}, ValueError, "graph_unit to be one of"),
    ({"method": "rk4"}, ValueError, "method to be one of 'euler', 'exponential'"),
    ({"dialect": "lava"}, ValueError, "dialect to be one of 'nir', 'trtkern', 'spikingjelly'"),
    ({"dialect": "snntorch"}, ValueError, "dt = 0.0001 s, which this library has in its source, got 0.001 s"),
]


@pytest.mark.parametrize(("changed", "error", "message"), ARGUMENTS)
def test_arguments(changed, error, message):
    settings = {"dt": 1e-3, **changed}
    with pytest.raises(error, match=f"to_nir: expected {message}"):
        to_nir(snn.LIF(), 3, **settings)
    with pytest.raises(error, match=f"from_nir: expected {message}"):
        from_nir(chain(lif()), **settings)


def test_arguments_of_one_of_them():
    for shape in ((), (3, 0), "3", (2.0,), True):
        with pytest.raises(TypeError, match="input_shape as"):
            to_nir(snn.LIF(), shape, dt=1e-3)
    with pytest.raises(TypeError, match="to_nir: expected a model"):
        to_nir(lambda x: x, 3, dt=1e-3)
    with pytest.raises(TypeError, match=r"a nir.NIRGraph or the path of one, got LIF; .*from_list"):
        from_nir(lif(), dt=1e-3)
    with pytest.raises(ValueError, match=r"learn to hold one of .*, got alpha"):
        from_nir(chain(lif()), dt=1e-3, learn=("decay", "alpha"))
    with pytest.raises(ValueError, match="reset to be 'hard', 'soft' or None"):
        from_nir(chain(lif()), dt=1e-3, reset="zero")
    with pytest.raises(ValueError, match="expected one of triangle"):
        from_nir(chain(lif()), dt=1e-3, surrogate="trianglr")
    with pytest.raises(FileNotFoundError):
        from_nir("nowhere.nir", dt=1e-3)


NODES = [
    (Strange(), r"'node' \(Strange\): expected a node that has an equal here .*got Strange; replace it"),
    (lif(tau=0.0), "tau > 0, got 0"),
    (lif(tau=0.0005), "tau of at least one step, 0.001, got 0.0005.*method='exponential'"),
    (lif(v_threshold=-1.0), "v_threshold >= 0, got -1"),
    (lif(r=np.nan), "r to be finite, got nan"),
    (nir.Affine(weight=np.ones((2, 3, 3)), bias=np.ones(3)), r"a weight \(out, in\), got the shape \(2, 3, 3\)"),
    (nir.Conv1d(None, np.ones((3, 1, 3, 3)), 1, 0, 1, 1, np.ones(3)), "a weight with 3 axes"),
    (nir.Conv2d(None, np.ones((3, 1, 3, 3)), 1, 0, 1, 2, np.ones(3)), "groups that divide the channels, got 2 of 3"),
    (nir.Conv2d(None, np.ones((3, 1, 3, 3)), 2, "same", 1, 1, np.ones(3)), "a convolution that torch has"),
    (nir.Delay(delay=full(-1.0)), "finite delays >= 0"),
    (nir.Affine(weight=np.ones((4, 3)), bias=np.ones(4)), None),
]


@pytest.mark.parametrize(("node", "message"), [row for row in NODES if row[1]])
def test_nodes_without_an_equal(node, message):
    with pytest.raises(ValueError, match=f"from_nir: 1 problem, and nothing was converted:\n  .*{message}"):
        from_nir(chain(node), dt=1e-3)


GRAPHS = [
    (["input a", "a b", "b output"], {"a": nir.Affine(np.ones((4, 3)), np.ones(4)), "b": lif()},
     r"'b' \(LIF\): expected 3 numbers, got 4 from 'a'"),
    (["input a", "a b", "b a", "b output"], {"a": nir.Linear(np.ones((3, 3))), "b": nir.Linear(np.ones((3, 3)))},
     r"cycle .* -> .* -> .*: expected a state in it.*put a neuron or a Delay there"),
    (["input a", "a a", "a output"], {"a": nir.Scale(full(1.0))}, "cycle a -> a: expected a state"),
    (["input a", "a a", "a output"], {"a": nir.Delay(full(0.0002))}, "cycle a -> a: expected a state"),
    (["input a", "a nowhere", "a output"], {"a": lif()}, r"'nowhere' \(edge\): expected the name of a node"),
    (["input a", "b output"], {"a": lif(), "b": lif()}, "node 'b': expected a way from the input to it"),
    (["input a", "a output", "a b"], {"a": lif(), "b": lif()}, "node 'b': expected a way from it to the output"),
    (["input a", "a output"], {"a": lif(), "more": nir.Input(N)}, "expected one Input, got 'input', 'more'"),
    (["input a"], {"a": lif()}, r"'output' \(Output\): expected an edge at it"),
    (["input a", "a output"], {"a": graph_of({"b": lif(), "c": nir.Output(N)}, ["input b", "b output", "b c"])},
     r"'a' \(NIRGraph\): expected one Output, got 'c', 'output'"),
]  # fmt: skip


@pytest.mark.parametrize(("edges", "nodes", "message"), GRAPHS)
def test_graphs_that_do_not_hold_together(edges, nodes, message):
    with pytest.raises(ValueError, match=message):
        from_nir(graph_of(nodes, edges), dt=1e-3, round_delays=True)


def test_a_path_in_a_graph_in_a_graph():
    inner = graph_of({"cell": lif(tau=-1.0), "other": Strange()}, ["input cell", "cell other", "other output"])
    with pytest.raises(ValueError) as raised:
        from_nir(chain(inner), dt=1e-3)
    first, *lines = str(raised.value).splitlines()
    assert first.startswith("from_nir: 2 problems") and lines[0].startswith("  'node.cell' (LIF)") and len(lines) == 2


def test_a_node_graph_says_what_is_wrong_with_it():
    with pytest.raises(ValueError, match=r"NodeGraph: edge \('input', 'b'\): expected the names of nodes, got 'b'"):
        NodeGraph({"a": snn.LIF()}, [("input", "b")])
    model = NodeGraph({"a": snn.LIF()}, [("input", "a"), ("a", "output")])
    with pytest.raises(ValueError, match=r"NodeGraph: expected x \[T, B, ...\]"):
        model(torch.rand(3))


READERS = [
    ("spikingjelly", snn.LIF(v_leak=0.2), "v_leak = v_reset"),
    ("spikingjelly", snn.CUBALIF(v_leak=0.2), "v_leak = 0"),
    ("spikingjelly", snn.LI(), "a node that the reader of spikingjelly knows .*got LI"),
    ("spikingjelly", snn.LIF(gain=-1.0), "gains > 0"),
    ("snntorch", snn.IF(), r"'if' \(IF\): expected a node that the reader of snntorch knows"),
    ("snntorch", snn.LIF(v_reset=0.1), "v_reset = 0, to which this reader resets"),
    ("norse", snn.LI(), "got LI"),
    ("sinabs", snn.LIF(), "a soft reset .*which this reader makes of all"),
    ("sinabs", snn.LIF(v_reset=None, reset_amount=0.3), "a soft reset by the threshold"),
    ("sinabs", snn.LI(0.5, 0.5), "gain = 1, which this reader gives to every LI"),
    ("sinabs", snn.LI(0.5, v_leak=0.5), "v_leak = 0"),
    ("sinabs", snn.CUBALIF(v_reset=None), "a node that the reader of sinabs knows .*got CubaLIF"),
]


@pytest.mark.parametrize(("dialect", "layer", "message"), READERS)
def test_what_a_reader_would_take_for_something_else(dialect, layer, message):
    with pytest.raises(ValueError, match=message):
        to_nir(layer, 3, dt=1e-4, dialect=dialect)


def test_sinabs_reads_no_lif_over_images():
    with pytest.raises(ValueError, match=r"a vector, since this reader fails on others, got \(2, 4, 4\); take IF"):
        to_nir(snn.LIF(v_reset=None), (2, 4, 4), dt=1e-3, dialect="sinabs")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    for call in (lambda: to_nir(snn.LIF(), 3, dt=1e-3), lambda: from_nir("a.nir", dt=1e-3)):
        with pytest.raises(ImportError, match=r"expected the package nir >= 1.0.8, got none .*'trtkern\[interop\]'"):
            call()


def test_an_old_package_is_named(monkeypatch):
    monkeypatch.setattr(nir, "version", "1.0.4")
    with pytest.raises(ImportError, match=r"expected nir >= 1.0.8, got 1.0.4"):
        to_nir(snn.LIF(), 3, dt=1e-3)
    monkeypatch.setattr(nir, "version", "1.1.dev3")
    to_nir(snn.LIF(), 3, dt=1e-3)
