"""The networks whose training steps are measured: this project's, and what they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtkern.bench import peers, plain, rows
from trtkern.bench.cases import Case
from trtkern.bench.layers import Layer, Where
from trtkern.models import load_reference_weights, resnet19, vggsnn
from trtkern.nn import TRTLoss

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Network(NamedTuple):
    """A network and what it trains on."""

    name: str
    """ "resnet19", on images, or "vggsnn", on frames."""
    timesteps: int
    batch: int
    shape: tuple[int, int, int]
    """(C, H, W)."""

    @property
    def features(self) -> int:
        """What VGGSNN's classifier takes: 512 channels, four times halved."""
        return 512 * (self.shape[1] // 16) * (self.shape[2] // 16)


def of(case: Case) -> Network:
    """The network of a case of the op "step"."""
    steps, batch, channels, height, width = case.shape
    return Network(case.network, steps, batch, (channels, height, width))


def small(network: Network) -> Network:
    """The same layers with fewer pixels and steps, which is what the gate looks at."""
    side = 8 if network.name == "resnet19" else 16
    return Network(network.name, 2, 2, (network.shape[0], side, side))


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


class LeftOut(NamedTuple):
    """What is not measured, as ``rounds.Bench.left_out`` has it."""

    name: str
    library: str
    status: str
    note: str


def inputs(network: Network, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W], or frames [T, B, C, H, W], and labels; the same in every process."""
    draw, batch = torch.Generator().manual_seed(seed), network.batch
    shape = (batch, *network.shape) if network.name == "resnet19" else (network.timesteps, batch, *network.shape)
    return torch.rand(shape, generator=draw).to(device), torch.randint(10, (batch,), generator=draw).to(device)


def plain_network(
    network: Network, device: torch.device, run: Callable[[Tensor], Tensor] | None = None, *,
    form: torch.memory_format = torch.contiguous_format,
) -> nn.Module:  # fmt: skip
    """The plain network, always of the same weights, with a function in place of its neurons."""
    torch.manual_seed(0)
    made = plain.resnet19() if network.name == "resnet19" else plain.vggsnn(network.features)
    made.timesteps = network.timesteps
    if run is not None:
        for module in list(made.modules()):
            for name, child in module.named_children():
                if isinstance(child, plain.Neurons):
                    setattr(module, name, Swapped(run))
    return made.to(device, memory_format=form)  # type: ignore[call-overload]


def entries(
    network: Network, device: torch.device, backends: Sequence[str], found: Sequence[peers.Peer]
) -> Iterator[Entry | LeftOut]:
    """The networks, and what cannot be built. Of the other libraries SpikingJelly alone, whose neurons are here in
    place of the plain ones."""
    names = list(backends)
    if "triton" in names and device.type == "cpu" and network.name != "resnet19":
        names.remove("triton")
        why = "minutes in Triton's interpreter; resnet19 has a layer of it"
        yield LeftOut("trtkern triton", "trtkern", "skipped", why)
    for backend in names:
        yield own(network, device, backend)
    where = Where(device, torch.float32, network.timesteps, math.prod(network.shape), False)
    theirs: list[tuple[peers.Peer, Layer]] = []
    for peer in found:
        if peer.name != "spikingjelly":
            continue
        if peer.missing:
            yield LeftOut(peer.name, "", "skipped", peer.missing)
            continue
        try:
            theirs += [(peer, layer) for layer in peer.layers(where) if " LIFNode m" in layer.name]
        except Exception as error:  # of whatever kind: the others are measured
            yield LeftOut(peer.name, peer.version, "failed", rows.words(error))
    library = f"torch {torch.__version__}"
    for layout, form in LAYOUTS.items():
        made = partial(plain_network, network, device, form=form)
        relu = made(functional.relu)
        yield Entry(f"BatchNorm + ReLU, {layout}", library, relu, TRTLoss(relu), judged=False)
        for peer, layer in theirs:
            swapped = made(layer.run)
            yield Entry(f"{layer.name}, {layout}", f"{peer.name} {peer.version}", swapped, TRTLoss(swapped), layer)
        yield Entry(f"plain torch, {layout}", library, made(), None)
        if form is torch.channels_last:  # after what it is compared with: a capture that fails may leave the GPU unfit
            graphs = names if device.type == "cuda" else names[:1]
            yield from (own(network, device, backend, captured=True) for backend in graphs)
    compiled = [name for name in names if name != "triton" or device.type == "cuda"]
    yield from (own(network, device, backend, checkpoint=True) for backend in compiled[:1])


def own(
    network: Network, device: torch.device, backend: str, captured: bool = False, checkpoint: bool = False
) -> Entry:
    """This project's network, of the plain network's weights. In Triton's interpreter, where a step of the whole would
    take minutes, only the neurons of its first layer are on the backend triton."""
    interpreted = backend == "triton" and device.type == "cpu"
    options: dict[str, Any] = {
        "shape": network.shape, "backend": "auto" if interpreted else backend, "checkpoint": checkpoint
    }  # fmt: skip
    model = resnet19(timesteps=network.timesteps, **options) if network.name == "resnet19" else vggsnn(**options)
    if interpreted:
        first: Any = next(module for module in model.modules() if hasattr(module, "backend"))
        first.backend = backend
    load_reference_weights(model, plain_network(network, torch.device("cpu")).state_dict())
    model.to(device)
    form = ", checkpoint" if checkpoint else " in one layer, interpreted" if interpreted else ""
    if captured:
        form += ", CUDA graph" if device.type == "cuda" else ", the captured step without a graph"
    return Entry(f"trtkern {backend}{form}", "trtkern", model, TRTLoss(model), captured=captured)
