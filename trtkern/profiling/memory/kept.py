"""What a layer keeps for its backward pass: a formula for each kind, from the shapes, dtypes and strides that it meets.

Here are those of torch's layers; ``spiking.py`` has this project's. What a formula says was read off torch's own
derivatives, and the tests hold it against what is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


class Call(NamedTuple):
    """One call of a layer, seen after it."""

    module: Any
    args: tuple
    kwargs: dict[str, Any]
    output: Any
    made: Mapping[int, Tensor] = MappingProxyType({})
    """What the layers that have run returned last, by ``id``, as tensors without memory."""

    @property
    def x(self) -> Tensor:
        """The input of a layer of torch's."""
        return self.given(0, "input")

    def given(self, position: int, name: str) -> Any:
        """The argument at that position or of that name; None if it was not passed."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)


class Kept(NamedTuple):
    """One tensor that a call keeps."""

    what: str
    """Its name and its bytes, in letters: "y e"."""
    bytes: int
    tensor: Tensor | None = None
    """In whose memory it is, which another layer may keep already; None: in memory of its own."""
    cast: torch.dtype | None = None
    """It is a copy of ``tensor`` in that dtype, which all uses of the tensor share."""


Formula = Callable[[Call], list[Kept] | None]
"""What a call keeps; None for settings that the formula does not cover."""

FORMULAS: dict[type[nn.Module], Formula] = {}
"""The formula of each kind of layer; it holds for subclasses as long as they have the ``forward`` of that kind."""


def formula(module: nn.Module) -> Formula | None:
    """The formula for this layer, if there is one."""
    if is_parametrized(module):
        return None
    kinds = (kind for kind in type(module).__mro__ if kind in FORMULAS and kind.forward is type(module).forward)
    return next((FORMULAS[kind] for kind in kinds), None)


def span(tensor: Tensor) -> int:
    """Bytes that a tensor takes in memory: an axis that it is expanded along counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * tensor.element_size()


def met(what: str, tensor: Tensor) -> Kept:
    """A tensor that the call was given or returned."""
    return Kept(f"{what} e", span(tensor), tensor)


def autocasts(x: Tensor) -> bool:
    """Whether autocast may have an op in float32 that was given x in another dtype."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype not in (torch.float32, torch.float64)


def _low(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast copies this tensor into for a convolution or a matrix product; None: it does not."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return None
    low = torch.get_autocast_dtype(kind)
    return None if tensor.dtype == low else low


def _factors(x: Tensor, weight: Tensor, copied: bool) -> tuple[Kept, Kept]:
    """Input and weight of a convolution or a matrix product, of which autocast keeps copies in its dtype.

    The weight itself is a parameter, and those are not counted; nor is the input, if it was copied already.
    """
    low = _low(x)
    if low is None and not copied:
        first = met("input", x)
    else:
        first = Kept("input e (copy)", x.numel() * (low or x.dtype).itemsize)
    low = _low(weight)
    if low is None:
        return first, met("weight", weight)
    return first, Kept("weight e (copy)", weight.numel() * low.itemsize, weight, low)


def convolved(module: Any, x: Tensor, copied: bool = False) -> list[Kept] | None:
    """What torch's convolution keeps of x, or of a copy of x."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None  # these pad into a copy, or may
    return list(_factors(x, module.weight, copied))


def multiplied(module: Any, x: Tensor, copied: bool = False) -> list[Kept]:
    """What torch's linear layer keeps of x [..., features], or of a copy of x."""
    if x.dim() > 2 and not viewable(x, (-1, x.shape[-1])):
        copied = True
    kept = _factors(x, module.weight, copied)
    # Each factor is kept for the gradient of the other.
    return [item for item, other in zip(kept, (module.weight, x), strict=True) if other.requires_grad]


def viewable(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether x has that shape without a copy."""
    try:
        x.view(shape)
    except RuntimeError:
        return False
    return True


def _mean_and_rstd(call: Call, count: int, per: str) -> Kept:
    """These two of each of ``count`` groups: on a CPU in the dtype of the parameters, elsewhere in float32 at least."""
    weight = call.module.weight
    own = call.x.element_size() if weight is None else weight.element_size()
    size = own if call.x.device.type == "cpu" else max(4, own)
    return Kept(f"mean, rstd {2 * size} {per}", 2 * size * count)


def _batch_norm(call: Call) -> list[Kept]:
    x, norm = call.x, call.module
    batch = norm.training or norm.running_mean is None
    return [met("input", x), *[_mean_and_rstd(call, x.shape[1], "a channel")] * batch]


def _group_norm(call: Call) -> list[Kept] | None:
    x, norm = call.x, call.module
    return None if autocasts(x) else [met("input", x), _mean_and_rstd(call, x.shape[0] * norm.num_groups, "a group")]


def _layer_norm(call: Call) -> list[Kept] | None:
    x, norm = call.x, call.module
    rows = x.numel() // math.prod(norm.normalized_shape)
    return None if autocasts(x) else [met("input", x), _mean_and_rstd(call, rows, "a row")]


def _input(call: Call) -> list[Kept] | None:
    return None if getattr(call.module, "inplace", False) else [met("input", call.x)]


def _output(call: Call) -> list[Kept]:
    return [met("output", call.output)]


def _softmax(call: Call) -> list[Kept] | None:
    return None if autocasts(call.x) else _output(call)


def _adaptive_average(call: Call) -> list[Kept] | None:
    sizes = call.module.output_size
    whole = all(size == 1 for size in (sizes if isinstance(sizes, tuple) else (sizes,)))
    return [] if whole else _input(call)  # the average over everything is a mean, which needs sizes only


def _max_pool(call: Call) -> list[Kept]:
    out = call.output[0] if isinstance(call.output, tuple) else call.output
    return [met("input", call.x), Kept("indices 8 an output", 8 * out.numel())]


def _dropout(call: Call) -> list[Kept]:
    x, dropout = call.x, call.module
    if not dropout.training or dropout.p == 0:
        return []
    if dropout.p == 1:
        return [Kept("zero e", x.element_size())]
    if not isinstance(dropout, nn.Dropout):
        return [Kept("mask e a channel", x.shape[0] * x.shape[1] * x.element_size())]
    return [Kept("mask 1", x.numel()) if x.is_cuda else Kept("mask e", x.numel() * x.element_size())]


def _cross_entropy(call: Call) -> list[Kept] | None:
    logits, target = call.x, call.given(1, "target")
    if autocasts(logits) or target.is_floating_point() or call.module.label_smoothing or call.module.weight is not None:
        return None
    e = logits.element_size()
    return [Kept("log softmax e", logits.numel() * e), met("target", target), Kept("count", e)]


def _mse(call: Call) -> list[Kept] | None:
    x, target = call.x, call.given(1, "target")
    return None if autocasts(x) or x.shape != target.shape else [met("input", x), met("target", target)]


_KINDS: dict[Formula, tuple[type[nn.Module], ...]] = {
    lambda call: convolved(call.module, call.x): (
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    ),
    lambda call: multiplied(call.module, call.x): (nn.Linear,),
    _batch_norm: (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    _group_norm: (nn.GroupNorm,),
    _layer_norm: (nn.LayerNorm,),
    _output: (nn.ReLU, nn.Sigmoid, nn.Tanh),
    _softmax: (nn.Softmax, nn.LogSoftmax),
    _input: (
        nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Hardswish,
        nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Embedding,
    ),
    _adaptive_average: (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    _max_pool: (
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
        nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    ),
    _dropout: (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    _cross_entropy: (nn.CrossEntropyLoss,),
    _mse: (nn.MSELoss,),
    lambda call: []: (nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad2d, nn.PixelShuffle, nn.UpsamplingNearest2d),
}  # fmt: skip
FORMULAS.update({kind: formula for formula, kinds in _KINDS.items() for kind in kinds})
