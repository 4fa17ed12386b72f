"""A network of Norse before and after its conversion: the same potentials, and a shorter training step."""

import copy
import time

import norse.torch as norse
import torch
from torch import nn

from trtkern import interop

torch.manual_seed(0)
before = norse.SequentialState(
    norse.Lift(nn.Conv2d(1, 12, 5)), norse.LIF(), norse.Lift(nn.MaxPool2d(2)),
    nn.Flatten(2), norse.Lift(nn.Linear(12 * 12 * 12, 10)), norse.LI(),
)  # fmt: skip
report = interop.ConvertReport()
after = interop.convert(copy.deepcopy(before), report, strict=True)
print(report)

x, target = 8 * torch.rand(25, 16, 1, 28, 28), torch.randint(10, (16,))
for name, net in (("Norse", before), ("trtkern", after)):
    for _ in range(3):
        net.zero_grad()
        begun = time.perf_counter()
        potentials, state = net(x)
        nn.functional.cross_entropy(potentials.amax(0), target).backward()
    print(f"{name}: {potentials.mean():.6f} on average, {1e3 * (time.perf_counter() - begun):.0f} ms")

first, other = before[0].lifted_module.weight.grad, after[0].lifted_module.weight.grad
print(f"the gradients differ by {(first - other).abs().max() / first.abs().max():.1e}")
