"""sinabs-exodus: ``LIF`` in CUDA kernels, tau_mem = 1 / ln 2, reset by subtraction, Gaussian(sigma = 1)."""

from __future__ import annotations

from trtkern.bench.layers import Layer, Neuron, Where
from trtkern.bench.peers.sinabs import stateless
from trtkern.spec import LIFSpec

DISTRIBUTION = "sinabs-exodus"
MODULE = "sinabs.exodus"
INSTALL = "pip install sinabs && pip install --no-build-isolation --no-deps sinabs-exodus, with a GPU and nvcc"

NEURON = Neuron((0.5, 1.0, 0.0, 1.0, 1.0, 0.0), LIFSpec("soft", "gaussian", 1.0))


def layers(where: Where) -> list[Layer]:
    """One layer, on a GPU only.

    Raises:
        RuntimeError: another device.
    """
    if where.device.type != "cuda":
        raise RuntimeError("it runs on a CUDA GPU only")
    from sinabs import activation
    from sinabs.exodus import layers as neurons

    run = stateless(neurons.LIF, activation.MembraneSubtract(), where)
    return [Layer("sinabs-exodus LIF", run, NEURON, batch_first=True, strong=True)]
