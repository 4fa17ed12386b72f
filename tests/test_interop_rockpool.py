"""``trtkern.interop`` on Rockpool: every layer and setting that converts against Rockpool itself, and those that do
not."""

import copy
import runpy
from pathlib import Path

import pytest
import torch

from trtkern import interop

pytest.importorskip("rockpool")
rn = pytest.importorskip("rockpool.nn.modules")
from rockpool.nn.combinators import Sequential  # noqa: E402
from rockpool.nn.modules.torch.lif_torch import PeriodicExponential, StepPWL  # noqa: E402
from rockpool.nn.networks import SynNet  # noqa: E402
from rockpool.parameters import Constant  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "from_rockpool.py"
ONE = {"max_spikes_per_dt": torch.tensor(1.0)}


@pytest.fixture(params=[torch.float64, torch.float32])
def dtype(request, monkeypatch):
    """Rockpool's spikes are float32, in tensors of torch's default type: in float64 it runs where both are that."""
    if request.param == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def fixed(layer):
    """With a threshold that is not trained."""
    layer.threshold.requires_grad_(False)
    return layer


def currents(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    return (torch.randn(*shape, dtype=torch.float64) + 0.2).to(dtype)


def run(net, x):
    return net(x)[0]


def gradients_of(net, x):
    """Of a loss that weighs every output, by name."""
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    y = run(net, x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * weights.to(y)).sum().backward()
    return {"input": x.grad.double(), **{n: p.grad.double() for n, p in net.named_parameters() if p.grad is not None}}


def compared(net, x):
    """Converted and compared, with every parameter: in float64 to 1e-5; in float32 as far from float64 as Rockpool's
    own gradients are, and 1e-5 more at most."""
    before = net.to(x.dtype)
    report = interop.ConvertReport()
    after = interop.convert(copy.deepcopy(before), report, strict=True)
    assert report.converted and not report.left and not report.stepping
    result = interop.check(before, after, x, run=run)
    allowed = 1e-6 if "ExpSyn" in str(report) else 0.0
    assert result.outputs <= allowed and result.fired > 0.05, f"{report}\n{result}"
    learned = {name for name, p in before.named_parameters() if p.requires_grad}
    assert set(result.gradients) == {*learned, "input"} and not result.unmatched
    if x.dtype == torch.float64:
        assert result.within(allowed), f"{report}\n{result}"
        return before, after
    exact = gradients_of(copy.deepcopy(after).double(), x.double())
    theirs, ours = gradients_of(before, x), gradients_of(after, x)
    for name, truth in exact.items():
        far = [(each[name] - truth).abs().max() for each in (theirs, ours)]
        assert far[1] <= far[0] + 1e-5 * truth.abs().max(), f"{name}: {far}\n{report}"
    return before, after


@pytest.mark.parametrize("function", [StepPWL, PeriodicExponential])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (5, {}),
        (5, {"threshold": 0.7, "learning_window": 0.3}),
        ((10, 5), {"tau_syn": torch.rand(5, 2) * 0.02 + 0.002}),
        ((10, 5), {"tau_syn": torch.tensor([[0.004, 0.02]])}),
        (5, {"tau_mem": 0.005, "tau_syn": 0.003, "bias": 0.1}),
        (5, {"leak_mode": "decays"}),
        (5, {"leak_mode": "bitshifts"}),
        (5, {"tau_mem": Constant(0.01), "tau_syn": Constant(0.02), "bias": Constant(torch.rand(5) * 0.1)}),
    ],
)  # fmt: skip
def test_lif_torch(function, shape, settings, dtype):
    inputs = shape if isinstance(shape, int) else shape[0]
    layer = fixed(rn.LIFTorch(shape, spike_generation_fn=function, **settings, **ONE))
    compared(layer, currents(3, 20, inputs, dtype=dtype))


@pytest.mark.parametrize("function", [StepPWL, PeriodicExponential])
def test_lif_neuron_torch(function, dtype):
    settings = {"tau_mem": torch.linspace(0.004, 0.03, 5), "bias": torch.linspace(-0.1, 0.1, 5), "threshold": 0.6}
    layer = fixed(rn.LIFNeuronTorch(5, spike_generation_fn=function, **settings, **ONE))
    compared(layer, currents(3, 20, 5, dtype=dtype))


def test_exp_syn_torch(dtype):
    compared(rn.ExpSynTorch(5, tau=torch.linspace(0.004, 0.03, 5)), currents(3, 20, 5, dtype=dtype))


def network():
    """The network of Rockpool's tutorials: weights, neurons, weights, neurons."""
    torch.manual_seed(1)
    return Sequential(
        rn.LinearTorch((6, 12)),
        rn.LIFTorch(12, threshold=Constant(1.0), **ONE),
        rn.LinearTorch((12, 4)),
        rn.LIFTorch(4, threshold=Constant(1.0), **ONE),
    )


def test_a_sequential_network(dtype):
    before, after = compared(network(), currents(3, 30, 6, dtype=dtype))
    assert after.modules().keys() == before.modules().keys()
    for name, layer in after.modules().items():
        assert layer is getattr(after, name) and layer is not getattr(before, name)
    assert [id(p) for p in after.parameters().astorch()] == [id(p) for _, p in after.named_parameters()]
    assert after.state_dict().keys() == before.state_dict().keys()


def test_synnet_converts_and_learns_the_same(dtype):
    settings = {"size_hidden_layers": [24, 24], "time_constants_per_layer": [3, 5], "max_spikes_per_dt": 1}
    torch.manual_seed(0)
    net = SynNet(5, 8, train_time_constants=True, threshold=0.4, **settings)
    x = (torch.rand(4, 40, 8) < 0.3).to(dtype)
    before, after = compared(net, x)
    losses = [], []
    for model, kept in zip((before, after), losses, strict=True):
        groups = {True: [], False: []}
        for name, p in model.named_parameters():
            groups["tau" in name].append(p)
        optimizer = torch.optim.SGD([{"params": groups[True], "lr": 1e-10}, {"params": groups[False], "lr": 1e-3}])
        for _ in range(4):
            model.reset_state()
            loss = (run(model, x).sum(1) - 5).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept.append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for name, value in before.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), value, rtol=1e-4, atol=1e-6)


def test_what_a_call_returns_is_what_rockpool_returns():
    before, x = network(), currents(3, 12, 6, dtype=torch.float32)
    after = interop.convert(copy.deepcopy(before))
    (y, state, record), (y2, state2, record2) = before(x, record=True), after(x, record=True)
    assert torch.equal(y, y2) and y2.shape == (3, 12, 4)

    def same(a, b, path=""):
        assert type(a) is type(b), path
        if isinstance(a, dict):
            assert a.keys() == b.keys(), path
            for key in a:
                same(a[key], b[key], f"{path}.{key}")
        elif isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, msg=path)

    same(state, state2)
    same(record, record2)
    assert after(x[0])[0].shape == (1, 12, 4)
    with pytest.raises(ValueError, match="wrong neuron dimension"):
        after["1_LIFTorch"](x)


def test_each_call_begins_at_rest_unless_a_state_was_given():
    x = currents(1, 20, 6, dtype=torch.float32)
    before = network()
    after = interop.convert(copy.deepcopy(before))
    whole = run(before, x)
    assert torch.equal(run(after, x), whole) and torch.equal(run(after, x), whole)
    first, state, _ = after(x[:, :8])
    after.set_attributes(state)
    assert torch.equal(torch.cat([first, run(after, x[:, 8:])], 1), whole)
    after.set_attributes(state)
    after.reset_state()
    assert torch.equal(run(after, x), whole)


def test_torch_calls_copies_files_and_a_second_conversion(tmp_path):
    x = currents(2, 15, 6, dtype=torch.float32)
    after = interop.convert(network(), strict=True)
    expected, report = run(after, x), interop.ConvertReport()
    for twin in (copy.deepcopy(after), interop.convert(after, report)):
        assert torch.equal(run(twin, x), expected)
    assert not report.converted and not report.left
    after.save(tmp_path / "net.json")
    other = interop.convert(network())
    with torch.no_grad():
        for p in other.parameters().astorch():
            p.mul_(1.1)
    other.load(tmp_path / "net.json")
    assert torch.equal(run(other, x), expected)
    plain = interop.convert(network().to_torch(), strict=True)
    assert torch.equal(plain(x), expected) and len(list(plain.parameters())) == 8
    assert len(after.as_graph().input_nodes) == 6


def test_a_forward_of_its_own_is_left():
    net = network()
    net["1_LIFTorch"].forward = lambda x: x
    with pytest.raises(ValueError, match=r"'1_LIFTorch': .*has a forward of its own"):
        interop.convert(net, strict=True)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (lambda: rn.LIFTorch(3, threshold=Constant(1.0)), "max_spikes_per_dt=1.*got 65536"),
        (lambda: rn.LIFTorch(3, **ONE), "threshold is not trained"),
        (lambda: rn.LIFTorch(3, threshold=Constant(torch.tensor([1.0, 2.0, 1.0])), **ONE), "one threshold above 0"),
        (lambda: rn.LIFTorch(3, threshold=Constant(0.0), **ONE), "one threshold above 0"),
        (lambda: rn.LIFTorch(3, has_rec=True, **ONE), "has_rec=False"),
        (lambda: rn.LIFTorch(3, noise_std=0.1, **ONE), "noise_std=0, got 0.1"),
        (lambda: rn.ExpSynTorch(3, noise_std=0.1), "noise_std=0"),
        (lambda: rn.LIFTorch(3, tau_mem=-1.0, threshold=Constant(1.0), **ONE), r"decays are in \[0, 1\]"),
        (lambda: rn.LIFBitshiftTorch(3), "expected LIFTorch itself"),
        (lambda: rn.aLIFTorch(3), "has none"),
        (lambda: rn.LIFNeuronTorch(3), "max_spikes_per_dt=1"),
    ],
)  # fmt: skip
def test_what_has_no_equal_is_left_with_its_path_class_and_reason(layer, says):
    net = Sequential(rn.LinearTorch((2, 3)), layer())
    name = list(net.modules())[1]
    held, report = net.modules()[name], interop.ConvertReport()
    with pytest.raises(ValueError, match=f"{name!r}: rockpool.nn.modules.*{says}"):
        interop.convert(net, strict=True)
    interop.convert(net, report)
    assert list(report.left) == [name] and net.modules()[name] is held is getattr(net, name)


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "outputs: 0 of" in capsys.readouterr().out


def test_a_layer_in_two_places_is_left_since_its_state_goes_on():
    layer = rn.LIFTorch(4, threshold=Constant(0.3), **ONE)
    net = torch.nn.ModuleDict({"a": layer, "b": layer})
    report = interop.ConvertReport()
    interop.convert(net, report)
    assert net["a"] is net["b"] is layer and not report.converted
    assert "expected a layer over sequences in one place" in report.left["a"] and list(report.left) == ["a", "b"]
