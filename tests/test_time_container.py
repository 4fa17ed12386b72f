"""The time container as a container: slices, state dicts, copies, containers in containers, bad input."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from timed import B, C, H, T, images, network
from torch import nn

from trtkern import nn as snn
from trtkern.nn.time import OverTime, TimeSequential


def test_slices_and_indices():
    net = network(T).eval()
    x = images(time=False, dtype=torch.float64)
    want = net(x)
    for k in range(1, len(net)):
        head, tail = net[:k], net[k:]
        assert type(head) is type(tail) is TimeSequential and (head.timesteps, tail.timesteps) == (T, None)
        assert torch.equal(tail(head(x)), want)
        assert list(tail.state_dict()) == [key for key in net.state_dict() if int(key.split(".")[0]) >= k]
    assert net[0] is net[:1][0] and net[-1] is net[8] and len(net[2:-2]) == 5
    assert net[:0].timesteps is None and net[::2].timesteps == T
    assert torch.equal((net[:3] + net[3:])(x), want) and (net[:3] + net[3:]).timesteps == T
    doubled = TimeSequential(nn.Linear(3, 3), snn.LIF(), timesteps=2) * 2
    assert type(doubled) is TimeSequential and len(doubled) == 4 and doubled.timesteps == 2


def test_state_dict_keys_are_those_of_a_sequential():
    layers = OrderedDict(conv=nn.Conv2d(C, 4, 3), norm=nn.BatchNorm2d(4), lif=snn.PLIF())
    assert list(TimeSequential(layers).state_dict()) == list(nn.Sequential(layers).state_dict())
    net = network(T)
    nn.Sequential(*copy.deepcopy(net)).load_state_dict(net.state_dict())
    assert list(OverTime(nn.Linear(2, 3)).state_dict()) == ["module.weight", "module.bias"]


def test_copies_and_pickles():
    net = network(T).eval()
    x = images(time=False, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), net(x))
    assert repr(net).startswith("TimeSequential(\n  timesteps=4")


@pytest.mark.parametrize("inner", [None, T])
@pytest.mark.parametrize("outer", [None, T])
def test_containers_in_containers(inner, outer):
    x = images(time=False)
    stem = TimeSequential(nn.Conv2d(C, 4, 3), snn.LIF(), timesteps=inner)
    net = TimeSequential(TimeSequential(stem), TimeSequential(nn.Flatten(), nn.Linear(64, 2)), timesteps=outer)
    flat = TimeSequential(*stem, *net[1])
    frames = torch.stack([x] * T)
    assert torch.equal(net(x if inner or outer else frames), flat(frames))
    if inner or outer:
        assert torch.equal(net(frames, sequence=True), flat(frames))
    if inner:
        later = TimeSequential(nn.Identity(), nn.ReLU(), stem)
        assert torch.equal(later(frames), stem[:](x.relu()))
        with pytest.raises(
            ValueError, match=r"expected a sequence of timesteps=4 steps, got a tensor of shape \(5, 3, 2"
        ):
            later(torch.rand(5, B, C, H, H))


def _not_a_layer():
    return OverTime("conv")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TimeSequential(timesteps=0), ValueError, "timesteps >= 1, got 0"),
        (lambda: TimeSequential(timesteps=True), TypeError, "None or an int, got True"),
        (lambda: TimeSequential(nn.Linear(3, 3))("x"), TypeError, "expected x to be a tensor or Spikes, got 'x'"),
        (lambda: TimeSequential(nn.Conv2d(1, 1, 3))(torch.rand(T, 1, 5, 5)), ValueError, "'0' .Conv2d.*5 axes or more"),
        (lambda: TimeSequential(nn.Conv2d(1, 1, 3), timesteps=2)(torch.rand(1, 5, 5)), ValueError, "4 axes or more"),
        (
            lambda: TimeSequential(nn.Linear(3, 3))(torch.rand(1, 3)),
            ValueError,
            r"\[T, B, \.\.\.\] with 3 axes or more",
        ),
        (lambda: TimeSequential(nn.ReLU())(torch.rand(3)), ValueError, "2 axes or more"),
        (
            lambda: TimeSequential(nn.Flatten(0))(torch.rand(T, B, 5)),
            ValueError,
            "'0' .Flatten. expected to keep the 12",
        ),
        (
            lambda: OverTime(nn.Flatten(0))(torch.rand(T, B, 5)),
            ValueError,
            "OverTime: layer .Flatten. expected to keep",
        ),
        (lambda: TimeSequential(nn.Flatten(0), timesteps=2)(torch.rand(B, 5)), ValueError, "keep the 3 rows"),
        (
            lambda: TimeSequential(nn.LSTM(3, 3))(torch.rand(T, B, 3)),
            TypeError,
            "'0' .LSTM. expected to return a tensor",
        ),
        (lambda: TimeSequential(snn.LIF(time_dim=1))(torch.rand(T, B, 3)), ValueError, "got time_dim=1"),
        (
            lambda: TimeSequential(nn.ReLU(), timesteps=2)(torch.rand(4, B), sequence=True),
            ValueError,
            "timesteps=2 steps",
        ),
        (_not_a_layer, TypeError, "expected a layer, got 'conv'"),
        (lambda: OverTime(nn.Sequential(nn.ReLU(), snn.LIF())), ValueError, "Sequential, which takes"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
