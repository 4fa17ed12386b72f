"""The small convolutional network that ``trtkern train`` uses by default."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trtkern.nn import LIF


class ConvBlock(nn.Module):
    """3x3 convolution, BatchNorm over time, batch and space together ("tdBN"), LIF: [T, B, C, H, W] -> spikes.

    A static block takes [B, C, H, W] and repeats what BatchNorm gives T times: the same result as convolving T equal
    frames, for 1/T of the work.
    """

    def __init__(self, in_channels: int, channels: int, *, repeat: int | None = None, backend: str = "auto") -> None:
        super().__init__()
        self.repeat = repeat
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.lif = LIF(backend=backend)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        if self.repeat is not None:
            # cat keeps channels_last, which expand() followed by a copy would not.
            y = torch.cat([self.norm(self.conv(x))] * self.repeat)
            return self.lif(y.unflatten(0, (self.repeat, -1)))
        y = self.norm(self.conv(x.flatten(0, 1)))
        return self.lif(y.unflatten(0, x.shape[:2]))


class AveragePool(nn.Module):
    """2x2 average pooling of every step: [T, B, C, H, W] -> [T, B, C, H // 2, W // 2]."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])


class SmallNet(nn.Module):
    """Convolutions with BatchNorm and LIF, average pooling, and a linear readout of every step.

    Args:
        shape: (C, H, W) of an image.
        layers: channels of a ``ConvBlock``, or "pool", in order.
        classes: number of classes.
        timesteps: T; the image is shown T times (direct encoding).
        backend: of the LIF layers.

    Raises:
        ValueError: no layers, a first layer that is no convolution, or pooling below one pixel.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        layers: Sequence[int | str],
        classes: int,
        *,
        timesteps: int = 4,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not layers or layers[0] == "pool":
            raise ValueError(f"SmallNet: expected layers to begin with a convolution, got {list(layers)}")
        channels, height, width = shape
        blocks: list[nn.Module] = []
        for layer in layers:
            if isinstance(layer, str):
                height, width = height // 2, width // 2
                if layer != "pool" or height < 1 or width < 1:
                    raise ValueError(f"SmallNet: expected layers of channels and 'pool' that fit {shape}, got {layers}")
                blocks.append(AveragePool())
            else:
                blocks.append(ConvBlock(channels, layer, repeat=None if blocks else timesteps, backend=backend))
                channels = layer
        self.timesteps = timesteps
        self.layers = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels * height * width, classes)
        # Convolutions run faster on a CPU in this layout, and the LIF kernels take either as it is.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [T, B, classes]."""
        images = images.contiguous(memory_format=torch.channels_last)
        spikes = self.layers(images)
        # Channels last: a view of memory as it is, forward and backward.
        return self.classifier(spikes.movedim(2, -1).flatten(2))
