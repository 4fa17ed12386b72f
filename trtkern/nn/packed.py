"""Keep packed spikes for the backward pass of any model, through autograd's hooks for saved tensors.

The context and its report come first; below them, which live memory holds which spikes, and what is kept in place of a
tensor that autograd saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from trtkern.ops import checks, layout
from trtkern.ops._lazy import Lazy
from trtkern.ops.spikes import listen, unpack

NOT_SPIKES = "not spikes"
CHANGED = "changed in place"
PARTIAL = "partial view"
CAST = "cast copy"
PACKED = "packed"


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
    ``BatchNormLIF``. Gradients are the same bit for bit::

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


@dataclass(eq=False, slots=True)
class Words:
    """Words, shared by the spikes that they were made with and by what was pooled from those."""

    tensor: Tensor
    counted: bool = False


@dataclass(eq=False, slots=True)
class Memory:
    """A storage; as long as its weak reference exists no other can take its place."""

    alive: StorageWeakRef
    nbytes: int
    counted: str | None = None
    """``PACKED``, or why it is left dense."""


@dataclass(eq=False, slots=True)
class Spiking(Memory):
    """A storage full of spikes, and how to make it out of words."""

    words: Words = field(kw_only=True)
    shape: tuple[int, ...] = field(kw_only=True)
    """[T, B, C, ...], of which the storage holds T steps in that order."""
    stride: tuple[int, ...] = field(kw_only=True)
    neurons: int = field(kw_only=True)
    """Elements of a step."""
    offset: int = field(kw_only=True)
    """Elements before the first step."""
    dtype: torch.dtype = field(kw_only=True)
    first: int = field(kw_only=True)
    """The step of the words that it starts with."""
    pooled: bool = field(kw_only=True)
    version: int = field(kw_only=True)
    """Of the spikes when they were made: every write to them, or to a view of them, raises it."""

    def steps(self, view: Tensor) -> tuple[int, int] | None:
        """The first step and the number of steps that a view of this storage spans; None if it lacks a part of them."""
        neurons, dense, span = self.neurons, 1, 0
        start, rest = divmod(int(view.storage_offset()) - self.offset, neurons)
        axes = [(stride, size) for size, stride in zip(view.shape, view.stride(), strict=True) if size != 1 and stride]
        for stride, size in sorted(axes):
            if stride == dense:
                dense *= size
            elif not span and dense % neurons == stride % neurons == 0:
                # Some steps are left out, as in spikes[::2]: whole steps all the same.
                span = (size - 1) * (stride // neurons) + dense // neurons
            else:
                return None
        span = span or dense // neurons
        whole = rest == 0 and dense % neurons == 0 and view.dtype == self.dtype and not view.is_neg()
        return (start, span) if whole and 0 <= start < start + span <= self.shape[0] else None


@dataclass(eq=False, slots=True)
class Kept:
    """A saved tensor, kept as words."""

    source: Spiking
    first: int
    """A step of the words."""
    steps: int
    shape: torch.Size
    stride: tuple[int, ...]

    def restore(self) -> Tensor:
        source = self.source
        words, start = source.words.tensor, self.first
        spikes = unpack(words, self.steps, start=start, pooled=source.pooled, dtype=source.dtype)
        return spikes.as_strided(self.shape, self.stride)


@dataclass(eq=False, slots=True)
class KeptDense:
    """A saved tensor, kept as it is, with the check of its version that autograd leaves out where there are hooks."""

    tensor: Tensor
    version: int | None

    def restore(self) -> Tensor:
        if self.version is not None and self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{checks.describe(self.tensor)}, is at version {self.tensor._version}; expected version "
                f"{self.version} instead"
            )
        return self.tensor


def restore(kept: Kept | KeptDense) -> Tensor:
    """What autograd gets back."""
    return kept.restore()


class Packing:
    """What one context knows.

    Args:
        count: told of every piece of memory that is kept: what it is kept as (``PACKED`` or the reason why not), its
            bytes and those of its words; negative when it was counted before and has to be taken back.
    """

    def __init__(self, count: Callable[[str, int, int], None]) -> None:
        self.count = count
        self.spiking: dict[int, Spiking] = {}
        self.words: dict[int, Spiking] = {}
        self.others: dict[int, Memory] = {}
        self.limit = 64

    def forget(self) -> None:
        """Let go of all words; what was packed holds its own."""
        for known in (self.spiking, self.words, self.others):
            known.clear()

    def hear(self, spikes: Tensor, words: Tensor) -> None:
        """A neuron made these spikes [T, ...], and the words of them, or of what they are 2x2 averages of."""
        if torch.compiler.is_compiling() or not _plain(spikes) or not spikes.numel() or not layout.is_dense(spikes):
            return
        self._sweep()
        pooled = spikes.shape[1:] != words.shape[1:]
        order = layout.pooled_shape(words)[1] if pooled else words.stride()
        if _same(spikes.stride()[1:], order[1:], spikes.shape[1:]):
            spiking = self._add(spikes, tuple(spikes.shape), spikes.stride(), Words(words.detach()), 0, pooled)
            self.words[words.untyped_storage()._cdata] = spiking

    def _add(
        self, spikes: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], words: Words, first: int, pooled: bool
    ) -> Spiking:
        """The storage of ``spikes`` holds spikes [T, B, C, ...] of that shape: the words' steps from ``first`` on."""
        storage = spikes.untyped_storage()
        spiking = self.spiking[storage._cdata] = Spiking(
            StorageWeakRef(storage),
            storage.nbytes(),
            words=words,
            shape=shape,
            stride=stride,
            neurons=spikes.numel() // shape[0],
            offset=int(spikes.storage_offset()),
            dtype=spikes.dtype,
            first=first,
            pooled=pooled,
            version=spikes._version,
        )
        return spiking

    def _averages(self, tensor: Tensor) -> Spiking | None:
        """The spikes that ``tensor`` holds 2x2 averages of, as images of whole steps; their words then do for both.

        Autograd knows: the node of avg_pool2d keeps its input, which was packed as such, and nothing else makes one.
        """
        node = tensor.grad_fn
        if node is None or node.name() != "AvgPool2DBackward0" or tensor._version != 0:
            return None
        plain = {
            "kernel_size": ((2, 2), (2,)),
            "stride": ((), (2, 2), (2,)),
            "padding": ((0, 0), (0,)),
            "ceil_mode": (False,),
            "divisor_override": (None,),
        }
        if any(getattr(node, f"_saved_{name}") not in values for name, values in plain.items()):
            return None
        # Absent where the input was saved before these hooks, or is freed already.
        kept = getattr(node._raw_saved_self, "data", None)  # type: ignore[attr-defined]
        if not isinstance(kept, Kept) or kept.source.pooled or len(kept.source.shape) != 5:
            return None
        _, batch, *image = kept.source.shape
        stride, expected = kept.source.stride, layout.pooled_shape(kept.source.words.tensor)[1]
        images = _same(kept.stride, (image[0] * image[1] * image[2], *stride[2:]), kept.shape)
        if (
            kept.shape != (kept.steps * batch, *image)
            or not images
            or not _same(tensor.stride(), expected[1:], tensor.shape)
        ):
            return None
        shape = (kept.steps, batch, *tensor.shape[1:])
        return self._add(tensor, shape, expected, kept.source.words, kept.first, True)

    def pack(self, tensor: Tensor) -> Kept | KeptDense:
        """What is kept for a tensor that autograd saves."""
        plain = _plain(tensor)
        # Not the tensor itself: saved by what made it, it would keep itself alive.
        dense = KeptDense(tensor if tensor.is_leaf else tensor.detach(), tensor._version if plain else None)
        if not plain:
            self.count(NOT_SPIKES, tensor.numel() * tensor.element_size(), 0)
            return dense
        owner = tensor if tensor._base is None else tensor._base
        if isinstance(owner, nn.Parameter):
            return dense
        storage = tensor.untyped_storage()
        spiking = self.spiking.get(storage._cdata)
        if spiking is None and storage._cdata not in self.others:
            spiking = self._averages(owner)
        if spiking is not None:
            steps, changed = spiking.steps(tensor), spiking.version != tensor._version
            if steps is not None and not changed:
                self._packed(spiking)
                return Kept(spiking, spiking.first + steps[0], steps[1], tensor.shape, tensor.stride())
            self._left(spiking, CHANGED if changed else PARTIAL)
        elif storage._cdata in self.words:
            # A layer for packed spikes saves these itself.
            self._packed(self.words[storage._cdata])
        elif storage._cdata not in self.others:
            memory = self.others[storage._cdata] = Memory(StorageWeakRef(storage), storage.nbytes())
            cast = owner.grad_fn is not None and owner.grad_fn.name() == "ToCopyBackward0"
            self._left(memory, CAST if cast else NOT_SPIKES)
        return dense

    def _packed(self, spiking: Spiking) -> None:
        words = spiking.words
        nbytes = 0 if words.counted else words.tensor.untyped_storage().nbytes()
        words.counted = True
        if spiking.counted is None:
            spiking.counted = PACKED
            self.count(PACKED, spiking.nbytes, nbytes)
        elif nbytes:
            self.count(PACKED, 0, nbytes)

    def _left(self, memory: Memory, reason: str) -> None:
        if memory.counted == PACKED:
            # It is kept after all: its words have saved nothing.
            self.count(PACKED, -memory.nbytes, 0)
        if memory.counted in (None, PACKED):
            memory.counted = reason
            self.count(reason, memory.nbytes, 0)

    def _sweep(self) -> None:
        """Let go of the words of spikes that are gone, and now and then of the rest."""
        known: list[dict[int, Spiking] | dict[int, Memory]] = [self.spiking, self.words]
        if len(self.others) > self.limit:
            known.append(self.others)
        for memories in known:
            # Neurons in several threads may be heard at once.
            for key, memory in list(memories.items()):
                if memory.alive.expired():
                    memories.pop(key, None)
        self.limit = max(self.limit, 2 * len(self.others)) if len(known) > 2 else self.limit


def _plain(tensor: Tensor) -> bool:
    """Whether it is memory with strides and a version, and nothing else."""
    return type(tensor) in (Tensor, nn.Parameter, Lazy) and tensor.layout == torch.strided and not tensor.is_inference()


def _same(stride: Sequence[int], other: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether two lists of strides are the same layout of that shape."""
    return all(size == 1 or a == b for a, b, size in zip(stride, other, shape, strict=True))
