"""Convolution and matrix product of packed spikes: they compute on the words, and keep the words."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._spike_function import Convolution, Product, kernels_of, over_words, told
from trtkern.ops import checks, layout
from trtkern.ops.spikes import Spikes, current


class SpikeConv2d(Leaf, nn.Conv2d):
    """``torch.nn.Conv2d`` over every timestep, which computes on packed ``Spikes`` and keeps their words.

    Constructor, parameters and state dict are those of ``torch.nn.Conv2d``. Of a dense tensor the results are those of
    ``torch.nn.Conv2d``, bit for bit. Of ``Spikes`` in float32 on a CPU a kernel adds up the weights of what fired,
    where that is faster (``kernel_for`` says which one, or why none): the same sums in another order, so that results
    differ by what float32 rounds, and y has channels last. So is the gradient of the weight; with AMX that of the
    spikes comes from a kernel too. With ``exact`` true, results and gradients of ``Spikes`` are torch's bit for bit. A
    padding mode other than "zeros" saves the padded spikes, as torch does.
    Differentiable once when the input is packed.

    Args:
        exact: torch's own kernels compute, also on packed spikes. An attribute too, which may be set at any time.
        others: those of ``torch.nn.Conv2d``.
        args: what ``torch.nn.Conv2d`` takes.

    Raises:
        TypeError, ValueError: input of another kind or shape.
    """

    takes_time = True
    exact: bool = False

    def __init__(self, *args: Any, exact: bool = False, **others: Any) -> None:
        super().__init__(*args, **others)
        self.exact = exact

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """The convolution of every step, [T, B, out_channels, H', W'].

        Args:
            x: [T, B, C, H, W], a tensor or ``Spikes``; expanded along time it is convolved once. A tensor [N, C, H, W]
                or [C, H, W] is convolved as torch does.
        """
        if is_proxy(x):
            return self(x)
        name = type(self).__name__
        x = _expect(name, x)
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
        if isinstance(x, Spikes) and self.padding_mode == "zeros":
            weight, bias = self.weight, self.bias
            found = over_words(self, x, self._convolution(), weight, bias)
            y = self._conv_forward(spikes.flatten(0, 1), weight, bias) if found is None else found
            return y.unflatten(0, spikes.shape[:2])
        return super().forward(spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2])

    def kernel_for(self, x: Tensor | Spikes) -> str:
        """What computes this layer of x, forward and for the gradient of the weight: a kernel that takes packed spikes,
        or torch's own; each with the reason, in one line."""
        return told(self.kernels(x))

    def kernels(self, x: Tensor | Spikes) -> list[tuple[str | None, str]]:
        """The same as names, forward and for the gradient of the weight, None for torch's own; each with the reason."""
        x = _expect(type(self).__name__, x)
        if self.padding_mode != "zeros":
            return [(None, f"padding_mode={self.padding_mode!r}")] * 2
        return kernels_of(self, x, self._convolution())

    def _convolution(self) -> Convolution:
        padding, last = self.padding, (0, 0)
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            # As torch does it: half on each side, and what is left over as zeros behind the last row and column.
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            padding, last = (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)
        return Convolution(self.stride, padding, self.dilation, self.groups, last)  # type: ignore[arg-type]


class SpikeLinear(Leaf, nn.Linear):
    """``torch.nn.Linear``, which computes on packed ``Spikes`` and keeps their words.

    Constructor, parameters and state dict are those of ``torch.nn.Linear``. Results are torch's bit for bit of a dense
    tensor, and of ``Spikes`` with ``exact``; else a kernel adds up the weights of what fired, as in ``SpikeConv2d``.
    Where ``in_features`` are all the numbers behind the batch axis, those axes are flattened in order, as
    ``torch.flatten`` does: spikes [T, B, C, H, W] of a convolution need no layer between. Differentiable once when the
    input is packed.

    Args:
        exact: torch's own kernels compute, also on packed spikes. An attribute too, which may be set at any time.
        others: those of ``torch.nn.Linear``.
        args: what ``torch.nn.Linear`` takes.

    Raises:
        TypeError, ValueError: input of another kind or shape.
    """

    takes_time = True
    exact: bool = False

    def __init__(self, *args: Any, exact: bool = False, **others: Any) -> None:
        super().__init__(*args, **others)
        self.exact = exact

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """[T, B, out_features], or [..., out_features] where ``in_features`` is the size of the last axis.

        Args:
            x: [T, B, ...] with ``in_features`` numbers behind the batch axis, a tensor or ``Spikes``; or
                [..., in_features]. Expanded along time it is multiplied once.
        """
        if is_proxy(x):
            return self(x)
        x = _expect(type(self).__name__, x)
        spikes = x.spikes if isinstance(x, Spikes) else x
        first = self._first(x)
        if spikes.dim() > 2 and layout.is_static(spikes):
            y = super().forward(spikes[0].flatten(first - 1))
            return y.expand(spikes.shape[0], *y.shape)
        if isinstance(x, Spikes):
            weight, bias = self.weight, self.bias
            found = over_words(self, x, Product(first), weight, bias)
            return nn.functional.linear(spikes.flatten(first), weight, bias) if found is None else found
        return super().forward(spikes.flatten(first))

    def kernel_for(self, x: Tensor | Spikes) -> str:
        """As ``SpikeConv2d.kernel_for``."""
        return told(self.kernels(x))

    def kernels(self, x: Tensor | Spikes) -> list[tuple[str | None, str]]:
        """As ``SpikeConv2d.kernels``."""
        x = _expect(type(self).__name__, x)
        return kernels_of(self, x, Product(self._first(x)))

    def _first(self, x: Tensor | Spikes) -> int:
        """The first of the axes that hold the features."""
        spikes = x.spikes if isinstance(x, Spikes) else x
        behind = math.prod(spikes.shape[2:]) if spikes.dim() > 2 else None
        if behind == self.in_features and (isinstance(x, Spikes) or spikes.shape[-1] != behind):
            return 2
        if spikes.dim() > 0 and spikes.shape[-1] == self.in_features:
            return spikes.dim() - 1
        expected = f"[T, B, ...] with in_features={self.in_features} numbers behind the batch axis"
        return _refuse(type(self).__name__, expected, spikes)


def exact_convolutions(model: nn.Module, exact: bool = True) -> None:
    """Set ``exact`` of every ``SpikeConv2d`` and ``SpikeLinear`` in a model: whether torch's own kernels compute them
    also on packed spikes.

    Args:
        model: any module; it is changed.
        exact: True: torch's own kernels, bit for bit; False: the kernels over bits.
    """
    for layer in model.modules():
        if isinstance(layer, (SpikeConv2d, SpikeLinear)):
            layer.exact = exact


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    kind = ValueError if isinstance(got, Tensor) else TypeError
    raise kind(f"{name}: expected {expected}, got {checks.describe(got)}")


def _expect(name: str, x: Tensor | Spikes) -> Tensor | Spikes:
    """x; of ``Spikes``, ``current(x)``, whose words belong to the spikes: of their shape, or of twice their height and
    width."""
    if not isinstance(x, Spikes):
        return x if isinstance(x, Tensor) else _refuse(name, "a tensor or Spikes", x)
    spikes, words = x
    for what, tensor in (("spikes", spikes), ("words", words)):
        if isinstance(tensor, Tensor):
            checks.plain(name, what, tensor)
    if not isinstance(spikes, Tensor) or not isinstance(words, Tensor) or words.dtype != torch.uint8:
        raise TypeError(
            f"{name}: expected Spikes of a floating tensor and uint8 words, got {checks.describe(spikes)} and "
            f"{checks.describe(words)}; words come from a neuron with packed=True, or from trtkern.ops.spikes.pack"
        )
    first = words.dim() - spikes.dim() if x.addends > 1 else 0  # the axis of the planes
    shape = tuple(words.shape[first + 1 :])
    if x.pooled and len(shape) >= 2:
        shape = (*shape[:-2], shape[-2] // 2, shape[-1] // 2)
    planes = layout.planes(spikes.shape[0], False) if spikes.dim() > 2 else words.shape[first] + 1
    fits = planes <= words.shape[first] <= planes + 1
    if not fits or spikes.shape[1:] != shape or words.device != spikes.device:
        raise ValueError(
            f"{name}: expected Spikes [T, B, ...] with their words [ceil(T / 8), B, ...], got "
            f"{checks.describe(spikes)} and {checks.describe(words)}; a neuron with packed=True returns both"
        )
    # Compiled code made one to spare.
    exact = torch.compiler.is_compiling() or words.shape[first] == planes
    return current(x if exact else x._replace(words=words.narrow(first, 0, planes)))
