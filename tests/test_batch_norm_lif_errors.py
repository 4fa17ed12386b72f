"""What BatchNormLIF refuses, before anything runs and with its statistics untouched; what processes share."""

import copy
import datetime

import pytest
import torch
from patience import PATIENCE

from trtkern import nn as snn

Y = (4, 2, 3, 6, 6)


def words_of(*shape):
    s = (torch.rand(shape) > 0.5).float()
    return snn.Spikes(s, torch.zeros(1, 2, 3, 12, 12, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        ({}, (torch.randn(4, 2, 5, 6, 6),), ValueError, r"y with 3 channels \(num_features\), got 5 on axis 2"),
        ({"channel_dim": -1}, (torch.randn(4, 2, 3, 6),), ValueError, "expected y with 3 channels .* got 6 on axis 3"),
        ({}, (torch.randn(*Y), torch.randn(4, 2, 3, 6, 5)), ValueError, r"a residual of shape \(4, 2, 3, 6, 6\)"),
        ({}, (torch.randn(*Y), torch.randn(*Y).double()), TypeError, "expected a residual in torch.float32 like y"),
        ({}, (torch.randn(*Y), torch.ones(*Y).int()), TypeError, "expected a residual in torch.float32 like y"),
        ({}, (torch.randn(*Y), "identity"), TypeError, "expected a residual in torch.float32 like y, got 'identity'"),
        ({}, (torch.randn(*Y), words_of(*Y)), ValueError, "words of a residual to be its own"),
        ({}, (torch.randn(1, 1, 3),), ValueError, "expected more than 1 value per channel when training"),
        ({}, (torch.randn(4, 0, 3, 6, 6),), ValueError, "expected more than 1 value per channel when training"),
        ({}, (torch.randn(0, 2, 3, 6, 6),), ValueError, "T >= 1"),
        ({}, (torch.randn(*Y).int(),), TypeError, "expected x in float32"),
        ({}, (torch.randn(*Y), None, torch.zeros(2, 3, 6)), ValueError, r"expected v0 of shape \(2, 3, 6, 6\)"),
        ({"channel_dim": 0}, (torch.randn(3, 2, 3, 6, 6),), ValueError, "differ from the time axis"),
        ({"channel_dim": 7}, (torch.randn(*Y),), ValueError, "expected channel_dim to be an axis"),
        ({"pool": 2}, (torch.randn(4, 2, 3, 6),), ValueError, r"as \[T, B, C, H, W\]"),
        ({"pool": 2}, (torch.randn(4, 2, 3, 6, 1),), ValueError, "H and W of 2 or more"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input_changes_nothing(make, arguments, error, message, backend):
    layer = snn.BatchNormLIF(3, backend=backend, **make)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        layer(*arguments)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.nonfinite.item() == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features to be an int >= 1, got 0"),
        ({"num_features": 2.0}, ValueError, "num_features to be an int"),
        ({"num_features": 3, "eps": -1}, ValueError, "eps to be a number > 0"),
        ({"num_features": 3, "momentum": 3}, ValueError, r"momentum in \[0, 1\] or None"),
        ({"num_features": 3, "pool": 3}, ValueError, "pool to be 1 or 2, got 3"),
        ({"num_features": 3, "time_dim": 1}, TypeError, "time on axis 0"),
        ({"num_features": 3, "surrogate": "sigmiod"}, ValueError, "sigmiod"),
        ({"num_features": 3, "threshold": 1.0}, TypeError, "threshold"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        snn.BatchNormLIF(**make)


def test_double_is_taken_by_the_reference():
    layer = snn.BatchNormLIF(3).double()
    assert layer(torch.randn(*Y, dtype=torch.float64)).dtype == torch.float64
    assert layer.backend_for(torch.randn(*Y, dtype=torch.float64)).startswith("reference")


def test_state_dicts_are_those_of_batch_norm():
    layer, norm = snn.BatchNormLIF(3), torch.nn.BatchNorm2d(3)
    norm(torch.randn(8, 3, 4, 4))
    layer.load_state_dict(norm.state_dict())
    norm.load_state_dict(layer.state_dict())
    assert torch.equal(layer.running_var, norm.running_var)


def _rank(rank, folder):
    """One of two processes: its half of the batch must give what the whole batch gives in one."""
    torch.set_num_threads(1)
    meet, patience = f"file://{folder}/meet", datetime.timedelta(seconds=PATIENCE)
    torch.distributed.init_process_group("gloo", init_method=meet, timeout=patience, rank=rank, world_size=2)
    for backend in ("auto", "reference"):
        y = torch.randn(4, 5, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 2
        g = torch.randn(4, 5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        whole, shared = snn.BatchNormLIF(3, backend=backend), snn.BatchNormLIF(3, sync=True, backend=backend)
        mine = slice(0, 2) if rank == 0 else slice(2, 5)
        full, part = y.clone().requires_grad_(), y[:, mine].clone().requires_grad_()
        want, got = whole(full), shared(part)
        want.backward(g)
        got.backward(g[:, mine])
        assert torch.equal(got, want[:, mine]), backend
        torch.testing.assert_close(part.grad, full.grad[:, mine], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(shared.running_mean, whole.running_mean)
        torch.testing.assert_close(shared.running_var, whole.running_var)
        summed = shared.weight.grad.clone()
        torch.distributed.all_reduce(summed)
        torch.testing.assert_close(summed, whole.weight.grad, rtol=1e-4, atol=1e-5)

        def pushed(y, layer, g):
            return torch.func.jvp(layer, (y,), (g,))[1].sum()

        tangents = torch.func.jvp(whole, (y,), (g,))[1], torch.func.jvp(shared, (y[:, mine],), (g[:, mine],))[1]
        torch.testing.assert_close(tangents[1], tangents[0][:, mine], rtol=1e-4, atol=1e-6)
        second = torch.func.grad(pushed)(y, whole, g), torch.func.grad(pushed)(y[:, mine], shared, g[:, mine])
        torch.testing.assert_close(second[1], second[0][:, mine], rtol=1e-3, atol=1e-5)
    torch.distributed.destroy_process_group()


def test_processes_share_their_statistics(tmp_path, one_thread):
    """This process and another."""
    other = torch.multiprocessing.get_context("spawn").Process(target=_rank, args=(1, str(tmp_path)))
    other.start()
    try:
        _rank(0, str(tmp_path))
        other.join(PATIENCE)
        assert other.exitcode == 0
    finally:
        other.kill()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
