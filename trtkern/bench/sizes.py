"""The suite "sizes": neurons over a grid of T and N, and BatchNorm + LIF at every layer of the networks.

So many cases are compared with the strongest candidates alone (``layers.Layer.strong``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from trtkern.bench.cases import LAYOUTS, Case
from trtkern.datasets import DATASETS
from trtkern.models.build import build
from trtkern.nn import BatchNormLIF
from trtkern.training import recipes

TIMESTEPS = (1, 2, 4, 8, 16, 32, 100, 500)
NEURONS = tuple(k << 10 for k in (1, 16, 64, 256, 1024, 2048))
MOST = 128 << 20
"""Neuron-steps: larger ones say nothing new, since all of these are far larger than any cache, and take minutes."""
BATCHES = (8, 64)


def cases() -> tuple[Case, ...]:
    """All of the suite: the neurons, then BatchNorm + LIF of every layer, batch and memory layout."""
    neurons = [Case("lif", (T, N)) for T in TIMESTEPS for N in NEURONS if T * N <= MOST]
    normed = [
        Case("bn-lif", (T, batch, *image), layout=layout)
        for T, *image in layer_shapes()
        for batch in BATCHES
        for layout in LAYOUTS
    ]
    return (*neurons, *normed)


@cache
def layer_shapes() -> tuple[tuple[int, int, int, int], ...]:
    """(T, C, H, W) of every BatchNorm + LIF of VGGSNN, ResNet-19 and the digits' network, each shape once.

    They are what the layers themselves are given when the networks run on a sample. An image's first layer is given the
    same current at every step; what is measured is the layer with a current for each.
    """
    return tuple(dict.fromkeys(shape for network in _networks() for shape in _seen(*network)))


def _networks() -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """The networks, each with the shape of a batch of one sample: frames of events, or images."""
    for name, data in (("vggsnn", "dvs-cifar10"), ("resnet19", "cifar10")):
        yield _network({"name": name}, data)
    recipe = recipes.load("digits")
    yield _network(recipe["model"], recipe["data"], timesteps=recipe["timesteps"])


def _network(model: dict[str, Any], data: str, **options: Any) -> tuple[nn.Module, tuple[int, ...]]:
    known = DATASETS[data]
    assert known.shape is not None
    model = dict(model)
    net = build(model.pop("name"), known.shape, known.classes, **model, **options)
    return net, (net.timesteps, 1, *known.shape) if known.frames else (1, *known.shape)


def _seen(net: nn.Module, shape: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """(T, C, H, W) of what each BatchNorm + LIF of a network is given, in the order in which they run."""
    found: list[tuple[int, int, int, int]] = []

    def see(layer: nn.Module, given: tuple[Any, ...]) -> None:
        T, _, C, H, W = given[0].shape
        found.append((T, C, H, W))

    for layer in net.modules():
        if isinstance(layer, BatchNormLIF):
            layer.register_forward_pre_hook(see)
    with torch.no_grad():
        net(torch.zeros(shape))
    return found
