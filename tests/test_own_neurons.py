"""Neurons of a user's own: what is registered computes what a plain loop in float64 does, on every backend."""

import copy
import importlib
import io
import math
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, FUSED
from patience import PATIENCE
from torch import nn

from trtkern import LIFSpec, neurons, reference, rows
from trtkern import nn as snn
from trtkern.models.build import build
from trtkern.neurons import exp, where

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import adex  # noqa: E402
from adex import ADEX  # noqa: E402

BACKENDS = ["reference", *(name for name in FUSED if name != "cuda")]
VALUES = {**neurons.lookup(ADEX).defaults, "v_threshold": 0.9}
T, B, C = 9, 2, 3


@pytest.fixture(params=BACKENDS)
def backend(request, compiled):
    return request.param


@pytest.fixture
def device(backend):
    return DEVICE[backend]


class _Spike(torch.autograd.Function):
    """1 where u > 0; backward the derivative of a sigmoid of sharpness 2, written out."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).double()

    @staticmethod
    def backward(ctx, g):
        sig = torch.sigmoid(2.0 * ctx.saved_tensors[0])
        return g * 2.0 * sig * (1 - sig)


def plain(x, p, v, w, detach=False):
    """AdEx in float64, a plain loop that autograd goes back through: spikes and h of every step, and the last v, w."""
    spikes, potentials = [], []
    for current in x:
        upswing = p["delta_t"] * torch.exp((v - p["theta_rh"]) / p["delta_t"])
        h = v + (current + p["v_rest"] - v + upswing - w) / p["tau"]
        s = _Spike.apply(h - p["v_threshold"])
        reset = s.detach() if detach else s
        v = h + reset * (p["v_reset"] - h)
        w = w + (p["a"] * (h - p["v_rest"]) - w) / p["tau_w"] + p["b"] * reset
        spikes.append(s)
        potentials.append(h)
    return torch.stack(spikes), torch.stack(potentials), v, w


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(backend="reference", learnable=False, **settings):
    values = dict(VALUES)
    if learnable:
        spread = torch.tensor([0.95, 1.0, 1.1])
        values = {name: nn.Parameter(value * spread) for name, value in values.items()}
    return snn.Neuron(ADEX, surrogate="sigmoid", alpha=2.0, backend=backend, **{**values, **settings})


def close(found, wanted, tolerance=2e-5):
    scale = wanted.abs().max() + 1e-3
    error = (found.detach().double().cpu() - wanted.detach()).abs().max() / scale
    assert error <= tolerance, float(error)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("width", [1, 37])
def test_adex_is_the_loop(backend, device, detach, width):
    """Spikes, potentials, states and every gradient; parameters a channel, and widths that are no whole vectors."""
    steps = 5 if backend == "triton" else 19
    layer = layer_of(backend, learnable=True, detach_reset=detach).to(device)
    x, start = (
        (1.2 * drawn(steps, B, C, width) + 0.8).requires_grad_(),
        [0.3 * drawn(B, C, width, seed=k) for k in (1, 2)],
    )
    v0 = [each.to(device).requires_grad_() for each in start]
    s, state, h = layer(x.to(device), tuple(v0), return_state=True, return_h=True)
    leaves = [p.detach().double().cpu().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]
    x64, before = x.detach().double().requires_grad_(), [each.double().requires_grad_() for each in start]
    values = {name: p.view(-1, 1) for name, p in zip(names, leaves, strict=True)}
    want = plain(x64, values, *before, detach)
    assert torch.equal(s.detach().double().cpu(), want[0]) and 0.05 < want[0].mean() < 0.8
    for found, wanted in zip((h, *state), want[1:], strict=True):
        close(found, wanted)
    grads = [drawn(*each.shape, seed=k + 5) for k, each in enumerate(want)]
    made = torch.autograd.grad(
        (s, h, *state), [x, *v0, *layer.parameters()], [g.to(device) for g in grads], materialize_grads=True
    )
    wanted = torch.autograd.grad(want, [x64, *before, *leaves], [g.double() for g in grads])
    for name, found, each in zip(("x", "v0", "w0", *names), made, wanted, strict=True):
        assert each.abs().max() > 0, name
        close(found, each)


def test_what_a_layer_shares(backend, device):
    """Step by step, in parts, of samples that end, packed, pooled behind BatchNorm, in half precision, not finite."""
    layer, x = layer_of(backend).to(device), (1.2 * drawn(T, B, C, 6) + 0.8).to(device)
    s, state = layer(x, return_state=True)
    first, between = layer(x[:5], return_state=True)
    second, last = layer(x[5:], between, return_state=True)
    assert torch.equal(torch.cat([first, second]), s) and all(map(torch.equal, last, state))
    stepped, at = layer.step(x[0])
    assert torch.equal(stepped, s[0]) and at._fields == ("v", "w") == layer.state_names
    lengths = torch.tensor([T, 4], device=device)
    ended, left = layer(x, lengths=lengths, return_state=True)
    assert torch.equal(ended[:, 0], s[:, 0]) and torch.equal(ended[:4, 1], s[:4, 1]) and not ended[4:, 1].any()
    assert torch.equal(left.v[1], layer(x[:4], return_state=True)[1].v[1])
    packed = layer_of(backend, packed=True).to(device)(x)
    assert torch.equal(packed.spikes, s) and torch.equal(packed.words, reference.spikes_pack(s))
    half = layer(x.bfloat16(), return_h=True)[1]
    close(half, layer_of()(x.bfloat16().cpu().float(), return_h=True)[1].double(), 1e-2)
    stream = snn.TimeSequential(layer).stream()
    assert torch.equal(stream.chunk(x[:4]), s[:4]) and torch.equal(stream.step(x[4]), s[4])
    assert layer.nonfinite.item() == 0
    layer(torch.full_like(x, torch.nan))
    assert layer.nonfinite.item() == 1


def test_behind_batch_norm(backend, device):
    y = drawn(3, B, C, 4, 4)
    made = [
        snn.BatchNormNeuron(C, neuron=ADEX, v_threshold=0.3, backend=each, pool=2) for each in ("reference", backend)
    ]
    with torch.no_grad():
        for each in made:
            each.bias.fill_(0.7)
    found = []
    for each, place in zip(made, ("cpu", device), strict=True):
        x = y.to(place).requires_grad_()
        out = each.to(place)(x)
        (g,) = torch.autograd.grad((out * drawn(*out.shape, seed=3).to(place)).sum(), x)
        found.append((out.double().cpu(), g.double().cpu()))
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].mean() > 0.05
    close(found[1][1], found[0][1])


@pytest.mark.skipif("cpu" not in FUSED, reason="the cpu backend is not here")
def test_the_cpu_is_repeatable_and_raises_no_false_flag(compiled, two_threads):
    """Bit for bit, and for one thread and two; beside the neurons of a vector there are none that could overflow."""
    layer, x = layer_of("cpu", learnable=True), 1.2 * drawn(20, 4, C, 701) + 0.8

    def run():
        own = x.clone().requires_grad_()
        out = layer(own, return_v=True)
        return [*out, *torch.autograd.grad((out[0] * x).sum() + out[1].sum(), [own, *layer.parameters()])]

    one, two = run(), run()
    torch.set_num_threads(1)
    three = run()
    assert all(map(torch.equal, one, two)) and all(map(torch.equal, one[:3], three[:3]))
    for width in (1, 3, 17):
        # In millivolts: from a potential of 0, where no neuron is, it would rise beyond float32 at once.
        cold = layer_of("cpu", v_rest=-70.0, theta_rh=-50.0, delta_t=0.2, v_reset=-60.0, v_threshold=-40.0, a=0.0)
        start = (torch.full((1, 1, width), -70.0), torch.zeros(1, 1, width))
        cold(torch.zeros(2, 1, 1, width), start)
        assert cold.nonfinite.item() == 0
        cold(torch.zeros(2, 1, 1, width))
        assert cold.nonfinite.item() == 1


@pytest.mark.skipif("cpu" not in FUSED, reason="the cpu backend is not here")
def test_which_backend_and_why(compiled, monkeypatch):
    x = drawn(T, B, C, 8)
    assert layer_of("auto").backend_for(x) == "cpu"
    case = cuda_refuses(layer_of().spec)
    assert "it holds the built-in neurons, not AdEx@" in case


def cuda_refuses(spec):
    from trtkern.backends import Case, cuda

    return cuda.refuses(Case("lif", "cuda", torch.float32, spec))


# What is refused, with the line.


def charge(x, state, p):
    return (p.decay * state.v + x,)


def fire(trace, p):
    return trace.h, p.v_threshold


def settle(trace, s, p):
    return (where(s, 0.0, trace.h),)


PARAMS = {"decay": 0.5, "v_threshold": 1.0}
FACTOR = 2.0
MANY = float("inf")


def registered(name="Mine", **changes):
    own = {"states": ("v",), "params": PARAMS, "charge": charge, "fire": fire, "settle": settle}
    return neurons.register(name, **{**own, **changes})


def looping(x, state, p):
    h = p.decay * state.v
    for _ in range(3):
        h = h + x
    return (h,)


def deciding(x, state, p):
    return (p.decay * state.v + x if x > 0 else x,)


def listing(x, state, p):
    return [p.decay * v + x for v in state]


def calling(x, state, p):
    return (p.decay * torch.tanh(state.v) + x,)


def calling_another(x, state, p):
    return charge(x, state, p)


def powering(x, state, p):
    return (p.decay * state.v**2 + x,)


def chained(x, state, p):
    return (where(0.0 < x < 1.0, x, p.decay * state.v),)


def endless(x, state, p):
    return (p.decay * state.v + x * MANY,)


def huge(x, state, p):
    return (p.decay * state.v + x * 1e39,)


def misspelt(x, state, p):
    return (p.dekay * state.v + x,)


def by_the_wrong_dot(x, state, p):
    return (p.v * state.v + x + p.decay,)


def of_the_wrong_kind(x, state, p):
    return (where(state.v, x, p.decay),)


def counting_a_condition(x, state, p):
    return (p.decay * state.v + (x > 0.0),)


def equal(x, state, p):
    return (where(x == 0.0, p.decay, state.v),)


def two_parts(x, state, p):
    return p.decay * state.v + x, x


def unpacking_three(x, state, p):
    a, b, c = p
    return (a * state.v + b * x + c,)


def words(x, state, p):
    return ("h",)


def constant(x, state, p):
    return (p.decay * 3.0,)


def deaf(x, state, p):
    return (p.decay * state.v,)


def forgetful(x, state, p):
    return (p.decay * x,)


def of_two(x, p):
    return (x,)


def any_number(*arguments):
    return (arguments[0],)


def importing(x, state, p):
    import math

    return (p.decay * math.sin(state.v) + x,)


def multiplying_the_spike(trace, s, p):
    return (trace.h - s * p.v_threshold,)


def always(trace, p):
    return p.decay, p.v_threshold


def capturing():
    captured = 2.0
    return lambda x, state, p: (p.decay * state.v + captured * x,)


def line_of(function, below):
    return function.__code__.co_firstlineno + below


@pytest.mark.parametrize(
    ("changes", "below", "message"),
    [
        ({"charge": looping}, 2, "expected a straight line, got a branch, a loop or a chain of comparisons; use where"),
        ({"charge": deciding}, 1, "expected a straight line, got a branch"),
        ({"charge": listing}, 1, "expected a straight line, got a"),
        ({"charge": chained}, 1, "expected a straight line, got a branch, a loop or a chain of comparisons"),
        ({"charge": calling}, 1, r"expected arithmetic .* fma, exp, abs, maximum, where, got 'torch'; write `from"),
        ({"charge": calling_another}, 1, "where, got 'charge'"),
        ({"charge": powering}, 1, r"expected arithmetic .*, got TypeError: unsupported operand type.* \*\*"),
        ({"charge": endless}, 1, "expected MANY to be a finite number, got inf"),
        ({"charge": huge}, 0, "expected numbers that are finite in float32, got 1e[+]39"),
        ({"charge": misspelt}, 1, "behind a dot, got 'dekay'; did you mean 'decay'"),
        ({"charge": by_the_wrong_dot}, 1, "expected p to have decay, v_threshold, got p.v"),
        ({"charge": of_the_wrong_kind}, 0, "expected a condition first in where, got the number state_v"),
        ({"charge": counting_a_condition}, 0, r"got the condition \(x > 0.0\); write where\(\(x > 0.0\), 1.0, 0.0\)"),
        ({"charge": equal}, 1, "expected <, <=, > or >=, got a comparison with =="),
        ({"charge": two_parts}, 0, "expected it to return h, got 2 parts instead of 1"),
        ({"charge": unpacking_three}, 1, "got ValueError: not enough values to unpack"),
        ({"charge": words}, 0, "expected a number for h, got 'h'"),
        ({"charge": constant}, 0, r"expected h to depend on what the step has, got h = \(p_decay \* 3.0\)"),
        ({"charge": deaf}, 0, "expected the input current x in h of the same step, got h = "),
        ({"charge": forgetful}, 0, "expected the state v to be used, got functions that do not; leave it out"),
        ({"charge": of_two}, 0, r"expected a function of \(x, state, p\), got \(x, p\); take just these"),
        ({"charge": any_number}, 0, r"expected a function of \(x, state, p\), got \(\*arguments\)"),
        ({"charge": importing}, 1, "expected a straight line, got an import inside"),
        ({"charge": capturing()}, 0, "expected a function without a closure, got one that captures 'captured'"),
        ({"settle": multiplying_the_spike}, 0, r"got the condition s; write where\(s, 1.0, 0.0\)"),
        ({"fire": always}, 0, "expected a number of the trace in what it compares, got none: it fires always"),
        ({"params": {**PARAMS, "beta": 1.0}}, 0, "expected the parameter beta to be used"),
    ],
)
def test_functions_that_are_refused(changes, below, message):
    (part, function) = next(iter(changes.items()))
    function = function if callable(function) else charge
    part = part if part != "params" else "charge"
    with pytest.raises(TypeError, match=message) as caught:
        registered(**changes)
    place = f"neurons.register: Mine, {part} ({__file__}, line {line_of(function, below)}): expected"
    assert str(caught.value).startswith(place), caught.value
    assert "Mine" not in rows.LATEST


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("LIF", {}, "expected a name of letters, digits, _ . and - that no built-in neuron has, got 'LIF'"),
        ("a@b", {}, "expected a name of letters.*, got 'a@b'"),
        ("a|b", {}, "expected a name of letters.*, got 'a|b'"),
        ("Mine", {"states": ("u",)}, "expected one or two states, v among them, got u"),
        ("Mine", {"states": ("v", "w", "z")}, "expected one or two states, v among them, got v, w, z"),
        ("Mine", {"states": ("v", "v")}, "expected states to differ, got v, v"),
        ("Mine", {"trace": ("v",)}, "expected a trace of 1 names, as many as states, with h among them, got v"),
        ("Mine", {"params": {}}, "expected params as .* with 1 to 10 names"),
        ("Mine", {"params": {"alpha": 1.0}}, "expected parameters whose names no option of a layer has, got 'alpha'"),
        ("Mine", {"params": {"1st": 1.0}}, "expected params to be names, got '1st'"),
        ("Mine", {"params": {"decay": "big"}}, "expected the default of decay to be a number or None, got 'big'"),
        (
            "Mine",
            {"ranges": {"dekay": (0, 1)}},
            "ranges: expected one of decay, v_threshold, got 'dekay'; did you mean",
        ),
        ("Mine", {"ranges": {"decay": (1, 0)}}, r"expected the range of decay as \(lowest, highest\), got \(1, 0\)"),
        ("Mine", {"ranges": {"decay": (0.6, 1)}}, "expected the default of decay to be finite, 0.6 to 1, got 0.5"),
        ("Mine", {"settle": {"none": settle}}, "expected settle to be a function or .*, got"),
    ],
)
def test_names_and_numbers_that_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        registered(name, **changes)


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"Mine, charge: expected a plain function of \(x, state, p\), got <built-in"):
        registered(charge=max)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"taw": 1.0}, TypeError, "AdEx: expected one of tau, .*got 'taw'; did you mean 'tau_w'"),
        ({"tau": 0.0}, ValueError, "AdEx: expected tau to be from 0.001 to inf, got 0.0"),
        ({"tau": torch.tensor([1.0, -1.0])}, ValueError, "AdEx: expected tau to be from 0.001 to inf, got values from"),
        ({"tau": snn.Bounded(2.0, "clamp", low=-1.0, high=4.0)}, ValueError, "AdEx: expected tau to be bounded within"),
        ({"a": float("nan")}, ValueError, "AdEx: expected a to be finite, got nan"),
        ({"v_reset": None}, TypeError, "AdEx: expected a value of v_reset, which has no default, got none"),
        ({"reset": "soft"}, ValueError, "AdEx: expected reset to be hard, got 'soft'"),
        ({"fire_on_equal": True, "v_threshold": -1.0}, ValueError, "AdEx: expected v_threshold to be > 0 with fire_on"),
    ],
)
def test_settings_that_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        snn.Neuron(ADEX, **settings)
    with pytest.raises(error, match=message):
        snn.BatchNormNeuron(C, neuron="AdEx", **settings)


def test_names_that_are_no_neuron_of_ones_own():
    with pytest.raises(
        ValueError, match=r"Neuron: expected a neuron that was registered, got 'ALIF', which is snn.ALIF"
    ):
        snn.Neuron("ALIF")
    with pytest.raises(ValueError, match=r"neuron: expected one of LIF, .*AdEx.*, got 'AdEks'; did you mean 'AdEx'"):
        snn.Neuron("AdEks")
    with pytest.raises(TypeError, match=r"expected what trtkern.neurons.register returned"):
        snn.Neuron(charge)
    needs = registered("Needs", params={"decay": None, "v_threshold": 1.0})
    with pytest.raises(TypeError, match=r"Needs: expected a value of decay, which has no default, got none"):
        snn.Neuron(needs)
    odd = registered("Odd", params={"step": 0.5, "v_threshold": 1.0}, charge=lambda x, state, p: state.v * p.step + x)
    with pytest.raises(
        ValueError, match=r"Odd: expected parameters whose names no attribute of a layer has, got 'step'"
    ):
        snn.Neuron(odd)


def test_a_learned_parameter_that_left_its_range():
    layer = layer_of(tau=nn.Parameter(torch.tensor(2.0)))
    with torch.no_grad():
        layer.tau.fill_(-2.0)
    with pytest.raises(
        ValueError, match=r"expected tau to be from 0.001 to inf, got -2.0; a learned one stays there as"
    ):
        layer(drawn(T, B, C))
    free = registered("Free", params={"decay": 7.0, "v_threshold": -1.0})
    assert snn.Neuron(free, decay=nn.Parameter(torch.tensor(-3.0)), backend="reference")(drawn(2, B, C)).shape == (
        2,
        B,
        C,
    )


# What names mean.


def test_two_resets_and_the_number_before_the_threshold():
    def soft(trace, s, p):
        return (where(s, trace.h - p.v_threshold, trace.h),)

    def hard(trace, s, p):
        return (where(s, p.v_reset, trace.h),)

    both = registered("Both", params={**PARAMS, "v_reset": 0.0}, settle={"hard": hard, "soft": soft})
    x = torch.full((3, 1, 1), 0.25)
    for settings, like in (
        ({}, {}), ({"v_reset": None}, {"v_reset": None}), ({"reset": "soft"}, {"v_reset": None}),
        ({"fire_on_equal": True, "v_threshold": 0.25}, {"fire_on_equal": True, "v_threshold": 0.25}),
    ):  # fmt: skip
        layer = snn.Neuron(both, backend="reference", **settings)
        want = snn.LIF(backend="reference", **like)
        for each in (x, 3 * x):
            assert all(map(torch.equal, layer(each, return_state=True), want(each, return_state=True)))
    assert "reset='soft'" in repr(layer_soft := snn.Neuron(both, reset="soft")) and "'Both'" in repr(layer_soft)


@pytest.mark.parametrize("backend", ["reference", *(name for name in FUSED if name == "triton")])
def test_a_state_that_is_not_its_trace_and_a_decay_of_a_parameter(backend):
    own = registered(
        "Halved", charge=lambda x, state, p: exp(-1.0 / p.decay) * state.v + x,
        settle=lambda trace, s, p: where(s, 0.0, 0.5 * trace.h),
    )  # fmt: skip
    decay = nn.Parameter(torch.tensor(1 / math.log(2)))
    for value in (decay, decay.item()):  # as a number too: then the exponential is that of a number
        layer = snn.Neuron(own, decay=value, v_threshold=1.01, backend=backend)
        s, h = layer(torch.full((4, 1, 1), 0.8), return_h=True)
        torch.testing.assert_close(h.flatten(), torch.tensor([0.8, 1.0, 1.05, 0.8]))
        assert s.flatten().tolist() == [0, 0, 1, 0]


def cell(text):
    space = {"where": where, "exp": exp, "register": neurons.register, "__name__": "notebook"}
    exec(compile(text, "<cell>", "exec"), space)
    return space["handle"]


NOTEBOOK = """
GAIN = {gain}
handle = register(
    "Noted", states=["v"], params={{"decay": 0.5}}, charge=lambda x, state, p: p.decay * state.v + GAIN * x,
    fire=lambda trace, p: (trace.h, 1.0), settle=lambda trace, s, p: where(s, 0.0, trace.h),
)
"""


def test_an_edited_cell_replaces_it_and_layers_keep_theirs():
    first, again, edited = (cell(NOTEBOOK.format(gain=gain)) for gain in (1.0, 1.0, 2.0))
    assert first == again != edited and first.startswith("Noted@")
    x = torch.full((1, 1, 1), 0.25)
    layers = [snn.Neuron(name, backend="reference") for name in (first, "Noted", edited)]
    assert [layer(x, return_h=True)[1].item() for layer in layers] == [0.25, 0.5, 0.5]
    cell(NOTEBOOK.format(gain=1.0))
    assert snn.Neuron("Noted").kind == first and layers[2].kind == edited
    spec = layers[0].spec
    assert LIFSpec.from_token(spec.token) == spec == LIFSpec(neuron="Noted") != layers[1].spec
    assert copy.deepcopy(layers[0]).kind == first


def test_what_it_is_called_is_the_same_in_every_process():
    """Whatever was derived before: cached libraries and saved layers are found by it."""
    code = "import sys; sys.path.insert(0, {!r}); {} import adex; print(adex.ADEX)"
    before = "from trtkern import adjoint; adjoint.functions('CLIF', 'soft', False);"
    for first in ("", before):
        done = subprocess.run(
            [sys.executable, "-c", code.format(str(EXAMPLES), first)], capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.stdout.strip() == ADEX, done.stderr


@pytest.fixture
def elsewhere(monkeypatch):
    """Another process, in which nothing of a user's is registered."""

    def go():
        monkeypatch.setattr(rows, "_VERSIONS", {})
        monkeypatch.setattr(rows, "LATEST", {})
        LIFSpec.from_token.cache_clear()

    yield go
    LIFSpec.from_token.cache_clear()


def test_a_saved_layer_takes_its_neuron_along(elsewhere, tmp_path, monkeypatch):
    text = (EXAMPLES / "adex.py").read_text()
    (tmp_path / "adex_of_a_test.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import adex_of_a_test

    x = 1.2 * drawn(T, B, C) + 0.8
    layer = snn.BatchNormNeuron(C, neuron=adex_of_a_test.ADEX, tau=nn.Parameter(torch.tensor(3.0)), backend="reference")
    want, saved = layer.eval()(x, return_state=True), io.BytesIO()
    torch.save((layer, want[1]), saved)
    for _ in range(2):
        elsewhere()
        monkeypatch.delitem(sys.modules, "adex_of_a_test")
        saved.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded, state = torch.load(saved, weights_only=False)
        found = loaded(x, return_state=True)
        assert torch.equal(found[0], want[0]) and state._fields == ("v", "w") and all(map(torch.equal, state, want[1]))
        assert loaded.lif.state_dict().keys() == {"tau"} and repr(loaded) == repr(layer)
    for change, error in (
        (("(trace.h, p.v_threshold)", "trace.h, p.v_threshold"), None),
        (("return trace.h, p.v_threshold", "return trace.h, p.v_threshold + 0.5"), "is not the one that the layer was"),
        (('"b": 0.5', '"c": 0.5'), "expected the parameters .* in a saved layer"),
        (
            ("ADEX = register", "ADEX = str"),
            "expected the neuron 'AdEx' to be registered where a layer with it is loaded",
        ),
    ):
        new = text.replace(*change)
        (tmp_path / "adex_of_a_test.py").write_text(new.replace("p.b,", "p.c,") if '"c"' in new else new)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        elsewhere()
        monkeypatch.delitem(sys.modules, "adex_of_a_test", raising=False)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        saved.seek(0)
        if error is None:
            torch.load(saved, weights_only=False)
        elif "expected" in error:
            with pytest.raises((ValueError, TypeError), match=error), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.load(saved, weights_only=False)
        else:
            with pytest.warns(UserWarning, match=error):
                torch.load(saved, weights_only=False)


def test_a_neuron_that_has_no_place_is_missed_when_loading(elsewhere):
    layer = snn.Neuron(cell(NOTEBOOK.format(gain=3.0)), backend="reference")
    saved = pickle.dumps(layer)
    assert pickle.loads(saved).spec == layer.spec
    elsewhere()
    with pytest.raises(ValueError, match=r"expected the neuron 'Noted' to be registered .*No module named 'notebook'"):
        pickle.loads(saved)
    cell(NOTEBOOK.format(gain=3.0))
    assert pickle.loads(saved).kind == layer.kind


def _in_another_process(layer, x, found):
    found.put(layer(x).sum().item())


def test_a_spawned_process_gets_the_layer():
    context = torch.multiprocessing.get_context("spawn")
    found, layer, x = context.Queue(), layer_of(), 1.2 * drawn(T, B, C) + 0.8
    other = context.Process(target=_in_another_process, args=(layer, x, found))
    other.start()
    try:
        assert found.get(timeout=PATIENCE) == layer(x).sum().item() > 0
        other.join(PATIENCE)
    finally:
        other.kill()


def test_copies_graphs_and_state_dicts():
    layer, x = layer_of(learnable=True), 1.2 * drawn(T, B, C) + 0.8
    want, state = layer(x, return_state=True)
    again = copy.deepcopy(layer)
    assert (
        torch.equal(again(x), want) and repr(again) == repr(layer) and "Neuron('AdEx', tau=Parameter[3]" in repr(layer)
    )
    other = layer_of(learnable=True)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), want)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), want)
    state = type(state)(*(part.detach() for part in state))
    assert all(map(torch.equal, pickle.loads(pickle.dumps(state)), state))
    assert type(pickle.loads(pickle.dumps(state))) is type(state) and type(copy.deepcopy(state)) is type(state)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, v: layer(x, v, return_state=True), backend="eager", fullgraph=True)
    for before in (None, state):
        got, found = compiled(x, before)
        wanted, last = layer(x, before, return_state=True)
        assert torch.equal(got, wanted) and all(map(torch.equal, found, last))


def test_networks_take_it():
    x = torch.rand(2, 1, 4, 4)
    for neuron in (ADEX, "AdEx", "adex:ADEX"):
        net = build("topology", (1, 4, 4), 3, layers="CONVAP-4-3-1-1_FC-5", neuron=neuron, tau=3.0, backend="reference")
        layers = [m for m in net.modules() if isinstance(m, snn.Neuron)]
        assert len(layers) == 2 and all(layer.tau == 3.0 and layer.kind == ADEX for layer in layers)
        net(x).sum().backward()
    for neuron, message in (
        ("AdEks", "expected one of LIF, .*, or module:NAME of what trtkern.neurons.register returned, got 'AdEks'"),
        (
            "adex:charge",
            "model.neuron: expected adex:charge to be what trtkern.neurons.register returned, .* got <func",
        ),
        ("adex:ADEKS", "expected a name of the module adex, got 'ADEKS', which it has not; did you mean 'ADEX'"),
    ):
        with pytest.raises(ValueError, match=message):
            build("topology", (1, 4, 4), 3, layers="FC-5", neuron=neuron)
    with pytest.raises(TypeError, match=r"got 'taw'; did you mean 'tau_w'"):
        build("topology", (1, 4, 4), 3, layers="FC-5", neuron=ADEX, taw=1.0)


def test_a_pair_becomes_one_layer_and_two_again():
    x = drawn(T, B, 2, 4, 4)
    net = snn.TimeSequential(nn.Conv2d(2, C, 3, padding=1), nn.BatchNorm2d(C), layer_of(), nn.AvgPool2d(2))
    want = net(x)
    fused = snn.convert_norm_lif(copy.deepcopy(net).train())
    assert isinstance(fused[1], snn.BatchNormLIF) and isinstance(fused[1].lif, snn.Neuron)
    torch.testing.assert_close(fused(x), want)
    snn.unfuse(fused)
    assert isinstance(fused[2], snn.Neuron) and list(fused.state_dict()) == list(net.state_dict())


def test_the_example_is_what_the_page_shows():
    page = (EXAMPLES.parent / "docs" / "extending.md").read_text()
    code = Path(adex.__file__).read_text().partition('"""\n\n')[2]
    assert code.strip() in page
