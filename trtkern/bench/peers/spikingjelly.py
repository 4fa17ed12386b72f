"""SpikingJelly: ``LIFNode``, decay_input=False, tau = 2, hard reset, ATan(2); every implementation for the device. And
the spiking transformers that it has, as they are there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from trtkern.bench.layers import WHOLE_LOOP, Layer, Neuron, Where
from trtkern.bench.peers import Whole
from trtkern.spec import LIFSpec

DISTRIBUTION = "spikingjelly"
MODULE = "spikingjelly"
INSTALL = "pip install loguru h5py requests scipy SciencePlots tqdm && pip install --no-deps spikingjelly"

NEURON = Neuron((0.5, 1.0, 0.0, 1.0, 1.0, 0.0), LIFSpec(surrogate="atan", alpha=2.0))


def layers(where: Where) -> list[Layer]:
    """Multi-step (compiled, too), and one step at a time from a loop with and without indexing."""
    from spikingjelly.activation_based import functional, neuron, surrogate

    def node(mode: str) -> torch.nn.Module:
        atan = surrogate.ATan(alpha=2.0)
        return neuron.LIFNode(2.0, False, where.threshold, 0.0, atan, step_mode=mode).to(where.device)

    many, single, traced = node("m"), node("s"), node("m")

    def called(run: Callable[[Tensor], Tensor], of: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        def fresh(x: Tensor) -> Tensor:
            functional.reset_net(of)
            return run(x)

        return fresh

    def stepwise(x: Tensor) -> Tensor:
        return torch.stack([single(x[t]) for t in range(len(x))])

    def unbound(x: Tensor) -> Tensor:
        return torch.stack([single(current) for current in x.unbind(0)])

    made = [
        *_multi_step(called(many, many), where),
        Layer("spikingjelly LIFNode s, unbind", called(unbound, single), NEURON),
        Layer("spikingjelly LIFNode s, x[t]", called(stepwise, single), NEURON, quadratic=True),
    ]
    if where.compiled and where.timesteps <= WHOLE_LOOP:
        compiled = called(torch.compile(traced, dynamic=False), traced)
        made.append(Layer("spikingjelly LIFNode m, compiled", compiled, NEURON, compiled=True, strong=True))
    return made


def _multi_step(run: Callable[[Tensor], Tensor], where: Where) -> list[Layer]:
    """One layer on a CPU; on a GPU one for each implementation that says it is there."""
    if where.device.type != "cuda":
        return [Layer("spikingjelly LIFNode m", run, NEURON)]
    made = []
    for name in ("cuda", "triton", "torch"):
        with suppress(ImportError, AttributeError, RuntimeError, OSError):
            made.append(Layer(f"spikingjelly LIFNode m, {name}", _with(name, run, where.device), NEURON, strong=True))
    return made or [Layer("spikingjelly LIFNode m", run, NEURON, note="its implementation could not be chosen")]


def _with(name: str, run: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Run with one of SpikingJelly's CUDA implementations, which it otherwise takes from SJ_LIF_CUDA_IMPLEMENTATION
    once for the process; an error if that one is not available."""
    from spikingjelly._ops import lif
    from spikingjelly.activation_based import functional

    selection: Any = lif._selection
    selection._requested, selection._selections = name, {}
    taken = str(functional.neuron_implementation("lif", device)["implementation"])
    if name not in taken:
        raise RuntimeError(f"expected {name}, got {taken}")
    mine = selection._selections

    def chosen(x: Tensor) -> Tensor:
        # The backward pass asks again; it follows its forward pass before another layer runs.
        selection._requested, selection._selections = name, mine
        return run(x)

    return chosen


class _Reset(torch.nn.Module):
    """A network whose neurons forget before each call."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        from spikingjelly.activation_based import functional

        functional.reset_net(self.network)
        logits = self.network(x)
        return logits if logits.dim() == 3 else logits.unsqueeze(0)


def network(name: str, timesteps: int, shape: tuple[int, ...]) -> Whole | None:
    """Spikformer and the Spike-driven Transformer of ``activation_based.model``, for CIFAR."""
    if name == "spikformer_4_384":
        from spikingjelly.activation_based.model import spikformer

        def make() -> torch.nn.Module:
            sizes = {"embed_dims": 384, "num_heads": 12, "depths": 4, "patch_size": 4, "num_classes": 10}
            image = {"in_channels": shape[0], "img_size_h": shape[1], "img_size_w": shape[2]}
            return _Reset(spikformer.Spikformer(T=timesteps, **image, **sizes))

        differs = "pools in front of the neurons, has one product for Q, K and V, no biases"
        return Whole("spikingjelly Spikformer", make, f"its own network and neurons, not judged: {differs}")
    if name == "sdt_2_512":
        from spikingjelly.activation_based.model import spike_driven_transformer

        def make() -> torch.nn.Module:
            sizes = {"embed_dims": 512, "num_heads": 8, "depths": 2, "pooling_stat": "0011", "num_classes": 10}
            return _Reset(spike_driven_transformer.SpikeDrivenTransformer(T=timesteps, in_channels=shape[0], **sizes))

        return Whole("spikingjelly SpikeDrivenTransformer", make, "its own network and neurons, not judged")
    return None
