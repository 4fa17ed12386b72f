"""The networks of the TRT paper in plain torch, written out layer by layer, with the state-dict keys of its code.

The networks use nothing of trtkern; ``compare`` sets one of trtkern beside one of these.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from trtkern.models import load_reference_weights, reference_keys
from trtkern.nn import TRTLoss


class Triangle(torch.autograd.Function):
    """1 where u > 0; the derivative is that of the triangle, max(0, 1 - |u|)."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (u,) = ctx.saved_tensors
        return gradient * (1 - u.abs()).clamp(min=0)


class Neurons(nn.Module):
    """u_t = decay * v_{t-1} + x_t, a spike above 1, v_t = (1 - s_t) u_t with the gradient of s_t."""

    def __init__(self, decay):
        super().__init__()
        self.decay = decay

    def forward(self, x):
        v, spikes = torch.zeros_like(x[0]), []
        for current in x.unbind(0):
            u = self.decay * v + current
            spike = Triangle.apply(u - 1)
            v = (1 - spike) * u
            spikes.append(spike)
        return torch.stack(spikes)


class Step(nn.Module):
    """A layer of one step over [T, B, ...]."""

    def __init__(self, *layers):
        super().__init__()
        self.module = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def forward(self, x):
        return self.module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def conv_norm(channels, out, kernel=3, stride=1, padding=1):
    return Step(nn.Conv2d(channels, out, kernel, stride, padding, bias=False), nn.BatchNorm2d(out))


class Conv(nn.Module):
    """Convolution, BatchNorm, neurons, pooling."""

    def __init__(self, channels, out, kernel=3, stride=1, padding=1, *, pool=None, decay=0.5):
        super().__init__()
        self.conv2d_layer = conv_norm(channels, out, kernel, stride, padding)
        self.neurons = Neurons(decay)
        self.pool = nn.Identity() if pool is None else Step(pool)

    def forward(self, x):
        return self.pool(self.neurons(self.conv2d_layer(x)))


class Residual(nn.Module):
    """The residual is added before the last neurons."""

    def __init__(self, channels, out, stride, decay=0.5):
        super().__init__()
        self.conv2d_layer_1 = conv_norm(channels, out, 3, stride)
        self.conv2d_layer_2 = conv_norm(out, out)
        changes = stride != 1 or channels != out
        self.downsample_layer = conv_norm(channels, out, 1, stride, 0) if changes else nn.Identity()
        self.neurons = Neurons(decay)

    def forward(self, x):
        y = self.conv2d_layer_2(self.neurons(self.conv2d_layer_1(x)))
        return self.neurons(y + self.downsample_layer(x))


class SEW(nn.Module):
    """The spikes of the input, or of its projection, are added to the block's spikes."""

    def __init__(self, channels, out, stride, decay):
        super().__init__()
        self.conv2d_layer_1 = conv_norm(channels, out, 3, stride)
        self.conv2d_layer_2 = conv_norm(out, out)
        changes = stride != 1 or channels != out
        layers = [conv_norm(channels, out, 1, stride, 0), Neurons(decay)] if changes else []
        self.downsample_layer = nn.Sequential(*layers)
        self.neurons = Neurons(decay)

    def forward(self, x):
        spikes = self.neurons(self.conv2d_layer_2(self.neurons(self.conv2d_layer_1(x))))
        return spikes + self.downsample_layer(x)


class Full(nn.Module):
    """Linear and neurons."""

    def __init__(self, features, out):
        super().__init__()
        self.fc = Step(nn.Linear(features, out))
        self.neurons = Neurons(0.5)

    def forward(self, x):
        return self.neurons(self.fc(x))


class Flat(nn.Flatten):
    def __init__(self):
        super().__init__(2)


class Average(Flat):
    """The average over the image, flattened."""

    def forward(self, x):
        return super().forward(x.mean((-2, -1)).unsqueeze(-1))


class Plain(nn.Module):
    """Layers over [T, B, ...]; an image is repeated T times."""

    def __init__(self, *layers, timesteps=3):
        super().__init__()
        self.layers, self.timesteps = nn.Sequential(*layers), timesteps

    def forward(self, x):
        return self.layers(x.unsqueeze(0).repeat(self.timesteps, 1, 1, 1, 1) if x.dim() == 4 else x)


def vggsnn(features, classes=10):
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


def resnet19(classes=10):
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


def resnet34(block, decay, classes=100, width=64):
    """conv 7x7, 64, by 2 | maximum 3x3, by 2 | 3 x 64, 4 x 128, 6 x 256, 3 x 512 | average | Linear; width: the 64."""
    layers, channels = [Conv(3, width, 7, 2, 3, pool=nn.MaxPool2d(3, 2, 1), decay=decay)], width
    for out, blocks in ((width, 3), (2 * width, 4), (4 * width, 6), (8 * width, 3)):
        for i in range(blocks):
            layers.append(block(channels, out, 2 if i == 0 and out > width else 1, decay))
            channels = out
    return Plain(*layers, Average(), Step(nn.Linear(channels, classes)))


def varied(net):
    """In float64, with scales and shifts of BatchNorm that differ from channel to channel."""
    net = net.double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.6)
    return net


def trt_loss(net, logits, target, lam=1e-5, delta=0.25, eps=1e-5, eta=0.05):
    """1/T sum_t [ (1 - eta) CE + eta MSE + sum_w lam / (1 + (e^(delta t) - 1)(|w| + eps)) w^2 ], biases left out.

    A loop over the steps and, in each, over the weights, as the paper formulates it: autograd keeps three tensors of
    the size of the weights for every step.
    """
    onehot = F.one_hot(target, logits.shape[2]).to(logits.dtype)
    loss = 0
    for t, output in enumerate(logits.unbind(0)):
        loss = loss + (1 - eta) * F.cross_entropy(output, target) + eta * F.mse_loss(output, onehot)
        for name, w in net.named_parameters():
            if "bias" not in name:
                factor = lam / (1 + (math.exp(delta * t) - 1) * (w.abs() + eps))
                loss = loss + (factor * w**2).sum()
    return loss / len(logits)


def compare(model, net, x, classes, *, gradients=True):
    """The model of trtkern, with the weights of the plain one: outputs, TRT gradients and running statistics."""
    # Nothing here leaves memory unwritten, and to fill these networks' memory with NaN takes as long as they run.
    torch.utils.deterministic.fill_uninitialized_memory = False
    load_reference_weights(model, net.state_dict())
    target = torch.arange(x.shape[-4]) % classes
    with torch.set_grad_enabled(gradients):
        got, want = model(x), net(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    if gradients:
        loss, expected = TRTLoss(model), trt_loss(net, want, target)
        data = loss.parts(got, target, regularize=False).total
        data.backward()
        torch.testing.assert_close(data + loss.add_grad_(), expected, rtol=1e-9, atol=1e-9)
        expected.backward()
        keys = reference_keys(model)
        theirs = dict(net.named_parameters())
        for name, parameter in model.named_parameters():
            wanted = theirs[keys[name]].grad
            largest = wanted.abs().max()
            assert largest > 0 and (parameter.grad - wanted).abs().max() <= 1e-9 * largest, name
        assert {keys[name] for name, _ in loss.regularized()} == {name for name in theirs if "bias" not in name}
    keys, theirs = reference_keys(model), dict(net.named_buffers())
    held = {name: held for name, held in model.named_buffers() if name in keys}
    assert len(held) == len(theirs)
    for name, statistic in held.items():
        torch.testing.assert_close(statistic, theirs[keys[name]], rtol=1e-9, atol=1e-9)
