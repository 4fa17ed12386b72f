"""One step at a time: the numbers of a sequence, and what is said where a step is given for a sequence."""

import copy
import warnings

import pytest
import torch

from trtkern import nn as snn

LAYERS = {
    "LIF": lambda **settings: snn.LIF(0.7, **settings),
    "soft": lambda **settings: snn.LIF(torch.tensor([0.3, 0.6, 0.9]), v_reset=None, v_leak=0.2, **settings),
    "IF": lambda **settings: snn.IF(0.8, **settings),
    "PLIF": lambda **settings: snn.PLIF(channels=3, **settings),
    "LI": lambda **settings: snn.LI(0.9, **settings),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_are_those_of_the_sequence(backend, device, name, dtype):
    layer = LAYERS[name](backend=backend).to(device)
    x = torch.randn(5, 2, 3, 4, device=device).to(dtype)
    want, last = layer(x, return_state=True)
    v, made = None, []
    for current in x:
        out, v = layer.step(current, v)
        made.append(out)
    assert v.dtype == torch.float32 and made[0].dtype == dtype and made[0].shape == (2, 3, 4)
    assert torch.equal(torch.stack(made), want) and torch.equal(v, last) and want.float().abs().sum() > 0


def test_gradients_of_steps_are_those_of_the_sequence():
    layer = snn.PLIF(channels=3).double()
    x, g = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    one, many = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = torch.autograd.grad(layer(one), (one, layer.w), g)
    v, made = None, []
    for current in many:
        out, v = layer.step(current, v)
        made.append(out)
    got = torch.autograd.grad(torch.stack(made), (many, layer.w), g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert want[0].abs().sum() > 0 and want[1].abs().sum() > 0


@pytest.mark.parametrize("time_dim", [1, -1])
def test_a_step_has_no_time_axis_wherever_that_is(time_dim):
    decay = torch.tensor([0.2, 0.5, 0.8])
    x = torch.randn(4, 2, 3)
    channel = 2 if time_dim == 1 else 1
    layer = snn.LIF(decay, time_dim=time_dim, channel_dim=channel)
    want, last = snn.LIF(decay)(x, return_state=True)
    v = None
    for current, expected in zip(x, want, strict=True):
        out, v = layer.step(current, v)
        assert torch.equal(out, expected)
    assert torch.equal(v, last)


def test_a_step_of_a_packed_layer_is_dense():
    x = torch.randn(2, 3)
    out, _ = snn.LIF(packed=True).step(x)
    assert torch.equal(out, (x > 1).float())


@pytest.mark.parametrize("settings", [{}, {"pool": 2}, {"packed": True}])
def test_steps_of_a_norm_in_evaluation(backend, device, settings):
    layer = snn.BatchNormLIF(3, backend=backend, **settings).to(device)
    y, residual = torch.randn(4, 2, 3, 6, 6, device=device), torch.randn(4, 2, 3, 6, 6, device=device)
    layer(y)
    layer.eval()
    want, last = layer(y, residual, return_state=True)
    want = want.spikes if isinstance(want, snn.Spikes) else want
    v, made = None, []
    for current, skipped in zip(y, residual, strict=True):
        out, v = layer.step(current, skipped, v)
        made.append(out)
    assert torch.equal(torch.stack(made), want) and torch.equal(v, last) and want.sum() > 0


def test_a_training_norm_takes_no_single_step():
    layer = snn.BatchNormLIF(3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"BatchNormLIF.step: expected running statistics, .* call layer.eval\(\)"):
        layer.step(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="expected running statistics"):
        snn.BatchNormLIF(3, track_running_stats=False).eval().step(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("layer", [snn.LIF(), snn.LI(), snn.BatchNormLIF(3).eval()])
def test_a_step_is_a_tensor_and_its_state_fits(layer):
    with pytest.raises(TypeError, match=r"step: expected x to be a tensor \[B, C, ...\], one step, got 0.5 \(float\)"):
        layer.step(0.5)
    with pytest.raises(ValueError, match=r"expected v0 of shape \(2, 3\)"):
        layer.step(torch.randn(2, 3), v=torch.zeros(3))


@pytest.mark.parametrize("name", ["LIF", "IF", "PLIF", "LI", "BatchNormLIF"])
def test_two_axes_are_read_as_time_with_a_warning(name):
    make = LAYERS.get(name, lambda **settings: snn.BatchNormLIF(3, **settings).eval())
    layer = make(channel_dim=-1)
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match=rf"^{name}: expected x as a sequence .* got 2 axes, .* layer.step\(x, v\)"):
        got = layer(x)
    assert torch.equal(got, layer(x.unsqueeze(1)).squeeze(1))


def test_one_axis_likewise():
    with pytest.warns(UserWarning, match="got one axis"):
        snn.LIF()(torch.randn(4))


def test_the_warning_names_the_line_that_called_and_comes_once():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), snn.LIF())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for batch in (4, 5, 6):
            net(torch.randn(batch, 3))
        net(torch.randn(4, 3))
    here = [warning for warning in caught if warning.filename == __file__]
    assert len(caught) == len(here) == 2 and here[1].lineno - here[0].lineno == 1


def test_three_axes_and_steps_bring_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        snn.LIF()(torch.randn(4, 2, 3))
        snn.LIF().step(torch.randn(2, 3))
        snn.TimeSequential(torch.nn.Linear(3, 4), snn.LIF(), timesteps=4)(torch.randn(2, 3))
        torch.compile(snn.LIF(), fullgraph=True, backend="aot_eager")(torch.randn(4, 3))


@pytest.mark.parametrize("shape", [(3,), (2, 64), (2, 8, 8), (1, 2, 3, 1, 8, 8)])
def test_networks_refuse_another_rank(shape):
    from trtkern.models import ConvSNN

    with pytest.raises(ValueError, match=r"ConvSNN: expected images \[B, C, H, W\] or frames \[T, B, C, H, W\], got"):
        ConvSNN((1, 8, 8), [4, "pool"], 2)(torch.randn(shape))
