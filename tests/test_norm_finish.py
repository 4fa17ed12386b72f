"""What is done between the passes of a norm, on every backend that has kernels: exactly the formulas, in few launches.

The statistics and the sums are the backend's own, which other tests compare with float64; what is made of them is
float64 arithmetic in a fixed order, so that torch's has the same bits.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import shutil

import cuda_threads
import pytest
import torch

from trtkern.backends import cuda, named
from trtkern.backends.base import Finish, Finished, LIFBackward, LIFGrads, LIFInputs, Norm, NormGrads, Pool
from trtkern.selftest import device_of
from trtkern.spec import LIFSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 24), (3, 1), (3, 8), (64, 1), (64, 4)]
"""Channels, and neighbours in memory that share one."""
LARGE = (300, 1)
"""More than a program moves at once (256). As many programs of Triton's interpreter: in one type only."""


class Ops:
    """The ops of a backend, and how many kernels it launched."""

    def __init__(self, name, monkeypatch):
        self.launches, self.interpreted = None, name == "triton" and device_of(named(name)) == "cpu"
        if name == "cuda":
            threads = cuda_threads.as_backend(monkeypatch)
            self.ops, self.device, self.launches = cuda.BACKEND.ops, "cpu", threads.launches
            return
        self.ops, self.device = named(name).ops, device_of(named(name))
        if name == "triton":
            from trtkern.kernels.launch import Launch

            made, run = [], Launch.__call__
            monkeypatch.setattr(Launch, "__call__", lambda launch: (made.append(launch), run(launch))[1])
            self.launches = lambda: len(made)

    def share(self, cases, every, start=0):
        """All cases; in Triton's interpreter every third, say: a number that divides no axis of the grid keeps each
        value of each axis in, and another start takes others."""
        return list(cases)[start % every :: every] if self.interpreted else list(cases)

    def __call__(self, op, *args, launches):
        """Run an op, which launches so many kernels, but on the CPU."""
        before = self.launches and self.launches()
        self.ops[op](*args)
        assert self.launches is None or self.launches() - before == launches


@pytest.fixture(params=["cpu", "triton", "cuda"])
def ops(request, monkeypatch):
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == "cuda" and shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    if request.param != "cuda" and (reason := named(request.param).missing()) is not None:
        pytest.skip(reason)
    return Ops(request.param, monkeypatch)


def draw(*shape, dtype=torch.float32, device="cpu", seed=0, least=0.0):
    made = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + least
    return made.to(dtype).to(device)


def a_norm(C, dtype, device, *, momentum=0.1, count=0, weight=True, bias=True, running=True):
    return Finish(
        draw(C, dtype=dtype, device=device, seed=1, least=-0.5) if weight else None,
        draw(C, dtype=dtype, device=device, seed=2, least=-0.5) if bias and weight else None,
        draw(C, dtype=dtype, device=device, seed=3) if running else None,
        draw(C, dtype=dtype, device=device, seed=4, least=0.5) if running else None,
        torch.tensor(6, device=device) if running else None,
        1e-5,
        momentum,
        count,
    )


def copied(norm):
    return norm._replace(**{k: v.clone() for k, v in norm._asdict().items() if isinstance(v, torch.Tensor)})


def room(C, device, coef=False):
    """Outputs, full of NaN."""
    affine = torch.full((3, C), torch.nan, device=device)
    moments = torch.full((2, C), torch.nan, dtype=torch.float64, device=device)
    return Finished(affine, moments, torch.full_like(affine, torch.nan) if coef else None)


def rounded(x, like):
    """float64 numbers as they are stored in another type."""
    return x if like.dtype == torch.float64 else x.float().to(like.dtype)


def finished(mean, var, norm, coef=False):
    """``Finished``, and the norm with its statistics moved, of float64 statistics."""
    # Rounded correctly, which torch's own root is not.
    rstd = torch.tensor([1.0 / math.sqrt(v) for v in (var + norm.eps).tolist()], dtype=torch.float64).to(var.device)
    scale = rstd if norm.weight is None else rstd * norm.weight.double()
    center = mean.float()
    shift = (center.double() - mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    flat = torch.stack((scale.float(), *torch.zeros(2, *scale.shape, device=scale.device))) if coef else None
    out = Finished(torch.stack((center, scale.float(), shift.float())), torch.stack((mean, rstd)), flat)
    if norm.running_mean is None or not norm.samples or not (mean.isfinite() & var.isfinite()).all():
        return out, norm
    batches = norm.batches + 1
    factor = 1.0 / batches.double() if norm.momentum is None else norm.momentum
    old_mean, old_var = norm.running_mean.double(), norm.running_var.double()
    unbiased = var * (float(norm.samples) / (norm.samples - 1.0))
    moved_mean = rounded(old_mean + factor * (mean - old_mean), norm.running_mean)
    moved_var = rounded(old_var + factor * (unbiased - old_var), norm.running_var)
    return out, norm._replace(running_mean=moved_mean, running_var=moved_var, batches=batches)


def graded(sums, own, norm):
    """``NormGrads`` of float64 sums."""
    mean, rstd = norm.moments
    offset, scale, count = mean - norm.affine[0].double(), norm.affine[1].double(), float(norm.samples)
    slope = scale * rstd * rstd * (sums[1] - offset * sums[0]) / count
    coef = torch.stack((scale, -slope, slope * offset - scale * sums[0] / count)).float()
    total, product = sums if own is None else own
    return norm._replace(
        coef=None if norm.coef is None else coef,
        weight=None if norm.weight is None else rounded(rstd * (product - offset * total), norm.weight),
        bias=None if norm.bias is None else rounded(total, norm.bias),
    )


def same(found, expected):
    for name, one in found._asdict().items():
        other = getattr(expected, name)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert one == other, name


def statistics(ops, x, C, inner):
    """Mean and variance of the backend."""
    stats = torch.full((2, C), torch.nan, dtype=torch.float64, device=ops.device)
    ops("batch_norm_lif_statistics", x, C, inner, stats, launches=2)
    return stats[0], stats[1] / float(x.numel() // C)


def check_affine(ops, x, inner, norm, coef=False):
    C = norm.weight.numel() if norm.weight is not None else x.shape[1] // inner
    out = room(C, ops.device, coef)
    expected, moved = finished(*statistics(ops, x, C, inner), norm, coef)
    mine = copied(norm)
    ops("batch_norm_lif_affine", x, inner, mine, out, launches=2)
    same(out, expected)
    same(mine, moved)
    return out, mine


@pytest.mark.parametrize("size, dtype", [*itertools.product(SIZES, DTYPES), (LARGE, torch.bfloat16)], ids=str)
def test_affine(ops, size, dtype):
    """Statistics that lie far from 0, of numbers in float32 and half precision.

    In the interpreter one of the two, so that each comes with every size and with every dtype.
    """
    C, inner = size
    numbers = (torch.float32, torch.float16)[: 1 if size == LARGE else 2]
    for number in ops.share(numbers, len(numbers), [*SIZES, LARGE].index(size) + DTYPES.index(dtype)):
        x = (torch.randn(3, 2 * C * inner) + 30.0).to(number).to(ops.device)
        check_affine(ops, x, inner, a_norm(C, dtype, ops.device, count=6 * inner))


def test_affine_without_some(ops):
    """No weight, no bias, no running statistics, plain averages, a count of 0; x in several segments and blocks.

    In the interpreter every fifth, in which each option comes, and each momentum with running statistics that move.
    """
    x = torch.randn(40, 3 * 5 * 37).to(ops.device)
    mean, var = statistics(ops, x, 5, 37)
    grid = itertools.product(
        ((True, True), (True, False), (False, False)), (True, False), (0.3, None, 0.0), (0, 40 * 3 * 37)
    )
    for (weight, bias), running, momentum, count in ops.share(grid, 5):
        options = {"weight": weight, "bias": bias, "running": running, "momentum": momentum, "count": count}
        norm = a_norm(5, torch.float32, ops.device, **options)
        out = room(5, ops.device)
        expected, moved = finished(mean, var, norm)
        mine = copied(norm)
        ops("batch_norm_lif_affine", x, 37, mine, out, launches=2)
        same(out, expected)
        same(mine, moved)
        assert count == 0 or not running or momentum == 0.0 or not torch.equal(mine.running_var, norm.running_var)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 2])
def test_nothing_moves_where_a_statistic_is_not_finite(ops, bad, where):
    """All or nothing, whichever channel it is; the others' three numbers are right."""
    norm = a_norm(3, torch.float32, ops.device, count=24)
    x = torch.randn(2, 3 * 12).to(ops.device)
    x[1, where * 12 + 5] = bad
    out, mine = check_affine(ops, x, 12, norm)
    same(mine, norm)
    others = [c for c in range(3) if c != where]
    assert out.affine[:, others].isfinite().all() and not out.moments[0, where].isfinite()
    for statistic in range(2):
        known = [draw(3, device=ops.device, seed=5), draw(3, device=ops.device, seed=6)]
        known[statistic][where] = bad
        ops("batch_norm_lif_finish", *known, mine, room(3, ops.device), launches=1)
        same(mine, norm)


def test_channels_count_batches_once(ops):
    """Three calls one after the other: the counter of blocks starts from 0 each time."""
    norm = copied(a_norm(64, torch.float32, ops.device, momentum=None, count=8))
    for _ in range(3):
        _, norm = check_affine(ops, torch.randn(4, 2 * 64).to(ops.device), 1, norm)
    assert norm.batches.item() == 9


@pytest.mark.parametrize("C", [1, 3, 64, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finish(ops, C, dtype):
    """Known statistics of each type, in training and in evaluation, with coef and without."""
    for count, coef, momentum in ((0, True, 0.1), (50, False, 0.1), (50, True, None)):
        for source in DTYPES:
            mean, var = (draw(C, dtype=source, device=ops.device, seed=k, least=0.3) for k in (7, 8))
            norm = a_norm(C, dtype, ops.device, count=count, momentum=momentum, weight=C != 3, running=C != 1)
            expected, moved = finished(mean.double(), var.double(), norm, coef)
            out = room(C, ops.device, coef)
            ops("batch_norm_lif_finish", mean, var, norm, out, launches=1)
            same(out, expected)
            same(norm, moved)


def some_grads(C, dtype, device, wanted=(True, True, True)):
    moments = torch.stack((draw(C, device=device, seed=1), draw(C, device=device, seed=2, least=0.5))).double()
    affine = torch.stack((moments[0].float() + 1e-6, draw(C, device=device, seed=3), draw(C, device=device, seed=4)))
    outputs = (torch.full((3, C), torch.nan, device=device), *(torch.full((2, C), torch.nan, device=device).to(dtype)))
    return NormGrads(affine, moments, 60, *(t if want else None for t, want in zip(outputs, wanted, strict=True)))


@pytest.mark.parametrize("C", [1, 3, 64, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients(ops, C, dtype):
    sums, own = (draw(2, C, dtype=torch.float64, device=ops.device, seed=k, least=-0.5) for k in (5, 6))
    for other, *wanted in itertools.product((None, own), (True, False), (True, False), (True, False)):
        norm = some_grads(C, dtype, ops.device, wanted)
        expected = graded(sums, other, norm)
        ops("batch_norm_lif_coefficients", sums, other, norm, launches=1)
        same(norm, expected)


CASES = [((C, inner, None), neuron) for C, inner in (*SIZES, (3, 7)) for neuron in ("LIF", "ALIF")]
CASES += [((*LARGE, None), "LIF"), ((2, 64, Pool(8, 1)), "LIF"), ((2, 64, Pool(8, 1)), "ALIF")]


def backward(ops, C, inner, pool, neuron, learn, norm):
    """Sums and gradients of parameters of a pass in which something is summed up."""
    device, N = ops.device, (2 if pool else 3) * C * inner
    spec = LIFSpec(neuron=neuron)
    x, gs = draw(3, N, device=device, seed=1), draw(3, N // (4 if pool else 1), device=device, seed=2, least=-0.5)
    params = draw(len(spec.row.params), C, device=device, seed=3, least=0.2) if learn else None
    scalars = (0.5,) * len(spec.row.params)
    inp = LIFInputs(x, None, params, scalars, spec, inner, Norm(draw(3, C, device=device, seed=4), None), pool)
    sums = torch.full((2, C), torch.nan, dtype=torch.float64, device=device)
    out = LIFBackward(None, None, None if params is None else torch.full_like(params, torch.nan), sums)
    ops("lif_backward", inp, None, LIFGrads(gs, None, None), out, *([] if norm is None else [norm]), launches=2)
    return out


@pytest.mark.parametrize("size, neuron", CASES, ids=str)
def test_backward(ops, size, neuron):
    """The sums do not depend on what is made of them, and what is made of them is that.

    In the interpreter every third, from another one on in each case: over the cases all of them come.
    """
    C, inner, pool = size
    every = itertools.product((False, True), DTYPES if C == 3 else DTYPES[:2])
    every = [(True, torch.float16)] if LARGE[0] == C else ops.share(every, 3, CASES.index((size, neuron)))
    without = {learn: backward(ops, C, inner, pool, neuron, learn, None) for learn in {learn for learn, _ in every}}
    for learn, dtype in every:
        norm, plain = some_grads(C, dtype, ops.device), without[learn]
        found = backward(ops, C, inner, pool, neuron, learn, norm)
        same(found, plain)
        assert found.sums.isfinite().all() and (not learn or found.params.isfinite().all())
        same(norm, graded(found.sums, None, norm))
        assert norm.weight.isfinite().all()


@pytest.mark.parametrize("C, inner", [(1, 24), (3, 8), (64, 1)])
def test_backward_of_a_plain_neuron(ops, C, inner):
    """Two launches with gradients of parameters, which are those of autograd in float64; one without."""
    x = draw(5, 4 * C * inner, device=ops.device, seed=1)
    params = draw(6, C, device=ops.device, seed=2, least=0.2)
    inp = LIFInputs(x, None, params, (0.5,) * 6, LIFSpec("none", "sigmoid"), inner)
    found = torch.full_like(params, torch.nan)
    grads = LIFGrads(draw(5, 4 * C * inner, device=ops.device, seed=3, least=-0.5), None, None)
    ops("lif_backward", inp, None, grads, LIFBackward(torch.empty_like(x), None, found), launches=2)
    ops("lif_backward", inp, None, grads, LIFBackward(torch.empty_like(x), None, None), launches=1)
    p = params.double().requires_grad_()
    decay, gain, bias, _, threshold, _ = (row.repeat_interleave(inner).repeat(4) for row in p)
    h, total = 0.0, 0.0
    for t in range(5):
        h = decay * h + gain * x[t].double() + bias
        total = total + (torch.sigmoid(inp.spec.alpha * (h - threshold)) * grads.s[t].double()).sum()
    (expected,) = torch.autograd.grad(total, p)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
