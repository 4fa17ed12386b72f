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

import pytest
import torch
from conftest import DEVICE, FUSED
from own_neurons import ADEX, EXAMPLES, PARAMS, B, C, T, drawn, layer_of, registered
from patience import PATIENCE
from torch import nn

from trtkern import LIFSpec, neurons, reference, rows
from trtkern import nn as snn
from trtkern.backends import Case, cuda
from trtkern.models.build import build
from trtkern.neurons import exp, where

BACKENDS = ["reference", *(name for name in FUSED if name != "cuda")]


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
def test_which_backend_and_why(compiled):
    x, spec = drawn(T, B, C, 8), layer_of().spec
    assert layer_of("auto").backend_for(x) == "cpu"
    assert "it holds the built-in neurons, not AdEx@" in cuda.refuses(Case("lif", "cuda", torch.float32, spec))


@pytest.mark.skipif("cpu" not in FUSED, reason="the cpu backend is not here")
def test_neurons_that_feed_each_other(compiled):
    """Outputs and gradients of a loop in float64 that goes on from the same spikes."""
    fed, x = snn.Recurrent(layer_of("auto"), nn.Linear(6, 6)), drawn(20, B, 6).requires_grad_()
    assert fed.backend_for(x) == "cpu"
    spikes, h = fed(x, return_h=True)
    g = drawn(20, B, 6)
    ((spikes + h) * g).sum().backward()
    leaf, weight, bias = (t.detach().double().requires_grad_() for t in (x, fed.linear.weight, fed.linear.bias))
    rows, spec = [float(value) for value in fed.neuron.values().values()], fed.neuron.spec
    want = reference.recurrent(leaf, None, None, weight, bias, rows, spec, known=spikes.detach().double())
    ((want.s + want.h) * g.double()).sum().backward()
    assert spikes.mean() > 0.02 and torch.equal(spikes.double(), want.s)
    torch.testing.assert_close(h.double(), want.h, rtol=1e-4, atol=1e-5)
    for mine, theirs in ((x, leaf), (fed.linear.weight, weight), (fed.linear.bias, bias)):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4 * theirs.grad.abs().max())


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
            ("ADEX = register", "ADEX = (lambda *_, **__: None)"),
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
    layer = layer_of()
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
    code = (EXAMPLES / "adex.py").read_text().partition('"""\n\n')[2]
    assert code.strip() in page


@pytest.mark.parametrize("backend", BACKENDS)
def test_firing_and_settling_may_share_what_they_compute(backend, compiled):
    """A soft reset by the threshold of the moment: both functions have the same sum in them."""

    def charge(x, state, p):
        v, a = state
        return 0.5 * v + x, p.decay_a * a

    def fire(trace, p):
        return trace.h, p.v_threshold + p.beta * trace.a

    def settle(trace, s, p):
        reset = p.v_threshold + p.beta * trace.a
        return where(s, trace.h - reset, trace.h), trace.a + where(s, reset, 0.0)

    neuron = neurons.register(
        "Moving", states=("v", "a"), charge=charge, fire=fire, settle=settle,
        params={"decay_a": 0.9, "beta": 0.5, "v_threshold": 0.6},
    )  # fmt: skip
    x, beta = drawn(9, 2, 3).to(DEVICE[backend]), torch.tensor(0.5, device=DEVICE[backend])
    made = []
    for one, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaf, b = (t.detach().to(dtype).requires_grad_() for t in (x, beta))
        layer = snn.Neuron(neuron, beta=nn.Parameter(b), surrogate="atan", backend=one).to(x.device)
        spikes, h = layer(leaf, return_h=True)
        ((spikes + h) * torch.linspace(0, 1, 9, dtype=dtype, device=x.device)[:, None, None]).sum().backward()
        made.append((spikes.double(), h.double(), leaf.grad.double(), layer.beta.grad.double()))
    assert made[0][0].any()
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-5)


def squared(x, state, p):
    return (p.decay * state.v + x * x,)


def test_a_charge_that_is_curved_in_x(backend, device, compiled):
    """The gradient of x depends on x alone: no parameter is learned and no state is asked for."""
    name = registered("Squared", charge=squared)
    x = drawn(5, 2, 64).to(device).requires_grad_()
    found = [torch.autograd.grad(snn.Neuron(name, backend=chosen)(x).sum(), x)[0] for chosen in (backend, "reference")]
    assert found[1].abs().max() > 0
    torch.testing.assert_close(*found)
