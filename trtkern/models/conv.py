"""Plain convolutional spiking networks: the small ones that ``trtkern train`` uses by default, and VGGSNN."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from trtkern.models._blocks import Convolution, Style
from trtkern.models._network import SpikingNetwork
from trtkern.nn import SpikeLinear


class ConvSNN(SpikingNetwork):
    """3x3 convolutions, each with BatchNorm + LIF, 2x2 average pooling behind some, a linear readout of every step.

    Spikes go from layer to layer with their bits: a convolution keeps those, not the dense spikes, and where there is
    pooling nothing but pooled spikes is written.

    Args:
        shape: (C, H, W) of an image or frame.
        layers: output channels of a convolution, or "pool" behind one, in order.
        classes: number of classes.
        timesteps: T; an image is shown T times (direct encoding), and convolved once.
        checkpoint: keep no convolution's output; the backward pass convolves once more (``ConvBatchNormLIF``).
        packed: keep bits instead of dense spikes.
        exact_convolutions: torch's own kernels compute also what packed spikes are convolved with (``SpikingNetwork``).
        lif: settings of the neurons: decay, surrogate, backend, ... (``LIF``).

    Raises:
        ValueError: no layers, a first layer that is no convolution, pooling twice, or below one pixel.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        layers: Sequence[int | str],
        classes: int,
        *,
        timesteps: int = 4,
        checkpoint: bool = False,
        packed: bool = True,
        exact_convolutions: bool = False,
        **lif: Any,
    ) -> None:
        channels, height, width = shape
        style = Style.of(checkpoint, packed, **lif)
        if isinstance(layers, str):
            raise _refusal(shape, layers)
        blocks: list[nn.Module] = []
        for layer, following in itertools.pairwise((*layers, None)):
            if layer == "pool":
                height, width = height // 2, width // 2
                continue
            pool = 2 if following == "pool" else 1
            if not isinstance(layer, int) or min(height, width) < pool:
                raise _refusal(shape, layers)
            blocks.append(style.block(Convolution(channels, layer), pool=pool))
            channels = layer
        pooled = [i for i, layer in enumerate(layers) if layer == "pool"]
        if not blocks or any(i == 0 or layers[i - 1] == "pool" for i in pooled):
            raise _refusal(shape, layers)
        classifier = SpikeLinear(channels * height * width, classes)
        super().__init__(blocks, classifier, timesteps=timesteps, exact_convolutions=exact_convolutions)


def _refusal(shape: tuple[int, int, int], layers: Sequence[int | str]) -> ValueError:
    if isinstance(layers, str):
        return ValueError(
            f'ConvSNN: expected layers as a list such as [16, "pool", 32], got {layers!r}; a topology string belongs '
            f'to from_topology, in a recipe to model.name = "topology"'
        )
    return ValueError(
        f"ConvSNN: expected layers of channels, each followed by 'pool' at the most once, that fit {shape}, got "
        f"{list(layers)}"
    )


VGGSNN = (64, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
"""The layers of VGGSNN."""


def vggsnn(num_classes: int = 10, *, shape: tuple[int, int, int] = (2, 48, 48), **options: Any) -> ConvSNN:
    """VGGSNN as the TRT paper trains it on event data: eight convolutions, 9,268,746 parameters for 10 classes.

    64 - 128 - pool - 256 - 256 - pool - 512 - 512 - pool - 512 - 512 - pool - Linear(4608 -> num_classes).

    Args:
        num_classes: classes.
        shape: (C, H, W) of a frame.
        options: what ``ConvSNN`` takes.
    """
    return ConvSNN(shape, VGGSNN, num_classes, **options)
