"""``trtkern.interop`` on sinabs: every layer and setting that converts against sinabs itself, and those that do not."""

import copy
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from trtkern import interop

sinabs = pytest.importorskip("sinabs")
sl = pytest.importorskip("sinabs.layers")
sa = pytest.importorskip("sinabs.activation")

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "from_sinabs.py"
SURROGATES = (
    sa.SingleExponential(),
    sa.SingleExponential(0.7, 2.0),
    sa.Gaussian(),
    sa.Gaussian(0.1, 0.3, 2.0),
    sa.MultiGaussian(),
    sa.MultiGaussian(0.2, 0.4, 0.2, 5.0, 1.5),
    sa.Heaviside(0.6),
)
RESETS = (sa.MembraneSubtract(), sa.MembraneSubtract(0.8), sa.MembraneReset())
ONE = {"spike_fn": sa.SingleSpike}


class As(nn.Module):
    """The spikes in another type: sinabs gives float32 for whatever it gets."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def currents(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return (2 * torch.randn(*shape, dtype=torch.float64) + 0.5).to(dtype)


def gradients_of(net, x):
    """Of a loss that weighs every output, by name."""
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    y = net(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * weights.to(y)).sum().backward()
    return {"input": x.grad.double(), **{n: p.grad.double() for n, p in net.named_parameters() if p.grad is not None}}


def compared(layer, x, names, outputs=0.0):
    """Converted and compared, with every parameter.

    In float64 the gradients are equal to 1e-5. In float32, where a gradient that is a sum of large numbers of both
    signs is off in sinabs too, they are as far from those of float64 as sinabs' own are, and 1e-5 more at most.
    """
    before = nn.Sequential(layer).to(x.dtype)
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(before), report, strict=True)
    assert list(report.converted) == ["0"] and not report.left and not report.stepping
    result = interop.check(before, after, x)
    assert result.outputs <= outputs and result.fired > 0.05, f"{report}\n{result}"
    assert set(result.gradients) == {*(f"0.{name}" for name in names), "input"} and not result.unmatched
    if x.dtype == torch.float64:
        assert result.within(outputs), f"{report}\n{result}"
        return
    truth = gradients_of(copy.deepcopy(before).double(), x.double())
    theirs, ours = gradients_of(before, x), gradients_of(after, x)
    for name, exact in truth.items():
        far = [(each[name] - exact).abs().max() for each in (theirs, ours)]
        assert far[1] <= far[0] + 1e-5 * exact.abs().max(), f"{name}: {far}\n{report}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tau_syn", [None, "a channel"])
@pytest.mark.parametrize("reset", RESETS, ids=repr)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_lif_with_every_surrogate_and_reset(surrogate, reset, tau_syn, dtype):
    """In float32 each surrogate comes with each reset once, with tau_syn or without."""
    if dtype == torch.float32 and (SURROGATES.index(surrogate) + RESETS.index(reset) + (tau_syn is None)) % 2:
        pytest.skip("in float32 the other of the two comes")
    # A value a channel: of a single one the gradient may be all but 0, a sum of larger numbers of both signs.
    taus = torch.linspace(3.0, 8.0, 6)
    tau_syn = None if tau_syn is None else taus.flip(0)
    layer = sl.LIF(taus, tau_syn, torch.tensor(0.4), sa.SingleSpike, reset, surrogate_grad_fn=surrogate)
    names = ("tau_mem",) if tau_syn is None else ("tau_mem", "tau_syn")
    compared(layer, currents(3, 20, 6, dtype=dtype), names)


@pytest.mark.parametrize("norm_input", [True, False])
@pytest.mark.parametrize("train_alphas", [True, False])
def test_learned_parameters_stay_the_same_objects_and_learn_the_same(norm_input, train_alphas):
    layer = sl.LIF(
        torch.linspace(2.0, 9.0, 6), torch.tensor(3.0), train_alphas=train_alphas, norm_input=norm_input, **ONE
    )
    before = nn.Sequential(nn.Linear(5, 6), layer, As(torch.float64), nn.Linear(6, 4)).double()
    after = copy.deepcopy(before)
    held = dict(after.named_parameters())
    held.pop("1.spike_threshold")
    after = interop.convert(after, strict=True)
    assert {name: id(p) for name, p in after.named_parameters()} == {name: id(p) for name, p in held.items()}
    x, losses = currents(4, 15, 5), ([], [])
    for net, kept in zip((before, after), losses, strict=True):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
        for _ in range(6):
            sinabs.reset_states(net)
            sinabs.zero_grad(net)
            optimizer.zero_grad()
            loss = (net(x).mean(1) - 1).square().sum()
            loss.backward()
            optimizer.step()
            kept.append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert losses[0][-1] < losses[0][0]
    for name in held:
        torch.testing.assert_close(after.get_parameter(name), before.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("layer", "names", "shape"),
    [
        (lambda: sl.IAF(**ONE), (), (3, 12, 4, 5, 5)),
        (lambda: sl.IAF(tau_syn=2.0, **ONE), ("tau_syn",), (3, 12, 4)),
        (lambda: sl.IAF(spike_fn=sa.MaxSpike(1), spike_threshold=torch.tensor(2.5)), (), (3, 12, 4)),
        (lambda: sl.IAFSqueeze(batch_size=3, **ONE), (), (3 * 7, 2, 4, 4)),
        (lambda: sl.IAFSqueeze(num_timesteps=7, **ONE), (), (3 * 7, 6)),
        (lambda: sl.LIFSqueeze(batch_size=3, tau_mem=4.0, tau_syn=2.0, **ONE), ("tau_mem", "tau_syn"), (3 * 7, 6)),
        (lambda: sl.LIF(tau_mem=torch.rand(4, 1, 1) * 5 + 1, **ONE), ("tau_mem",), (2, 9, 4, 3, 3)),
        (
            lambda: sl.LIF(
                torch.rand(6) * 5 + 1, None, torch.rand(6) + 0.2, sa.SingleSpike, surrogate_grad_fn=sa.Gaussian()
            ),
            ("tau_mem",),
            (2, 9, 6),
        ),
        (lambda: sl.LIF(3.0, spike_threshold=torch.full((6,), 0.7), **ONE), ("tau_mem",), (2, 9, 6)),
        (lambda: sl.ExpLeak(tau_mem=4.0), ("tau_mem",), (3, 12, 5)),
        (lambda: sl.ExpLeak(tau_mem=4.0, norm_input=True, train_alphas=True), ("alpha_mem",), (3, 12, 5)),
        (lambda: sl.ExpLeakSqueeze(tau_mem=4.0, num_timesteps=4), ("tau_mem",), (3 * 4, 5)),
    ],
)  # fmt: skip
def test_the_other_layers_and_shapes(layer, names, shape, dtype):
    torch.manual_seed(3)
    compared(layer(), currents(*shape, dtype=dtype), names, outputs=1e-6)


def quickstart(batch, surrogate=None, dtype=torch.float32, **settings):
    """The network of sinabs' quickstart for N-MNIST, [B * T, 2, 34, 34], with the settings that have an equal here."""
    iaf = {"batch_size": batch, "surrogate_grad_fn": surrogate or sa.SingleExponential(), **ONE, **settings}
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), sl.IAFSqueeze(**iaf), As(dtype), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), sl.IAFSqueeze(**iaf), As(dtype), nn.AvgPool2d(2),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), sl.IAFSqueeze(**iaf), As(dtype),
        nn.Flatten(), nn.Linear(16 * 4 * 4, 10, bias=False), sl.IAFSqueeze(**iaf),
    )  # fmt: skip
    with torch.no_grad():
        for weight in net.parameters():
            if weight.requires_grad:
                weight.mul_(6)
    return net.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_quickstart_network(dtype):
    before = quickstart(2, dtype=dtype)
    x = (torch.rand(2 * 6, 2, 34, 34) < 0.1).to(dtype)
    after = interop.convert(copy.deepcopy(before), strict=True)
    result = interop.check(before, after, x)
    assert result.within() and result.fired > 0.02, result
    assert len(result.gradients) == 5


def test_the_quickstart_network_as_it_is_written_is_left_and_says_what_would_convert():
    net = quickstart(2, sa.PeriodicExponential(), spike_fn=sa.MultiSpike, min_v_mem=-1.0)
    before, report = repr(net), interop.ConvertReport()
    with pytest.raises(ValueError, match=r"'1': sinabs.layers.iaf.IAFSqueeze: expected IAFSqueeze with min_v_mem=None"):
        interop.convert(net, strict=True)
    interop.convert(net, report)
    assert repr(net) == before and list(report.left) == ["1", "5", "9", "13"]


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (lambda: sl.LIF(5.0), "spike_fn=SingleSpike.*got MultiSpike"),
        (lambda: sl.LIF(5.0, spike_fn=sa.MaxSpike(3)), "spike_fn=SingleSpike.*got MaxSpike"),
        (lambda: sl.LIF(5.0, min_v_mem=-1.0, **ONE), "min_v_mem=None, got -1"),
        (lambda: sl.LIF(5.0, record_states=True, **ONE), "record_states=False"),
        (lambda: sl.LIF(5.0, reset_fn=sa.MembraneReset(0.2), **ONE), "adds to the potential of every neuron"),
        (lambda: sl.LIF(5.0, reset_fn=lambda spikes, state, threshold: state, **ONE), "got function"),
        (lambda: sl.LIF(5.0, surrogate_grad_fn=sa.PeriodicExponential(), **ONE), "got PeriodicExponential"),
        (lambda: sl.LIF(5.0, surrogate_grad_fn=lambda v, threshold: v, **ONE), "Heaviside, got function"),
        (lambda: sl.LIF(5.0, spike_threshold=torch.tensor(0.0), **ONE), "spike_threshold > 0"),
        (lambda: sl.LIF(5.0, spike_threshold=torch.tensor([1.0, 2.0]), **ONE), "to have one spike_threshold"),
        (lambda: sl.LIF(-5.0, **ONE), r"decays are in \[0, 1\]"),
        (lambda: sl.LIF(torch.ones(3, 2), **ONE), "one number, or one a channel"),
        (lambda: sl.LIF(torch.ones(3, 1), torch.ones(2), **ONE), "one number, or one a channel"),
        (lambda: sl.LIF(5.0, tau_syn=2.0, spike_fn=None), "tau_syn=None"),
        (lambda: sl.LIFRecurrent(5.0, nn.Linear(3, 3), **ONE), "no recurrent connections"),
        (lambda: sl.IAFRecurrent(nn.Linear(3, 3), **ONE), "no recurrent connections"),
        (lambda: sl.ALIFRecurrent(5.0, 5.0, nn.Linear(3, 3)), "no recurrent connections"),
        (lambda: type("Mine", (sl.LIF,), {"__module__": "mine"})(5.0), "expected LIF itself"),
    ],
)  # fmt: skip
def test_what_has_no_equal_is_left_with_its_path_class_and_reason(layer, says):
    net = nn.Sequential(nn.Linear(2, 3), layer())
    layers = list(net)
    with pytest.raises(ValueError, match=f"'1': .*{says}"):
        interop.convert(net, strict=True)
    report = interop.ConvertReport()
    assert interop.convert(net, report) is net and list(net) == layers and list(report.left) == ["1"]


def test_a_trained_threshold_is_left():
    layer = sl.LIF(5.0, **ONE)
    layer.spike_threshold.requires_grad_()
    with pytest.raises(ValueError, match="spike_threshold is not trained"):
        interop.convert(nn.Sequential(layer), strict=True)


def test_each_call_begins_anew_and_a_sequence_goes_on_from_its_state():
    x = currents(3, 10, 5)
    sinabs_layer = sl.LIF(4.0, 2.0, **ONE).double()
    whole = sinabs_layer(x)
    layer = interop.convert(copy.deepcopy(sinabs_layer))
    assert torch.equal(layer(x), whole) and torch.equal(layer(x), whole)
    first, state = layer(x[:, :4], return_state=True)
    assert torch.equal(torch.cat([first, layer(x[:, 4:], state)], 1), whole)
    state, steps = None, []
    for step in x.unbind(1):
        spikes, state = layer.step(step, state)
        steps.append(spikes)
    assert torch.equal(torch.stack(steps, 1), whole)


def test_a_squeeze_form_has_its_state_and_its_errors():
    x = currents(3, 10, 5)
    layer = interop.convert(sl.IAFSqueeze(batch_size=3, **ONE).double())
    whole = layer(x.flatten(0, 1))
    first, state, h = layer(x[:, :4].flatten(0, 1), return_state=True, return_h=True)
    assert state.shape == (3, 5) and h.shape == first.shape == (12, 5)
    rest = layer(x[:, 4:].flatten(0, 1), state)
    assert torch.equal(torch.cat([first.unflatten(0, (3, 4)), rest.unflatten(0, (3, 6))], 1).flatten(0, 1), whole)
    spikes, v = layer.step(x[:, 0])
    assert torch.equal(spikes, whole.unflatten(0, (3, 10))[:, 0]) and v.shape == (3, 5)
    with pytest.raises(ValueError, match=r"SinabsLIF: expected \[B \* T, ...\] with batch_size=3, got .*\(10, 5\)"):
        layer(x[0])
    with pytest.raises(ValueError, match="expected"):
        layer(x[0, 0, 0])


def test_copies_pickles_and_a_second_conversion():
    net = nn.Sequential(sl.LIF(4.0, surrogate_grad_fn=sa.MultiGaussian(), **ONE)).double()
    after = interop.convert(net, strict=True)
    x, report = currents(2, 8, 3), interop.ConvertReport()
    for twin in (copy.deepcopy(after), pickle.loads(pickle.dumps(after)), interop.convert(after, report)):
        assert torch.equal(twin(x), after(x)) and repr(twin) == repr(after)
    assert not report.converted and not report.left
    twin = interop.convert(nn.Sequential(sl.LIF(7.0, surrogate_grad_fn=sa.MultiGaussian(), **ONE)).double())
    twin.load_state_dict(after.state_dict())
    assert torch.equal(twin(x), after(x))


def test_a_damaged_input_is_answered():
    layer = interop.convert(sl.LIF(torch.ones(4), **ONE))
    with pytest.raises(ValueError, match="expected decay to have 1 or 5 values"):
        layer(torch.rand(2, 3, 5))
    with pytest.raises(TypeError, match="expected x"):
        layer([1.0])
    with torch.no_grad():
        layer.tau_mem.fill_(-1.0)
    with pytest.raises(ValueError, match=r"expected decay to be in \[0, 1\]"):
        layer(torch.rand(2, 3, 4))


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "outputs: 0 of" in capsys.readouterr().out


def test_a_layer_in_two_places_is_left_since_its_state_goes_on():
    layer = sl.IAF(**ONE)
    net = nn.Sequential(layer, nn.Linear(4, 4), layer)
    report = interop.ConvertReport()
    interop.convert(net, report)
    assert net[0] is net[2] is layer and not report.converted
    assert "expected a layer over sequences in one place" in report.left["0"] and list(report.left) == ["0", "2"]
