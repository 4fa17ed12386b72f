"""The networks whose training steps are measured: this project's, and what they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtkern.bench import peers, plain, rows, transformers
from trtkern.bench.cases import CANDIDATES, NETWORKS, Case
from trtkern.bench.layers import Layer, Where
from trtkern.models import (
    SpikeDrivenTransformer,
    Spikformer,
    SpikingNetwork,
    from_topology,
    load_reference_weights,
    resnet19,
    sew_resnet34,
    vggsnn,
)
from trtkern.nn import TRTLoss, exact_convolutions

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
TRANSFORMERS: dict[str, Callable[..., SpikingNetwork]] = {
    "spikformer_4_384": Spikformer,
    "sdt_2_512": SpikeDrivenTransformer,
}
FEW: dict[str, dict[str, Any]] = {
    "spikformer_4_384": {"dim": 64, "depth": 1, "heads": 2},
    "sdt_2_512": {"dim": 64, "depth": 1},
}
"""What the gate looks at: of all their channels, in float32, some spike is always near its threshold."""
PAPERS_NEURON: dict[str, Any] = {
    "gain": 1.0, "surrogate": "triangle", "detach_reset": False, "fire_on_equal": False
}  # fmt: skip
"""The neuron of the TRT paper, which all networks are compared with, in place of that of the transformers' papers."""
SPIKES = 0.2
"""The rate of the spikes that the network of fully connected layers is given."""


class Network(NamedTuple):
    """A network and what it trains on."""

    name: str
    """Of ``cases.NETWORKS``."""
    timesteps: int
    batch: int
    shape: tuple[int, ...]
    """(C, H, W) of an image or frame; of "mlp" (n, 1, 1), of "spikformer" (tokens, D)."""
    whole: bool = True
    """False: of a transformer ``FEW`` channels and blocks."""

    @property
    def features(self) -> int:
        """What VGGSNN's classifier takes: 512 channels, four times halved."""
        return 512 * (self.shape[1] // 16) * (self.shape[2] // 16)

    @property
    def layouts(self) -> dict[str, torch.memory_format]:
        """The memory layouts of what it computes; where there are no images there is one."""
        return LAYOUTS if self.name not in ("mlp", "spikformer") else {"contiguous": torch.contiguous_format}


def of(case: Case) -> Network:
    """The network of a case of the op "step"."""
    steps, batch, *shape = case.shape
    return Network(case.network, steps, batch, (*shape, 1, 1) if case.network == "mlp" else tuple(shape))


def small(network: Network) -> Network:
    """The same layers with fewer pixels, tokens, channels and steps, which is what the gate looks at."""
    least = NETWORKS[network.name].least
    shapes = {"mlp": network.shape, "spikformer": (16, 2 * least)}
    shape = shapes.get(network.name, (network.shape[0], least, least))
    return Network(network.name, 2, 2, shape, whole=network.name not in FEW)


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
    note: str = ""
    """What is to be known of it."""
    captured: bool = False
    """Whether its step is ``training.step.CapturedStep``; without a GPU that step's own eager form."""


class LeftOut(NamedTuple):
    """What is not measured, as ``rounds.Bench.left_out`` has it."""

    name: str
    library: str
    status: str
    note: str


def inputs(network: Network, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W], or frames [T, B, ...], and labels; the same in every process."""
    draw, batch = torch.Generator().manual_seed(seed), network.batch
    images = NETWORKS[network.name].images
    shape = (batch, *network.shape) if images else (network.timesteps, batch, *network.shape)
    x = torch.rand(shape, generator=draw)
    if network.name == "mlp":
        x = (x < SPIKES).float()
    return x.to(device), torch.randint(10, (batch,), generator=draw).to(device)


def plain_network(
    network: Network, device: torch.device, run: Callable[[float], Callable[[Tensor], Tensor]] | None = None, *,
    form: torch.memory_format = torch.contiguous_format,
) -> nn.Module:  # fmt: skip
    """The plain network, always of the same weights; ``run``: what stands in place of neurons of that threshold."""
    torch.manual_seed(0)
    sizes = {} if network.whole else FEW[network.name]
    makers: dict[str, Callable[[], nn.Module]] = {
        "resnet19": plain.resnet19,
        "vggsnn": lambda: plain.vggsnn(network.features),
        "sew_resnet34": lambda: plain.resnet34(plain.SEW, 1.0, 10),
        "mlp": lambda: plain.mlp(network.shape[0]),
        "spikformer": lambda: transformers.plain_block(network.shape[-1]),
        "spikformer_4_384": lambda: transformers.spikformer(**sizes),
        "sdt_2_512": lambda: transformers.spike_driven(**sizes),
    }
    made: Any = makers[network.name]()
    made.timesteps = network.timesteps
    if run is not None:
        for module in list(made.modules()):
            for name, child in module.named_children():
                if isinstance(child, plain.Neurons):
                    setattr(module, name, Swapped(run(child.threshold)))
    return made.to(device, memory_format=form)


def entries(
    network: Network, device: torch.device, backends: Sequence[str], found: Sequence[peers.Peer],
    candidates: Sequence[str] = CANDIDATES,
) -> Iterator[Entry | LeftOut]:  # fmt: skip
    """The networks of the kinds in ``candidates``, and what cannot be built. Of the other libraries SpikingJelly alone,
    whose neurons are here in place of the plain ones."""
    names = list(backends)
    if "triton" in names and device.type == "cpu" and network.name != "resnet19":
        names.remove("triton")
        why = "minutes in Triton's interpreter; resnet19 has a layer of it"
        yield LeftOut("trtkern triton", "trtkern", "skipped", why)
    compiled = [name for name in names if name != "triton" or device.type == "cuda"]
    if "own" in candidates:
        yield from (own(network, device, backend) for backend in names)
    if "exact" in candidates and device.type == "cpu":  # a GPU's convolutions are torch's own in any case
        yield from (own(network, device, backend, exact=True) for backend in compiled[:1])
    theirs: list[tuple[peers.Peer, dict[float, Layer]]] = []
    if "peers" in candidates:
        for each in _neurons(network, device, found):
            if isinstance(each, LeftOut):
                yield each
            else:
                theirs.append(each)
    library = f"torch {torch.__version__}"
    for layout, form in network.layouts.items():
        made = partial(plain_network, network, device, form=form)
        if "relu" in candidates:
            relu = made(lambda _: functional.relu)
            name = "ReLU" if network.name == "mlp" else "BatchNorm + ReLU"
            yield Entry(f"{name}, {layout}", library, relu, TRTLoss(relu), judged=False)
        for peer, by_threshold in theirs:
            swapped, layer = made(partial(_of, by_threshold)), by_threshold[1.0]
            yield Entry(f"{layer.name}, {layout}", f"{peer.name} {peer.version}", swapped, TRTLoss(swapped), layer)
        if "peers" in candidates:
            yield from _whole(network, device, found, layout, form)
        if "plain" in candidates:
            yield Entry(f"plain torch, {layout}", library, made(), None)
        # After what it is compared with: a capture that fails may leave the GPU unfit.
        if "captured" in candidates and form is next(iter(network.layouts.values())):
            graphs = names if device.type == "cuda" else names[:1]
            yield from (own(network, device, backend, captured=True) for backend in graphs)
    if "checkpoint" in candidates and network.name != "mlp":  # which has no block that could be
        yield from (own(network, device, backend, checkpoint=True) for backend in compiled[:1])


def _of(layers: dict[float, Layer], threshold: float) -> Callable[[Tensor], Tensor]:
    return layers[threshold].run


def _neurons(
    network: Network, device: torch.device, found: Sequence[peers.Peer]
) -> Iterator[tuple[peers.Peer, dict[float, Layer]] | LeftOut]:
    """SpikingJelly's neurons in each implementation, by each threshold of the network, or why there are none."""
    where = Where(device, torch.float32, network.timesteps, math.prod(network.shape), False)
    plainly = plain_network(network, torch.device("cpu"))
    thresholds = {1.0} | {each.threshold for each in plainly.modules() if isinstance(each, plain.Neurons)}
    for peer in found:
        if peer.name != "spikingjelly":
            continue
        if peer.missing:
            yield LeftOut(peer.name, "", "skipped", peer.missing)
            continue
        try:
            made: dict[str, dict[float, Layer]] = {}
            for threshold in thresholds:
                for layer in peer.layers(where._replace(threshold=threshold)):
                    if " LIFNode m" in layer.name:
                        made.setdefault(layer.name, {})[threshold] = layer
            yield from [(peer, by_threshold) for by_threshold in made.values()]
        except Exception as error:  # of whatever kind: the others are measured
            yield LeftOut(peer.name, peer.version, "failed", rows.words(error))


def _whole(
    network: Network, device: torch.device, found: Sequence[peers.Peer], layout: str, form: torch.memory_format
) -> Iterator[Entry | LeftOut]:
    """The networks of other libraries that are meant to be this one, as they are there: with their own neurons."""
    for peer in found:
        if peer.missing:
            continue  # which is said of its neurons
        try:
            theirs = peer.network(network.name, network.timesteps, network.shape)
            if theirs is not None:
                torch.manual_seed(0)
                model: Any = theirs.make()
                model = model.to(device, memory_format=form)
                yield Entry(
                    f"{theirs.name}, {layout}", f"{peer.name} {peer.version}", model, TRTLoss(model), judged=False,
                    note=theirs.note,
                )  # fmt: skip
        except Exception as error:  # of whatever kind: the others are measured
            yield LeftOut(f"{peer.name}, its own network", peer.version, "failed", rows.words(error))


def own(
    network: Network, device: torch.device, backend: str, *, captured: bool = False, checkpoint: bool = False,
    exact: bool = False,
) -> Entry:  # fmt: skip
    """This project's network, of the plain network's weights. In Triton's interpreter, where a step of the whole would
    take minutes, only the neurons of its first layer are on the backend triton."""
    interpreted = backend == "triton" and device.type == "cpu"
    plainly = plain_network(network, torch.device("cpu"))
    model = _own(network, "auto" if interpreted else backend, checkpoint, plainly)
    if interpreted:
        first: Any = next(module for module in model.modules() if hasattr(module, "backend"))
        first.backend = backend
    if isinstance(model, SpikingNetwork):
        load_reference_weights(model, plainly.state_dict())
    exact_convolutions(model, exact)
    model.to(device)
    form = ", checkpoint" if checkpoint else " in one layer, interpreted" if interpreted else ", exact" if exact else ""
    if captured:
        form += ", CUDA graph" if device.type == "cuda" else ", the captured step without a graph"
    return Entry(f"trtkern {backend}{form}", "trtkern", model, TRTLoss(model), captured=captured)


def _own(network: Network, backend: str, checkpoint: bool, plainly: nn.Module) -> nn.Module:
    options: dict[str, Any] = {"backend": backend, "checkpoint": checkpoint}
    if isinstance(plainly, transformers.Alone):
        return transformers.own_block(network.shape[-1], plainly, **options)
    options["shape"] = network.shape
    if network.name == "vggsnn":
        return vggsnn(**options)
    if network.name == "mlp":
        return from_topology("FC-512_FC-512_L-10", **options)
    options["timesteps"] = network.timesteps
    if network.name in TRANSFORMERS:
        sizes = {} if network.whole else FEW[network.name]
        return TRANSFORMERS[network.name](10, **PAPERS_NEURON, **sizes, **options)
    return {"resnet19": resnet19, "sew_resnet34": sew_resnet34}[network.name](10, **options)
