"""Rockpool's SynNet on this project's fused neurons: compared, timed, trained. Needs `pip install rockpool`."""

import copy
import warnings

import torch

from trtkern import interop

warnings.filterwarnings("ignore")  # Rockpool names every optional package that is not installed
from rockpool.nn.networks import SynNet  # noqa: E402

torch.manual_seed(0)
# At most one spike a step: this setting has an equal here.
net = SynNet(
    n_classes=5, n_channels=16, size_hidden_layers=[60, 60], time_constants_per_layer=[3, 5], max_spikes_per_dt=1,
    train_time_constants=True, threshold=0.5,
)  # fmt: skip
before, report = copy.deepcopy(net), interop.ConvertReport()
net = interop.convert(net, report, strict=True)
print(report)

x = (torch.rand(8, 100, 16) < 0.3).float()  # spikes, [B, T, channels]
print(interop.check(before, net, x, run=lambda model, x: model(x)[0], timed=True))

labels, optimizer = torch.randint(5, (8,)), torch.optim.Adam(net.parameters().astorch(), lr=1e-5)
for step in range(3):  # no reset_state() between the calls
    spikes, state, record = net(x)
    loss = torch.nn.functional.cross_entropy(spikes.sum(1), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
