"""A network of snnTorch's tutorial 6 before and after its conversion: the same spikes, and a shorter training step."""

import copy
import time

import snntorch
import torch
from snntorch import surrogate, utils
from torch import nn

from trtkern import interop

torch.manual_seed(0)
options = {"beta": 0.5, "spike_grad": surrogate.fast_sigmoid(slope=25), "init_hidden": True}
before = nn.Sequential(
    nn.Conv2d(1, 12, 5), nn.MaxPool2d(2), snntorch.Leaky(**options),
    nn.Flatten(), nn.Linear(12 * 12 * 12, 10), snntorch.Leaky(**options, output=True),
)  # fmt: skip
after = interop.over_time(interop.convert(copy.deepcopy(before), strict=True))


def looped(net, x):
    utils.reset(net)
    made = [net(step) for step in x]
    return [torch.stack(each) for each in zip(*made, strict=True)]


x, target = 3 * torch.rand(25, 16, 1, 28, 28), torch.randint(10, (16,))
for name, net, run in (("snnTorch", before, looped), ("trtkern", after, lambda net, x: net(x))):
    for _ in range(3):
        net.zero_grad()
        begun = time.perf_counter()
        spikes, _ = run(net, x)
        nn.functional.cross_entropy(spikes.sum(0), target).backward()
    print(f"{name}: {spikes.sum():.0f} spikes, {1e3 * (time.perf_counter() - begun):.0f} ms")

first, other = before[0].weight.grad, after.net[0].weight.grad
print(f"the gradients differ by {(first - other).abs().max() / first.abs().max():.1e}")
