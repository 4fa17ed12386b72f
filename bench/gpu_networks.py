"""The networks whose training steps ``gpu_steps.py`` measures: this project's, and what they are compared with."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtkern.bench import peers, rows
from trtkern.bench.layers import Layer, Where, backends
from trtkern.models import load_reference_weights, resnet19, vggsnn
from trtkern.nn import TRTLoss

# The network that the tests compare with: nothing of trtkern is in it.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import plain

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Network(NamedTuple):
    """What a case trains: T, the batch, the shape of an image or frame."""

    timesteps: int
    batch: int
    shape: tuple[int, int, int]

    @property
    def features(self) -> int:
        """What VGGSNN's classifier takes: 512 channels, four times halved."""
        return 512 * (self.shape[1] // 16) * (self.shape[2] // 16)


CASES = {"resnet19": Network(6, 64, (3, 32, 32)), "vggsnn": Network(10, 32, (2, 48, 48))}
SMALL = {"resnet19": Network(2, 2, (3, 8, 8)), "vggsnn": Network(2, 2, (2, 16, 16))}
"""The same layers with fewer pixels and steps: what the gate looks at, and all that a rehearsal has."""


class Swapped(nn.Module):
    """A function in the place of ``plain.Neurons``."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, ...] -> [T, B, ...]."""
        return self.run(x)


class Entry(NamedTuple):
    """A network of the contest."""

    name: str
    library: str
    model: nn.Module
    loss: TRTLoss | None
    """None: the loss of the plain network, with its loops."""
    against: Layer | None = None
    """The neuron that it computes, where it is not the paper's."""
    judged: bool = True
    captured: bool = False
    """Whether its step is ``training.step.CapturedStep``; without a GPU that step's own eager form."""


def inputs(network: Network, case: str, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W], or frames [T, B, C, H, W], and labels; the same in every process."""
    draw, batch = torch.Generator().manual_seed(seed), network.batch
    shape = (batch, *network.shape) if case == "resnet19" else (network.timesteps, batch, *network.shape)
    return torch.rand(shape, generator=draw).to(device), torch.randint(10, (batch,), generator=draw).to(device)


def plain_network(
    case: str, network: Network, device: torch.device, run: Callable | None = None, *,
    form: torch.memory_format = torch.contiguous_format,
) -> nn.Module:  # fmt: skip
    """The plain network, always of the same weights, with a function in place of its neurons."""
    torch.manual_seed(0)
    made = plain.resnet19() if case == "resnet19" else plain.vggsnn(network.features)
    made.timesteps = network.timesteps
    if run is not None:
        for module in list(made.modules()):
            for name, child in module.named_children():
                if isinstance(child, plain.Neurons):
                    setattr(module, name, Swapped(run))
    return made.to(device, memory_format=form)


def entries(case: str, network: Network, device: torch.device) -> Iterator[Entry | tuple[str, str, str, str]]:
    """The networks; of what cannot be built its name, library, status and why."""
    where = Where(device, torch.float32, network.timesteps, math.prod(network.shape), False)
    names = backends("all", "batch_norm_lif", where)
    if "triton" in names and device.type == "cpu" and case != "resnet19":
        names.remove("triton")
        yield "trtkern triton", "trtkern", "skipped", "minutes in Triton's interpreter; resnet19 has a layer of it"
    for backend in names:
        yield own(case, network, device, backend)
    (peer,) = peers.choose("spikingjelly")
    layers: list[Layer] = []
    if peer.missing:
        yield peer.name, "", "skipped", peer.missing
    else:
        try:
            layers = [layer for layer in peer.layers(where) if " LIFNode m" in layer.name]
        except Exception as error:  # of whatever kind: the others are measured
            yield peer.name, peer.version, "failed", rows.words(error)
    library = f"torch {torch.__version__}"
    for layout, form in LAYOUTS.items():
        made = partial(plain_network, case, network, device, form=form)
        relu = made(functional.relu)
        yield Entry(f"BatchNorm + ReLU, {layout}", library, relu, TRTLoss(relu), judged=False)
        for layer in layers:
            theirs = made(layer.run)
            yield Entry(f"{layer.name}, {layout}", f"{peer.name} {peer.version}", theirs, TRTLoss(theirs), layer)
        yield Entry(f"plain torch, {layout}", library, made(), None)
        if form is torch.channels_last:  # after what it is compared with: a capture that fails may leave the GPU unfit
            graphs = names if device.type == "cuda" else names[:1]
            yield from (own(case, network, device, backend, captured=True) for backend in graphs)


def own(case: str, network: Network, device: torch.device, backend: str, captured: bool = False) -> Entry:
    """This project's network, of the plain network's weights. In Triton's interpreter, where a step of the whole would
    take minutes, only the neurons of its first layer are on the backend triton."""
    interpreted = backend == "triton" and device.type == "cpu"
    options: dict[str, Any] = {"shape": network.shape, "backend": "auto" if interpreted else backend}
    model = resnet19(timesteps=network.timesteps, **options) if case == "resnet19" else vggsnn(**options)
    if interpreted:
        next(module for module in model.modules() if hasattr(module, "backend")).backend = backend
    load_reference_weights(model, plain_network(case, network, torch.device("cpu")).state_dict())
    model.to(device)
    form = " in one layer, interpreted" if interpreted else ""
    if captured:
        form += ", CUDA graph" if device.type == "cuda" else ", the captured step without a graph"
    return Entry(f"trtkern {backend}{form}", "trtkern", model, TRTLoss(model), captured=captured)
