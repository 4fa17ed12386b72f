"""Norse: ``LIFBoxCell``, dt * tau_mem_inv = 0.5 (which scales the input, too: threshold 0.5), triangle(1)."""

from __future__ import annotations

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

    def unbound(x: Tensor) -> Tensor:
        state, spikes = None, []
        for current in x.unbind(0):
            s, state = cell(current, state)
            spikes.append(s)
        return torch.stack(spikes)

    return [
        Layer("norse LIFBoxCell, unbind", unbound, NEURON),
        Layer("norse Lift(LIFBoxCell), x[t]", lambda x: lifted(x)[0], NEURON, quadratic=True),
    ]
