"""The CUDA kernels of the neurons beside LIF, without a GPU: their threads run one by one on the CPU
(``test_cuda_threads``), with what surrounds a neuron, against float64 autograd of the reference."""

import itertools
import shutil

import cuda_threads
import pytest
import torch
from cuda_threads import NAME

from trtkern import LIFSpec, neurons
from trtkern.neurons import CENTERS
from trtkern.ops.lif import neuron, wanted
from trtkern.selftest import Cell, NormCell, compare, compare_norm
from trtkern.surrogates import BUILTIN

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
NAMES = [name for name in neurons.TABLE if name != "LIF"]


@pytest.fixture
def threads(monkeypatch):
    return cuda_threads.as_backend(monkeypatch)


SURROUNDINGS = {
    "plain": (Cell, {"shape": (2, 3, 5)}),
    "h": (Cell, {"shape": (2, 3, 5), "returned": "h"}),
    "normed": (NormCell, {"shape": (2, 3, 5), "residual": "dense"}),
    "words": (NormCell, {"shape": (2, 3, 4), "residual": "packed", "training": False, "returned": "h"}),
    "static": (NormCell, {"shape": (2, 3, 7), "static": True}),
    "pooled": (NormCell, {"shape": (2, 3, 4, 6), "pool": True}),
    "pooled, channels last": (
        NormCell,
        {"shape": (1, 3, 4, 2), "pool": True, "layout": "channels_last", "residual": "dense", "training": False},
    ),
    "channels on the last axis": (NormCell, {"shape": (2, 5, 3), "last": True, "training": False, "returned": "h"}),
}
STEPS = (1, 7, 8, 9, 16, 17, 33)


def all_cells(name, reset):
    """Every dtype x detach x learnable x surrounding x length; surrogates take turns."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # A potential that grows with its square, or faster, is held by a soft reset for a few steps only.
    lengths = STEPS[:4] if reset == "soft" and name in ("QIF", "EIF", "Izhikevich") else STEPS
    grid = itertools.product(dtypes, (False, True), ("none", "scalar", "channel"), SURROUNDINGS.values(), lengths)
    for number, (dtype, detach, learnable, (kind, options), timesteps) in enumerate(grid):
        surrogate = BUILTIN[number % len(BUILTIN)]
        yield kind(dtype, surrogate, reset, detach, learnable, timesteps, neuron=name, **options)


def check(cell):
    errors = (compare_norm if isinstance(cell, NormCell) else compare)(NAME, cell)
    assert errors.within(cell.dtype), f"{cell}: {errors}"


@pytest.mark.parametrize(("name", "reset"), [(name, reset) for name in NAMES for reset in neurons.TABLE[name].settle])
def test_cells(threads, name, reset):
    """One in 59, a prime number: each neuron meets every dtype, length and surrounding."""
    for cell in [*all_cells(name, reset)][::59]:
        check(cell)


@pytest.mark.parametrize("learnable", ["scalar", "channel"])
def test_many_blocks(threads, learnable):
    """Sums of all rows: blocks of one channel and of several, segments of the reduction, wide and narrow."""
    options = {"surrogate": "sigmoid", "timesteps": 3, "learnable": learnable}
    check(NormCell(neuron="AdLIF", reset="soft", shape=(3, 7, 211), **options))
    check(NormCell(neuron="Izhikevich", shape=(2, 8, 5, 9), layout="channels_last", **options))
    check(Cell(neuron="CUBALIF", reset="none", shape=(7, 5, 61), **options))
    check(Cell(neuron="CLIF", reset="soft", shape=(2, 4, 16, 40), layout="channels_last", **options))
    check(Cell(neuron="QIF", shape=(2, 1, 5000), **options))


def test_a_tensor_that_starts_off_a_vector(threads):
    values = {name: CENTERS[name] for name in neurons.TABLE["ALIF"].params}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4 * 37 + 1).to(dtype)[1:].reshape(4, 1, 37)
        call = x, None, values, LIFSpec("soft", neuron="ALIF"), wanted(True, False, False, False)
        assert torch.equal(neuron(*call, NAME).spikes, neuron(*call, "reference").spikes)


def passes(name, x, state=None, shown="v", **options):
    """All that a neuron makes on the way there and back of a sum of everything, and the flag."""
    spec = LIFSpec(next(iter(neurons.TABLE[name].settle)), neuron=name, **options)
    leaf, flag = x.clone().requires_grad_(), torch.zeros(1, dtype=torch.int32)
    values = {each: CENTERS[each] for each in spec.row.params}
    want = wanted(True, shown == "v", True, False, shown == "h")
    out = neuron(leaf, state, values, spec, want, NAME, flag=flag)
    potential = out.v if shown == "v" else out.h
    (out.spikes.sum() + potential.sum() + out.state.sum()).backward()
    return out.spikes.detach(), potential.detach(), out.state.detach(), leaf.grad, flag.item()


@pytest.mark.parametrize("name", NAMES)
def test_a_neuron_that_is_not_finite_stays_alone(threads, name):
    x, others = 0.1 * torch.randn(11, 1, 40), torch.arange(40) != 17
    *_, flag = passes(name, x)
    assert flag == 0
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[3, 0, 17] = bad
        for shown in ("v", "h"):
            spikes, potential, state, gradient, flag = passes(name, x, shown=shown, surrogate="rectangle")
            assert flag == 1
            assert all(torch.isfinite(t[..., others]).all() for t in (spikes, potential, state, gradient))
            if bad != bad:
                assert spikes[3:, 0, 17].sum() == 0 and potential[3:, 0, 17].isnan().all()
                assert gradient[:4, 0, 17].isnan().all() and state.view(-1, 40)[:, 17].isnan().any()


@pytest.mark.parametrize("name", [name for name in NAMES if len(neurons.TABLE[name].states) > 1])
def test_every_number_of_a_trace_raises_the_flag(threads, name):
    """Each number of the state, infinite before the first step of the last neuron."""
    for which in range(2):
        state = torch.zeros(2, 1, 67)
        state[which, 0, 66] = torch.inf
        assert passes(name, torch.zeros(2, 1, 67), state)[-1] == 1


@pytest.mark.parametrize("shown", ["v", "h"])
def test_a_potential_beyond_float16_raises_the_flag(threads, shown):
    x = torch.full((1, 1, 8), 6e4, dtype=torch.float16)
    values = dict.fromkeys(LIFSpec(neuron="CUBALIF").row.params, 1.0)
    for gain, infinite in ((1.0, False), (2.0, True)):
        flag, spec = torch.zeros(1, dtype=torch.int32), LIFSpec("none", neuron="CUBALIF")
        want = wanted(True, shown == "v", True, False, shown == "h")
        out = neuron(x, None, values | {"gain": gain}, spec, want, NAME, flag=flag)
        assert torch.isinf(out.v if shown == "v" else out.h).all() == infinite and flag.item() == infinite
        assert torch.isfinite(out.state).all()


@pytest.mark.parametrize("timesteps", [7, 16, 33])
@pytest.mark.parametrize("name", ["CUBALIF", "QIF"])
def test_traffic(threads, name, timesteps):
    """Bytes of a training step: forward 2e, backward 3e, and the state at the end of every chunk."""
    spec = LIFSpec("hard", neuron=name)
    x = torch.randn(timesteps, 1, 37).half().requires_grad_()
    rows, row = timesteps * 37 * 2, 37 * 4 * len(spec.row.states)
    edges = (timesteps - 1) // spec.chunk * row
    forward = {"x": (rows, 0), "s": (0, rows)} | ({"edges": (0, edges)} if edges else {})
    backward = {"x": (rows, 0), "gs": (rows, 0), "gx": (0, rows)} | ({"edges": (edges, 0)} if edges else {})
    values = {each: CENTERS[each] for each in spec.row.params}
    spikes = neuron(x, None, values, spec, wanted(True, False, False, False), NAME).spikes
    assert threads.traffic() == forward
    spikes.backward(torch.ones_like(spikes))
    assert threads.traffic() == backward
