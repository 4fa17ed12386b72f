"""Convolutions and Linears behind spiking neurons into ``SpikeConv2d`` and ``SpikeLinear``, in a model that exists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import nn

from trtkern.nn._neuron import Spiking, feeds_back
from trtkern.nn.batch_norm_lif import BatchNormLIF
from trtkern.nn.block import ConvBatchNormLIF
from trtkern.nn.convert import hooks_of, join
from trtkern.nn.spike_layers import SpikeConv2d, SpikeLinear
from trtkern.nn.time import OverTime, TimeSequential
from trtkern.nn.unfused import bare

KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: SpikeConv2d, nn.Linear: SpikeLinear}


@dataclass
class SpikeLayersReport:
    """What ``convert_spike_layers`` changed, and what it left as it was, by its name in the model."""

    converted: dict[str, str] = field(default_factory=dict)
    """Layers that take packed spikes now, each with what it is; and the neurons that give them."""
    left: dict[str, str] = field(default_factory=dict)
    """Convolutions and Linears that stay as they were, each with the reason."""

    def summary(self) -> dict[str, Any]:
        """The same by name, ready for JSON."""
        return {"converted": dict(self.converted), "left": dict(self.left)}

    def __str__(self) -> str:
        changed = "".join(f"\n  {name!r}: {what}" for name, what in self.converted.items())
        left = "".join(f"\n  {name!r}: {reason}" for name, reason in self.left.items())
        return f"converted {len(self.converted)}:{changed or ' none'}\nleft {len(self.left)}:{left or ' none'}"


def convert_spike_layers(model: nn.Module, report: SpikeLayersReport | None = None) -> nn.Module:
    """Let every convolution and Linear that directly follows spiking neurons compute on their packed spikes, in place.

    The two are neighbours in an ``nn.Sequential`` or ``TimeSequential`` anywhere in the model. First comes a neuron
    (``LIF``, ...), a ``BatchNormLIF`` or a ``ConvBatchNormLIF``. Behind it comes an ``nn.Conv2d``, an ``nn.Linear``
    (with an ``nn.Flatten`` between them or none), bare or in ``OverTime``, or a ``ConvBatchNormLIF`` that has one. The
    layer becomes a ``SpikeConv2d`` or ``SpikeLinear`` with the same Parameter objects, settings and mode, and the
    neurons get ``packed=True``. An optimiser goes on as it was. The names of parameters stay, but that a layer which
    stood in ``OverTime`` loses its "module.". ``convert_norm_lif``, which fuses BatchNorms and neurons, comes first::

        report = trtkern.nn.SpikeLayersReport()
        trtkern.nn.convert_spike_layers(trtkern.nn.convert_norm_lif(model), report)
        print(report)  # what became what; each convolution and Linear that did not, and why

    Code that calls the layers one by one, or looks into what a neuron gives, gets ``Spikes`` where it got a tensor:
    ``.spikes`` has it.

    Args:
        model: changed, and returned.
        report: filled.
    """
    report = SpikeLayersReport() if report is None else report
    for link, objection in _all_links(model):
        if objection is None:
            link.convert(report)
        else:
            report.left[link.place] = objection
    for path, layer in model.named_modules():
        known = any(path == name or path.startswith(name + ".") for name in (*report.converted, *report.left))
        if type(layer) in KINDS and not known:
            report.left[path] = "what runs before it is not known to be spiking neurons"
    return model


@dataclass
class _Link:
    """A layer that may give packed spikes, and the one behind it that may take them."""

    parent: nn.Sequential
    giver: nn.Module
    gives: str
    """Its whole name in the model."""
    flatten: str | None
    """The name in the parent of an ``nn.Flatten`` between the two."""
    name: str
    """The name in the parent of the layer that takes them."""
    place: str
    """Its whole name in the model."""

    @property
    def behind(self) -> Any:
        return self.parent._modules[self.name]

    @property
    def taker(self) -> Any:
        """The convolution or Linear."""
        layer = self.behind
        return layer.conv if isinstance(layer, ConvBatchNormLIF) else bare(layer)

    @property
    def neurons(self) -> Any:
        """What has the attribute ``packed``."""
        return self.giver.norm if isinstance(self.giver, ConvBatchNormLIF) else self.giver

    def objection(self, uses: Counter[int]) -> str | None:
        """Why the two stay as they are, or None."""
        if type(self.parent).forward not in (nn.Sequential.forward, TimeSequential.forward):
            return f"{type(self.parent).__name__}, which holds it, has a forward of its own"
        if uses[id(self.taker)] > 1 or uses[id(self.behind)] > 1:
            return f"this {type(self.taker).__name__} is used in several places"
        if uses[id(self.giver)] > 1 or uses[id(self.neurons)] > 1:
            return "the neurons before it are used in several places"
        if getattr(self.neurons, "time_dim", 0) != 0:
            return f"expected time on axis 0, got time_dim={self.neurons.time_dim} of the neurons before it"
        flat = [] if self.flatten is None else [self.parent._modules[self.flatten]]
        if why := hooks_of(self.giver, self.behind, self.taker, *flat):
            return why
        timed = isinstance(self.parent, TimeSequential) or isinstance(self.behind, (OverTime, ConvBatchNormLIF))
        if type(self.taker) is nn.Conv2d and not timed:
            return "a convolution of [T, B, C, H, W] stands in OverTime, or in a TimeSequential"
        return None

    def convert(self, report: SpikeLayersReport) -> None:
        """Change both."""
        taker = self.taker
        made = taker if type(taker) not in KINDS else _converted(taker)
        if isinstance(self.behind, ConvBatchNormLIF):
            self.behind.conv = made
        elif made is not self.behind:
            self.parent._modules[self.name] = made
        if self.flatten is not None:
            # A SpikeLinear flattens what it gets; an Identity hands packed spikes on.
            self.parent._modules[self.flatten] = nn.Identity()
        self.neurons.packed = True
        report.converted[self.gives] = "packed=True"
        report.converted[self.place] = type(made).__name__


def packable(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of neurons and of the layer behind them that ``convert_spike_layers`` would change."""
    for link, objection in _all_links(model):
        if objection is None and not (link.neurons.packed and type(link.taker) not in KINDS):
            yield link.gives, link.place


def _all_links(model: nn.Module) -> Iterator[tuple[_Link, str | None]]:
    """Each, with the reason why it stays as it is."""
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for path, parent in list(model.named_modules()):
        if isinstance(parent, nn.Sequential):
            for link in _links(path, parent):
                yield link, link.objection(uses)


def _links(path: str, parent: nn.Sequential) -> Iterator[_Link]:
    names, layers = list(parent._modules), list(parent._modules.values())
    inner = 1 if isinstance(parent, TimeSequential) else 2
    for at, name in enumerate(names):
        giver = layers[at]
        if not isinstance(giver, (Spiking, BatchNormLIF, ConvBatchNormLIF)) and not feeds_back(giver):
            continue
        flatten = None
        for behind in count(at + 1):
            if behind == len(names):
                break
            layer = layers[behind]
            if isinstance(layer, nn.Identity):
                continue
            if flatten is None and _flattens(layer, inner):
                flatten = names[behind]
                continue
            taker: Any = layer.conv if isinstance(layer, ConvBatchNormLIF) else bare(layer)
            if flatten is not None and not isinstance(taker, nn.Linear):
                break
            if type(taker) in (*KINDS, SpikeConv2d, SpikeLinear):
                yield _Link(parent, giver, join(path, name), flatten, names[behind], join(path, names[behind]))
            break


def _flattens(layer: Any, inner: int) -> bool:
    """Whether it flattens all axes behind the batch axis, which is before ``inner``."""
    flatten: Any = bare(layer)
    first = 1 if isinstance(layer, OverTime) else inner
    return type(flatten) is nn.Flatten and flatten.start_dim == first and flatten.end_dim == -1


def _converted(layer: Any) -> nn.Module:
    """The layer for packed spikes, with the same Parameters."""
    options: dict[str, Any] = {"bias": layer.bias is not None, "device": torch.device("meta")}
    if type(layer) is nn.Conv2d:
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        made: nn.Module = SpikeConv2d(*sizes, **{name: getattr(layer, name) for name in names}, **options)
    else:
        made = SpikeLinear(layer.in_features, layer.out_features, **options)
    for name in ("weight", "bias"):
        made.register_parameter(name, layer._parameters[name])
    return made.train(layer.training)
