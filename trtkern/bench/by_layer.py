"""Layers that kernels compute from packed spikes, each against float64 on what it was given within a whole network.

Logits and gradients of a whole network say little of kernels that round otherwise: a spike that falls on the other side
of its threshold is carried on, and after some layers the two are different networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern.nn import SpikeConv2d, SpikeLinear
from trtkern.ops.spikes import Spikes

TOLERANCE = 2.0**-18
"""Of the sum of the magnitudes of all that is added up: as float32 rounds it, but less than one spike in 2**17 left
out would change."""


class _Seen(NamedTuple):
    """What a layer was given and made in one step."""

    layer: SpikeConv2d | SpikeLinear
    x: Tensor
    y: Tensor
    g: list[Tensor]
    """The gradient of y, when the backward pass has come by."""


class Verdict(NamedTuple):
    """What was found of the layers of a network."""

    wrong: str
    """The first layer that is wrong, and why; empty where none is."""
    kernels: int
    """Layers that a kernel computed."""
    layers: int
    """Those that one might."""
    error: float
    """The largest one, as ``TOLERANCE`` counts it."""


def judged(model: nn.Module, run: Callable[[], Any]) -> Verdict:
    """The verdict on a model's layers for packed spikes in the one step that ``run`` makes, gradients included."""
    kinds = (SpikeConv2d, SpikeLinear)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, kinds) and not each.exact}
    seen: dict[str, _Seen] = {}
    if not layers:
        return Verdict("", 0, 0, 0.0)

    def watch(name: str, layer: Any) -> Any:
        def hook(module: Any, given: tuple[Any, ...], y: Tensor) -> None:
            # A checkpointed block runs once more, without a graph, in its backward pass.
            if y.requires_grad and isinstance(given[0], Spikes) and _computed(layer, given[0]):
                seen[name] = _Seen(layer, given[0].spikes.detach(), y.detach(), [])
                y.register_hook(seen[name].g.append)

        return layer.register_forward_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        model.zero_grad(set_to_none=True)
        run()
    finally:
        for handle in handles:
            handle.remove()
    worst = 0.0
    for name, each in seen.items():
        error = max(_forward_error(each), _weight_error(each))
        if not error <= TOLERANCE:  # NaN is wrong too
            return Verdict(f"{name} is off by {error:.1e} of its sums in float64", len(seen), len(layers), error)
        worst = max(worst, error)
    return Verdict("", len(seen), len(layers), worst)


def _computed(layer: Any, x: Spikes) -> bool:
    """Whether a kernel computes the layer of x, forward or for the gradient of the weight."""
    return any(name for name, _ in layer.kernels(x))


def _function(layer: SpikeConv2d | SpikeLinear, x: Tensor, weight: Tensor) -> Tensor:
    """The layer without its bias, of images or rows."""
    if isinstance(layer, SpikeConv2d):
        return nn.functional.conv2d(x, weight, None, layer.stride, layer.padding)
    return nn.functional.linear(x, weight)


def _folded(each: _Seen) -> tuple[Tensor, Tensor]:
    """x and y as images [n, C, H, W] or rows [n, C]."""
    if isinstance(each.layer, SpikeConv2d):
        return each.x.flatten(0, 1), each.y.flatten(0, 1)
    return each.x.reshape(-1, each.layer.in_features), each.y.reshape(-1, each.layer.out_features)


def _forward_error(each: _Seen) -> float:
    """Of the first and the last image."""
    x, y = (t[[0, -1]].double() for t in _folded(each))
    weight = each.layer.weight.detach().double()
    bias = torch.zeros(len(weight)) if each.layer.bias is None else each.layer.bias.detach()
    bias = bias.double().to(x.device).view(-1, *(1,) * (x.dim() - 2))
    return _error(y, _function(each.layer, x, weight) + bias, _function(each.layer, x, weight.abs()) + bias.abs())


def _weight_error(each: _Seen) -> float:
    """Of the weights of the first and the last output."""
    found = each.layer.weight.grad
    if found is None or not each.g:
        return torch.inf
    x, _ = _folded(each)
    weight = each.layer.weight.detach()[[0, -1]].double().requires_grad_()
    y = _function(each.layer, x.double(), weight)
    g = (each.g[0].flatten(0, 1) if x.dim() == 4 else each.g[0].reshape(len(x), -1))[:, [0, -1]].double()
    (want,) = torch.autograd.grad(y, weight, g, retain_graph=True)
    (size,) = torch.autograd.grad(y, weight, g.abs())
    return _error(found[[0, -1]].double(), want, size)


def _error(found: Tensor, want: Tensor, size: Tensor) -> float:
    """The largest error as a share of the sum of magnitudes; where that is 0, so has to be what was found."""
    return ((found - want).abs() / size.clamp(min=torch.finfo(torch.float32).tiny)).max().item()
