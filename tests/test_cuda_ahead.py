"""The CUDA kernels that read ahead, for long sequences of few neurons: their threads run one by one on the CPU."""

import itertools
import shutil

import cuda_threads
import pytest
import torch
from cuda_threads import NAME

from trtkern import LIFSpec, lif
from trtkern.backends import cuda
from trtkern.backends.base import CHUNK
from trtkern.selftest import Cell, compare
from trtkern.surrogates import BUILTIN

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = 10_000
"""Multiprocessors that no N here fills."""


@pytest.fixture
def threads(monkeypatch):
    return cuda_threads.as_backend(monkeypatch, LARGE)


def passes(x, decay, processors, monkeypatch, **options):
    """Everything that the two passes make, on a GPU of that size."""
    monkeypatch.setattr(cuda, "_place", lambda x: (0, 0, processors))
    leaf, rate = x.clone().requires_grad_(), decay.clone().requires_grad_()
    s, state, v, *_ = lif(leaf, decay=rate, backend=NAME, return_state=True, return_v=True, **options)
    draw = torch.Generator().manual_seed(1)
    torch.autograd.backward((s, state, v), [torch.randn(t.shape, generator=draw).to(t.dtype) for t in (s, state, v)])
    return s.detach(), state.detach(), v.detach(), leaf.grad, rate.grad


@pytest.mark.parametrize("timesteps", [17, 32, 97, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_the_other_kernels(threads, monkeypatch, dtype, timesteps):
    """T ends within a chunk and at its end, with fewer chunks than a ring has places and with more."""
    for neurons, learnable, reset in itertools.product((64, 70), ("scalar", "channel"), ("hard", "soft")):
        x = (torch.randn(timesteps, 2, neurons) + 0.3).to(dtype)
        decay = torch.full((neurons,), 0.6) if learnable == "channel" else torch.tensor(0.6)
        spec = LIFSpec(reset, "atan")
        near = passes(x, decay, 0, monkeypatch, spec=spec)
        far = passes(x, decay, LARGE, monkeypatch, spec=spec)
        assert threads.neurons_a_thread() == 4 // x.element_size()
        for found, expected in zip(far[:4], near[:4], strict=True):
            assert torch.equal(found, expected)
        # Added up in another order: each addend, of about 1, may be rounded otherwise.
        assert torch.allclose(far[4], near[4], rtol=2e-5, atol=2**-24 * x.numel() / decay.numel())


@pytest.mark.parametrize("surrogate", BUILTIN)
def test_against_the_reference(threads, surrogate):
    for dtype, reset, learnable in itertools.product(DTYPES, ("hard", "soft", "none"), ("none", "channel")):
        for returned in ("v", "h"):
            cell = Cell(dtype, surrogate, reset, reset == "soft", learnable, 37, (2, 3, 10), returned=returned)
            errors = compare(NAME, cell)
            assert errors.within(cell.dtype), f"{cell}: {errors}"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_traffic(threads, dtype):
    """Forward 2e, backward 3e, and v once every 16 steps: each step is fetched once."""
    timesteps, neurons = 100, 66
    x = torch.randn(timesteps, 1, neurons).to(dtype).requires_grad_()
    rows, edges = timesteps * neurons * x.element_size(), (timesteps - 1) // CHUNK * neurons * 4
    spikes = lif(x, backend=NAME).spikes
    assert threads.traffic() == {"x": (rows, 0), "s": (0, rows), "edges": (0, edges)}
    spikes.backward(torch.ones_like(spikes))
    assert threads.traffic() == {"x": (rows, 0), "gs": (rows, 0), "gx": (0, rows), "edges": (edges, 0)}


def test_who_reads_ahead(threads, monkeypatch):
    """Long sequences of fewer packs of 16 bytes than 64 for each multiprocessor; nothing that has a norm or a pool."""

    def a_thread(timesteps, neurons, processors, dtype=torch.float32, **options):
        monkeypatch.setattr(cuda, "_place", lambda x: (0, 0, processors))
        lif(torch.zeros(timesteps, 1, neurons, dtype=dtype), backend=NAME, **options)
        return threads.neurons_a_thread()

    assert [a_thread(T, 1024, 5) for T in (16, 17)] == [4, 1]
    assert [a_thread(20, N, 5) for N in (1024, 1028)] == [1, 4]  # 4 blocks, 5 blocks
    assert [a_thread(20, N, 5, torch.float16) for N in (2048, 2056, 1022, 1023)] == [2, 8, 2, 1]
    assert a_thread(20, 64, 5, return_packed=True) == 4
    assert a_thread(20, 64, 0) == 4


def test_a_gradient_of_the_state_alone(threads):
    """Without gs: zeros, at every place of the ring."""
    x = torch.randn(120, 1, 8, requires_grad=True)
    lif(x, backend=NAME, return_state=True).state.sum().backward()
    want = x.grad
    y = x.detach().clone().requires_grad_()
    lif(y, backend="reference", return_state=True).state.sum().backward()
    assert torch.allclose(want, y.grad, atol=1e-7) and want.abs().max() > 0


def test_a_neuron_that_is_not_finite_stays_alone(threads):
    x = torch.randn(40, 1, 40)
    x[30, 0, 17] = torch.nan
    flag = torch.zeros(1, dtype=torch.int32)
    spikes, state, *_ = lif(x, backend=NAME, return_state=True, flag=flag)
    assert flag.item() == 1 and torch.isnan(state[0, 17]) and spikes[30:, 0, 17].sum() == 0
    assert torch.isfinite(state[0, torch.arange(40) != 17]).all()
