"""What a layer holds: its flag through every move, parameters in half precision, and what an error leaves behind."""

import copy

import pytest
import torch
from torch import nn

import trtkern
from trtkern import nn as snn
from trtkern import reference
from trtkern.ops import layout
from trtkern.spec import LIFSpec

MAKE = {
    "LIF": lambda: snn.LIF(decay=nn.Parameter(torch.full((3,), 0.5))),
    "IF": snn.IF,
    "PLIF": lambda: snn.PLIF(3.0, channels=3),
    "LI": snn.LI,
    "BatchNormLIF": lambda: snn.BatchNormLIF(3, neuron=snn.PLIF),
}
X = (4, 2, 3, 5)


def on_meta(make):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("name", MAKE)
def test_the_flag_is_0_after_a_start_on_meta(name):
    want = MAKE[name]()
    layer = on_meta(MAKE[name]).to_empty(device="cpu")
    assert layer.nonfinite.tolist() == [0]
    layer.load_state_dict(want.state_dict())
    x = torch.randn(X)
    assert torch.equal(layer(x), want(x)) and layer.nonfinite.tolist() == [0]


@pytest.mark.parametrize("name", MAKE)
def test_the_flag_is_there_after_an_assigning_load_on_meta(name):
    want, layer = MAKE[name](), on_meta(MAKE[name])
    layer.load_state_dict(want.state_dict(), assign=True)
    moved = copy.deepcopy(layer).to("cpu")
    x = torch.randn(X)
    assert torch.equal(layer(x), want(x)) and layer.nonfinite.tolist() == [0]
    assert moved.nonfinite.tolist() == [0] and moved.nonfinite.device.type == "cpu"


@pytest.mark.parametrize("name", MAKE)
def test_reset_parameters_clears_the_flag_and_fills_empty_memory(name):
    want, layer = MAKE[name](), on_meta(MAKE[name]).to_empty(device="cpu")
    for module in layer.modules():
        module.reset_parameters()
    held = {"decay"} if name == "LIF" else set()  # which it was given
    for key, value in layer.state_dict().items():
        assert key in held or torch.equal(value, want.state_dict()[key]), key
    layer.nonfinite.fill_(1)
    layer.reset_parameters()
    assert layer.nonfinite.tolist() == [0]


@pytest.mark.parametrize(
    "move",
    [
        lambda layer: layer.to_empty(device="cpu"),
        lambda layer: layer.double(),
        lambda layer: layer.half(),
        lambda layer: layer.to("cpu"),
        lambda layer: layer.share_memory(),
        copy.deepcopy,
    ],
)
@pytest.mark.parametrize("raised", [0, 1])
@pytest.mark.parametrize("name", ["PLIF", "BatchNormLIF"])
def test_a_flag_keeps_its_value(name, raised, move):
    layer = MAKE[name]()
    layer.nonfinite.fill_(raised)
    names = [key for key, _ in layer.named_buffers()]
    moved = move(layer)
    assert moved.nonfinite.tolist() == [raised] and moved.nonfinite.dtype == torch.int32
    assert [key for key, _ in moved.named_buffers()] == names


def test_a_layer_goes_to_meta_and_back():
    layer = snn.LIF().to("meta")
    assert layer.nonfinite.is_meta and layer(torch.empty(X, device="meta")).is_meta
    assert layer.double().nonfinite.is_meta
    with pytest.raises(ValueError, match=r"layer\.to\(x\.device\)"):
        layer(torch.zeros(X))
    assert torch.equal(copy.deepcopy(layer).to("cpu")(torch.zeros(X)), torch.zeros(X))  # as it says
    assert layer.to_empty(device="cpu").nonfinite.tolist() == [0]


def test_no_other_memory_is_without_a_value():
    """Every buffer is in the state dict but the flag: a new one that is not must be filled as the flag is."""
    from trtkern.models import ConvSNN

    net = ConvSNN((1, 8, 8), [4, "pool"], 2, neuron=snn.PLIF)
    left = {name for name, _ in net.named_buffers()} - set(net.state_dict())
    assert left and all(name.endswith("lif.nonfinite") for name in left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["decay", "v_leak", "both"])
def test_the_bias_of_half_precision_parameters_is_that_of_their_values(which, dtype):
    numbers = {"decay": 0.903, "v_leak": 0.7}
    given = {
        key: nn.Parameter(torch.full((3,), value)) if which in (key, "both") else value
        for key, value in numbers.items()
    }
    layer = snn.LI(**given).to(dtype)
    held = {key: getattr(layer, key) for key in numbers}
    exact = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in held.items()}
    want = (1 - exact["decay"]) * exact["v_leak"]
    v = layer(torch.zeros(60, 1, 3))
    torch.testing.assert_close(layer.values()["bias"], want.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(v[-1, 0], (exact["v_leak"] * (1 - exact["decay"] ** 60)).float(), rtol=1e-5, atol=0)
    v.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plif_takes_the_sigmoid_in_float32(dtype):
    layer = snn.PLIF(20.0, decay_input=True, v_leak=0.3).to(dtype)
    rate = torch.sigmoid(layer.w.double())
    for got, want in ((layer.decay, 1 - rate), (layer.gain, rate), (layer.values()["bias"], rate * 0.3)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=1e-8)


def test_bfloat16_parameters_give_what_their_float32_values_give(backend, device):
    values = {"decay": 0.903, "gain": 1.1, "v_leak": 0.3, "v_threshold": 0.77, "reset_amount": 0.61}
    half = snn.LIF(**{k: torch.full((3,), v).bfloat16() for k, v in values.items()}, v_reset=None, backend=backend)
    full = snn.LIF(
        **{k: torch.full((3,), v).bfloat16().float() for k, v in values.items()}, v_reset=None, backend=backend
    )
    x = torch.randn(X, device=device)
    got, want = (layer.to(device)(x, return_v=True) for layer in (half, full))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_in_half_precision_computes_with_the_values_that_it_holds(dtype, training):
    layer = snn.BatchNormLIF(3, surrogate="sigmoid")
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5), layer.bias.uniform_(-0.5, 0.5)
        layer.running_mean.uniform_(-1, 1), layer.running_var.uniform_(0.5, 2)
    layer = layer.to(dtype).train(training)
    want = copy.deepcopy(layer).double()
    y = torch.randn(4, 2, 3, 6, 6).to(dtype)
    with torch.no_grad():
        got, state = layer(y, return_state=True)
        _, expected = want(y.double(), return_state=True)
    torch.testing.assert_close(state.double(), expected, rtol=1e-5, atol=1e-5)
    assert got.dtype == dtype
    for name in ("running_mean", "running_var"):
        held = getattr(layer, name)
        assert held.dtype == dtype and torch.equal(held, getattr(want, name).to(dtype)), name


def out_of_range():
    """A BatchNormLIF whose learned decay an optimiser has driven out of [0, 1]."""
    layer = snn.BatchNormLIF(3, decay=nn.Parameter(torch.full((3,), 0.9)), v_threshold=nn.Parameter(torch.tensor(1.0)))
    with torch.no_grad():
        layer.lif.decay[1] = 1.25
    return layer


def unchanged(layer, call, error, message):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        call()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("checkpoint", [None, False, True])
def test_a_learned_parameter_out_of_range_changes_nothing(backend, checkpoint):
    layer = out_of_range()
    layer.lif.backend = backend
    call, y = layer, torch.randn(4, 2, 3, 6, 6)
    if checkpoint is not None:
        call = snn.ConvBatchNormLIF(snn.SpikeConv2d(3, 3, 3, padding=1), layer, checkpoint=checkpoint)
    unchanged(layer, lambda: call(y), ValueError, r"expected decay to be in \[0, 1\], got values from 0.89.* to 1.25")
    with torch.no_grad():
        layer.lif.decay.fill_(0.5)
        layer.lif.v_threshold.fill_(-1)
    unchanged(layer, lambda: call(y), ValueError, "expected v_threshold to be >= 0, got -1")
    with torch.no_grad():
        layer.lif.v_threshold.fill_(1)
    call(y)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_debug_raises_before_the_statistics_move(backend):
    layer = snn.BatchNormLIF(3, backend=backend)
    y, v0 = torch.randn(4, 2, 3, 6, 6), torch.zeros(2, 3, 6, 6)
    v0[0, 1, 2, 3] = torch.nan
    with trtkern.debug():
        unchanged(layer, lambda: layer(y, None, v0), RuntimeError, "expected finite potentials")
    assert layer.nonfinite.tolist() == [1]


def test_memory_that_is_not_there_leaves_the_statistics(monkeypatch):
    """All that the call writes is allocated before they move."""
    layer = snn.BatchNormLIF(3, backend="cpu")

    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layout, "empty", broken)
    unchanged(layer, lambda: layer(torch.randn(4, 2, 3, 6, 6)), RuntimeError, "out of memory")


def test_the_oracle_takes_the_same_half_precision_values():
    """(1 - decay) * v_leak of the layer is the bias that the reference is given by hand."""
    layer = snn.LIF(torch.full((3,), 0.903).bfloat16(), v_leak=0.7)
    decay, x = layer.decay.double().reshape(3, 1), torch.rand(X)
    want = reference.lif(x.double(), None, (decay, 1.0, (1 - decay) * 0.7, 1.0, 1.0, 0.0), LIFSpec())
    _, v = layer(x, return_v=True)
    torch.testing.assert_close(v.double(), want.v, rtol=1e-5, atol=1e-6)


class _Twice(nn.Module):
    def forward(self, w):
        return 2 * w


def test_a_norm_whose_weight_is_no_parameter_of_its_own():
    """torch takes a parametrized weight out of the layer's parameters, as users do who put a tensor in its place."""
    y = torch.randn(4, 2, 3, 5, 5)
    want = snn.BatchNormLIF(3)
    with torch.no_grad():
        want.weight.fill_(2.0)
    made, placed = snn.BatchNormLIF(3), snn.BatchNormLIF(3)
    nn.utils.parametrize.register_parametrization(made, "weight", _Twice())
    del placed.weight
    placed.weight = torch.full((3,), 2.0, requires_grad=True)
    exact = want(y)
    assert exact.any() and not torch.equal(exact, snn.BatchNormLIF(3)(y))
    for layer in (made, placed):
        assert torch.equal(layer(y), exact)
        assert torch.equal(layer.running_var, want.running_var)
    g = torch.randn_like(exact)
    grads = [torch.autograd.grad(layer(y), layer.weight, g)[0] for layer in (want, placed)]
    assert torch.equal(*grads) and grads[0].any()
