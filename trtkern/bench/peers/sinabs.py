"""sinabs: ``LIF``, tau_mem = 1 / ln 2 (not trained), one spike a step, reset to 0 (detached), Gaussian(sigma = 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from trtkern.bench.layers import Layer, Neuron, Where
from trtkern.spec import LIFSpec

DISTRIBUTION = "sinabs"
MODULE = "sinabs"
INSTALL = "pip install sinabs"

NEURON = Neuron((0.5, 1.0, 0.0, 1.0, 1.0, 0.0), LIFSpec("hard", "gaussian", 1.0, detach_reset=True))


def layers(where: Where) -> list[Layer]:
    """One layer; it indexes its input [B, T, ...]."""
    from sinabs import activation
    from sinabs import layers as neurons

    run = stateless(neurons.LIF, activation.MembraneReset(), where)
    return [Layer("sinabs LIF, x[:, t]", run, NEURON, batch_first=True, quadratic=True)]


def stateless(kind: Callable[..., Any], reset: Any, where: Where) -> Callable[[Tensor], Tensor]:
    """A LIF of sinabs or sinabs-exodus with that reset, which begins anew at each call."""
    from sinabs import activation

    lif = kind(
        1 / math.log(2), spike_fn=activation.SingleSpike, reset_fn=reset,
        surrogate_grad_fn=activation.Gaussian(sigma=1.0), norm_input=False,
    ).to(where.device)  # fmt: skip
    lif.requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        lif.reset_states()
        return lif(x)

    return run
