"""Layers over time: T * B images as one batch for layers that know no time, sequences [T, B, ...] for those that do."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from trtkern.nn._neuron import Neuron
from trtkern.nn.block import ConvBatchNormLIF
from trtkern.nn.spike_layers import SpikeConv2d, SpikeLinear
from trtkern.ops import _check
from trtkern.ops.spikes import Spikes


def takes_time(layer: nn.Module) -> bool:
    """Whether a layer takes [T, B, ...] itself: what its ``takes_time`` says, else whether a layer inside it does."""
    said = getattr(layer, "takes_time", None)
    return any(takes_time(child) for child in layer.children()) if said is None else bool(said)


class TimeSequential(nn.Sequential):
    """``nn.Sequential`` over sequences [T, B, ...]: layers without time see [T * B, ...], as a view.

    Neurons, the other layers of this package with ``takes_time = True``, and whatever holds such a layer get the
    sequence. A layer of your own says so with ``takes_time = True``, and with ``takes_spikes = True`` that it wants
    packed ``Spikes`` as they are; any other gets the dense spikes. All else (``nn.Conv2d``, ``nn.MaxPool2d``, ...) is
    run once on T and B folded into one axis, contiguous or channels last as it comes. ``nn.BatchNorm2d`` then
    normalises over time, batch and space together: the "tdBN" of the TRT paper (arXiv 2506.19256).

    A static input, the same at every step, costs one step: with ``timesteps`` the input is [B, ...] and everything
    before the first neuron runs on that alone; a tensor expanded along time is treated likewise. The result is that of
    T equal steps. So are the running statistics: the variance is corrected for the T times larger count. Where that
    count is not to be known, a training BatchNorm inside a layer of another class (but ``nn.Sequential``) or a
    ``SyncBatchNorm`` among several processes, all T steps are run. Dropout draws one mask for the T equal steps.

    Args:
        modules: the layers, or an ``OrderedDict`` of them. The state dict is that of ``nn.Sequential``.
        timesteps: T, if the input is one step, [B, ...].

    A slice is a ``TimeSequential`` too; it has ``timesteps`` if it begins where this one begins.

    Raises:
        TypeError, ValueError: timesteps is no int >= 1.
    """

    takes_time = True
    takes_spikes = True

    def __init__(self, *modules: nn.Module | OrderedDict[str, nn.Module], timesteps: int | None = None) -> None:
        if timesteps is not None:
            if isinstance(timesteps, bool) or not isinstance(timesteps, int):
                raise TypeError(f"TimeSequential: expected timesteps to be None or an int, got {timesteps!r}")
            if timesteps < 1:
                raise ValueError(f"TimeSequential: expected timesteps >= 1, got {timesteps}")
        super().__init__(*modules)  # type: ignore[arg-type]
        self.timesteps = timesteps

    def forward(self, x: Any, *, sequence: bool = False) -> Any:
        """What the last layer gives, [T, B, ...].

        Args:
            x: [T, B, ...] or packed ``Spikes``; [B, ...] with ``timesteps``.
            sequence: x is [T, B, ...] although ``timesteps`` is set; T must be that. It is also so for packed spikes
                and for what a container inside another gets.

        Raises:
            TypeError, ValueError: x or what a layer made of it is no tensor, has too few axes, another T or batch.
        """
        if not isinstance(x, (Tensor, Spikes)):
            raise TypeError(f"TimeSequential: expected x to be a tensor or Spikes, got {_check.describe(x)}")
        steps, begun = self.timesteps, sequence or self.timesteps is not None
        if steps is not None and (sequence or isinstance(x, Spikes)):
            _same_time(x, steps)
            steps = None
        for name, layer in self._modules.items():
            if isinstance(layer, nn.Identity):
                x = layer(x)
                continue
            if isinstance(x, Spikes) and not _takes_spikes(layer):
                x = x.spikes
            if takes_time(layer):
                if steps is not None:
                    x, steps = x.expand(steps, *x.shape), None
                _time_first(name, layer, x)
                x = layer(x, sequence=True) if begun and _wants_one_step(layer) else layer(x)
            else:
                x, steps = _stateless(f"TimeSequential: layer {name!r}", layer, x, steps)
            begun = True
        return x if steps is None else x.expand(steps, *x.shape)

    def __getitem__(self, index: slice | int) -> Any:
        """A layer, or with a slice a ``TimeSequential`` of the same layers under the same names."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        begins = 0 in range(len(self))[index]
        layers = OrderedDict(list(self._modules.items())[index])
        return TimeSequential(layers, timesteps=self.timesteps if begins else None)

    def __add__(self, other: nn.Sequential) -> TimeSequential:
        return TimeSequential(*super().__add__(other), timesteps=self.timesteps)

    def __mul__(self, other: int) -> TimeSequential:
        return TimeSequential(*super().__mul__(other), timesteps=self.timesteps)

    def extra_repr(self) -> str:
        """timesteps, where given."""
        return "" if self.timesteps is None else f"timesteps={self.timesteps}"


class OverTime(nn.Module):
    """A layer without time over a sequence: [T, B, ...] -> [T, B, ...] in one call on [T * B, ...], a view.

    What ``TimeSequential`` does by itself, for ``nn.Sequential`` and other code:
    ``nn.Sequential(OverTime(nn.Conv2d(3, 8, 3)), LIF())``. A static input (expanded along time) is run once and the
    result is static, with the same rules. The state dict has the layer's keys under ``module.``: "module.weight".

    Args:
        module: the layer.

    Raises:
        TypeError, ValueError: no layer, or one that takes time itself.
    """

    takes_time = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"OverTime: expected a layer, got {_check.describe(module)}")
        if takes_time(module):
            raise ValueError(
                f"OverTime: expected a layer without time, got {_kind(module)}, which takes [T, B, ...]; leave it bare"
            )
        self.module = module

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """[T, B, ...] of the layer's results for x [T, B, ...]; of packed ``Spikes`` the spikes are taken."""
        return over_time(self.module, x)


def over_time(layer: nn.Module, x: Tensor | Spikes) -> Tensor:
    """What ``OverTime(layer)`` makes of x [T, B, ...]."""
    y, steps = _stateless("OverTime: layer", layer, x.spikes if isinstance(x, Spikes) else x, None)
    return y if steps is None else y.expand(steps, *y.shape)


def _takes_spikes(layer: nn.Module) -> bool:
    """Whether packed spikes go to it as they are: its ``takes_spikes``, or that of the first layer in a Sequential."""
    said = getattr(layer, "takes_spikes", None)
    if said is None and isinstance(layer, nn.Sequential) and len(layer):
        return _takes_spikes(next(iter(layer)))
    return isinstance(layer, (SpikeConv2d, SpikeLinear, ConvBatchNormLIF)) if said is None else bool(said)


def _stateless(who: str, layer: Any, x: Tensor, steps: int | None) -> tuple[Tensor, int | None]:
    """y of a layer without time, and its steps: of x [T, B, ...] with None, or of x [B, ...] shown ``steps`` times."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{who} ({_kind(layer)}) expected a tensor, got {_check.describe(x)}")
    if steps is None and x.dim() > 0 and x.shape[0] > 1 and x.stride(0) == 0:
        x, steps = x[0], x.shape[0]
    if x.dim() < _rank(layer) - (steps is not None):
        wanted = "[T, B, ...]" if steps is None else "[B, ...]"
        raise ValueError(
            f"{who} ({_kind(layer)}) expected {wanted} with {_rank(layer) - (steps is not None)} axes or more, got "
            f"{_check.describe(x)}; a single step needs timesteps=T or x.unsqueeze(0)"
        )
    if steps is None:
        return _folded(who, layer, x), None
    if _plain(layer):
        for child in layer.children():
            x, steps = _stateless(who, child, x, steps)
        return x, steps
    if not any(_tracks(module) for module in layer.modules()):
        return _called(who, layer, x), steps
    if not _counted(layer) or x.dim() < 2 or x.numel() <= x.shape[1]:
        # cat keeps channels_last, which expand() followed by a copy would not.
        return _folded(who, layer, torch.cat([x] * steps).unflatten(0, (steps, -1))), None
    before = layer.running_var.clone()
    y = _called(who, layer, x)
    _recount(layer, before, x.numel() // x.shape[1], steps)
    return y, steps


def _folded(who: str, layer: nn.Module, x: Tensor) -> Tensor:
    return _called(who, layer, x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _called(who: str, layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), which has to be a tensor with as many rows as x."""
    y = layer(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"{who} ({_kind(layer)}) expected to return a tensor, got {_check.describe(y)}")
    if y.dim() < 1 or y.shape[0] != x.shape[0]:
        raise ValueError(
            f"{who} ({_kind(layer)}) expected to keep the {x.shape[0]} rows (T * B, or B of a static input) of "
            f"{_check.describe(x)}, got {_check.describe(y)}; a layer that mixes them needs takes_time = True"
        )
    return y


def _recount(norm: Any, before: Tensor, count: int, steps: int) -> None:
    """The running variance as it is after ``steps`` equal steps: unbiased among steps * count values, not count."""
    with torch.no_grad():
        momentum = norm.momentum
        if momentum is None:
            momentum = 0.0 if norm.num_batches_tracked is None else 1.0 / norm.num_batches_tracked.double()
        # As BatchNorm's own update, this is none that autograd has to know of: no new version.
        held = norm.running_var.data
        held.sub_((held - (1 - momentum) * before) * ((steps - 1) / (steps * count - 1)))


def _tracks(module: nn.Module) -> bool:
    """Whether a call updates running statistics that depend on the number of values."""
    return isinstance(module, _BatchNorm) and module.training and module.track_running_stats


def _counted(layer: nn.Module) -> bool:
    """Whether it is known how many values a BatchNorm counts: those of its input."""
    if type(layer).forward is nn.SyncBatchNorm.forward:
        distributed = torch.distributed
        return layer.running_var is not None and not (distributed.is_available() and distributed.is_initialized())
    held = getattr(layer, "running_var", None)
    return type(layer).forward is _BatchNorm.forward and held is not None and not isinstance(layer, LazyModuleMixin)


def _plain(layer: nn.Module) -> bool:
    """Whether it is an ``nn.Sequential`` whose layers can as well be called one by one."""
    return type(layer).forward is nn.Sequential.forward and not (layer._forward_hooks or layer._forward_pre_hooks)


def _wants_one_step(layer: nn.Module) -> bool:
    """Whether a container would take its input for one step [B, ...]."""
    if not isinstance(layer, TimeSequential):
        return False
    first = next(iter(layer), None)
    return layer.timesteps is not None or (first is not None and _wants_one_step(first))


def _rank(layer: nn.Module) -> int:
    """The least number of axes of [T, B, ...]: these layers would take fewer for one image without a batch."""
    if isinstance(layer, _ConvNd):
        return len(layer.kernel_size) + 3
    return 3 if isinstance(layer, nn.Linear) else 2


def _same_time(x: Tensor | Spikes, steps: int) -> None:
    dense = x.spikes if isinstance(x, Spikes) else x
    if dense.dim() < 1 or dense.shape[0] != steps:
        raise ValueError(
            f"TimeSequential: expected a sequence of timesteps={steps} steps, got {_check.describe(dense)}; set "
            "timesteps to its T, or to None where only sequences come"
        )


def _time_first(name: str, layer: nn.Module, x: Any) -> None:
    if isinstance(layer, Neuron) and layer.time_dim != 0 and (x.dim() == 0 or layer.time_dim % x.dim() != 0):
        raise ValueError(
            f"TimeSequential: layer {name!r} ({_kind(layer)}) expected to have time on axis 0, got time_dim="
            f"{layer.time_dim}; time comes first here"
        )


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__
