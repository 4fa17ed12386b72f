"""Sequences of different lengths: a padded batch is what its samples give one by one, whatever it is padded with."""

import pytest
import torch
from conftest import DEVICE, FUSED

import trtkern
from trtkern import nn as snn

PLAIN = ("LIF", "IF", "PLIF", "CUBALIF", "ALIF", "AdLIF", "CLIF", "QIF", "EIF", "Izhikevich")
NEURONS = (*PLAIN, "LI", "CUBALI")
LENGTHS = {1: (1, 0, 1), 2: (2, 0, 1, 1), 16: (0, 16, 7, 8, 9), 17: (17, 16, 1, 0), 33: (16, 0, 33, 17, 32, 5)}
BACKENDS = (*FUSED, "reference")
C = 3


def lively(name):
    return {"gain": 0.75} if name in ("ALIF", "AdLIF", "CUBALIF", "CUBALI") else {}


def made(name, backend, **options):
    """A layer with learned numbers, each of which gets a gradient."""
    options = {**lively(name), **options}
    layer = getattr(snn, name)(backend=backend, **options)
    for key in ("gain", "decay", "v_threshold", "tau"):
        value = layer.__dict__.get(key)
        if isinstance(value, float) and name not in ("IF", "LI") and not (key == "decay" and name == "PLIF"):
            delattr(layer, key)
            layer.register_parameter(key, torch.nn.Parameter(torch.full((C,), value) - 0.02 * torch.arange(C)))
    return layer


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def dense(y):
    return y.spikes if isinstance(y, snn.Spikes) else y


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def close(a, b, scale):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(scale, 1e-3))


def check(layer, x, lengths, v0=None, *, garbage=float("nan"), bitwise=True, **options):
    """Outputs, states and all gradients of a padded batch against those of its samples, each with its own T."""
    T, device = x.shape[0], x.device
    ends = lengths.tolist()
    padded = x.clone()
    for b, end in enumerate(ends):
        padded[end:, b] = garbage
    padded.requires_grad_()
    start = None if v0 is None else [part.clone().requires_grad_() for part in parts(v0)]
    given = None if start is None else start[0] if isinstance(v0, torch.Tensor) else tuple(start)
    first, state, *rest = layer(padded, v0=given, lengths=lengths, return_state=True, **options)
    outputs = [dense(first), *rest]
    weights = [torch.randn_like(y) for y in outputs]
    of_state = [torch.randn_like(part) for part in parts(state)]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    loss = loss + sum((part * w).sum() for part, w in zip(parts(state), of_state, strict=True))
    loss.backward()
    got = {key: p.grad.clone() for key, p in layer.named_parameters() if p.grad is not None}
    assert layer.nonfinite.item() == 0
    layer.zero_grad()
    for b, end in enumerate(ends):
        for y in outputs:
            assert torch.count_nonzero(y[end:, b]) == 0
        assert torch.count_nonzero(padded.grad[end:, b]) == 0
        own = None if v0 is None else [part[b : b + 1].clone().requires_grad_() for part in parts(v0)]
        if not end:  # nothing happens: the state is what it was, and so is its gradient
            for k, part in enumerate(parts(state)):
                want = torch.zeros_like(part[b]) if own is None else own[k][0]
                assert same(part[b], want)
                assert own is None or same(start[k].grad[b], of_state[k][b])
            continue
        alone = x[:end, b : b + 1].clone().requires_grad_()
        begin = None if own is None else own[0] if isinstance(v0, torch.Tensor) else tuple(own)
        one, last, *more = layer(alone, v0=begin, return_state=True, **options)
        for y, want in zip(outputs, [dense(one), *more], strict=True):
            assert same(y[:end, b : b + 1], want)
        for part, want in zip(parts(state), parts(last), strict=True):
            assert same(part[b : b + 1], want)
        total = sum((y * w[:end, b : b + 1]).sum() for y, w in zip([dense(one), *more], weights, strict=True))
        (total + sum((p * w[b : b + 1]).sum() for p, w in zip(parts(last), of_state, strict=True))).backward()
        pairs = [(padded.grad[:end, b : b + 1], alone.grad)]
        if own is not None:
            pairs += [(s.grad[b : b + 1], o.grad) for s, o in zip(start, own, strict=True)]
        for mine, theirs in pairs:
            assert same(mine, theirs) if bitwise else close(mine, theirs, theirs.abs().max().item()) is None
    assert padded.grad.device == device and len(x) == T
    for key, p in layer.named_parameters():
        if key in got:
            scale = got[key].abs().max().item()
            close(got[key], p.grad, scale)
    return outputs, got


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padded_batch_is_its_samples(backend, name, T):
    if backend == "triton" and T not in (2, 17) and name not in ("LIF", "CUBALIF", "LI"):
        pytest.skip("the interpreter is slow: these lengths are tried with other neurons")
    device = DEVICE[backend]
    layer = made(name, backend).to(device)
    lengths = torch.tensor(LENGTHS[T], device=device)
    x = torch.rand(T, len(lengths), C, 5, device=device) * 3
    outputs, grads = check(layer, x, lengths, bitwise=backend != "reference")
    assert T == 1 or outputs[0].std() > 0
    assert name in ("IF", "LI") or any(g.abs().max() > 0 for g in grads.values())


KINDS = ("v0", "return_v", "return_h", "packed", "soft", "detached", "static")


@pytest.mark.parametrize("name", ["LIF", "CUBALIF", "ALIF"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_everything_else(backend, kind, name):
    """In the interpreter all kinds with LIF, and each with one of the two that have more states."""
    if backend == "triton" and DEVICE[backend] == "cpu" and name == ("ALIF", "CUBALIF")[KINDS.index(kind) % 2]:
        pytest.skip("the interpreter is slow: this is tried with other neurons")
    device, T = DEVICE[backend], 17
    lengths = torch.tensor((17, 0, 5, 16, 1), device=device, dtype=torch.int32)
    options = {"packed": {"packed": True}, "soft": {"v_reset": None}, "detached": {"detach_reset": True}}.get(kind, {})
    layer = made(name, backend, **options).to(device)
    x = torch.rand(T, 5, C, 7, device=device) * 3
    v0 = None
    if kind == "v0":
        v0 = tuple(torch.rand(5, C, 7, device=device) for _ in layer.state_names)
        v0 = v0[0] if len(v0) == 1 else v0
    check(layer, x, lengths, v0, **({kind: True} if kind.startswith("return") else {}))
    if kind == "packed":
        spikes = layer(x, lengths=lengths)
        assert torch.equal(trtkern.ops.spikes.unpack(spikes.words, T, dtype=x.dtype), spikes.spikes)
    if kind == "static":
        shown = (torch.rand(1, 5, C, 7, device=device) * 3).expand(T, -1, -1, -1)
        assert same(layer(shown, lengths=lengths), layer(shown.contiguous(), lengths=lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(backend, dtype):
    device = DEVICE[backend]
    layer = made("LIF", backend).to(device)
    x = (torch.rand(9, 4, C, 5, device=device) * 3).to(dtype)
    lengths = torch.tensor((9, 0, 3, 8), device=device)
    y, state = layer(x, lengths=lengths, return_state=True)
    for b, end in enumerate(lengths.tolist()):
        assert torch.count_nonzero(y[end:, b]) == 0
        if end:
            one, last = layer(x[:end, b : b + 1].clone(), return_state=True)
            assert same(y[:end, b : b + 1], one) and same(state[b : b + 1], last)


@pytest.mark.parametrize("how", ["channels last", "batch last", "slice", "time_dim", "one axis"])
def test_however_x_lies_in_memory(backend, how):
    device = DEVICE[backend]
    layer, x = made("LIF", backend), torch.rand(6, 4, C, 5, 2, device=device) * 3
    lengths = torch.tensor((3, 6, 0, 1), device=device)
    want = layer.to(device)(x, lengths=lengths)
    if how == "channels last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (6, 4))
    if how == "batch last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "slice":
        x = torch.cat([x, x], 3)[:, :, :, :5]
    if how == "time_dim":
        layer.time_dim, x, want = 1, x.transpose(0, 1), want.transpose(0, 1)
    if how == "one axis":
        plain = snn.LIF(backend=backend).to(device)
        x = x[:, :, 0, 0, 0]
        want = plain(x.unsqueeze(2), lengths=lengths).squeeze(2)
        with pytest.warns(UserWarning, match="expected x as a sequence"):
            assert same(plain(x, lengths=lengths), want)
        return
    assert not x.is_contiguous() and same(layer(x, lengths=lengths), want) and want.std() > 0


def normed(backend, **options):
    norm = snn.BatchNormLIF(C, backend=backend, **options)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(0.0, 0.5)
        norm.running_mean.uniform_(-0.5, 0.5), norm.running_var.uniform_(0.5, 1.5)
    return norm.eval()


class Normed(torch.nn.Module):
    """A BatchNormLIF whose residual is made of its own input: it is padded, and has a gradient, as that is."""

    def __init__(self, norm, residual):
        super().__init__()
        self.norm, self.residual = norm, residual

    @property
    def nonfinite(self):
        return self.norm.nonfinite

    def forward(self, x, v0=None, **options):
        return self.norm(x, self.residual(x), v0, **options)


RESIDUALS = {"none": lambda x: None, "dense": lambda x: x * 0.5}
NORMED = ("plain", "pool", "pool, channels last", "packed", "CUBALIF", "PLIF", "long")


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", NORMED)
@pytest.mark.parametrize("name", BACKENDS)
def test_behind_a_norm(name, kind, residual):
    """In the interpreter each kind once, with a residual or without: pooling with one if the channels come first."""
    if name == "triton" and DEVICE[name] == "cpu" and residual == ("dense", "none")[NORMED.index(kind) % 2]:
        pytest.skip("the interpreter is slow: a residual is tried with other kinds")
    device, T = DEVICE[name], 17 if kind == "long" else 6
    options = {"pool": 2} if kind.startswith("pool") else {"packed": True} if kind == "packed" else {}
    if kind in ("CUBALIF", "PLIF"):
        options = {"neuron": getattr(snn, kind), **lively(kind)}
    layer = Normed(normed(name, **options), RESIDUALS[residual]).to(device)
    x = torch.randn(T, 4, C, 4, 6, device=device) * 2
    if kind.endswith("channels last"):
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, 4))
    lengths = torch.tensor((T - 1, 0, T, 2), device=device)
    outputs, grads = check(layer, x, lengths, bitwise=name != "reference")
    assert outputs[0].std() > 0 and grads["norm.weight"].abs().max() > 0


def test_a_norm_with_packed_residual_and_a_checkpointed_block(backend):
    device = DEVICE[backend]
    x = torch.randn(6, 4, C, 4, 4, device=device)
    lengths = torch.tensor((5, 0, 6, 2), device=device)
    before = snn.LIF(packed=True, backend=backend).to(device)(x * 3)
    norm = normed(backend).to(device)
    assert same(norm(x, before, lengths=lengths), norm(x, before.spikes, lengths=lengths))
    blocks = [snn.ConvBatchNormLIF(snn.SpikeConv2d(C, C, 3, padding=1), norm, checkpoint=c).to(device) for c in (0, 1)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    inputs = [x.clone().requires_grad_() for _ in blocks]
    made = [block(each, lengths=lengths) for block, each in zip(blocks, inputs, strict=True)]
    for y in made:
        y.square().sum().backward()
    assert same(*made) and same(inputs[0].grad, inputs[1].grad)
    y = snn.UnfusedBatchNormLIF(torch.nn.BatchNorm2d(C), snn.LIF(backend=backend)).to(device)
    y.norm.load_state_dict({k: v for k, v in norm.state_dict().items() if not k.startswith("lif")})
    torch.testing.assert_close(y.eval()(x, lengths=lengths), norm(x, lengths=lengths))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("T", [3, 20])
def test_samples_across_threads_and_streaming_stores(T, threads):
    if "cpu" not in FUSED:
        pytest.skip("needs the cpu backend")
    before = torch.get_num_threads()
    from trtkern import _cpu

    torch.set_num_threads(threads)
    _cpu.stream_from(0)
    try:
        layer = made("LIF", "cpu")
        lengths = torch.randint(0, T + 1, (37,))
        check(layer, torch.rand(T, 37, C, 401) * 3, lengths)
    finally:
        _cpu.stream_from(4 << 20)
        torch.set_num_threads(before)


def test_gradients_are_those_of_float64():
    lengths = torch.tensor((4, 0, 2))
    layer = made("CUBALIF", "reference").double()
    x = torch.rand(4, 3, C, dtype=torch.float64, requires_grad=True)
    readout = snn.LI(decay=torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64)), backend="reference").double()
    assert torch.autograd.gradcheck(lambda x: readout(x, lengths=lengths), (x,))
    assert torch.autograd.gradcheck(lambda x: readout(x, lengths=lengths, return_state=True)[1], (x,))
    y, want = layer(x, lengths=lengths), snn.CUBALIF(backend="reference")(x)
    assert y.shape == want.shape


def test_lengths_that_are_all_T_change_nothing(backend):
    device = DEVICE[backend]
    layer, x = made("LIF", backend).to(device), torch.rand(5, 3, C, device=device) * 3
    assert same(layer(x, lengths=torch.full((3,), 5, device=device)), layer(x))
    ends = torch.tensor([5, 0, 9, 2], device=device)[::2]
    with pytest.raises(ValueError, match="expected lengths of shape"):
        layer(x, lengths=ends)
    assert same(
        layer(x, lengths=torch.tensor([5, 0, 2, 9, 3, 1], device=device)[::2]),
        layer(x, lengths=ends.new_tensor([5, 2, 3])),
    )


@pytest.mark.parametrize(
    ("lengths", "error", "match"),
    [
        ([1, 2, 3], TypeError, "expected lengths to be an int32 or int64 tensor, got"),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError, r"expected lengths to be an int32 or int64 tensor, got .*float32"),
        (torch.tensor([True, False, True]), TypeError, r"expected lengths to be an int32 or int64 tensor, got .*bool"),
        (torch.tensor([1, 2]), ValueError, r"expected lengths of shape \(3,\), one a sample, got .*\(2,\)"),
        (torch.tensor([[1], [2], [3]]), ValueError, r"expected lengths of shape \(3,\)"),
        (torch.tensor([1, 6, 2]), ValueError, "expected lengths of 0 to T = 5 steps, got 6; a sample ends"),
        (torch.tensor([1, -1, 2]), ValueError, "expected lengths of 0 to T = 5 steps, got -1"),
    ],
)
@pytest.mark.parametrize("kind", ["LIF", "BatchNormLIF", "reference", "function"])
def test_lengths_that_are_none(kind, lengths, error, match):
    x = torch.rand(5, 3, C)
    if kind == "BatchNormLIF":
        run = snn.BatchNormLIF(C).eval()
    elif kind == "function":
        run = trtkern.lif
    else:
        run = snn.LIF(backend="reference" if kind == "reference" else "auto")
    for _ in range(2):  # what was refused once is not taken for known
        with pytest.raises(error, match=match):
            run(x, lengths=lengths)
    run(x, lengths=torch.tensor([5, 0, 1]))


def test_statistics_of_a_batch_are_refused():
    norm, x, lengths = snn.BatchNormLIF(C), torch.rand(5, 3, C, 2, 2), torch.tensor([5, 0, 1])
    before = norm.running_mean.clone()
    with pytest.raises(ValueError, match=r"expected running statistics with lengths, got those of the batch.*eval\(\)"):
        norm(x, lengths=lengths)
    assert torch.equal(norm.running_mean, before)
    unfused = snn.UnfusedBatchNormLIF(torch.nn.BatchNorm2d(C), snn.LIF())
    with pytest.raises(ValueError, match=r"layer 'norm' \(BatchNorm2d\) expected running statistics with lengths"):
        unfused(x, lengths=lengths)
    container = snn.TimeSequential(torch.nn.BatchNorm2d(C), snn.LIF())
    with pytest.raises(ValueError, match=r"layer '0' \(BatchNorm2d\) expected running statistics with lengths"):
        container(x, lengths=lengths)


def test_a_backend_without_them_says_so():
    from trtkern.backends import BACKENDS
    from trtkern.backends.base import Case
    from trtkern.spec import LIFSpec

    case = Case("lif", "cuda", torch.float32, LIFSpec(), lengths=True)
    said = {backend.name: backend.refuses(case) for backend in BACKENDS}
    assert said["cuda"] == "its kernels know no lengths; use triton"
    assert next(b for b in BACKENDS if b.name == "cuda").refuses(case._replace(lengths=False)) is None
    x = torch.rand(4, 2, C)
    assert snn.LIF(backend="reference").backend_for(x, torch.tensor([1, 2])) == "reference"


def test_transforms_refuse_by_name_and_the_reference_takes_them():
    lengths, x = torch.tensor([3, 1]), torch.rand(2, 4, 2, C)
    for layer in (snn.LI(), snn.BatchNormLIF(C).eval()):
        with pytest.raises(RuntimeError, match=r"expected no lengths beneath torch.vmap, got.*reference"):
            torch.vmap(lambda x, layer=layer: layer(x, lengths=lengths))(x)
        with pytest.raises(RuntimeError, match="expected no lengths where a forward mode pushes tangents"):
            torch.func.jvp(lambda x, layer=layer: layer(x, lengths=lengths), (x[0],), (x[1],))
    plain = snn.LI(backend="reference")
    each = torch.vmap(lambda x: plain(x, lengths=lengths))(x)
    assert torch.equal(each, torch.stack([plain(part, lengths=lengths) for part in x]))
    _, tangent = torch.func.jvp(lambda x: plain(x, lengths=lengths), (x[0],), (x[1],))
    torch.testing.assert_close(tangent, plain(x[1], lengths=lengths))  # it is linear


def test_compiled():
    layer = made("LIF", "auto")
    run = torch.compile(
        lambda x, lengths: layer(x, lengths=lengths, return_state=True), fullgraph=True, backend="aot_eager"
    )
    for T, lengths in ((6, (6, 0, 3)), (4, (1, 4, 0))):
        x = (torch.rand(T, 3, C, 5) * 3).requires_grad_()
        again = x.detach().clone().requires_grad_()
        ends = torch.tensor(lengths)
        y, state = run(x, ends)
        want, last = layer(again, lengths=ends, return_state=True)
        (y.square().sum() + state.sum()).backward(), (want.square().sum() + last.sum()).backward()
        assert same(y, want) and same(state, last) and same(x.grad, again.grad)


def test_one_launch_each_way(monkeypatch):
    if "cpu" not in FUSED:
        pytest.skip("needs the cpu backend")
    from trtkern.backends import cpu

    launched, extension = [], cpu._extension()

    class Counted:
        def __getattr__(self, name):
            found = getattr(extension, name)
            if not name.startswith("lif_"):
                return found
            return lambda *args: (launched.append(name), found(*args))

    monkeypatch.setattr(cpu, "_extension", Counted)
    x = torch.rand(20, 5, C, 4, requires_grad=True)
    made("CUBALIF", "cpu")(x, lengths=torch.tensor([20, 3, 0, 16, 17])).sum().backward()
    assert launched == ["lif_forward", "lif_backward"]


def test_containers_hand_them_on():
    lengths = torch.tensor([5, 0, 2])
    inner = snn.TimeSequential(torch.nn.Linear(7, 6), snn.CUBALIF(gain=0.75))
    model = snn.TimeSequential(
        torch.nn.Linear(4, 7), snn.LIF(), torch.nn.Dropout(), inner, snn.OverTime(torch.nn.Linear(6, 3)), snn.LI()
    )
    model.eval()
    x = torch.rand(5, 3, 4) * 4
    y = model(x, lengths=lengths)
    for b, end in enumerate(lengths.tolist()):
        assert torch.count_nonzero(y[end:, b]) == 0
        if end:
            torch.testing.assert_close(y[:end, b : b + 1], model(x[:end, b : b + 1]))
    shown = snn.TimeSequential(torch.nn.Linear(4, 7), snn.LIF(), timesteps=5)
    assert torch.equal(shown(x[0], lengths=lengths), shown(x[:1].expand(5, 3, 4), sequence=True, lengths=lengths))
    hidden = snn.TimeSequential(torch.nn.Sequential(torch.nn.Linear(4, 7), snn.LIF()))
    with pytest.raises(
        ValueError, match=r"layer '0' \(Sequential\) expected to hand lengths to the neurons in it.*TimeSequential"
    ):
        hidden(x, lengths=lengths)


@pytest.mark.parametrize(
    "topology",
    ["CONV-4-3-1-1_SEWRES~ADD-6-3=3-2=1-1=1_FC-8_L-5", "CONVAP-4-3-1-1_RES-4-3=3-1=1-1=1_FC-8_L-5", "FC-16_FC-8_L-5"],
)
def test_networks_take_them(topology):
    from trtkern.models import from_topology

    backend = "cpu" if "cpu" in FUSED else "reference"
    model = from_topology(topology, shape=(2, 8, 8), backend=backend)
    lengths, x = torch.tensor([5, 1, 2]), torch.rand(5, 3, 2, 8, 8) * 3
    with torch.no_grad():
        model(x)
    if "CONV" in topology:
        with pytest.raises(ValueError, match="expected running statistics with lengths"):
            model(x, lengths)
        model.eval()
    y = model(x, lengths)
    for b, end in enumerate(lengths.tolist()):
        torch.testing.assert_close(y[:end, b : b + 1], model(x[:end, b : b + 1]))
    y.sum().backward()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x)) and torch.equal(traced(x, lengths), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_without_neurons(backend):
    """What a process has of a tensor that is cut into more parts than there are channels."""
    x = torch.empty(6, 4, 0, device=DEVICE.get(backend, "cpu"), requires_grad=True)
    spikes = snn.LIF(backend=backend)(x, lengths=torch.tensor([6, 2, 0, 4], device=x.device))
    spikes.sum().backward()
    assert spikes.shape == x.grad.shape == x.shape
