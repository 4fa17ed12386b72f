"""Models whose spikes are kept as words, for the tests of packed activations and of the layers that keep words."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trtkern.nn import LIF, BatchNormLIF
from trtkern.nn.packed import packed_activations
from trtkern.ops.spikes import Spikes, pack


def flat(s):
    return s.flatten(0, 1)


def folded(layer, x):
    return layer(flat(x)).unflatten(0, x.shape[:2])


def in_channels_last(x):
    return flat(x).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])


def spikes(*shape, channels_last=False, pooled=False, dtype=torch.float32):
    """Random ``Spikes`` whose dense part wants a gradient; ``shape`` is that of the words."""
    s = (torch.rand(shape) < 0.3).to(dtype)
    s[0, 0] = 1
    s = in_channels_last(s) if channels_last else s
    words = pack(s)
    s = folded(nn.AvgPool2d(2), s) if pooled else s
    return Spikes(s.requires_grad_(), words)


class Net(nn.Module):
    """Plain torch around neurons: conv, LIF, conv, BatchNorm + LIF, average pooling, conv, LIF, Linear."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(n, 8, 3, padding=1) for n in (2, 8, 8)])
        self.first, self.second, self.third = LIF(), BatchNormLIF(8), LIF()
        self.pool, self.linear = nn.AvgPool2d(2), nn.Linear(8 * 4 * 4, 5)
        self.checkpointed = checkpointed

    def block(self, s):
        s = folded(self.pool, self.second(folded(self.convs[1], s)))
        return self.third(4 * folded(self.convs[2], s))

    def forward(self, x):
        s = self.first(4 * folded(self.convs[0], x))
        if self.checkpointed is None:
            s = self.block(s)
        else:
            s = checkpoint(self.block, s, use_reentrant=self.checkpointed)
        # Channels last: a view of memory as it is.
        return self.linear(s.movedim(2, -1).flatten(2))


STEPS, BATCH = 9, 2
SPIKES = 4 * STEPS * BATCH * 8 * 8 * 8
WORDS = 2 * BATCH * 8 * 8 * 8


def inputs(layout=torch.contiguous_format):
    x = torch.randn(STEPS, BATCH, 2, 8, 8)
    return in_channels_last(x) if layout == torch.channels_last else x


def gradients(net, y):
    net.zero_grad()
    y.float().sin().sum().backward()
    return [parameter.grad for parameter in net.parameters()]


def equal(got, want):
    return all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(got, want, strict=True))


class Case:
    """A neuron, a convolution of 1x1 whose gradients tell what was kept, and something between them."""

    def __init__(self, timesteps=10, size=(4, 6), **lif):
        self.lif, self.conv = LIF(**lif), nn.Conv2d(3, 4, 1)
        self.x = (2 * torch.randn(timesteps, 2, 3, *size)).requires_grad_()
        self.dense = 4 * self.x.numel()

    def forward(self, between):
        return self.conv(between(self.lif(self.x)))

    def gradients(self, y):
        return torch.autograd.grad(y.float().sin().sum(), [self.x, *self.conv.parameters()])

    def check(self, between):
        """Gradients with and without the context are the same; what the context reports."""
        want = self.gradients(self.forward(between))
        with packed_activations() as report:
            y = self.forward(between)
        got = self.gradients(y)
        assert equal(got, want) and want[1].abs().sum() > 0
        return report


POOLED = {
    "layer": lambda s: nn.AvgPool2d(2)(flat(s)),
    "function": lambda s: F.avg_pool2d(flat(s), (2, 2), stride=[2, 2], count_include_pad=False),
    "slice": lambda s: F.avg_pool2d(flat(s[3:9]), 2),
    "step": lambda s: F.avg_pool2d(s[7], 2),
    "sliced twice": lambda s: F.avg_pool2d(flat(s[3:9]), 2).unflatten(0, (6, 2))[1:].flatten(0, 1),
    "channels last": lambda s: F.avg_pool2d(flat(s), 2),
}
