"""Neurons that feed each other in Triton's interpreter, against float64; the loop of steps for many of them."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from trtkern import neurons, reference
from trtkern.backends import named, resolve
from trtkern.backends.base import Case
from trtkern.nn import ALIF, LIF, Recurrent
from trtkern.ops.lif import wanted
from trtkern.ops.recurrent import recurrent
from trtkern.selftest import device_of
from trtkern.selftest.recurrent import RecurrentCell, compare_recurrent
from trtkern.spec import LIFSpec

BACKEND = named("triton")
REASON = "Triton is not installed" if importlib.util.find_spec("triton") is None else BACKEND.missing()
DEVICE = device_of(BACKEND) if REASON is None else "cpu"
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("LIF", "ALIF", "AdLIF", "CUBALIF")
CELLS = [  # the interpreter takes a tenth of a second for a step
    *(RecurrentCell(name, timesteps=1, batch=1, size=1) for name in NAMES),
    *(RecurrentCell(name, timesteps=16, batch=1, size=7, reset="hard") for name in NAMES),
    *(RecurrentCell(name, timesteps=17, batch=1, size=4) for name in NAMES),
    *(RecurrentCell(name, timesteps=40, batch=1, size=3, returned="h") for name in NAMES[:2]),
    *(RecurrentCell(name, timesteps=3, batch=6, size=5) for name in NAMES),
    RecurrentCell("AdLIF", timesteps=4, batch=2, size=64),
    RecurrentCell("LIF", timesteps=2, batch=1, size=513),
    *(RecurrentCell(name, dtype, timesteps=5, batch=2, size=16) for name in NAMES[:2] for dtype in (BF16, F16)),
    *(RecurrentCell(name, learnable="scalar", timesteps=3, batch=5, detach_reset=True) for name in NAMES[:2]),
    *(RecurrentCell(name, learnable="none", timesteps=3, started=False, bias=False, returned="h") for name in NAMES),
    *(RecurrentCell(name, timesteps=3, batch=1, surrogate="sigmoid") for name in neurons.TABLE if name not in NAMES),
    *(RecurrentCell(surrogate=name, timesteps=3, batch=1) for name in ("triangle", "fast_sigmoid", "gaussian")),
]


def agrees(cell):
    errors = compare_recurrent("triton", cell, DEVICE)
    assert errors.within(cell.dtype), errors


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_against_float64(cell):
    agrees(cell)


def kernels(monkeypatch):
    """The names of what is launched from now on."""
    from trtkern.kernels.launch import Launch

    made, run = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda launch: (made.append(launch.kernel.__name__), run(launch))[1])
    return made


@pytest.fixture
def few(monkeypatch):
    """Four neurons are many: the loop of steps."""
    from trtkern.kernels import recurrent_launch

    monkeypatch.setattr(recurrent_launch, "LARGEST", 4)


@pytest.mark.parametrize(
    "cell",
    [
        *(RecurrentCell(name, timesteps=17, size=7) for name in NAMES),
        RecurrentCell("ALIF", BF16, timesteps=9, size=7, learnable="scalar", returned="h"),
        RecurrentCell("LIF", F16, timesteps=4, size=7, learnable="none", started=False, bias=False),
        RecurrentCell("AdLIF", timesteps=8, size=7, learnable="none", started=False),
    ],
    ids=str,
)
def test_the_loop_of_steps(few, cell):
    agrees(cell)


def drawn(T=9, B=2, N=7, dtype=F32):
    """x, weight and bias."""
    return torch.randn(T, B, N).to(dtype) + 0.5, 0.4 * torch.randn(N, N) / N**0.5, 0.1 * torch.randn(N)


def run(x, weight, bias, backend="triton", neuron="LIF", want=None, flag=None, s0=None, state=None):
    """All that can be asked for of neurons with the parameters of the self-test."""
    spec = LIFSpec("soft", "atan", neuron=neuron)
    values = {name: neurons.CENTERS[name] for name in spec.row.params}
    want = wanted(True, True, True, True) if want is None else want
    moved = [None if t is None else t.to(DEVICE) for t in (x, s0, state, weight, bias)]
    return recurrent(*moved, values, spec, want, backend, flag=flag)


def test_launches(monkeypatch):
    """One over all steps a direction; one that turns the weight, one that adds up gradients of parameters."""
    made = kernels(monkeypatch)
    for layer, behind in ((LIF(backend="triton"), []), (ALIF(decay=torch.nn.Parameter(torch.tensor(0.5))), ["add_up"])):
        layer.backend = "triton"
        made.clear()
        net = Recurrent(layer, torch.nn.Linear(7, 7)).to(DEVICE)
        s = net(torch.randn(17, 1, 7, device=DEVICE))
        assert made == ["turn_weight", "recurrent_forward"]
        s.sum().backward()
        assert made[2:] == ["recurrent_backward", *behind]


def test_launches_of_the_loop(few, monkeypatch):
    """The neurons' own kernel once a step, and once more a step where states are computed again; no more."""
    made = kernels(monkeypatch)
    x, weight, bias = drawn(T=19)
    x.requires_grad_()
    s = run(x, weight, bias, want=wanted(True, False, False, False)).spikes
    assert made == ["lif_forward"] * 19
    made.clear()
    s.sum().backward()
    assert made.count("lif_backward") == 19 and made.count("lif_forward") == 19 - 2 and len(made) == 36


def test_the_loop_and_the_kernel_are_the_same(monkeypatch):
    """In float32, up to roundings of sums: spikes, words, and the potentials where they agree."""
    from trtkern.kernels import recurrent_launch

    x, weight, bias = drawn()
    one = run(x, weight, bias)
    monkeypatch.setattr(recurrent_launch, "LARGEST", 4)
    other = run(x, weight, bias)
    assert torch.equal(one.spikes, other.spikes) and torch.equal(one.packed, other.packed)
    torch.testing.assert_close(one.v, other.v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.state, other.state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 8, 9])
def test_packed_spikes(T):
    out = run(*drawn(T=T))
    assert torch.equal(out.packed.cpu(), reference.spikes_pack(out.spikes.cpu()))
    assert 0.02 < out.spikes.mean() < 0.9


@pytest.mark.parametrize("N", [16, 32])
def test_tensors_that_are_not_aligned(N):
    """Sizes that are multiples of 16, from an address that is none: the same bits."""
    x, weight, bias = drawn(T=5, N=N)
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16
    for one, other in zip(run(x, weight, bias), run(shifted, weight, bias), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_bitwise_repeatable():
    def all_of_it():
        torch.manual_seed(3)
        x, weight, bias = drawn(B=6, N=5)
        tensors = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        out = run(*tensors, neuron="ALIF")
        g = torch.autograd.grad([out.spikes, out.v], tensors, [torch.randn(x.shape), torch.randn(x.shape)])
        return [out.spikes, out.v, out.state, *g]

    assert all(torch.equal(a, b) for a, b in zip(all_of_it(), all_of_it(), strict=True))


def test_a_sample_does_not_hang_on_the_others():
    """Of six samples the last two share a program with none that is there: each is as if alone, gradients too."""
    x, weight, bias = drawn(T=4, B=6)
    g = torch.randn(x.shape)

    def both(x, g):
        leaf = x.clone().requires_grad_()
        s = run(leaf, weight, bias, want=wanted(True, False, False, False)).spikes
        return s.detach(), torch.autograd.grad(s, leaf, g.to(s.device))[0]

    s, gx = both(x, g)
    for b in (0, 5):
        alone = both(x[:, b : b + 1], g[:, b : b + 1])
        assert torch.equal(alone[0], s[:, b : b + 1]) and torch.equal(alone[1], gx[:, b : b + 1])


def test_spikes_that_are_given_may_be_any_numbers():
    x, weight, bias = drawn(T=2)
    s0 = torch.randn(2, 7)
    want = run(x, weight, bias, "reference", s0=s0)
    got = run(x, weight, bias, s0=s0)
    torch.testing.assert_close(got.v, want.v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("many", [False, True])
def test_nan_reaches_no_other(many, monkeypatch):
    """A potential that is NaN does not fire, and feeds nothing; its gradient reaches those that feed it."""
    from trtkern.kernels import recurrent_launch

    if many:
        monkeypatch.setattr(recurrent_launch, "LARGEST", 4)
    x, weight, bias = drawn(T=9)
    weight[:, [4, 6]], weight[4] = 0.0, 0.0
    weight[4, 6] = 0.5  # neuron 6 feeds neuron 4, which feeds nobody
    x[3, 1, 6] = math.nan
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    leaf = x.clone().requires_grad_()
    out = run(leaf, weight, bias, flag=flag)
    clean = run(x.nan_to_num(0.0), weight, bias)
    assert flag.item() == 1
    assert out.v[3:, 1, 6].isnan().all() and (out.spikes[3:, 1, 6] == 0).all()
    others = torch.ones_like(x, dtype=torch.bool)
    others[:, 1, [4, 6]] = False
    assert torch.equal(out.v[others], clean.v[others]) and torch.equal(out.spikes[others], clean.spikes[others])
    (gx,) = torch.autograd.grad(out.spikes.sum(), leaf)
    assert gx[3:, 1, 6].isnan().all() and not gx[:, 0].isnan().any()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_weight_that_is_nan(backend):
    """0 times NaN is NaN: the neuron is NaN from the first step on, whoever fires, and no other is."""
    x, weight, bias = drawn(T=4)
    weight[2, 5] = math.nan
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    v = run(x, weight, bias, backend, flag=flag).v
    assert flag.item() == 1 and v[:, :, 2].isnan().all() and not v[:, :, [0, 1, 3, 4, 5, 6]].isnan().any()


def test_the_flag_stays_where_all_is_finite():
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    run(*drawn(), flag=flag)
    assert flag.item() == 0


def test_chosen_on_a_gpu(monkeypatch):
    """The cuda backend does not hold it, so that "auto" takes triton there, also where it would take cuda for a LIF."""
    case = Case("recurrent", "cuda", F32, LIFSpec(), 500, 512, 132)
    monkeypatch.setattr("trtkern.backends.triton._interpreted", lambda: False)
    monkeypatch.setattr("trtkern.backends.triton._gpu", lambda: True)
    assert resolve("auto", case).name == "triton"
    with pytest.raises(ValueError, match=r"backend 'cuda' does not hold this op; use one of .*triton"):
        resolve("cuda", case)


def test_edges_are_asked_for():
    from trtkern.backends.base import LIFGrads, RecurrentBackward, RecurrentInputs
    from trtkern.kernels.recurrent_launch import backward_launches

    x, weight, _ = drawn(T=17)
    inputs = RecurrentInputs(x, None, None, weight, None, None, (0.5,) * 6, LIFSpec())
    with pytest.raises(ValueError, match="expected edges for T = 17, got None"):
        backward_launches(inputs, None, LIFGrads(x, None, None), RecurrentBackward(x, None, None))


class Address:
    """Of a tensor on a GPU, as far as ``recorded`` looks."""

    device, shape, dtype = torch.device("cuda", 0), (3,), F32

    def __init__(self, at):
        self.data_ptr = lambda: at


def test_what_is_recorded(monkeypatch):
    """As it is the first time, captured and replayed the second, replayed from then on; other addresses begin anew, and
    within somebody else's capture nothing is recorded."""
    from contextlib import contextmanager

    from trtkern.backends import _recurrent_steps as recurrent_steps

    seen, capturing = [], False

    @contextmanager
    def graph(_):
        seen.append("capture")
        yield

    class Graph:
        def replay(self):
            seen.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(recurrent_steps, "_graphs", {})

    def call(at, what="forward"):
        seen.clear()
        recurrent_steps.recorded(lambda: seen.append("run"), (what,), [None, Address(at)])
        return list(seen)

    assert call(16) == ["run"]
    assert call(16) == ["capture", "run", "replay"]
    assert call(16) == call(16) == ["replay"]
    assert call(32) == ["run"] and call(16, "backward") == ["run"]
    capturing = True
    assert call(16) == ["run"]
    capturing = False
    for at in range(100, 100 + recurrent_steps.MOST):
        call(at)
    assert len(recurrent_steps._graphs) <= recurrent_steps.MOST
