"""Learned parameters that stay in their range: values, gradients, and everything that is done with layers."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from trtkern import nn as snn
from trtkern.nn import Bounded

X = (5, 2, 3, 4)


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize(
    ("value", "settings", "slope"),
    [
        (0.9, {}, 0.9 * 0.1),
        (0.9, {"kind": "sigmoid", "low": 0.5, "high": 1.0}, 0.5 * 0.8 * 0.2),
        (1.5, {"kind": "softplus"}, 1 - math.exp(-1.5)),
        (1.5, {"kind": "softplus", "low": -2.0}, 1 - math.exp(-3.5)),
        (0.9, {"kind": "clamp"}, 1.0),
        (1e-9, {"kind": "softplus"}, 1e-9),
        (200.0, {"kind": "softplus"}, 1.0),
        (-7.0, {"kind": "clamp", "low": -math.inf, "high": math.inf}, 1.0),
    ],
)
def test_it_starts_where_it_is_told(value, settings, slope, channels):
    held = Bounded(value if channels is None else torch.full((channels,), value), **settings)
    got = held()
    assert got.shape == held.raw.shape == (() if channels is None else (channels,))
    assert got.flatten()[0].item() == pytest.approx(value, rel=1e-5)
    got.sum().backward()
    assert held.raw.grad.flatten()[0].item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.3, 1.0), (0.1, 0.7), (-5.0, 1e-3)])
@pytest.mark.parametrize("kind", ["sigmoid", "softplus", "clamp"])
def test_no_value_of_raw_leads_out(kind, low, high, dtype):
    held = Bounded(low + 0.5 * (high - low), kind, low=low, **({} if kind == "softplus" else {"high": high})).to(dtype)
    with torch.no_grad():
        for raw in (-math.inf, -1e30, -200.0, -17.3, -0.3, 0.0, 0.4, 16.7, 88.0, 1e30, math.inf):
            held.raw.fill_(raw)
            got = held()
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            exact = torch.tensor([low, high], dtype=got.dtype)
            assert exact[0] <= got and (kind == "softplus" or got <= exact[1]), raw


def test_a_clamp_comes_back_from_its_ends():
    held = Bounded(torch.tensor([0.0, 0.5, 1.0, 1.0, 0.0]), "clamp")
    with torch.no_grad():
        held.raw[3:] = torch.tensor([1.25, -0.25])
    for sign, want in ((1.0, [0, 1, 1, 1, 0]), (-1.0, [-1, -1, 0, 0, -1])):
        (got,) = torch.autograd.grad((sign * held()).sum(), held.raw)
        assert got.tolist() == want


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Bounded(0.5, "tanh"), ValueError, "one of sigmoid, softplus, clamp, got 'tanh'"),
        (lambda: Bounded(1.0), ValueError, "strictly between 0 and 1, got 1 to 1; pass low and high"),
        (lambda: Bounded(torch.tensor([0.5, 1.5]), "clamp"), ValueError, "from 0 to 1, got 0.5 to 1.5"),
        (lambda: Bounded(0.0, "softplus"), ValueError, "strictly between 0 and inf"),
        (lambda: Bounded(0.5, "softplus", high=2.0), ValueError, "expected no high"),
        (lambda: Bounded(0.5, high=math.inf), ValueError, "finite with 'sigmoid'"),
        (lambda: Bounded(0.5, "clamp", low=1.0), ValueError, "low < high"),
        (lambda: Bounded(0.5, low=math.nan), ValueError, "low < high"),
        (lambda: Bounded(0.5, low="0"), TypeError, "low to be a number, got '0'"),
        (lambda: Bounded("0.5"), TypeError, "value to be a number or a tensor"),
        (lambda: Bounded(math.nan), ValueError, "value to be finite"),
        (lambda: Bounded(torch.zeros(2, 2)), ValueError, r"shape \[\] or \[C\]"),
        (lambda: snn.LIF(decay=Bounded(1.5, high=2.0)), ValueError, "LIF: expected decay to be bounded within 0 to 1"),
        (
            lambda: snn.LIF(decay=Bounded(0.5, "softplus")),
            ValueError,
            "bounded within 0 to 1, got 0 to inf",
        ),
        (lambda: snn.LIF(v_threshold=Bounded(0.5, low=-1.0)), ValueError, "v_threshold to be bounded within 0 to inf"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def every(channels=3):
    """A layer whose parameters are all learned and bounded."""
    start = {"decay": 0.5, "gain": 1.1, "v_leak": 0.1, "v_threshold": 0.9, "reset_amount": 0.8}
    kinds = {
        "decay": {},
        "gain": {"kind": "softplus"},
        "v_leak": {"kind": "clamp", "low": -1.0},
        "v_threshold": {"kind": "softplus"},
        "reset_amount": {"kind": "sigmoid", "high": 2.0},
    }
    full = {name: value if channels is None else torch.full((channels,), value) for name, value in start.items()}
    return {name: Bounded(full[name], **kinds[name]) for name in start}, full


@pytest.mark.parametrize("channels", [None, 3])
def test_every_parameter_can_be_bounded(backend, device, channels):
    bounded, plain = every(channels)
    layer = snn.LIF(**bounded, v_reset=None, backend=backend).to(device)
    want = snn.LIF(**plain, v_reset=None, backend=backend).to(device)
    x = torch.randn(X, device=device)
    got, v = layer(x, return_v=True)
    torch.testing.assert_close(v, want(x, return_v=True)[1], rtol=1e-5, atol=1e-6)
    (got.sum() + v.sum()).backward()
    for name in bounded:
        assert bounded[name].raw.grad.abs().min() > 0, name
    assert set(layer.state_dict()) == {f"{name}.raw" for name in bounded}


def test_gradients_are_those_of_the_value():
    held = Bounded(torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64))
    x = torch.randn(X, dtype=torch.float64)
    snn.LIF(held, v_leak=0.3)(x, return_v=True)[1].sum().backward()
    decay = held().detach().requires_grad_()
    plain = snn.LIF(nn.Parameter(decay), v_leak=0.3)
    plain(x, return_v=True)[1].sum().backward()
    torch.testing.assert_close(held.raw.grad, plain.decay.grad * (decay * (1 - decay)).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["sigmoid", "clamp"])
def test_training_cannot_end_by_it(kind):
    """A step that throws an unbounded decay out of its range."""
    x = torch.rand(X) + 0.5
    bounded, free = snn.LI(Bounded(0.9, kind)), snn.LI(nn.Parameter(torch.tensor(0.9)))
    for layer in (bounded, free):
        optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
        (-layer(x).sum()).backward()
        optimizer.step()
    with pytest.raises(ValueError, match=r"decay to be in \[0, 1\], got .*; a learned one stays there as trtkern.nn"):
        free(x)
    assert bounded(x).isfinite().all() and bounded.decay() == 1


def test_copies_checkpoints_and_a_start_on_meta():
    layer = snn.LIF(Bounded(0.8), v_threshold=Bounded(torch.full((3,), 1.2), "softplus"))
    with torch.no_grad():
        layer.decay.raw.add_(1)
    x = torch.randn(X)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = snn.LIF(Bounded(0.5), v_threshold=Bounded(torch.full((3,), 1.0), "softplus"))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x), layer(x))
    with torch.device("meta"):
        empty = snn.LIF(Bounded(0.8))
    empty = empty.to_empty(device="cpu")
    for module in empty.modules():
        module.reset_parameters()
    assert empty.decay().item() == pytest.approx(0.8)
    assert "decay=Bounded[], gain=1" in repr(layer) and "kind='softplus', low=0, high=inf, shape=[3]" in repr(layer)


@pytest.mark.parametrize("neuron", ["LIF", "PLIF", "IF"])
def test_behind_a_norm_packed_and_checkpointed(neuron):
    settings = {"v_threshold": Bounded(torch.full((3,), 0.7), "softplus"), "surrogate": "atan"}
    if neuron == "LIF":
        settings["decay"] = Bounded(0.6)
    norm = snn.BatchNormLIF(3, packed=True, neuron=getattr(snn, neuron), **settings)
    block = snn.ConvBatchNormLIF(snn.SpikeConv2d(3, 3, 3, padding=1), norm)
    y = torch.randn(4, 2, 3, 6, 6)
    grads = []
    for checkpoint in (False, True):
        block.checkpoint = checkpoint
        out = block(y)
        grads.append(torch.autograd.grad(out.spikes.sum(), list(block.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    named = dict(zip([name for name, _ in block.named_parameters()], grads[0], strict=True))
    assert all(g.abs().sum() > 0 for name, g in named.items() if name.endswith(".raw"))
    assert "norm.lif.v_threshold.raw" in named and out.spikes.sum() > 0


def test_conversion_keeps_it():
    net = snn.TimeSequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), snn.LIF(Bounded(torch.full((3,), 0.6))))
    x, before = torch.randn(4, 2, 2, 6, 6), copy.deepcopy(net)
    raw = net[2].decay.raw
    fused = snn.convert_norm_lif(net)
    assert fused[1].lif.decay.raw is raw and "1.lif.decay.raw" in fused.state_dict()
    fused.load_state_dict(snn.convert_state_dict(before.state_dict(), fused))
    torch.testing.assert_close(fused(x), before(x))
    before.load_state_dict(snn.convert_state_dict(fused.state_dict(), before))


def test_it_compiles_in_one_graph():
    torch._dynamo.reset()
    layer = snn.LIF(Bounded(0.6), v_threshold=Bounded(torch.full((3,), 0.9), "softplus"), v_leak=Bounded(0.2, "clamp"))
    x = torch.randn(X)
    want, got = layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(out.sum(), list(layer.parameters())) for out in (want, got)]
    assert len(grads[0]) == 3
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_penalty_leaves_it_out():
    net = nn.Sequential(
        nn.Linear(3, 4), snn.LIF(Bounded(0.6)), snn.BatchNormLIF(4, v_threshold=Bounded(1.0, "softplus"))
    )
    assert [name for name, _ in snn.TRTLoss(net).regularized()] == ["0.weight", "2.weight"]
