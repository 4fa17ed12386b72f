"""Packed spikes: all T spikes of a neuron as the bits of ceil(T / 8) bytes, an exact stand-in for the dense tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern._torch import recording
from trtkern.backends import choose, cpu, named
from trtkern.backends.base import Pool
from trtkern.ops import checks, layout
from trtkern.ops._beneath import is_mapped, transformed
from trtkern.ops._lazy import Lazy
from trtkern.ops._library import define, undisturbed
from trtkern.ops._mapped import Fold
from trtkern.ops._saved import Layout

__all__ = ["Spikes", "dense", "pack", "unpack", "unwritten"]


class Spikes(NamedTuple):
    """Spikes and the words that they are bits of: what a neuron with ``packed=True`` returns and spike layers take."""

    spikes: Tensor
    """[T, B, C, ...] in the dtype of the input current; pooled: 2x2 averages, [T, B, C, H // 2, W // 2]. Where the
    neuron left it unwritten (``lazily``) it is made of the words when somebody computes with it."""
    words: Tensor
    """[ceil(T / 8), B, C, ...] uint8, never pooled: bit t % 8 of plane t // 8 is the spike of step t. Code that
    torch.compile compiled makes (T + 14) // 8 planes, of which the last may be spare. Of a sum of spikes (``add``)
    [addends, ceil(T / 8), B, C, ...], the words of each of them."""

    @property
    def addends(self) -> int:
        """How many spikes ``spikes`` are the sum of: 1, unless the words have an axis for them."""
        return 1 if self.words.dim() <= self.spikes.dim() else self.words.shape[0]

    @property
    def pooled(self) -> bool:
        """Whether ``spikes`` are averages of what ``words`` holds."""
        return self.spikes.shape[1:] != self.words.shape[self.words.dim() - self.spikes.dim() + 1 :]

    @property
    def bits(self) -> int:
        """The bits of a step in the words: one for each neuron, and for each addend."""
        return self.words.numel() // max(1, self.words.shape[-self.spikes.dim()])


def dense(x: Tensor | Spikes) -> Tensor:
    """The dense tensor of ``Spikes``; a tensor as it is.

    Args:
        x: ``Spikes``, or a tensor.
    """
    return x.spikes if isinstance(x, Spikes) else x


def packing(packed: bool) -> bool:
    """Whether a layer that is ``packed`` makes words: not in a recorded program, which has no backward pass for them.

    Their number of planes would also be a constant of the program, and T held to it.
    """
    return packed and not recording()


LEAST_UNWRITTEN = 2**18
"""Spikes below which a neuron writes them: what is done around a tensor that is not written takes longer."""
_unwritten: bool | None = None
"""Whether spikes are left unwritten; None: where they are many."""


@contextmanager
def unwritten(enabled: bool = True) -> Iterator[None]:
    """Inside: whether neurons that make words leave the dense spikes unwritten, however few; or write them, however
    many.

    Args:
        enabled: False: they are written.
    """
    global _unwritten
    before, _unwritten = _unwritten, enabled
    try:
        yield
    finally:
        _unwritten = before


def lazily(x: Tensor, backend: str) -> bool:
    """Whether a neuron with x leaves the dense spikes unwritten, where it makes their words and nothing stands between
    the call and its kernel. Whoever listens wants the dense ones, which he knows by their memory."""
    if torch.compiler.is_compiling():  # whose code would be held to that number
        return False
    wanted = x.numel() >= LEAST_UNWRITTEN if _unwritten is None else _unwritten
    return wanted and backend == "cpu" and x.dtype == torch.float32 and not _listeners


class Unwritten(NamedTuple):
    """Spikes that are not written: how they would lie in memory, and how they are made of their words."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    pooled: bool

    @classmethod
    def like(cls, x: Spikes) -> Unwritten:
        """Those of x, made or not."""
        return cls(tuple(x.spikes.shape), x.spikes.stride(), x.spikes.dtype, x.pooled)

    def of(self, words: Tensor) -> Tensor:
        """The spikes whose words these are, unwritten."""
        counts = not words.is_inference()
        version = words._version if counts else 0

        def make() -> Tensor:
            if counts and words._version != version:
                raise RuntimeError(
                    "Spikes: expected words as the neuron made them, got words that were written to before the dense "
                    "spikes were made of them; take spikes.clone() before writing to the words"
                )
            return self.written(words)

        return Lazy(make, self.shape, self.stride, self.dtype, words.device)

    def written(self, words: Tensor) -> Tensor:
        """The dense spikes."""
        with torch.no_grad():
            spikes = unpack_all(words, self.shape, pooled=self.pooled, dtype=self.dtype)
            if spikes.stride() == self.stride:
                return spikes
            # The words may lie otherwise; and the strides of an axis with one element may be any.
            laid = Layout(self.shape, self.stride, self.dtype, spikes.device).restore(spikes)
            return laid.as_strided(self.shape, self.stride)


MOST_ADDENDS = 8
"""Spikes of a sum up to which it is left unwritten."""


def add(s: Spikes, i: Spikes) -> Spikes | None:
    """s + i, whose words are those of both; unwritten as they are. None where one of them is written, and a sum of
    dense tensors is to be made, or where it would have more than ``MOST_ADDENDS``."""
    both = (s.spikes, i.spikes)
    if not all(isinstance(each, Lazy) and not each.is_made for each in both) or not undisturbed():
        return None
    like, other = Unwritten.like(s), Unwritten.like(i)
    count = s.addends + i.addends
    if like != other or like.pooled or count > MOST_ADDENDS:
        return None
    first = s.words if s.addends == 1 else s.words[0]
    stride = (first.numel(), *layout.strides(first))
    words = first.new_empty_strided((count, *first.shape), stride)
    words[: s.addends], words[s.addends :] = s.words, i.words
    spikes = _Sum.apply(*both, words, like)
    remember(spikes)
    return Spikes(spikes, words)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(s: Tensor, i: Tensor, words: Tensor, like: Unwritten) -> Tensor:
        return like.of(words)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return grads[0], grads[0], None, None


def remember(spikes: Tensor) -> None:
    """Words were made of these spikes as they are now: ``current`` then knows of every write to them.

    Autograd counts the writes to a tensor and to its views. Compiled code and ``torch.inference_mode`` count none.
    """
    if not torch.compiler.is_compiling() and not spikes.is_inference():
        owner = _owner(spikes)
        # With its id: a copy or a pickle of the tensor takes the attribute along, and counts from 0.
        owner.trtkern_written = id(owner), spikes._version  # type: ignore[attr-defined]


def current(x: Spikes) -> Spikes | Tensor:
    """x, or its dense tensor alone where that was written to (``mul_``, dropout in place) since the words were made.

    Beneath ``torch.vmap``, which counts no writes, always the dense one. So it is where spikes that a neuron left
    unwritten were made, and writes to them are not counted.
    """
    if torch.compiler.is_compiling() or not isinstance(x.spikes, Tensor):
        return x
    if isinstance(x.spikes, Lazy):
        if not x.spikes.is_made:
            return x
        if x.spikes.is_exposed or x.spikes.is_inference():
            return x.spikes
    if x.spikes.is_inference():
        return x
    if is_mapped(x.spikes):
        return x.spikes
    owner = _owner(x.spikes)
    known, version = getattr(owner, "trtkern_written", (None, 0))
    return x if known != id(owner) or version == x.spikes._version else x.spikes


def _owner(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


_listeners: list[Callable[[Tensor, Tensor], None]] = []


@contextmanager
def listen(listener: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Inside: every neuron also makes its words, and ``listener(spikes, words)`` hears of both (``Spikes``)."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def listening() -> bool:
    """Whether anybody wants the words: never in compiled code, which would be compiled again for each answer.

    Nor beneath ``torch.func``, where no hook for saved tensors may be.
    """
    return bool(_listeners) and not torch.compiler.is_compiling() and not transformed()


def announce(spikes: Tensor, words: Tensor) -> None:
    """Tell every listener."""
    for listener in _listeners:
        listener(spikes, words)


def pack(spikes: Tensor) -> Tensor:
    """The words [ceil(T / 8), ...] uint8 of dense spikes [T, ...]: whatever is not 0 is a spike.

    Args:
        spikes: [T, ...] of 0 and 1.

    Raises:
        TypeError, ValueError: not a floating tensor [T, ...] with T >= 1.
    """
    checks.sequence("pack", spikes)
    chosen = choose("auto", "spikes_pack", spikes.device.type, spikes.dtype)
    remember(spikes)
    return torch.ops.trtkern.spikes_pack(layout.dense(spikes.detach()), chosen, torch.compiler.is_compiling())


LEAST_PACKED = 2**18
"""Numbers of an input below which it is not looked at whether they are spikes."""


def packed_input(x: Tensor) -> Tensor | Spikes:
    """x [T, ...] with its words, where all of it is 0 or 1, as what a rate code makes is; else x as it is.

    For inputs in float32 on a CPU, where layers compute on words, and that want no gradient.
    """
    if torch.compiler.is_compiling() or recording() or not undisturbed() or x.requires_grad:
        return x
    wanted = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() >= LEAST_PACKED
    if not wanted or not x.is_contiguous() or cpu.missing() is not None or not cpu.all_spikes(x):
        return x
    return Spikes(x, pack(x))


def unpack(words: Tensor, timesteps: int, *, start: int = 0, pooled: bool = False, dtype: torch.dtype) -> Tensor:
    """Dense spikes [timesteps, ...] in ``dtype`` from words: steps ``start`` on, 2x2 averages of them if ``pooled``.

    Args:
        words: [ceil(T / 8), ...] uint8, dense, in any storage order of the axes after the first.
        timesteps: how many steps.
        start: the first of them.
        pooled: whether 2x2 averages over the last two axes come out.
        dtype: of what comes out.

    Raises:
        TypeError, ValueError: words of another kind, or steps that they do not hold.
    """
    # A backward pass that is compiled may not look at a layout.
    if isinstance(words, Tensor) and not torch.compiler.is_compiling():
        checks.plain("unpack", "words", words)
    if not isinstance(words, Tensor) or words.dtype != torch.uint8 or words.dim() < 1:
        raise TypeError(f"unpack: expected words as a uint8 tensor [planes, ...], got {checks.describe(words)}")
    if not 0 <= start < start + timesteps <= 8 * words.shape[0]:
        raise ValueError(
            f"unpack: expected steps within the {8 * words.shape[0]} that the words hold, got {start} to "
            f"{start + timesteps - 1}"
        )
    chosen = choose("auto", "spikes_unpack", words.device.type, dtype)
    words = layout.poolable(words) if pooled else layout.dense(words)
    return torch.ops.trtkern.spikes_unpack(words, start, timesteps, pooled, dtype, chosen)


def unpack_all(words: Tensor, shape: Sequence[int], *, pooled: bool, dtype: torch.dtype) -> Tensor:
    """What the words of ``Spikes`` of that shape stand for: spikes, 2x2 averages, or the sum of several."""
    if words.dim() <= len(shape):
        return unpack(words, shape[0], pooled=pooled, dtype=dtype)
    total, *others = (unpack(each, shape[0], pooled=pooled, dtype=dtype) for each in words)
    for each in others:
        total += each
    return total


def _pack(spikes: Tensor, backend: str, spare: bool = False) -> Tensor:
    words = layout.empty_planes(spikes, spare)
    filled = words[: layout.planes(spikes.shape[0], False)]
    if backend == "reference" or layout.is_static(spikes):
        filled.copy_(reference.spikes_pack(spikes))
    elif spikes.numel():
        named(backend).ops["spikes_pack"](spikes, filled)
    return words


def _empty_spikes(words: Tensor, steps: int, pooled: bool, dtype: torch.dtype) -> Tensor:
    shape, stride = layout.pooled_shape(words) if pooled else (words.shape, layout.strides(words))
    return words.new_empty_strided((steps, *shape[1:]), stride, dtype=dtype)


def _unpack(words: Tensor, start: int, steps: int, pooled: bool, dtype: torch.dtype, backend: str) -> Tensor:
    out = _empty_spikes(words, steps, pooled, dtype)
    if pooled and words.shape[-1] % 2 + words.shape[-2] % 2:
        # An odd last row or column was dropped: the kernels know even images only.
        out.copy_(reference.average_pool(_unpack(words, start, steps, False, dtype, backend)))
    elif backend == "reference":
        dense = reference.spikes_unpack(words, start, steps, dtype)
        out.copy_(reference.average_pool(dense) if pooled else dense)
    elif out.numel():
        pool = Pool(words.stride(-2), words.stride(-1)) if pooled else None
        named(backend).ops["spikes_unpack"](words, start, pool, out)
    return out


def _pack_mapped(info, dims, spikes, backend, spare=False):
    fold = Fold(spikes, dims[0], info.batch_size)
    return fold.out_steps(torch.ops.trtkern.spikes_pack(fold.steps(spikes, dims[0]), backend, spare))


def _unpack_mapped(info, dims, words, start, steps, pooled, dtype, backend):
    fold = Fold(words, dims[0], info.batch_size, pool=pooled)
    folded = fold.steps(words, dims[0])
    return fold.out_steps(torch.ops.trtkern.spikes_unpack(folded, start, steps, pooled, dtype, backend))


define(
    "spikes_pack(Tensor spikes, str backend, bool spare=False) -> Tensor",
    _pack,
    lambda spikes, backend, spare=False: layout.empty_planes(spikes, spare),
    _pack_mapped,
)
define(
    "spikes_unpack(Tensor words, SymInt start, SymInt steps, bool pooled, ScalarType dtype, str backend) -> Tensor",
    _unpack,
    lambda words, start, steps, pooled, dtype, backend: _empty_spikes(words, steps, pooled, dtype),
    _unpack_mapped,
)
