"""A network of sinabs on this project's fused neurons: compared, timed, trained. Needs `pip install sinabs`."""

import copy

import sinabs.activation as sa
import sinabs.layers as sl
import torch
from torch import nn

from trtkern import interop

STEPS, BATCH = 10, 8
torch.manual_seed(0)
# At most one spike a step and no lower bound of the potential: these settings have an equal here.
iaf = {"batch_size": BATCH, "spike_fn": sa.SingleSpike, "spike_threshold": torch.tensor(0.25)}
net = nn.Sequential(
    sl.FlattenTime(),
    nn.Conv2d(2, 8, 3, padding=1, bias=False),
    sl.IAFSqueeze(**iaf),
    nn.AvgPool2d(2),
    nn.Flatten(),
    nn.Linear(8 * 17 * 17, 10, bias=False),
    sl.LIFSqueeze(tau_mem=20.0, norm_input=False, **iaf),
    sl.UnflattenTime(BATCH),
)
before, report = copy.deepcopy(net), interop.ConvertReport()
net = interop.convert(net, report, strict=True)
print(report)

events = (torch.rand(BATCH, STEPS, 2, 34, 34) < 0.1).float()  # frames of events, [B, T, C, H, W]
print(interop.check(before, net, events, timed=True))

labels, optimizer = torch.randint(10, (BATCH,)), torch.optim.Adam(net.parameters(), lr=1e-3)
for step in range(3):  # nothing to reset between the calls
    loss = nn.functional.cross_entropy(net(events).sum(1), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
