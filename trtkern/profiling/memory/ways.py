"""The ways of running the blocks of a network: what each keeps for its backward pass is a choice.

A *block* is what can be switched: a ``ConvBatchNormLIF``, or a layer of neurons that packs its spikes. Its output is
the same in each way; in float32 on a CPU, where kernels compute on packed spikes, but for the order of their sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from trtkern.names import unknown
from trtkern.nn import BatchNormLIF, ConvBatchNormLIF
from trtkern.nn._neuron import Spiking

__all__ = ["CHECKPOINT", "DENSE", "KEEP", "PACK", "WAYS", "Block", "blocks", "run_as"]

KEEP = "keep"
"""Everything dense."""
PACK = "pack"
"""Bits in place of the spikes."""
CHECKPOINT = "checkpoint"
"""Bits, and the convolution's output is made again for the backward pass."""
DENSE = "checkpoint, dense"
"""That with dense spikes, in a block that was made not to pack them."""
WAYS = (KEEP, PACK, CHECKPOINT, DENSE)
"""Keep everything dense; keep bits in place of the spikes; beside that, make the convolution's output again for the
backward pass; or that with dense spikes, in a block that was made not to pack them."""
AGAIN = (CHECKPOINT, DENSE)


class Block(NamedTuple):
    """What can be switched."""

    name: str
    """Of the module in its model."""
    module: ConvBatchNormLIF | BatchNormLIF | Spiking
    """The layer whose ways they are."""

    @property
    def layer(self) -> BatchNormLIF | Spiking:
        """The layer with the neurons, which packs their spikes or does not."""
        inside = self.module.norm if isinstance(self.module, ConvBatchNormLIF) else self.module
        assert isinstance(inside, (BatchNormLIF, Spiking))
        return inside

    @property
    def layer_name(self) -> str:
        """The name of that layer."""
        return f"{self.name}.norm" if isinstance(self.module, ConvBatchNormLIF) else self.name

    @property
    def way(self) -> str:
        """How it runs now."""
        if isinstance(self.module, ConvBatchNormLIF) and self.module.checkpoint:
            return CHECKPOINT if self.layer.packed else DENSE
        return PACK if self.layer.packed else KEEP

    def run(self, way: str) -> None:
        """Run it in that way from now on."""
        if isinstance(self.module, ConvBatchNormLIF):
            self.module.checkpoint = way in AGAIN
        self.layer.packed = way in (PACK, CHECKPOINT)


def blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model, in the order in which it holds them.

    Args:
        model: any module.
    """
    found: list[Block] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        fused = isinstance(module, ConvBatchNormLIF) and isinstance(module.norm, BatchNormLIF)
        if id(module) not in inside and (fused or isinstance(module, (BatchNormLIF, Spiking))):
            found.append(Block(name, module))
            inside |= {id(part) for part in module.modules()}
    return found


def run_as(model: nn.Module, ways: Mapping[str, str]) -> None:
    """Run each block that is named in its way; the others as they do.

    Args:
        model: the network, which is changed.
        ways: of each block by its name: one of ``WAYS``.

    Raises:
        ValueError: a block that the model does not have, or an unknown way.
    """
    known = {block.name: block for block in blocks(model)}
    for name, way in ways.items():
        if name not in known:
            raise unknown("memory: block", name, known)
        if way not in WAYS:
            raise unknown(f"memory: {name}", way, WAYS)
        known[name].run(way)
