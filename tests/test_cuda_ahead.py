"""The CUDA kernels that read ahead, for long sequences of few neurons: their threads run one by one on the CPU."""

import ctypes
import itertools
import shutil
from importlib import import_module

import cuda_threads
import pytest
import torch
from cuda_threads import NAME
from torch._subclasses.fake_tensor import FakeTensorMode

from trtkern import LIFSpec, lif, nn
from trtkern.backends import _args, cuda, explain, named, resolve
from trtkern.backends.base import CHUNK, Case
from trtkern.neurons import TABLE
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


def test_auto_takes_them_where_the_launcher_does():
    """``cuda.reads_ahead`` and ``ahead`` in csrc/lif/cuda_choice.h are one rule."""
    threads = cuda_threads.build()
    grid = itertools.product(DTYPES, (1, CHUNK, CHUNK + 1, 1000), (0, 1, 2, 132), ("LIF", "QIF"))
    for dtype, timesteps, processors, name in grid:
        pack = 16 // dtype.itemsize * cuda.THREADS
        edges = (processors - 1) * pack
        for neurons in {1, 2, 70, 71, pack, pack + 2, edges, edges + 1, edges + 2, edges + pack} - {0, -pack + 1}:
            if neurons < 1:
                continue
            args = threads.LifArgs()
            args.x, args.T, args.N, args.x_stride = 16, timesteps, neurons, neurons
            args.dtype, args.processors = _args.DTYPES[dtype], processors
            args.neuron = [*TABLE].index(name)
            reads_ahead = threads.library.reads_ahead(ctypes.byref(args)) == 1
            case = Case("lif", "cuda", dtype, LIFSpec(neuron=name), timesteps, neurons, processors)
            assert cuda.reads_ahead(case) == reads_ahead, case
            assert not reads_ahead or "reads ahead" in (cuda.prefers(case) or ""), case


@pytest.fixture
def gpu(monkeypatch):
    """As if this machine had a GPU of 132 multiprocessors, Triton and the CUDA extension."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("triton", "cuda"):
        monkeypatch.setitem(named(name).__dict__, "missing", lambda: None)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "processors", lambda device: 132)


def test_auto_takes_cuda_for_long_sequences_of_few_neurons(gpu, monkeypatch):
    long = Case("lif", "cuda", torch.float32, LIFSpec(), 500, 16 * 512, 132)
    assert resolve("auto", long).name == "cuda"
    assert explain(long) == (
        "cuda (it reads ahead where few neurons run for many steps: T = 500, and N = 8192 makes 32 blocks for 132 "
        "multiprocessors)"
    )
    others = (
        long._replace(T=CHUNK, N=1 << 20),
        long._replace(N=4 * cuda.THREADS * 132),
        long._replace(processors=0),
        long._replace(T=0, N=0),
        long._replace(op="batch_norm_lif"),
    )
    for case in others:
        assert resolve("auto", case).name == "triton"
        assert explain(case) == "triton (not cpu: it runs on cpu tensors, not on cuda)"
    assert resolve("triton", long).name == "triton"
    on_cpu = long._replace(device="cpu")
    assert resolve("auto", on_cpu).name in ("cpu", "reference")
    monkeypatch.setitem(named("cuda").__dict__, "missing", lambda: "it was taken away; put it back")
    assert resolve("auto", long).name == "triton"
    assert explain(long).startswith("triton (not cuda: it was taken away; put it back; not cpu: ")


@pytest.mark.parametrize("op", ["lif", "batch_norm_lif"])
def test_auto_takes_cuda_for_small_tensors(gpu, op):
    small = Case(op, "cuda", torch.float32, LIFSpec(), 4, 1 << 18, 132)
    assert explain(small) == "cuda (its launches cost the host less, and x has 4096 KiB)"
    for case in (small._replace(N=(1 << 18) + 1), small._replace(T=0, N=0), small._replace(dtype=torch.float64)):
        assert "cost the host less" not in explain(case)
    assert explain(small._replace(dtype=torch.bfloat16, N=1 << 19)).startswith("cuda (its launches")
    assert resolve("triton", small).name == "triton"


class Chosen(Exception):
    """Which backend an op takes, before it takes it: there is no GPU to run it on."""


def test_a_layer_says_which_and_why(gpu, monkeypatch):
    def choose(*what):
        raise Chosen(resolve(what[0], Case(*what[1:4], LIFSpec(), *what[5])).name)

    monkeypatch.setattr(import_module("trtkern.ops.lif"), "choose", choose)
    with FakeTensorMode():
        x = torch.empty(500, 2, 64, device="cuda")
        static = torch.empty(1, 2, 64, device="cuda").expand(500, 2, 64)
        wanted = (
            (nn.LIF(), x, "cuda (it reads ahead"),
            (nn.LIF(time_dim=1), x.movedim(0, 1), "cuda (it reads ahead"),
            (nn.LIF(backend="triton"), x, "triton"),
            (nn.LIF(packed=True), x, "triton (not cpu"),
            (nn.LIF(), static, "triton (not cpu"),
            (nn.LIF(), torch.empty(CHUNK, 2, 64, device="cuda"), "cuda (its launches"),
            (nn.LIF(), torch.empty(CHUNK, 2048, 64, device="cuda"), "triton (not cpu"),
        )
        for layer, given, answer in wanted:
            assert layer.backend_for(given).startswith(answer), layer
            with pytest.raises(Chosen) as taken:
                lif(given.movedim(layer.time_dim, 0), backend=layer.backend, return_packed=layer.packed)
            assert answer.startswith(str(taken.value)), layer


def test_a_norm_with_a_neuron_says_which_and_why(gpu, monkeypatch):
    def choose(*what):
        raise Chosen(resolve(what[0], Case(*what[1:4], LIFSpec(), *what[5])).name)

    monkeypatch.setattr(import_module("trtkern.ops.batch_norm_lif"), "choose", choose)
    with FakeTensorMode():
        small, large = (torch.empty(4, batch, 8, 4, 4, device="cuda") for batch in (2, 4096))
        wanted = (
            (small, {}, "cuda (its launches"),
            (small, {"packed": True}, "triton (not"),
            (large, {}, "triton (not"),
        )
        for given, options, answer in wanted:
            with torch.device("cuda"):
                layer = nn.BatchNormLIF(8, **options)
            assert layer.backend_for(given).startswith(answer), layer
            with pytest.raises(Chosen) as taken:
                layer(given)
            assert answer.startswith(str(taken.value)), layer
