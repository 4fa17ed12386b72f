"""A network of SpikingJelly trains a step as it is, and after one line with fused neurons: the same loss.

`pip install spikingjelly`, then `python examples/from_spikingjelly.py`. docs/from-spikingjelly.md explains it.
"""

import copy

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from trtkern import interop

net = nn.Sequential(
    layer.Conv2d(1, 16, 3, padding=1),
    layer.BatchNorm2d(16),
    neuron.ParametricLIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
    layer.MaxPool2d(2),
    layer.Flatten(),
    layer.Linear(16 * 4 * 4, 100),
    neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
    layer.Linear(100, 10),
)
functional.set_step_mode(net, "m")

report = interop.ConvertReport()
converted = interop.convert(copy.deepcopy(net), report, strict=True, fuse=True)
print(report)

x, target = torch.rand(4, 32, 1, 8, 8), torch.randint(10, (32,))  # [T, B, C, H, W]
for name, model in (("before", net), ("after", converted)):
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(3):
        loss = nn.functional.cross_entropy(model(x).mean(0), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        functional.reset_net(net)  # which the converted model has no need of
        print(f"{name}, step {step + 1}: loss {loss.item():.4f}")
