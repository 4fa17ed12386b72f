"""Images and a network for the tests of the time container."""

import torch
from torch import nn

from trtkern import nn as snn
from trtkern.nn.time import TimeSequential

T, B, C, H = 4, 3, 2, 6


def images(layout="contiguous", *, time=True, dtype=torch.float32):
    shape = (T, B, H, H, C) if time else (B, H, H, C)
    x = torch.randn(shape, dtype=dtype).movedim(-1, -3)
    return x if layout == "channels_last" else x.contiguous()


def network(timesteps=None, *, norm=nn.BatchNorm2d, **settings):
    return TimeSequential(
        nn.Conv2d(C, 4, 3, padding=1, bias=False),
        norm(4, **settings),
        snn.LIF(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        snn.PLIF(channels=5),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 7),
        timesteps=timesteps,
    ).double()
