"""What a training step keeps for its backward pass, layer by layer: VGGSNN, checkpointed, unfused, and with ReLU.

    python bench/memory.py                  rows go to bench/memory.csv

T = 4, a batch of 8, frames of 2x48x48, float32, channels last. "y" is the output of the convolutions alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import ROOT, append, commit, machine, today
from step import ReLUNet
from torch import Tensor, nn
from torch.nn import functional

from trtkern import nn as snn
from trtkern.models import vggsnn
from trtkern.models.conv import VGGSNN
from trtkern.profiling import memory

TIMESTEPS, BATCH, SHAPE = 4, 8, (2, 48, 48)


class Unfused(nn.Module):
    """The same network of torch's layers and the loop of ``reference.py``: BatchNorm2d, LIF, AvgPool2d."""

    def __init__(self) -> None:
        super().__init__()
        channels, blocks = SHAPE[0], []
        for layer, following in zip(VGGSNN, (*VGGSNN[1:], None), strict=True):
            if isinstance(layer, int):
                conv = nn.Conv2d(channels, layer, 3, padding=1, bias=False)
                parts = [conv, nn.BatchNorm2d(layer), snn.LIF(backend="reference")]
                blocks.append(snn.TimeSequential(*parts, *([nn.AvgPool2d(2)] if following == "pool" else [])))
                channels = layer
        self.layers = snn.TimeSequential(*blocks)
        self.classifier = nn.Linear(channels * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, C, H, W] -> [T, B, classes]."""
        return self.classifier(self.layers(x).flatten(2))


def block_of(layer: str, relu: bool) -> str:
    """The convolution, counted from 0, that a layer stands at or behind; the name itself elsewhere."""
    first, _, rest = layer.partition(".")
    if first != "layers" or not rest:
        return layer
    number = rest.split(".")[0]
    if not relu:
        return number
    # There a convolution is three layers of one Sequential, and a pool one more.
    kinds = [kind for kind in VGGSNN for kind in ((kind,) * 3 if isinstance(kind, int) else (kind,))]
    return str((sum(isinstance(kind, int) for kind in kinds[: int(number) + 1]) - 1) // 3)


def main() -> None:
    """Measure the four networks, append their rows, and show them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "memory.csv", help="CSV to append rows to")
    options = parser.parse_args()
    torch.manual_seed(0)
    frames, target = torch.rand(TIMESTEPS, BATCH, *SHAPE), torch.randint(10, (BATCH,))
    networks: dict[str, nn.Module] = {
        "trtkern": vggsnn(),
        "trtkern, checkpoint": vggsnn(checkpoint=True),
        "BatchNorm2d + reference LIF": Unfused().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        "BatchNorm2d + ReLU": ReLUNet(SHAPE, VGGSNN, 10),
    }
    table: dict[str, dict[str, int]] = {}
    for name, network in networks.items():
        report = memory(
            network, frames, loss=lambda out: functional.cross_entropy(out.flatten(0, 1), target.repeat(TIMESTEPS))
        )
        found: dict[str, int] = {}
        for row in report.rows:
            block = block_of(row.name, isinstance(network, ReLUNet))
            found[block] = found.get(block, 0) + row.measured
        table[name] = found
    side, outputs = SHAPE[1], {}
    for number, layer in enumerate(item for item in VGGSNN if isinstance(item, int)):
        outputs[str(number)] = TIMESTEPS * BATCH * layer * side * side * 4
        side //= 2 if number % 2 == 1 else 1
    same = {"date": today(), "commit": commit(), "machine": machine(), "case": "vggsnn-4"}
    rows = [
        {**same, "network": name, "block": block, "bytes": found.get(block, 0), "y_bytes": outputs.get(block, 0)}
        | {"command": "python bench/memory.py"}
        for name, found in table.items()
        for block in (*outputs, *(b for b in found if b not in outputs))
    ]
    append(rows, options.output)
    total = sum(outputs.values())
    print(f"{'block':>10} {'y MiB':>9}" + "".join(f"{name:>30}" for name in table))
    for block in (*outputs, "classifier", "(loss)"):
        line = "".join(f"{found.get(block, 0) / 2**20:30.3f}" for found in table.values())
        print(f"{block:>10} {outputs.get(block, 0) / 2**20:9.3f}{line}")
    print(f"{'total':>10} {total / 2**20:9.3f}" + "".join(f"{sum(f.values()) / 2**20:30.3f}" for f in table.values()))
    print(f"{'x y':>10} {1:9.3f}" + "".join(f"{sum(found.values()) / total:30.3f}" for found in table.values()))


if __name__ == "__main__":
    main()
