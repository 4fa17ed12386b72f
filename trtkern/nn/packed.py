"""Keep packed spikes for the backward pass of any model, through autograd's hooks for saved tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from trtkern.nn._packing import PACKED, Packing, restore
from trtkern.ops.spikes import listen


@dataclass
class PackedReport:
    """What autograd was given to keep inside ``packed_activations``, in bytes of memory; each piece counts once.

    Parameters count nowhere: they are there anyway. What a backward pass has released stays counted, so these are the
    bytes of one step if the context is around one step.
    """

    packed_tensors: int = 0
    """Pieces of memory, full of spikes, that were kept as words."""
    dense_bytes: int = 0
    """What those take dense."""
    packed_bytes: int = 0
    """What their words take."""
    left_dense: dict[str, int] = field(default_factory=dict)
    """Bytes kept dense, by reason: "not spikes"; "changed in place" (spikes no more); "partial view" (a part of every
    step, whose memory stays whole); "cast copy" (in another dtype, as autocast makes them, of whatever it is)."""

    @property
    def left_dense_bytes(self) -> int:
        """Bytes kept dense, for whatever reason."""
        return sum(self.left_dense.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes kept: the words, and what was left dense."""
        return self.packed_bytes + self.left_dense_bytes

    def summary(self) -> dict[str, Any]:
        """The counts by name, ready for JSON."""
        names = ("packed_tensors", "dense_bytes", "packed_bytes", "left_dense_bytes", "kept_bytes")
        return {**{name: getattr(self, name) for name in names}, "left_dense": dict(self.left_dense)}

    def _count(self, kept_as: str, nbytes: int, words: int) -> None:
        if kept_as == PACKED:
            self.packed_tensors += (nbytes > 0) - (nbytes < 0)
            self.dense_bytes += nbytes
            self.packed_bytes += words
        else:
            self.left_dense[kept_as] = self.left_dense.get(kept_as, 0) + nbytes

    def __str__(self) -> str:
        by_reason = sorted(self.left_dense.items(), key=lambda item: -item[1])
        reasons = "".join(f"\n  {_size(count):>10}  {reason}" for reason, count in by_reason)
        return (
            f"packed {self.packed_tensors} spike tensors: {_size(self.dense_bytes)} as {_size(self.packed_bytes)}\n"
            f"left dense: {_size(self.left_dense_bytes)}{reasons}"
        )


def _size(count: int) -> str:
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


@contextmanager
def packed_activations() -> Iterator[PackedReport]:
    """Inside: where a layer saves spikes for its backward pass, their words are kept instead of the dense tensor.

    For anybody's model: convolutions, Linear and 2x2 average pooling of torch around ``LIF``, ``PLIF``, ``IF`` and
    ``BatchNormLIF``. Gradients are the same bit for bit.

        with trtkern.nn.packed_activations() as report:
            loss = criterion(model(x), target)
        loss.backward()  # inside or later
        print(report)

    A saved tensor is taken for spikes if its memory is that of spikes which a neuron made, still alive, and nothing was
    written to it since; never by its address. All of it in any view (flattened, permuted, channels last), or some of
    the timesteps, is kept as words and comes back with shape, strides, dtype and values as they were. What a
    differentiated ``avg_pool2d(s, 2)`` made of images of all of s, or of some timesteps, is kept as the words of s.
    Everything else is kept as autograd keeps it, and counted in the report with the reason. Words of spikes that are
    saved twice are kept once.

    An in-place change of spikes after they were saved does no harm to their words: gradients are those of what the
    forward pass saw, where autograd alone would raise an error. For what stays dense that error is raised. Writes that
    autograd does not see (through ``.data`` or NumPy) are not seen here.

    Where contexts are nested the inner one packs and counts. Inside ``torch.utils.checkpoint`` the inputs of a block
    are packed, and what is recomputed is not. What torch.compile compiles decides for itself what it keeps, and packs
    nothing (gradients stay right): use ``SpikeConv2d`` and ``SpikeLinear`` there. Neurons make their words as long as
    any thread is inside; what is packed are the tensors that this thread saves.
    """
    report = PackedReport()
    packing = Packing(report._count)
    with ExitStack() as stack:
        stack.callback(packing.forget)
        stack.enter_context(listen(packing.hear))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(packing.pack, restore))
        yield report
