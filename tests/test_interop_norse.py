"""Norse's neurons, its containers and networks before and after ``trtkern.interop.convert``."""

import copy
import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from trtkern import interop, reference
from trtkern.interop import norse as rows

norse = pytest.importorskip("norse.torch")
from norse.torch.functional.reset import reset_subtract  # noqa: E402
from norse.torch.functional.threshold import threshold  # noqa: E402
from norse.torch.models.conv import ConvNet  # noqa: E402

T, B, C = 9, 3, 5


def t(value):
    return torch.as_tensor(value)


def lif(**p):
    return norse.LIFParameters(**{"tau_mem_inv": t(300.0), **p})


def vector(low=150.0, high=900.0):
    return torch.linspace(low, high, C)


LAYERS = {
    "LIF": lambda: norse.LIF(lif()),
    "LIF of other numbers": lambda: norse.LIF(
        lif(tau_syn_inv=t(400.0), v_leak=t(0.3), v_th=t(0.7), v_reset=t(-0.2)), dt=0.002
    ),
    "LIF each": lambda: norse.LIF(lif(tau_mem_inv=vector(), v_th=vector(0.3, 0.9))),
    "LIF at once": lambda: norse.LIF(lif(tau_syn_inv=t(1000.0))),
    "LSNN": lambda: norse.LSNN(norse.LSNNParameters(tau_mem_inv=t(500.0), tau_adapt_inv=t(100.0), beta=t(0.5))),
    "LSNN of other numbers": lambda: norse.LSNN(
        norse.LSNNParameters(tau_syn_inv=t(400.0), v_leak=t(0.2), v_th=t(0.6), v_reset=t(-0.1), beta=t(0.3))
    ),
    "IAF": lambda: norse.IAF(norse.IAFParameters(v_th=t(2.0), v_reset=t(-0.5))),
    "LI": lambda: norse.LI(),
    "LI that leaks to": lambda: norse.LI(norse.LIParameters(v_leak=t(0.4), tau_mem_inv=t(500.0))),
}
CELLS = {
    "LIFCell": lambda: norse.LIFCell(lif()),
    "LIFCell of other numbers": lambda: norse.LIFCell(lif(v_leak=t(0.3), v_th=t(0.7), v_reset=t(-0.2)), dt=0.002),
    "LIFBoxCell": lambda: norse.LIFBoxCell(norse.LIFBoxParameters(tau_mem_inv=t(400.0), v_th=t(0.4))),
    "LIFBoxCell of other numbers": lambda: norse.LIFBoxCell(
        norse.LIFBoxParameters(tau_mem_inv=400.0, v_leak=t(0.2), v_th=0.4, v_reset=-0.3)
    ),
    "LIFBoxCell subtracting": lambda: norse.LIFBoxCell(
        norse.LIFBoxParameters(tau_mem_inv=t(400.0), v_th=t(0.4), reset_method=reset_subtract)
    ),
    "LSNNCell": lambda: norse.LSNNCell(norse.LSNNParameters(tau_mem_inv=t(500.0), tau_adapt_inv=t(100.0), beta=t(0.5))),
    "IAFCell": lambda: norse.IAFCell(norse.IAFParameters(v_th=t(2.0), v_reset=t(-0.5))),
    "LICell": lambda: norse.LICell(),
    "LIBoxCell": lambda: norse.LIBoxCell(),
    "LILinearCell": lambda: norse.LILinearCell(C, C),
}
ALL = {**LAYERS, **CELLS}


def stepped(cell, x, state=None):
    """A cell over the steps of x, and its last state."""
    made = []
    for step in x:
        y, state = cell(step, state)
        made.append(y)
    return torch.stack(made), state


def whole(layer, x, state=None):
    return layer(x, state)


def differentiated(run, layer, x, state=None, parameters=()):
    """Outputs, the parts of the last state, and the gradients of one loss of them."""
    x = x.clone().requires_grad_()
    y, last = run(layer, x, state)
    parts = [y, *last]
    generator = torch.Generator().manual_seed(1)
    loss = sum((p * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)).sum() for p in parts)
    wanted = [x, *layer.parameters(), *(state or ()), *parameters]
    return parts, torch.autograd.grad(loss, wanted), type(last)


def current(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return 1.5 * torch.randn(*shape, dtype=dtype) + 0.7


def compare(before, after, run, x, state=None):
    made, grads, kind = differentiated(run, before, x, state)
    again, others, other_kind = differentiated(run, after, x, state)
    assert kind is other_kind
    assert torch.equal(made[0], again[0]) or not is_spikes(made[0])
    for one, other in zip((*made, *grads), (*again, *others), strict=True):
        one = one.expand_as(other)
        assert torch.allclose(one.to(other), other, 1e-9, 1e-11)
    return made[0]


def is_spikes(y):
    return bool(((y == 0) | (y == 1)).all())


@pytest.mark.parametrize("name", ALL)
def test_a_neuron_gives_the_same_with_the_same_gradients(name):
    torch.manual_seed(0)
    before = ALL[name]().double()
    after = interop.convert(copy.deepcopy(before), strict=True)
    run = whole if name in LAYERS else stepped
    y = compare(before, after, run, current(T, B, C))
    assert not is_spikes(y) or 0.05 < y.mean() < 0.95


@pytest.mark.parametrize("name", ALL)
def test_a_sequence_goes_on_from_a_state(name):
    torch.manual_seed(0)
    before = ALL[name]().double()
    after = interop.convert(copy.deepcopy(before), strict=True)
    run, x = whole if name in LAYERS else stepped, current(T, B, C)
    with torch.no_grad():
        _, state = run(before, x[:4])
        _, other = run(after, x[:4])
    assert type(state) is type(other) and state._fields == other._fields
    for part, twin in zip(state, other, strict=True):
        assert torch.allclose(part.to(twin), twin, 1e-9, 1e-12)
    drawn = [torch.randn_like(part.expand(B, C)).double().requires_grad_() for part in state]
    compare(before, after, run, x[4:], type(state)(*drawn))
    compare(before, after, run, x[:1], type(state)(*drawn))


@pytest.mark.parametrize("name", ALL)
def test_in_float32_spikes_differ_only_where_rounding_decides(name):
    torch.manual_seed(0)
    before = ALL[name]()
    after = interop.convert(copy.deepcopy(before), strict=True)
    run, x = whole if name in LAYERS else stepped, current(T, B, C, dtype=torch.float32)
    made, grads, _ = differentiated(run, before, x)
    again, others, _ = differentiated(run, after, x)
    exact, wanted, _ = differentiated(run, copy.deepcopy(before).double(), x.double())
    if is_spikes(made[0]):
        assert torch.equal(made[0], again[0])
    for old, new, true in zip((*made[1:], *grads), (*again[1:], *others), (*exact[1:], *wanted), strict=True):
        allowed = max(1e-5 * true.abs().max(), 4 * (old - true).abs().max())
        assert (new - true).abs().max() <= allowed


@pytest.mark.parametrize("name", CELLS)
def test_over_time_runs_the_steps_of_a_cell_at_once(name):
    torch.manual_seed(0)
    before = CELLS[name]().double()
    after = interop.over_time(interop.convert(nn.ModuleList([before]))[0])
    x = current(T, B, C)
    y, state = after(x)
    assert state is None and torch.allclose(y, stepped(before, x)[0].to(y), 1e-10, 1e-12)
    with pytest.raises(ValueError, match="begin anew, got a state"):
        interop.over_time(Stated(interop.convert(before)))(x)


class Stated(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        return self.cell(x, torch.zeros(1))


@pytest.mark.parametrize("shape", [(T, C), (T, B, C, 2, 2)])
@pytest.mark.parametrize("name", ["LIF", "LSNN", "LI", "LIFCell", "LIFBoxCell"])
def test_other_ranks(name, shape):
    before = ALL[name]().double()
    after = interop.convert(copy.deepcopy(before), strict=True)
    run, x = whole if name in LAYERS else stepped, current(*shape)
    compare(before, after, run, x)
    with torch.no_grad():
        _, state = run(before, x[:4])
    compare(
        before, after, run, x[4:], type(state)(*(p.expand(shape[1:]).double().clone().requires_grad_() for p in state))
    )


TRAINED = {
    "LIF": ("tau_syn_inv", "tau_mem_inv", "v_leak", "v_th", "v_reset"),
    "LIFCell": ("tau_mem_inv", "v_th"),
    "LIFBoxCell": ("tau_mem_inv", "v_leak", "v_th", "v_reset"),
    "LIFBoxCell subtracting": ("tau_mem_inv", "v_th"),
    "LSNN": ("tau_syn_inv", "tau_mem_inv", "tau_adapt_inv", "v_th", "v_reset", "beta"),
    "LICell": ("tau_syn_inv", "tau_mem_inv"),
    "LIBoxCell": ("tau_mem_inv",),
    "IAF": ("v_th",),
}


@pytest.mark.parametrize("name", TRAINED)
def test_parameters_that_are_trained_stay_the_user_s(name):
    before = ALL[name]()
    values = {field: nn.Parameter(t(float(getattr(before.p, field))).double()) for field in TRAINED[name]}
    if "v_leak" in values:
        values["v_leak"] = nn.Parameter(t(0.125).double())  # as the library's float32 has it
    before.p = before.p._replace(**values)
    after = interop.convert(copy.copy(before), strict=True)
    run, x = whole if name in LAYERS else stepped, current(T, B, C)
    for _ in range(2):
        made, grads, _ = differentiated(run, before, x, parameters=values.values())
        again, others, _ = differentiated(run, after, x, parameters=values.values())
        for one, other in zip((*made, *grads), (*again, *others), strict=True):
            assert other.abs().max() > 0 or one.abs().max() == 0
            assert torch.allclose(one.expand_as(other).to(other), other, 1e-8, 1e-10)
        with torch.no_grad():
            for value in values.values():
                value.mul_(0.5)
    twin = copy.deepcopy(after)
    assert all(torch.equal(a, b) for a, b in zip(run(twin, x)[0], run(after, x)[0], strict=True))


@pytest.mark.parametrize("method", rows.SURROGATES)
def test_a_surrogate_is_the_library_s(method):
    u = (torch.arange(-300, 301, dtype=torch.float64) / 100).requires_grad_()
    for alpha in (0.5, 1.0, 2.0):
        y = threshold(u, method, alpha)
        wanted = torch.autograd.grad(y.sum(), u)[0] if y.requires_grad else torch.zeros_like(u)
        neuron = interop.convert(norse.LIF(norse.LIFParameters(method=method, alpha=t(alpha)))).dynamics.neuron
        found = reference.surrogate_derivative(u.detach(), neuron.spec.surrogate, neuron.spec.alpha)
        assert torch.allclose(torch.as_tensor(found).to(wanted), wanted, 1e-12, 1e-14)


REFUSED = {
    "recurrent": (lambda: norse.LIFRecurrentCell(4, 4), "none"),
    "recurrent layer": (lambda: norse.LSNNRecurrent(4, 4), "none"),
    "another neuron": (lambda: norse.LIFRefracCell(), "none"),
    "izhikevich": (lambda: norse.IzhikevichCell(norse.tonic_spiking), "none"),
    "circ": (lambda: norse.LIF(norse.LIFParameters(method="circ")), "got 'circ'"),
    "adjoint": (lambda: norse.LIFCell(norse.LIFParameters(method="adjoint")), "gradients of another kind"),
    "adjoint LSNN": (lambda: norse.LSNNCell(adjoint=True), "gradients of another kind"),
    "recorded": (lambda: norse.LIF(record_states=True), "record_states=False"),
    "another reset": (lambda: norse.LIFBoxCell(norse.LIFBoxParameters(reset_method=torch.add)), "reset_method"),
    "starts apart": (lambda: norse.LIF(norse.LIFParameters(v_leak=torch.rand(4))), "one potential"),
    "too long a step": (lambda: norse.LIF(norse.LIFParameters(tau_mem_inv=t(1500.0))), "decay"),
    "several alphas": (lambda: norse.LIF(norse.LIFParameters(method="tanh", alpha=torch.rand(3))), "alpha"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_is_named_and_left(name):
    make, message = REFUSED[name]
    node, report = make(), interop.ConvertReport()
    net = norse.SequentialState(norse.LIFCell(), node)
    kept = list(net)
    with pytest.raises(ValueError, match=r"changed nothing: '1': norse\."):
        interop.convert(net, strict=True)
    assert list(net) == kept
    interop.convert(net, report)
    assert net[1] is node and net[0] is not kept[0] and list(report.left) == ["1"]
    assert message in report.left["1"] and type(node).__name__ in report.left["1"]


def test_a_class_of_the_user_s_is_left():
    class Mine(norse.LIFCell):
        pass

    report = interop.ConvertReport()
    interop.convert(norse.SequentialState(Mine()), report)
    assert "expected LIFCell itself" in report.left["0"]


def cells():
    """A network of one step, as Norse's tutorials write it."""
    return norse.SequentialState(
        nn.Conv2d(1, 6, 5), norse.LIFCell(lif(v_th=t(0.2))), nn.MaxPool2d(2), nn.Conv2d(6, 8, 5),
        norse.LIFCell(lif(v_th=t(0.2))), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 10, bias=False), norse.LICell(),
    )  # fmt: skip


def layers():
    """The same over sequences, whose layers without a state are lifted."""
    return norse.SequentialState(
        norse.Lift(nn.Sequential(nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6))), norse.LIF(lif(v_th=t(0.2))),
        norse.Lift(nn.MaxPool2d(2)), nn.Flatten(2), norse.Lift(nn.Linear(6 * 36, 10)), norse.LI(),
    )  # fmt: skip


def first(net, x):
    return net(x)[0]


def test_a_network_of_one_step_over_time():
    torch.manual_seed(0)
    before = cells().double()
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(before), report, strict=True)
    assert list(report.converted) == report.stepping == ["1", "4", "8"]
    x = 4 * torch.rand(T, B, 1, 16, 16, dtype=torch.float64)
    for run, net in ((loop, after), (first, interop.over_time(after))):
        result = interop.check(before, net, x, run=loop, run_after=run)
        assert result.within(1e-10, 1e-9) and result.fired > 0.5 and len(result.gradients) == 6, str(result)


def loop(net, x):
    return stepped(net, x)[0]


def test_a_network_of_lifted_layers():
    torch.manual_seed(0)
    before = layers().double()
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(before), report, strict=True)
    assert list(report.converted) == ["0", "1", "2", "4", "5"] and not report.stepping
    x = 4 * torch.rand(T, B, 1, 16, 16, dtype=torch.float64)
    result = interop.check(before, after, x, run=first)
    assert result.within(1e-10, 1e-9) and result.fired > 0.5 and len(result.gradients) == 7, str(result)
    before(x), after(x)
    for name, value in before.named_buffers():
        assert torch.allclose(value.double(), after.get_buffer(name).double(), 1e-12), name
    assert after.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize("given", [False, True])
def test_a_lifted_network_of_one_step(given):
    torch.manual_seed(0)
    before = norse.Lift(cells()).double()
    after = interop.convert(copy.deepcopy(before), strict=True)
    x = 4 * torch.rand(T, B, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        state = before(x)[1] if given else None
    y, last = before((x, copy.copy(state)))
    z, other = after((x, copy.copy(state)))
    assert torch.allclose(y, z, 1e-10, 1e-11)
    for one, two in zip(last, other, strict=True):
        assert (one is None) == (two is None)
        for a, b in zip(one or (), two or (), strict=True):
            assert torch.allclose(a, b, 1e-10, 1e-11)
    assert type(after).__name__ == "FoldedLift" and after.state_dict().keys() == before.state_dict().keys()


def test_lifted_cells_and_sequences_without_a_batch():
    for module, shape in (
        (norse.LIFCell(lif()), (T, B, C)),
        (nn.Conv2d(2, 3, 3), (T, 2, 8, 8)),
        (nn.Linear(4, 3), (T, 4)),
    ):
        before = norse.Lift(module)
        after = interop.convert(copy.deepcopy(before), strict=True)
        x = current(*shape, dtype=torch.float32)
        y, z = before(x), after(x)
        assert type(after).__name__ == "FoldedLift"
        for one, two in zip(*((y, z) if isinstance(y, tuple) else ((y,), (z,))), strict=True):
            assert torch.allclose(one[0], two[0], 1e-6, 1e-6)


def test_what_may_mix_rows_stays_in_its_loop():
    class Mine(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    counted = nn.BatchNorm1d(2, momentum=None)
    cell = norse.SequentialState(norse.LIFCell(), Mine())
    hidden = norse.SequentialState(norse.LIFCell(), return_hidden=True)
    recurrent = norse.LIFRecurrentCell(2, 2)
    for inner in (Mine(), nn.Flatten(0), nn.Softmax(0), hooked, counted, cell, hidden, recurrent, nn.RNN(2, 2)):
        net = nn.ModuleList([norse.Lift(inner)])
        interop.convert(net)
        assert type(net[0]) is norse.Lift and net[0].lifted_module is inner
    assert not isinstance(cell[0], norse.LIFCell)  # what stands in it converts


def test_the_library_s_convolutional_network():
    torch.manual_seed(0)
    before = ConvNet(feature_size=28, method="super", dtype=torch.float64).double()
    for layer in (before.conv1, before.conv2, before.fc1):
        layer.weight.data.mul_(6)
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(before), report, strict=True)
    assert set(report.converted) == {"lif0", "lif1", "lif2", "out"}
    x = 2 * torch.rand(6, 2, 1, 28, 28, dtype=torch.float64)
    result = interop.check(before, after, x)
    assert result.within(1e-10, 1e-9) and "out.input_weights" in result.unmatched, str(result)


@pytest.mark.parametrize("name", ["LIF", "LSNN", "LIFCell", "LILinearCell"])
def test_copies_and_files(name):
    torch.manual_seed(0)
    after = interop.convert(ALL[name]())
    run, x = whole if name in LAYERS else stepped, current(T, B, C, dtype=torch.float32)
    for twin in (copy.deepcopy(after), pickle.loads(pickle.dumps(after))):
        assert torch.equal(run(twin, x)[0], run(after, x)[0])


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "from_norse.py"))
    said = capsys.readouterr().out
    before, after = (re.search(rf"{name}: ([0-9.-]+)", said)[1] for name in ("Norse", "trtkern"))
    assert float(before) == pytest.approx(float(after), rel=1e-3) and float(before) != 0
    assert float(said.split()[-1]) < 1e-3
