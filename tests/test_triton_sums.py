"""Sums over neurons in the Triton kernels, in as few columns as a GPU is given only for far larger tensors."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from trtkern.backends import named
from trtkern.backends.base import LIFBackward, LIFGrads, LIFInputs, Norm, Pool
from trtkern.selftest import device_of
from trtkern.spec import LIFSpec

BACKEND = named("triton")
REASON = "Triton is not installed" if importlib.util.find_spec("triton") is None else BACKEND.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def few_columns(monkeypatch):
    """A lane then sees many rows, the last of which may be short."""
    from trtkern.kernels import batch_norm, launch

    launch.sum_columns.cache_clear()
    monkeypatch.setattr(launch, "FEWEST_COLUMNS", 1)
    monkeypatch.setattr(batch_norm, "FEWEST_COLUMNS", 1)
    yield
    launch.sum_columns.cache_clear()


def exact_statistics(x, C, inner):
    channel = torch.arange(x.shape[1]) // inner % C
    mean, squares = torch.empty(2, C, dtype=torch.float64)
    for c in range(C):
        y = x[:, channel == c].double().cpu()
        mean[c], squares[c] = y.mean(), ((y - y.mean()) ** 2).sum()
    return torch.stack((mean, squares))


@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("outlier", [None, -3e4])
@pytest.mark.parametrize(
    "T, N, C, inner, dtype",
    [
        (5, 192, 4, 16, torch.float32),  # a thread's neurons share a channel
        (33, 48, 3, 1, torch.float32),  # they do not
        (3, 144, 3, 8, torch.bfloat16),  # the last row is short
        (7, 35, 5, 7, torch.float16),
        (40, 1, 1, 1, torch.float32),
    ],
    ids=str,
)
def test_statistics_are_exact(few_columns, T, N, C, inner, dtype, mean, outlier):
    device = device_of(BACKEND)
    x = torch.randn(T, N).to(dtype)
    if dtype == torch.float32:
        x += mean
    if outlier is not None:
        x[0, 0] = outlier
    want = exact_statistics(x, C, inner)
    got = [torch.empty(2, C, dtype=torch.float64, device=device) for _ in range(2)]
    for stats in got:
        BACKEND.ops["batch_norm_lif_statistics"](x.to(device), C, inner, stats)
    assert torch.equal(*got)
    deviation = (want[1] / (T * N / C)).sqrt()
    assert ((got[0][0].cpu() - want[0]).abs() <= 1e-6 * deviation).all()
    assert ((got[0][1].cpu() - want[1]).abs() <= 1e-6 * want[1]).all()


def backward_sums(T, N, C, inner, pool, device):
    """Everything that a backward pass sums up, for inputs that depend on the arguments only."""
    draw = torch.Generator().manual_seed(1)
    x, gs, params, affine = (
        torch.randn(*shape, generator=draw) for shape in ((T, N), (T, N // 4 if pool else N), (6, C), (3, C))
    )
    norm = Norm(affine.to(device), None)
    inputs = LIFInputs(x.to(device), None, params.to(device), (0.0,) * 6, LIFSpec("soft", "sigmoid"), inner, norm, pool)
    sums = torch.empty(2, C, dtype=torch.float64, device=device)
    out = LIFBackward(None, None, torch.empty(6, C, device=device), sums)
    BACKEND.ops["lif_backward"](inputs, None, LIFGrads(gs.to(device), None, None), out)
    return torch.cat((out.params.double(), out.sums)).cpu()


CASES = [(3, 192, 4, 16, None), (3, 210, 5, 7, None), (2, 1024, 2, 64, Pool(8, 1)), (2, 1024, 16, 1, Pool(128, 16))]


@pytest.mark.parametrize("T, N, C, inner, pool", CASES, ids=str)
def test_columns_do_not_matter(T, N, C, inner, pool, request):
    device = device_of(BACKEND)
    want = backward_sums(T, N, C, inner, pool, device)
    request.getfixturevalue("few_columns")
    got = backward_sums(T, N, C, inner, pool, device)
    assert torch.equal(got, backward_sums(T, N, C, inner, pool, device))
    assert not torch.equal(got, want)  # other columns, other roundings
    assert ((got - want).abs() <= 1e-5 * want.abs().amax(1, keepdim=True)).all()
