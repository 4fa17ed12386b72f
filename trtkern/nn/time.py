"""Layers over time: T * B images as one batch for layers that know no time, sequences [T, B, ...] for those that do."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from trtkern._torch import exporting, recording
from trtkern.nn._leaf import is_proxy
from trtkern.nn._neuron import carrier, has_state
from trtkern.nn.block import ConvBatchNormLIF
from trtkern.nn.spike_layers import SpikeConv2d, SpikeLinear
from trtkern.ops import checks
from trtkern.ops.spikes import Spikes, dense

if TYPE_CHECKING:
    from trtkern.nn.streams import Stream

# What torch.fx traces is decided by the values that come later: it records these functions, not what they do.
fx.wrap("dense")


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

    takes_time = takes_lengths = True
    takes_spikes = True

    def __init__(self, *modules: nn.Module | OrderedDict[str, nn.Module], timesteps: int | None = None) -> None:
        if timesteps is not None:
            if isinstance(timesteps, bool) or not isinstance(timesteps, int):
                raise TypeError(f"TimeSequential: expected timesteps to be None or an int, got {timesteps!r}")
            if timesteps < 1:
                raise ValueError(f"TimeSequential: expected timesteps >= 1, got {timesteps}")
        super().__init__(*modules)  # type: ignore[arg-type]
        self.timesteps = timesteps

    def forward(self, x: Any, *, sequence: bool = False, lengths: Tensor | None = None) -> Any:
        """What the last layer gives, [T, B, ...].

        Args:
            x: [T, B, ...] or packed ``Spikes``; [B, ...] with ``timesteps``.
            sequence: x is [T, B, ...] although ``timesteps`` is set; T must be that. It is also so for packed spikes
                and for what a container inside another gets.
            lengths: int32 or int64 [B], the steps of each sample, for the neurons (``LIF``). Layers without time see
                what is behind them, too; so BatchNorms need running statistics. A layer of your own with neurons in it
                says by ``takes_lengths = True`` that its ``forward`` takes them.

        Raises:
            TypeError, ValueError: x or what a layer made of it is no tensor, has too few axes, another T or batch; with
                lengths also a BatchNorm in training, or neurons in a layer that takes none.
        """
        # A stream gives sequences, of any T.
        steps = self.timesteps if carrier() is None else None
        begun = sequence if self.timesteps is None else True
        if steps is None or is_proxy(x) or sequence or not isinstance(x, Tensor):
            x, steps = _shown(x, steps, sequence), None
        for name, layer in self._modules.items():
            if isinstance(layer, nn.Identity):
                x = layer(x)
                continue
            if not _takes_spikes(layer):
                x = dense(x)
            if takes_time(layer):
                if steps is not None:
                    x, steps = x.expand(steps, *x.shape), None
                if time_dim := _time_dim(layer):
                    x = _time_first(x, time_dim, f"layer {name!r} ({_kind(layer)})")
                more = {"sequence": begun} if _wants_one_step(layer) else {}
                x = layer(x, **more, **for_lengths(f"TimeSequential: layer {name!r}", layer, lengths))
            else:
                for_lengths(f"TimeSequential: layer {name!r}", layer, lengths)
                x, steps = _stateless(f"TimeSequential: layer {name!r}", layer, x, steps)
            begun = True
        return x if steps is None else x.expand(steps, *x.shape)

    def stream(self) -> Stream:
        """This model over sequences that come in parts (``trtkern.nn.Stream``); ``timesteps`` counts for nothing there:
        ``step`` takes [B, ...] and ``chunk`` [T, B, ...]."""
        from trtkern.nn.streams import Stream

        return Stream(self)

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
            raise TypeError(f"OverTime: expected a layer, got {checks.describe(module)}")
        if takes_time(module):
            raise ValueError(
                f"OverTime: expected a layer without time, got {_kind(module)}, which takes [T, B, ...]; leave it bare"
            )
        self.module = module

    def forward(self, x: Tensor | Spikes) -> Tensor:
        """[T, B, ...] of the layer's results for x [T, B, ...]; of packed ``Spikes`` the spikes are taken."""
        return over_time(self.module, x)


def for_lengths(who: str, layer: nn.Module, lengths: Tensor | None) -> dict[str, Any]:
    """What a layer is called with besides its input, where samples have lengths.

    Raises:
        ValueError: it would count what is behind the end of a sample.
    """
    if lengths is None:
        return {}
    takes = getattr(layer, "takes_lengths", False)
    if not is_proxy(lengths):  # which stands for None, too
        who = f"{who} ({_kind(layer)}) expected"
        if not takes and any(has_state(module) for module in layer.modules()):
            raise ValueError(
                f"{who} to hand lengths to the neurons in it, got a layer whose forward takes none; give it lengths "
                "and takes_lengths = True (of nn.Sequential make a TimeSequential)"
            )
        if any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in layer.modules()):
            raise ValueError(
                f"{who} running statistics with lengths, got a BatchNorm that takes those of the batch, in which what "
                "samples are padded with would count; call eval() (trtkern.nn.freeze_norms), or leave lengths out"
            )
    return {"lengths": lengths} if takes else {}


def over_time(layer: nn.Module, x: Tensor | Spikes) -> Tensor:
    """What ``OverTime(layer)`` makes of x [T, B, ...]."""
    y, steps = _stateless("OverTime: layer", layer, dense(x), None)
    return y if steps is None else y.expand(steps, *y.shape)


def _takes_spikes(layer: nn.Module) -> bool:
    """Whether packed spikes go to it as they are: its ``takes_spikes``, or that of the first layer in a Sequential."""
    said = getattr(layer, "takes_spikes", None)
    if said is None and isinstance(layer, nn.Sequential) and len(layer):
        return _takes_spikes(next(iter(layer)))
    return isinstance(layer, (SpikeConv2d, SpikeLinear, ConvBatchNormLIF)) if said is None else bool(said)


def _stateless(who: str, layer: Any, x: Tensor, steps: int | None) -> tuple[Tensor, int | None]:
    """y of a layer without time, and its steps: of x [T, B, ...] with None, or of x [B, ...] shown ``steps`` times."""
    if is_proxy(x):
        return _recorded(who, layer, x), None
    x, steps = _one_step(f"{who} ({_kind(layer)})", x, steps, _rank(layer))
    if steps is None:
        return _folded(who, layer, x), None
    if _plain(layer):
        for child in layer.children():
            x, steps = _stateless(who, child, x, steps)
        return x, steps
    if not any(_tracks(module) for module in layer.modules()):
        return _called(who, layer, x), steps
    if not _counted(layer) or x.dim() < 2 or x.numel() <= x.shape[1]:
        return _folded(who, layer, _repeated(x, steps).unflatten(0, (steps, -1))), None
    before = layer.running_var.clone()
    y = _called(who, layer, x)
    _recount(layer, before, x.numel() // x.shape[1], steps)
    return y, steps


def _one_step(who: str, x: Tensor, steps: int | None, rank: int) -> tuple[Tensor, int | None]:
    """x [B, ...] and its steps if it is static; x [T, B, ...] and None if not; with enough axes for the layer."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{who} expected a tensor, got {checks.describe(x)}")
    if steps is None and x.dim() > 0 and x.shape[0] > 1 and x.stride(0) == 0 and not recording():
        x, steps = x[0], x.shape[0]
    least = rank - (steps is not None)
    if x.dim() < least:
        wanted = "[T, B, ...]" if steps is None else "[B, ...]"
        raise ValueError(
            f"{who} expected {wanted} with {least} axes or more, got {checks.describe(x)}; a single step needs "
            "timesteps=T or x.unsqueeze(0)"
        )
    return x, steps


def _folded(who: str, layer: nn.Module, x: Tensor) -> Tensor:
    return _called(who, layer, _rows(x)).unflatten(0, x.shape[:2])


def _rows(x: Tensor) -> Tensor:
    """x [T, B, ...] as [T * B, ...], a view where there is one."""
    if exporting():
        # Of flatten() it takes a stride to be min(n, n * B), and would hold B to that when the axes are parted again.
        return x.reshape(-1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return x.flatten(0, 1)


def _repeated(x: Tensor, steps: int) -> Tensor:
    """[T * B, ...] of one step [B, ...]; in channels_last too, which expand() followed by a copy would lose."""
    return torch.cat([x] * steps)


def _called(who: str, layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), which has to be a tensor with as many rows as x."""
    y = layer(_one_row(x))
    _expect_rows(f"{who} ({_kind(layer)})", x, y)
    return y


def _one_row(x: Tensor) -> Tensor:
    """x; a single image in channels_last with the stride along its rows that more of them would have.

    Without it the gradient of an evaluating ``nn.BatchNorm2d`` is wrong on a CPU (torch 2.13): it takes the image for a
    contiguous one, and the gradient that comes for one in channels_last, or the other way round.
    """
    if recording() or x.dim() < 4 or x.shape[0] != 1 or x.stride(1) != 1 or x.stride(0) == x[0].numel():
        return x
    return x.movedim(1, -1)[0].unsqueeze(0).movedim(-1, 1)


def _expect_rows(who: str, x: Tensor, y: Tensor) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"{who} expected to return a tensor, got {checks.describe(y)}")
    if y.dim() < 1 or y.shape[0] != x.shape[0]:
        raise ValueError(
            f"{who} expected to keep the {x.shape[0]} rows (T * B, or B of a static input) of {checks.describe(x)}, "
            f"got {checks.describe(y)}; a layer that mixes them needs takes_time = True"
        )


def _recorded(who: str, layer: nn.Module, x: Any) -> Any:
    """y of a layer without time for torch.fx: a node of its own between two that join and part the axes."""
    who = f"{who} ({_kind(layer)})"
    # Whether it will be in training is not known; the statistics of all steps are those that a static input needs.
    every = any(isinstance(module, _BatchNorm) and module.track_running_stats for module in layer.modules())
    rows = join_time(x, who, _rank(layer), every)
    return part_time(layer(rows), rows, x, who)


@fx.wrap
def join_time(x: Tensor, who: str, rank: int, every: bool) -> Tensor:
    """[T * B, ...] of x [T, B, ...]; of a static x one step, [B, ...], unless ``every`` one is to be counted."""
    x, steps = _one_step(who, x, None, rank)
    if steps is None:
        return _rows(x)
    return _repeated(x, steps) if every else x


@fx.wrap
def part_time(y: Tensor, rows: Tensor, x: Tensor, who: str) -> Tensor:
    """[T, B, ...] of what a layer made of ``join_time(x)``."""
    _expect_rows(who, rows, y)
    steps, batch = x.shape[:2]
    return y.expand(steps, *y.shape) if y.shape[0] != steps * batch else y.unflatten(0, (steps, batch))


@fx.wrap
def _shown(x: Tensor | Spikes, timesteps: int | None, sequence: bool) -> Tensor | Spikes:
    """x as a sequence, with ``timesteps`` as ``TimeSequential.forward`` takes it."""
    if not isinstance(x, (Tensor, Spikes)):
        raise TypeError(f"TimeSequential: expected x to be a tensor or Spikes, got {checks.describe(x)}")
    if timesteps is None:
        return x
    if sequence or isinstance(x, Spikes):
        _same_time(x, timesteps)
        return x
    return x.expand(timesteps, *x.shape)


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
    own = type(layer).forward.__module__ in (nn.SyncBatchNorm.__module__, "trtkern.nn.norms")
    if isinstance(layer, nn.SyncBatchNorm) and own:
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
    spikes = dense(x)
    if spikes.dim() < 1 or spikes.shape[0] != steps:
        raise ValueError(
            f"TimeSequential: expected a sequence of timesteps={steps} steps, got {checks.describe(spikes)}; set "
            "timesteps to its T, or to None where only sequences come"
        )


def _time_dim(layer: Any) -> int:
    """Where it has time."""
    return layer.time_dim if has_state(layer) else 0


@fx.wrap
def _time_first(x: Tensor, time_dim: int, who: str) -> Tensor:
    """x, whose first axis is ``time_dim``."""
    if x.dim() == 0 or time_dim % x.dim() != 0:
        raise ValueError(
            f"TimeSequential: {who} expected to have time on axis 0, got time_dim={time_dim}; time comes first here"
        )
    return x


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__
