"""A call that was checked before is not checked again; whatever the checks look at makes it another call."""

from __future__ import annotations

import math
import random

import pytest
import torch

import trtkern
from trtkern import lif, reference
from trtkern.nn import LIF, BatchNormLIF
from trtkern.ops import _known, checks
from trtkern.ops import lif as op
from trtkern.spec import LIFSpec


@pytest.fixture
def asked(monkeypatch):
    """How often a backend was chosen, which goes with the checks."""
    calls = []
    monkeypatch.setattr(op, "choose", lambda *args, real=op.choose: (calls.append(args), real(*args))[1])
    _known._chosen.clear()
    return calls


def step(x, **changes):
    return lif(x, **{"decay": 0.5, "return_state": True, "return_v": True, **changes})


def shown(x):
    return torch.randn(4, 2, 3, 4, 4).to(x)


CHANGES = {
    "strides": lambda x: step(x.contiguous(memory_format=torch.preserve_format).transpose(2, 4)),
    "static": lambda x: step(x[:1].expand(4, -1, -1, -1, -1)),
    "dtype": lambda x: step(x.bfloat16()),
    "steps": lambda x: step(x[:3]),
    "shape": lambda x: step(x[..., :2]),
    "a number": lambda x: step(x, decay=0.25),
    "a parameter for a number": lambda x: step(x, decay=torch.tensor(0.5)),
    "a parameter a channel": lambda x: step(x, decay=torch.full((3,), 0.5)),
    "a state": lambda x: step(x, v0=torch.ones(2, 3, 4, 4)),
    "the axis of the channels": lambda x: step(x, channel_dim=3),
    "the neuron": lambda x: step(x, spec=LIFSpec("soft", "atan")),
    "the backend": lambda x: step(x, backend="reference"),
    "packed": lambda x: step(x, return_packed=True),
    "fire on equal": lambda x: step(x, fire_on_equal=True),
    "the flag": lambda x: step(x, flag=torch.zeros(1, dtype=torch.int32)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_another_call(asked, change):
    x = torch.randn(4, 2, 3, 4, 4)
    step(x)
    step(x)
    assert len(asked) == 1
    after = CHANGES[change](x)
    assert len(asked) == 2
    known = CHANGES[change](x)
    assert len(asked) == 2
    _known._chosen.clear()
    for fresh, *others in zip(CHANGES[change](x), after, known, strict=True):
        for other in others:
            assert (fresh is None) == (other is None)
            assert fresh is None or torch.equal(fresh, other)


@pytest.mark.parametrize(
    "bad",
    [
        {"decay": True},
        {"decay": 2.0},
        {"decay": math.nan},
        {"v0": torch.ones(3)},
        {"v0": torch.ones(2, 3, 4, 4).double()},
        {"decay": torch.full((5,), 0.5)},
        {"flag": torch.zeros(1)},
        {"backend": "none"},
    ],
    ids=str,
)
def test_no_check_is_lost(asked, bad):
    x = torch.randn(4, 2, 3, 4, 4)
    step(x, decay=1.0)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            step(x, **bad)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_a_tensor_without_strides_is_not_the_one_of_a_known_call(asked):
    """A sparse tensor says that its strides are 0, as those of an expanded one are; a nested one has no shape."""
    x = torch.zeros(()).expand(4, 2, 3)
    step(x)
    sparse, nested = x.to_sparse(), torch.nested.nested_tensor([torch.zeros(2, 3)] * 4)
    assert sparse.shape == x.shape and sparse.stride() == x.stride()
    for bad in (sparse, nested):
        with pytest.raises((TypeError, ValueError), match=r"got a (sparse_coo|nested) tensor"):
            step(bad)


def test_a_value_is_looked_at_each_time(asked):
    """The memory of a parameter may hold anything at the next call."""
    x, decay = torch.randn(4, 2, 3, 4, 4), torch.tensor(0.5)
    step(x, decay=decay)
    decay.fill_(2.0)
    with pytest.raises(ValueError, match="decay"):
        step(x, decay=decay)


def test_what_is_chosen_among_and_from_what(asked, monkeypatch):
    x = torch.randn(4, 2, 3, 4, 4)
    step(x)
    monkeypatch.setattr(trtkern.backends, "BACKENDS", (*trtkern.backends.BACKENDS,))
    step(x)
    assert len(asked) == 2
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    step(x)
    assert len(asked) == 3
    with checks.debug():
        step(x)
        step(x)
    assert len(asked) == 5


def test_kinds_of_calls_through_the_dispatcher():
    """What an op prepared for one parameter for all is not what it takes for one a channel."""
    x, token = torch.randn(4, 2, 3, 5), LIFSpec().token
    rows = torch.tensor([0.5, 1.0, 0.0, 1.0, 1.0, 0.0]).unsqueeze(1)
    several = rows * torch.tensor([1.0, 0.5, 1.5, 1.0, 0.25])
    several[0].clamp_(max=1)
    for params in (rows, several, rows):
        s, *_ = torch.ops.trtkern.lif_forward(
            x, None, params, None, None, None, [0.0] * 6, token, 1, False, None, 1, "cpu"
        )
        want = reference.lif(x, None, list(params.unbind(0)), LIFSpec()).s
        assert torch.equal(s, want)


def test_threads_are_those_of_the_call(asked):
    x = torch.randn(4, 8, 64, 16, 16)
    before, threads = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            threads.append(step(x).spikes)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*threads)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_sign_of_zero_is_kept(zero):
    """To a dictionary both are one number."""
    x = torch.full((2, 1, 64), 3.0)
    for v_reset in (0.0, -0.0, zero):
        v = lif(x, v_reset=v_reset, return_v=True).v
    assert (torch.signbit(v) == (math.copysign(1.0, zero) < 0)).all()


def test_what_a_tensor_is_besides_its_memory(backend, device):
    """The sign of an imaginary part may still be to be turned; a subclass keeps to its own ways."""
    if device != "cpu":
        pytest.skip("said of the CPU's path, which is every device's")
    z = torch.complex(torch.randn(4, 2, 64), torch.randn(4, 2, 64)).conj()
    assert z.imag.is_neg()
    for _ in range(2):
        assert torch.equal(lif(z.imag, backend=backend).spikes, lif(z.imag.resolve_neg(), backend=backend).spikes)
    x = torch.randn(4, 2, 64, requires_grad=True)
    g = torch.complex(torch.randn(4, 2, 64), torch.randn(4, 2, 64)).conj().imag
    found = [torch.autograd.grad(lif(x, backend=backend).spikes, x, each) for each in (g, g.resolve_neg())]
    assert torch.equal(*(grad for (grad,) in found))


def test_a_layer_whose_parameters_are_others(one_thread):
    """New objects, new types, a new mode: the layer computes with what it has now."""
    y = torch.randn(4, 2, 3, 4, 4)
    layer = BatchNormLIF(3, backend="cpu")
    layer(y)
    layer.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    layer.lif.v_threshold = 0.25
    other = BatchNormLIF(3, v_threshold=0.25, backend="cpu")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(y), other(y)) and torch.equal(layer.running_mean, other.running_mean)
    assert torch.equal(layer.eval()(y), other.eval()(y))
    layer.to(torch.bfloat16), other.to(torch.bfloat16)
    assert torch.equal(layer.train()(y), other.train()(y))
    with pytest.raises(ValueError, match="channels"):
        layer(torch.randn(4, 2, 5, 4, 4))
    layer.weight = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="4 channels"):
        layer(y)


def a_call(seed):
    """A call of some kind with tensors of its own: everything that comes out of it, both ways."""
    # Six in turn are of the same settings, and differ in what a kind is made of besides.
    draw, vary = random.Random(seed // 6), random.Random(seed)
    torch.manual_seed(seed)
    T = vary.choice((1, 3, 17))
    x = torch.randn(T, 2, 3, 4, 4).to(vary.choice((torch.float32, torch.bfloat16)))
    laid = vary.choice(("plain", "plain", "channels last", "static", "transposed"))
    if laid == "channels last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    elif laid == "static":
        x = x[:1].expand(T, -1, -1, -1, -1)
    elif laid == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    x = x.detach().requires_grad_(draw.random() < 0.7)
    learned = [torch.full(draw.choice(((), (3,))), 0.5, requires_grad=True) for _ in range(2)]
    soft, packed, state = (draw.random() < 0.5 for _ in range(3))
    decay, threshold = (draw.choice((0.5, 0.25, own)) for own in learned)
    if draw.random() < 0.5:
        options = {"return_state": state, "return_packed": packed, draw.choice(("return_v", "return_h")): soft}
        start = draw.choice((None, torch.rand(2, 3, 4, 4)))
        equal, spec = draw.random() < 0.3, LIFSpec("soft" if soft else "hard")
        values = {"decay": decay, "v_threshold": vary.choice((1.0, threshold)), "fire_on_equal": equal}
        made = [t for t in lif(x, start, spec=spec, **values, **options) if t is not None]
    else:
        values = {"decay": draw.choice((0.5, 0.25)), "v_threshold": threshold, "v_reset": None if soft else 0.0}
        layer = BatchNormLIF(3, pool=draw.choice((1, 2)), packed=packed, **values).train(draw.random() < 0.6)
        residual = draw.choice((None, torch.rand(T, 2, 3, 4, 4)))
        spikes, last = layer(x, residual, return_state=True)
        made = [*(spikes if packed else (spikes,)), last, layer.running_mean, layer.num_batches_tracked]
        learned += [layer.weight, layer.bias]
    total = sum((t.float() * torch.rand_like(t, dtype=torch.float32)).sum() for t in made if t.requires_grad)
    if isinstance(total, torch.Tensor):
        total.backward()
    return [*made, *(t.grad for t in (x, *learned))]


def test_calls_of_many_kinds_in_turn_are_what_each_is_alone(one_thread):
    """What one kind of call left behind is nothing that another one takes."""
    alone = {}
    for seed in range(120):
        _known._chosen.clear()
        alone[seed] = a_call(seed)
    _known._chosen.clear()
    for seed in random.Random(0).sample([*alone, *alone], 2 * len(alone)):
        for got, want in zip(a_call(seed), alone[seed], strict=True):
            assert (got is None) == (want is None), seed
            assert got is None or (got.dtype == want.dtype and torch.equal(got, want)), seed


def test_many_calls_do_not_stay(monkeypatch):
    monkeypatch.setattr(_known, "MOST", 3)
    layer = LIF(backend="reference")
    for T in range(1, 9):
        layer(torch.randn(T, 2, 3))
    assert 1 <= len(_known._chosen) <= 3
