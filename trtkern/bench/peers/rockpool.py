"""Rockpool: ``LIFNeuronTorch``, tau_mem = dt / ln 2, one spike a step, reset by subtraction, StepPWL(0.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trtkern.bench.layers import Layer, Neuron, Where
from trtkern.spec import LIFSpec
from trtkern.surrogates import where

DISTRIBUTION = "rockpool"
MODULE = "rockpool"
INSTALL = "pip install rockpool"


def step_pwl(u, alpha):
    """alpha from half a threshold below the threshold on, else 0: Rockpool's StepPWL."""
    return where(u >= -0.5, alpha, 0.0)


def layers(place: Where) -> list[Layer]:
    """One layer; it indexes its input [B, T, N], and draws noise even where its deviation is 0."""
    from rockpool.nn.modules import LIFNeuronTorch

    neuron = Neuron((0.5, 1.0, 0.0, 1.0, 1.0, 0.0), LIFSpec("soft", step_pwl, 1.0))
    module = LIFNeuronTorch(
        place.neurons, tau_mem=1 / math.log(2), threshold=1.0, dt=1.0, learning_window=0.5,
        max_spikes_per_dt=torch.tensor(1.0, device=place.device),
    ).to(place.device)  # fmt: skip
    for parameter in torch.nn.Module.parameters(module):  # its own method returns names
        parameter.requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        module.reset_state()
        return module(x)[0]

    note = "its reset by subtraction is its only one"
    return [
        Layer(
            "rockpool LIFNeuronTorch, x[:, t]", run, neuron, batch_first=True, flat=True, quadratic=True, note=note
        )
    ]  # fmt: skip
