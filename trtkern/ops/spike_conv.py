"""Convolutions and matrix products of packed spikes, from their words: no dense tensor is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trtkern import reference
from trtkern._torch import recording
from trtkern.backends import cpu
from trtkern.backends.base import Case, SpikeConvolution
from trtkern.ops._library import define

OP = "spike_conv"
LAST = torch.channels_last


class Shape(NamedTuple):
    """How a layer's input lies in the words, and what the layer is as a convolution."""

    timesteps: int
    pooled: bool
    stride: tuple[int, int]
    padding: tuple[int, int]


def objection(words: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why a layer with packed spikes of that dtype does not run here but in torch, or None.

    What depends on sizes and on the firing rate is another question (``kernel``).
    """
    if torch.compiler.is_compiling() or recording() or torch.jit.is_tracing():
        return "a program that torch compiles or records has torch's own"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a transform of torch.func, or a forward mode, looks into torch's own"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast asks for another dtype"
    for tensor in (weight, bias):
        if tensor is not None and tensor.dtype != dtype:
            return f"parameters in {tensor.dtype} meet spikes in {dtype}"
    case = Case(OP, words.device.type, dtype)
    return cpu.BACKEND.objection(case)


def kernel(words: Tensor, weight: Tensor, shape: Shape, *, weight_grad: bool) -> tuple[str | None, str]:
    """Which kernel of the CPU computes it best here, or None where torch does; and why. It follows from the sizes, the
    instruction set and the share of spikes, never from a timing."""
    return cpu.spike_conv_kernel(_convolution(words, *shape), weight, weight_grad=weight_grad)


def spike_conv(words: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, kernel: str) -> Tensor:
    """The convolution of packed spikes with a weight: [T * B, K, out_h, out_w], channels last.

    y[t B + b] = conv2d(spikes[t, b], weight, bias); with ``shape.pooled`` of the 2x2 averages of the spikes. The sums
    are taken in another order than torch takes them, the same one for any number of threads. Where a weight is not
    finite, torch computes all of y, so that 0 times NaN and 0 times Inf are NaN as they are there.

    Args:
        words: [ceil(T / 8), B, C, H, W] uint8 (``trtkern.ops.spikes.pack``), in any layout; of a sum of spikes
            [addends, ceil(T / 8), B, C, H, W].
        weight: [K, C, kernel_h, kernel_w] float32; bias: [K] float32, or None.
        shape: T, pooling, stride and padding.
        kernel: what ``kernel`` said, or "reference": they are unpacked, and torch convolves them.
    """
    return _forward_op(words, weight, bias, *_listed(shape), kernel)


def spike_conv_weight_grad(words: Tensor, g: Tensor, weight: Tensor, shape: Shape, kernel: str) -> Tensor:
    """The gradient of ``weight`` where that of y is g [T * B, K, out_h, out_w]; it has the weight's strides."""
    return _grad_op(words, g, weight, *_listed(shape), kernel)


def spike_conv_input_grad(words: Tensor, g: Tensor, weight: Tensor, shape: Shape, kernel: str) -> Tensor:
    """The gradient of what is convolved, [T * B, C, H, W] with channels last, where that of y is g.

    There are no spikes in it: of the words the shape alone is looked at. A kernel multiplies float32 by float32, each
    as the sum of three bfloat16; what it leaves out of a product is below 2^-20 of it.
    """
    return _image_op(words, g, weight, *_listed(shape), kernel)


def image_kernel(words: Tensor, weight: Tensor, shape: Shape) -> str | None:
    """Which kernel computes that gradient, or None where torch does."""
    return cpu.spike_conv_image_kernel(SpikeConvolution(words, *shape), weight)


def _listed(shape: Shape) -> tuple[int, bool, list[int], list[int]]:
    return shape.timesteps, shape.pooled, list(shape.stride), list(shape.padding)


def _convolution(words: Tensor, timesteps: int, pooled: bool, stride: Sequence[int], padding: Sequence[int]) -> Any:
    last = words.movedim(-3, -1).contiguous().movedim(-1, -3)
    return SpikeConvolution(last, timesteps, pooled, (stride[0], stride[1]), (padding[0], padding[1]))


def _empty_y(words, weight, bias, timesteps, pooled, stride, padding, kernel):
    conv = SpikeConvolution(words, timesteps, pooled, stride, padding)
    shape = (timesteps * words.shape[-4], weight.shape[0], *conv.output(weight.shape[2:]))
    return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=LAST)


def _forward(words, weight, bias, timesteps, pooled, stride, padding, kernel):
    conv = _convolution(words, timesteps, pooled, stride, padding)
    y = _empty_y(words, weight, bias, timesteps, pooled, stride, padding, kernel)
    done = kernel != "reference" and cpu.spike_conv_forward(conv, weight, bias, y, kernel)
    return y if done else y.copy_(reference.spike_conv(conv, weight, bias))


def _weight_grad(words, g, weight, timesteps, pooled, stride, padding, kernel):
    conv = _convolution(words, timesteps, pooled, stride, padding)
    g, gweight = g.contiguous(memory_format=LAST), torch.empty_like(weight)
    done = kernel != "reference" and cpu.spike_conv_weight_grad(conv, g, gweight, kernel)
    return gweight if done else gweight.copy_(reference.spike_conv_weight_grad(conv, g, weight))


def _empty_gx(words, g, weight, timesteps, pooled, stride, padding, kernel):
    conv = SpikeConvolution(words, timesteps, pooled, stride, padding)
    return torch.empty((g.shape[0], weight.shape[1], *conv.image), dtype=g.dtype, device=g.device, memory_format=LAST)


def _input_grad(words, g, weight, timesteps, pooled, stride, padding, kernel):
    conv = SpikeConvolution(words, timesteps, pooled, (stride[0], stride[1]), (padding[0], padding[1]))
    g, gx = g.contiguous(memory_format=LAST), _empty_gx(words, g, weight, timesteps, pooled, stride, padding, kernel)
    done = kernel != "reference" and cpu.spike_conv_input_grad(conv, g, weight, gx, kernel)
    return gx if done else gx.copy_(reference.spike_conv_input_grad(conv, g, weight))


_SHAPE = "SymInt timesteps, bool pooled, int[] stride, int[] padding, str kernel"
_forward_op = define(
    f"spike_conv(Tensor words, Tensor weight, Tensor? bias, {_SHAPE}) -> Tensor", _forward, _empty_y, None
)
_grad_op = define(
    f"spike_conv_weight_grad(Tensor words, Tensor g, Tensor weight, {_SHAPE}) -> Tensor",
    _weight_grad,
    lambda words, g, weight, *rest: torch.empty_like(weight),
    None,
)
_image_op = define(
    f"spike_conv_input_grad(Tensor words, Tensor g, Tensor weight, {_SHAPE}) -> Tensor", _input_grad, _empty_gx, None
)
