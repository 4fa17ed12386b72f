"""The layers: what they compute, what they keep, and that they fit into other people's code."""

import copy
import io
import pickle

import pytest
import torch

from trtkern import lif, nn, reference
from trtkern.spec import LIFSpec


def test_lif_is_the_equation_of_the_paper():
    x = torch.tensor([0.8, 0.8, 0.1, 3.0]).reshape(4, 1)
    s, v = nn.LIF()(x, return_v=True)
    assert s.flatten().tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(v.flatten(), torch.tensor([0.8, 0.0, 0.1, 0.0]))
    s, v = nn.LIF(v_reset=None)(x, return_v=True)
    torch.testing.assert_close(v.flatten(), torch.tensor([0.8, 0.2, 0.2, 2.1]))


def test_v_leak_is_where_v_rests(backend, device):
    layer = nn.LI(decay=0.5, v_leak=0.75, backend=backend).to(device)
    v = layer(torch.zeros(40, 1, 1, device=device))
    assert v[-1].item() == pytest.approx(0.75)


@pytest.mark.parametrize("decay_input", [False, True])
@pytest.mark.parametrize("channels", [None, 5])
def test_plif_learns_w(backend, device, decay_input, channels):
    layer = nn.PLIF(3.0, channels, decay_input, v_leak=0.2, backend=backend).to(device)
    x = torch.randn(6, 2, 5, 3, device=device)
    g = torch.randn(6, 2, 5, 3, device=device)
    layer(x).backward(g)
    w = layer.w.detach().double().cpu().requires_grad_()
    rate = torch.sigmoid(w).reshape(-1, 1) if channels else torch.sigmoid(w)
    gain = rate if decay_input else 1.0
    want = reference.lif(x.double().cpu(), None, (1 - rate, gain, rate * 0.2, 1.0, 1.0, 0.0), LIFSpec())
    want.s.backward(g.double().cpu())
    torch.testing.assert_close(layer.w.grad.double().cpu(), w.grad, rtol=1e-4, atol=1e-5)
    assert 1 / torch.sigmoid(w[0] if channels else w).item() == pytest.approx(3.0)


def test_if_does_not_leak():
    x = torch.full((6, 1), 0.3)
    assert nn.IF()(x).flatten().tolist() == [0, 0, 0, 1, 0, 0]


def test_every_parameter_can_be_trained(backend, device):
    parameters = {
        name: torch.nn.Parameter(torch.full((3,), value, device=device))
        for name, value in {"decay": 0.5, "gain": 1.1, "v_leak": 0.1, "v_threshold": 0.9, "reset_amount": 0.8}.items()
    }
    layer = nn.LIF(**parameters, v_reset=None, backend=backend).to(device)
    layer(torch.randn(5, 4, 3, 6, device=device)).sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().min() > 0, name
    assert set(layer.state_dict()) == set(parameters)


def test_the_soft_reset_subtracts_the_threshold_and_trains_it():
    threshold = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    nn.LIF(v_threshold=threshold, v_reset=None)(x).sum().backward()
    both = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    lif(x, v_threshold=both, reset_amount=both, spec=LIFSpec("soft")).spikes.sum().backward()
    torch.testing.assert_close(threshold.grad, both.grad)


@pytest.mark.parametrize("time_dim", [0, 1, -1])
def test_the_time_axis_can_be_anywhere(backend, device, time_dim):
    x = torch.randn(4, 2, 3, 5, device=device)
    decay = torch.tensor([0.2, 0.5, 0.8], device=device)
    want = nn.LIF(decay, backend=backend)(x)
    moved = x.movedim(0, time_dim)
    channel = next(i for i in range(4) if moved.shape[i] == 3)
    got, v = nn.LIF(decay, time_dim=time_dim, channel_dim=channel, backend=backend)(moved, return_v=True)
    assert got.shape == v.shape == moved.shape
    assert torch.equal(got.movedim(time_dim, 0), want)


def test_channels_last_axis(backend, device):
    x = torch.randn(4, 2, 7, 3, device=device)
    decay = torch.tensor([0.2, 0.5, 0.8], device=device)
    got = nn.LIF(decay, channel_dim=-1, backend=backend)(x)
    assert torch.equal(got, nn.LIF(decay, backend=backend)(x.transpose(2, 3)).transpose(2, 3))


def test_a_decay_of_zero_forgets(backend, device):
    """What init_tau = 1 means, which PLIF has no w for; bounded by the clamp it is learned from there."""
    x = torch.randn(5, 2, 3, device=device)
    assert torch.equal(nn.LIF(decay=0.0, backend=backend).to(device)(x), (x > 1).float())
    layer = nn.LI(nn.Bounded(0.0, "clamp"), backend=backend).to(device)
    v = layer(x)
    assert torch.equal(v, x)
    v.backward(-x.roll(1, 0))  # a step against it raises the decay
    assert layer.decay.raw.grad < 0


def test_snntorchs_leaky_with_beta_zero_within_a_millionth():
    """h[t] = x[t] - threshold s[t-1]: threshold / beta does not exist; with decay 2**-20 it does."""
    small, threshold, x = 2.0**-20, 0.8, 2 * torch.randn(20, 4, 3)
    settings = {"v_reset": None, "v_threshold": threshold, "detach_reset": True, "surrogate": "atan"}
    layer = nn.LIF(small, reset_amount=threshold / small, **settings)
    x.requires_grad_()
    h, s = [], torch.zeros(4, 3)
    for current in x.detach():
        h.append(current - threshold * s)
        s = (h[-1] > threshold).float()
    h = torch.stack(h)
    got, v = layer(x, return_v=True)
    assert torch.equal(got, (h > threshold).float()) and 0 < got.mean() < 1
    silent = got == 0
    assert (v - h)[silent].abs().max() <= 2 * small * h.abs().max()
    (grad,) = torch.autograd.grad(got.sum(), x)
    want = reference.surrogate_derivative(h - threshold, "atan", 2.0)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_between_calls():
    layer = nn.LIF()
    x, other = torch.randn(4, 2, 3), torch.randn(7, 5, 3)
    first = layer(x)
    layer(other)
    assert torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), first)


def test_copy_pickle_and_state_dict_after_a_call():
    layer = nn.PLIF(channels=3)
    x = torch.randn(4, 2, 3, requires_grad=True)
    want = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = nn.PLIF(init_tau=5.0, channels=3)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x), want)
    assert list(layer.state_dict()) == ["w"]


def test_the_gradient_is_the_same_in_eval_mode(backend, device):
    layer = nn.LIF(backend=backend).to(device)
    grads = []
    for mode in (True, False):
        x = torch.linspace(-1, 2, 24, device=device).reshape(4, 2, 3).requires_grad_()
        layer.train(mode)(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_checkpointing_recomputes_the_same(backend, device):
    layer = nn.LIF(backend=backend).to(device)
    x = torch.randn(5, 2, 3, device=device, requires_grad=True)
    (want,) = torch.autograd.grad(layer(2 * x).sum(), x)
    for reentrant in (False, True):
        out = torch.utils.checkpoint.checkpoint(lambda t: layer(2 * t), x, use_reentrant=reentrant)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0] if not reentrant else _backward(out, x), want)


def _backward(out, x):
    x.grad = None
    out.sum().backward()
    return x.grad


def test_autocast(backend, device):
    layer = nn.LIF(backend=backend).to(device)
    linear = torch.nn.Linear(3, 4).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer(linear(torch.randn(4, 2, 3, device=device)))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.isfinite().all()


def test_saved_for_backward_is_the_input_alone(backend, device):
    x = torch.randn(33, 2, 64, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = nn.LIF(backend=backend).to(device)(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.numel()}
    storages.pop(x.untyped_storage().data_ptr())
    # v after steps 16 and 32 of the 33, in float32.
    assert sum(storages.values()) == 2 * 2 * 64 * 4
    out.sum().backward()


def test_repr_says_how_it_was_made():
    assert repr(nn.PLIF(channels=4, v_reset=None)).startswith("PLIF(w=Parameter[4], decay_input=False")
    assert "surrogate='atan', alpha=2" in repr(nn.LIF(surrogate="atan"))
