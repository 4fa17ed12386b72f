"""What a training step keeps for its backward pass, layer by layer.

    python bench/memory.py                      both cases; rows go to bench/memory.csv
    python bench/memory.py --case vggsnn-4      VGGSNN, checkpointed, unfused, and with ReLU
    python bench/memory.py --case resnet19-4    ResNet-19 with the TRT loss against the paper's formulation of both

T = 4, a batch of 8, float32, channels last; frames of 2x48x48, images of 3x32x32. "y" is the output of the convolutions
alone. The paper's formulation is plain torch: neurons over unbind, a penalty that loops over T and the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import ReLUNet, plain
from torch import Tensor, nn
from torch.nn import functional

from trtkern import nn as snn
from trtkern.bench.measure import ROOT, append, commit, machine, today
from trtkern.models import resnet19, vggsnn
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


def vggsnn_rows() -> list[dict[str, Any]]:
    """The four networks side by side; their rows."""
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
    total = sum(outputs.values())
    print(f"{'block':>10} {'y MiB':>9}" + "".join(f"{name:>30}" for name in table))
    for block in (*outputs, "classifier", "(loss)"):
        line = "".join(f"{found.get(block, 0) / 2**20:30.3f}" for found in table.values())
        print(f"{block:>10} {outputs.get(block, 0) / 2**20:9.3f}{line}")
    print(f"{'total':>10} {total / 2**20:9.3f}" + "".join(f"{sum(f.values()) / 2**20:30.3f}" for f in table.values()))
    print(f"{'x y':>10} {1:9.3f}" + "".join(f"{sum(found.values()) / total:30.3f}" for found in table.values()))
    return [
        {"network": name, "block": block, "bytes": found.get(block, 0), "y_bytes": outputs.get(block, 0)}
        for name, found in table.items()
        for block in (*outputs, *(b for b in found if b not in outputs))
    ]


def resnet_rows() -> list[dict[str, Any]]:
    """ResNet-19 and its loss, here and in the paper's formulation; their rows."""
    torch.manual_seed(0)
    images, target = torch.rand(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    model, paper = resnet19(timesteps=TIMESTEPS), plain.resnet19()
    paper.timesteps = TIMESTEPS
    paper.to(memory_format=torch.channels_last)
    loss = snn.TRTLoss(model)
    candidates: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        # As the training loop has it: the penalty's gradient is added in place, and nothing is kept for it.
        "trtkern": (model, lambda out: loss.parts(out, target, regularize=False).total),
        "trtkern, checkpoint": (
            resnet19(timesteps=TIMESTEPS, checkpoint=True), lambda out: loss.parts(out, target, regularize=False).total,
        ),
        "trtkern, penalty through autograd": (model, lambda out: loss(out, target)),
        "paper's formulation": (paper, lambda out: plain.trt_loss(paper, out, target)),
    }  # fmt: skip
    rows = []
    for name, (network, criterion) in candidates.items():
        report = memory(network, images, loss=criterion)
        penalty = sum(row.measured for row in report.rows if row.name == "(loss)")
        rows += [
            {"network": name, "block": "layers", "bytes": report.measured - penalty, "y_bytes": 0},
            {"network": name, "block": "(loss)", "bytes": penalty, "y_bytes": 0},
        ]
    whole = rows[-2]["bytes"] + rows[-1]["bytes"]
    print(f"{'network':>35} {'layers MiB':>11} {'loss MiB':>9} {'of the paper':>13}")
    for layers, lost in zip(rows[::2], rows[1::2], strict=True):
        together = layers["bytes"] + lost["bytes"]
        mib = (layers["bytes"] / 2**20, lost["bytes"] / 2**20)
        print(f"{layers['network']:>35} {mib[0]:11.2f} {mib[1]:9.2f} {together / whole:13.3f}")
    return rows


CASES = {"vggsnn-4": vggsnn_rows, "resnet19-4": resnet_rows}


def main() -> None:
    """Measure, show, and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="of these cases only")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "memory.csv", help="CSV to append rows to")
    options = parser.parse_args()
    for case in options.case or CASES:
        same = {"date": today(), "commit": commit(), "machine": machine(), "case": case}
        rows = CASES[case]()
        append([{**same, **row, "command": f"python bench/memory.py --case {case}"} for row in rows], options.output)


if __name__ == "__main__":
    main()
