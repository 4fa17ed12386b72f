"""Residual spiking networks: ResNet-19, SEW-ResNet-34 and ResNet-34."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trtkern.models._network import SpikingNetwork
from trtkern.models.topology import from_topology

_STEM = "CONV-{}-7-2-3-3-2-1"


def resnet19(
    num_classes: int = 10,
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    timesteps: int = 6,
    width: int = 64,
    **options: Any,
) -> SpikingNetwork:
    """ResNet-19 as the TRT paper (arXiv 2506.19256) trains it on CIFAR: 12,630,858 parameters for 10 classes.

    conv3x3-64 | 3 blocks of 128 | 3 of 256, the first with stride 2 | 2 of 512, likewise | average over the image |
    Linear 256 + LIF | Linear. A block is conv - BN - LIF - conv - BN (+ x, or its 1x1 conv - BN) - LIF.

    Args:
        num_classes: classes.
        shape: (C, H, W) of an image or frame.
        timesteps: T of an image.
        width: channels of the first convolution, which all others are multiples of.
        options: what ``from_topology`` takes.

    Raises:
        TypeError, ValueError: as ``from_topology``.
    """
    stages = [(2 * width, 3, 1), (4 * width, 3, 2), (8 * width, 2, 2)]
    tokens = (f"CONVNP-{width}-3-1-1", *_blocks("RES", stages), f"FC-{4 * width}", f"L-{num_classes}")
    return from_topology("_".join(tokens), shape=shape, timesteps=timesteps, **options)


def sew_resnet34(
    num_classes: int = 100,
    *,
    shape: tuple[int, int, int] = (3, 224, 224),
    timesteps: int = 4,
    width: int = 64,
    connect: str = "ADD",
    **options: Any,
) -> SpikingNetwork:
    """SEW-ResNet-34 (Fang et al. 2021, arXiv 2102.04159): 21,335,972 parameters for 100 classes.

    conv7x7-64, stride 2 | maximum 3x3, stride 2 | 3, 4, 6 and 3 SEW blocks of 64, 128, 256 and 512 channels | average
    over the image | Linear. A block is conv - BN - LIF - conv - BN - LIF, then + x, or its 1x1 conv - BN - LIF. The
    neurons do not leak unless ``decay`` or ``neuron`` is given: as the TRT paper trains it on ImageNet-100.

    Args:
        num_classes, shape, timesteps, width, options: as in ``resnet19``.
        connect: "ADD", "AND" or "IAND" of a block's spikes and its input.

    Raises:
        TypeError, ValueError: as ``from_topology``.
    """
    if "neuron" not in options:
        options = {"decay": 1.0, **options}
    return _resnet34(f"SEWRES~{connect}", num_classes, width, shape=shape, timesteps=timesteps, **options)


def spiking_resnet34(
    num_classes: int = 100,
    *,
    shape: tuple[int, int, int] = (3, 224, 224),
    timesteps: int = 4,
    width: int = 64,
    **options: Any,
) -> SpikingNetwork:
    """ResNet-34 with the residual added before the neurons, as in ``resnet19``: 21,335,972 parameters for 100 classes.

    The layers are those of ``sew_resnet34``. The neurons are ``LIF`` with its defaults.

    Args:
        num_classes, shape, timesteps, width, options: as in ``resnet19``.

    Raises:
        TypeError, ValueError: as ``from_topology``.
    """
    return _resnet34("RES", num_classes, width, shape=shape, timesteps=timesteps, **options)


def _resnet34(head: str, num_classes: int, width: int, **options: Any) -> SpikingNetwork:
    stages = [(width, 3, 1), (2 * width, 4, 2), (4 * width, 6, 2), (8 * width, 3, 2)]
    tokens = (_STEM.format(width), *_blocks(head, stages), f"L-{num_classes}")
    return from_topology("_".join(tokens), **options)


def _blocks(head: str, stages: Iterable[tuple[int, int, int]]) -> list[str]:
    """Tokens of (channels, blocks, stride of the first block)."""
    return [
        f"{head}-{channels}-3=3-{stride if block == 0 else 1}=1-1=1"
        for channels, blocks, stride in stages
        for block in range(blocks)
    ]
