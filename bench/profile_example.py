"""The network of docs/profiling.md and docs/reading-a-profile.md, and the profiles that they show.

    cd bench
    trtkern profile profile_example:plain --input 4,16,2,32,32 --threads 1 --steps 20 --json profile_example.json
    trtkern profile profile_example:fused --input 4,16,2,32,32 --threads 1 --steps 20 --json profile_example_fused.json

``plain`` is what somebody writes who knows torch; ``fused`` is the same network after the advice of its profile.
"""

from __future__ import annotations

from torch import nn

from trtkern import nn as snn


def plain() -> nn.Module:
    """Frames [T, B, 2, 32, 32] to ten classes, each layer on its own."""
    return nn.Sequential(
        snn.TimeSequential(
            nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), snn.LIF(), nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), snn.LIF(), nn.AvgPool2d(2),
        ),
        nn.Flatten(2), nn.Linear(32 * 8 * 8, 10),
    )  # fmt: skip


def fused() -> nn.Module:
    """The same with one layer in the place of BatchNorm, neurons and pooling."""
    return snn.convert_norm_lif(plain())
