"""snnTorch: ``Leaky``, beta = 0.5, its own reset (by subtraction, a step later, detached), ATan(2).

``Synaptic`` likewise, with alpha = 0.75.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trtkern.bench.layers import WHOLE_LOOP, Layer, Neuron, Where
from trtkern.spec import LIFSpec

DISTRIBUTION = "snntorch"
MODULE = "snntorch"
INSTALL = "pip install snntorch"

# h[t] = beta * (h[t-1] - s[t-1] * threshold / beta) + x[t]
NEURON = Neuron((0.5, 1.0, 0.0, 2.0, 1.0, 0.0), LIFSpec("soft", "atan", 2.0, detach_reset=True))
SYNAPTIC = Neuron(
    (0.75, 1.0, 0.5, 1.0, 0.0, 2.0, 1.0, 0.0), LIFSpec("soft", "atan", 2.0, detach_reset=True, neuron="CUBALIF")
)


def layers(where: Where) -> list[Layer]:
    """The user's loop with unbind, with indexing, and compiled whole."""
    import snntorch
    from snntorch import surrogate

    def leaky() -> torch.nn.Module:
        return snntorch.Leaky(beta=0.5, threshold=1.0, spike_grad=surrogate.atan(alpha=2.0)).to(where.device)

    def loop(neuron: torch.nn.Module, steps: Iterable[Tensor], first: Tensor) -> Tensor:
        mem, spikes = torch.zeros_like(first), []
        for current in steps:
            s, mem = neuron(current, mem)
            spikes.append(s)
        return torch.stack(spikes)

    def indexed(x: Tensor) -> Tensor:
        return loop(eager, (x[t] for t in range(len(x))), x[0])

    eager, traced = leaky(), leaky()
    made = [
        Layer("snntorch Leaky, unbind", lambda x: loop(eager, x.unbind(0), x[0]), NEURON),
        Layer("snntorch Leaky, x[t]", indexed, NEURON, quadratic=True),
    ]
    if where.compiled and where.timesteps <= WHOLE_LOOP:
        compiled = torch.compile(lambda x: loop(traced, x.unbind(0), x[0]), dynamic=False)
        made.append(Layer("snntorch Leaky, unbind, compiled", compiled, NEURON, compiled=True, strong=True))
    return made


def synaptic(where: Where) -> list[Layer]:
    """The user's loop with unbind."""
    import snntorch
    from snntorch import surrogate

    neuron = snntorch.Synaptic(alpha=0.75, beta=0.5, threshold=1.0, spike_grad=surrogate.atan(alpha=2.0))
    neuron = neuron.to(where.device)

    def run(x: Tensor) -> Tensor:
        syn, mem, spikes = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
        for current in x.unbind(0):
            s, syn, mem = neuron(current, syn, mem)
            spikes.append(s)
        return torch.stack(spikes)

    return [Layer("snntorch Synaptic, unbind", run, SYNAPTIC)]


def recurrent(where: Where, weight: torch.nn.Parameter) -> list[Layer]:
    """``RLeaky``, the neuron of ``layers`` with all-to-all weights."""
    import snntorch
    from snntorch import surrogate

    spike_grad = surrogate.atan(alpha=2.0)
    neuron = snntorch.RLeaky(beta=0.5, linear_features=len(weight), threshold=1.0, spike_grad=spike_grad)
    neuron.recurrent = torch.nn.Linear(len(weight), len(weight), bias=False, device="meta")
    neuron.recurrent.weight = weight

    def run(x: Tensor) -> Tensor:
        s, mem, spikes = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
        for current in x.unbind(0):
            s, mem = neuron(current, s, mem)
            spikes.append(s)
        return torch.stack(spikes)

    return [Layer("snntorch RLeaky, unbind", run, NEURON)]


OTHERS = {"CUBALIF": synaptic}
