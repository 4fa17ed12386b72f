"""Norse: ``LIFBoxCell``, dt * tau_mem_inv = 0.5 (which scales the input, too: threshold 0.5), triangle(1).

``LSNNCell`` integrates the current of the step before: it runs a step longer, and its first spikes are left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trtkern.bench.layers import Layer, Neuron, Where
from trtkern.spec import LIFSpec

DISTRIBUTION = "norse"
MODULE = "norse"
INSTALL = "pip install --no-deps norse nir nirtorch h5py"

NEURON = Neuron((0.5, 0.5, 0.0, 0.5, 0.5, 0.0), LIFSpec(surrogate="triangle", alpha=1.0))


def layers(where: Where) -> list[Layer]:
    """Its ``Lift``, which indexes its input, and a loop around the cell with unbind."""
    import norse.torch as norse
    from norse.torch.functional.lif_box import LIFBoxParameters

    numbers = {"tau_mem_inv": 0.5, "v_leak": 0.0, "v_th": 0.5, "v_reset": 0.0}
    tensors = {name: torch.tensor(value, device=where.device) for name, value in numbers.items()}
    cell = norse.LIFBoxCell(p=LIFBoxParameters(**tensors, method="triangle", alpha=1.0), dt=1.0)
    lifted = norse.Lift(cell)

    return [
        _unbound("norse LIFBoxCell, unbind", cell, NEURON),
        Layer("norse Lift(LIFBoxCell), x[t]", lambda x: lifted(x)[0], NEURON, quadratic=True),
    ]


def behind_current(where: Where) -> list[Layer]:
    """``LIFCell``: dt * tau_syn_inv = 0.25."""
    import norse.torch as norse

    numbers = {"tau_syn_inv": 0.25, "tau_mem_inv": 0.5, "v_leak": 0.0, "v_th": 0.5, "v_reset": 0.0}
    tensors = {name: torch.tensor(value, device=where.device) for name, value in numbers.items()}
    cell = norse.LIFCell(p=norse.LIFParameters(**tensors, method="triangle", alpha=1.0), dt=1.0)
    spec = LIFSpec(surrogate="triangle", alpha=1.0, neuron="CUBALIF")
    return [_unbound("norse LIFCell, unbind", cell, Neuron((0.75, 1.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.0), spec))]


def adaptive(where: Where) -> list[Layer]:
    """``LSNNCell``: no synaptic current (dt * tau_syn_inv = 1), dt * tau_adapt_inv = 0.25, beta = 0.2."""
    import norse.torch as norse

    numbers = {
        "tau_syn_inv": 1.0, "tau_mem_inv": 0.5, "tau_adapt_inv": 0.25, "v_leak": 0.0, "v_th": 0.5, "v_reset": 0.0,
        "beta": 0.2,
    }  # fmt: skip
    tensors = {name: torch.tensor(value, device=where.device) for name, value in numbers.items()}
    cell = norse.LSNNCell(p=norse.LSNNParameters(**tensors, method="triangle", alpha=1.0), dt=1.0)
    spec = LIFSpec(surrogate="triangle", alpha=1.0, neuron="ALIF")
    neuron = Neuron((0.5, 0.5, 0.0, 0.75, 0.2, 0.75, 0.5, 0.5, 0.0), spec)
    return [_unbound("norse LSNNCell, unbind", cell, neuron, late=1)]


def recurrent(where: Where, weight: torch.nn.Parameter) -> list[Layer]:
    """The neuron of ``adaptive``, whose reset is detached here: ``LSNNRecurrentCell``, and ``LSNNCell`` that is handed
    the product. Both integrate the current of the step before."""
    import norse.torch as norse

    numbers = {
        "tau_syn_inv": 1.0, "tau_mem_inv": 0.5, "tau_adapt_inv": 0.25, "v_leak": 0.0, "v_th": 0.5, "v_reset": 0.0,
        "beta": 0.2,
    }  # fmt: skip
    tensors = {name: torch.tensor(value, device=where.device) for name, value in numbers.items()}
    parameters = norse.LSNNParameters(**tensors, method="triangle", alpha=1.0)
    spec = LIFSpec(surrogate="triangle", alpha=1.0, neuron="ALIF")
    neuron = Neuron((0.5, 0.5, 0.0, 0.75, 0.2, 0.75, 0.5, 0.5, 0.0), spec)
    detached = neuron._replace(spec=LIFSpec(surrogate="triangle", alpha=1.0, detach_reset=True, neuron="ALIF"))
    N = len(weight)
    whole = norse.LSNNRecurrentCell(N, N, p=parameters, dt=1.0, autapses=True)
    whole.input_weights = torch.nn.Parameter(torch.eye(N, device=where.device, dtype=where.dtype), requires_grad=False)
    whole.recurrent_weights = weight
    cell = norse.LSNNCell(p=parameters, dt=1.0)

    def around(x: Tensor) -> Tensor:
        s, state, spikes = torch.zeros_like(x[0]), None, []
        for current in (*x.unbind(0), torch.zeros_like(x[0])):
            s, state = cell(current + torch.nn.functional.linear(s, weight), state)
            spikes.append(s)
        return torch.stack(spikes[1:])

    late = "a spike reaches the others two steps later"
    given = _unbound("norse LSNNRecurrentCell, unbind", whole, detached, late=1)
    return [
        Layer("norse LSNNCell and the product, unbind", around, neuron, lag=2, note=late),
        replace(given, lag=2, note=f"{late}; multiplies x by the identity"),
    ]


def _unbound(name: str, cell: Any, neuron: Neuron, late: int = 0) -> Layer:
    """A loop around the cell; ``late``: how many steps after its current a spike comes."""

    def run(x: Tensor) -> Tensor:
        state, spikes = None, []
        for current in (*x.unbind(0), *[torch.zeros_like(x[0])] * late):
            s, state = cell(current, state)
            spikes.append(s.to_dense())
        return torch.stack(spikes[late:])

    return Layer(name, run, neuron)


OTHERS = {"CUBALIF": behind_current, "ALIF": adaptive}
