"""Models with pairs of BatchNorm and LIF, and how two of them compare."""

import torch
from torch import nn

from trtkern import nn as snn
from trtkern.nn.time import OverTime, TimeSequential

T, B, C, H = 4, 3, 2, 8


def convolutional(**settings):
    return TimeSequential(
        nn.Conv2d(C, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5, **settings),
        snn.LIF(v_reset=None, surrogate="atan"),
        nn.AvgPool2d(2),
        OverTime(nn.Conv2d(5, 6, 3)),
        OverTime(nn.BatchNorm2d(6)),
        snn.PLIF(channels=6, decay_input=True, v_leak=nn.Parameter(torch.tensor(0.1))),
        OverTime(nn.AvgPool2d(2, ceil_mode=True)),
        nn.Flatten(),
        nn.Linear(6, 7),
    )


def single(**settings):
    return TimeSequential(nn.Conv2d(C, 5, 3), nn.BatchNorm2d(5, **settings), snn.LIF(), nn.AvgPool2d(2))


def biasless():
    """As BatchNorm2d(5, bias=False) is, which torch 2.11 does not know."""
    net = single()
    net[1].register_parameter("bias", None)
    return net


def wrapped():
    return nn.Sequential(
        OverTime(nn.Conv2d(C, 5, 3)),
        OverTime(nn.BatchNorm2d(5, eps=1e-3, momentum=None)),
        snn.LIF(decay=nn.Parameter(torch.full((5,), 0.6)), v_threshold=0.8, detach_reset=True, channel_dim=-3),
        OverTime(nn.AvgPool2d((2, 2), count_include_pad=False)),
    )


def features():
    return TimeSequential(nn.Flatten(), nn.Linear(C * H * H, 9), nn.BatchNorm1d(9), snn.IF(gain=0.9), nn.Linear(9, 2))


def unbatched():
    """[T, C, H, W]: the BatchNorm's axis 1 is that of the channels."""
    return nn.Sequential(nn.Conv2d(C, 5, 3), nn.BatchNorm2d(5), snn.LIF(decay=torch.rand(5), channel_dim=1))


class Model(nn.Module):
    """Pairs inside of somebody's module, and what is not one."""

    def __init__(self):
        super().__init__()
        self.stem = TimeSequential(nn.Conv2d(C, 5, 3), nn.BatchNorm2d(5), snn.LIF(), timesteps=T)
        self.blocks = nn.ModuleList([TimeSequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5), snn.PLIF())])
        self.alone = OverTime(nn.BatchNorm2d(5))
        self.lif = snn.LIF()

    def forward(self, x):
        x = self.stem(x)
        return self.lif(self.alone(x + self.blocks[0](x)))


MODELS = {
    "convolutional": (convolutional, (T, B, C, H, H)),
    "settings": (lambda: single(eps=1e-2, momentum=0.3, affine=False), (T, B, C, H, H)),
    "no statistics": (lambda: single(track_running_stats=False), (T, B, C, H, H)),
    "no bias": (biasless, (T, B, C, H, H)),
    "wrapped": (wrapped, (T, B, C, H, H)),
    "features": (features, (T, B, C, H, H)),
    "unbatched": (unbatched, (T, C, H, H)),
    "module": (Model, (B, C, H, H)),
    "volumes": (lambda: TimeSequential(nn.Conv3d(C, 3, 3), nn.BatchNorm3d(3), snn.LIF()), (T, B, C, 4, 4, 4)),
    "sequences": (lambda: TimeSequential(nn.Conv1d(C, 3, 3), nn.BatchNorm1d(3), snn.LIF()), (T, B, C, 5)),
}


def made(name):
    """A model of float64 with parameters and statistics of its own, and its input."""
    make, shape = MODELS[name]
    model = make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(shape, dtype=torch.float64)
    model(x)
    return model, x


def same(a, b, x):
    """Outputs, gradients and buffers of two models; their parameters come in the same order."""
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = a(x), b(y)
    g = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(got, [x, *a.parameters()], g)
    want_grads = torch.autograd.grad(want, [y, *b.parameters()], g)
    for one, two in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert grads[0].abs().sum() > 0 and got.abs().sum() > 0
    for one, two in zip(a.buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def hooked(layer):
    layer.register_forward_hook(lambda *args: None)
    return layer
