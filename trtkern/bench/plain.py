"""The networks of the TRT paper in plain torch, written out layer by layer, with the state-dict keys of its code; and a
plain one of fully connected layers.

What tests and ``trtkern bench --op step`` compare with: nothing of trtkern is in it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Triangle(torch.autograd.Function):
    """1 where u > 0; the derivative is that of the triangle, max(0, 1 - |u|)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return gradient * (1 - u.abs()).clamp(min=0)


class Neurons(nn.Module):
    """u_t = decay * v_{t-1} + x_t, a spike above the threshold, v_t = (1 - s_t) u_t with the gradient of s_t."""

    def __init__(self, decay: float, threshold: float = 1.0) -> None:
        super().__init__()
        self.decay, self.threshold = decay, threshold

    def forward(self, x: Tensor) -> Tensor:
        v, spikes = torch.zeros_like(x[0]), []
        for current in x.unbind(0):
            u = self.decay * v + current
            spike = Triangle.apply(u - self.threshold)
            v = (1 - spike) * u
            spikes.append(spike)
        return torch.stack(spikes)


class LIFCell(nn.Module):
    """One step of ``Neurons`` for loops: h = decay * v + x, a spike above 1, v = (1 - s) * h."""

    def __init__(self, decay: float | nn.Parameter = 0.5) -> None:
        super().__init__()
        self.decay = decay

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        h = self.decay * v + x
        s = Triangle.apply(h - 1.0)
        return s, (1 - s) * h


class ALIFCell(nn.Module):
    """One step of a neuron whose threshold rises with its spikes, with the defaults of ``trtkern.nn.ALIF``."""

    decay, decay_a, beta = 0.95, 0.995, 1.8

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        v, a = state
        h = self.decay * v + (1 - self.decay) * x
        s = Triangle.apply(h - (1.0 + self.beta * a))
        return s, (h - s, self.decay_a * a + (1 - self.decay_a) * s)


class CUBALIFCell(nn.Module):
    """One step of a neuron behind a synaptic current, with the defaults of ``trtkern.nn.CUBALIF``."""

    decay_syn, decay = 0.8, 0.9

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        i, v = state
        i = self.decay_syn * i + x
        h = self.decay * v + (1 - self.decay) * i
        s = Triangle.apply(h - 1.0)
        return s, (i, (1 - s) * h)


class Step(nn.Module):
    """A layer of one step over [T, B, ...]."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.module = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def conv_norm(channels: int, out: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> Step:
    """Convolution and BatchNorm."""
    return Step(nn.Conv2d(channels, out, kernel, stride, padding, bias=False), nn.BatchNorm2d(out))


class Conv(nn.Module):
    """Convolution, BatchNorm, neurons, pooling."""

    def __init__(
        self, channels: int, out: int, kernel: int = 3, stride: int = 1, padding: int = 1, *,
        pool: nn.Module | None = None, decay: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv2d_layer = conv_norm(channels, out, kernel, stride, padding)
        self.neurons = Neurons(decay)
        self.pool = nn.Identity() if pool is None else Step(pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.neurons(self.conv2d_layer(x)))


class Residual(nn.Module):
    """The residual is added before the last neurons."""

    def __init__(self, channels: int, out: int, stride: int, decay: float = 0.5) -> None:
        super().__init__()
        self.conv2d_layer_1 = conv_norm(channels, out, 3, stride)
        self.conv2d_layer_2 = conv_norm(out, out)
        changes = stride != 1 or channels != out
        self.downsample_layer = conv_norm(channels, out, 1, stride, 0) if changes else nn.Identity()
        self.neurons = Neurons(decay)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2d_layer_2(self.neurons(self.conv2d_layer_1(x)))
        return self.neurons(y + self.downsample_layer(x))


class SEW(nn.Module):
    """The spikes of the input, or of its projection, are added to the block's spikes."""

    def __init__(self, channels: int, out: int, stride: int, decay: float) -> None:
        super().__init__()
        self.conv2d_layer_1 = conv_norm(channels, out, 3, stride)
        self.conv2d_layer_2 = conv_norm(out, out)
        changes = stride != 1 or channels != out
        layers = [conv_norm(channels, out, 1, stride, 0), Neurons(decay)] if changes else []
        self.downsample_layer = nn.Sequential(*layers)
        self.neurons = Neurons(decay)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neurons(self.conv2d_layer_2(self.neurons(self.conv2d_layer_1(x))))
        return spikes + self.downsample_layer(x)


class Full(nn.Module):
    """Linear and neurons."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.fc = Step(nn.Linear(features, out))
        self.neurons = Neurons(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.neurons(self.fc(x))


class Flat(nn.Flatten):
    """[T, B, ...] to [T, B, features]."""

    def __init__(self) -> None:
        super().__init__(2)


class Average(Flat):
    """The average over the image, flattened."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((-2, -1)).unsqueeze(-1))


class Plain(nn.Module):
    """Layers over [T, B, ...]; an image is repeated T times."""

    def __init__(self, *layers: nn.Module, timesteps: int = 3) -> None:
        super().__init__()
        self.layers, self.timesteps = nn.Sequential(*layers), timesteps

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.unsqueeze(0).repeat(self.timesteps, 1, 1, 1, 1) if x.dim() == 4 else x)


def vggsnn(features: int, classes: int = 10) -> Plain:
    """64 - 128 - AP - 256 - 256 - AP - 512 - 512 - AP - 512 - 512 - AP - Linear."""
    return Plain(
        Conv(2, 64),
        Conv(64, 128, pool=nn.AvgPool2d(2)),
        Conv(128, 256),
        Conv(256, 256, pool=nn.AvgPool2d(2)),
        Conv(256, 512),
        Conv(512, 512, pool=nn.AvgPool2d(2)),
        Conv(512, 512),
        Conv(512, 512, pool=nn.AvgPool2d(2)),
        Flat(),
        Step(nn.Linear(features, classes)),
    )


def resnet19(classes: int = 10) -> Plain:
    """conv 64 | 3 x 128 | 3 x 256, the first by 2 | 2 x 512, the first by 2 | average | Linear 256, LIF | Linear."""
    return Plain(
        Conv(3, 64),
        Residual(64, 128, 1),
        Residual(128, 128, 1),
        Residual(128, 128, 1),
        Residual(128, 256, 2),
        Residual(256, 256, 1),
        Residual(256, 256, 1),
        Residual(256, 512, 2),
        Residual(512, 512, 1),
        Average(),
        Full(512, 256),
        Step(nn.Linear(256, classes)),
    )


def resnet34(block: type[Residual | SEW], decay: float, classes: int = 100, width: int = 64) -> Plain:
    """conv 7x7, 64, by 2 | maximum 3x3, by 2 | 3 x 64, 4 x 128, 6 x 256, 3 x 512 | average | Linear; width: the 64."""
    layers: list[nn.Module] = [Conv(3, width, 7, 2, 3, pool=nn.MaxPool2d(3, 2, 1), decay=decay)]
    channels = width
    for out, blocks in ((width, 3), (2 * width, 4), (4 * width, 6), (8 * width, 3)):
        for i in range(blocks):
            layers.append(block(channels, out, 2 if i == 0 and out > width else 1, decay))
            channels = out
    return Plain(*layers, Average(), Step(nn.Linear(channels, classes)))


def mlp(features: int, width: int = 512, classes: int = 10) -> Plain:
    """Linear, LIF | Linear, LIF | Linear."""
    return Plain(Flat(), Full(features, width), Full(width, width), Step(nn.Linear(width, classes)))


def trt_loss(
    net: nn.Module, logits: Tensor, target: Tensor, lam: float = 1e-5, delta: float = 0.25, eps: float = 1e-5,
    eta: float = 0.05,
) -> Tensor:  # fmt: skip
    """1/T sum_t [ (1 - eta) CE + eta MSE + sum_w lam / (1 + (e^(delta t) - 1)(|w| + eps)) w^2 ], biases left out.

    A loop over the steps and, in each, over the weights, as the paper formulates it: autograd keeps three tensors of
    the size of the weights for every step.
    """
    onehot = F.one_hot(target, logits.shape[2]).to(logits.dtype)
    loss = logits.new_zeros(())
    for t, output in enumerate(logits.unbind(0)):
        loss = loss + (1 - eta) * F.cross_entropy(output, target) + eta * F.mse_loss(output, onehot)
        for name, w in net.named_parameters():
            if "bias" not in name:
                factor = lam / (1 + (math.exp(delta * t) - 1) * (w.abs() + eps))
                loss = loss + (factor * w**2).sum()
    return loss / len(logits)
