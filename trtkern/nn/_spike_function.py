"""What the layers for packed spikes compute, and their gradients: from the words, or from the dense spikes in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trtkern.ops import layout
from trtkern.ops._lazy import Lazy
from trtkern.ops._library import apply, differentiated, is_dual, undisturbed
from trtkern.ops._saved import keep, kept
from trtkern.ops.spike_conv import (
    Shape,
    image_kernel,
    kernel,
    objection,
    spike_conv,
    spike_conv_input_grad,
    spike_conv_weight_grad,
)
from trtkern.ops.spikes import Spikes, unpack_all

WHO = "SpikeConv2d, SpikeLinear"
OWN = "torch's own"


def over_words(
    layer: nn.Conv2d | nn.Linear, x: Spikes, function: Convolution | Product, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """The layer's function of packed spikes; None where torch computes it and keeps what torch keeps.

    ``weight`` and ``bias`` are the layer's, which a parametrization makes anew whenever they are read.
    """
    spikes, lower = x.spikes, _lower(x.spikes)
    kept = _Kept.of(x, function, lower)
    direct = _objection(layer, x, function, weight, bias) is None
    chosen = _chosen(function, x.words, weight, kept, weight_grad=False)[0] if direct else None
    if not differentiated(spikes, weight, bias) or is_dual(spikes, weight, bias):
        # Tangents (forward mode) are left to torch, which has formulas for them.
        if chosen is not None:
            return function.of_words(x.words, weight, bias, kept, chosen)
        if not (isinstance(spikes, Lazy) and not spikes.is_made and undisturbed()):
            return None  # else the words are all that there is, and the spikes stay unwritten
    return apply(_SpikeFunction, WHO, spikes, x.words, weight, bias, function, kept, lower, chosen, direct)


def kernels_of(layer: Any, x: Tensor | Spikes, function: Convolution | Product) -> list[tuple[str | None, str]]:
    """What computes the layer of x, forward and for the weight's gradient: a kernel's name, None for torch's own; and
    why."""
    weight, bias = layer.weight, layer.bias
    why = _objection(layer, x, function, weight, bias) if isinstance(x, Spikes) else "the input has no words"
    if why is not None or not isinstance(x, Spikes):
        return [(None, why or "")] * 2
    kept = _Kept.of(x, function, None)
    return [_chosen(function, x.words, weight, kept, weight_grad=grad) for grad in (False, True)]


def told(kernels: list[tuple[str | None, str]]) -> str:
    """That in one line."""
    (first, why), (second, _) = kernels
    if first is None and second is None and kernels[0] == kernels[1]:
        return f"{OWN}: {why}"
    forward, gradient = (f"{name or OWN} ({why})" for name, why in kernels)
    return f"forward: {forward}; the weight's gradient: {gradient}"


def _objection(
    layer: Any, x: Spikes, function: Convolution | Product, weight: Tensor, bias: Tensor | None
) -> str | None:
    """Why torch computes the layer, whatever the sizes, or None."""
    if layer.exact:
        return "exact is true"
    return function.objection() or objection(x.words, weight, bias, x.spikes.dtype)


def _chosen(function: Any, words: Tensor, weight: Tensor, kept: _Kept, *, weight_grad: bool) -> tuple[str | None, str]:
    words, weight, shape = function.as_convolution(words, weight, kept)
    return kernel(words, weight, shape, weight_grad=weight_grad)


def _lower(spikes: Tensor) -> torch.dtype | None:
    """What autocast would convert to: the conversion is done here, so that no copy of spikes or weight is kept."""
    kind = spikes.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _lowered(dtype: torch.dtype, lower: torch.dtype | None) -> torch.dtype:
    """The dtype in which autocast to ``lower`` takes a tensor; it leaves float64 alone."""
    return dtype if lower is None or dtype == torch.float64 else lower


class Convolution(NamedTuple):
    """``torch.nn.functional.conv2d`` and its gradients, with zeros appended behind the last row and column first."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    last: tuple[int, int]
    """Zero rows and columns to append."""

    def objection(self) -> str | None:
        """Why no kernel for packed spikes takes it, whatever its sizes, or None."""
        if self.groups != 1:
            return f"groups={self.groups}"
        if any(d != 1 for d in self.dilation):
            return f"dilation={tuple(self.dilation)}"
        return "padding='same' with an even kernel" if any(self.last) else None

    def as_convolution(self, words: Tensor, weight: Tensor, kept: _Kept) -> tuple[Tensor, Tensor, Shape]:
        """Words, weight and shape as ``spike_conv`` takes them."""
        return words, weight, Shape(kept.timesteps, kept.pooled, self.stride, self.padding)  # type: ignore[arg-type]

    def of_words(self, words: Tensor, weight: Tensor, bias: Tensor | None, kept: _Kept, kernel: str) -> Tensor:
        """y [T * B, K, H', W']."""
        words, weight, shape = self.as_convolution(words, weight, kept)
        return spike_conv(words, weight, bias, shape, kernel)

    def weight_grad_of_words(self, words: Tensor, g: Tensor, weight: Tensor, kept: _Kept, kernel: str) -> Tensor:
        words, weight, shape = self.as_convolution(words, weight, kept)
        return spike_conv_weight_grad(words, g, weight, shape, kernel)

    def input_grad(self, words: Tensor, g: Tensor, weight: Tensor, kept: _Kept) -> Tensor | None:
        """The gradient of the images, where a kernel computes it; else None."""
        words, weight, shape = self.as_convolution(words, weight, kept)
        chosen = image_kernel(words, weight, shape)
        return None if chosen is None else spike_conv_input_grad(words, g, weight, shape, chosen)

    def fold(self, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of [T, B, C, H, W] as images [T * B, C, H, W]."""
        images = (shape[0] * shape[1], *shape[2:])
        if shape[0] > 1 and shape[1] > 1 and stride[0] != shape[1] * stride[1]:
            return images, _contiguous(images)  # a copy
        return images, (stride[1] if shape[1] > 1 else stride[0], *stride[2:])

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(self._padded(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gx, gweight, gbias = torch.ops.aten.convolution_backward(
            g, self._padded(x), weight, [weight.shape[0]], self.stride, self.padding, self.dilation, False, [0, 0],
            self.groups, needs,
        )  # fmt: skip
        if gx is not None and any(self.last):
            gx = F.pad(gx, (0, -self.last[1], 0, -self.last[0]))
        return gx, gweight, gbias

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, self.last[1], 0, self.last[0])) if any(self.last) else x


class Product(NamedTuple):
    """``torch.nn.functional.linear`` and its gradients, spelled as autograd spells them."""

    first: int
    """The first of the input's axes that hold the features."""

    def objection(self) -> str | None:
        return None

    def as_convolution(self, words: Tensor, weight: Tensor, kept: _Kept) -> tuple[Tensor, Tensor, Shape]:
        """A matrix product as a convolution: of images of one place, or with a kernel that is a whole image."""
        if len(kept.spikes) == 5 and self.first == 2:
            weight = weight.unflatten(1, kept.spikes[2:])
        else:
            planes = words.shape[: words.dim() - len(kept.spikes) + 1]
            words, weight = words.reshape(*planes, -1, words.shape[-1], 1, 1), weight[..., None, None]
        return words, weight, Shape(kept.timesteps, kept.pooled, (1, 1), (0, 0))

    def of_words(self, words: Tensor, weight: Tensor, bias: Tensor | None, kept: _Kept, kernel: str) -> Tensor:
        words, weight, shape = self.as_convolution(words, weight, kept)
        return spike_conv(words, weight, bias, shape, kernel).view(*kept.spikes[: self.first], weight.shape[0])

    def weight_grad_of_words(self, words: Tensor, g: Tensor, weight: Tensor, kept: _Kept, kernel: str) -> Tensor:
        words, kernel_weight, shape = self.as_convolution(words, weight, kept)
        rows = g.reshape(-1, g.shape[-1])[..., None, None]
        return spike_conv_weight_grad(words, rows, kernel_weight, shape, kernel).view(weight.shape)

    def input_grad(self, words: Tensor, g: Tensor, weight: Tensor, kept: _Kept) -> None:
        """None: torch's own is faster."""

    def fold(self, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of [..., C, H, W] as rows [..., C * H * W]."""
        if self.first == len(shape) - 1:
            return shape, stride
        rows = (*shape[: self.first], math.prod(shape[self.first :]))
        return rows, _contiguous(rows)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows = g.reshape(-1, g.shape[-1])
        gx = rows.mm(weight).view(x.shape) if needs[0] else None
        gweight = rows.t().mm(x.reshape(-1, x.shape[-1])) if needs[1] else None
        return gx, gweight, rows.sum(0) if needs[2] else None


class _Kept(NamedTuple):
    """How to make a layer's input out of the words."""

    timesteps: int
    pooled: bool
    dtype: torch.dtype
    spikes: tuple[int, ...]
    """The shape of the spikes as the layer was given them."""
    shape: tuple[int, ...]
    """Their shape, and strides, as the function takes them."""
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Spikes, function: Convolution | Product, lower: torch.dtype | None) -> _Kept:
        spikes = x.spikes
        shape, stride = function.fold(tuple(spikes.shape), _dense_stride(spikes))
        return cls(spikes.shape[0], x.pooled, _lowered(spikes.dtype, lower), tuple(spikes.shape), shape, stride)

    def unpack(self, words: Tensor) -> Tensor:
        """The input as it was in memory: what a convolution computes may depend on that."""
        x = unpack_all(words, self.spikes, pooled=self.pooled, dtype=self.dtype).reshape(self.shape)
        return x if x.stride() == self.stride else self.empty(words).copy_(x)

    def empty(self, words: Tensor) -> Tensor:
        return words.new_empty_strided(self.shape, self.stride, dtype=self.dtype)


def _dense_stride(spikes: Tensor) -> tuple[int, ...]:
    """The strides of ``layout.dense(spikes)``, without a copy of anything."""
    return spikes.stride() if layout.is_dense(spikes) else _contiguous(spikes.shape)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _SpikeFunction(torch.autograd.Function):
    @staticmethod
    def forward(x, words, weight, bias, function, kept, lower, chosen, direct):
        if chosen is not None:
            return function.of_words(words, weight, bias, kept, chosen)
        unwritten = isinstance(x, Lazy) and not x.is_made
        x = kept.unpack(words) if unwritten else layout.dense(x).reshape(kept.shape)
        x, weight, bias = (t if t is None else t.to(_lowered(t.dtype, lower)) for t in (x, weight, bias))
        return function.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, words, weight, bias, ctx.function, ctx.kept, ctx.lower, _, ctx.direct = inputs
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        keep(ctx, words, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        words, weight = kept(ctx)
        needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        needs = (needs_x, needs_weight, needs_bias)
        gx, gweight, gbias = apply(
            _SpikeFunctionBackward,
            WHO,
            grads[0],
            words,
            weight,
            ctx.function,
            ctx.kept,
            ctx.lower,
            needs,
            ctx.dtypes,
            ctx.direct,
        )
        return gx, None, gweight, gbias, None, None, None, None, None


class _SpikeFunctionBackward(torch.autograd.Function):
    @staticmethod
    def forward(g, words, weight, function, kept, lower, needs, dtypes, direct):
        chosen = None
        if direct and needs[1]:
            chosen = _chosen(function, words, weight, kept, weight_grad=True)[0]
        of_words = None
        if chosen is not None:
            of_words = function.weight_grad_of_words(words, g, weight, kept, chosen)
        of_image = function.input_grad(words, g, weight, kept) if direct and needs[0] else None
        needs = (needs[0] and of_image is None, needs[1] and of_words is None, needs[2])
        # Only the weight's gradient looks into the spikes; the others need their shape.
        x = kept.unpack(words) if needs[1] else kept.empty(words)
        gx, gweight, gbias = function.backward(g, x, weight.to(_lowered(weight.dtype, lower)), needs)
        gx = gx if of_image is None else of_image
        if gx is not None:
            gx = gx.reshape(kept.spikes)
        found = (gx, gweight if of_words is None else of_words, gbias)
        return tuple(t if t is None else t.to(dtype) for t, dtype in zip(found, dtypes, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        raise RuntimeError(
            f"{WHO}: expected a first derivative, got a second one; packed spikes are differentiable once: pass the "
            "dense ones, Spikes.spikes, to differentiate twice"
        )
