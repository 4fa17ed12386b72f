"""The gradients of a layer's weights, of every sample apart, from what the layer reads and the gradient of its output.

Both come as rows [K, B, ...]: K steps (1 where the layer reads one step), B samples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as weights
from torch.nn.modules.batchnorm import _BatchNorm

from trtkern.nn.batch_norm_lif import BatchNormLIF
from trtkern.ops import layout

HELD = 2**24
"""Numbers of gradients that are held at once, roughly."""
LONG = 2**14
"""Numbers, whose sum costs more than a call of torch."""
FEW = 64
"""Squares that are added up in the precision of the gradients; their sums are in float64."""

Found = tuple[Tensor, Tensor]
"""Squared norms, float64: [B] of every sample's gradient, and [] of their sum."""


class Layer:
    """A layer that has read x, [K, B, ...]; called with the gradient of the first k steps of its output.

    Args:
        module: the layer.
        x: what it read.
        trained: of "weight" and "bias".
    """

    MIXED = 2
    """The axis of what lies between batch and features, where a layer reads [T * B * n, features]."""

    def __init__(self, module: Any, x: Tensor, trained: frozenset[str]) -> None:
        self.module, self.x = module, x
        self.weight, self.bias = "weight" in trained, "bias" in trained

    @staticmethod
    def core(module: Any) -> int | None:
        """How many of the last axes belong to a single step of a sample; None is not known."""
        return None

    @staticmethod
    def read(module: Any, x: Tensor) -> Tensor:
        """x, as its rows are counted."""
        return x

    def __call__(self, g: Tensor) -> Found:
        """Of weight and bias together."""
        raise NotImplementedError


def _of(grads: Tensor) -> Found:
    """Of gradients [B, ...]."""
    flat = grads.flatten(1)
    return _squared(flat), _squared(flat.sum(0, keepdim=True))[0]


def _summed(g: Tensor) -> Tensor:
    """[B, C] of [K, B, C, ...]; in two steps, which is the fastest in either layout."""
    return (g.sum(tuple(range(3, g.dim()))) if g.dim() > 3 else g).sum(0)


def over_steps(g: Tensor) -> Tensor:
    """[1, ...], the sum over the K steps of [K, ...]; of dense steps as torch adds the rows of a matrix."""
    if len(g) == 1 or not layout.is_dense(g):
        return g.sum(0, keepdim=True)
    flat = g.as_strided((len(g), g[0].numel()), (g[0].numel(), 1)).sum(0)
    return flat.as_strided(g[:1].shape, g.stride())


def _products(g: Tensor, x: Tensor) -> Tensor:
    """g * x, [K, ...]; added up over the steps, [1, ...], where they are so long that it pays not to write them all."""
    if len(g) == 1 or g[0].numel() < LONG:
        return g * x
    found = g[0] * x[0]
    for some, read in zip(g[1:], x[1:], strict=True):
        found.addcmul_(some, read)
    return found.unsqueeze(0)


def _squared(grads: Tensor) -> Tensor:
    """[B] float64 of [B, n]: a few squares at a time in their own precision."""
    if grads.shape[1] < FEW:
        return torch.linalg.vector_norm(grads, dim=1, dtype=torch.float64).square()
    whole = grads.shape[1] // FEW * FEW
    rest = grads[:, whole:].double().square().sum(1)
    parts = torch.linalg.vector_norm(grads[:, :whole].unflatten(1, (-1, FEW)), dim=2)
    return rest + parts.double().square().sum(1)


def _plus(*found: Found) -> Found:
    owns, wholes = zip(*found, strict=True)
    return sum(owns[1:], owns[0]), sum(wholes[1:], wholes[0])


class Convolution(Layer):
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``: one convolution with a group for every sample.

    Where they are few enough to hold, the stretches of an image's rows that a row of the weight meets are laid out
    once, and batches of matrix products do it for all t, one for each row of the weight.
    """

    WEIGHT = (weights.conv1d_weight, weights.conv2d_weight, weights.conv3d_weight)
    """By the axes of space, from 1."""

    def __init__(self, module: Any, x: Tensor, trained: frozenset[str]) -> None:
        x, self.padding = _padded(module, x)
        self.stretches = _stretches(module, x, self.padding) if "weight" in trained else None
        super().__init__(module, x.contiguous() if self.stretches is None else x, trained)

    @staticmethod
    def core(module: Any) -> int:
        """Channels and space."""
        return 1 + len(module.kernel_size)

    def __call__(self, g: Tensor) -> Found:
        """As its base."""
        found = []
        if self.weight:
            found.append(
                self._weight(g.contiguous()) if self.stretches is None else self._by_stretches(g, self.stretches)
            )
        if self.bias:
            found.append(_of(_summed(g)))
        return _plus(*found)

    @staticmethod
    def _by_stretches(g: Tensor, stretches: list[Tensor]) -> Found:
        g = g.flatten(3)  # in channels_last, too, nothing is copied
        made = g.new_zeros(len(stretches), *g.shape[1:3], stretches[0].shape[-1])
        for row, read in zip(made, stretches, strict=True):
            for some, part in zip(g, read, strict=False):
                row.baddbmm_(some, part)
        own = _squared(made.flatten(0, 1).flatten(1)).view(len(made), -1).sum(0)
        return own, _squared(made.sum(1).view(1, -1))[0]

    def _weight(self, g: Tensor) -> Found:
        module = self.module
        shape, owns = module.weight.shape, []
        whole = torch.zeros(shape.numel(), dtype=g.dtype, device=g.device)
        size = max(1, HELD // shape.numel())
        make: Any = self.WEIGHT[len(module.kernel_size) - 1]
        for x, part in zip(self.x[: len(g)].split(size, 1), g.split(size, 1), strict=True):
            count = part.shape[1]
            made = make(
                x.flatten(1, 2), (count * shape[0], *shape[1:]), part.flatten(1, 2), module.stride, self.padding,
                module.dilation, count * module.groups,
            ).view(count, -1)  # fmt: skip
            owns.append(_squared(made))
            whole += made.sum(0)
        return torch.cat(owns), _squared(whole[None])[0]


def _stretches(module: Any, x: Tensor, padding: tuple[int, ...]) -> list[Tensor] | None:
    """For each row of the weight [K, B, places, width of the kernel * C] of x [K, B, C, H, W], padded: what it meets.

    Where the rows of the output are one apart, all of them are views of the same numbers. None: too many to hold, or
    another kind.
    """
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.dilation != (1, 1):
        return None
    (high, wide), (down, right) = module.kernel_size, module.stride
    around = [width for each in reversed(padding) for width in (each, each)]
    x = F.pad(x.movedim(2, -1), (0, 0, *around)).unfold(3, wide, right)
    if x.numel() * (1 if down == 1 else -(-high // down)) > HELD or x.shape[1] * module.weight.numel() > HELD:
        return None
    x, last = x.transpose(4, 5).flatten(4), x.shape[2] - high + 1
    return [x[:, :, row : row + last : down].flatten(2, 3) for row in range(high)]


def _padded(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x with its padding, where a convolution of zeros on both sides alike would not do, and what is left to pad."""
    none = (0,) * len(module.kernel_size)
    padding = none if module.padding == "valid" else module.padding
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(both // 2, both - both // 2) for both in total]
    else:
        sides = [(each, each) for each in padding]
    if module.padding_mode == "zeros" and padding != "same":
        return x, tuple(padding)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    around = [width for pair in reversed(sides) for width in pair]
    return F.pad(x.flatten(0, 1), around, mode).unflatten(0, x.shape[:2]), none


class Product(Layer):
    """``nn.Linear``: ||sum_p g_p x_p^T||^2 = sum_pq (g_p g_q) (x_p x_q), where there are few places p."""

    def __init__(self, module: Any, x: Tensor, trained: frozenset[str]) -> None:
        self.rows = x.flatten(1, -2)
        super().__init__(module, _places(x), trained)
        count, inner, outer = self.x.shape[1], module.in_features, module.out_features
        self.products = self.x.bmm(self.x.transpose(1, 2)) if count * (inner + outer) < 2 * inner * outer else None

    @staticmethod
    def read(module: Any, x: Tensor) -> Tensor:
        """``SpikeLinear`` flattens everything behind the batch axis."""
        if x.shape[-1] != module.in_features and x.dim() > 2 and math.prod(x.shape[2:]) == module.in_features:
            return x.flatten(2)
        return x

    def __call__(self, g: Tensor) -> Found:
        """As its base."""
        rows, found = g.flatten(1, -2), []
        g = _places(g)
        count = g.shape[1]
        x = self.x[:, :count]
        if self.weight and self.products is not None:
            own = (g.bmm(g.transpose(1, 2)).double() * self.products[:, :count, :count]).sum((1, 2))
            whole = rows.flatten(0, 1).t().mm(self.rows[: len(rows)].flatten(0, 1))
            found.append((own, _squared(whole.view(1, -1))[0]))
        elif self.weight:
            found.append(self._directly(g, x))
        if self.bias:
            found.append(_of(g.sum(1)))
        return _plus(*found)

    def _directly(self, g: Tensor, x: Tensor) -> Found:
        whole, owns = torch.zeros_like(self.module.weight).flatten(), []
        size = max(1, HELD // whole.numel())
        for some, read in zip(g.split(size), x.split(size), strict=True):
            made = some.transpose(1, 2).bmm(read).flatten(1)
            owns.append(_squared(made))
            whole += made.sum(0)
        return torch.cat(owns), _squared(whole[None])[0]


def _places(x: Tensor) -> Tensor:
    """[B, K * places, features] of [K, B, places..., features]."""
    return x.transpose(0, 1).flatten(1, -2)


class Norm(Layer):
    """A normalisation: the gradient of its weight is the sum of g times what was normalised."""

    def __init__(self, module: Any, x: Tensor, trained: frozenset[str]) -> None:
        super().__init__(module, x, trained)
        self.normalised = self.normalise(x)

    def normalise(self, x: Tensor) -> Tensor:
        """x as it is before weight and bias."""
        raise NotImplementedError

    def sum(self, g: Tensor) -> Tensor:
        """[B, weights] of [K, B, ...]."""
        return _summed(g)

    def __call__(self, g: Tensor) -> Found:
        """As its base."""
        found = []
        if self.weight:
            found.append(_of(self.sum(_products(g, self.normalised[: len(g)]))))
        if self.bias:
            found.append(_of(self.sum(g)))
        return _plus(*found)


class ByChannel(Norm):
    """BatchNorm with running statistics."""

    MIXED = -1

    @staticmethod
    def core(module: Any) -> int | None:
        """One axis before the channels: ``nn.BatchNorm1d`` alone takes two kinds."""
        return {nn.BatchNorm2d: 3, nn.BatchNorm3d: 4}.get(type(module))

    def normalise(self, x: Tensor) -> Tensor:
        """As its base."""
        module, shape = self.module, (-1, *[1] * (x.dim() - 3))
        return (x - module.running_mean.view(shape)) * (module.running_var + module.eps).rsqrt().view(shape)


class Fused(ByChannel):
    """``BatchNormLIF``, by the gradient of its input (or of its residual)."""

    def __init__(self, module: Any, x: Tensor, trained: frozenset[str]) -> None:
        super().__init__(module, x, trained)
        scale = torch.ones((), dtype=torch.float64)
        if invertible(module):
            scale = module.weight.detach().double() * (module.running_var.double() + module.eps).rsqrt()
        self.scale = scale.to(x.device)

    @staticmethod
    def core(module: Any) -> int | None:
        """Not known."""
        return None

    def normalise(self, x: Tensor) -> Tensor:
        """As its base."""
        return super().normalise(x.movedim(self.module.channel_dim, 2))

    def sum(self, g: Tensor) -> Tensor:
        """As its base; of the gradient of what was normalised."""
        return super().sum(g) / self.scale

    def __call__(self, g: Tensor) -> Found:
        """As its base."""
        return super().__call__(g.movedim(self.module.channel_dim, 2))


def invertible(module: BatchNormLIF) -> bool:
    """Whether the gradient of what a ``BatchNormLIF`` normalised follows from that of its input."""
    return module.weight is None or bool((module.weight.detach() != 0).all())


class ByPlace(Norm):
    """``nn.LayerNorm``."""

    @staticmethod
    def core(module: Any) -> int:
        """What it normalises over, at least."""
        return len(module.normalized_shape)

    def normalise(self, x: Tensor) -> Tensor:
        """As its base."""
        return F.layer_norm(x, self.module.normalized_shape, eps=self.module.eps)

    def sum(self, g: Tensor) -> Tensor:
        """As its base."""
        between = range(2, g.dim() - len(self.module.normalized_shape))
        return g.sum((0, *between))


class ByGroup(Norm):
    """``nn.GroupNorm``."""

    def normalise(self, x: Tensor) -> Tensor:
        """As its base."""
        return F.group_norm(x.flatten(0, 1), self.module.num_groups, eps=self.module.eps).unflatten(0, x.shape[:2])


def kind_of(module: nn.Module) -> type[Layer] | None:
    """How the gradients of its samples are told apart, or None."""
    own = {name for name, p in module._parameters.items() if p is not None}
    if not own <= {"weight", "bias"}:
        return None
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Convolution
    if isinstance(module, nn.Linear):
        return Product
    if isinstance(module, (_BatchNorm, BatchNormLIF)):
        if module.running_mean is None or module.running_var is None:
            return None  # samples normalise each other
        return Fused if isinstance(module, BatchNormLIF) else ByChannel
    return {nn.LayerNorm: ByPlace, nn.GroupNorm: ByGroup}.get(type(module))


def axes_of(x: Tensor, core: int | None, steps: int, batch: int) -> str | None:
    """Where time and batch are in what a layer reads: "apart" [T, B, ...], "joined" [T * B, ...] or [T * B * n, ...],
    "alone" [B, ...]; None is elsewhere."""
    leading = None if core is None else x.dim() - core
    if leading in (None, 2) and x.dim() > 2 and x.shape[:2] == (steps, batch):
        return "apart"
    if leading not in (None, 1):
        return None
    if x.shape[0] == batch:
        return "alone"
    return "joined" if x.shape[0] % (steps * batch) == 0 else None


def rows(x: Tensor, steps: int, batch: int, axes: str, mixed: int) -> Tensor:
    """[K, B, ...] of x; ``mixed`` is ``Layer.MIXED``."""
    if axes == "apart":
        return x
    if axes == "alone":
        return x.unsqueeze(0)
    joined = x.unflatten(0, (steps, batch, -1))
    return joined.squeeze(2) if joined.shape[2] == 1 else joined.movedim(2, mixed)
