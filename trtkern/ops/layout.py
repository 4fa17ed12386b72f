"""How tensors lie in memory: dense, static, channels last; and how they are laid out as a kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtkern._torch import recording
from trtkern.ops.checks import describe


def is_dense(x: Tensor) -> bool:
    """Whether x is [T, N] in memory: time outermost, everything after it dense in some order, no overlap."""
    # Compiled code would be held to whether the axis of time, or of the planes of words, has one element.
    if not torch.compiler.is_compiling() and x.is_contiguous():
        return True
    # No sort: torch.compile cannot trace one over symbolic strides.
    axes = [axis for axis in range(1, x.dim()) if x.shape[axis] != 1]
    expected = 1
    while axes:
        fastest = [axis for axis in axes if x.stride(axis) == expected]
        if not fastest:
            return False
        axes.remove(fastest[0])
        expected = expected * x.shape[fastest[0]]
    return bool(x.stride(0) == expected or x.shape[0] == 1)


def is_flat(w: Tensor) -> bool:
    """Whether w is one dense stretch of memory, in whatever order of its axes."""
    return is_dense(w[None])


def flat(w: Tensor) -> Tensor:
    """w itself if it is one dense stretch of memory, else a contiguous copy."""
    return w if is_flat(w) else w.contiguous()


def is_static(x: Tensor) -> bool:
    """Whether x is one dense step, the same at every time: expanded along time; that of an example does not count."""
    return not recording() and x.shape[0] > 1 and x.stride(0) == 0 and is_dense(x[:1])


def dense(x: Tensor) -> Tensor:
    """x itself if its memory is [T, N] or one step of it, else a contiguous copy: the only copy that a layout costs.

    In a recorded program x is contiguous: whether it has to be copied is seen when that runs.
    """
    if recording():
        return x.contiguous()
    return x if is_dense(x) or is_static(x) else x.contiguous()


def by_sample(x: Tensor) -> Tensor:
    """A dense x [T, B, ...] whose samples each lie side by side: itself, or a contiguous copy."""
    x = dense(x)
    return x if samples_apart(x) else x.contiguous()


def samples_apart(x: Tensor) -> bool:
    """Whether the neurons of a sample of a dense x [T, B, ...] lie side by side."""
    return x.shape[1] < 2 or neurons(x) == 0 or x.stride(1) * x.shape[1] == neurons(x)


def by_channel(x: Tensor, axis: int) -> tuple[Tensor, int]:
    """A dense x and the stride of its channels; a recorded program lays them last, with the stride 1 for all sizes."""
    if recording():
        return x.movedim(axis, -1).contiguous().movedim(-1, axis), 1
    return x, x.stride(axis)


def neurons(x: Tensor) -> int:
    """The numbers of one step of x [T, ...]."""
    count = 1
    for size in x.shape[1:]:
        count *= size
    return count


def strides(x: Tensor) -> tuple[int, ...]:
    """The strides of a dense [T, N] tensor in the storage order of x, which may be static."""
    return (neurons(x), *x.stride()[1:])


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A dense tensor of x's shape in its storage order."""
    if x.is_contiguous():
        return torch.empty_like(x, dtype=dtype)  # in x's strides, at half the price of naming them
    return torch.empty_strided(x.shape, strides(x), dtype=dtype or x.dtype, device=x.device)


def planes(timesteps: int, spare: bool) -> int:
    """The planes of words; with some to spare there are two at least, so that no compiled code is held to one."""
    return (timesteps + 14) // 8 if spare else (timesteps + 7) // 8


def empty_planes(x: Tensor, spare: bool) -> Tensor:
    """Room for the words of x; what is spare in it is 0."""
    count = planes(x.shape[0], spare)
    made = torch.empty_strided((count, *x.shape[1:]), strides(x), dtype=torch.uint8, device=x.device)
    if spare:
        made[-1].zero_()
    return made


def empty_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of that tensor."""
    return x.stride() if x.is_contiguous() else strides(x)


def pooled_shape(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the 2x2 averages of x [..., B, C, H, W], in its layout: contiguous or channels last."""
    *time, batch, channels, height, width = x.shape
    height, width = height // 2, width // 2
    if x.stride(-1) == 1:
        inner = (channels * height * width, height * width, width, 1)
    else:
        inner = (channels * height * width, 1, width * channels, channels)
    return (*time, batch, channels, height, width), (*[batch * inner[0]] * len(time), *inner)


def poolable(x: Tensor) -> Tensor:
    """x [T, B, C, H, W], dense and either contiguous or channels last after time: itself, or a contiguous copy."""
    x = dense(x)
    step = x[0]
    # The second question is that for channels last, in words that torch.vmap takes.
    if step.is_contiguous() or step.movedim(-3, -1).is_contiguous():
        return x
    return x.contiguous()


def aligned(value: Tensor, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """``value`` with those strides and that dtype: itself where that already holds, else a copy.

    Incoming gradients come in any layout: expanded (stride 0) from a sum, transposed from a permute.
    """
    if value.shape != tuple(shape) or value.device != like.device:
        raise RuntimeError(f"expected a tensor of shape {tuple(shape)} on {like.device}, got {describe(value)}")
    same = all(a == b for a, b, n in zip(value.stride(), stride, shape, strict=True) if n != 1)
    if same and value.dtype == dtype:
        return value
    return like.new_empty_strided(shape, stride, dtype=dtype).copy_(value)


def alike(value: Tensor, x: Tensor) -> Tensor:
    """``value`` in the layout and the dtype of a dense x: itself where it has them, else a copy."""
    if (
        value.is_contiguous()
        and x.is_contiguous()
        and value.dtype == x.dtype
        and value.shape == x.shape
        and value.device == x.device
    ):
        return value
    return aligned(value, x.shape, strides(x), x.dtype, x)


def empty_state(x: Tensor, states: int) -> Tensor:
    """Room for a state: [...] float32 in x[0]'s layout, or [S, ...] of a neuron with several."""
    shape, stride = (states, *x.shape[1:]), strides(x)
    if states == 1:
        shape, stride = shape[1:], stride[1:]
    return torch.empty_strided(shape, stride, dtype=torch.float32, device=x.device)


def aligned_state(value: Tensor, x: Tensor) -> Tensor:
    """A state, [...] or [S, ...], as float32 in the layout of ``empty_state``."""
    stride = strides(x)
    several = value.dim() == x.dim()
    return aligned(value, value.shape if several else x.shape[1:], stride if several else stride[1:], torch.float32, x)
