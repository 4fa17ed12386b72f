"""Calls of layers that are made again (``ops/_again.py``): the numbers are those of a first call, and whatever a call
follows from makes it another one."""

from __future__ import annotations

import contextlib
import copy
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import trtkern
from trtkern.nn import ALIF, CUBALIF, LI, LIF, PLIF, AdLIF, BatchNormLIF, Bounded, _neuron, batch_norm_lif, stream
from trtkern.ops import _first_rows, _same, spikes
from trtkern.spec import LIFSpec

SHAPE = (4, 2, 3, 5)
LAYERS = {
    "LIF": lambda **more: LIF(0.7, **more),
    "soft": lambda **more: LIF(0.5, v_reset=None, v_leak=0.2, **more),
    "ALIF": lambda **more: ALIF(beta=0.5, v_threshold=0.2, **more),
    "AdLIF": lambda **more: AdLIF(0.5, a=0.2, v_threshold=0.2, **more),
    "CUBALIF": lambda **more: CUBALIF(decay=0.5, v_threshold=0.3, **more),
    "LI": lambda **more: LI(0.9, **more),
    "PLIF": lambda **more: PLIF(3.0, **more),
    "learned": lambda **more: LIF(nn.Parameter(torch.tensor([0.3, 0.6, 0.9])), nn.Parameter(torch.tensor(1.5)), **more),
    "bounded": lambda **more: CUBALIF(Bounded(0.5), decay=Bounded(torch.tensor([0.3, 0.6, 0.9])), **more),
}
ORDINARY = {"triton": ("PLIF", "learned", "bounded")}
"""What a backend makes as ever each time."""


@pytest.fixture(params=["extension", "Python"])
def compared(request, monkeypatch):
    """Calls are compared by the extension, and without it."""
    if request.param == "Python":
        monkeypatch.setattr(_same, "_class", lambda: _same.Plainly)


@pytest.fixture
def anew(monkeypatch):
    """The calls that are made as ever, one entry each."""
    calls = []
    for module, name in ((_neuron, "run_neuron"), (batch_norm_lif, "batch_norm_lif")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real: (calls.append(1), real(*given))[1])
    return calls


def currents(*shape, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape or SHAPE, generator=draw).to(dtype).requires_grad_()


def flat(made):
    """The tensors of what a layer gives, in order."""
    if isinstance(made, torch.Tensor):
        return [made]
    return [t for each in made for t in flat(each)]


def both(run, x, state=(), seed=1):
    """Everything that comes out of a call and of its backward pass."""
    made = flat(run())
    draw = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(t.shape, generator=draw).to(t.dtype) for t in made]
    return [*made, *torch.autograd.grad(made, [x, *state], gradients)]


def equal(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"return_state": True}, {"return_state": True, "return_h": True}], ids=str)
@pytest.mark.parametrize("steps", [4, 20])
def test_a_call_made_again_is_that_of_a_fresh_layer(backend, device, share, anew, steps, options):
    cases = [(name, *kind) for name in LAYERS for kind in ((torch.float32, False), (torch.bfloat16, True))]
    for name, dtype, given in share(cases, 15, steps + 3 * len(options)):
        if name == "LI" and "return_h" in options:
            options = {"return_state": True}
        layer, x = LAYERS[name](backend=backend).to(device), currents(steps, 2, 3, 5, dtype=dtype).detach().to(device)
        x.requires_grad_()
        count = len(layer.state_names)
        parts = [currents(2, 3, 5, seed=7 + i).detach().abs().to(device).requires_grad_() for i in range(count)]
        state = () if not given else tuple(parts)
        v0 = None if not given else state[0] if count == 1 else state
        fresh = copy.deepcopy(layer)
        wanted = both(partial(fresh, x, v0, **options), x, (*state, *fresh.parameters()))
        layer(x, v0, **options)
        before = len(anew)
        for _ in range(3):  # the second backward pass finds what the first one did
            equal(both(partial(layer, x, v0, **options), x, (*state, *layer.parameters())), wanted)
        assert len(anew) == before + (3 if name in ORDINARY.get(backend, ()) else 0)
        with torch.no_grad():
            for _ in range(2):
                made = flat(layer(x, v0, **options))
                equal(made, wanted[: len(made)])


def test_steps_made_again_are_those_of_the_sequence(backend, device, share, anew):
    """Values bit for bit; gradients are those of steps that go the way of sequences."""
    for name in share(LAYERS, 5):
        steps_and_sequence(name, backend, device, anew)


def steps_and_sequence(name, backend, device, anew):
    x, found = currents(3, 2, 3, 5).detach().to(device), []
    for prepared in (True, False):
        layer, leaf = LAYERS[name](backend=backend).to(device), x.clone().requires_grad_()
        if not prepared:
            layer._calls.left = 0
        for _ in range(2):
            state, made = None, []
            before = len(anew)
            for current in leaf:
                out, state = layer.step(current, state)
                made.append(out)
            total = torch.stack(made)
            weights = torch.arange(1.0, 6.0, device=device)
            gradients = torch.autograd.grad((total * weights).sum(), [leaf, *layer.parameters()])
        assert len(anew) - before == (3 if not prepared or name in ORDINARY.get(backend, ()) else 0)
        want, last = layer(x, return_state=True)
        assert torch.equal(total, want) and want.abs().sum() > 0 and type(state) is type(last)
        assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(last), strict=True))
        found.append(gradients)
    equal(*found)
    assert all(gradient.abs().sum() > 0 for gradient in found[0])


def test_states_that_lie_anywhere_are_taken():
    """The states of a step lie side by side in memory; others are put there."""
    layer, x = CUBALIF(decay=0.5), currents(3, 4)
    state = layer.step(x)[1]
    layer.step(x, state)
    apart = tuple(t.detach().clone().requires_grad_() for t in state)
    gap = torch.zeros(3, 3, 4)
    gap[0], gap[2] = state.i.detach(), state.v.detach()
    spread = (gap[0].requires_grad_(), gap[2].requires_grad_())
    wanted = both(lambda: copy.deepcopy(layer).step(x, apart), x, apart)
    for parts in (apart, spread, apart):
        for _ in range(2):
            for a, b in zip(both(lambda p=parts: layer.step(x, p), x, parts), wanted, strict=True):
                assert torch.equal(a, b)
    only = torch.autograd.grad(layer.step(x, apart)[1].v.sum(), [x, *apart])
    want = torch.autograd.grad(copy.deepcopy(layer).step(x, apart)[1].v.sum(), [x, *apart])
    assert all(torch.equal(a, b) for a, b in zip(only, want, strict=True))


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def attribute(name, value):
    return lambda layer, x, around, monkeypatch: (setattr(layer, name, value), x)[1]


def with_around(context):
    return lambda layer, x, around, monkeypatch: (around.enter_context(context()), x)[1]


def patched(target, name, value):
    return lambda layer, x, around, monkeypatch: (monkeypatch.setattr(target, name, value()), x)[1]


def tensor(change):
    return lambda layer, x, around, monkeypatch: change(x)


CHANGES = {
    "decay": attribute("decay", 0.25),
    "threshold": attribute("v_threshold", 0.5),
    "leak": attribute("v_leak", 0.5),
    "reset": attribute("v_reset", -0.5),
    "a parameter for a number": attribute("decay", nn.Parameter(torch.tensor(0.25))),
    "a parameter a channel": attribute("gain", nn.Parameter(torch.tensor([1.0, 2.0, 0.5]))),
    "spec": attribute("spec", LIFSpec("hard", "atan")),
    "backend": attribute("backend", "reference"),
    "fire on equal": attribute("fire_on_equal", True),
    "channel axis": attribute("channel_dim", 1),
    "method": attribute("values", lambda: {**LIF(0.1).values()}),
    "dtype": tensor(lambda x: x.detach().bfloat16().requires_grad_()),
    "strides": tensor(lambda x: x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()),
    "static": tensor(lambda x: x.detach()[:1].expand(4, -1, -1, -1).requires_grad_()),
    "steps": tensor(lambda x: x.detach()[:3].requires_grad_()),
    "shape": tensor(lambda x: x.detach()[..., :2].contiguous().requires_grad_()),
    "no gradient": tensor(lambda x: x.detach()),
    "a subclass": tensor(lambda x: nn.Parameter(x.detach())),
    "a sign to be turned": tensor(lambda x: torch.complex(x.detach(), x.detach()).conj().imag.requires_grad_()),
    "grad mode": with_around(torch.no_grad),
    "debug": with_around(trtkern.debug),
    "dispatch mode": with_around(Mode),
    "profile": with_around(lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])),
    "forward mode": with_around(torch.autograd.forward_ad.dual_level),
    "listener": with_around(lambda: spikes.listen(lambda s, words: None)),
    "first rows": patched(_first_rows, "recording", _first_rows.FirstRows),
    "backends": patched(trtkern.backends, "BACKENDS", lambda: (*trtkern.backends.BACKENDS,)),
    "environment": lambda layer, x, around, monkeypatch: (monkeypatch.setenv("TRITON_INTERPRET", "0"), x)[1],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_another_call(compared, anew, monkeypatch, change):
    layer, x = LIF(0.7), currents()
    layer(x)
    layer(x)
    assert len(anew) == 1
    with contextlib.ExitStack() as around:
        x = CHANGES[change](layer, x, around, monkeypatch)
        found = layer(x)
        assert len(anew) == 2
        wanted = copy.deepcopy(layer)(x)
        assert torch.equal(found, wanted)
        if found.requires_grad and wanted.requires_grad:
            g = torch.randn_like(found)
            assert torch.equal(*(torch.autograd.grad(s, x, g)[0] for s in (found, wanted)))


def test_what_a_parameter_holds_is_looked_at_each_time(anew):
    layer, x = LIF(nn.Parameter(torch.full((3,), 0.5)), v_threshold=nn.Parameter(torch.tensor(1.0))), currents()
    for _ in range(3):
        layer(x).sum().backward()
    for parameter, bad in (
        (layer.decay, 1.5),
        (layer.decay, -0.1),
        (layer.decay, float("nan")),
        (layer.v_threshold, -1.0),
    ):
        good = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] = bad
        with pytest.raises(ValueError, match=r"expected (decay|v_threshold) to be .*, got"):
            layer(x)
        with torch.no_grad():
            parameter.copy_(good)
    assert len(anew) == 1
    for name, value in (
        ("gain", 2.0),
        ("decay", nn.Parameter(torch.tensor(0.25))),
        ("v_threshold", nn.Parameter(torch.ones(3))),
    ):
        setattr(layer, name, value)
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    layer.v_threshold.requires_grad_(False)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_bad_values_are_seen_at_a_later_call(anew):
    layer, x = LIF(0.7), currents()
    layer(x)
    layer(x)
    for name, bad in (("decay", 2.0), ("v_threshold", float("nan")), ("decay", "half"), ("backend", "none")):
        good = getattr(layer, name)
        setattr(layer, name, bad)
        with pytest.raises((TypeError, ValueError)):
            layer(x)
        setattr(layer, name, good)
    for bad in (x.detach().int(), x.detach().to_sparse(), None, 0.5):
        with pytest.raises((TypeError, ValueError)):
            layer(bad)
    with pytest.raises(ValueError, match="v0"):
        layer(x, torch.zeros(3))


def test_the_flag_is_that_of_the_moment():
    layer, x = LIF(0.7), currents().detach()
    for _ in range(3):
        layer(x)
    old, layer.nonfinite = layer.nonfinite, torch.zeros(1, dtype=torch.int32)
    layer(x * torch.nan)
    assert old.item() == 0 and layer.nonfinite.item() == 1
    layer.nonfinite = torch.zeros(1)
    with pytest.raises(TypeError, match="flag"):
        layer(x)


def test_transforms_and_compiled_code_see_the_layer(anew):
    layer, x = LIF(0.7), currents()
    wanted = layer(x).detach()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(torch.func.vmap(layer, in_dims=1, out_dims=1)(x.detach()), wanted)
    assert torch.equal(torch.func.grad(lambda x: layer(x).sum())(x.detach()), gradient)
    s, tangent = torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))
    assert torch.equal(s, wanted) and tangent.abs().sum() > 0
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), wanted)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), wanted)


def test_backward_passes_of_other_kinds():
    """The gradient may come in any layout, or twice, and what is saved may come back in another one."""
    layer, x = LIF(0.7), currents()
    for _ in range(2):
        torch.autograd.grad(layer(x), x, torch.ones(SHAPE))
    fresh = copy.deepcopy(layer)
    for g in (torch.ones(()).expand(SHAPE), torch.randn(4, 2, 5, 3).transpose(2, 3), torch.randn(SHAPE)):
        found = [torch.autograd.grad(each(x), x, g)[0] for each in (layer, layer, fresh)]
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
    s = layer(x)
    twice = [torch.autograd.grad(s, x, g, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(twice[0], found[2]) and torch.equal(*twice)
    (batched,) = torch.autograd.grad(layer(x), x, torch.stack([g, 2 * g]), is_grads_batched=True)
    assert torch.equal(batched[0], found[2])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.mT.contiguous(), lambda t: t.mT):
        s = layer(x)
    assert torch.equal(torch.autograd.grad(s, x, g)[0], found[2])
    (first,) = torch.autograd.grad(layer(x), x, g.clone().requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()
    y = x * 1.0
    s = layer(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        s.sum().backward()


def test_threads_are_those_of_the_call(one_thread):
    layer, x, found = LIF(0.7), currents(4, 8, 64, 16, 16), []
    layer(x)
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(both(lambda: layer(x), x))
    equal(*found)


@pytest.mark.parametrize("layer", [LIF, CUBALIF, PLIF, lambda **more: BatchNormLIF(3, **more)])
def test_no_tensor_of_a_call_is_kept(backend, device, layer):
    layer, x = layer(backend=backend).to(device), currents().detach().to(device).requires_grad_()
    for _ in range(2):
        layer(x).sum().backward()
    gone = weakref.ref(x)
    del x
    assert layer._calls.made or (backend, type(layer)) == ("triton", PLIF)
    assert gone() is None


def test_a_copy_of_a_layer_has_no_calls_of_its_own(anew):
    layer, x = LIF(0.7), currents()
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other._calls.made and torch.equal(other(x), layer(x))
        other.decay = 0.1
        assert not torch.equal(other(x), layer(x))
    layer.__dict__.pop("_calls")  # as a layer of before has it
    older = pickle.loads(pickle.dumps(layer))
    assert torch.equal(older(x), LIF(0.7)(x)) and older._calls.made


def test_hooks_of_a_layer_run_at_each_step():
    layer, x, heard = LIF(0.7), currents(2, 3), []
    for _ in range(2):
        layer.step(x)
    for register in (layer.register_forward_hook, nn.modules.module.register_module_forward_hook):
        handle = register(lambda *given: heard.append(1))
        for _ in range(2):
            layer.step(x)
        handle.remove()
    assert len(heard) == 4
    layer.forward = lambda *given, **named: (torch.zeros(1, 2, 3), torch.zeros(2, 3))
    assert not layer.step(x + 5)[0].any()


def test_a_stream_makes_its_calls_again(anew):
    model = nn.Sequential(LIF(0.7), CUBALIF(decay=0.5, v_threshold=0.3))
    x = currents(6, 2, 3).detach()
    wanted, held = model(x), stream(model)
    for _ in range(2):
        before = len(anew)
        held.reset()
        with torch.no_grad():
            assert torch.equal(torch.stack([held.step(each) for each in x]), wanted)
    assert len(anew) == before


NORMS = {
    "training": {},
    "evaluation": {"training": False},
    "no affine": {"affine": False},
    "no affine, evaluation": {"affine": False, "training": False},
    "not tracked": {"track_running_stats": False},
    "average": {"momentum": None},
    "pool": {"pool": 2},
    "ALIF": {"neuron": ALIF, "v_threshold": 0.2},
}


@pytest.mark.parametrize("laid", ["contiguous", "channels last"])
@pytest.mark.parametrize("steps", [3, 20])
def test_a_norm_made_again_is_a_fresh_one(backend, device, share, anew, steps, laid):
    for name in share(NORMS, 9, steps):
        norm_again(name, backend, device, anew, 3 if backend == "triton" and device == "cpu" else steps, laid)


def norm_again(name, backend, device, anew, steps, laid):
    settings = dict(NORMS[name])
    training = settings.pop("training", True)
    layer = BatchNormLIF(4, backend=backend, **settings).to(device).train(training)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, 4))
    y = currents(steps, 2, 4, 6, 6).detach().to(device)
    if laid == "channels last":
        y = y.movedim(2, -1).contiguous().movedim(-1, 2)
    y.requires_grad_()
    leaves = [*layer.parameters()]
    for turn in range(5):
        fresh = copy.deepcopy(layer)
        before = len(anew)
        found = both(partial(layer, y, return_state=turn > 2), y, leaves)
        made = len(anew) - before
        wanted = both(partial(fresh, y, return_state=turn > 2), y, [*fresh.parameters()])
        again = turn in (1, 2, 4) and not (laid == "channels last" and (name == "ALIF" or turn == 4))
        assert made == (0 if again else 1)
        equal(found, wanted)
        for a, b in zip(layer.buffers(), fresh.buffers(), strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(layer(y), fresh(y))


def of_norm(change):
    return lambda layer, y: (change(layer), y)[1]


NORM_CHANGES = {
    "mode": of_norm(lambda layer: layer.eval()),
    "eps": of_norm(lambda layer: setattr(layer, "eps", 0.5)),
    "momentum": of_norm(lambda layer: setattr(layer, "momentum", 0.7)),
    "pool": of_norm(lambda layer: setattr(layer, "pool", 2)),
    "packed": of_norm(lambda layer: setattr(layer, "packed", True)),
    "weight": of_norm(lambda layer: setattr(layer, "weight", nn.Parameter(torch.full((3,), 2.0).double()))),
    "frozen": of_norm(lambda layer: layer.weight.requires_grad_(False)),
    "bias": of_norm(lambda layer: setattr(layer, "bias", None)),
    "statistics": of_norm(lambda layer: layer.double() and layer.float()),
    "threshold": of_norm(lambda layer: setattr(layer.lif, "v_threshold", 0.25)),
    "neuron": of_norm(lambda layer: setattr(layer, "lif", LIF(0.1, channel_dim=2))),
    "backend": of_norm(lambda layer: setattr(layer.lif, "backend", "reference")),
    "dtype": lambda layer, y: y.detach().bfloat16().requires_grad_(),
    "shape": lambda layer, y: y.detach()[:, :1].contiguous().requires_grad_(),
}


@pytest.mark.parametrize("change", NORM_CHANGES)
def test_a_change_of_a_norm_is_another_call(compared, change):
    layer, y = BatchNormLIF(3), currents(4, 2, 3, 6, 6)
    for _ in range(2):
        layer(y).sum().backward()
    y.grad = None
    y = NORM_CHANGES[change](layer, y)
    fresh = copy.deepcopy(layer)
    for turn in range(3):
        found, wanted = (flat(each(y))[0] for each in (layer, fresh))
        assert torch.equal(found, wanted)
        fresh._calls.made = ()
        got, want = (torch.autograd.grad(s, y, torch.ones_like(s))[0] for s in (found, wanted))
        assert torch.equal(got, want), turn
        for a, b in zip(layer.buffers(), fresh.buffers(), strict=True):
            assert torch.equal(a, b)


def test_few_values_a_channel_are_seen_at_a_later_call():
    layer, y = BatchNormLIF(3), currents(4, 2, 3, 6, 6)
    for _ in range(2):
        layer(y)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="channels"):
        layer(currents(4, 2, 5, 6, 6))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(currents(1, 1, 3, 1, 1))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
