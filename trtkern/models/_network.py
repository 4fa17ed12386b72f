"""What the networks share: how images and sequences of frames go in, and logits of every step come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from trtkern.nn import SpikeLinear, Spikes, Stream
from trtkern.nn import exact_convolutions as _exactly
from trtkern.nn._neuron import carrier
from trtkern.nn.time import for_lengths
from trtkern.ops import checks
from trtkern.ops.spikes import packed_input


class SpikingNetwork(nn.Module):
    """Layers over time and a linear readout of every step: images or frames -> logits [T, B, classes].

    An image [B, C, H, W] is shown T times (direct encoding); the first convolution runs on it once. Frames are
    [T, B, C, H, W]. Everything is in channels_last: convolutions run faster in it on a CPU, and the fused kernels
    take either layout as it is.

    Args:
        layers: each takes [T, B, ...] or packed ``Spikes``.
        classifier: the readout.
        timesteps: T of an image.
        topology: the string that ``from_topology`` makes this network of, or None.
        flat: the first layer is fully connected and takes frames as [T, B, C * H * W].
        exact_convolutions: torch's own kernels compute convolutions and matrix products also of packed spikes, so that
            results are torch's bit for bit (``trtkern.nn.exact_convolutions``).

    Raises:
        TypeError, ValueError: timesteps is no int >= 1.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        classifier: SpikeLinear,
        *,
        timesteps: int = 4,
        topology: str | None = None,
        flat: bool = False,
        exact_convolutions: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(timesteps, bool) or not isinstance(timesteps, int):
            raise TypeError(f"{type(self).__name__}: expected timesteps as an int, got {timesteps!r}")
        if timesteps < 1:
            raise ValueError(f"{type(self).__name__}: expected timesteps >= 1, got {timesteps}")
        self.timesteps, self.topology, self.flat = timesteps, topology, flat
        self.layers = nn.Sequential(*layers)
        self.classifier = classifier
        _exactly(self, exact_convolutions)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W], or sequences of frames [T, B, C, H, W] -> logits [T, B, classes].

        Args:
            x: images or frames.
            lengths: int32 or int64 [B], the frames of each sample; None: each has T. The neurons end there, and the
                logits of later steps are those of a silent network.

        Raises:
            TypeError, ValueError: no tensor, or one of another rank or number of channels; with lengths, BatchNorms in
                training.
        """
        made: Any = _frames(x, self.timesteps, type(self).__name__, self.flat)
        if lengths is None:
            made = self.layers(made)
        else:
            for name, layer in self.layers.named_children():
                made = layer(made, **for_lengths(f"{type(self).__name__}: layer 'layers.{name}'", layer, lengths))
        return self.classifier(made)

    def stream(self) -> Stream:
        """This network over sequences that come in parts: ``step`` takes images or frames [B, C, H, W], ``chunk``
        frames [T, B, C, H, W] (``trtkern.nn.Stream``)."""
        return Stream(self)

    def extra_repr(self) -> str:
        """T, and the topology where there is one."""
        shown = "" if self.topology is None else f", topology={self.topology!r}"
        return f"timesteps={self.timesteps}{shown}"


@fx.wrap
def _frames(x: Tensor, timesteps: int, who: str, flat: bool) -> Tensor | Spikes:
    """Frames, or an image that is shown at every step: [T, B, C, H, W] in channels_last; flat: [T, B, C * H * W], with
    their words where they are spikes."""
    if not isinstance(x, Tensor) or x.dim() not in (4, 5):
        kind = ValueError if isinstance(x, Tensor) else TypeError
        raise kind(
            f"{who}: expected images [B, C, H, W] or frames [T, B, C, H, W], got {checks.describe(x)}; one image needs "
            "image.unsqueeze(0)"
        )
    if x.dim() == 4 and carrier() is not None:
        raise ValueError(
            f"{who}: expected frames [T, B, C, H, W] in a stream, got {checks.describe(x)}; an image that is shown at "
            "every step goes to step(image), at each of them"
        )
    if flat:
        return x.flatten(1).expand(timesteps, -1, -1) if x.dim() == 4 else packed_input(x.flatten(2))
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last).expand(timesteps, *x.shape)
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
