"""What only a GPU can show: offsets past 2^31, streams, other devices, captured graphs, and that nothing waits for it.

``TRTKERN_REHEARSAL=1`` runs what has a meaning there on the CPU, in Triton's interpreter, at small sizes.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from trtkern import neurons, reference
from trtkern.backends import cuda, named
from trtkern.backends.base import RegularizerSpec
from trtkern.nn import BatchNormLIF
from trtkern.ops.lif import lif
from trtkern.ops.regularizer import add_regularizer_grad_
from trtkern.selftest import NormCell, cells, compare, compare_norm, norm_cells

REHEARSAL = os.environ.get("TRTKERN_REHEARSAL") == "1" and find_spec("triton") is not None
DEVICE = "cpu" if REHEARSAL else "cuda"
pytestmark = pytest.mark.skipif(not (REHEARSAL or torch.cuda.is_available()), reason="no GPU")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["triton"] if REHEARSAL else ["cuda", "triton"])
def gpu(request) -> str:
    """Each backend that runs on a GPU; what is missing has its reason in the report."""
    if (reason := named(request.param).missing()) is not None:
        pytest.skip(reason)
    return request.param


def room(gib: float) -> None:
    """Skip where less is free."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # gigabytes
    if not REHEARSAL and (free := torch.cuda.mem_get_info()[0] / 2**30) < gib:
        pytest.skip(f"{gib} GiB are needed, {free:.1f} are free")


def large(neurons: int) -> int:
    """That many neurons, or a few of the same remainder."""
    return neurons % 2**19 + 64 if REHEARSAL else neurons


@pytest.fixture(autouse=True)
def _emptied():
    """Memory goes back to the card, whose other tests are in other processes."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.mark.parametrize(("steps", "neurons"), [(4, 2**29 + 16), (4, 2**29 + 7), (40, 2**26 + 16)])
def test_lif_past_31_bits(gpu, steps, neurons):
    room(28)
    neurons = large(neurons)
    x = torch.empty(steps, neurons, dtype=torch.bfloat16, device=DEVICE).uniform_(-1, 2).requires_grad_()
    g = torch.empty_like(x).uniform_(-1, 1)
    spikes = lif(x, backend=gpu).spikes
    spikes.backward(g)
    assert steps * neurons > 2**31 or REHEARSAL
    # Neurons do not know of each other: the first, those about the middle and the last have to be what they are alone.
    for part in (slice(0, 48), slice(neurons // 2 - 24, neurons // 2 + 24), slice(neurons - 48, neurons)):
        alone = x.detach()[:, part].contiguous().requires_grad_()
        want = lif(alone, backend="reference").spikes
        want.backward(g[:, part].contiguous())
        assert torch.equal(spikes[:, part], want) and want.any()
        torch.testing.assert_close(x.grad[:, part], alone.grad, rtol=2**-7, atol=2**-7)


def test_batch_norm_lif_past_31_bits(gpu):
    room(40)
    channels, shape = (3, (2, 2, 3, 5, 8)) if REHEARSAL else (130, (4, 32, 130, 256, 512))
    y = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    g = torch.empty_like(y).uniform_(-1, 1)
    layer = BatchNormLIF(channels, backend=gpu).to(DEVICE)
    spikes = layer(y)
    spikes.backward(g)
    assert y.numel() > 2**31 or REHEARSAL
    for channel in (0, channels - 1):  # nor do channels
        part = slice(channel, channel + 1)
        alone = y.detach()[:, :, part].contiguous().requires_grad_()
        want = BatchNormLIF(1, backend=gpu).to(DEVICE)(alone)
        want.backward(g[:, :, part].contiguous())
        same = spikes[:, :, part] == want
        assert (~same).float().mean() < 1e-5  # the sums of its statistics run in another order
        still = same.all(0)
        torch.testing.assert_close(y.grad[:, :, part][:, still], alone.grad[:, still], rtol=2**-6, atol=2**-6)


def test_packing_past_31_bits(gpu):
    if not named(gpu).holds("spikes_pack"):
        pytest.skip(f"backend {gpu} does not hold packing")
    room(20)
    neurons = large(2**29 + 16)
    dense = torch.empty(4, neurons, dtype=torch.bfloat16, device=DEVICE).bernoulli_(0.25)
    words = torch.ops.trtkern.spikes_pack(dense, gpu)
    assert torch.equal(torch.ops.trtkern.spikes_unpack(words, 0, 4, False, torch.bfloat16, gpu), dense)


@pytest.mark.parametrize("sizes", [(2**31 + 4103,), (2**30 + 5, 67, 2**30 + 2055)])
def test_regularizer_past_31_bits(sizes):
    """One tensor, and several together; float32, which is what the fused kernel takes."""
    if (reason := named("triton").missing()) is not None:
        pytest.skip(reason)
    room(30)
    spec = RegularizerSpec(3, 1e-5, 0.25, 1e-5)
    weights = [torch.empty(large(size), device=DEVICE).normal_(std=0.1).requires_grad_() for size in sizes]
    assert sum(w.numel() for w in weights) > 2**31 or REHEARSAL
    value = add_regularizer_grad_(weights, spec, scale=2.0, backend="triton")
    exact = 0.0
    for w in weights:
        for part, grad in zip(w.detach().split(2**26), w.grad.split(2**26), strict=True):
            leaf = part.double().requires_grad_()
            term = reference.regularizer([leaf], spec)
            (wanted,) = torch.autograd.grad(term, leaf)
            torch.testing.assert_close(grad.double(), 2 * wanted, rtol=2e-6, atol=0.0)
            exact += term.item()
    assert value.item() == pytest.approx(exact, rel=2e-6)


def test_the_same_bits_as_on_the_cpu(gpu):
    if (reason := named("cpu").missing()) is not None:
        pytest.skip(reason)
    x = torch.randn(20, 3, 1000 if REHEARSAL else 100_000) + 0.5
    here = lif(x, decay=0.7, backend="cpu", return_v=True)
    there = lif(x.to(DEVICE), decay=0.7, backend=gpu, return_v=True)
    assert torch.equal(there.spikes.cpu(), here.spikes) and torch.equal(there.v.cpu(), here.v)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reading_ahead_changes_no_bit(monkeypatch, dtype):
    """The CUDA kernels for long sequences of few neurons against those that such a call does not take."""
    if (reason := named("cuda").missing()) is not None:
        pytest.skip(reason)
    x, g = torch.randn(2, 501, 3, 1000, device=DEVICE, dtype=dtype)

    def passes():
        leaf, decay = x.clone().requires_grad_(), torch.full((1000,), 0.6, device=DEVICE).requires_grad_()
        found = lif(leaf, decay=decay, backend="cuda", return_state=True, return_v=True)
        torch.autograd.backward((found.spikes, found.state), (g, g[0].float()))
        return found.spikes, found.v, found.state, leaf.grad, decay.grad

    ahead = passes()
    monkeypatch.setattr(cuda, "processors", lambda device: 0)  # as if it were not known how many neurons are few
    *same, theirs = passes()
    for one, other in zip(ahead, same, strict=False):
        assert torch.equal(one, other)
    torch.testing.assert_close(ahead[-1], theirs, rtol=1e-4, atol=1e-3)  # added up in another order


def test_the_other_neurons(gpu):
    """A few of all ways to use a neuron beside LIF, alone and behind a norm."""
    others = [name for name in neurons.TABLE if name != "LIF"]
    size = {"timesteps": 17, "shape": (2, 3, 5)}
    for cell in [*cells(others, **size), *norm_cells(others, **size)][:: 997 if REHEARSAL else 199]:
        errors = (compare_norm if isinstance(cell, NormCell) else compare)(gpu, cell, DEVICE)
        assert errors.within(cell.dtype), f"{cell}: {errors}"


def steps_of(gpu, device):
    """Inputs that a step reads, and the step: forward, backward and the penalty's gradient; its results."""
    layer = BatchNormLIF(8, backend=gpu).to(device)
    weight = torch.randn(1000, device=device, requires_grad=True)
    y = torch.randn(4, 2, 8, 6, 8, device=device)
    spec = RegularizerSpec(4, 1e-5, 0.25, 1e-5)
    penalty = "triton" if gpu == "cuda" else gpu  # the backend cuda does not hold it

    def step():
        leaf = y.detach().requires_grad_()
        lif(layer(leaf), decay=0.6, backend=gpu).spikes.square().mean().backward()
        weight.grad = torch.zeros_like(weight)
        value = add_regularizer_grad_([weight], spec, backend=penalty)
        return leaf.grad, value, weight.grad

    return (y, weight), step


@on_gpu
def test_the_current_stream_is_used(gpu):
    (y, _), step = steps_of(gpu, "cuda")
    fresh = torch.randn_like(y)
    before = y.clone()
    y.copy_(fresh)
    wanted = [tensor.clone() for tensor in step()]
    y.copy_(before)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: a kernel on another stream reads y before it is there
        y.copy_(fresh)
        got = step()
    side.synchronize()
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@on_gpu
def test_a_captured_graph_replays_on_new_data(gpu):
    (y, weight), step = steps_of(gpu, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        y.normal_()
        with torch.no_grad():
            weight.normal_()
        graph.replay()
        found = [tensor.clone() for tensor in captured]
        for one, other in zip(found, step(), strict=True):
            assert torch.equal(one, other)


@on_gpu
def test_nothing_waits_for_the_gpu(gpu):
    _, step = steps_of(gpu, "cuda")
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is here, two are needed")
def test_the_tensors_device_is_used(gpu):
    torch.manual_seed(0)
    _, here = steps_of(gpu, "cuda:0")
    torch.manual_seed(0)
    (y, _), there = steps_of(gpu, "cuda:1")
    assert torch.cuda.current_device() == 0
    first, second = here(), there()
    assert second[0].device == y.device
    for one, other in zip(first, second, strict=True):
        assert torch.isfinite(one).all() and other.shape == one.shape
    y.copy_(torch.arange(y.numel(), device=y.device).view(y.shape).sin())
    (z, _), again = steps_of(gpu, "cuda:0")
    z.copy_(y)
    assert torch.equal(again()[0].cpu(), there()[0].cpu())
