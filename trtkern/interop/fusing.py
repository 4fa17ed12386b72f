"""``convert(..., fuse=True)``: BatchNorms of other libraries before neurons, as ``convert_norm_lif`` knows them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trtkern.interop.adapters import package_of
from trtkern.nn._neuron import Spiking
from trtkern.nn.convert import NORMS, ConversionReport, convert_norm_lif, hooks_of
from trtkern.nn.time import OverTime, TimeSequential
from trtkern.nn.unfused import bare

SEQUENCES = "SeqToANNContainer"
"""The container of SpikingJelly, which papers have copied: layers without time over [T, B, ...], as ``OverTime``."""


def fuse_norms(model: nn.Module, report: ConversionReport) -> nn.Module:
    """``convert_norm_lif`` of a converted model, whose BatchNorms may be another library's.

    Two forms are made torch's before: SpikingJelly's ``BatchNorm2d(step_mode="m")``, which is ``nn.BatchNorm2d`` in
    ``OverTime``, and its ``SeqToANNContainer(Conv2d, BatchNorm2d)`` before neurons, which with them is a
    ``TimeSequential``; an ``nn.Identity`` keeps the neurons' place. State dicts keep their keys but for learned
    parameters of a neuron. What is not fused in the end is put back.
    """
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    changed: list[tuple[nn.Sequential, str, nn.Module]] = []
    moved: list[tuple[nn.Sequential, str, str, nn.Module, nn.Module]] = []
    for parent in list(model.modules()):
        if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
            continue
        layers = list(parent._modules.items())
        for (name, layer), (behind, neuron) in pairwise(layers):
            if not isinstance(neuron, Spiking) or uses[id(layer)] > 1 or uses[id(neuron)] > 1:
                continue
            if (norm := _over_time(layer)) is not None:
                changed.append((parent, name, layer))
                parent._modules[name] = norm
            elif (whole := _with_neuron(layer, neuron, uses)) is not None:
                moved.append((parent, name, behind, layer, neuron))
                parent._modules[name], parent._modules[behind] = whole, nn.Identity()
    model = convert_norm_lif(model, report)
    for parent, name, layer in changed:
        if isinstance(parent._modules[name], OverTime):
            parent._modules[name] = layer
    for parent, name, behind, layer, neuron in moved:
        if isinstance(list(parent._modules[name].children())[-1], Spiking):
            parent._modules[name], parent._modules[behind] = layer, neuron
    return model


def _over_time(layer: nn.Module) -> OverTime | None:
    """SpikingJelly's BatchNorm over sequences as torch's, with the same tensors; None for any other layer."""
    kind = next((norm for norm in NORMS if norm.__name__ == type(layer).__name__), None)
    if kind is None or package_of(layer) != "spikingjelly" or getattr(layer, "step_mode", "s") != "m":
        return None
    if not isinstance(layer, _BatchNorm) or kind is nn.SyncBatchNorm or hooks_of(layer) is not None:
        return None
    norm = kind(layer.num_features, layer.eps, layer.momentum, False, False)
    norm._parameters.update(layer._parameters)
    norm._buffers.update(layer._buffers)
    norm.affine, norm.track_running_stats = layer.affine, layer.track_running_stats
    norm.training = layer.training
    wrapped = OverTime(norm)
    wrapped.training = layer.training
    return wrapped


def _with_neuron(layer: nn.Module, neuron: nn.Module, uses: Counter[int]) -> TimeSequential | None:
    """A SeqToANNContainer that ends in a BatchNorm, with the neurons behind it; None for any other layer."""
    if type(layer).__name__ != SEQUENCES or not isinstance(layer, nn.Sequential) or hooks_of(layer) is not None:
        return None
    last = list(layer._modules.values())[-1:]
    if not last or type(last[0]) not in NORMS or uses[id(last[0])] > 1:
        return None
    whole = TimeSequential(*layer._modules.values(), neuron)
    if list(whole._modules)[:-1] != list(layer._modules) or bare(last[0]) is not last[0]:
        return None
    whole.training = layer.training
    return whole
