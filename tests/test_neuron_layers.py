"""The layers of the neurons beside LIF: values and gradients against the plain loop in float64, what layers share."""

import inspect
import pickle

import pytest
import torch
from torch import nn

from trtkern import names, neurons, reference
from trtkern import nn as snn
from trtkern.analysis import energy
from trtkern.analysis._sites import sites
from trtkern.models.build import build
from trtkern.profiling import memory, traffic
from trtkern.profiling.firing.activity import firing_rates
from trtkern.spec import LIFSpec

T, B, C = 6, 2, 3

OTHERS = [name for name in neurons.TABLE if name != "LIF"]
SEVERAL = [name for name in OTHERS if len(neurons.TABLE[name].states) > 1]
ROWS = [(name, reset) for name in OTHERS for reset in ("soft", "hard") if reset in neurons.TABLE[name].settle]


def sources(name):
    """What a layer takes, each with a value near which it fires now and then: that of the row's parameter, or for what
    the layer makes those of (tau, v_leak) the default."""
    defaults = inspect.signature(getattr(snn, name)).parameters
    return {each: neurons.CENTERS.get(each, defaults[each].default) for each in names.NEURONS[name]}


def make(name, channels=None, **settings):
    """A layer whose parameters are all learned, per channel where ``channels`` says how many."""
    draw = torch.Generator().manual_seed(3)

    def held(center):
        spread = 0.1 * torch.rand(() if channels is None else (channels,), generator=draw)
        return nn.Parameter(center + spread)

    own = {key: held(center) for key, center in sources(name).items()}
    settings = {"surrogate": "sigmoid", "alpha": 2.0, "backend": "reference", "v_reset": None, **settings}
    return getattr(snn, name)(**own, v_threshold=held(0.8), **settings)


def current(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + 0.5


def row_values(name, p):
    """The row's parameters in float64 from those of the layer, by the definitions in the layers' docstrings."""
    derived = {
        "bias": lambda: (1 - p["decay"]) * p["v_leak"],
        "reset_amount": lambda: p["v_threshold"],
        "v_reset": lambda: torch.zeros((), dtype=torch.float64),
        "gain": lambda: 1 / p["tau"],
        "rate_w": lambda: 1 / p["tau_w"],
    }
    params = LIFSpec("soft", neuron=name).row.params
    return [p[key] if key in p else derived[key]() for key in params]


def parts(state):
    return [state] if isinstance(state, torch.Tensor) else list(state)


def close(got, want, bound=2e-5):
    scale = want.abs().max().clamp(min=1e-3)
    assert ((got.detach().double() - want).abs().max() / scale).item() <= bound


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("channels", [C, None])
def test_against_the_plain_loop_in_float64(name, channels):
    layer, x = make(name, channels), current(T, B, C, seed=1).requires_grad_()
    s, state, h = layer(x, return_state=True, return_h=True)
    leaves = dict(layer.named_parameters())
    assert set(leaves) == {*names.NEURONS[name], "v_threshold"}
    made = [s, h, *parts(state)]
    grads = [current(*t.shape, seed=i + 5) for i, t in enumerate(made)]
    got = torch.autograd.grad(made, [x, *leaves.values()], grads, materialize_grads=True)

    wide = {key: p.detach().double().requires_grad_() for key, p in leaves.items()}
    x64 = x.detach().double().requires_grad_()
    spec = LIFSpec("soft", "sigmoid", 2.0, neuron=name)
    trace = reference.lif(x64, None, row_values(name, wide), spec)
    last = [trace.state] if layer.State is None else list(trace.state)
    want = torch.autograd.grad(
        [trace.s, trace.h, *last], [x64, *wide.values()], [g.double() for g in grads], materialize_grads=True
    )
    assert torch.equal(s.detach().double(), trace.s) and 0.02 < s.mean() < 0.98
    for found, wanted in zip([*made[1:], *got], [trace.h, *last, *want], strict=True):
        close(found, wanted.detach())
    assert all(g.abs().max() > 0 for g in want)


@pytest.mark.parametrize(("name", "reset"), ROWS)
def test_chunks_and_steps_equal_the_sequence(name, reset):
    layer, x = make(name, C, v_reset=None if reset == "soft" else 0.05), current(9, B, C, 2)
    want, last = layer(x, return_state=True)
    chunks, state = [], None
    for chunk in x.split(4):
        s, state = layer(chunk, state, return_state=True)
        chunks.append(s)
    assert torch.equal(torch.cat(chunks), want)
    stepped, at = zip(*[layer.step(x[0])], strict=True)
    stepped, at = [*stepped], at[0]
    for step in x[1:]:
        s, at = layer.step(step, at)
        stepped.append(s)
    assert torch.equal(torch.stack(stepped), want)
    for found in (state, at):
        assert type(found) is type(last) and all(map(torch.equal, parts(found), parts(last)))


@pytest.mark.parametrize("name", SEVERAL)
def test_a_state_has_names_and_comes_back_in_three_forms(name):
    layer, x = make(name), current(T, B, C)
    _, state = layer(x, return_state=True)
    assert state._fields == layer.state_names and all(part.shape == (B, C) for part in state)
    assert all(part.dtype == torch.float32 for part in layer(x.bfloat16(), return_state=True)[1])
    want = layer(x, state)
    assert torch.equal(layer(x, tuple(state)), want) and torch.equal(layer(x, torch.stack(state)), want)
    assert all(map(torch.equal, pickle.loads(pickle.dumps(state)), state))
    assert not torch.equal(layer(x, state, return_v=True)[1], layer(x, return_v=True)[1])


@pytest.mark.parametrize("name", OTHERS)
def test_behind_batch_norm(name):
    """One layer of the two together: the same spikes and gradients, its state, eval, packed, pooled."""
    settings = {"backend": "reference", "v_threshold": 0.2}
    fused = snn.BatchNormNeuron(C, neuron=getattr(snn, name), **settings)
    norm, neuron = nn.BatchNorm2d(C), getattr(snn, name)(**settings)
    y = current(T, B, C, 4, 4, seed=7, dtype=torch.float64)
    want, want_state = neuron(norm.double()(y.flatten(0, 1)).unflatten(0, (T, B)), return_state=True)
    got, state = fused.double()(y, return_state=True)
    assert torch.equal(got, want) and want.mean() > 0
    for found, wanted in zip(parts(state), parts(want_state), strict=True):
        close(found, wanted.detach(), 1e-12)
    assert type(state) is type(want_state)
    fused = fused.float().eval()
    y = y.float()
    s, state = fused(y, return_state=True)
    halves = []
    at = None
    for chunk in y.split(3):
        part, at = fused(chunk, None, at, return_state=True)
        halves.append(part)
    assert torch.equal(torch.cat(halves), s) and all(map(torch.equal, parts(at), parts(state)))
    assert torch.equal(fused.step(y[0])[0], s[0])
    fused.packed, fused.pool = True, 2
    pooled = fused(y)
    assert torch.equal(pooled.spikes, reference.average_pool(s)) and pooled.words.shape == (1, B, C, 4, 4)


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_layer_shares(name):
    layer, x = make(name, C), current(T, B, C, 2)
    want = layer(x)
    moved = make(name, C, time_dim=1, channel_dim=2)
    assert torch.equal(moved(x.transpose(0, 1)), want.transpose(0, 1))
    packed = make(name, C, packed=True)(x)
    assert torch.equal(packed.spikes, want) and torch.equal(packed.words, reference.spikes_pack(want))
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), want) and repr(again) == repr(layer)
    other = make(name, C)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), want)
    graph = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert torch.equal(graph(x), want)
    assert layer.backend_for(x) == "reference"
    assert layer.nonfinite.item() == 0
    layer(torch.full_like(x, torch.nan))
    assert layer.nonfinite.item() == 1
    layer.reset_parameters()
    assert layer.nonfinite.item() == 0


@pytest.mark.parametrize("name", ["QIF", "EIF", "Izhikevich"])
def test_lanes_beside_the_neurons_raise_no_flag(name, backend, device):
    """A step divides by tau and by delta_t, each a number a channel here; vectors are wider than what is left."""
    for width in (1, 3, 5, 16, 17):
        layer = getattr(snn, name)(backend=backend, tau=nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))).to(device)
        layer(torch.rand(2, 1, 3, width, device=device))
        assert layer.nonfinite.item() == 0


def test_the_readout():
    own = {key: nn.Parameter(torch.tensor(v)) for key, v in sources("CUBALIF").items()}
    layer, x = snn.CUBALI(**own, backend="reference"), current(T, B, C)
    v, state = layer(x, return_state=True)
    p = {key: t.detach().double() for key, t in own.items()} | {"v_threshold": torch.ones(()).double()}
    trace = reference.lif(x.double(), None, row_values("CUBALIF", p), LIFSpec("none", neuron="CUBALIF"))
    close(v, trace.v)
    close(torch.stack(state), trace.state)
    v.sum().backward()
    assert all(t.grad is not None and t.grad.abs() > 0 for t in own.values())
    first, state = layer(x[:2], return_state=True)
    assert torch.equal(torch.cat([first, layer(x[2:], state)]), v)
    assert state._fields == ("i", "v") and torch.equal(layer.step(x[0])[0], v[0])


@pytest.mark.parametrize(
    ("name", "parameter", "decay"),
    [("CUBALIF", "gain", "decay"), ("ALIF", "gain", "decay"), ("ALIF", "gain_a", "decay_a"), ("CLIF", "rate", "decay")],
)
def test_a_parameter_that_is_the_complement_of_a_decay(name, parameter, decay):
    settings = {"backend": "reference", "surrogate": "atan"}
    held, x = nn.Parameter(torch.tensor(0.7)), current(T, B, C)
    one = getattr(snn, name)(**{decay: held, parameter: None}, **settings)
    two = getattr(snn, name)(**{decay: held, parameter: 1 - held.detach()}, **settings)
    assert torch.equal(one(x), two(x))
    values = one.values()
    assert torch.autograd.grad(values[parameter], held)[0] == -1 and values[decay] is held


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("CUBALIF", {"decay_syn": 1.5}, r"CUBALIF: expected decay_syn to be in \[0, 1\], got 1.5"),
        ("ALIF", {"decay_a": -0.1}, r"ALIF: expected decay_a to be in \[0, 1\], got -0.1"),
        ("AdLIF", {"decay_w": torch.tensor([0.5, 2.0])}, r"AdLIF: expected decay_w to be in \[0, 1\], got values"),
        ("QIF", {"tau": 0.0}, "QIF: expected tau to be > 0, got 0.0"),
        ("EIF", {"delta_t": -1.0}, "EIF: expected delta_t to be > 0, got -1.0"),
        ("Izhikevich", {"tau_w": 0.0}, "Izhikevich: expected tau_w to be > 0, got 0.0"),
        ("QIF", {"tau": snn.Bounded(2.0, "clamp", low=-1.0, high=4.0)}, "QIF: expected tau to be bounded within 0 to"),
        ("CLIF", {"v_reset": 0.0}, r"CLIF: expected v_reset=None \(its reset is soft\), got 0.0"),
        ("ALIF", {"fire_on_equal": True}, "ALIF: expected fire_on_equal=False, since the threshold adapts, got True"),
        ("CUBALIF", {"reset_amount": 1.0}, "CUBALIF: expected reset_amount with a soft reset only"),
    ],
)
def test_settings_that_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(snn, name)(**settings)


def test_a_learned_tau_that_left_its_range():
    layer = snn.QIF(tau=nn.Parameter(torch.tensor([2.0, 1.0, 3.0])), backend="reference")
    with torch.no_grad():
        layer.tau[1] = -0.5
    with pytest.raises(ValueError, match=r"QIF: expected tau to be > 0, got values from -0.5 to 3.0; a learned one"):
        layer(current(T, B, C))


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ((torch.zeros(B, C),), ValueError, "CUBALIF: expected v0 with the 2 states i, v, got 1: a tuple of a tensor"),
        ((torch.zeros(B, C), None), TypeError, "CUBALIF: expected the state v of v0 to be a tensor, got None"),
        ((torch.zeros(B), torch.zeros(B, C)), ValueError, r"CUBALIF: state i: expected v0 of shape \(2, 3\)"),
        ((torch.zeros(B, C), torch.zeros(B, C).double()), TypeError, "CUBALIF: state v: expected v0 to be a .*float32"),
        (torch.zeros(B, C), ValueError, r"cubalif: expected v0 of shape \(2, 2, 3\).* after an axis for i, v"),
    ],
)
def test_states_that_are_refused(state, error, message):
    x = current(T, B, C)
    for layer in (snn.CUBALIF(backend="reference"), snn.CUBALI(backend="reference")):
        with pytest.raises(error, match=message.replace("CUBALIF:", f"{type(layer).__name__}:")):
            layer(x, state)
    with pytest.raises(error):
        snn.BatchNormLIF(C, neuron=snn.CUBALIF, backend="reference")(x, None, state)


def test_a_tuple_for_a_neuron_of_one_state():
    with pytest.raises(
        TypeError, match=r"qif: expected v0 to be a torch.float32 tensor of shape \(2, 3\) .*, got a tuple of a tensor"
    ):
        snn.QIF(backend="reference")(current(T, B, C), (torch.zeros(B, C),))


@pytest.mark.parametrize("name", OTHERS)
def test_a_pair_becomes_one_layer_and_two_again(name):
    def pair():
        torch.manual_seed(0)
        neuron = getattr(snn, name)(v_threshold=nn.Parameter(torch.tensor(0.3)), backend="reference")
        return snn.TimeSequential(nn.Conv2d(2, C, 3, padding=1), nn.BatchNorm2d(C), neuron, nn.AvgPool2d(2))

    x, plain, fused = current(T, B, 2, 4, 4), pair(), pair()
    want = plain(x)
    snn.convert_norm_lif(fused)
    assert isinstance(fused[1], snn.BatchNormLIF) and type(fused[1].lif).__name__ == name
    torch.testing.assert_close(fused(x), want)
    fused.load_state_dict(snn.convert_state_dict(plain.state_dict(), fused))
    snn.unfuse(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    alone = snn.unfuse(nn.Sequential(snn.BatchNormLIF(C, neuron=getattr(snn, name), backend="reference")))
    s, state = alone[0](current(T, B, C, 4, 4), return_state=True)
    again, _ = alone[0](current(T, B, C, 4, 4), None, state, return_state=True)
    assert s.shape == again.shape and len(parts(state)) == len(LIFSpec("soft", neuron=name).row.states)


@pytest.mark.parametrize("name", OTHERS)
def test_networks_by_name(name):
    first, value = next(iter(sources(name).items()))
    options = {first: value, "backend": "reference", "timesteps": 2}
    net = build("topology", (1, 4, 4), 3, layers="CONVAP-4-3-1-1_FC-5", neuron=name, **options)
    layers = [m for m in net.modules() if isinstance(m, getattr(snn, name))]
    assert len(layers) == 2 and all(getattr(layer, first) == value for layer in layers)
    x = torch.rand(2, 1, 4, 4)
    net(x).sum().backward()
    with firing_rates(net) as rates:
        net(x)
    assert [layer.kind for layer in rates.layers.values()] == ["BatchNormLIF", name]
    assert memory(net, x).measured > 0
    with pytest.raises(TypeError, match="got 'decay_x'"):
        build("topology", (1, 4, 4), 3, layers="FC-5", neuron=name, decay_x=1.0)


@pytest.mark.parametrize("name", ["CUBALIF", "QIF"])
def test_what_is_kept_is_what_is_predicted(name):
    """On the kernels, whose backward pass begins at edges: of one state every 16 steps, of two every 8."""
    x = current(20, 1, C).requires_grad_()
    states = 1 if name == "QIF" else 2
    edges = 4 * states * (19 // (16 // states)) * C
    for settings, more in (({}, 0), ({"v_threshold": torch.full((C,), 0.8)}, 4 * C)):
        layer = getattr(snn, name)(backend="triton", **settings)
        (row,) = memory(layer, x).rows
        params = len(layer.spec.row.params) * more
        assert row.predicted == row.measured == x.numel() * 4 + edges + params
    if states == 1:
        layer = snn.QIF(nn.Parameter(torch.full((C,), 2.0)), backend="triton")
        row = memory(layer, x).rows[0]
        assert row.predicted == row.measured == x.numel() * 4 + edges + len(layer.spec.row.params) * 4 * C + 4 * C
    if states == 2:
        state = (torch.zeros(1, C), torch.zeros(1, C))
        row = memory(snn.CUBALIF(backend="triton"), (x, state)).rows[0]
        assert row.predicted == row.measured == x.numel() * 4 + edges + 2 * C * 4


@pytest.mark.parametrize(
    ("make", "backend"), [(snn.LIF, "reference"), (snn.CUBALIF, "reference"), (snn.CUBALIF, "triton")]
)
def test_compiled_as_one_graph_with_its_state(make, backend):
    torch.compiler.reset()
    layer, x = make(backend=backend), current(3, 1, C)
    compiled = torch.compile(lambda x, v: layer(x, v, return_state=True), backend="eager", fullgraph=True)
    _, state = layer(x, return_state=True)
    for before in (None, state):
        want, last = layer(x, before, return_state=True)
        got, found = compiled(x, before)
        assert torch.equal(got, want) and type(found) is type(last) and all(map(torch.equal, parts(found), parts(last)))


def test_what_counts_on_lif_alone_says_so():
    net = nn.Sequential(nn.Linear(C, C), snn.CUBALIF(backend="reference"))
    with pytest.raises(ValueError, match=r"energy: expected neurons whose update is a leak and a bias .* with CUBALIF"):
        energy(net, [(current(T, B, C), torch.zeros(T, dtype=torch.int64))], updates=True)
    with pytest.raises(ValueError, match=r"gradients: expected neurons whose one state decays .* got 1 with CUBALIF"):
        sites("gradients", net, None).__enter__()


def test_bytes_of_the_edges():
    """Chunks of 8 steps for two states, each with an edge of 8 bytes a neuron."""
    spec = LIFSpec("soft", neuron="CUBALIF")
    assert [traffic.edge_bytes(t, spec) for t in (8, 9, 17, 32)] == [0, 8 / 9, 16 / 17, 24 / 32]
    assert traffic.edge_bytes(32, LIFSpec(neuron="QIF")) == traffic.edge_bytes(32) == 4 / 32
    assert traffic.parameter_bytes(spec) == 4 * 8 and traffic.parameter_bytes() == 24
    forward = traffic.batch_norm_lif_forward(4, 17, spec=spec)
    assert traffic.moved(forward) == 12 + 16 / 17
    assert traffic.kept(traffic.lif_kept(2, 17, spec=spec)) == 2 + 16 / 17
