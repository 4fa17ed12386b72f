"""Convolution and matrix product that keep packed spikes, not dense ones, for their backward pass."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.ops import checks, layout
from trtkern.ops._lazy import Lazy
from trtkern.ops._library import apply, differentiated, is_dual, undisturbed
from trtkern.ops._saved import keep, kept
from trtkern.ops.spikes import Spikes, current, unpack


class SpikeConv2d(Leaf, nn.Conv2d):
    """``torch.nn.Conv2d`` over every timestep; of ``Spikes`` it keeps the words, not the dense spikes.

    Constructor, parameters, state dict and results are those of ``torch.nn.Conv2d``, bit for bit: for the gradient of
    the weight the words are unpacked into the very tensor that was convolved. A padding mode other than "zeros" saves
    the padded spikes, as torch does. Differentiable once when the input is packed.

    Raises:
        TypeError, ValueError: input of another kind or shape.
    """

    takes_time = True

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """The convolution of every step, [T, B, out_channels, H', W'].

        Args:
            x: [T, B, C, H, W], a tensor or ``Spikes``; expanded along time it is convolved once. A tensor [N, C, H, W]
                or [C, H, W] is convolved as torch does.
        """
        if is_proxy(x):
            return self(x)
        name = type(self).__name__
        if isinstance(x, Spikes):
            x = _expect_spikes(name, x)
        elif not isinstance(x, Tensor):
            _refuse(name, "a tensor or Spikes", x)
        spikes = x.spikes if isinstance(x, Spikes) else x
        if spikes.dim() not in ((5,) if isinstance(x, Spikes) else (3, 4, 5)):
            _refuse(name, "[T, B, C, H, W]", spikes)
        if spikes.shape[-3] != self.in_channels:
            _refuse(name, f"{self.in_channels} channels on axis {spikes.dim() - 3}", spikes)
        if spikes.dim() != 5:
            return super().forward(spikes)
        if layout.is_static(spikes):
            y = super().forward(spikes[0])
            return y.expand(spikes.shape[0], *y.shape)
        if isinstance(x, Spikes) and self.padding_mode == "zeros" and _keeps_words(self, spikes):
            y = _apply(self, x, (0, 1), self._convolution())
        else:
            y = super().forward(spikes.flatten(0, 1))
        return y.unflatten(0, spikes.shape[:2])

    def _convolution(self) -> _Convolution:
        padding, last = self.padding, (0, 0)
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            # As torch does it: half on each side, and what is left over as zeros behind the last row and column.
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            padding, last = (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)
        return _Convolution(self.stride, padding, self.dilation, self.groups, last)  # type: ignore[arg-type]


class SpikeLinear(Leaf, nn.Linear):
    """``torch.nn.Linear``; of ``Spikes`` it keeps the words, not the dense spikes.

    Constructor, parameters, state dict and results are those of ``torch.nn.Linear``, bit for bit. Where ``in_features``
    are all the numbers behind the batch axis, those axes are flattened in order, as ``torch.flatten`` does: spikes
    [T, B, C, H, W] of a convolution need no layer between. Differentiable once when the input is packed.

    Raises:
        TypeError, ValueError: input of another kind or shape.
    """

    takes_time = True

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """[T, B, out_features], or [..., out_features] where ``in_features`` is the size of the last axis.

        Args:
            x: [T, B, ...] with ``in_features`` numbers behind the batch axis, a tensor or ``Spikes``; or
                [..., in_features]. Expanded along time it is multiplied once.
        """
        if is_proxy(x):
            return self(x)
        name = type(self).__name__
        if isinstance(x, Spikes):
            x = _expect_spikes(name, x)
        elif not isinstance(x, Tensor):
            _refuse(name, "a tensor or Spikes", x)
        spikes = x.spikes if isinstance(x, Spikes) else x
        behind = math.prod(spikes.shape[2:]) if spikes.dim() > 2 else None
        if behind == self.in_features and (isinstance(x, Spikes) or spikes.shape[-1] != behind):
            first = 2
        elif spikes.dim() > 0 and spikes.shape[-1] == self.in_features:
            first = spikes.dim() - 1
        else:
            _refuse(name, f"[T, B, ...] with in_features={self.in_features} numbers behind the batch axis", spikes)
        if spikes.dim() > 2 and layout.is_static(spikes):
            y = super().forward(spikes[0].flatten(first - 1))
            return y.expand(spikes.shape[0], *y.shape)
        if isinstance(x, Spikes) and _keeps_words(self, spikes):
            return _apply(self, x, (first, -1), _Product())
        return super().forward(spikes.flatten(first))


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    kind = ValueError if isinstance(got, Tensor) else TypeError
    raise kind(f"{name}: expected {expected}, got {checks.describe(got)}")


def _expect_spikes(name: str, x: Spikes) -> Spikes | Tensor:
    """``current(x)``; the words belong to the spikes: of their shape, or of twice their height and width."""
    spikes, words = x
    for what, tensor in (("spikes", spikes), ("words", words)):
        if isinstance(tensor, Tensor):
            checks.plain(name, what, tensor)
    if not isinstance(spikes, Tensor) or not isinstance(words, Tensor) or words.dtype != torch.uint8:
        raise TypeError(
            f"{name}: expected Spikes of a floating tensor and uint8 words, got {checks.describe(spikes)} and "
            f"{checks.describe(words)}; words come from a neuron with packed=True, or from trtkern.ops.spikes.pack"
        )
    shape = tuple(words.shape[1:])
    if x.pooled and len(shape) >= 2:
        shape = (*shape[:-2], shape[-2] // 2, shape[-1] // 2)
    planes = (spikes.shape[0] + 7) // 8 if spikes.dim() > 2 else None
    if planes != words.shape[0] or spikes.shape[1:] != shape or words.device != spikes.device:
        raise ValueError(
            f"{name}: expected Spikes [T, B, ...] with their words [ceil(T / 8), B, ...], got "
            f"{checks.describe(spikes)} and {checks.describe(words)}; a neuron with packed=True returns both"
        )
    return current(x)


def _differentiable(layer: nn.Conv2d | nn.Linear, spikes: Tensor) -> bool:
    """Whether anything has to be kept; tangents (forward mode) are left to torch, which has formulas for them."""
    tensors = (spikes, layer.weight, layer.bias)
    return differentiated(*tensors) and not is_dual(*tensors)


def _keeps_words(layer: nn.Conv2d | nn.Linear, spikes: Tensor) -> bool:
    """Whether the Function runs that keeps words: for a backward pass, or because they are all that there is."""
    return _differentiable(layer, spikes) or _unwritten(spikes)


def _unwritten(spikes: Tensor) -> bool:
    """Whether the Function can make what it needs of the words, and these spikes stay unwritten."""
    return isinstance(spikes, Lazy) and undisturbed() and not spikes.is_made


def _apply(layer: nn.Conv2d | nn.Linear, x: Spikes, axes: tuple[int, int], function: _Convolution | _Product) -> Tensor:
    """The layer's function of the spikes, of whose axes it sees those from the first to the last of two as one."""
    spikes, steps, kind = x.spikes, x.spikes.shape[0], x.spikes.device.type
    if _unwritten(spikes):
        seen = torch.empty_strided(spikes.shape, spikes.stride(), dtype=spikes.dtype, device="meta").flatten(*axes)
    else:
        spikes = seen = layout.dense(spikes).flatten(*axes)
    # What autocast would do, but that no copy of spikes or weight is kept: the backward pass converts again.
    lower = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    kept = _Kept(steps, x.pooled, _lowered(seen.dtype, lower), seen.shape, seen.stride())
    return apply(
        _SpikeFunction, "SpikeConv2d, SpikeLinear", spikes, x.words, layer.weight, layer.bias, function, kept, lower
    )


def _lowered(dtype: torch.dtype, lower: torch.dtype | None) -> torch.dtype:
    """The dtype in which autocast to ``lower`` takes a tensor; it leaves float64 alone."""
    return dtype if lower is None or dtype == torch.float64 else lower


class _Convolution(NamedTuple):
    """``torch.nn.functional.conv2d`` and its gradients, with zeros appended behind the last row and column first."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    last: tuple[int, int]
    """Zero rows and columns to append."""

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


class _Product(NamedTuple):
    """``torch.nn.functional.linear`` and its gradients, spelled as autograd spells them."""

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
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def unpack(self, words: Tensor) -> Tensor:
        """The input as it was in memory: what a convolution computes may depend on that."""
        x = unpack(words, self.timesteps, pooled=self.pooled, dtype=self.dtype).reshape(self.shape)
        return x if x.stride() == self.stride else self.empty(words).copy_(x)

    def empty(self, words: Tensor) -> Tensor:
        return words.new_empty_strided(self.shape, self.stride, dtype=self.dtype)


class _SpikeFunction(torch.autograd.Function):
    @staticmethod
    def forward(x, words, weight, bias, function, kept, lower):
        x = kept.unpack(words) if isinstance(x, Lazy) else x
        x, weight, bias = (t if t is None else t.to(_lowered(t.dtype, lower)) for t in (x, weight, bias))
        return function.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, words, weight, bias, ctx.function, ctx.kept, ctx.lower = inputs
        ctx.shape = x.shape if isinstance(x, Lazy) else None
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        keep(ctx, words, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        words, weight = kept(ctx)
        needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        needs = (needs_x, needs_weight, needs_bias)
        gx, gweight, gbias = apply(
            _SpikeFunctionBackward,
            "SpikeConv2d, SpikeLinear",
            grads[0],
            words,
            weight,
            ctx.function,
            ctx.kept,
            ctx.lower,
            needs,
            ctx.dtypes,
        )
        if ctx.shape is not None and gx is not None:
            gx = gx.view(ctx.shape)
        return gx, None, gweight, gbias, None, None, None


class _SpikeFunctionBackward(torch.autograd.Function):
    @staticmethod
    def forward(g, words, weight, function, kept, lower, needs, dtypes):
        # Only the weight's gradient looks into the spikes; the others need their shape.
        x = kept.unpack(words) if needs[1] else kept.empty(words)
        found = function.backward(g, x, weight.to(_lowered(weight.dtype, lower)), needs)
        return tuple(t if t is None else t.to(dtype) for t, dtype in zip(found, dtypes, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        raise RuntimeError(
            "SpikeConv2d, SpikeLinear: expected a first derivative, got a second one; packed spikes are differentiable "
            "once: pass the dense ones, Spikes.spikes, to differentiate twice"
        )
